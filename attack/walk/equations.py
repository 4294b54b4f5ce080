"""The linear equations that a layer's own input u (B, ...) obeys, as operators with forward and adjoint.

With delta (B, ...) the derivative of each image's own loss by the layer's output, known for every image:

    gradient rows   sum_i corr(delta_i, u_i) = B G
    forward rows    W * u + b = z                    wherever z is known
    known rows      u = value                        wherever it is known

Behind a gate whose outputs are not known, delta depends on what the layer puts out, and so on u: `GatedGradientRows`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attack.solve.cgls import Operator, Stacked
from attack.walk.trajectory import MovingMap
from network.chain import in_float32
from network.kinds.affine import LinearMap
from network.stage import Chain, run

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
class GatedGradientRows(GradientRows):
    """u -> sum_i corr(delta_i(u), u_i), where stages behind the layer make delta of what it puts out: not linear.

    Attributes:
        delta: (B, ...) of the outputs of these stages.
        bias: (c_out,).
        behind: the stages.
    """

    bias: Tensor
    behind: Chain

    def delta_at(self, u: Tensor) -> Tensor:
        """delta of the layer's output at u, differentiable by u where a graph of it is kept."""
        with torch.enable_grad():
            z = self.map.outputs(u) + self.bias.view(-1, *(1,) * (self.delta.dim() - 2))
            is_followed = z.requires_grad
            z = z if is_followed else z.requires_grad_()
            return torch.autograd.grad(run(self.behind, z), z, self.delta, create_graph=is_followed)[0]

    def forward(self, u: Tensor) -> Tensor:
        """Of the weight's shape."""
        return self.map.weights(u, self.delta_at(u))

    def float(self) -> "GatedGradientRows":
        """The same in float32."""
        return GatedGradientRows(self.map.float(), self.delta.float(), self.bias.float(), in_float32(self.behind))


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
            heard = int((self.weight.flatten(1)[:, 0] != 0).sum())
            return heard * self.target.shape[1] * self.operator.map.taps
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

    Where a layer is a grouped convolution, the channels of each group have a scaling of their own.

    Args:
        factor: Cholesky factors F (groups, n, n), n = B * positions, of the rows' normal matrix as far as it is shared
            by all channels of a group; or their diagonals (groups, n) where these are too large.
    """

    factor: Tensor

    @property
    def is_diagonal(self) -> bool:
        """Whether the factors are diagonals."""
        return self.factor.dim() == 2

    def forward(self, x: Tensor) -> Tensor:
        """F^-T x."""
        return self._solve(x, transposed=True)

    def adjoint(self, y: Tensor) -> Tensor:
        """F^-1 y."""
        return self._solve(y, transposed=False)

    def undone(self, u: Tensor) -> Tensor:
        """F^T u, from which `forward` makes u."""
        flat = _by_place(u, len(self.factor))
        return _placed(self.factor[:, :, None] * flat if self.is_diagonal else self.factor.mT @ flat, u)

    def _solve(self, x: Tensor, transposed: bool) -> Tensor:
        flat = _by_place(x, len(self.factor))
        if self.is_diagonal:
            flat = flat / self.factor[:, :, None]
        else:
            factor = self.factor.mT if transposed else self.factor
            flat = torch.linalg.solve_triangular(factor, flat, upper=transposed)
        return _placed(flat, x)

    def float(self) -> "Scaling":
        """The same in float32."""
        return Scaling(self.factor.float())

    def spread(self, shape: torch.Size) -> Tensor:
        """Standard deviation of u for unit noise in every row, (B, 1, ...), or (B, C, ...) where channels differ."""
        if self.is_diagonal:
            deviation = 1 / self.factor
        else:
            unit = torch.eye(self.factor.shape[1], dtype=self.factor.dtype, device=self.factor.device)
            deviation = torch.linalg.solve_triangular(self.factor, unit, upper=False).norm(dim=1)
        if len(deviation) > 1:
            deviation = deviation.repeat_interleave(shape[1] // len(deviation), 0)
        return deviation.view(-1, shape[0], *shape[2:]).transpose(0, 1)

    @classmethod
    def of(cls, rows: list[Rows], shape: torch.Size) -> "Scaling":
        """For unknowns u of that shape, (B, d) or (B, C, H, W).

        Raises:
            ArithmeticError: numbers that are not finite.
        """
        groups, size, like = math.lcm(*map(_groups, rows)), shape[0] * math.prod(shape[2:]), rows[0].target
        diagonal = like.new_zeros(groups, size)
        normal = like.new_zeros(groups, size, size) if groups * size**2 <= DENSE**2 else None
        for r in rows:
            if isinstance(r.operator, GradientRows):
                # a row's weight is that of its output channel: the kernel's weights are met alike
                weights, each = r.weight.flatten(1).mean(1), groups // _groups(r)
                matrix = (weights[:, None, None] * r.operator.map.shifted(r.operator.delta)).flatten(0, 1)
                matrix = matrix.unflatten(0, (_groups(r), -1))
                if normal is None:
                    diagonal += matrix.square().sum(1).repeat_interleave(each, 0)
                else:
                    normal += (matrix.mT @ matrix).repeat_interleave(each, 0)
            elif normal is not None and _is_of_single_channels(r.operator):
                normal += _normal_of(r, shape)
            else:
                squares = _squared(r.operator).adjoint(r.weight.square().expand_as(r.target))
                diagonal += _by_place(squares, groups).mean(2)
        mean = (diagonal if normal is None else normal.diagonal(dim1=1, dim2=2) + diagonal).mean(1, keepdim=True)
        if not mean.isfinite().all():
            raise ArithmeticError("the equations hold numbers that are not finite")
        ridge = torch.where(mean > 0, RIDGE * mean, 1.0)  # masks that set everything to zero leave nothing to scale
        if normal is None:
            return cls((diagonal + ridge).sqrt())
        normal.diagonal(dim1=1, dim2=2).add_(diagonal)
        while True:  # rounding may leave eigenvalues below zero
            factor, failed = torch.linalg.cholesky_ex(normal)
            if not failed.any():
                return cls(factor)
            normal.diagonal(dim1=1, dim2=2).add_(ridge * (failed > 0)[:, None])
            ridge = ridge * 10


def _groups(rows: Rows) -> int:
    """Groups of channels that the rows treat alike."""
    return 1 if isinstance(rows.operator, KnownRows) else rows.operator.map.groups


def _is_of_single_channels(operator: "ForwardRows | KnownRows") -> bool:
    """Whether each output sees one channel of the input alone, as in a depthwise convolution."""
    is_moving = isinstance(operator, KnownRows) or isinstance(operator.map, MovingMap)
    return not is_moving and operator.map.groups > 1 and operator.map.weight.shape[1] == 1


def _normal_of(rows: Rows, shape: torch.Size) -> Tensor:
    """The normal matrices (C, n, n) of forward rows whose outputs see one channel each of inputs (B, C, H, W)."""
    linear, places = rows.operator.map, math.prod(shape[2:])
    kernel = linear.weight.shape[2:]
    units = torch.eye(places, dtype=linear.weight.dtype, device=linear.weight.device).view(-1, 1, *shape[2:])
    taps = torch.eye(kernel.numel(), dtype=units.dtype, device=units.device).view(-1, 1, *kernel)
    met = linear.of_one_channel(taps).outputs(units).flatten(2)  # (H W, k^2, P)
    seen = torch.einsum("ot,htp->oph", linear.weight.flatten(1), met)  # (c_out, P, H W)
    blocks = []
    for weight in rows.weight.expand_as(rows.target).flatten(2):  # of each image, (c_out, P)
        own = weight[..., None] * seen
        blocks.append((own.mT @ own).unflatten(0, (shape[1], -1)).sum(1))
    normal = units.new_zeros(shape[1], len(blocks), places, len(blocks), places)
    for image, block in enumerate(blocks):
        normal[:, image, :, image] = block
    return normal.view(shape[1], len(blocks) * places, -1)


def _by_place(x: Tensor, groups: int) -> Tensor:
    """(B, d) or (B, C, H, W) as (groups, n, channels of a group), n = B * positions."""
    return x.transpose(0, 1).flatten(1).unflatten(0, (groups, -1)).mT


def _placed(flat: Tensor, like: Tensor) -> Tensor:
    """The other way round."""
    return flat.mT.flatten(0, 1).unflatten(1, (len(like), *like.shape[2:])).transpose(0, 1)


def _squared(operator: ForwardRows | KnownRows) -> Operator:
    """The operator whose adjoint sums the squares of the columns: weights squared."""
    if isinstance(operator, KnownRows):
        return operator
    return ForwardRows(operator.map.squared(), operator.known)
