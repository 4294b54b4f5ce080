"""Whether the images of a layer make its gradient in one step: its certificate, where some were not told apart.

Behind a ReLU zeros alone tell images apart, at whatever weights each was used (`by_zeros`). The layer's gradient then
gives the delta of each, whatever made it. Of one step at the server's weights these are the tail's deltas, with some
label. An image that was used later, at other weights, has another delta, and another input: no certificate of its own
shows that, since its equations may hold by chance or for the most part.
"""

import torch
from torch import Tensor

from attack.read.by_zeros import told_by_zeros
from attack.read.candidates import ImageEquations, summed_gradient
from attack.read.layer_choice import CandidateLayer
from attack.read.signals import Signals
from attack.read.span import Span
from attack.solve.budget import OutOfTimeError, WorkBudget
from update.evidence import Evidence
from update.loss import Loss

PAIRED = 100.0  # expected errors by which a certificate may be off: of true images up to 13 were seen, of others 190
LEFT = 1e-3  # share of a layer's gradient that one step on its images may leave
NOISY = 30.0  # or so many times what noise is of it
FINE = 1e-4  # share of a layer's gradient that noise may be: with more, deltas name wrong labels
BLURRED = 3.0  # or so many times what the expected errors of the images move
DRAWS = 3  # of such errors
SWEEPS = 20  # through the images, at most, in the search of their labels
MOST = 10**8  # numbers that all images with all labels may take


def against_one_step(
    found: Signals, layer: CandidateLayer, span: Span, loss: Loss, generator: torch.Generator, budget: WorkBudget
) -> tuple[Evidence, ...]:
    """A word on images that one step at the server's weights does not explain.

    Args:
        found: those that were told apart under that assumption.
        layer: at which they were.
        span: of that layer.
        loss: of each image.
        generator: what programmes are drawn from (on the CPU).
        budget: for the search of all images by their zeros.
    """
    if layer.mixes or not layer.inputs.is_sparse:
        return ()
    equations = ImageEquations(span, layer.layer, layer.tail, loss)
    off = (found.certificates - 1).abs() / found.uncertainty.clamp(min=span.precision)
    if float(off.max()) > PAIRED:
        said = (
            f"an image that was told apart counts {float(found.certificates[off.argmax()]):.3g} times in the update, "
            "where a mean has 1"
        )
        return (_of_other_steps(said, float(off.max())),)
    if found.complete or not 1 < span.dimension == found.batch_size or span.noise_share > FINE:
        return ()
    try:
        found = left_of_one_step(equations, generator, budget)
    except OutOfTimeError:
        return ()
    if found is None or found[0] <= max(LEFT, NOISY * span.noise_share, BLURRED * found[1]):
        return ()
    said = f"one step on the images that zeros tell apart leaves {found[0]:.2g} of the part of {layer.name}"
    return (_of_other_steps(said, found[0]),)


def left_of_one_step(
    equations: ImageEquations, generator: torch.Generator, budget: WorkBudget
) -> tuple[float, float] | None:
    """The share of the layer's weighted gradient that one step on its images leaves, with their best labels.

    Beside it stands by how much of the gradient this moves where the images are moved by their expected errors. None
    where zeros do not tell all images apart.

    Raises:
        OutOfTimeError: the budget's clock has run out.
    """
    span = equations.span
    goal = summed_gradient(span)  # (r, c_out)
    c, zeros = told_by_zeros(equations, generator, budget)
    if len(c) < span.batch_size or len(c) * equations.all_deltas(c[:1]).shape[1] * goal.numel() > MOST:
        return None
    every = _contributions(equations, c)
    nearest = equations.mislabelled(c, equations.deltas_told(c)).argmin(1)
    labels = _best_labels(every, goal, nearest, budget)
    left, moved = _made(every, labels) - goal, 0.0
    errors = equations.by_zeros(c, zeros)[1] * c.norm(dim=1) / c.shape[1] ** 0.5
    for _ in range(DRAWS):
        other = c + errors[:, None] * torch.randn(c.shape, generator=generator, dtype=c.dtype).to(c)
        moved = max(moved, float((_made(_contributions(equations, other), labels) - goal - left).norm()))
    return float(left.norm() / goal.norm()), moved / float(goal.norm())


def _best_labels(every: Tensor, goal: Tensor, labels: Tensor, budget: WorkBudget) -> Tensor:
    """The labels (B,) that leave least of the goal (r, c_out), changed one at a time until none leaves less."""
    left = _made(every, labels) - goal
    for _ in range(SWEEPS):
        before = labels.clone()
        for i in range(len(every)):
            budget.check()
            others = left - every[i, labels[i]] + every[i]
            best = int(others.flatten(1).norm(dim=1).argmin())
            labels[i], left = best, others[best]
        if torch.equal(before, labels):
            break
    return labels


def _contributions(equations: ImageEquations, c: Tensor) -> Tensor:
    """What each input of c (B, dim A) adds to B times the gradient with each label, (B, K, r, c_out)."""
    span = equations.span
    patches = span.geometry.patches(span.inputs(c)) @ span.right.T  # (B, P, r)
    return patches.transpose(1, 2)[:, None] @ equations.weighted_deltas(c)


def _made(every: Tensor, labels: Tensor) -> Tensor:
    """The sum (r, c_out) over the inputs, each with its label."""
    return every[torch.arange(len(labels), device=labels.device), labels].sum(0)


def _of_other_steps(said: str, figure: float) -> Evidence:
    return Evidence("training", f"{said}: the client made other steps than the declared one", figure, contradicts=True)
