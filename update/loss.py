"""The client's loss: of each image, from its logits z (K,) and its target t (K,), and the errors that it leaves.

cross_entropy   -sum_k t_k log softmax(z)_k, with label smoothing eps: t = (1 - eps) onehot(y) + eps / K
bce             binary cross-entropy of each class by itself, sigmoid(z_k) against t_k, averaged over the classes
mse             squared errors (z_k - t_k)^2, averaged over the classes

All three have errors that are affine in the target,

    dl/dz = a(z) - s t,     with a = softmax(z), s = 1;   sigmoid(z) / K, 1 / K;   2 z / K, 2 / K,

so that whoever knows the logits knows the errors of every label at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LOSSES = ("cross_entropy", "bce", "mse")


@dataclass(frozen=True)
class Loss:
    """One loss.

    Attributes:
        name: one of `LOSSES`.
        smoothing: eps of label smoothing, in [0, 1); of cross-entropy only.

    Raises:
        ValueError: an unknown name, or a smoothing that is out of range or not cross-entropy's.
    """

    name: str = "cross_entropy"
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise ValueError(f"unknown loss {self.name!r}: choose one of {', '.join(LOSSES)}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"--label_smoothing {self.smoothing:g}: at least 0 and below 1")
        if self.smoothing and not self.is_cross_entropy:
            raise ValueError(f"--label_smoothing {self.smoothing:g}: of --loss cross_entropy, not of {self.name}")

    @property
    def is_cross_entropy(self) -> bool:
        """Whether errors sum to zero over the classes, whatever the target."""
        return self.name == "cross_entropy"

    def __str__(self) -> str:
        return f"{self.name}, label smoothing {self.smoothing:g}" if self.smoothing else self.name

    def each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each image (B,), from logits (B, K) and labels, class indices (B,) or probabilities (B, K).

        Raises:
            ValueError: logits of another shape; a model that squeezes its output has (K,) for one image.
        """
        if logits.dim() != 2 or len(logits) != len(labels):
            raise ValueError(f"the model puts out {tuple(logits.shape)} for {len(labels)} images, not logits (B, K)")
        if self.is_cross_entropy:
            return nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=self.smoothing)
        target = self.targets(labels, logits)
        if self.name == "bce":
            return nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
        return (logits - target).square().mean(1)

    def targets(self, labels: Tensor, like: Tensor) -> Tensor:
        """t (B, K) of labels, class indices (B,) or probabilities (B, K), in dtype and classes of `like` (..., K)."""
        classes = like.shape[-1]
        whole = labels if labels.dim() > 1 else nn.functional.one_hot(labels, classes)
        return (1 - self.smoothing) * whole.to(like) + self.smoothing / classes

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
        return self.unlabelled(logits) - self.pull(logits.shape[-1]) * self.targets(labels, logits)

    def delta(self, above: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        """The derivative of each image's own loss by its input (B, ...) of the network `above`, which gives logits."""
        leaf = inputs.detach().requires_grad_()
        with torch.enable_grad():
            (delta,) = torch.autograd.grad(self.each(above(leaf), labels).sum(), leaf)
        return delta


CROSS_ENTROPY = Loss()
