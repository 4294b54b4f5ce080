"""Activations that are traced and run, and that nothing is followed through."""

import math
from collections.abc import Callable

from torch import nn

from network.kinds.kind import Kind


class Opaque(Kind):
    """An activation of which only its range is known."""

    is_activation = True
    is_smooth = True

    def __init__(self, module: type[nn.Module], call: str, least: float) -> None:
        self.modules, self.output_range = (module,), (least, math.inf)
        self.calls = {call: _maker(module)}


def _maker(module: type[nn.Module]) -> Callable[..., list[nn.Module]]:
    def make(*args: object, **how: object) -> list[nn.Module]:
        return [module(*args, **how)]

    return make


OPAQUE = (
    Opaque(nn.ELU, "elu", -math.inf),
    Opaque(nn.Mish, "mish", -0.31),  # least value -0.30884
    Opaque(nn.SELU, "selu", -1.7581),
    Opaque(nn.Softplus, "softplus", 0.0),
)
