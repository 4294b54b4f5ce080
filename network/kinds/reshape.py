"""Layers whose outputs are their inputs in another shape. Dropout is one of them in eval mode."""

from collections.abc import Sequence

from torch import Tensor, fx, nn

from network.kinds.kind import Kind, Shape
from network.known_outputs import KnownOutputs


class Reshape(Kind):
    """Flatten, Identity, Dropout."""

    modules = (nn.Flatten, nn.Identity, nn.Dropout)
    output_range = None
    is_reshape = True
    keeps_sign = True

    def keeps_zeros(self, module: nn.Module, inputs: Shape, outputs: Shape) -> bool:
        """They do."""
        return True

    def why_not(self, module: nn.Module, inputs: Shape, outputs: Shape) -> str:
        """Never."""
        return ""

    def pulled(self, module: nn.Module, outputs: KnownOutputs, shape: Shape) -> KnownOutputs:
        """In the shape of the inputs."""
        return outputs.reshaped(tuple(shape))

    def inverted(self, module: nn.Module, outputs: Tensor, shape: Shape) -> Tensor:
        """In the shape of the inputs."""
        return outputs.reshape(len(outputs), *shape)


def flatten(start_dim: int = 0, end_dim: int = -1) -> list[nn.Module]:
    """The modules of a call that makes one row of each image.

    Raises:
        LookupError: it makes something else.
    """
    if (start_dim, end_dim) != (1, -1):
        raise LookupError("flatten")
    return [nn.Flatten()]


def view(*shape: object) -> list[nn.Module]:
    """The modules of a call that views (B, ...) as (size of the batch, -1) or (-1, entries).

    Raises:
        LookupError: it makes something else than one row of each image.
    """
    if not _keeps_images(shape):
        raise LookupError("view")
    return [nn.Flatten()]


def _keeps_images(shape: Sequence[object]) -> bool:
    shape = shape[0] if len(shape) == 1 else shape
    if not isinstance(shape, Sequence) or len(shape) != 2:
        return False
    rows, entries = shape
    return isinstance(entries, int) and (isinstance(rows, fx.Node) or (rows == -1 and entries > 0))


def dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> list[nn.Module]:
    """The modules of a call that is switched off.

    Raises:
        LookupError: it is not.
    """
    if training:
        raise LookupError("dropout")
    return []


Reshape.calls = {
    "flatten": flatten,
    "view": view,
    "reshape": view,
    "dropout": dropout,
    "contiguous": lambda *_: [],
}
