"""The linear equations that a layer's own input u (B, ...) obeys, as operators with forward and adjoint.

With delta (B, ...) the derivative of each image's own loss by the layer's output, known for every image:

    gradient rows   sum_i corr(delta_i, u_i) = B G
    forward rows    W * u + b = z                    wherever z is known
    known rows      u = value                        wherever it is known
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attack.solve.cgls import Operator, Stacked
from attack.walk.trajectory import MovingMap
from network.kinds.affine import LinearMap

# Equations for each unknown from which a layer is expected to be determined, and a block is tried as a whole: on a
# small net 1.11 are enough, 1.03 are not.
ENOUGH = 1.05

# Cholesky of the scaling takes a third of the cube of this many unknowns a channel: 4096 are a second or two.
DENSE = 4096
RIDGE = 1e-13  # of the mean diagonal: what cannot be told apart must not stop the factorisation


@dataclass(frozen=True)
class GradientRows:
    """u -> sum_i corr(delta_i, u_i)."""

    map: LinearMap | MovingMap
    delta: Tensor

    def forward(self, u: Tensor) -> Tensor:
        """Of the weight's shape."""
        return self.map.weights(u, self.delta)

    def adjoint(self, y: Tensor) -> Tensor:
        """Of the input's shape."""
        return self.map.inputs(self.delta, y)

    def float(self) -> "GradientRows":
        """The same in float32."""
        return GradientRows(self.map.float(), self.delta.float())


@dataclass(frozen=True)
class ForwardRows:
    """u -> W * u, where it is known what comes out."""

    map: LinearMap | MovingMap
    known: Tensor

    def forward(self, u: Tensor) -> Tensor:
        """Zero where nothing is known."""
        return self.known * self.map.outputs(u)

    def adjoint(self, y: Tensor) -> Tensor:
        """Of the input's shape."""
        return self.map.inputs(self.known * y)

    def float(self) -> "ForwardRows":
        """The same in float32."""
        return ForwardRows(self.map.float(), self.known)


@dataclass(frozen=True)
class KnownRows:
    """u -> u where it is known."""

    known: Tensor

    def forward(self, u: Tensor) -> Tensor:
        """Zero where nothing is known."""
        return self.known * u

    def adjoint(self, y: Tensor) -> Tensor:
        """The same."""
        return self.known * y

    def float(self) -> "KnownRows":
        """Itself: nothing in it is rounded."""
        return self


@dataclass(frozen=True)
class Rows:
    """Equations operator(u) = target; each row times `weight`, one over the noise of its target, counts alike."""

    operator: GradientRows | ForwardRows | KnownRows
    target: Tensor
    weight: Tensor  # broadcasts to the target

    @property
    def count(self) -> int:
        """Equations that say anything."""
        if isinstance(self.operator, GradientRows):
            return int((self.weight != 0).expand_as(self.target).sum())
        return int(self.operator.known.sum())

    def residual(self, u: Tensor) -> Tensor:
        """target - operator(u), weighted."""
        return self.weight * (self.target - self.operator.forward(u))

    def float(self) -> "Rows":
        """The same in float32."""
        return Rows(self.operator.float(), self.target.float(), self.weight.float())


def stack(rows: list[Rows]) -> tuple[Operator, Tensor]:
    """All rows as one operator, and their targets as one vector."""
    operator = Stacked([r.operator for r in rows], [r.weight for r in rows], [r.target.shape for r in rows])
    return operator, torch.cat([(r.weight * r.target).flatten() for r in rows])


@dataclass(frozen=True)
class Scaling:
    """u = F^-T v for every channel alike: with it, gradient rows that determine u have unit singular values.

    Args:
        factor: Cholesky factor F (n, n), n = B * positions, of the rows' normal matrix as far as it is shared by all
            channels; or its diagonal (n,) where n is too large.
    """

    factor: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """F^-T x."""
        return self._solve(x, transposed=True)

    def adjoint(self, y: Tensor) -> Tensor:
        """F^-1 y."""
        return self._solve(y, transposed=False)

    def undone(self, u: Tensor) -> Tensor:
        """F^T u, from which `forward` makes u."""
        flat = _by_place(u)
        return _placed(self.factor[:, None] * flat if self.factor.dim() == 1 else self.factor.T @ flat, u)

    def _solve(self, x: Tensor, transposed: bool) -> Tensor:
        flat = _by_place(x)
        if self.factor.dim() == 1:
            flat = flat / self.factor[:, None]
        else:
            factor = self.factor.T if transposed else self.factor
            flat = torch.linalg.solve_triangular(factor, flat, upper=transposed)
        return _placed(flat, x)

    def float(self) -> "Scaling":
        """The same in float32."""
        return Scaling(self.factor.float())

    def spread(self, shape: torch.Size) -> Tensor:
        """Standard deviation of u for unit noise in every row, (B, 1) or (B, 1, H, W): the same for all channels."""
        if self.factor.dim() == 1:
            deviation = 1 / self.factor
        else:
            unit = torch.eye(len(self.factor), dtype=self.factor.dtype, device=self.factor.device)
            deviation = torch.linalg.solve_triangular(self.factor, unit, upper=False).norm(dim=0)
        return deviation.view(shape[0], 1, *shape[2:])

    @classmethod
    def of(cls, rows: list[Rows], shape: torch.Size) -> "Scaling":
        """For unknowns u of that shape, (B, d) or (B, C, H, W).

        Raises:
            ArithmeticError: numbers that are not finite.
        """
        positions = math.prod(shape[2:])
        size = shape[0] * positions
        like = rows[0].target
        diagonal = like.new_zeros(size)
        normal = like.new_zeros(size, size) if size <= DENSE else None
        for r in rows:
            if isinstance(r.operator, GradientRows):
                # a row's weight is that of its output channel: the kernel's weights are met alike
                weights = r.weight.flatten(1).mean(1)
                matrix = (weights[:, None, None] * r.operator.map.shifted(r.operator.delta)).flatten(0, 1)
                if normal is None:
                    diagonal += matrix.square().sum(0)
                else:
                    normal += matrix.T @ matrix
            else:
                squares = _squared(r.operator).adjoint(r.weight.square().expand_as(r.target))
                diagonal += squares.mean(1).flatten()
        if normal is None:
            return cls((diagonal + RIDGE * diagonal.mean()).sqrt())
        normal.diagonal().add_(diagonal)
        ridge = RIDGE * normal.diagonal().mean()
        if not ridge.isfinite():
            raise ArithmeticError("the equations hold numbers that are not finite")
        if not ridge:  # masks that set everything to zero leave no equations to scale
            return cls(torch.ones_like(diagonal))
        while True:  # rounding may leave eigenvalues below zero
            factor, failed = torch.linalg.cholesky_ex(normal)
            if not failed:
                return cls(factor)
            normal.diagonal().add_(ridge)
            ridge *= 10


def _by_place(x: Tensor) -> Tensor:
    """(B, d) or (B, C, H, W) as (n, channels), n = B * positions."""
    return x.transpose(0, 1).flatten(1).T if x.dim() == 4 else x


def _placed(flat: Tensor, like: Tensor) -> Tensor:
    """The other way round."""
    return flat.T.unflatten(1, (len(like), *like.shape[2:])).transpose(0, 1) if like.dim() == 4 else flat


def _squared(operator: ForwardRows | KnownRows) -> Operator:
    """The operator whose adjoint sums the squares of the columns: weights squared."""
    if isinstance(operator, KnownRows):
        return operator
    return ForwardRows(operator.map.squared(), operator.known)
