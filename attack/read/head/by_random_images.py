"""Per-image signals: the label and features of every image, from the head's averaged gradient.

With logits z = W h + b and mean cross-entropy, image i leaves its softmax error e_i = softmax(W h_i + b) - onehot(y_i)
and its features h_i in the averaged gradients of the last layer:

    G = (1/B) sum_i e_i h_i^T   (K, d),        gamma = (1/B) sum_i e_i   (K,).

G = U diag(sigma) R has rank B as long as B <= min(K - 1, d), so every h_i is R^T q_i for some q_i (r,). The errors are
functions of the features, which leaves

    (1/B) sum_i e(R^T q_i, y_i) q_i^T = U diag(sigma),        (1/B) sum_i e(R^T q_i, y_i) = gamma:

K (r + 1) equations in B r unknowns, for all images at once. They are solved in five steps:

1. Labels. sum_i softmax(z_i) = B gamma + counts: the mean over random images stands in for the left side, and what it
   may be off by is known from their covariance.
2. Row scaling. Rounding is relative: the row of a class that hardly any image resembles is as exact as the strongest,
   however small. Each row is divided by its length, as far as it stands above additive noise. Images that share a label
   have nearly equal errors; in the raw matrix what tells them apart is 1e-6 as strong as the first singular direction
   and drowns, in the scaled one it is 1e-4.
3. Levenberg-Marquardt with geodesic acceleration, in float64, all images together, from features of random images: the
   path is a bent valley, which acceleration (Transtrum and Sethna 2012, arXiv 1201.5885) follows five times as fast.
4. Judgement. c = 1 / (h^T G^+ e) must come out as 1/B, P e as zero (P projects on the complement of U), and noise like
   that which is left is simulated, to first order, to say what it makes of each image (`error_bars`).
5. Whoever passes stays, the others start anew.

Relatives: Cocktail Party Attack (Kariyappa et al. 2022, arXiv 2209.05578) unmixes the same gradient by ICA, SPEAR
(Dimitrov et al. 2024, arXiv 2403.03945) by the sparsity of ReLU, iLRG (Ma et al., ICLR 2023) recovers label counts.
"""

import math

import torch
from torch import Tensor, nn

from attack.read.head.equations import solve
from attack.read.head.error_bars import EXPLAINED, error_per_noise
from attack.read.head.gradient import HeadGradient
from attack.read.label_counts import LabelCounts, spelled_out
from attack.read.random_images import SAMPLE, random_features
from attack.read.signals import Signals
from attack.solve.budget import OutOfTimeError, WorkBudget
from network.head import feature_range
from update.shared import SharedUpdate

SPREAD = 0.7  # starts lie this far from the mean feature, in units of the distance of random images
ITERATIONS = 150  # Levenberg-Marquardt iterations of an attempt, at most
ATTEMPTS = 8  # times that those who did not pass start anew, at most
SOLVER_WORK = 3e13  # and no more than this many multiplications in all, about: some minutes
TRIAL = 6  # iterations that each plausible set of labels is tried for, where there are several
SETTLED_LABELS = 2e-5  # a residual below this share of sigma_1 settles the choice of labels: wrong ones leave 1e-3
UNEVEN = 2.0  # the noise varies by row: its estimate is doubled
RESIDUAL = 5e-5  # largest |P e| of an image believed on its own: rounding leaves 1e-7, a stranger 1e-2
CERTIFICATE = 1e-3  # largest |c B - 1| of an image believed on its own
WITNESS = 0.2  # and of one whose batch explains the whole gradient
UNSURE = 0.05  # features whose expected relative error is larger are not used
RANGE = 0.02  # how far beyond the activation's range an accepted feature may lie


def recover_signals(
    update: SharedUpdate,
    model: nn.Module,
    *,
    generator: torch.Generator,
    budget: WorkBudget,
) -> Signals:
    """Find the images that the head's gradient gives away, in float64, from the update and the model alone.

    An update without the bias's gradient is taken too. A column of equations is then missing, and the labels come from
    G and the mean feature, which is right as far as features resemble each other.

    Raises:
        OutOfTimeError: the budget's clock has run out before any solution was judged.
        ValueError: the model's last layer is not linear, its gradient is not in the update, or the batch is larger
            than K - 1 or than memory.
    """
    head = HeadGradient.of(update, model)
    sample = random_features(model, update.image_shape, SAMPLE, generator).to(head.weight)
    mean = sample.mean(0)

    def fresh() -> Tensor:
        return first_features(head, model, update.image_shape, mean, generator)

    if not len(head.span.sigma):
        return head.nobody()
    q, labels = choose_labels(head, LabelCounts.of(head, sample), fresh(), budget)
    best, least = None, math.inf
    attempts = min(ATTEMPTS, max(1, round(SOLVER_WORK / (ITERATIONS * q.numel() ** 3))))
    for _ in range(attempts):
        try:
            q = solve(head.equations(labels), q, ITERATIONS, budget)
        except OutOfTimeError:
            if best is None:
                raise
            break
        signals, passed, cost = _judge(head, labels, q, feature_range(model), generator)
        if best is None or (len(signals), -cost) > (len(best), -least):
            best, least = signals, cost
        if passed.all():
            break
        q = torch.where(passed[:, None], q, fresh())
    return best


def first_features(
    head: HeadGradient, model: nn.Module, shape: tuple[int, int, int], mean: Tensor, generator: torch.Generator
) -> Tensor:
    """A start (B, r): features of random images of a shape, drawn nearer to their mean (d,)."""
    images = random_features(model, shape, head.batch_size, generator).to(mean)
    return (mean + SPREAD * (images - mean)) @ head.span.right.T


def choose_labels(head: HeadGradient, counts: LabelCounts, q: Tensor, budget: WorkBudget) -> tuple[Tensor, Tensor]:
    """Start (B, r) and labels (B,): of all plausible labels those that fit best after a trial, likeliest first.

    One wrong label keeps the residual a hundred times higher than labels that are right.
    """
    plausible = [spelled_out(rival) for rival in counts.plausible()]
    if len(plausible) == 1:
        return q, plausible[0]
    best, least = None, math.inf
    for labels in plausible:
        equations = head.equations(labels)
        tried = solve(equations, q, TRIAL, budget)
        cost = equations.at(tried).cost
        if cost < least:
            best, least = (tried, labels), cost
        if cost < (SETTLED_LABELS * head.span.sigma[0]) ** 2:
            break
    return best


def _judge(
    head: HeadGradient,
    labels: Tensor,
    q: Tensor,
    feature_range: tuple[float, float],
    generator: torch.Generator,
) -> tuple[Signals, Tensor, float]:
    """The signals worth believing, surest first; which of the B passed; and the residual's square.

    An image passes on its own by the strict thresholds. If all together leave nothing but noise of the whole gradient,
    that is a stronger witness, and they are used as far as they are certain.
    """
    span, equations = head.span, head.equations(labels)
    at = equations.at(q)
    features = at.q @ span.right
    share, outside = head.batch_size * span.certificate(features, at.e), span.outside(at.e) / at.e.norm(dim=1)
    freedom = max(1, at.f.numel() - at.q.numel())
    error = error_per_noise(equations, at, head.weight, span.right, generator)
    uncertainty = error.expected(head.noise, at.cost) / features.norm(dim=1)
    least, most = feature_range
    in_range = ((features > least - RANGE) & (features < most + RANGE)).all(1)
    certain = UNEVEN * uncertainty < UNSURE
    passed = certain & in_range & ((share - 1).abs() < CERTIFICATE) & (outside < RESIDUAL)
    if equations.unexplained(at) < (EXPLAINED * head.noise) ** 2 * freedom + head.arithmetic**2:
        passed = certain & ((share - 1).abs() < WITNESS)
    order = uncertainty.argsort()
    order = order[passed[order]]
    signals = Signals(
        labels=labels[order],
        values=features[order],
        deltas=at.errors[order],
        residuals=outside[order],
        certificates=share[order],
        uncertainty=uncertainty[order],
        freedom=error.freedom[order],
        batch_size=head.batch_size,
    )
    return signals, passed, at.cost
