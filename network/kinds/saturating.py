"""Sigmoid and tanh: inverted wherever they are not so close to their limits that noise might have taken them there."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from network.kinds.kind import Kind, Shape
from network.known_outputs import FLOOR, ZERO, KnownOutputs


class Sigmoid(Kind):
    """1 / (1 + exp(-z))."""

    modules = (nn.Sigmoid,)
    calls = {"sigmoid": lambda *_, **__: [nn.Sigmoid()]}  # noqa: RUF012
    output_range = (0.0, 1.0)
    is_activation = True
    is_smooth = True
    is_saturating = True
    scale = 1.0  # inputs are scale logit(share), see `share_of`

    def share_of(self, outputs: Tensor) -> Tensor:
        """Where outputs lie between the limits, in [0, 1]."""
        return outputs

    def why_not(self, module: nn.Module, inputs: Shape, outputs: Shape) -> str:
        """Never."""
        return ""

    def before(self, module: nn.Module, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The slope is 0 where it is saturated."""
        share = self.share_of(outputs)
        z, slope = share.logit(eps=torch.finfo(outputs.dtype).eps), (share * (1 - share)).clamp(min=0)
        return self.scale * z, slope / self.scale**2

    def pulled(self, module: nn.Module, outputs: KnownOutputs, shape: Shape) -> KnownOutputs:
        """Close to a limit inputs are not known, and delta is rounded more coarsely."""
        share = self.share_of(outputs.values)
        slope = share * (1 - share)
        inside = (share > 0) & (share < 1) & (slope > ZERO * outputs.noise)
        share = torch.where(inside, share, 0.5)
        exact = slope.clamp(min=0) / self.scale**2
        inputs = outputs.scaled(self.scale * share.logit(), torch.where(inside, slope, 1.0) / self.scale**2, inside)
        rounding = torch.where(inside, 1 / self.closeness(share), 1 / FLOOR).clamp(min=1.0)
        return replace(
            inputs, delta=outputs.delta * exact, masked_delta=outputs.masked_delta * exact, rounding=rounding
        )

    def closeness(self, share: Tensor) -> Tensor:
        """One over the units of rounding in the slope: y (1 - y) is computed from y, exact to a relative rounding."""
        return 2 * (1 - share)


class Tanh(Sigmoid):
    """tanh(z) = 2 sigmoid(2 z) - 1; its slope 1 - y^2 cancels at both limits."""

    modules = (nn.Tanh,)
    calls = {"tanh": lambda *_, **__: [nn.Tanh()]}  # noqa: RUF012
    output_range = (-1.0, 1.0)
    scale = 0.5

    def share_of(self, outputs: Tensor) -> Tensor:
        """Where outputs lie between -1 and 1, in [0, 1]."""
        return (outputs + 1) / 2

    def closeness(self, share: Tensor) -> Tensor:
        """At both ends."""
        return 4 * share * (1 - share)
