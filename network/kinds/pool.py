"""Pools. One of a single position does nothing; every other puts out less than it takes in."""

import math

import torch
from torch import Tensor, nn

from network.kinds.kind import Kind, Shape
from network.known_outputs import KnownOutputs


class Pool(Kind):
    """What all pools have in common."""

    output_range = None
    keeps_sign = True

    def keeps_zeros(self, module: nn.Module, inputs: Shape, outputs: Shape) -> bool:
        """Only where the pool does nothing: a mean of several entries is hardly ever zero."""
        return math.prod(inputs) == math.prod(outputs)

    def why_not(self, module: nn.Module, inputs: Shape, outputs: Shape) -> str:
        """Several inputs make one output."""
        return "" if math.prod(inputs) == math.prod(outputs) else "a pool puts out less than it takes in"

    def pulled(self, module: nn.Module, outputs: KnownOutputs, shape: Shape) -> KnownOutputs:
        """In the shape of the inputs."""
        return outputs.reshaped(tuple(shape))


class AveragePool(Pool):
    """AvgPool2d, AdaptiveAvgPool2d, and the mean over height and width."""

    modules = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)


class MaxPool(Pool):
    """MaxPool2d, softened by logsumexp(beta z) / beta."""

    modules = (nn.MaxPool2d,)
    is_max_pool = True
    has_kink = True

    def keeps_zeros(self, module: nn.Module, inputs: Shape, outputs: Shape) -> bool:
        """The largest of several entries is zero where all are."""
        return True

    def softened(self, module: nn.MaxPool2d, beta: float) -> nn.Module:
        """With a soft maximum."""
        return SoftMaximum(module, beta)


def average_pool(
    kernel_size: int,
    stride: int | None = None,
    padding: int = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> list[nn.Module]:
    """The module of a call of avg_pool2d, whose arguments stand in another order than the module's."""
    return [nn.AvgPool2d(kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)]


def max_pool(
    kernel_size: int,
    stride: int | None = None,
    padding: int = 0,
    dilation: int = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> list[nn.Module]:
    """The module of a call of max_pool2d, whose arguments stand in another order than the module's."""
    return [nn.MaxPool2d(kernel_size, stride, padding, dilation, return_indices, ceil_mode)]


def mean(dim: tuple[int, ...] = (), keepdim: bool = False) -> list[nn.Module]:
    """The modules of a mean over height and width.

    Raises:
        LookupError: the mean is over something else.
    """
    if isinstance(dim, int) or sorted(d % 4 for d in dim) != [2, 3]:
        raise LookupError("mean")
    return [nn.AdaptiveAvgPool2d(1), *([] if keepdim else [nn.Flatten()])]


AveragePool.calls = {
    "avg_pool2d": average_pool,
    "adaptive_avg_pool2d": lambda output_size: [nn.AdaptiveAvgPool2d(output_size)],
    "mean": mean,
}
MaxPool.calls = {"max_pool2d": max_pool}


class SoftMaximum(nn.Module):
    """A max-pool with logsumexp(beta z) / beta in place of the maximum."""

    def __init__(self, pool: nn.MaxPool2d, beta: float) -> None:
        super().__init__()
        self.pool, self.beta = pool, beta

    def forward(self, x: Tensor) -> Tensor:
        """Pooled (B, C, H', W')."""
        (kernel, kernel_), (stride, stride_), (pad, pad_) = map(
            pair, (self.pool.kernel_size, self.pool.stride, self.pool.padding)
        )
        height, width = self.pool(x[:1, :1].detach()).shape[2:]
        below = max(0, (height - 1) * stride + kernel - x.shape[2] - 2 * pad)  # ceil_mode reaches over the edge
        right = max(0, (width - 1) * stride_ + kernel_ - x.shape[3] - 2 * pad_)
        lowest = torch.finfo(x.dtype).min / (10 * self.beta)  # stays finite times beta
        x = nn.functional.pad(x, (pad_, pad_ + right, pad, pad + below), value=lowest)
        rows, columns = stride * (height - 1) + 1, stride_ * (width - 1) + 1
        windows = [
            x[:, :, i : i + rows : stride, j : j + columns : stride_] for i in range(kernel) for j in range(kernel_)
        ]
        return torch.logsumexp(self.beta * torch.stack(windows), 0) / self.beta


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """(vertical, horizontal) of a size that torch takes as one number where both are the same."""
    return (value, value) if isinstance(value, int) else tuple(value)
