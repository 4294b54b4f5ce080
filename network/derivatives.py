"""Functions that torch differentiates once, computed from functions that it differentiates twice.

An attack differentiates a gradient, so every function of a model needs a second derivative. Torch's fused attention
and hard sigmoid have none. Attention is therefore run step by step (the `MATH` kernel), and hard sigmoid as
ReLU6(x + 3) / 6. Torch's encoder layers have a path of their own, which knows no derivative and calls none of the
layers inside; it is not taken.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

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
    entered = []

    def enter(module: nn.Module, inputs: object) -> None:
        entered.append(twice_differentiable())
        entered[-1].__enter__()

    def leave(module: nn.Module, inputs: object, outputs: object) -> None:
        if entered:
            entered.pop().__exit__(None, None, None)

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)


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
