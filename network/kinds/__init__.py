"""One table of all kinds of layers. A new kind is one file in this folder and one line here."""

import math
from collections.abc import Mapping, Sequence

from torch import nn

from network.kinds.affine import AFFINE
from network.kinds.dipping import GELU, Hardswish, SiLU
from network.kinds.image_norm import ImageNorm, InstanceNorm
from network.kinds.joining import AmongKind, PartKind
from network.kinds.kind import Kind, Shape
from network.kinds.leaky_relu import LeakyReLU
from network.kinds.norm import Norm
from network.kinds.opaque import OPAQUE
from network.kinds.pool import AveragePool, MaxPool
from network.kinds.product import GateKind, ProductKind
from network.kinds.rearranged import RearrangedKind
from network.kinds.relu import ReLU
from network.kinds.relu6 import ReLU6
from network.kinds.reshape import Reshape
from network.kinds.residual import ResidualKind
from network.kinds.saturating import Sigmoid, Tanh
from network.kinds.scaling import ScalingKind
from network.kinds.unwalked import UnwalkedKind
from network.known_outputs import KnownOutputs, UndeterminedError

KINDS: Sequence[Kind] = (
    AFFINE,
    Norm(),
    InstanceNorm(),
    ImageNorm(),
    ReLU(),
    ReLU6(),
    LeakyReLU(),
    Sigmoid(),
    Tanh(),
    SiLU(),
    GELU(),
    Hardswish(),
    MaxPool(),
    AveragePool(),
    Reshape(),
    RearrangedKind(),
    AmongKind(),
    PartKind(),
    ResidualKind(),
    ProductKind(),
    GateKind(),
    ScalingKind(),
    UnwalkedKind(),
    *OPAQUE,
)
UNKNOWN = Kind()  # of any other module
CALLS: Mapping[str, Kind] = {name: kind for kind in KINDS for name in kind.calls}  # by function or method
_BY_MODULE: Mapping[type, Kind] = {module: kind for kind in KINDS for module in kind.modules}


def kind_of(module: object) -> Kind:
    """The kind of a module; of a subclass, that of its nearest base in the table."""
    return next((_BY_MODULE[base] for base in type(module).__mro__ if base in _BY_MODULE), UNKNOWN)


def called(name: str, args: Sequence[object], how: Mapping[str, object]) -> list[nn.Module]:
    """The modules that do what a call of this function or method does with these arguments behind its tensor.

    Raises:
        LookupError, TypeError, ValueError: there are none.
    """
    return CALLS[name].calls[name](*args, **how)


def pulled_below(module: nn.Module, outputs: KnownOutputs, shape: Shape) -> KnownOutputs:
    """What is known of a stage's inputs of that shape, from what is known of its outputs.

    Raises:
        UndeterminedError: the stage's outputs do not tell its inputs.
    """
    kind = kind_of(module)
    if reason := kind.why_not(module, shape, outputs.values.shape[1:]):
        raise UndeterminedError(reason)
    return kind.pulled(module, outputs, shape)


def share_below(module: nn.Module, share: float | None, inputs: Shape, outputs: Shape) -> float | None:
    """The share of a stage's inputs that is known where that share of its outputs is; None: delta is not known either.

    It asks the same rule as `pulled_below`, before there are any numbers.
    """
    kind = kind_of(module)
    if share is None or (kind.needs_all and share < 1) or kind.why_not(module, inputs, outputs):
        return None
    return min(share * min(1.0, math.prod(outputs) / math.prod(inputs)), kind.known_share)
