"""Functions that torch differentiates once, computed from functions that it differentiates twice.

An attack differentiates a gradient, so every function of a model needs a second derivative. Torch's fused attention
and hard sigmoid have none. Attention is therefore run step by step (the `MATH` kernel), and hard sigmoid as
ReLU6(x + 3) / 6. Torch's encoder layers have a path of their own, which knows no derivative and calls none of the
layers inside; it is not taken.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Within it, attention and hard sigmoid have second derivatives."""
    is_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), _PlainHardsigmoid():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fast)


def make_twice_differentiable(model: nn.Module) -> None:
    """Let the model run within `twice_differentiable`, whoever calls it; its copies do so too."""
    model.forward = MethodType(_forward, model)  # a bound method: a copy of the model has it bound to the copy


def _forward(model: nn.Module, *args: object, **kwargs: object) -> object:
    """The model's own forward, within `twice_differentiable`, which is left whatever the model raises."""
    with twice_differentiable():
        return type(model).forward(model, *args, **kwargs)


class _PlainHardsigmoid(TorchFunctionMode):
    """Puts ReLU6(x + 3) / 6 in the place of hard sigmoid."""

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: Sequence = (), kwargs: Mapping | None = None
    ) -> object:
        """What the function gives, or hard sigmoid of its first argument."""
        if function is nn.functional.hardsigmoid:
            return _hardsigmoid(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return nn.functional.relu6(input + 3) / 6
