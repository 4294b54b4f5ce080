"""All images of a layer at once, where BatchNorm in training mode behind it mixes them.

An image's delta then depends on all the others, so none can be judged by itself, as `candidates` does, nor taken out of
the gradient before the next is sought. What tells the images from their mixtures is left: they come out of a ReLU, so
they are the sparse rays of the cone of non-negative inputs in A (`rays`). All else follows for the batch as a whole:

1. Relative scales. All patches of all images have the same part outside R (`span`), so one factor s is open.
2. The head. Run forward together, the images have features h (B, d), and the head's gradient B G = sum_i e_i h_i^T
   gives each image's errors e_i by least squares.
3. Labels. An image's label is the one whose errors, softmax less target, come nearest to e_i: no search.
4. The factor s is the one at which errors and e_i agree best. Where BatchNorm hides it, because nothing passes by, the
   gradient of the shift in front of the ReLU tells it: delta, summed over active entries, goes with 1 / s.

The agreement of errors and e_i, K numbers an image that nothing above was fitted to but s, certifies all of it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from attack.read.candidates import along_ones
from attack.read.rays import extreme_rays, pinned, single_programme
from attack.read.signals import Signals
from attack.read.span import Span
from attack.solve.budget import WorkBudget
from attack.solve.least_squares import least_squares
from attack.solve.programmes import Programme
from attack.walk.gauge import AGAIN, factor_by_shift
from network.known_outputs import FLOOR, UndeterminedError
from update.loss import Loss

TRIES = 6  # rounds of programmes, each of as many as there are images
EMPTY = 2  # zeros that an image has beyond those that any extreme ray has
POWERS = -2.0, 4.0, 61  # of ten: the factors tried, times what makes the inputs' root mean square 1
BESIDE = 1e-2  # relative distance from the best factor at which the disagreement shows how sharply it is told
TOLD = 1e-5  # relative error of a factor that needs no second opinion
AGREED = 1e-2  # of all errors: a larger disagreement is none of noise
APART = 1e-6  # of the cosine: rays that are closer are one


@dataclass(frozen=True)
class Upwards:
    """The network above the layer's inputs, in float64, BatchNorm as the client had it.

    Attributes:
        run: inputs (B, *input_shape) to features (B, d) and logits (B, K), of all images together.
        head_gradient: sum_i e_i h_i^T, (K, d).
        loss: the client's, of each image.
        shift_gradient: of the shift in front of the ReLU that the inputs come out of, summed over the batch; or None.
    """

    run: Callable[[Tensor], tuple[Tensor, Tensor]]
    head_gradient: Tensor
    loss: Loss
    shift_gradient: Tensor | None

    def judged(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Labels (B,), the head's errors e (B, K), and the errors of these labels (B, K)."""
        features, logits = self.run(inputs)
        told = least_squares(features.T, self.head_gradient.T)  # (B, K)
        count, classes = logits.shape
        every = torch.arange(classes, device=logits.device).repeat(count)
        errors = self.loss.errors(logits.repeat_interleave(classes, 0), every).view(count, classes, classes)
        if self.loss.is_open:  # their length is not known before the labels, and their direction is
            labels = torch.cosine_similarity(errors, told[:, None], dim=2).argmax(1)
            return labels, told, self.loss.of_batch(labels).errors(logits, labels)
        labels = (errors - told[:, None]).norm(dim=2).argmin(1)
        return labels, told, errors[torch.arange(count), labels]

    def disagreement(self, inputs: Tensor) -> float:
        """|e - errors| / |errors| of the whole batch."""
        _, told, errors = self.judged(inputs)
        return float((told - errors).norm() / errors.norm())


def told_apart_jointly(span: Span, upwards: Upwards, *, generator: torch.Generator, budget: WorkBudget) -> Signals:
    """All images of a layer whose inputs come out of a ReLU, surest first.

    Args:
        span: of the layer's gradient, centred where BatchNorm follows right behind the layer.
        upwards: the network above the layer's inputs.
        generator: what programmes are drawn from, on the CPU.
        budget: whose work and clock end the search.

    Raises:
        ValueError: not all images are found, or they do not agree with the head's gradient.
        OutOfTimeError: the budget's clock has run out.
    """
    programme, rays = single_programme(span), span.basis.new_zeros(0, span.dimension)
    zeros, reason = torch.zeros(0, span.basis.shape[1], dtype=torch.bool, device=rays.device), ""
    for _ in range(TRIES):
        rays, zeros = _with_more(rays, zeros, span, programme, generator, budget)
        if len(rays) < span.batch_size:
            reason = f"{len(rays)} of {span.batch_size} images are rays, and a mixed batch takes all of them"
        else:
            found = _judged(rays[: span.batch_size], zeros[: span.batch_size], span, upwards)
            if float(found.residuals.norm()) < AGREED:
                return found.surest_first()
            reason = f"the images disagree with the head's gradient by {float(found.residuals.norm()):.1e}"
        if budget.is_spent:
            break
    raise ValueError(reason)


def _with_more(
    rays: Tensor, zeros: Tensor, span: Span, programme: Programme, generator: torch.Generator, budget: WorkBudget
) -> tuple[Tensor, Tensor]:
    """The rays (N, dim A) with their zeros (N, n) and new ones, those with most zeros first: mixtures have few."""
    new, new_zeros = extreme_rays(span, programme, span.dimension, generator, budget)
    new, new_zeros = pinned(span, None, new[new_zeros.sum(1) >= span.dimension + EMPTY])
    for ray, silent in zip(new / new.norm(dim=1, keepdim=True), new_zeros, strict=True):
        if not ((rays @ ray).abs() > 1 - APART).any():
            rays, zeros = torch.cat([rays, ray[None]]), torch.cat([zeros, silent[None]])
    order = zeros.sum(1).argsort(descending=True, stable=True)
    return rays[order], zeros[order]


def _judged(rays: Tensor, zeros: Tensor, span: Span, upwards: Upwards) -> Signals:
    """Rays (B, dim A) with these zeros (B, n) as the images of the batch; residuals say how far the head disagrees."""
    along = along_ones(span)
    if along is not None:
        rays = rays / (rays @ along).mean(1, keepdim=True).abs()
    values = span.inputs(rays)
    values = values / values.square().mean().sqrt()
    factor, error = _factor(values, upwards)
    values = factor * values
    labels, told, errors = upwards.judged(values)
    off = (told - errors).norm(dim=1) / errors.norm()
    certificates = (told * errors).sum(1) / errors.square().sum(1).clamp(min=1e-300)
    uncertainty, freedom = _expected_error(span, rays, zeros, off, error)
    deltas = values.new_zeros(len(values), *span.geometry.output_shape)
    return Signals(values, labels, deltas, off, certificates, uncertainty, freedom, span.batch_size)


def _factor(values: Tensor, upwards: Upwards) -> tuple[float, float]:
    """What the inputs must be multiplied by, and the relative error of that."""
    by_head = _by_head(values, upwards)
    if by_head[1] < TOLD or upwards.shift_gradient is None:
        return by_head
    try:
        by_shift = _by_shift(values, upwards)
    except UndeterminedError:
        return by_head
    return min(by_head, by_shift, key=lambda told: told[1])


def _by_head(values: Tensor, upwards: Upwards) -> tuple[float, float]:
    """The factor at which errors and the head's gradient agree best, and how sharply."""

    def cost(power: float) -> float:
        off = upwards.disagreement(10**power * values)
        return off if math.isfinite(off) else math.inf

    powers = torch.linspace(*POWERS).tolist()
    best = min(powers, key=cost)
    step = powers[1] - powers[0]
    found = minimize_scalar(cost, bounds=(best - step, best + step), method="bounded", options={"xatol": 1e-9})
    beside = math.log10(1 + BESIDE)
    steepness = (cost(found.x + beside) - found.fun) / BESIDE
    return 10**found.x, found.fun / steepness if steepness > 0 else math.inf


def _by_shift(values: Tensor, upwards: Upwards) -> tuple[float, float]:
    """The same where BatchNorm hides the factor from everything above."""
    (labels, *_), factor, error = upwards.judged(values), 1.0, 0.0
    for _ in range(AGAIN):
        scaled = factor * values
        delta = upwards.loss.of_batch(labels).delta(lambda inputs: upwards.run(inputs)[1], scaled, labels)
        more, error = factor_by_shift(scaled, delta, upwards.shift_gradient)
        factor *= more
    return factor, error


def _expected_error(span: Span, c: Tensor, zeros: Tensor, off: Tensor, scale_error: float) -> tuple[Tensor, Tensor]:
    """Each image's expected relative error (B,), and its degrees of freedom (B,).

    Noise turns the span, moves a ray within it as far as its zeros are moved, and the common factor has an error of its
    own; the disagreement with the head shows all of them.
    """
    patches = span.geometry.patches(span.inputs(c))
    if span.centred:
        patches = patches - patches.mean(1, keepdim=True)
    turned = span.turned((patches @ span.right.T).flatten(1))
    at_zeros = (c @ span.basis) * zeros
    within = at_zeros.norm(dim=1) / zeros.sum(1).clamp(min=1).sqrt() * c.shape[1] ** 0.5 / c.norm(dim=1)
    shown = torch.hypot(torch.hypot(turned, within), off.norm() / off.numel() ** 0.5)
    uncertainty = torch.hypot(shown, shown.new_tensor(math.hypot(scale_error, max(FLOOR, span.precision))))
    return uncertainty, torch.full_like(uncertainty, float(c.shape[1]))
