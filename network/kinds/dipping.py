"""Activations with a dip: SiLU, GELU and Hardswish fall to a minimum left of zero and rise on both sides of it.

Outputs above zero have one input. Outputs below zero have two, one on either side of the minimum: the input is known up
to that doubt. The right one is taken, since pre-activations are mostly there, and the left one's delta is what a
residual may ask for.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from network.kinds.kind import Kind, Shape
from network.known_outputs import ZERO, KnownOutputs

HALVINGS = 60  # of a bracket: to float64's last digits
FARTHEST = -40.0  # left of the minimum no output is told from zero


class Dipping(Kind):
    """What such activations have in common.

    Attributes:
        turning: the input of the minimum; outputs there are the lower end of `output_range`.
        cuts_off: whether outputs are zero, with a slope of zero, for all inputs far enough left of the minimum. An
            output within noise of zero is then taken for one of these.
    """

    is_activation = True
    is_smooth = True
    cuts_off = False
    known_share = 0.5
    turning: float

    def why_not(self, module: nn.Module, inputs: Shape, outputs: Shape) -> str:
        """Never, up to the doubt."""
        return ""

    def pulled(self, module: nn.Module, outputs: KnownOutputs, shape: Shape) -> KnownOutputs:
        """Outputs within noise of zero, and below it, have an input in doubt."""
        a = outputs.values
        right, left = (self._input(module, a, is_right=side) for side in (True, False))
        told, off = a > ZERO * outputs.noise, (a.abs() <= ZERO * outputs.noise) & self.cuts_off
        slope, other = _slope(module, right), torch.where(off, 0.0, _slope(module, left))
        return replace(
            outputs.scaled(right, torch.where(told, slope, 1.0), told),
            delta=outputs.delta * torch.where(off, other, slope),
            masked_delta=torch.where(told, 0.0, outputs.delta * torch.where(off, slope, other)),
            margin=torch.where(told, a / outputs.noise, 0.0),
            is_gated=False,
        )

    def _input(self, module: nn.Module, outputs: Tensor, *, is_right: bool) -> Tensor:
        """The input of each output on one side of the minimum, by halving a bracket."""
        turning = torch.full_like(outputs, self.turning)
        far = outputs.clamp(min=0) + 1 if is_right else torch.full_like(outputs, FARTHEST)
        for _ in range(HALVINGS):
            middle = (turning + far) / 2
            is_low = module(middle) < outputs
            turning, far = torch.where(is_low, middle, turning), torch.where(is_low, far, middle)
        return (turning + far) / 2


class SiLU(Dipping):
    """z sigmoid(z)."""

    modules = (nn.SiLU,)
    calls = {"silu": lambda *_, **__: [nn.SiLU()]}  # noqa: RUF012
    output_range = (-0.2784645427610738, math.inf)
    turning = -1.2784645427610738


class GELU(Dipping):
    """z times the normal distribution's share below z."""

    modules = (nn.GELU,)
    calls = {"gelu": lambda approximate="none": [nn.GELU(approximate)]}  # noqa: RUF012
    output_range = (-0.17, math.inf)  # least value -0.16997
    turning = -0.7517916243


class Hardswish(Dipping):
    """z ReLU6(z + 3) / 6: zero left of -3, and z right of 3."""

    modules = (nn.Hardswish,)
    calls = {"hardswish": lambda *_, **__: [nn.Hardswish()]}  # noqa: RUF012
    output_range = (-0.375, math.inf)
    turning = -1.5
    is_smooth = False  # its slope jumps at -3 and at 3
    cuts_off = True


def _slope(module: nn.Module, inputs: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = inputs.detach().clone().requires_grad_()
        return torch.autograd.grad(module(leaf).sum(), leaf)[0]
