"""The MAGIA matching loss: the full batch against the shared average, and a random subset against it.

    L = rho(B, S) [ alpha |g_all - g|^2 + (1 - alpha) D_sub(g_T, g) ] + tv_weight * prior(x)

g is the shared average. g_all is the mean gradient over all dummy images, g_T that over the subset T of S images.
Labels are optimised beside the images as logits l: the dummy loss is the cross-entropy against softmax(l).

For a client that trained for several steps, or with BatchNorm in training mode, g_all is the update of the same
training on the dummy images, step by step. A subset has no update of its own then, and D_sub is left out. D_sub is also
left out where entries of g are missing. `attack.match.entries` says what such entries still tell of the gradient.

Source: MAGIA (arXiv 2509.18170), main text; the published script for alpha and D_sub.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from attack.match.entries import Entries, Gradient, squared_distance
from attack.match.penalties import statistics_distance
from network.head import Head, measured_noise
from network.parameters import names_within, trainable
from update.gradients import gradient_and_part
from update.shared import SharedUpdate
from update.training import FEDSGD, LocalTraining, train_locally

DISTANCES = ("l2", "relative", "cosine", "relative_cosine")
SUBSET_LOSSES = ("published", "mean", "partial")
RESCALES = ("inclusion", "none")
# Weight of shared statistics beside the relative distance of gradients. A mean in units of its sigma tells more than
# relative to itself: small nets end at 28.9, 29.0 and 25.1 dB, where the latter has 28.3, 28.6 and 24.7.
STATISTICS_WEIGHT = 1.0


def inclusion_probability(batch_size: int, subset_size: int) -> float:
    """rho(B, S) = S / B, the weight of the matching loss under `--rescale inclusion`.

    The paper names a closed-form combinatorial rescaling; the helper that computes it was never published. This form
    is derived here, not quoted. Of the C(B, S) subsets of size S, image i is in C(B-1, S-1): fix i, choose the rest.
    So over a uniform T each image is included with probability C(B-1, S-1) / C(B, S) = S / B, and the partial average
    that a subset contributes, (1/B) sum_{i in T} g_i, has the mean  E_T = rho g_all.  Multiplying the matching loss by
    rho weighs a step by the share of the batch its subset speaks for. Beside a prior of fixed weight, a schedule of S
    is then an annealing of the prior.
    """
    if not 1 <= subset_size <= batch_size:
        raise ValueError(f"subset_size must be in [1, {batch_size}], got {subset_size}")
    return subset_size / batch_size


def cosine_distance(a: Gradient, b: Gradient) -> Tensor:
    """1 - cos of the angle between the gradients as one long vector each (Geiping et al. 2020, eq. 4)."""
    product = sum((p * q).sum() for p, q in zip(a, b, strict=True))
    return 1 - product / (sum(p.square().sum() for p in a) * sum(q.square().sum() for q in b)).sqrt()


def subset_distance(kind: str, g_subset: Gradient, g: Gradient, *, batch_size: int, subset_size: int) -> Tensor:
    """D_sub between the subset's mean gradient and the shared average.

    published   sum over layers of  mean((g_T / S - g / B)^2);  both are means already, so it divides twice
    mean        |g_T - g|^2
    partial     |(S/B) (g_T - g)|^2

    In expectation over T, `mean` is |g_all - g|^2 + (B-S) / (S (B-1)) Var_i(g_i): it punishes the images for being
    different. docs/results.md, "What is the subset term worth?", has the measurements.
    """
    if kind == "published":
        return sum((p / subset_size - q / batch_size).square().mean() for p, q in zip(g_subset, g, strict=True))
    if kind == "mean":
        return squared_distance(g_subset, g)
    if kind == "partial":
        return (subset_size / batch_size) ** 2 * squared_distance(g_subset, g)
    raise ValueError(f"unknown subset_loss {kind!r}: choose one of {', '.join(SUBSET_LOSSES)}")


@dataclass(frozen=True)
class Matching:
    """The matching loss and its parts, each a scalar tensor: total = rho [alpha full + (1 - alpha) subset]."""

    total: Tensor
    full: Tensor
    subset: Tensor


@dataclass(frozen=True, repr=False)
class MatchingLoss:
    """The matching loss of dummy images and label logits against one shared average.

    Args:
        model: the model that the server sent out.
        target: the shared averaged gradient, one tensor per parameter.
        alpha: weight of the full-batch term, in [0, 1].
        rescale: `inclusion` multiplies by rho(B, S), `none` does not.
        subset_loss: one of `SUBSET_LOSSES`.
        distance: of the full-batch term, one of `DISTANCES`; the relative ones divide each tensor's squares by their
            mean in the target, and `relative` the subset term by |g|^2.
        observed: what the target's entries tell of the gradient, in place of their values; the cosine ignores it.
        known: softmax errors (N, K) and features (N, d) of the leading images, if they were read.
        network: the network that gradients are taken through, with the model's parameters; None: the model itself.
        training: how the client trained.
        statistics: of the minibatches, as in `update.training.Trained`; empty where the client does not share them.

    Raises:
        ValueError: alpha outside [0, 1], an unknown rescale or subset_loss.
    """

    model: nn.Module
    target: Gradient
    alpha: float = 0.999
    rescale: str = "inclusion"
    subset_loss: str = "published"
    distance: str = "l2"
    known: tuple[Tensor, Tensor] | None = None
    network: nn.Module | None = None
    training: LocalTraining = FEDSGD
    statistics: tuple[Tensor, ...] = ()
    observed: Entries | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        if self.rescale not in RESCALES:
            raise ValueError(f"unknown rescale {self.rescale!r}: choose one of {', '.join(RESCALES)}")
        if self.distance not in DISTANCES:
            raise ValueError(f"unknown distance {self.distance!r}: choose one of {', '.join(DISTANCES)}")
        if self.subset_loss not in SUBSET_LOSSES:
            raise ValueError(f"unknown subset_loss {self.subset_loss!r}: choose one of {', '.join(SUBSET_LOSSES)}")

    @cached_property
    def unit(self) -> float:
        """The divisor of the subset term: |g|^2 if distances are relative."""
        return float(sum(g.square().sum() for g in self.target)) or 1.0 if self.distance == "relative" else 1.0

    def _distance(self, gradient: Gradient) -> Tensor:
        if self.distance == "cosine":
            return cosine_distance(gradient, self.target)
        if self.distance == "relative_cosine":
            return cosine_distance(self._compared.scaled(gradient), self._scaled_target)
        return self._compared(gradient)

    @cached_property
    def _compared(self) -> Entries:
        return self.observed or Entries(self.target, self.distance.startswith("relative"))

    @cached_property
    def _scaled_target(self) -> Gradient:
        return self._compared.scaled(self.target)

    @cached_property
    def _imitated_training(self) -> LocalTraining:
        training = self._compared.imitated(self.training)
        return replace(training, hidden=names_within(self.network or self.model, self.model, training.hidden))

    def noise_of(self, update: SharedUpdate) -> float:
        """Noise in the update's entries in units of this loss: times their root mean square, or over it if relative.

        0 where entries were left out: missing entries are no noise, and would look like much. 0 of other losses than
        cross-entropy, whose errors have no sum that would show it.
        """
        if not self._compared.is_whole or not self.training.loss.is_cross_entropy:
            return 0.0
        noise = measured_noise(update.gradients, self.model)
        if not self.distance.startswith("relative"):
            return noise * update.strength()
        count = sum(g.numel() for g in self.target)
        sizes = ((g.numel(), unit * count) for g, unit in zip(self.target, self._compared.units, strict=True))
        return noise * sum(entries / scale**0.5 for entries, scale in sizes) / count

    @property
    def has_parts(self) -> bool:
        """Whether there is a subset term: it has a weight, and the target can be compared with a part's gradient."""
        return self.alpha < 1 and self.training.is_plain and self._compared.is_whole

    @property
    def phases(self) -> int:
        """A hard network has one phase only; a softened network has several, see `attack.match.softening`."""
        return 1

    def enter(self, phase: int, images: Tensor) -> None:
        """Nothing changes in the only phase."""

    def __repr__(self) -> str:
        if not self.training.is_plain:
            return f"{self.distance} matching of the training's update"
        if not self.has_parts:
            return f"{self.distance} matching"
        return f"{self.distance} matching (subset term {self.subset_loss}, alpha {self.alpha:g}, rho {self.rescale})"

    def __call__(self, images: Tensor, label_logits: Tensor, subset: Tensor) -> Matching:
        """Evaluate at images (B, C, H, W), label logits (B, K) and the indices (S,) of the subset T."""
        batch_size, subset_size = len(images), len(subset)
        g_all, g_subset, statistics = self._imitated(images, label_logits.softmax(1), subset)
        full = self._distance(g_all)
        if self.statistics:
            full = full + STATISTICS_WEIGHT * statistics_distance(statistics, self.statistics)
        sizes = {"batch_size": batch_size, "subset_size": subset_size}
        if g_subset is None:
            weak = torch.zeros_like(full)
        else:
            goal = self._subset_target(subset, batch_size)
            weak = subset_distance(self.subset_loss, g_subset, goal, **sizes) / self.unit
        rho = inclusion_probability(batch_size, subset_size) if self.rescale == "inclusion" else 1.0
        return Matching(rho * (self.alpha * full + (1 - self.alpha) * weak), full, weak)

    def _subset_target(self, subset: Tensor, batch_size: int) -> Gradient:
        """The target of the subset's mean gradient: the shared average, which stands in for the unknown mean of T.

        For the last layer the mean of T itself is the target where every image in T was read. The published form
        divides its target by B and the subset's mean by S, so the exact mean is scaled by B / S beforehand.
        """
        if self.known is None or len(subset) > (count := len(self.known[0])):
            return self.target
        errors, features = (values[subset.clamp(max=count - 1)] for values in self.known)
        head, all_read = Head.of(self.model), (subset < count).all()  # a tensor: nothing waits for it
        exact = {head.weight: errors.T @ features / len(subset), head.bias: errors.mean(0)}
        scale = batch_size / len(subset) if self.subset_loss == "published" else 1.0
        pairs = zip(trainable(self.model), self.target, strict=True)
        return tuple(torch.where(all_read, scale * exact[n], g) if n in exact else g for n, g in pairs)

    def _imitated(
        self, images: Tensor, labels: Tensor, subset: Tensor
    ) -> tuple[Gradient, Gradient | None, tuple[Tensor, ...]]:
        """The update of the client's training on all images, that on the subset, and BatchNorm's statistics.

        The subset's is None where alpha = 1 has no use for it, or where a part of the batch has no update of its own.
        """
        network = self.network or self.model
        if self.has_parts and len(subset) < len(images):
            return *gradient_and_part(network, images, labels, subset, self.training.loss), ()
        trained = train_locally(network, images, labels, self._imitated_training, create_graph=True)
        own = trained.average if self.has_parts else None
        return trained.average, own, trained.statistics
