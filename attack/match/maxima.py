"""Known outputs of a max-pool, matched with the entries that may be the largest of their windows.

A soft maximum finds most of the largest entries and sticks with the rest: of a trained ResNet-18's stem 88 % are right,
and pictures end at 30 dB. Known outputs m > 0 of a max-pool say more. No entry of y, what the ReLU in front of the pool
takes in, is above the least m of the windows over it, and some entry of each window is m. Windows that overlap and have
the same m share their largest entry. So of nine entries three may be the largest, on average:

    sum over windows of -2 s^2 log sum_p exp(-(y_p - m)^2 / 2 s^2)  +  sum of max(0, y - least m)^2

with a width s that shrinks from phase to phase. The gradient of the layer below decides between these: delta, known at
the pool's outputs, is handed on to the entries in parts exp(-(y_p - m)^2 / 2 s^2), and the gradient that it then makes
must be the client's. BatchNorm in training mode between layer and pool mixes the batch, so that gradient is taken of
the whole batch, in the client's mode.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from network.chain import Moments, parametrised, substituted, with_moments
from network.kinds import kind_of
from network.kinds.pool import pair
from network.stage import Chain, run

EQUAL = 4.0  # times their expected error up to which two outputs are the same
EXACT = 1e-4  # relative error of known outputs beyond which two of them cannot be told to be the same
ZERO = 8.0  # times its expected error up to which an output is zero
FAINT = 1e-3  # of the gradient's size: no channel's is divided by less
FAR = 1e9  # where there is nothing


@dataclass(frozen=True)
class Maxima:
    """What is known of a max-pool's outputs behind a ReLU and one layer.

    Attributes:
        below: the stages up to the ReLU, in the client's mode.
        fixed: the same, with BatchNorm as an ordinary layer where the moments of its batch are known. Its parameters
            are constants: delta is handed on by its outputs, and is no function of the weights.
        pool: the max-pool.
        known: its outputs (B, C, P); zero where they are zero but for noise.
        delta: the derivative of each image's loss by these, (B, C, 1, P).
        may_be: the entries of each window that may be the largest, (B, C, K, P).
        bound: of each entry of y, (B, C, H, W).
        places: of each window's entries among the H W of y, and H W outside, (B, C, K P).
        gradient: of the layer, an average over images.
    """

    below: Chain
    fixed: Chain
    pool: nn.MaxPool2d
    known: Tensor
    delta: Tensor
    may_be: Tensor
    bound: Tensor
    places: Tensor
    gradient: Tensor

    @classmethod
    def of(
        cls,
        chain: Chain,
        outputs: Tensor,
        delta: Tensor,
        gradients: Mapping[str, Tensor],
        image_shape: tuple[int, ...],
        uncertainty: float,
        moments: Moments,
    ) -> "Maxima | None":
        """Of a chain that ends in a ReLU and a max-pool; None where it is another, or too little is known of it.

        Args:
            chain: from the images to the pool, in the client's mode.
            outputs: of the pool, (B, C, ...).
            delta: derivative of each image's loss by these.
            gradients: of the update, by parameter name.
            image_shape: (C, H, W).
            uncertainty: relative error of the outputs.
            moments: by which BatchNorm in training mode has normalised the client's batch, where they are known.
        """
        layers = list(parametrised(chain))
        sent = gradients.get(f"{layers[0].name}.weight") if len(layers) == 1 else None
        if sent is None or not sent.any() or not uncertainty < EXACT or not _ends_in_a_pool(chain):
            return None
        below, pool = chain[:-2], chain[-1].module
        fixed = substituted(with_moments(below, moments), _constant)
        with torch.no_grad():
            like = run(fixed, outputs.new_zeros(len(outputs), *image_shape))
        error = uncertainty * float(outputs.square().mean().sqrt())
        known = torch.where(outputs > ZERO * error, outputs, 0.0).flatten(2)
        numbers = torch.arange(like[0, 0].numel(), device=like.device).to(like).view(1, 1, *like.shape[2:])
        places = _windows(pool, numbers.expand_as(like), len(numbers.flatten())).round().long()
        each = known[:, :, None].expand(places.shape)
        bound = _least(places, each, like)
        here = (_windows(pool, bound, -FAR) - each).abs() < EQUAL * error
        here = here & (each > 0)
        shared = _summed(places, here.to(like), like)
        shared = torch.where(here, _windows(pool, shared, 0.0), 0.0)
        may_be = here & (shared == shared.amax(2, keepdim=True))
        gradient = sent.to(outputs)
        return cls(below, fixed, pool, known, delta.flatten(2)[:, :, None], may_be, bound, places, gradient)

    def __call__(self, images: Tensor, width: float) -> tuple[Tensor, Tensor]:
        """Squared errors of the outputs relative to these, and of the layer's gradient, as a mean over its channels.

        Args:
            images: (B, C, H, W).
            width: s, relative to the outputs' root mean square.
        """
        y, is_on = run(self.fixed, images), self.may_be.any(2)
        spread = 2 * (width * self.known.square().mean().sqrt()).square()
        off = (_windows(self.pool, y, 0.0) - self.known[:, :, None]).square()
        off = torch.where(self.may_be, off, FAR)
        nearest = torch.where(is_on, -spread * torch.logsumexp(-off / spread, 2), 0.0).sum()
        above = (y - self.bound).clamp(min=0).square().sum()
        parts = torch.softmax(-off / spread, 2) * self.delta * is_on[:, :, None]
        delta = _summed(self.places, parts, y)
        mixed = run(self.below, images)
        weight = next(parametrised(self.below)).module.weight
        mean = (mixed * delta).sum() / len(images)
        (own,) = torch.autograd.grad(mean, weight, create_graph=True)
        sizes = self.gradient.flatten(1).norm(dim=1)
        sizes = torch.maximum(sizes, FAINT * self.gradient.norm())
        apart = (own - self.gradient).flatten(1).square().sum(1) / sizes.square()
        return (nearest + above) / self.known.square().sum(), apart.mean()


def _constant(module: object) -> object:
    """A copy of a module whose parameters have no gradients."""
    return copy.deepcopy(module).requires_grad_(False) if isinstance(module, nn.Module) else module


def _ends_in_a_pool(chain: Chain) -> bool:
    """Whether a ReLU and a max-pool are the last stages, and no other kinks below them."""
    if len(chain) < 3 or not kind_of(chain[-1].module).is_max_pool or not kind_of(chain[-2].module).is_rectifier:
        return False
    return not chain[-1].module.ceil_mode and not any(kind_of(stage.module).has_kink for stage in chain[:-2])


def _windows(pool: nn.MaxPool2d, values: Tensor, outside: float) -> Tensor:
    """The entries of each window, (B, C, K, P), of values (B, C, H, W)."""
    kernel, stride, padding, dilation = map(pair, (pool.kernel_size, pool.stride, pool.padding, pool.dilation))
    padded = functional.pad(values.flatten(0, 1)[:, None], (padding[1],) * 2 + (padding[0],) * 2, value=outside)
    windows = functional.unfold(padded, kernel, dilation=dilation, stride=stride)
    return windows.unflatten(0, values.shape[:2])


def _least(places: Tensor, each: Tensor, like: Tensor) -> Tensor:
    """For each entry (B, C, H, W) the least of these numbers (B, C, K, P) of the windows over it."""
    found = like.new_full((*like.shape[:2], like[0, 0].numel() + 1), FAR)
    found = found.scatter_reduce(2, places.flatten(2), each.flatten(2), "amin")
    return found[..., :-1].view_as(like)


def _summed(places: Tensor, each: Tensor, like: Tensor) -> Tensor:
    """For each entry (B, C, H, W) the sum of these numbers (B, C, K, P) of the windows over it."""
    found = like.new_zeros((*like.shape[:2], like[0, 0].numel() + 1))
    return found.scatter_add(2, places.flatten(2), each.flatten(2))[..., :-1].view_as(like)
