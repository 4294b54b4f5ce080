"""All images of a smooth head at once, where its classes are too few to tell one image from the mixtures alone.

`attack.read.peel` needs more outputs than images by far. A head of K = 10 classes behind a sigmoid leaves eight images
only together: their labels, and the B x B mixing that solves the softmax's equations, are searched for here.

Labels come from signs, counts from trial. Where features are non-negative, row k of G = (1/B) sum_i e_i h_i^T can be
negative somewhere only if an image of class k is in the batch: no other softmax error is negative. In a trained network
the converse holds nearly always, too. With gamma = (1/B) sum_i e_i, n_k > -B gamma_k. What counts this leaves are
ordered by how well they agree with gamma, which needs no assumption on the images: a network that predicts
(1 - t)/K + t n/B on average, whatever its t, has gamma = -(1 - t)(n/B - 1/K). Each is tried from starts anywhere, for
hundredths of a second: with the right counts one start in four converges to rounding, with wrong ones the residual
stays 10^4 times higher, so the first that explains the gradient is right.
"""

import itertools
import math

import torch
from torch import Tensor

from attack.read.candidates import ARITHMETIC, UNSURE, nobody
from attack.read.head.equations import HeadEquations, HeadPoint, HeadSpan, solve
from attack.read.head.error_bars import EXPLAINED, error_per_noise
from attack.read.label_counts import spelled_out, whole_counts
from attack.read.peel import starts
from attack.read.signals import Signals
from attack.read.span import Span
from attack.solve.budget import WorkBudget
from update.loss import CROSS_ENTROPY, Loss

ITERATIONS = 60  # of a trial, at most; those that converge take 10 to 30
STARTS_PER_SET = 6  # per set of labels and sweep: one in four converges if the labels are right
SWEEPS = 4  # over all sets of labels
ENUMERABLE = 4000  # more sets than these are not listed but proposed from gamma
SETS = 400  # tried, at most
CONVICTIONS = 10  # values of t for which sets are proposed
NEGATIVE = 10.0  # units of a row's noise: an entry this far below zero is negative


def unmix_head(
    span: Span,
    weight: Tensor,
    bias: Tensor,
    gradient: Tensor,
    bias_gradient: Tensor | None,
    *,
    loss: Loss = CROSS_ENTROPY,
    non_negative: bool,
    generator: torch.Generator,
    budget: WorkBudget,
) -> Signals:
    """All features of a head, or none where no set of labels explains its gradient.

    Args:
        span: of the head's gradient.
        weight: W (K, d).
        bias: b (K,).
        gradient: G (K, d).
        bias_gradient: gamma (K,), or None where the update has none.
        loss: the client's, a cross-entropy.
        non_negative: whether features are, as after a sigmoid or a ReLU: it narrows the labels down.
        generator: what starts are drawn from (on the CPU).
        budget: of work, about multiplications, and of time.

    Raises:
        ValueError: the gradient does not determine its span.
        OutOfTimeError: the budget's clock has run out.
    """
    if not span.determined:
        raise ValueError(f"the head's gradient does not determine {span.batch_size} images: rank {span.rank}")
    if span.rank < span.batch_size:
        return nobody(span)
    sets = label_sets(span, gradient.to(span.basis), bias_gradient, non_negative, loss)
    factors = HeadSpan(span.left, span.sigma, span.right)
    weight, bias = weight.detach().to(span.basis), bias.detach().to(span.basis)
    gamma = None if bias_gradient is None else bias_gradient.detach().to(span.basis)
    systems = [HeadEquations(factors, span.rows, weight, bias, gamma, labels, loss) for labels in sets]
    for _ in range(SWEEPS):
        for equations, labels in zip(systems, sets, strict=True):
            for _ in range(STARTS_PER_SET):
                if budget.is_spent:
                    return nobody(span)
                budget.spend(ITERATIONS * (span.batch_size * span.rank) ** 2)
                start = starts(span, span.batch_size, generator) @ span.basis @ span.right.T
                at = equations.at(solve(equations, start, ITERATIONS, budget))
                found = _judged(span, equations, at, labels, weight, generator)
                if found is not None:
                    return found
    return nobody(span)


def label_sets(
    span: Span, gradient: Tensor, bias_gradient: Tensor | None, non_negative: bool, loss: Loss = CROSS_ENTROPY
) -> list[Tensor]:
    """Labels (B,) that the batch may have: of the classes that show themselves first, then of all, likeliest first.

    With label smoothing eps the errors of other classes are as low as -eps / K: their signs show nothing.
    """
    size, classes, smoothing = span.batch_size, len(gradient), loss.smoothing
    weights = loss.of_classes(gradient, classes)
    divisor = size * (float(weights.min()) if loss.is_open else 1.0)  # of the batch's loss, at least
    share = gradient.sum(1) / gradient.sum(1).abs().sum() if bias_gradient is None else bias_gradient.to(gradient)
    least = gradient.new_zeros(classes)
    if bias_gradient is not None:
        # the softmax is above zero
        least = -(divisor * share / weights + size * smoothing / classes) / (1 - smoothing)
        least = (least - 1e-3).ceil().clamp(min=0)
    everywhere = torch.ones_like(least, dtype=torch.bool)
    if not non_negative or smoothing:
        return _ordered(least, everywhere, share, size, weights)
    noise = torch.where(span.rows > 0, span.noise / span.rows, 0.0)
    shown = gradient.amin(1) < -NEGATIVE * noise
    least = torch.maximum(least, shown.to(least))
    first = _ordered(least, (least > 0), share, size, weights)
    tried = {tuple(labels.tolist()) for labels in first}
    return first + [
        labels for labels in _ordered(least, everywhere, share, size, weights) if tuple(labels.tolist()) not in tried
    ]


def _ordered(least: Tensor, allowed: Tensor, share: Tensor, size: int, weights: Tensor) -> list[Tensor]:
    """Labels with counts of at least `least`, others of allowed classes only, best agreement with gamma first."""
    spare, places = size - int(least.sum()), allowed.nonzero()[:, 0]
    if spare < 0 or not len(places):
        return []
    if math.comb(spare + len(places) - 1, spare) <= ENUMERABLE:
        combinations = list(itertools.combinations_with_replacement(places.tolist(), spare))
        extra = torch.tensor(combinations, dtype=torch.long, device=least.device).view(len(combinations), spare)
        counts = least + torch.zeros(len(extra), len(least)).to(least).scatter_add_(
            1, extra, torch.ones_like(extra).to(least)
        )
    else:
        counts = _proposed(least, allowed, share, size, weights)
    shares = torch.nn.functional.normalize(counts * weights, p=1.0, dim=1)
    agreement = torch.cosine_similarity(shares - 1 / len(least), -share[None], dim=1)
    return [spelled_out(counts[i]) for i in agreement.argsort(descending=True)[:SETS].tolist()]


def _proposed(least: Tensor, allowed: Tensor, share: Tensor, size: int, weights: Tensor) -> Tensor:
    """Counts (N, K) near n/B = 1/K - gamma/(1 - t) for a few t, and their neighbours by one exchange.

    With class weights w these are the shares of w n.
    """
    found = {}
    for t in torch.linspace(0, 0.95, CONVICTIONS).tolist():
        expected = (1 / len(share) - share / (1 - t)) / weights
        expected = size * expected / expected.sum() * allowed
        counts = least + whole_counts((expected - least).clamp(min=0), size - int(least.sum()))
        found[tuple(counts.tolist())] = counts
    unit = torch.eye(len(share)).to(least)
    for counts in list(found.values()):
        for more, less in itertools.permutations(allowed.nonzero()[:, 0].tolist(), 2):
            if counts[less] > least[less]:
                neighbour = counts + unit[more] - unit[less]
                found[tuple(neighbour.tolist())] = neighbour
    return torch.stack(list(found.values()))


def _judged(
    span: Span, equations: HeadEquations, at: HeadPoint, labels: Tensor, weight: Tensor, generator: torch.Generator
) -> Signals | None:
    """The solution if it leaves nothing but noise of the gradient, and says what that noise makes of each image."""
    freedom = max(1, at.f.numel() - at.q.numel())
    allowance = (EXPLAINED * span.noise) ** 2 * freedom
    allowance += (ARITHMETIC * span.precision * float(span.sigma.norm())) ** 2
    if not math.isfinite(at.cost) or at.cost > allowance:
        return None
    error = error_per_noise(equations, at, weight, span.right, generator)
    uncertainty = error.expected(span.noise, at.cost) / at.q.norm(dim=1)
    outside = (at.e - at.e @ span.left @ span.left.T).norm(dim=1) / at.e.norm(dim=1)
    found = Signals(
        values=(at.q @ span.right).view(-1, *span.geometry.input_shape),
        labels=labels,
        deltas=at.errors,
        residuals=outside,
        certificates=(at.q / span.sigma * (at.e @ span.left)).sum(1) / span.batch_size,
        uncertainty=uncertainty,
        freedom=error.freedom,
        batch_size=span.batch_size,
    )
    return found.pick(uncertainty < UNSURE)
