"""What is known of single images at one layer: their inputs, labels and deltas, and how far they are trusted."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from attack.read.error_bars import confidence
from update import checked

PER_IMAGE = ("values", "labels", "deltas", "residuals", "certificates", "uncertainty", "freedom")


class Tail(Protocol):
    """The network behind a layer, differentiable twice, in float64."""

    def __call__(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Logits (N, K) of the layer's outputs (N, *output_shape) and, for a skip, its inputs (N, *input_shape)."""
        ...


@dataclass(frozen=True)
class Signals:
    """What a layer's gradient says of N of the batch's B images; the other B - N were not told apart.

    At the head, values are features and deltas softmax errors.

    Attributes:
        values: (N, *input_shape), the layer's inputs.
        labels: (N,) class indices.
        deltas: (N, *output_shape), the gradient of each image's own loss by the layer's output.
        residuals: (N,) share of delta that lies outside the gradient's column space, rows weighted.
        certificates: (N,) the weight with which delta patch^T is part of B G, 1 for a true image.
        uncertainty: (N,) expected relative error of the values by the noise that shows, root mean square.
        freedom: (N,) degrees of freedom of that error, see `attack.read.error_bars`.
        batch_size: B.
        left_out: a further relative error of all images, by what the client's defence left out of the gradient, see
            `attack.read.left_out`. It may be much smaller, so that it bounds what is believed and not what is tried.
    """

    values: Tensor
    labels: Tensor
    deltas: Tensor
    residuals: Tensor
    certificates: Tensor
    uncertainty: Tensor
    freedom: Tensor
    batch_size: int
    left_out: float = 0.0

    @classmethod
    def none(
        cls, like: Tensor, input_shape: tuple[int, ...], output_shape: tuple[int, ...], batch_size: int
    ) -> "Signals":
        """No image at all, in the shapes of a layer, and the dtype and place of `like`."""
        empty = like.new_zeros(0)
        shapes = {"values": empty.view(0, *input_shape), "deltas": empty.view(0, *output_shape), "labels": empty.long()}
        return cls(**(dict.fromkeys(PER_IMAGE, empty) | shapes), batch_size=batch_size)

    @classmethod
    def restored(cls, state: object, head: nn.Linear, batch_size: int) -> "Signals":
        """The signals at the head, from the mapping of their attributes in a checkpoint.

        Raises:
            ValueError: an entry is damaged, or of another head or batch; the message names the entry.
        """
        held = checked.mapping(state, "signals", (*PER_IMAGE, "batch_size", "left_out"))
        checked.whole(held["batch_size"], "signals.batch_size", batch_size, batch_size)
        count = len(held["labels"]) if isinstance(held["labels"], Tensor) and held["labels"].dim() == 1 else 0
        if not 1 <= count <= batch_size:
            raise checked.DamagedError(f"signals.labels are of {count} images, the batch has {batch_size}")
        shapes = {"values": (count, head.in_features), "deltas": (count, head.out_features)}
        found = {"labels": checked.indices(held["labels"], "signals.labels", count, head.out_features)}
        for name in PER_IMAGE:
            if name != "labels":
                shape = shapes.get(name, (count,))
                found[name] = checked.tensor(held[name], f"signals.{name}", shape, torch.float64)
        if (found["uncertainty"] < 0).any() or (found["freedom"] < 0).any():
            raise checked.DamagedError("signals.uncertainty or signals.freedom is negative")
        left_out = checked.real(held["left_out"], "signals.left_out", 0)
        return cls(**found, batch_size=batch_size, left_out=left_out)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def complete(self) -> bool:
        """Whether every image of the batch was told apart."""
        return len(self) == self.batch_size

    @property
    def error(self) -> Tensor:
        """(N,) expected relative error of the values, with what the defence left out."""
        return self.uncertainty.square().add(self.left_out**2).sqrt() if self.left_out else self.uncertainty

    @property
    def confidence(self) -> Tensor:
        """(N,) probability that the values are within 1 % of the truth, if the noise is Gaussian."""
        return confidence(self.error, self.freedom)

    def drifted(self, drift: Tensor) -> "Signals":
        """No surer than a drift (N,), relative, along one direction."""
        whole = torch.hypot(self.uncertainty, drift.to(self.uncertainty))
        own = (self.uncertainty / whole.clamp(min=1e-300)) ** 4
        return replace(self, uncertainty=whole, freedom=1 / (own / self.freedom + 1 - own))

    def pick(self, index: Tensor) -> "Signals":
        """Some of the images: an index or a mask."""
        return replace(self, **{name: getattr(self, name)[index] for name in PER_IMAGE})

    def surest_first(self) -> "Signals":
        """The same images, in the order of their uncertainty."""
        return self.pick(self.uncertainty.argsort())

    def joined(self, other: "Signals") -> "Signals":
        """These images and others."""
        return replace(self, **{name: torch.cat([getattr(self, name), getattr(other, name)]) for name in PER_IMAGE})

    def to(self, device: torch.device) -> "Signals":
        """The same on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in PER_IMAGE})
