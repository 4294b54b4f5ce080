"""What is known of single images at one layer: their inputs, labels and errors, and how far they are trusted."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from attack.read.span import Span

PER_IMAGE = ("values", "labels", "deltas", "residuals", "shares", "uncertainty", "freedom")


class Tail(Protocol):
    """The network behind a layer, differentiable twice, in float64."""

    def __call__(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Logits (N, K) of the layer's outputs (N, *output_shape) and, for a skip, its inputs (N, *input_shape)."""
        ...


@dataclass(frozen=True)
class Inputs:
    """What a layer's gradient says of N of the batch's B images; the other B - N were not told apart.

    Attributes:
        values: (N, *input_shape), the layer's inputs.
        labels: (N,) class indices.
        deltas: (N, *output_shape), the gradient of each image's own loss by the layer's output.
        residuals: (N,) share of delta that lies outside the gradient's column space, rows weighted.
        shares: (N,) the weight with which delta patch^T is part of B G, 1 for a true image.
        uncertainty: (N,) expected relative error of the values, root mean square.
        freedom: (N,) degrees of freedom of that error, see `attack.read.error_bars`.
        batch_size: B.
        seconds: wall time of the search.
    """

    values: Tensor
    labels: Tensor
    deltas: Tensor
    residuals: Tensor
    shares: Tensor
    uncertainty: Tensor
    freedom: Tensor
    batch_size: int
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def complete(self) -> bool:
        """Whether every image of the batch was told apart."""
        return len(self) == self.batch_size

    def pick(self, index: Tensor) -> "Inputs":
        """Some of the images: an index or a mask."""
        return replace(self, **{name: getattr(self, name)[index] for name in PER_IMAGE})

    def joined(self, other: "Inputs") -> "Inputs":
        """These and others."""
        return replace(self, **{name: torch.cat([getattr(self, name), getattr(other, name)]) for name in PER_IMAGE})


def nothing(span: Span) -> Inputs:
    """No image at all, in the shapes of this layer."""
    empty = span.basis.new_zeros(0)
    return Inputs(
        values=empty.view(0, *span.geometry.input_shape),
        labels=empty.long(),
        deltas=empty.view(0, *span.geometry.output_shape),
        residuals=empty,
        shares=empty,
        uncertainty=empty,
        freedom=empty,
        batch_size=span.batch_size,
    )
