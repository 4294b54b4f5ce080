"""From free variables to pixels: the box that keeps images in [0, 1], and the spectral scaling that L-BFGS starts from.

The optimiser moves z (B, C, H, W). The image is  x = box(scale(z)):

- scale: z holds DCT coefficients on opponent-colour axes, each multiplied by a fixed gain that falls with frequency
  f as 1 / (1 + f)^p. Natural images have amplitude spectra near 1/f, so with p = 1 all coefficients vary by about as
  much. The first guess of L-BFGS at the Hessian, a multiple of the identity, is then a good guess: coarse shapes move
  first, fine detail last. p = 0 leaves the pixels themselves free.
- box: `sigmoid` is smooth and cannot leave (0, 1); `clamp` projects z back after every step; `none` does nothing.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attack.local.levels import LEVELS
from priors import opponent_basis, rotate_colours

BOXES = ("sigmoid", "clamp", "none")

# Least distance from black and white at which the sigmoid is inverted: half a grey level of an 8-bit image.
HALF_LEVEL = 0.5 / LEVELS


def dct_matrix(n: int, *, dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu") -> Tensor:
    """The orthonormal DCT-II matrix (n, n), row k the k-th cosine."""
    k = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi * k[:, None] * (k[None, :] + 0.5) / n) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix.to(device, dtype)


@dataclass(frozen=True)
class PixelMap:
    """The map z -> x and its inverse, for images of one shape.

    Args:
        shape: (C, H, W) of one image.
        box: one of `BOXES`.
        spectral_power: p above; 0 switches the spectral scaling off.
        chroma_gain: further gain on the chroma axes, below 1 because chroma varies less than luma.

    Raises:
        ValueError: unknown box, or a gain that is not positive.
    """

    shape: tuple[int, int, int]
    box: str = "sigmoid"
    spectral_power: float = 0.0
    chroma_gain: float = 1.0
    dtype: torch.dtype = torch.float32
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        if self.box not in BOXES:
            raise ValueError(f"unknown box {self.box!r}: choose one of {', '.join(BOXES)}")
        if not self.chroma_gain > 0:
            raise ValueError(f"chroma_gain must be positive, got {self.chroma_gain}")
        channels, height, width = self.shape
        place = {"dtype": self.dtype, "device": self.device}
        frequency = torch.hypot(torch.arange(float(height))[:, None], torch.arange(float(width))[None, :])  # (H, W)
        gain = (1 + frequency).pow(-self.spectral_power)
        gain = gain / gain.square().mean().sqrt()  # unit mean power: z and scale(z) have the same typical size
        colour = torch.tensor([1.0] + [self.chroma_gain] * (channels - 1))
        object.__setattr__(self, "_gain", (colour[:, None, None] * gain).to(self.device, self.dtype))  # (C, H, W)
        object.__setattr__(self, "_axes", opponent_basis(channels, **place))
        object.__setattr__(self, "_rows", dct_matrix(height, **place))
        object.__setattr__(self, "_columns", dct_matrix(width, **place))

    @property
    def _is_spectral(self) -> bool:
        return self.spectral_power != 0 or self.chroma_gain != 1

    def decode(self, z: Tensor) -> Tensor:
        """Images x (B, C, H, W) of the free variables z (B, C, H, W). Differentiable."""
        u = z
        if self._is_spectral:
            u = rotate_colours(self._rows.T @ (self._gain * z) @ self._columns, self._axes.T)
        return torch.sigmoid(u) if self.box == "sigmoid" else u

    def encode(self, x: Tensor, edge: float = HALF_LEVEL) -> Tensor:
        """Free variables z (B, C, H, W) of images x: the inverse of `decode`.

        Under the sigmoid box, x is first moved inside [edge, 1 - edge].
        """
        u = torch.logit(x, eps=edge) if self.box == "sigmoid" else x
        if self._is_spectral:
            u = self._rows @ rotate_colours(u, self._axes) @ self._columns.T / self._gain
        return u.contiguous()

    @torch.no_grad()
    def project_(self, z: Tensor) -> None:
        """Project z, in place, such that its images lie in [0, 1]; only the `clamp` box needs the projection."""
        if self.box == "clamp":
            z.copy_(self.encode(self.decode(z).clamp(0, 1)))
