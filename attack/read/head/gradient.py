"""The head's gradient as the server holds it: scaled row by row, its span cut at the noise."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attack.read.head.equations import HeadEquations, HeadSpan
from attack.read.head.noise import additive_noise, noise_floor, noise_level, row_weights
from attack.read.signals import Signals
from attack.solve.rounding import precision_of
from network.head import Head
from update.loss import Loss
from update.shared import SharedUpdate

UNKNOWNS = 10_000  # more (100 images, say) would take too much memory: the normal matrix has their square
CLASSES = 8192  # more would take too much memory: the covariance of label counts is 0.5 GB
ARITHMETIC = 4.0  # units of rounding by which the victim's own sums and exponentials err


@dataclass(frozen=True)
class HeadGradient:
    """The last layer and what the update says of it, in float64."""

    weight: Tensor  # W (K, d)
    bias: Tensor  # b (K,)
    gradient: Tensor  # G (K, d)
    bias_gradient: Tensor | None  # gamma (K,)
    batch_size: int
    rows: Tensor  # D (K,)
    span: HeadSpan  # of D G, its rank no higher than B
    rank: int  # numerical rank of D G
    noise: float  # per entry of D G
    loss: Loss  # the client's, a cross-entropy
    arithmetic: float  # |error| of D G from rounding in the victim's computation

    @classmethod
    def of(cls, update: SharedUpdate, model: nn.Module) -> "HeadGradient":
        """What the update says of the model's head.

        Raises:
            ValueError: the model's last layer is not linear, its gradient is not in the update, the batch is larger
                than K - 1 or than memory, or the loss is no cross-entropy.
        """
        if not update.training.loss.is_cross_entropy:
            raise ValueError(f"the head's equations are those of cross-entropy, not of {update.training.loss}")
        head = Head.of(model)
        raw, bias_gradient = head.among(update.gradients)
        if raw is None:
            raise ValueError("the update holds no gradient of the model's last layer")
        weight, bias = head.layer.weight.detach().double(), head.layer.bias
        gradient = raw.to(weight)
        most = min(weight.shape) - 1
        if update.batch_size > most:
            raise ValueError(
                f"batch_size is {update.batch_size}: the head's gradient tells at most {most} images apart"
            )
        if len(weight) > CLASSES:
            raise ValueError(f"num_classes is {len(weight)}: labels are told apart among {CLASSES} classes at most")
        if update.batch_size**2 > UNKNOWNS:
            raise ValueError(f"batch_size is {update.batch_size}: more than {UNKNOWNS} unknowns")
        eps = precision_of(raw)
        additive = additive_noise(gradient)
        rows = row_weights(gradient, additive, eps)
        scaled = rows[:, None] * gradient
        rank = int((torch.linalg.svdvals(scaled) > noise_floor(scaled, eps)).sum())
        span = HeadSpan.of(scaled, min(rank, update.batch_size))
        return cls(
            weight=weight,
            bias=weight.new_zeros(len(weight)) if bias is None else bias.detach().double(),
            gradient=gradient,
            bias_gradient=None if bias_gradient is None else bias_gradient.to(weight),
            batch_size=update.batch_size,
            rows=rows,
            span=span,
            rank=rank,
            loss=update.training.loss,
            noise=noise_level(scaled, len(span.sigma), eps),
            arithmetic=ARITHMETIC * min(max(eps, 1e-14), torch.finfo(torch.float32).eps) * float(scaled.norm()),
        )

    def equations(self, labels: Tensor) -> HeadEquations:
        """What all images obey, if these are their labels (B,)."""
        return HeadEquations(self.span, self.rows, self.weight, self.bias, self.bias_gradient, labels, self.loss)

    def nobody(self) -> Signals:
        """No image at all, in the shapes of the head."""
        return Signals.none(self.weight, self.weight.shape[1:], (len(self.bias),), self.batch_size)
