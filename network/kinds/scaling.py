"""Constants that are added to activations or multiplied by: the same for every image, and known to the server.

A normalisation that a model writes into its forward pass, (x - mean) / std, is two such stages.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from network.kinds.kind import Kind, Shape
from network.known_outputs import FLOOR, KnownOutputs

OPERATIONS: Mapping[str, Callable] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
}
SAME = {"iadd": "add", "isub": "sub", "subtract": "sub", "imul": "mul", "multiply": "mul"} | dict.fromkeys(
    ("truediv", "itruediv", "true_divide", "divide"), "div"
)  # other names of these operations


@dataclass(frozen=True, eq=False)
class Scaling:
    """x + c, x - c, x c, x / c or c - x, the constant c one number, or a tensor that broadcasts to an image's x.

    Attributes:
        operation: one of `OPERATIONS`.
        constant: c, or the graph that computes c from the model's own tensors.
        is_reversed: whether it is c - x.
        model: whose tensors the graph takes.
    """

    operation: str
    constant: float | Tensor | fx.Graph
    is_reversed: bool = False
    model: nn.Module | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Of x's shape, unless the constant has more entries."""
        c = self.value(x)
        return c - x if self.is_reversed else OPERATIONS[self.operation](x, c)

    @property
    def is_positive(self) -> bool:
        """Whether it multiplies by a number above zero, or divides by one."""
        return self.operation in ("mul", "div") and isinstance(self.constant, float) and self.constant > 0

    def value(self, x: Tensor) -> float | Tensor:
        """The constant, in the dtype and place of x."""
        if isinstance(self.constant, float):
            return self.constant
        is_graph = isinstance(self.constant, fx.Graph)
        return (fx.Interpreter(self.model, graph=self.constant).run() if is_graph else self.constant).to(x)

    def slope(self, x: Tensor) -> Tensor:
        """What x is multiplied by."""
        c = torch.as_tensor(self.value(x)).to(x).detach()
        if self.operation in ("mul", "div"):
            return c if self.operation == "mul" else 1 / c
        return torch.full_like(c, -1.0 if self.is_reversed else 1.0)


class ScalingKind(Kind):
    """Such a stage tells its inputs wherever it does not multiply by zero."""

    modules = (Scaling,)

    def why_not(self, module: Scaling, inputs: Shape, outputs: Shape) -> str:
        """Where the constant makes more of the inputs than there were."""
        return "" if tuple(inputs) == tuple(outputs) else "a constant of more entries than its inputs is added"

    def pulled(self, module: Scaling, outputs: KnownOutputs, shape: Shape) -> KnownOutputs:
        """An entry that is multiplied by zero says nothing of its input."""
        slope = module.slope(outputs.values)
        alive, shift = slope.abs() > FLOOR, module(torch.zeros_like(outputs.values))
        values = (outputs.values - shift) / torch.where(alive, slope, 1.0)
        inputs = outputs.scaled(values, torch.where(alive, slope, FLOOR), alive.expand_as(values))
        return replace(inputs, delta=outputs.delta * slope, masked_delta=outputs.masked_delta * slope)

    def inverted(self, module: Scaling, outputs: Tensor, shape: Shape) -> Tensor | None:
        """Where nothing is multiplied by zero, or spread over more entries."""
        slope = module.slope(outputs)
        if outputs.shape[1:] != tuple(shape) or not (slope.abs() > FLOOR).all():
            return None
        return (outputs - module(torch.zeros_like(outputs))) / slope


def scaling(name: str, constant: float | fx.Graph, *, is_first: bool, model: nn.Module | None = None) -> Scaling:
    """The stage that a call of this name is, with a constant as its first or second argument.

    Raises:
        LookupError: it is not one of `OPERATIONS`, or divides the constant.
    """
    operation = SAME.get(name, name)
    if operation == "rsub":  # torch.rsub(x, c) is c - x
        operation, is_first = "sub", not is_first
    if operation not in OPERATIONS or (is_first and operation == "div"):
        raise LookupError(name)
    return Scaling(operation, constant, is_first and operation == "sub", model)


def normalise(mean: Sequence[float], std: Sequence[float]) -> list[Scaling]:
    """(x - mean) / std, with a mean and a standard deviation for each channel of images (B, C, H, W)."""
    columns = [torch.as_tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std)]
    return [Scaling(operation, column) for operation, column in zip(("sub", "div"), columns, strict=True)]


def hardsigmoid(*_: object, **__: object) -> list:
    """ReLU6(x + 3) / 6. Torch's own hard sigmoid is differentiated once only."""
    return [Scaling("add", 3.0), nn.ReLU6(), Scaling("div", 6.0)]


ScalingKind.calls = {"hardsigmoid": hardsigmoid}
