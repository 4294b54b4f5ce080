"""The spaces of a gradient that is a sum over tokens,  G = sum_t delta_t x_t^T, of a rank that is known beforehand.

Where there are fewer tokens than either side of G, its row space holds every x_t and its column space every delta_t.
Rows and columns are scaled first, so that noise is of one size in all entries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attack.solve.rounding import precision_of

# Units of rounding by which tokens of the client's own arithmetic differ from exact ones: 4 to 8 in ConvNeXt's blocks.
ROUNDED = 10.0
TINY = 1e-12  # of the largest column, which bounds the others from below


@dataclass(frozen=True)
class TokenSpan:
    """A gradient's leading singular vectors.

    Attributes:
        rows, columns: (m,) and (n,) by which the gradient was divided.
        left, values, right: (m, r), (r,), (n, r).
        noise: the standard deviation of an entry's noise, in the scaled gradient.
        precision: relative rounding error of the gradient's numbers.
        gap: by how much the last value stands out from the next.
    """

    rows: Tensor
    columns: Tensor
    left: Tensor
    values: Tensor
    right: Tensor
    noise: float
    precision: float
    gap: float

    @classmethod
    def of(cls, gradient: Tensor, rank: int) -> "TokenSpan":
        """That of a gradient (m, n) of this rank.

        Raises:
            ValueError: the rank leaves nothing over, or the gradient has zeros only.
        """
        matrix = gradient.detach().double()
        lengths = matrix.norm(dim=1)
        matrix, rows = matrix[lengths > 0], lengths[lengths > 0]
        if not rank < min(matrix.shape):
            raise ValueError(f"{rank} tokens fill the gradient of {' x '.join(map(str, gradient.shape))}")
        columns = (matrix / rows[:, None]).norm(dim=0) / len(matrix) ** 0.5
        columns = columns.clamp(min=TINY * float(columns.max()))
        left, values, right = torch.linalg.svd(matrix / rows[:, None] / columns, full_matrices=False)
        beyond = values[rank:]
        free = (matrix.shape[0] - rank) * (matrix.shape[1] - rank)
        floor = torch.finfo(torch.float64).eps * float(values[0])
        noise = max(float(beyond.norm()) / free**0.5, floor)
        gap = float(values[rank - 1] / beyond[0].clamp(min=floor))
        scale = torch.full_like(lengths, torch.inf)  # a row of zeros tells of no delta
        scale[lengths > 0] = rows
        full = matrix.new_zeros(len(lengths), rank)
        full[lengths > 0] = left[:, :rank]
        return cls(scale, columns, full, values[:rank], right[:rank].T, noise, precision_of(gradient), gap)

    @property
    def spare(self) -> int:
        """Dimensions outside the row space."""
        return len(self.columns) - len(self.values)

    def outside(self, x: Tensor) -> Tensor:
        """What of scaled tokens x (..., n) lies outside the row space."""
        scaled = x / self.columns.to(x)
        right = self.right.to(x)
        return scaled - (scaled @ right) @ right.T

    def error(self, x: Tensor) -> Tensor:
        """The expected size (...) of an entry of `outside` at true tokens x (..., n), by noise and by arithmetic."""
        scaled = x / self.columns
        turned = self.noise * ((scaled @ self.right) / self.values).norm(dim=-1)
        return torch.hypot(turned, ROUNDED * self.precision * scaled.norm(dim=-1) / len(self.columns) ** 0.5)

    def functional(self, deltas: Tensor) -> Tensor:
        """The w (n,) with w x = x^T G^+ delta, of a delta (m,)."""
        return self.right @ (self.left.T @ (deltas / self.rows) / self.values) / self.columns
