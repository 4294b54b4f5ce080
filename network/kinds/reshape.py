"""Layers whose outputs are their inputs in another shape. Dropout is one of them in eval mode."""

from collections.abc import Sequence

from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd

from network.kinds.kind import Moved, Shape
from network.known_outputs import KnownOutputs


class View(nn.Module):
    """Activations (B, ...) in another shape, by a method of tensors: reshape, squeeze, unsqueeze, unflatten, an index.

    Args:
        method: its name.
        arguments: of the method; of a reshape, the shape of one image.
    """

    def __init__(self, method: str, *arguments: object) -> None:
        super().__init__()
        self.method, self.arguments = method, arguments

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers."""
        if self.method == "reshape":
            return x.reshape(len(x), *self.arguments)
        return getattr(x, self.method)(*self.arguments)


class Reshape(Moved):
    """Flatten, Unflatten, Identity, View, and all kinds of Dropout."""

    modules = (nn.Flatten, nn.Unflatten, nn.Identity, View, _DropoutNd)
    is_reshape = True

    def pulled(self, module: nn.Module, outputs: KnownOutputs, shape: Shape) -> KnownOutputs:
        """In the shape of the inputs."""
        return outputs.reshaped(tuple(shape))

    def inverted(self, module: nn.Module, outputs: Tensor, shape: Shape) -> Tensor:
        """In the shape of the inputs."""
        return outputs.reshape(len(outputs), *shape)


def flatten(start_dim: int = 0, end_dim: int = -1) -> list[nn.Module]:
    """The modules of a call that flattens each image by itself.

    Raises:
        LookupError: it joins images.
    """
    if start_dim == 0:
        raise LookupError("flatten")
    return [nn.Flatten(start_dim, end_dim)]


def view(*shape: object) -> list[nn.Module]:
    """The modules of a call that views (B, ...) as (size of the batch, ...) or (-1, entries of an image, ...).

    Raises:
        LookupError: it makes something else, or a shape that other tensors decide on.
    """
    shape = shape[0] if len(shape) == 1 else shape
    if not _keeps_images(shape):
        raise LookupError("view")
    return [nn.Flatten() if len(shape) == 2 else View("reshape", *shape[1:])]


def _keeps_images(shape: object) -> bool:
    if not isinstance(shape, Sequence) or len(shape) < 2:
        return False
    rows, *entries = shape
    known = all(isinstance(entry, int) for entry in entries)
    return known and (isinstance(rows, fx.Node) or (rows == -1 and min(entries) > 0))


def squeeze(*dim: int) -> list[nn.Module]:
    """The modules of a call that leaves out the given dimensions, none of them the batch's.

    Raises:
        LookupError: it leaves out every dimension of size one, so that of a single image too.
    """
    dims = dim[0] if len(dim) == 1 and isinstance(dim[0], Sequence) else dim
    if not dims or 0 in dims:
        raise LookupError("squeeze")
    return [View("squeeze", tuple(dims))]


def with_dimension(method: str, dim: int, *arguments: object) -> list[nn.Module]:
    """The modules of a method that changes the shape at a dimension other than the batch's.

    Raises:
        LookupError: it changes the batch's.
    """
    if dim == 0:
        raise LookupError(method)
    return [View(method, dim, *arguments)]


def taken(index: object) -> list[nn.Module]:
    """The modules of an index that takes every entry and adds dimensions, as in x[:, :, None, None].

    Raises:
        LookupError: it takes a part, or adds a dimension in front of the images'.
    """
    index = index if isinstance(index, tuple) else (index,)
    if not index or index[0] is None or not all(i is None or i is Ellipsis or i == slice(None) for i in index):
        raise LookupError("getitem")
    return [View("__getitem__", index)]


def dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> list[nn.Module]:
    """The modules of a call that is switched off.

    Raises:
        LookupError: it is not.
    """
    if training:
        raise LookupError("dropout")
    return []


def stochastic_depth(p: float, mode: str, training: bool = True) -> list[nn.Module]:
    """The modules of torchvision's stochastic depth, switched off.

    Raises:
        LookupError: it is not.
    """
    return dropout(p, training)


def nothing(*_: object, **__: object) -> list[nn.Module]:
    """No module: the numbers stay as they are."""
    return []


DROPOUTS = (
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
)
NOTHING = ("contiguous", "clone", "to", "float", "type_as", "positive", "alias", "requires_grad")
Reshape.calls = {
    "flatten": flatten,
    "view": view,
    "reshape": view,
    "squeeze": squeeze,
    "getitem": taken,
    "unsqueeze": lambda dim: with_dimension("unsqueeze", dim),
    "unflatten": lambda dim, sizes: with_dimension("unflatten", dim, sizes),
    "stochastic_depth": stochastic_depth,
    **dict.fromkeys(DROPOUTS, dropout),
    **dict.fromkeys(NOTHING, nothing),
}
