"""Entries of an image in another order: permute, transpose, and views between them, as in a channel shuffle."""

import torch
from torch import Tensor, fx, nn

from network.kinds.kind import Moved, Shape
from network.known_outputs import KnownOutputs


class Rearranged(nn.Module):
    """What a graph of views and permutations makes of activations (B, ...); it takes nothing else, and mixes no images.

    Args:
        graph: of one placeholder.
    """

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers in another order."""
        return fx.Interpreter(self, graph=self.graph).run(x)

    def order(self, shape: Shape) -> Tensor:
        """Which entry of an input of that shape, flattened, each output entry is, of the shape of one output."""
        count = torch.Size(shape).numel()
        return self(torch.arange(count, dtype=torch.float64).view(1, *shape))[0].long()


class RearrangedKind(Moved):
    """Known outputs are the inputs in another order."""

    modules = (Rearranged,)

    def pulled(self, module: Rearranged, outputs: KnownOutputs, shape: Shape) -> KnownOutputs:
        """In the order of the inputs."""
        return outputs.in_order(_back(module, shape).to(outputs.values.device), tuple(shape))

    def inverted(self, module: Rearranged, outputs: Tensor, shape: Shape) -> Tensor:
        """In the order of the inputs."""
        return outputs.flatten(1)[:, _back(module, shape).to(outputs.device)].view(len(outputs), *shape)


def _back(module: Rearranged, shape: Shape) -> Tensor:
    """Which output entry, flattened, each input entry is, (n,)."""
    return module.order(shape).flatten().argsort()
