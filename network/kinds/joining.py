"""Channels that are put among others, and channels that are taken out of others.

`torch.cat` over channels is a sum: each tensor is put among zeros at its own place. So a stage that joins tensors is a
residual stage, whose branches end in `Among`, and known outputs tell what each branch has put out. A branch that takes
some of the channels only, after a `chunk` or `split`, begins with `Part`.
"""

import torch
from torch import Tensor, nn

from network.kinds.kind import Moved, Shape
from network.known_outputs import KnownOutputs
from network.stage import Residual


class Among(nn.Module):
    """Channels (B, c, ...) among others, (B, total, ...): zeros but for those from `first` on."""

    def __init__(self, first: int, count: int, total: int) -> None:
        super().__init__()
        self.first, self.count, self.total = first, count, total

    def forward(self, x: Tensor) -> Tensor:
        """With zeros before and behind the channels.

        Raises:
            ValueError: x has another number of channels.
        """
        if x.shape[1] != self.count:
            raise ValueError(f"{x.shape[1]} channels come where the model joins {self.count}")
        zeros = (x.new_zeros(len(x), size, *x.shape[2:]) for size in (self.first, self.total - self.first - self.count))
        before, behind = zeros
        return torch.cat([before, x, behind], 1)


class Part(nn.Module):
    """The channels of (B, C, ...) from `first` on, `count` of them."""

    def __init__(self, first: int, count: int) -> None:
        super().__init__()
        self.first, self.count = first, count

    def forward(self, x: Tensor) -> Tensor:
        """(B, count, ...)."""
        return x[:, self.first : self.first + self.count]


class AmongKind(Moved):
    """Known outputs tell all inputs: they are among them."""

    modules = (Among,)

    def pulled(self, module: Among, outputs: KnownOutputs, shape: Shape) -> KnownOutputs:
        """Of the channels alone."""
        return outputs.channels(module.first, module.count)

    def inverted(self, module: Among, outputs: Tensor, shape: Shape) -> Tensor:
        """The channels."""
        return outputs[:, module.first : module.first + module.count]


class PartKind(Moved):
    """Known outputs tell some of the inputs, and nothing of the other channels, on which the outputs do not depend."""

    modules = (Part,)

    def pulled(self, module: Part, outputs: KnownOutputs, shape: Shape) -> KnownOutputs:
        """Of the channels alone."""
        return outputs.among(module.first, shape[0])


def is_joined(module: Residual) -> bool:
    """Whether the branches of a stage put out different channels, so that its outputs tell those of each branch."""
    ends = [branch[-1].module if branch else None for branch in (module.body, module.shortcut)]
    return all(isinstance(end, Among) or (isinstance(end, Residual) and is_joined(end)) for end in ends)
