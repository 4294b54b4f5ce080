"""What layers see while a model runs, without a word of the model itself."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
