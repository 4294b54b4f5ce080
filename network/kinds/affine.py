"""Linear layers and 2-d convolutions: z_p = W patch_p(a) + b at positions p = 1..P.

A linear layer has one position, and its patch is its whole input. `Geometry` says how a layer cuts its input into
patches, `LinearMap` is the layer without its bias, as a linear operator with its adjoints.
"""

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from network.kinds.kind import Kind, Shape
from network.parametrised import why_no_gradient


class Affine(Kind):
    """Linear and Conv2d. Their inputs are told by equations (`attack.walk.equations`), not by their outputs alone.

    Each group of a grouped convolution is a layer of its own, on its own channels.
    """

    modules = (nn.Linear, nn.Conv2d)
    is_affine = True

    def why_not(self, module: nn.Module, inputs: Shape = (), outputs: Shape = ()) -> str:
        """Why no equations of this layer are known; empty of a linear layer and a convolution that pads with zeros."""
        if isinstance(module, nn.Linear):
            return "" if len(inputs) < 2 else "a linear layer that is applied to several tokens of an image"
        if not isinstance(module, nn.Conv2d) or type(module).forward is not nn.Conv2d.forward:
            return f"{type(module).__name__} is neither a linear layer nor a 2-d convolution"
        if module.padding_mode != "zeros":
            return f"a convolution padded by {module.padding_mode!r}: only zeros can be read"
        if isinstance(module.padding, str):
            return f"a convolution with padding={module.padding!r}: give it in pixels"
        return ""

    def equations(self, module: nn.Module, known_outputs: int, inputs: Shape, batch_size: int) -> int:
        """Equations for the inputs of so many images: rows of its gradient, and one for each known output.

        A weight that meets nothing but padding has no row. See `LinearMap.telling` for a stride.
        """
        if why_no_gradient(module):
            return known_outputs
        return known_outputs + LinearMap.of(module, tuple(inputs)).telling(batch_size)

    def gives_weight_gradients(self, module: nn.Module) -> bool:
        """Of torch's own layers, grouped convolutions among them, as long as they pad with zeros."""
        if "weight" not in module._parameters:  # a hook makes it anew at each call, as torch's older weight_norm does
            return False
        if type(module) is nn.Linear:
            return True
        return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)

    def weight_gradients(self, module: nn.Module, inputs: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """delta a^T, summed over images and positions; and delta."""
        if isinstance(module, nn.Linear):
            delta, inputs = delta.flatten(0, -2), inputs.flatten(0, -2)  # of tokens too
            return delta.T @ inputs, delta.sum(0)
        how = (module.stride, module.padding, module.dilation, module.groups)
        return nn.grad.conv2d_weight(inputs, module.weight.shape, delta, *how), delta.sum((0, 2, 3))


AFFINE = Affine()


@torch.no_grad()
def group_of(layer: nn.Conv2d, index: int) -> nn.Conv2d:
    """One group of a grouped convolution, as a convolution of its own on the group's channels."""
    how = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    channels = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    alone, rows = nn.Conv2d(*channels, *how, bias=layer.bias is not None), rows_of_group(layer, index)
    alone = alone.to(layer.weight).requires_grad_(False)
    for name, parameter in alone.named_parameters():
        parameter.copy_(getattr(layer, name)[rows])
    return alone


def rows_of_group(layer: nn.Conv2d, index: int) -> slice:
    """The output channels of a group."""
    size = layer.out_channels // layer.groups
    return slice(index * size, (index + 1) * size)


@dataclass(frozen=True)
class Geometry:
    """How a layer cuts its input into patches.

    Attributes:
        input_shape: of one input, (C, H, W), or (n,) for a fully connected layer.
        output_shape: of one output, (c_out, H', W') or (c_out,).
        kernel, stride, padding, dilation: (vertical, horizontal); unused for a fully connected layer.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @classmethod
    def of(cls, layer: nn.Module, input_shape: Shape) -> "Geometry":
        """The geometry of a layer for inputs of this shape.

        Raises:
            ValueError: the layer is neither linear nor a plain 2-d convolution of one group, or does not take such
                inputs.
        """
        shape = tuple(input_shape)
        if isinstance(layer, nn.Linear):
            if shape != (layer.in_features,):
                raise ValueError(f"the layer takes inputs of shape ({layer.in_features},), not {shape}")
            return cls(shape, (layer.out_features,))
        if reason := AFFINE.why_not(layer):
            raise ValueError(reason)
        if layer.groups != 1:
            raise ValueError(f"a convolution in {layer.groups} groups: each group cuts its own channels into patches")
        if len(shape) != 3 or shape[0] != layer.in_channels:
            raise ValueError(f"the layer takes inputs of shape ({layer.in_channels}, H, W), not {shape}")
        out = tuple(
            (side + 2 * p - d * (k - 1) - 1) // s + 1
            for side, k, s, p, d in zip(
                shape[1:], layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True
            )
        )
        if min(out) < 1:
            raise ValueError(f"inputs of {shape[1]}x{shape[2]} are smaller than the kernel")
        return cls(shape, (layer.out_channels, *out), layer.kernel_size, layer.stride, layer.padding, layer.dilation)

    @property
    def positions(self) -> int:
        """P."""
        return math.prod(self.output_shape[1:])

    @property
    def convolutional(self) -> bool:
        """Whether inputs are images rather than vectors."""
        return len(self.input_shape) == 3

    @property
    def overlaps(self) -> bool:
        """Whether patches overlap enough to say which belong together; a single one has nothing to be confused with."""
        if self.positions == 1:
            return True
        axes = zip(self.output_shape[1:], self.stride, self.kernel, strict=True)
        return all(count == 1 or stride < size - 1 for count, stride, size in axes)

    def patches(self, inputs: Tensor) -> Tensor:
        """E: inputs (N, *input_shape) -> patches (N, P, c_in k^2)."""
        if not self.convolutional:
            return inputs[:, None, :]
        if not len(inputs):  # unfold does not take them
            return inputs.new_zeros(0, self.positions, self.input_shape[0] * math.prod(self.kernel))
        return nn.functional.unfold(inputs, self.kernel, self.dilation, self.padding, self.stride).transpose(1, 2)

    def assemble(self, patches: Tensor) -> Tensor:
        """E^T: patches (N, P, c_in k^2) -> the sum of what covers each entry, (N, *input_shape)."""
        if not self.convolutional:
            return patches[:, 0]
        return nn.functional.fold(
            patches.transpose(1, 2), self.input_shape[1:], self.kernel, self.dilation, self.padding, self.stride
        )

    def coverage(self, like: Tensor) -> Tensor:
        """diag(D), how many patches each entry of an input lies in, (*input_shape); 0 where no patch ever looks."""
        return self.assemble(self.patches(like.new_ones(1, *self.input_shape)))[0]

    def seen(self, like: Tensor) -> Tensor:
        """Which entries of a patch are not always padding, (c_in k^2,)."""
        return self.patches(like.new_ones(1, *self.input_shape))[0].any(0)

    def bound(self, like: Tensor) -> int:
        """The largest rank that G can have."""
        return min(self.output_shape[0], int(self.seen(like).sum()))

    def is_spanned(self, batch_size: int, like: Tensor) -> bool:
        """Whether R holds every patch of so many inputs, and not everything."""
        return is_spanned(batch_size, self.positions, self.output_shape[0], int(self.seen(like).sum()))


def is_spanned(batch_size: int, positions: int, channels_out: int, width: int) -> bool:
    """Whether the rows of a layer's gradient, of so many channels and a patch of that width, span B P patches.

    k rows span at most k dimensions. Where there are just as many rows as patches, nothing is left over to show noise,
    and it takes patches that overlap to show whether images are what is spanned.
    """
    rank = batch_size * positions
    return rank < width and (rank < channels_out or (rank == channels_out and positions > 1))


@dataclass(frozen=True)
class LinearMap:
    """A convolution or linear layer without its bias, and its two adjoints.

    Args:
        weight: (c_out, c_in) or (c_out, c_in / groups, k, k).
        input_shape: of one image.
        stride, padding, dilation, groups: of the convolution.
    """

    weight: Tensor
    input_shape: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, module: nn.Linear | nn.Conv2d, input_shape: tuple[int, ...]) -> "LinearMap":
        """The linear map of a layer.

        Raises:
            ValueError: neither a linear layer nor a plain convolution.
        """
        if reason := AFFINE.why_not(module, input_shape):
            raise ValueError(reason)
        weight = module.weight.detach()
        if isinstance(module, nn.Linear):
            return cls(weight, input_shape)
        return cls(weight, input_shape, module.stride, module.padding, module.dilation, module.groups)

    def with_weight(self, weight: Tensor) -> "LinearMap":
        """The same map with another weight."""
        return replace(self, weight=weight)

    def squared(self) -> "LinearMap":
        """The same map with each weight squared."""
        return self.with_weight(self.weight.square())

    def float(self) -> "LinearMap":
        """The same in float32."""
        return self.with_weight(self.weight.float())

    @property
    def taps(self) -> int:
        """How many weights of a kernel meet more than padding; one of a linear layer."""
        if self.weight.dim() == 2:
            return 1
        return math.prod(sum(taps for taps, _ in self._classes(axis)) for axis in (0, 1))

    def telling(self, batch_size: int) -> int:
        """The rows of a gradient that tell something of so many images' inputs, about.

        A stride sorts an input's positions into classes, each of which meets weights of its own. Where a class has
        fewer rows than unknowns, those that another has too many do not make up for it, and are not counted.
        """
        channels_out, channels = len(self.weight) // self.groups, self.weight.shape[1] * self.groups
        if self.weight.dim() == 2:
            return channels_out * channels
        pairs = itertools.product(self._classes(0), self._classes(1))
        each = [(channels_out * a * b, batch_size * rows * columns) for (a, rows), (b, columns) in pairs]
        is_enough = all(rows >= unknowns for rows, unknowns in each)
        return channels * sum(rows if is_enough else min(rows, unknowns) for rows, unknowns in each)

    def _classes(self, axis: int) -> list[tuple[int, int]]:
        """Along an axis, how many weights meet the positions of each class, and how many positions these are."""
        side, kernel = self.input_shape[1 + axis], self.weight.shape[2 + axis]
        stride, padding, dilation = self.stride[axis], self.padding[axis], self.dilation[axis]
        last = side + 2 * padding - dilation * (kernel - 1) - 1  # where the last patch may begin
        begins = range(-padding, last - padding + 1, stride)
        met = [tap for tap in range(kernel) if any(0 <= begin + tap * dilation < side for begin in begins)]
        classes = [(tap * dilation - padding) % stride for tap in met]
        return [(classes.count(first), len(range(first, side, stride))) for first in range(stride)]

    def of_one_channel(self, taps: Tensor) -> "LinearMap":
        """The map of one input channel, with these weights (n, 1, k, k)."""
        return replace(self, weight=taps, input_shape=(1, *self.input_shape[1:]), groups=1)

    def patch_sizes(self, u: Tensor) -> Tensor:
        """|patch|^2 of what each output sees of inputs (B, ...), (B, 1, ...) or (B, c_out, ...)."""
        of_groups = self.with_weight(torch.ones_like(self.weight[: self.groups])).outputs(u.square())
        each = 1 if self.groups == 1 else len(self.weight) // self.groups
        return of_groups.repeat_interleave(each, 1)

    @property
    def _settings(self) -> dict:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    def outputs(self, u: Tensor) -> Tensor:
        """W * u, (B, c_out, ...)."""
        if self.weight.dim() == 2:
            return u @ self.weight.T
        return nn.functional.conv2d(u, self.weight, **self._settings)

    def inputs(self, delta: Tensor, weight: Tensor | None = None) -> Tensor:
        """The adjoint of `outputs`, with another weight if one is given: what delta at the output is at the input."""
        weight = self.weight if weight is None else weight
        if weight.dim() == 2:
            return delta @ weight
        shape = (len(delta), weight.shape[1] * self.groups, *self.input_shape[1:])
        return nn.grad.conv2d_input(shape, weight, delta, **self._settings)

    def weights(self, u: Tensor, delta: Tensor) -> Tensor:
        """sum_i corr(delta_i, u_i), of the weight's shape: the gradient of the weight, summed over images."""
        if self.weight.dim() == 2:
            return delta.T @ u
        return nn.grad.conv2d_weight(u, self.weight.shape, delta, **self._settings)

    def shifted(self, delta: Tensor) -> Tensor:
        """M (c_out, k^2, B * H * W): delta at every place where a weight of the kernel meets an input.

        The gradient rows of every input channel are M times that channel, of its own group's outputs where there are
        groups, so all channels of a group share one scaling.
        """
        if self.weight.dim() == 2:
            return delta.T[:, None, :]
        kernel, (height, width) = self.weight.shape[2:], self.input_shape[1:]
        taps = torch.eye(kernel.numel(), dtype=delta.dtype, device=delta.device).view(-1, 1, *kernel)
        single = delta.flatten(0, 1)[:, None]  # (B * c_out, 1, H', W')
        shape = (len(single), 1, height, width)
        settings = self._settings | {"groups": 1}
        planes = [nn.grad.conv2d_input(shape, tap[None], single, **settings) for tap in taps]
        stacked = torch.stack(planes, 1).view(len(delta), delta.shape[1], len(taps), height * width)
        return stacked.permute(1, 2, 0, 3).flatten(2)
