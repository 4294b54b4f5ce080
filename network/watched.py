"""What layers see while a model runs, without a word of the model itself."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from torch import Tensor, nn

Seen = TypeVar("Seen")


@contextmanager
def watched(layers: Iterable[nn.Module], look: Callable[[nn.Module, Tensor], Seen]) -> Iterator[dict[nn.Module, Seen]]:
    """What `look` makes of each layer and its input, of the last time that the layer ran within the block.

    `look` is called before the layer runs, and may raise. A layer that did not run is missing.
    """
    seen: dict[nn.Module, Seen] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[layer] = look(layer, inputs[0])

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class _Enough(Exception):  # noqa: N818 - it ends a forward pass whose rest is not asked for
    """The last layer's input was seen."""


def inputs_until(layers: Sequence[nn.Module], run: Callable[[], object]) -> list[Tensor]:
    """The inputs of these layers in a run of the model, which ends in front of the last of them.

    Raises:
        LookupError: a layer does not run before the last one.
    """

    def look(layer: nn.Module, inputs: Tensor) -> Tensor:
        if layer is layers[-1]:
            found.append(inputs)
            raise _Enough
        return inputs

    found: list[Tensor] = []
    with watched(layers, look) as seen, suppress(_Enough):
        run()
    return [*(seen[layer] for layer in layers[:-1]), found[0]]
