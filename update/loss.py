"""The client's loss: of each image, from its logits z (K,) and its target t (K,), and the errors that it leaves.

cross_entropy   -sum_k t_k log softmax(z)_k, with label smoothing eps: t = (1 - eps) onehot(y) + eps / K
bce             binary cross-entropy of each class by itself, sigmoid(z_k) against t_k, averaged over the classes
mse             squared errors (z_k - t_k)^2, averaged over the classes

All three have errors that are affine in the target,

    dl/dz = a(z) - s t,     with a = softmax(z), s = 1;   sigmoid(z) / K, 1 / K;   2 z / K, 2 / K,

so that whoever knows the logits knows the errors of every label at once. With class weights w a cross-entropy is

    l = -sum_k w_k t_k log softmax(z)_k,       dl/dz = (sum_k w_k t_k) softmax(z) - w t,

and the loss of a batch is sum_i l_i / sum_i w_y(i), as torch has it: only the weights' ratios count. Whoever does not
know the labels does not know that divisor.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from update import checked

LOSSES = ("cross_entropy", "bce", "mse")


@dataclass(frozen=True)
class Loss:
    """One loss.

    Attributes:
        name: one of `LOSSES`.
        smoothing: eps of label smoothing, in [0, 1); of cross-entropy only.
        weights: of the classes, w (K,), above 0; of cross-entropy only. Empty: all are 1.
        by_weight: whether a batch's loss is divided by the sum of its images' weights; else by their number.

    Raises:
        ValueError: an unknown name, or a smoothing or weights that are out of range or not cross-entropy's.
    """

    name: str = "cross_entropy"
    smoothing: float = 0.0
    weights: tuple[float, ...] = ()
    by_weight: bool = True

    @classmethod
    def stated(cls, facts: object) -> "Loss":
        """The loss that the facts of an update's file state, `name` and `smoothing`, and `weights` if it has any.

        Raises:
            ValueError: a fact is missing, of another kind, or refused as in a `Loss`.
        """
        facts = checked.mapping(facts, "training.loss", ("name", "smoothing"))
        weights = checked.sequence(facts.get("weights", ()), "training.loss.weights")
        return cls(
            checked.word(facts["name"], "training.loss.name"),
            checked.real(facts["smoothing"], "training.loss.smoothing", 0),
            tuple(float(checked.real(weight, "training.loss.weights", 0)) for weight in weights),
            checked.switch(facts.get("by_weight", True), "training.loss.by_weight"),
        )

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise ValueError(f"unknown loss {self.name!r}: choose one of {', '.join(LOSSES)}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"--label_smoothing {self.smoothing:g}: at least 0 and below 1")
        if self.smoothing and not self.is_cross_entropy:
            raise ValueError(f"--label_smoothing {self.smoothing:g}: of --loss cross_entropy, not of {self.name}")
        if self.weights and not self.is_cross_entropy:
            raise ValueError(f"--class_weights: of --loss cross_entropy, not of {self.name}")
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError("--class_weights: finite numbers above 0")

    def check(self, num_classes: int) -> None:
        """Refuse weights that are not those of so many classes.

        Raises:
            ValueError: their number is another.
        """
        if self.weights and len(self.weights) != num_classes:
            raise ValueError(f"--class_weights: {len(self.weights)} numbers for {num_classes} classes")

    @property
    def is_cross_entropy(self) -> bool:
        """Whether errors sum to zero over the classes, whatever the target."""
        return self.name == "cross_entropy"

    def __str__(self) -> str:
        smoothed = f"{self.name}, label smoothing {self.smoothing:g}" if self.smoothing else self.name
        return f"{smoothed}, class weights" if self.weights else smoothed

    @property
    def is_open(self) -> bool:
        """Whether the divisor of a batch's loss depends on its labels."""
        return bool(self.weights) and self.by_weight

    def divided(self, mean: float) -> "Loss":
        """The same loss of a batch whose images have this mean weight: each image's is divided by it beforehand."""
        return replace(self, weights=tuple(weight / mean for weight in self.weights), by_weight=False)

    def of_batch(self, labels: Tensor) -> "Loss":
        """The same loss of a batch with these labels (B,), so that it is the plain mean of `each`."""
        return self.divided(float(self.of_classes(labels)[labels].mean())) if self.is_open else self

    def of_classes(self, like: Tensor, classes: int | None = None) -> Tensor:
        """The classes' weights (K,) in float64, where `like` is; `classes` is K where there are none."""
        return _on_device(self.weights or (1.0,) * (classes or 0), like.device)

    def each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss l of each image (B,), from logits (B, K) and labels, class indices (B,) or probabilities (B, K).

        Raises:
            ValueError: logits of another shape; a model that squeezes its output has (K,) for one image.
        """
        if logits.dim() != 2 or len(logits) != len(labels):
            raise ValueError(f"the model puts out {tuple(logits.shape)} for {len(labels)} images, not logits (B, K)")
        if self.is_cross_entropy:
            weights = self.of_classes(logits).to(logits) if self.weights else None
            how = {"reduction": "none", "label_smoothing": self.smoothing}
            return nn.functional.cross_entropy(logits, labels, weights, **how)
        target = self.targets(labels, logits)
        if self.name == "bce":
            return nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
        return (logits - target).square().mean(1)

    def in_mean(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Each image's loss (B,) as it counts in the batch, whose loss is their plain mean; arguments as of `each`."""
        each = self.each(logits, labels)
        if not self.is_open:
            return each
        weights = self.of_classes(logits).to(logits)
        return each / (weights[labels] if labels.dim() == 1 else labels.to(weights) @ weights).mean()

    def targets(self, labels: Tensor, like: Tensor) -> Tensor:
        """w t (B, K) of labels, class indices (B,) or probabilities (B, K), in dtype and classes of `like` (..., K)."""
        classes = like.shape[-1]
        whole = labels if labels.dim() > 1 else nn.functional.one_hot(labels, classes)
        smoothed = (1 - self.smoothing) * whole.to(like) + self.smoothing / classes
        return smoothed * self.of_classes(like).to(like) if self.weights else smoothed

    def masses(self, labels: Tensor, like: Tensor) -> Tensor:
        """What a(z) is multiplied by (B, 1): the sum of the image's w t, which is 1 without class weights."""
        return self.targets(labels, like).sum(-1, keepdim=True) if self.weights else like.new_ones(len(labels), 1)

    def unlabelled(self, logits: Tensor) -> Tensor:
        """a(z), the errors (..., K) that the target is taken from."""
        if self.is_cross_entropy:
            return logits.softmax(-1)
        return (logits.sigmoid() if self.name == "bce" else 2 * logits) / logits.shape[-1]

    def pull(self, classes: int) -> float:
        """s, how strongly the target pulls."""
        return {"cross_entropy": 1.0, "bce": 1.0 / classes, "mse": 2.0 / classes}[self.name]

    def errors(self, logits: Tensor, labels: Tensor) -> Tensor:
        """dl/dz (B, K) of each image's own loss."""
        free = self.masses(labels, logits) * self.unlabelled(logits)
        return free - self.pull(logits.shape[-1]) * self.targets(labels, logits)

    def all_deltas(self, free: Tensor, each: Tensor) -> Tensor:
        """Each label's delta (N, K, ...), from those of a(z)^T z, `free` (N, ...), and of each logit, (N, K, ...)."""
        if self.weights:
            weights = self.of_classes(free).to(free)
            each = each * weights.view(-1, *[1] * (each.dim() - 2))
            masses = torch.lerp(weights, weights.mean(), self.smoothing)
            free = free[:, None] * masses.view(-1, *[1] * (free.dim() - 1))
        else:
            free = free[:, None]
        if self.smoothing:
            each = torch.lerp(each, each.mean(1, keepdim=True), self.smoothing)
        return free - self.pull(each.shape[1]) * each

    def delta(self, above: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        """The derivative of each image's own loss by its input (B, ...) of the network `above`, which gives logits."""
        leaf = inputs.detach().requires_grad_()
        with torch.enable_grad():
            (delta,) = torch.autograd.grad(self.each(above(leaf), labels).sum(), leaf)
        return delta


@lru_cache(maxsize=16)  # the loop asks at every evaluation, and numbers that go to a GPU would have to be waited for
def _on_device(weights: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(weights, dtype=torch.float64, device=device)


CROSS_ENTROPY = Loss()
