"""A residual block's input from the inputs of a layer inside the block, whose branch begins with a 1x1 convolution.

A bottleneck begins with a 1x1 convolution. Its patches do not overlap, so its span tells positions apart, and not
images. The 3x3 convolution behind it tells images apart, but its inputs do not suffice to run the network: the skip
passes by. Both together do. At each position the block's input u_p lies in the row space R of the first layer's
gradient, of rank B P, and gives the inputs of the second: W u_p + b, pulled back through what lies between, where these
are known. About half of the channels are, behind a ReLU, for B P unknowns a position.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from attack.read.span import row_space
from attack.walk.equations import ENOUGH
from attack.walk.noise import beside, size_of
from network.chain import input_shapes
from network.kinds import kind_of, pulled_below, share_below
from network.kinds.affine import Geometry, is_spanned
from network.known_outputs import KnownOutputs
from network.stage import Chain

ERRED = 1e-5  # relative error that the inner layer's inputs may have, by which zeros are told from other entries
RIDGE = 1e-14  # of the mean of a normal matrix's diagonal, where candidates that are no images leave it singular


@dataclass(frozen=True)
class Beneath:
    """What lies in a branch below an inner layer: a 1x1 convolution, and stages whose outputs tell their inputs.

    Attributes:
        chain: these stages, the convolution first.
        shapes: before each of them and after the last, one image's.
        batch_size: B.
        gradient: of the convolution's weight; None where the update has none, or there is none yet.
    """

    chain: Chain
    shapes: Sequence[tuple[int, ...]]
    batch_size: int
    gradient: Tensor | None

    @classmethod
    def of(
        cls, chain: Chain, shape: Sequence[int], batch_size: int, gradients: Mapping[str, Tensor]
    ) -> "Beneath | None":
        """The stages below a layer, for block inputs of that shape; None where they are others than these."""
        module = chain[0].module
        is_pointwise = isinstance(module, nn.Conv2d) and (*module.kernel_size, *module.stride) == (1, 1, 1, 1)
        if not is_pointwise or kind_of(module).why_not(module) or any(module.padding) or module.groups != 1:
            return None
        shapes = input_shapes(chain, shape)
        for stage, inputs, outputs in zip(chain[1:], shapes[1:], shapes[2:], strict=False):
            kind = kind_of(stage.module)
            if kind.is_affine or kind.mixes_images(stage.module) or kind.why_not(stage.module, inputs, outputs):
                return None
        return cls(chain, shapes, batch_size, gradients.get(f"{chain[0].name}.weight"))

    @property
    def is_told(self) -> bool:
        """Whether the equations at a position determine the block's input there."""
        module, share = self.chain[0].module, 1.0
        for stage, inputs, outputs in reversed(list(zip(self.chain, self.shapes, self.shapes[1:], strict=False))[1:]):
            share = share_below(stage.module, share, inputs, outputs)
        rank = self.batch_size * math.prod(self.shapes[1][1:])
        has_room = is_spanned(self.batch_size, math.prod(self.shapes[1][1:]), module.out_channels, module.in_channels)
        return has_room and share * module.out_channels >= ENOUGH * rank

    @cached_property
    def _span(self) -> Tensor:
        """R (r, c_in) of the convolution's gradient.

        Raises:
            ValueError: the update holds no gradient of it.
        """
        module = self.chain[0].module
        if self.gradient is None:
            raise ValueError(f"the update holds no gradient of {self.chain[0].name}, which gives the block's input")
        geometry = Geometry.of(module, self.shapes[0])
        return row_space(self.gradient.to(module.weight.device), geometry, self.batch_size)

    @torch.no_grad()
    def inputs(self, values: Tensor) -> Tensor:
        """The block's inputs (N, *shape) from the inner layer's (N, ...), by least squares at each position."""
        noise = beside(ERRED * size_of(values), values).expand_as(values)
        told = KnownOutputs.of(values, torch.zeros_like(values), noise)
        for stage, shape in reversed(list(zip(self.chain, self.shapes, strict=False))[1:]):
            told = pulled_below(stage.module, told, shape)
        module = self.chain[0].module
        weight = module.weight.flatten(1) @ self._span.T  # (c_out, r)
        goal = told.values if module.bias is None else told.values - module.bias[:, None, None]
        known, goal = (each.flatten(2).transpose(1, 2).to(values) for each in (told.known, goal))  # (N, P, c_out)
        normal = torch.einsum("npc,cr,cs->nprs", known, weight, weight)
        ridge = RIDGE * normal.diagonal(dim1=2, dim2=3).mean(2)[..., None, None] + 1e-300
        normal = normal + ridge * torch.eye(len(self._span)).to(values)
        q = torch.linalg.solve(normal, ((known * goal) @ weight)[..., None])[..., 0]  # (N, P, r)
        return (q @ self._span).transpose(1, 2).reshape(len(values), *self.shapes[0])
