"""Strided convolutions of few channels, with their derivative by the input as a convolution of stride 1.

For y = W * x with stride s the derivative by x scatters W^T delta over every s-th pixel. Pixels whose places agree
modulo s have taps of W of their own. So x may be taken as s^2 C channels on a grid s times as coarse, and W is cut up
in the same way:

    dL/dx = shuffle(flip(W_s)^T * delta),    W_s (c_out, s^2 C, k/s, k/s), k rounded up to a multiple of s.

This is a plain convolution without a scatter, and libraries for CPUs have a fast kernel for it. Their kernel for the
scatter is made for blocks of 16 channels. For images, or LeNet's 12 channels, the scatter takes about twice as long as
the plain convolution. From 32 channels on the plain convolution takes two to four times as long as the scatter. torch's
own shuffle moves entry by entry. Where s = 2, pairs of neighbours in a row are moved as one complex number instead, in
two fifths of the time.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from network.chain import substituted
from network.kinds.affine import AFFINE
from network.stage import Chain, Stage

FEW = 16  # channels from which on the library's own derivative is as fast
PAIR = 2


class _Convolution(torch.autograd.Function):
    """The convolution of images x; its weights have no derivative."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, layer: nn.Conv2d, transposed: Tensor) -> Tensor:
        """(B, c_out, H', W') of x (B, C, H, W)."""
        ctx.layer, ctx.transposed, ctx.size = layer, transposed, x.shape[-2:]
        return layer(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, delta: Tensor) -> tuple[Tensor, None, None]:
        """The derivative by x."""
        (stride, _), transposed = ctx.layer.stride, ctx.transposed
        sides = zip(ctx.size, delta.shape[-2:], transposed.shape[-2:], ctx.layer.padding, strict=True)
        skipped, reach, starts = zip(*(_of_the_coarse_grid(stride, *side) for side in sides), strict=True)
        coarse = functional.conv2d(delta, transposed, padding=[k - s for k, s in zip(reach, skipped, strict=True)])
        fine = _in_pairs(coarse) if stride == PAIR else functional.pixel_shuffle(coarse, stride)
        for dim, (start, size) in enumerate(zip(starts, ctx.size, strict=True), 2):
            fine = fine.narrow(dim, start, min(size, fine.shape[dim] - start))
        below, right = (size - side for size, side in zip(ctx.size, fine.shape[-2:], strict=True))
        if below or right:  # pixels that no patch reaches
            fine = functional.pad(fine, (0, right, 0, below))
        return fine, None, None


def _in_pairs(coarse: Tensor) -> Tensor:
    """functional.pixel_shuffle by 2: (B, C, 2 H, 2 W) of (B, 4 C, H, W), for single and double precision."""
    batch, channels, height, width = coarse.shape
    parts = coarse.reshape(batch, channels // PAIR**2, PAIR, PAIR, height, width)
    fine = coarse.new_empty(batch, channels // PAIR**2, height, PAIR, width, dtype=coarse.dtype.to_complex())
    for row in range(PAIR):
        torch.complex(parts[:, :, row, 0], parts[:, :, row, 1], out=fine[:, :, :, row])
    return torch.view_as_real(fine).view(batch, -1, PAIR * height, PAIR * width)


def _of_the_coarse_grid(stride: int, size: int, positions: int, taps: int, padding: int) -> tuple[int, int, int]:
    """Along one side: the padding to skip at both ends, how far delta reaches, and where x begins."""
    reach = taps - 1
    surplus = (positions + reach) * stride - padding - size  # beyond the end of x
    skipped = max(0, min(padding // stride, surplus // stride, reach))
    return skipped, reach, padding - stride * skipped


class Strided(nn.Module):
    """A strided convolution whose derivative by its input is a plain convolution. It is differentiable once only."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer, (stride, _) = layer, layer.stride
        down, right = (-side % stride for side in layer.kernel_size)
        cut = functional.pixel_unshuffle(functional.pad(layer.weight.detach(), (0, right, 0, down)), stride)
        self.register_buffer("transposed", cut.flip(2, 3).transpose(0, 1).contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_out, H', W') of x (B, C, H, W)."""
        return _Convolution.apply(x, self.layer, self.transposed)


def quickened(chain: Chain) -> list[Stage]:
    """The chain with `Strided` in place of each convolution that gains by it; its weights then have no derivatives."""
    return substituted(chain, lambda module: Strided(module) if _is_slow(module) else module)


def _is_slow(module: object) -> bool:
    if type(module) is not nn.Conv2d or AFFINE.why_not(module) or module.weight.device.type != "cpu":
        return False
    if module.groups != 1:
        return False
    strides = set(module.stride)
    return set(module.dilation) == {1} and len(strides) == 1 and strides != {1} and module.in_channels < FEW
