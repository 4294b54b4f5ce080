"""The linear space of a layer's inputs, from that layer's averaged gradient alone.

A fully connected or convolutional layer z_p = W patch_p(a) + b with positions p = 1..P (one position and patch_1(a) = a
where it is fully connected) leaves

    G = (1/B) sum_i sum_p delta_ip patch_p(a_i)^T   (c_out, c_in k^2)

in the update. If B P <= c_out and B P < c_in k^2, G has rank B P and its row space R holds every patch of every image.
The inputs all of whose patches lie in R form a linear space A. It holds a_1 .. a_B, and where patches overlap, or there
is one position, hardly anything else: dim A = B. Neither labels nor the rest of the network are needed.

A is found as follows. With E: input -> patches, E^T its adjoint, D = E^T E (how many patches an entry lies in) and R's
orthonormal rows, the operator

    T = D^(-1/2) E^T (R^T R) E D^(-1/2)

has eigenvalues in [0, 1], and 1 exactly for D^(1/2) a with a in A. T is never formed: a block of inputs is cut into
patches, projected, and put together again, and a Chebyshev filter (Zhou, Saad, Tiago, Chelikowsky 2006) amplifies what
has eigenvalue 1. The square root of 1 - eigenvalue is the share of the patches that lies outside R, an angle: 1e-7 for
inputs of a float32 update, 0.1 and more for everything else. The ratio of the two is the gap that certifies dim A.

Right below BatchNorm in training mode the errors delta of a channel sum to zero over the batch. G has rank B P - 1, and
R holds the differences of patches alone. What is consistent then are the inputs whose patches, less the input's own
mean patch, lie in R. Outside R all patches of all images have the same part: the direction of that part is `ones`, up
to its length and sign.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attack.solve.eigen import leading_eigenvectors
from attack.solve.rounding import precision_of
from network.kinds.affine import Geometry, is_spanned

GUARD = 6  # vectors iterated beyond the B that are expected: they show the gap, and speed the others up
CLEAR = 5.0  # a gap below this certifies nothing: noise has closed it
INSIDE = 0.25  # an input with a larger share of its patches outside R is not in A, whatever the gap
# An m x n matrix of rank r tells the noise of each row if (m - r)^2 > m + r (Ledermann 1937), well if by this factor.
IDENTIFIED = 4.0
REWEIGHT = 2  # times that the rows' noise is measured and the rows are weighted by it
EDGE = 1.3  # the largest singular value of noise over sqrt(c_out) + sqrt(n) times its deviation, at most


@dataclass(frozen=True)
class Span:
    """What a layer's gradient says of its inputs: rows G = left diag(sigma) right and the space A.

    Attributes:
        geometry: of the layer.
        batch_size: B.
        rows: (c_out,), the diagonal that G was multiplied by, see `row_precision`.
        left: U (c_out, r); sigma: (r,); right: R (r, c_in k^2), of the weighted gradient.
        noise: standard deviation of the noise in the entries of the weighted gradient.
        basis: (dim A, entries of an input), orthonormal rows; empty where G does not determine A.
        outside: (dim A,), the share of each basis vector's patches outside R, an angle.
        gap: the angle of the first vector that is not in A over the largest in it; inf where nothing else exists.
        spanned: what R holds is all patches and not everything, see `is_spanned`.
        precision: relative rounding error of the gradient's numbers.
        ones: (c_in k^2,), the vector with patch_p(a_i)^T ones = 1 for all images and positions; None without bias. Of a
            centred span it is that number for all, which is not known.
        centred: whether R holds differences of patches only, as below BatchNorm in training mode.
    """

    geometry: Geometry
    batch_size: int
    rows: Tensor
    left: Tensor
    sigma: Tensor
    right: Tensor
    noise: float
    basis: Tensor
    outside: Tensor
    gap: float
    spanned: bool
    precision: float
    ones: Tensor | None = None
    centred: bool = False

    @property
    def rank(self) -> int:
        """Numerical rank of the gradient, B P at most where `spanned`."""
        return len(self.sigma)

    @property
    def dimension(self) -> int:
        """dim A; B where every image left its trace and nothing but images is consistent."""
        return len(self.basis)

    @property
    def determined(self) -> bool:
        """Whether A is certified and holds nothing but mixtures of the batch's inputs."""
        return self.spanned and 0 < self.dimension <= self.batch_size and self.gap > CLEAR

    @property
    def noise_share(self) -> float:
        """The noise in all entries of the weighted gradient, as a share of what stands out from it."""
        entries = len(self.rows) * int(self.right.any(0).sum())
        return self.noise * entries**0.5 / float(self.sigma.norm()) if self.rank else math.inf

    def inputs(self, coordinates: Tensor) -> Tensor:
        """Coordinates (N, dim A) -> inputs (N, *input_shape)."""
        return (coordinates @ self.basis).view(-1, *self.geometry.input_shape)

    def with_ones(self, bias_gradient: Tensor) -> "Span":
        """The span with the vector `ones` that G maps to this (c_out,) gradient of the bias."""
        if not self.rank:
            return self
        across = self.left.T @ (self.rows * bias_gradient.detach().to(self.rows).flatten())
        return replace(self, ones=self.right.T @ (across / self.sigma))

    def weak(self, v: Tensor) -> Tensor:
        """|S^-1 v| of patches or deltas (..., P r) in the gradient's singular vectors."""
        return (v.unflatten(-1, (-1, self.rank)) / self.sigma).flatten(-2).norm(dim=-1)

    def turned(self, x: Tensor) -> Tensor:
        """Relative error of inputs with x (..., P r) by noise that turns the span."""
        return self.noise * self.right.shape[1] ** 0.5 * self.weak(x) / x.norm(dim=-1)


def span_of(
    gradient: Tensor,
    geometry: Geometry,
    batch_size: int,
    bias_gradient: Tensor | None = None,
    *,
    saturating: bool = False,
    centred: bool = False,
    floor: Tensor | None = None,
) -> Span:
    """The space of a layer's inputs from its averaged gradient, in float64 on the gradient's device.

    Args:
        gradient: G (c_out, c_in k^2), or as the layer's weight is shaped.
        geometry: of the layer.
        batch_size: B.
        bias_gradient: (c_out,) averaged gradient of whatever is added to the layer's output, (1/B) sum_ip delta_ip.
            A BatchNorm in eval mode behind a convolution without bias gives it too: its bias's gradient times its
            weight / sqrt(running variance + eps).
        saturating: the layer's outputs go through a sigmoid or tanh. Its slope y (1 - y) is rounded by as much where
            it is 1e-5 as where it is 1/4, so rows of saturated outputs are no more exact than the strongest row, and
            get no more weight. (The deltas they hold are wrong, not the span: only the tail's equations see it.)
        centred: whether BatchNorm in training mode follows right behind the layer.
        floor: (c_out,) error of each row that is known beforehand: the rounding of weights whose difference it is.

    Raises:
        ValueError: shapes that do not fit together, or numbers that are not finite.
    """
    matrix = _checked(gradient, geometry, bias_gradient)
    eps, seen = precision_of(gradient), geometry.seen(matrix)
    spanned = is_spanned(batch_size, geometry.positions, len(matrix), int(seen.sum()))
    most = batch_size * geometry.positions - centred
    rows, left, sigma, right, noise = _decomposed(matrix, geometry, most, eps, saturating=saturating, floor=floor)
    basis, outside, gap = _no_inputs(right, geometry)
    if spanned and not (centred and geometry.positions == 1):  # of a single patch the mean is all there is
        basis, outside, gap = consistent_inputs(right, geometry, batch_size, centred=centred)
    ones = _common(basis, right, geometry) if centred else None
    span = Span(geometry, batch_size, rows, left, sigma, right, noise, basis, outside, gap, spanned, eps, ones, centred)
    return span if bias_gradient is None or centred else span.with_ones(bias_gradient)


def row_space(gradient: Tensor, geometry: Geometry, batch_size: int) -> Tensor:
    """R alone, (r, c_in k^2), orthonormal: all patches of a layer that is spanned."""
    matrix = _checked(gradient, geometry, None)
    return _decomposed(matrix, geometry, batch_size * geometry.positions, precision_of(gradient))[3]


def _decomposed(
    matrix: Tensor,
    geometry: Geometry,
    most: int,
    eps: float,
    *,
    saturating: bool = False,
    floor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Rows' weights, U, sigma, R and noise of a gradient (c_out, c_in k^2) of rank `most` at most, see `Span`."""
    seen, bound = geometry.seen(matrix), geometry.bound(matrix)
    width = int(seen.sum())
    outer, inner = torch.linalg.qr(matrix[:, seen].T)  # one tall decomposition; the rest is c_out x c_out
    rows = row_precision(inner.T, min(most, bound - 1), eps, saturating=saturating, floor=floor)
    left, sigma, right = torch.linalg.svd(rows[:, None] * inner.T, full_matrices=False)
    noise = _noise_beyond(sigma, min(most, bound), rows * matrix.norm(dim=1), width, eps)
    rank = int((sigma[: min(most, bound)] > EDGE * noise * (len(matrix) ** 0.5 + width**0.5)).sum())
    left, sigma = left[:, :rank], sigma[:rank]
    right = matrix.new_zeros(rank, matrix.shape[1]).masked_scatter_(seen.expand(rank, -1), right[:rank] @ outer.T)
    return rows, left, sigma, right, noise


def _common(basis: Tensor, right: Tensor, geometry: Geometry) -> Tensor | None:
    """The direction (c_in k^2,) of what all patches of the inputs in A have outside R; None where A is empty."""
    if not len(basis):
        return None
    means = geometry.patches(basis.view(-1, *geometry.input_shape)).mean(1)
    return torch.linalg.svd(means - means @ right.T @ right, full_matrices=False)[2][0]


def _checked(gradient: Tensor, geometry: Geometry, bias_gradient: Tensor | None) -> Tensor:
    width = geometry.input_shape[0] * math.prod(geometry.kernel)
    if gradient.numel() != geometry.output_shape[0] * width or gradient.shape[0] != geometry.output_shape[0]:
        raise ValueError(
            f"gradient has shape {tuple(gradient.shape)}, the layer's weight {geometry.output_shape[0]} x {width}"
        )
    if bias_gradient is not None and bias_gradient.numel() != geometry.output_shape[0]:
        raise ValueError(f"bias_gradient has {bias_gradient.numel()} entries for {geometry.output_shape[0]} outputs")
    for tensor in (gradient, bias_gradient):
        if tensor is not None and not tensor.isfinite().all():
            raise ValueError("the layer's gradient holds numbers that are not finite")
    return gradient.detach().reshape(geometry.output_shape[0], width).double()


def row_precision(
    matrix: Tensor, rank: int, eps: float, *, saturating: bool = False, floor: Tensor | None = None
) -> Tensor:
    """One over the noise of each row of a matrix (m, n) of at most this rank, in units of rounding's: eps |row|.

    Rounding is relative: the row of an output that hardly any image drives is as exact as the strongest. Noise that was
    added is not. What lies outside the leading `rank` singular vectors is measured noise. Together with rounding, which
    no row is free of, it is the rows' error. Weighted rows show images that drown in the raw matrix.
    """
    lengths = matrix.norm(dim=1)
    rounding = eps * torch.where(lengths > 0, lengths.max(), 0.0) if saturating else eps * lengths
    rounding = rounding if floor is None else torch.hypot(rounding, floor.to(rounding))
    spare = len(matrix) - rank
    added = _added_to_each if spare**2 >= IDENTIFIED * (len(matrix) + rank) else _added_to_all
    error = rounding
    for _ in range(REWEIGHT):
        weights = torch.where(error > 0, eps / error, 0.0)
        error = torch.hypot(rounding, added(matrix, rank, weights, rounding))
    return torch.where(rounding > 0, eps / error, 0.0)


def _added_to_each(matrix: Tensor, rank: int, weights: Tensor, rounding: Tensor) -> Tensor:
    """Noise of each row (m,): what of it is beyond the rank, less what its own pull (its leverage) hides of that.

    Without that correction a row could be made ever heavier by fitting its noise.
    """
    left, _, right = torch.linalg.svd(weights[:, None] * matrix, full_matrices=False)
    left_over = (matrix - matrix @ right[:rank].T @ right[:rank]).norm(dim=1)
    leverage = left[:, :rank].square().sum(1)
    return left_over / (1 - leverage).clamp(min=1e-6).sqrt()


def _added_to_all(matrix: Tensor, rank: int, weights: Tensor, rounding: Tensor) -> Tensor:
    """Noise that all rows share, 0 of rows of zeros, (m,): what is beyond the rank, less what rounding leaves there."""
    left = torch.linalg.svd(weights[:, None] * matrix, full_matrices=False)[0][:, rank:]
    beyond = (left.T @ (weights[:, None] * matrix)).square().sum()
    shares = left.square().sum(1) * weights.square()
    added = (beyond - shares @ rounding.square()).clamp(min=0) / shares.sum().clamp(min=1e-300)
    return torch.where(rounding > 0, added.sqrt(), 0.0)


def _noise_beyond(sigma: Tensor, rank: int, lengths: Tensor, width: int, eps: float) -> float:
    """Standard deviation of the noise in the entries of a matrix from its singular values beyond its rank.

    Where there are none beyond, or the matrix is too exact to show any, rounding of the longest row is what is left.
    """
    rounding = max(eps, torch.finfo(torch.float64).eps) * float(lengths.max()) / width**0.5
    beyond = sigma[rank:]
    if not len(beyond):
        return rounding
    left_over = float(beyond.square().sum() / (len(beyond) * max(1, width - rank))) ** 0.5
    return max(left_over, 0.01 * rounding)


def _no_inputs(right: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, float]:
    return right.new_zeros(0, math.prod(geometry.input_shape)), right.new_zeros(0), 0.0


def consistent_inputs(
    right: Tensor, geometry: Geometry, most: int, *, centred: bool = False
) -> tuple[Tensor, Tensor, float]:
    """A's basis (dim A, n), the angle of each basis vector to R (dim A,), and the gap.

    Args:
        right: R (r, c_in k^2), orthonormal rows.
        geometry: of the layer.
        most: the dimension that is expected at most, B.
        centred: whether R holds differences of patches only.
    """
    if not len(right):
        return _no_inputs(right, geometry)
    if geometry.positions == 1:
        return _single_position(right, geometry)
    coverage = geometry.coverage(right)
    root = torch.where(coverage > 0, coverage.clamp(min=1).rsqrt(), 0.0)
    size = min(most + GUARD, int((coverage > 0).sum()), geometry.positions * len(right))
    generator = torch.Generator().manual_seed(0)  # any start will do: what is found does not depend on it
    block = torch.randn(size, *geometry.input_shape, generator=generator, dtype=torch.float64).to(right) * (root > 0)
    block, angles = leading_eigenvectors(_Consistency(right, geometry, root, centred), block, most)
    dimension, gap = _largest_gap(angles, most)
    basis = (block[:dimension] * root).flatten(1)
    if dimension:
        basis = torch.linalg.qr(basis.T)[0].T.contiguous()
    return basis, angles[:dimension], gap


def _single_position(right: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, float]:
    """One patch covers the whole input: A is the row space itself, without the entries that are padding."""
    basis = geometry.assemble(right[:, None]).flatten(1)
    padding = (1 - basis.square().sum(1)).clamp(min=0).sqrt()
    return torch.linalg.qr(basis.T)[0].T.contiguous(), padding, math.inf


@dataclass(frozen=True)
class _Consistency:
    """T = D^(-1/2) E^T R^T R E D^(-1/2) on blocks of inputs (N, *input_shape); it is symmetric.

    Where R is centred, each input's own mean patch counts as inside it.
    """

    right: Tensor
    geometry: Geometry
    root: Tensor  # diag(D)^(-1/2), (*input_shape)
    centred: bool = False

    def __call__(self, block: Tensor) -> Tensor:
        """T of each input of a block."""
        return self.geometry.assemble(self._inside(self.geometry.patches(block * self.root))) * self.root

    def outside(self, block: Tensor) -> Tensor:
        """sqrt(1 - Rayleigh quotient), (N,), of unit vectors: computed without cancellation."""
        patches = self.geometry.patches(block * self.root)
        return (patches - self._inside(patches)).flatten(1).norm(dim=1)

    def _inside(self, patches: Tensor) -> Tensor:
        """What of patches (N, P, c_in k^2) lies in R, or is their mean."""
        mean = patches.mean(1, keepdim=True) if self.centred else 0.0
        return mean + ((patches - mean) @ self.right.T) @ self.right


def _largest_gap(angles: Tensor, most: int) -> tuple[int, float]:
    """How many of the angles, smallest first, lie before the largest gap, and the gap."""
    floor = 1e-9  # below this the angles are the arithmetic's
    ratios = angles[1:].clamp(min=floor) / angles[:-1].clamp(min=floor)
    ratios = ratios[:most]
    if not len(ratios) or angles[0] > INSIDE:
        return 0, 0.0
    dimension = int(ratios.argmax()) + 1
    return (dimension, float(ratios[dimension - 1])) if angles[dimension - 1] < INSIDE else (0, 0.0)
