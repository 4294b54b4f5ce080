"""Images of a fully connected first layer behind which a ReLU stands, after any number of local steps.

Pixels do not drift. Whatever has happened above, the first layer has moved by

    D = sum_i d_i x_i^T,        d_i = sum_t beta_t delta_i^t        (m, n pixels),

with x_i the i-th of the client's B images, delta_i^t the gradient of its loss in step t by the layer's outputs (0 where
it had no part), and beta_t the weight of step t. So D has rank B for any number of epochs, in any order, with momentum
and decay, and its row space is that of the images. The movement of the bias, sum_i d_i, says which mixtures sum to one.

In that space the images are found in two moves. First guesses tell which units of the layer were off for an image,
under the weights before and after training. There are two kinds of guesses. A row of D that one image alone has moved
is that image, but for rounding. And differences of neighbouring pixels are nearly independent from image to image and
far from Gaussian: independent component analysis gives images that are off by some percent. Of a unit that was off in
all steps the entry of d_i is exactly zero. A column L c of the space of columns that is zero there is found by an L1
norm (a few of the zeros are predicted wrongly), and is then settled on all its zeros.

Columns that were found leave the exact row space of the other images, in which the next analysis is easier.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from attack.local.levels import off_levels
from attack.read.span import Span
from attack.solve.budget import WorkBudget
from attack.solve.ica import fast_ica
from attack.solve.least_squares import least_squares

LUMA_AND_CHROMA = ((1 / 3, 1 / 3, 1 / 3), (0.5, -0.5, 0.0), (0.25, 0.25, -0.5))

MARGINS = (0.0, 0.1, 0.3, 0.6)  # how far below zero a unit must be to be taken for off, in its mean size
QUIET = (None, 0.6, 0.25, 0.1)  # how small its entry must be in the guess of the columns, in their mean size
REFITTED = 4  # times that zeros and column are taken from each other
POWER = 0.5  # p of the sum of |d|^p that is lowered
REWEIGHTED = 35  # iterations of the re-weighted least squares
SHARPER, SHARPEST = 0.5, 1e-8  # factor of their smoothing from one iteration to the next, and the least of it
SETTLING = ((40.0, 1e-5), (10.0, 1e-7), (5.0, 1e-9))  # noise, and share of the largest
TOLD = 10.0  # times its error that a row must have left to be tried
TOGETHER = 64  # sets of units that are tried at once
NEARLY = 1e-3  # energy, over units of length 1, up to which a column is nearly zero in units that are off
SPARE = 4  # zeros beyond the B - 1 that any column of the space can be made to have
FEWEST = 0.6, 0.3  # share of the units that the guess has off which must be zeros, in the first and the last round
AGREEING = 4  # units that must ask for the same multiple of another column
HIT = 0.6  # share of the zeros which must be units that the guess has off
SAME = 1e-4  # columns whose cosine comes as close to 1 are one
DEPENDENT = 1e-5  # a column with less of it outside the others is a mixture of them
FRUITLESS = 8  # rounds in a row that find no further column
ELSEWHERE = 0.1  # how far a round starts from the analysis, for each round before it without a column
DRAWS = 2  # of noise, by which the images' errors are measured
PASSES = 3  # of the final least squares over images and columns in turn
MOST = 2.0  # share of another column that is sought in a column
WHOLE = 0.15  # steps of 1/255, root mean square, within which an image's pixels count as whole: 0.289 by chance
OUTSIDE, NOISES = 1e-3, 100.0  # pixels may lie outside [0, 1] by so much, and so many times the noise


@dataclass(frozen=True)
class Column:
    """A column of the layer's movement: L c with coordinates c (B,), zeros (m,), and how many of them bear witness."""

    coordinates: Tensor
    zeros: Tensor
    witnesses: int = 0

    @property
    def count(self) -> int:
        """How many zeros it has."""
        return int(self.zeros.sum())


@dataclass(frozen=True)
class Images:
    """All images of a batch from the movement of the first layer.

    Attributes:
        inputs: (B, n) of the layer.
        columns: (m, B), d_i of each image.
        residual: share of the movement that images and columns do not explain.
        sums: (B,), the bias's part of each image: 1 but for noise.
        is_open: (B,), whether an image may hold a share of another, which the zeros do not tell.
    """

    inputs: Tensor
    columns: Tensor
    residual: float
    sums: Tensor
    is_open: Tensor


class ColumnSearch:
    """The columns of a movement.

    Args:
        span: of the layer's movement; rank B.
        bias_gradient: (m,), the bias's movement.
        weights: pairs W (m, n), b (m,), before and after training.
        pixels: the images (N, C, H, W), in [0, 1], of the layer's inputs (N, n).
    """

    def __init__(
        self,
        span: Span,
        bias_gradient: Tensor,
        weights: Sequence[tuple[Tensor, Tensor]],
        pixels: Callable[[Tensor], Tensor],
    ) -> None:
        self.span, self.weights, self.pixels = span, weights, pixels
        self.size, self.rows = span.rank, torch.where(span.rows > 0, span.rows, 1.0)
        self.bias = span.rows * bias_gradient.to(span.rows)
        self.along = span.right @ span.ones  # (B,): 1 for the coordinates of a true image
        lengths = span.left.norm(dim=1)
        self.live = lengths > 10 * span.noise / span.sigma[-1]  # (m,)
        self.units = torch.where(self.live, 1 / lengths, 0.0)[:, None] * span.left  # rows of unit length

    # ------------------------------------------------------------------------------------------------
    # Guesses

    def guesses(self, rest: Tensor, generator: torch.Generator, shaken: float) -> Tensor:
        """Coordinates q (r, B) of images q V in the space that the rows of `rest` (r, B) span."""
        tracks = _differences(self.pixels(rest @ self.span.right))
        mixing = fast_ica(tracks, generator)
        if shaken:
            centred = tracks - tracks.mean(1, keepdim=True)
            root = torch.linalg.cholesky(centred @ centred.T / tracks.shape[1])
            white = mixing @ root
            noise = torch.randn(white.shape, generator=generator, dtype=white.dtype).to(white)
            white = white + shaken * noise / len(white) ** 0.5 * white.norm(dim=1, keepdim=True)
            mixing = torch.linalg.solve_triangular(root, white, left=False, upper=False)
        q = mixing @ rest
        return q / (q @ self.along)[:, None]

    def before_relu(self, q: Tensor) -> Tensor:
        """What goes into the ReLU, (weights, r, m), of images with coordinates q (r, B)."""
        images = q @ self.span.right
        return torch.stack([images @ weight.T + bias for weight, bias in self.weights])

    def quietness(self, q: Tensor, others: Tensor) -> Tensor:
        """|d| (r, m) of the columns that images q (r, B), beside others (B - r, B), would have."""
        back = torch.linalg.pinv(torch.cat([q, others]))[:, : len(q)]
        return (self.span.left @ (self.span.sigma[:, None] * back)).T.abs()

    # ------------------------------------------------------------------------------------------------
    # Columns

    def sparse(self, is_off: Tensor) -> Tensor:
        """Coordinates (N, B) of columns with as many zeros as can be among the units with is_off (N, m) = 1.

        Re-weighted least squares lower the sum of |d|^p. Rows of L have unit length in it: units that hardly any image
        drives have many zeros and short rows, beside which a long row that is not zero would count too much.
        """
        weights, smoothing = is_off, 1.0
        for _ in range(REWEIGHTED):
            normal = torch.einsum("mi,sm,mj->sij", self.units, weights, self.units)
            c = torch.linalg.eigh(normal)[1][:, :, 0]
            size = (c @ self.units.T).abs()
            size = size / _mean_where(size, 1 - is_off)
            smoothing = max(smoothing * SHARPER, SHARPEST)
            weights = is_off / (size.square() + smoothing**2) ** (1 - POWER / 2)
            weights = weights / weights.amax(1, keepdim=True).clamp(min=1e-300)
        return c

    def zeros(self, c: Tensor, noises: float, least: float) -> Tensor:
        """Which entries (m,) of the column are zero, within so much noise or so small a share of the largest."""
        column = self.span.left @ c
        noise = noises * self.span.noise * float((c / self.span.sigma).norm())
        return (column.abs() < max(noise, least * float(column.abs().max()))) & self.live

    def settled(self, c: Tensor) -> Column:
        """The column on all its zeros, from a column that nearly has them.

        The noise of D V^T = L S is the same in all entries, so total least squares seek the w = c / S of length 1 with
        the smallest L S w on the zeros.
        """
        moved = self.span.left * self.span.sigma
        for noises, least in SETTLING:
            zeros = None
            for _ in range(REFITTED):
                before, zeros = zeros, self.zeros(c, noises, least)
                if int(zeros.sum()) < self.size:
                    return Column(c, zeros)
                if before is not None and torch.equal(before, zeros):
                    break
                weakest = torch.linalg.svd(moved[zeros], full_matrices=True)[2]
                c = self.span.sigma * weakest[-1]
        second = moved @ weakest[-2]
        witnesses = int((second[zeros].abs() > 1e-3 * second.abs().max()).sum())
        return Column(c / c.norm(), zeros, witnesses)

    def proposed(self, q: Tensor, others: Tensor, effort: float) -> list[Column]:
        """Columns that the guesses q (r, B) of images lead to, beside guesses of the others (B - r, B)."""
        each = self.before_relu(q)
        highest, mean = each.amax(0), each.mean(0)
        views = [highest, mean] if not effort else [highest, mean, *each]
        size, off = highest.abs().mean(1, keepdim=True), (highest < 0) & self.live
        quiet, found = self.quietness(q, others), []
        least = FEWEST[0] + (FEWEST[1] - FEWEST[0]) * effort
        for view in views:
            for margin in MARGINS:
                is_off = ((view < -margin * size) & self.live).double()
                quieter = is_off * (quiet / _mean_where(quiet, 1 - is_off))
                sets = [is_off if most is None else is_off * (quieter < most) for most in QUIET]
                for at, c in enumerate(self.sparse(torch.cat(sets))):
                    found += self._judged(self.settled(c), off[at % len(q)], least)
        return found

    def _judged(self, column: Column, off: Tensor, share: float) -> list[Column]:
        """The column, if it has more zeros than any column can have, and those of the guess that led to it."""
        least = max(self.size + SPARE, int(share * int(off.sum())))
        hits = int((column.zeros & off).sum())
        is_good = column.count >= least and hits >= HIT * column.count and column.witnesses >= SPARE
        return [column] if is_good else []

    def distinct(self, columns: Sequence[Column]) -> list[Column]:
        """Those of the columns that are no mixture of others with more zeros, most zeros first, B at most."""
        kept: list[Column] = []
        for column in sorted(columns, key=lambda each: -each.count):
            c = column.coordinates
            if kept:
                basis = torch.linalg.qr(_matrix(kept))[0]
                is_known = float((_matrix(kept).T @ c).abs().max()) >= 1 - SAME
                if is_known or float((c - basis @ (basis.T @ c)).norm()) <= DEPENDENT:
                    continue
            kept.append(column)
        return kept[: self.size]

    def purified(self, columns: Sequence[Column]) -> list[Column]:
        """The columns, each without the multiple of another that has cost it zeros."""
        pure = list(columns)
        for j in range(len(pure)):
            for i in range(len(pure)):
                if i != j:
                    pure[j] = self._without(pure[j], pure[i])
        return pure

    def _without(self, column: Column, other: Column) -> Column:
        """column + t other, where several units ask for the same t; the column itself where none do."""
        rows, many = self.live & ~other.zeros, AGREEING - 1
        ratios = -(self.span.left[rows] @ column.coordinates) / (self.span.left[rows] @ other.coordinates)
        ratios = ratios.sort().values
        if len(ratios) <= many:
            return column
        width = ratios[many:] - ratios[:-many]
        at = int(width.argmin())
        t = float(ratios[at + many // 2])
        if width[at] > 1e-3 * max(1e-6, abs(float(ratios[at]))) or float(ratios[at : at + many + 1].abs().max()) < 1e-9:
            return column
        c = column.coordinates + t * other.coordinates
        better = self.settled(c / c.norm())
        return better if better.count > column.count else column

    def others(self, found: Sequence[Column]) -> Tensor:
        """Coordinates (B - k, B) that span the images of which no column was found: exact, since D = L S Q^-1."""
        if not found:
            return torch.eye(self.size).to(self.span.left)
        outside = torch.linalg.qr(_matrix(found), mode="complete")[0][:, len(found) :].T
        return torch.linalg.qr((outside * self.span.sigma).T)[0].T

    # ------------------------------------------------------------------------------------------------
    # Rows

    def lone(self) -> list[Column]:
        """Columns of images that alone have moved some unit, then of those that are alone without these, and so on.

        Row k of D over the bias's movement is then the image, as in `attack.read.lone_rows`, but for the rounding of
        the weights: near enough to say which units were off. Every row is tried.
        """
        found: list[Column] = []
        rest, sums, before = self.span.left * self.span.sigma, self.bias, -1
        while before < len(found) < self.size:
            before = len(found)
            told = sums.abs() > TOLD * self.span.noise
            q = (rest / sums[:, None])[self.live & told & (rest.norm(dim=1) > TOLD * self.span.noise * self.size**0.5)]
            highest = self.before_relu(q).amax(0)
            is_off = (highest < -MARGINS[1] * highest.abs().mean(1, keepdim=True)) & self.live
            for at, c in self._nearly_zero(is_off.double()):
                for column in self._judged(self.settled(c), is_off[at], FEWEST[0]):
                    if len(self.distinct([*found, column])) > len(found):
                        found.append(column)
                        taken = self.span.left @ column.coordinates / ((q[at] / self.span.sigma) @ column.coordinates)
                        rest, sums = rest - taken[:, None] * q[at], sums - taken
        return sorted(found, key=lambda column: -column.count)

    def _nearly_zero(self, is_off: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Of sets of units (N, m) those in which a column (B,) is nearly zero, and that column, the best first."""
        if not len(is_off):
            return
        found = [
            torch.linalg.eigh(torch.einsum("mi,sm,mj->sij", self.units, part, self.units))
            for part in is_off.split(TOGETHER)
        ]
        energies = torch.cat([energy[:, 0] for energy, _ in found])
        columns = torch.cat([vectors[:, :, 0] for _, vectors in found])
        for at in energies.argsort().tolist()[: self.size]:
            if energies[at] > NEARLY:
                break
            yield at, columns[at]

    # ------------------------------------------------------------------------------------------------
    # The whole

    def found(self, generator: torch.Generator, budget: WorkBudget) -> list[Column]:
        """All B columns, or as many as rounds in a row without a further one leave.

        Raises:
            OutOfTimeError: the budget's clock has run out.
        """
        if self.size == 1:  # the movement is the image
            c = self.along.new_ones(1)
            return [Column(c, self.zeros(c, *SETTLING[-1]))]
        found, fruitless = self.lone(), 0  # most zeros first
        first = self.guesses(self.others([]), generator, 0.0) if len(found) < self.size else None  # of all images
        while len(found) < self.size and fruitless < FRUITLESS:
            budget.check()
            # A mixture of two images that have not been found may be among the columns, and hides both.
            is_kept = torch.rand(len(found), generator=generator) >= fruitless / FRUITLESS
            believed = [column for column, kept in zip(found, is_kept.tolist(), strict=True) if kept]
            is_anew = believed or fruitless
            q = self.guesses(self.others(believed), generator, ELSEWHERE * fruitless) if is_anew else first
            beside = self._paired(first, believed)
            more = self.proposed(q, beside, fruitless / FRUITLESS)
            before = len(found)
            found = self.purified(self.distinct([*found, *more]))
            found.sort(key=lambda column: -column.count)
            if len(found) == self.size and not self.is_plausible(found):
                found = found[:-1]
            fruitless = 0 if len(found) > before else fruitless + 1
        return found

    def _paired(self, guesses: Tensor, found: Sequence[Column]) -> Tensor:
        """Those of the first guesses (k, B) that belong to the columns found."""
        if not found:
            return guesses[:0]
        near = ((guesses / self.span.sigma) @ _matrix(found)).abs()
        near = near / near.norm(dim=1, keepdim=True)
        rows, _ = linear_sum_assignment(-near.cpu().numpy())
        return guesses[torch.as_tensor(rows, device=guesses.device)]

    def is_plausible(self, found: Sequence[Column]) -> bool:
        """Whether the pixels of the images that all columns give lie in [0, 1], but for noise."""
        pixels, noise = self.pixels(self.images(found).inputs), self.span.noise * self.span.right.shape[1] ** 0.5
        outside = float(torch.maximum(-pixels.amin(), pixels.amax() - 1))
        return outside < OUTSIDE + NOISES * noise / float(self.span.sigma[-1])

    def told_by_levels(self, images: Images) -> Images:
        """The images, those that hold a share of another without it, where pixels are whole steps of 1/255.

        Where image b was off wherever image i was off, column i and a multiple of column b together have the zeros of
        column i, but for a few. What the zeros leave open are then images b less t times image i. Each unit of which
        column i could have another zero proposes a t.
        """
        mixing = torch.linalg.lstsq(self.span.right.T, images.inputs.T).solution.T  # Q (B, B)
        changed = False
        for b in (off_levels(self.pixels(images.inputs)) > WHOLE).nonzero()[:, 0].tolist():
            best = None
            for i in range(self.size):
                tau = images.columns[self.live, i] / images.columns[self.live, b]
                t = (tau / (1 + tau))[tau.isfinite() & (tau.abs() > 0) & (tau.abs() < MOST)]
                if i == b or not len(t):
                    continue
                mixtures = torch.lerp(images.inputs[b], images.inputs[i], t[:, None])
                off = off_levels(self.pixels(mixtures))
                at = int(off.argmin())
                if best is None or float(off[at]) < best[0]:
                    best = float(off[at]), torch.lerp(mixing[b], mixing[i], t[at])
            if best is not None and best[0] < WHOLE:
                mixing[b], changed = best[1], True
        if not changed:
            return images
        columns = self.span.sigma[:, None] * torch.linalg.inv(mixing)
        return self.images([self.settled(c / c.norm()) for c in columns.T])

    def images(self, found: Sequence[Column]) -> Images:
        """All images, from all columns."""
        zeros = torch.stack([column.zeros for column in found], 1) | ~self.live[:, None]  # (m, B)
        columns = (self.span.left @ _matrix(found)).masked_fill(zeros, 0.0)
        columns = columns * least_squares(columns, self.bias[:, None])[:, 0]
        moved = torch.cat([self.span.left * self.span.sigma, self.bias[:, None]], 1)  # (m, B + 1)
        rows, columns = _alternating(columns, moved, ~zeros)
        residual = float((columns @ rows - moved).norm() / moved.norm())
        sums, rows = rows[:, -1], rows[:, :-1] / rows[:, -1:]
        own = zeros.double().T @ (~zeros).double()  # (B, B): units that are off for one image and on for another
        is_open = (own.fill_diagonal_(float("inf")) < AGREEING).any(0)
        return Images(rows @ self.span.right, columns / self.rows[:, None] * sums, residual, sums, is_open)

    def errors(self, images: Images, generator: torch.Generator) -> Tensor:
        """Expected relative errors (B,), root mean square: what as much noise once more changes, and the span's turn.

        The inputs are B numbers each in the rows of R, which noise mixes; and noise turns R itself.
        """
        q = images.inputs @ self.span.right.T
        columns = self.rows[:, None] * images.columns
        on, moved = columns != 0, torch.cat([self.span.left * self.span.sigma, self.bias[:, None]], 1)
        clean, changes = self._refitted(columns, moved, on), []
        for _ in range(DRAWS):
            drawn = torch.randn(moved.shape, generator=generator, dtype=moved.dtype).to(moved)
            noisy = self._refitted(columns, moved + self.span.noise * drawn * self.live[:, None], on)
            changes.append((noisy - clean).square().sum(1))
        changed = (torch.stack(changes).mean(0) / q.square().sum(1)).sqrt()
        return torch.hypot(changed, self.span.turned(q))

    def _refitted(self, columns: Tensor, moved: Tensor, on: Tensor) -> Tensor:
        rows, _ = _alternating(columns, moved, on)
        return rows[:, :-1] / rows[:, -1:]


def _alternating(columns: Tensor, moved: Tensor, on: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares columns @ rows = moved (m, B + 1) over rows (B, B + 1) and over columns (m, B) `on` in turn."""
    for _ in range(PASSES):
        rows = least_squares(columns, moved)
        columns = torch.zeros_like(columns)
        for unit in on.any(1).nonzero()[:, 0].tolist():
            mine = on[unit]
            columns[unit, mine] = least_squares(rows[mine].T, moved[unit][:, None], driver="gelsd")[:, 0]
    return least_squares(columns, moved), columns


def _differences(images: Tensor) -> Tensor:
    """Horizontal and vertical differences (N, s) of images (N, C, H, W), of luma and chroma where they have colours."""
    if images.shape[1] == 3:
        images = torch.einsum("ck,nkhw->nchw", images.new_tensor(LUMA_AND_CHROMA), images)
    return torch.cat([images.diff(dim=3).flatten(1), images.diff(dim=2).flatten(1)], 1)


def _matrix(columns: Sequence[Column]) -> Tensor:
    """The coordinates (B, k) of k columns."""
    return torch.stack([column.coordinates for column in columns], 1)


def _mean_where(size: Tensor, which: Tensor) -> Tensor:
    """The mean (N, 1) of sizes (N, m) weighted by `which` (N, m)."""
    return (size * which).sum(1, keepdim=True) / which.sum(1, keepdim=True).clamp(min=1)
