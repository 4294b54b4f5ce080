"""What BatchNorm in training mode hides of the input u (B, ...) of the layers below it, and how that is told after all.

- A factor. u -> a u leaves z^ as it is, and the gradient too: delta z goes with 1 / a.
- Shifts. A number added to a channel of all images, at input positions that every output meets with the same weights:
  BatchNorm takes off what it does to z, and delta z sums to zero. Such are the positions (0, 2, 4 ...)^2 of a layer
  with stride 2 whose other rows or columns are met by padding, and each position of a layer with a single one.

Equations from elsewhere, such as a shortcut that is the identity, pin the factor, and the shifts of the channels where
they say anything.

What tells them is in front of u: a ReLU, and in front of that a shift beta_c that is added to a channel. The gradient
of that shift is the sum of delta over active entries. It goes with 1 / a, which gives the factor, as shared deviations
do. In each channel and place the lowest values are the ReLU's zeros, if there are any: several that are equal are
zeros, and whether a single lowest one is, the sum decides. A column without zeros is BatchNorm's own output, which has
the mean beta_c; where u is something else, shared means tell its shift.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attack.solve.least_squares import least_squares
from attack.walk.noise import is_active, noise_below_zero
from attack.walk.sources import IdentitySource, NormalisedSource, Source, by_channel, over_batch, wide
from network.kinds import kind_of
from network.kinds.norm import MIXES
from network.known_outputs import ZERO, UndeterminedError
from network.stage import Chain

GATHERED = 3e-5  # of u's size: entries of a channel this close to its lowest are zeros of the ReLU, as that is
ZEROS = 3  # equal entries that are zeros whatever a sum says
OPEN = 8  # places of a channel, at most, of which a sum decides whether a lowest entry is a zero
DECIDED = 30.0  # times better than the next that a decision must fit the sum, unless the next is far off anyway
FAR = 1e-4  # of the channel's delta: a sum this far off fits nothing
SINGULAR = 1e-3  # of the largest singular value: shared means are rounded, and tell nothing along smaller ones
AGREED = 1e-4  # relative difference of the factors that two channels tell, up to which they agree
FEW, AGREEING = 3, 0.1  # channels, and share of them, that must agree
AGAIN = 2  # times that a factor is sought: delta goes with one over it but for BatchNorm's eps
OTHERS = 1e-3  # relative spread of the factors by shared deviations beyond which they are those of another batch
NOT_SHARED = ", and the batch's statistics are not shared, or are those of another"
LOUD = 0.1  # of the largest gradient of a shift: fainter ones are sums of what cancels


@dataclass(frozen=True)
class Hidden:
    """The directions that a set of sources leaves open.

    Attributes:
        factor: whether a common factor is.
        places: masks of positions, (H, W) or ().
        channels: for each place, the channels (C,) whose shift there is open.
    """

    factor: bool = False
    places: tuple[Tensor, ...] = ()
    channels: tuple[Tensor, ...] = ()

    def without(self, change: Tensor, u: Tensor) -> Tensor:
        """A change of u (B, C, ...) without its part along the open directions."""
        change = self._unshifted(change)
        if self.factor:
            along = self._unshifted(u)
            change = change - (change * along).sum() / along.square().sum() * along
        return change

    def _unshifted(self, values: Tensor) -> Tensor:
        for place, channels in zip(self.places, self.channels, strict=True):
            mean = over_batch(values * place) / (len(values) * place.sum())
            values = values - wide(mean * channels, values) * place
        return values


def is_part_of_layer_below(norm: object, shape: Sequence[int], below: Chain) -> bool:
    """Whether a norm is a part of the equations of the layer right below it, given the shape of its inputs.

    BatchNorm in training mode always is; a norm of each image where that layer is a convolution. Of a fully connected
    one the search for its inputs ends in wrong places.
    """
    kind = kind_of(norm)
    if kind.is_norm and kind.mixes_images(norm):
        return True
    is_in_front = bool(below) and kind_of(below[-1].module).is_affine
    return is_in_front and len(shape) > 1 and kind.normalises_images(norm, shape)


def why_not_in_front(module: object) -> str:
    """Why the inputs of a stage right in front of BatchNorm in training mode stay open; empty where they do not."""
    if not kind_of(module).is_affine:
        return MIXES
    groups = getattr(module, "groups", 1)
    return f"BatchNorm in training mode hides a factor of each of {groups} groups of channels" if groups > 1 else ""


def hidden(sources: Sequence[Source], u: Tensor) -> Hidden:
    """What these sources leave open of an input shaped as u (B, ...)."""
    norms = [source for source in sources if isinstance(source, NormalisedSource)]
    known = [source.above.sure for source in sources if isinstance(source, IdentitySource)]
    if len(norms) + len(known) < len(sources):
        return Hidden()
    places = _places(norms, u)
    channels = []
    for place in places:
        seen = sum(by_channel(each * place).sum(1) for each in known) if known else 0.0
        channels.append((seen + u.new_zeros(u.shape[1])) == 0)
    return Hidden(not known, places, tuple(channels))


def _places(sources: Sequence[NormalisedSource], u: Tensor) -> tuple[Tensor, ...]:
    """The sets of positions that every output of all these layers meets alike."""
    if u.dim() == 2:
        return (u.new_ones(()),)
    stride = [max(s.map.stride[axis] for s in sources) for axis in (0, 1)]
    if all(math.prod(s.above.values.shape[2:]) == 1 for s in sources):
        stride = list(u.shape[2:])
    found = []
    for row, column in itertools.product(range(stride[0]), range(stride[1])):
        place = u.new_zeros(u.shape[2:])
        place[row :: stride[0], column :: stride[1]] = 1
        if place.any() and all(_is_met_alike(source, place) for source in sources):
            found.append(place)
    return tuple(found)


def _is_met_alike(source: NormalisedSource, place: Tensor) -> bool:
    """Whether every output of a layer meets ones at these positions (H, W) with the same weights."""
    kernel = source.map.weight.shape[2:]
    taps = torch.eye(kernel.numel(), dtype=place.dtype, device=place.device).view(-1, 1, *kernel)
    met = source.map.of_one_channel(taps).outputs(place[None, None]).flatten(2)  # (1, k^2, P)
    return bool((met == met[..., :1]).all())


@dataclass(frozen=True)
class Gauge:
    """How open directions are fixed.

    Attributes:
        is_rectified: whether u comes out of a ReLU.
        shift_gradient: (C,) of the shift that is added to u's channels right in front of that ReLU, summed over the
            batch; None where there is no such thing, or the update does not have it.
        mean: (C,) that u's channels have over batch and positions in front of that ReLU, where BatchNorm in training
            mode gives them one; None where not.
    """

    is_rectified: bool = False
    shift_gradient: Tensor | None = None
    mean: Tensor | None = None

    def hidden(self, sources: Sequence[Source], u: Tensor) -> Hidden:
        """What these sources leave open of an input shaped as u."""
        return hidden(sources, u)

    def errors(self, u: Tensor, sources: Sequence[Source]) -> Tensor:
        """The relative error (B,) of what is fixed: within AGREED, which the noise of u exceeds."""
        return u.new_zeros(len(u))

    def fixed(self, u: Tensor, sources: Sequence[Source]) -> Tensor:
        """u with its open directions fixed.

        Raises:
            UndeterminedError: nothing tells one of them.
        """
        is_open = hidden(sources, u)
        if is_open.factor and (factor := _by_deviations(u, sources)):
            u = u * factor
        elif is_open.factor:
            if not self.is_rectified or self.shift_gradient is None:
                raise UndeterminedError(f"BatchNorm hides a factor common to all images{NOT_SHARED}")
            for _ in range(AGAIN):
                u = self._at_zeros(u, is_open)[0]
                delta = sum(source.delta(u) for source in sources)
                u = u * factor_by_shift(u, delta, self.shift_gradient)[0]
        return self._shifted(u, is_open, sources)

    def _shifted(self, u: Tensor, is_open: Hidden, sources: Sequence[Source]) -> Tensor:
        """u with the shift of each channel told at each open place."""
        if not any(channels.any() for channels in is_open.channels):
            return u
        u, is_zero = self._at_zeros(u, is_open)
        untold = [open_ & ~zero for open_, zero in zip(is_open.channels, is_zero, strict=True)]
        if self.is_rectified and self.shift_gradient is not None:
            delta = sum(source.delta(u) for source in sources)
            u, untold = self._by_sums(u, delta, is_open, untold)
        if not any(some.any() for some in untold):
            return u
        units = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
        patterns = torch.cat([wide(units[some], u) * place for some, place in zip(untold, is_open.places, strict=True)])
        shifts = _by_means(u, patterns, [source for source in sources if isinstance(source, NormalisedSource)])
        return u + (shifts @ patterns.flatten(1)).view(u.shape[1:])

    def _at_zeros(self, u: Tensor, is_open: Hidden) -> tuple[Tensor, list[Tensor]]:
        """u with the lowest entries of each open column at zero, and the columns (C,) where several are equal."""
        told, width = [], self._width(u, is_open)
        for place, channels in zip(is_open.places, is_open.channels, strict=True):
            at = _column(u, place)
            near = (at - _lowest(at, len(u))[:, None]).abs() < width
            zero = (at * near).sum(1) / near.sum(1)
            u = u - wide(torch.where(channels, zero, 0.0), u) * place
            told.append(channels & (near.sum(1) >= ZEROS) if self.is_rectified else torch.zeros_like(channels))
        return u, told

    def _width(self, u: Tensor, is_open: Hidden) -> float:
        """How close entries are that may both be zeros: as the noise has it by which the lowest differ."""
        least = GATHERED * float(u.square().mean().sqrt())
        if not self.is_rectified:
            return least
        for place, channels in zip(is_open.places, is_open.channels, strict=True):
            u = u - wide(torch.where(channels, _column(u, place).amin(1), 0.0), u) * place
        return max(least, ZERO * float(noise_below_zero(u).median()))

    def _by_sums(self, u: Tensor, delta: Tensor, is_open: Hidden, untold: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Columns whose lowest entry a sum decides to be a zero stay where they are; those without zeros get BN's mean.

        Returns u, and the columns whose shift is still open.
        """
        active, size, width = is_active(u), by_channel(delta).norm(dim=1), self._width(u, is_open)
        for place, some in zip(is_open.places, untold, strict=True):
            # until it is decided, what is lowest in an open column counts as a zero
            active = torch.where(wide(some, u) & (place > 0), u > width, active)
        sums = over_batch(delta * active)
        left = [some.clone() for some in untold]
        for channel in torch.stack(untold).any(0).nonzero()[:, 0].tolist():
            places = [index for index, some in enumerate(untold) if some[channel]]
            if len(places) > OPEN:
                continue
            lowest = [_delta_at_lowest(u, delta, is_open.places[index], channel) for index in places]
            tried = sorted(
                (
                    abs(float(sums[channel] - self.shift_gradient[channel]) + sum(itertools.compress(lowest, chosen))),
                    chosen,
                )
                for chosen in itertools.product((False, True), repeat=len(places))
            )
            floor = FAR * float(size[channel])
            if tried[0][0] > floor or tried[1][0] < min(DECIDED * tried[0][0], floor):
                continue
            for index, is_on in zip(places, tried[0][1], strict=True):
                left[index][channel] = is_on
        if self.mean is not None and len(is_open.places) == 1 and float(is_open.places[0].mean()) == 1.0:
            below = self.mean - over_batch(u, torch.mean)
            u, left = u + wide(torch.where(left[0], below, 0.0), u), [torch.zeros_like(left[0])]
        return u, left


def _lowest(at: Tensor, images: int) -> Tensor:
    """The lowest entry of each column (C, n), or, where there are more than one for each image, one of the lowest."""
    return at.amin(1) if at.shape[1] <= images else at.kthvalue(min(ZEROS, at.shape[1]), dim=1).values


def _delta_at_lowest(u: Tensor, delta: Tensor, place: Tensor, channel: int) -> float:
    """Delta at the lowest entry of a channel at some positions."""
    return float(_column(delta, place)[channel][_column(u, place)[channel].argmin()])


def factor_by_shift(u: Tensor, delta: Tensor, shift_gradient: Tensor) -> tuple[float, float]:
    """What outputs u (B, C, ...) of a ReLU must be multiplied by, and the relative error of that.

    Delta, summed over active entries, is the shift's gradient, and goes with one over the factor.

    Args:
        u: up to a common factor.
        delta: (B, C, ...) at u.
        shift_gradient: (C,) of what is added in front of the ReLU: the sum of the active entries' delta.

    Raises:
        UndeterminedError: too few channels agree. One whose active entries are not told from its zeros says anything.
    """
    sums = over_batch(delta * is_active(u))
    loud = shift_gradient.abs() > LOUD * shift_gradient.abs().max()
    factors = (sums / shift_gradient)[loud]
    alike = (factors[:, None] / factors - 1).abs() < AGREED
    most = alike.sum(0).argmax()
    agreed = factors[alike[:, most]]
    if len(agreed) < max(FEW, AGREEING * len(factors)) or not agreed[0] > 0:
        raise UndeterminedError("the channels do not agree on the factor that BatchNorm hides")
    factor = agreed.median()
    return float(factor), float((agreed / factor - 1).abs().median()) / len(agreed) ** 0.5


def _by_deviations(u: Tensor, sources: Sequence[NormalisedSource]) -> float | None:
    """What u must be multiplied by for the layers' deviations to be the shared ones; None where none are, or others."""
    if any(source.norm.deviation is None for source in sources):
        return None
    shared = torch.cat([source.norm.deviation for source in sources])
    own = torch.cat([source.normalised(u)[1] for source in sources])
    factors = shared / own
    factor = factors.median()
    off = (factors / factor - 1).abs().median()
    return float(factor) if off < OTHERS else None


def _column(values: Tensor, place: Tensor) -> Tensor:
    """The entries (C, n) of each channel at some positions, of all images."""
    return by_channel(values)[:, place.expand(values.shape[0], *values.shape[2:]).flatten() > 0]


def _by_means(u: Tensor, patterns: Tensor, sources: Sequence[NormalisedSource]) -> Tensor:
    """How much (n,) of each pattern (n, C, ...) is to be added to u for the layers' means to be the shared ones.

    Raises:
        UndeterminedError: no means are shared, or they do not tell so many.
    """
    if _by_deviations(u, sources) is None:
        raise UndeterminedError(f"BatchNorm hides shifts of single channels{NOT_SHARED}")
    rows, missing = [], []
    for source in sources:
        met = source.map.outputs(patterns).flatten(2)[..., 0] if u.dim() > 2 else source.map.outputs(patterns)
        mean = over_batch(source.map.outputs(u), torch.mean)
        rows.append((met / source.norm.deviation).T)  # (c_out, n)
        missing.append((source.norm.mean - mean) / source.norm.deviation)
    rows, missing = torch.cat(rows), torch.cat(missing)
    values = torch.linalg.svdvals(rows)
    if rows.shape[0] < rows.shape[1] or values[-1] < SINGULAR * values[0]:
        raise UndeterminedError("BatchNorm hides shifts of single channels, and shared means do not tell so many")
    return least_squares(rows, missing[:, None])[:, 0]
