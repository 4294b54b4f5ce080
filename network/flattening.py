"""Which layers of a model stand behind a flattening, found by watching the model run."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MOVES = ("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims")
CHANNELS = 1  # the axis of an activation's channels, unless a layer has moved them


class _Watch(TorchFunctionMode):
    """Follows activations, from the call that flattens them to the dense layer that takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[int, ...]] = {}  # by the identity of a dense layer's weight
        self._flat: dict[int, tuple[int, ...]] = {}  # shapes before the flattening, by the identity of a tensor
        self._axis: dict[int, int] = {}  # of channels that were moved, by the identity of a tensor
        self._kept: list[object] = []  # an identity stays that of one tensor while the tensor lives

    def __torch_function__(
        self, func: Callable, types: Sequence, args: Sequence = (), kwargs: Mapping | None = None
    ) -> object:
        """Call the function, and note what it makes of a tensor that is followed."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        x = next((arg for arg in args if isinstance(arg, Tensor)), None)
        if x is None or not isinstance(out, Tensor):
            return out
        self._kept += [x, out]
        is_dense = func is nn.functional.linear
        if is_dense and id(x) in self._flat:
            self.found[id(args[1])] = self._flat[id(x)]
        if out.dim() > 2:
            axis = out.dim() - 1 if is_dense else self._moved(func, x, out, args[1:], kwargs)
            if axis != CHANNELS:
                self._axis[id(out)] = axis
        elif out.dim() == 2 and not is_dense:
            flattens = x.dim() > 2 and out.shape == (len(x), math.prod(x.shape[1:])) and math.prod(x.shape[2:]) > 1
            if flattens and self._axis.get(id(x), CHANNELS) == CHANNELS:
                self._flat[id(out)] = tuple(x.shape[1:])
            elif out.shape == x.shape and id(x) in self._flat:
                self._flat[id(out)] = self._flat[id(x)]
        return out

    def _moved(self, func: Callable, x: Tensor, out: Tensor, args: Sequence, kwargs: Mapping) -> int:
        """The axis of the channels in the output of a function of x."""
        axis = self._axis.get(id(x), CHANNELS)
        if getattr(func, "__name__", "") in MOVES:
            lengths = [2 if place == axis else 1 for place in range(x.dim())]
            return func(x.new_empty(lengths), *args, **kwargs).shape.index(2)
        return out.dim() - 1 if axis != CHANNELS and axis == x.dim() - 1 else axis


@torch.no_grad()
def flattened_shapes(model: nn.Module, image_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The shape (c, h, w) before the flattening, by the name of the dense layer's weight behind it.

    A flattening whose channels stand last, as in x.permute(0, 2, 3, 1).flatten(1), is none.

    Args:
        model: takes images (B, C, H, W).
        image_shape: (C, H, W).
    """
    with _Watch() as watch:
        model(next(model.parameters()).new_zeros(2, *image_shape))
    return {name: watch.found[id(p)] for name, p in model.named_parameters() if id(p) in watch.found}
