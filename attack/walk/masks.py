"""Which entries of a ReLU were active: masks that noise leaves in doubt are decided by the gradient's residual.

One wrong mask adds or lacks one delta times one patch in one channel of the gradient. The solution takes up most of
that, but what is left has its direction still. So in each channel the entry is changed that explains most of what is
left, and then all is solved again. Where little is left, entries are changed that explain a notable share of it: a
wrong mask of a faint image leaves no more than noise may leave, but it leaves it in one channel and one direction.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attack.solve.budget import WorkBudget
from attack.solve.cgls import Solution
from attack.walk.methods import SolveMethod, rows_of
from attack.walk.sources import Source, by_channel
from network.known_outputs import RANGE, ZERO, KnownOutputs

EXPLAINED = 0.5  # share of a channel's squared residual that one entry must explain to be changed by itself
NOTABLE = 0.03  # share of all the squared residual that it must explain where noise might have left as much
SINGLE_FLIPS = 16  # times that such entries are changed
UNSOLVED = 1e-2  # a residual that no wrong masks leave: equations that are not linear were not solved
COARSER = (4.0, 16.0, 64.0, 0.4)  # times the noise that masks are tried for where the residual contradicts them

BALANCED = 4e-6  # of a channel's delta: the sum over active entries misses the shift's gradient by no more
USUAL = 6.0  # times what the middle channel misses it by: what noise does to all of them
DOUBTFUL = 20.0  # units of noise from the kink within which a mask may be changed by such a sum
SINGLES, PAIRS, TRIPLES = 4000, 40, 16  # most doubtful entries of a channel of which one, two and three are changed

Settled = tuple[Tensor, Solution, list[Source]]  # an input, the solver's word, and the sources with their masks


def settle(sources: list[Source], method: SolveMethod, enough: float, budget: WorkBudget) -> Settled:
    """Solve, change the entries whose masks explain most of the residual, and solve again, as long as that helps."""
    u, solution = method.solve(sources)
    for _ in range(SINGLE_FLIPS):
        budget.check()
        if not method.is_linear and not enough < solution.residual < UNSOLVED:
            break
        least = NOTABLE * _squared_residual(sources, u) if solution.residual < enough else 0.0
        gains = [flip_gain(source, u) for source in sources]
        most = max((float(each.max()) for each in gains), default=0.0)
        if not most > least:
            break
        trials = [_best_of_each_channel(each, least) for each in gains], [each == most for each in gains]
        for chosen in trials[:1] if all(map(torch.equal, *trials)) else trials:
            tried = [source.flipped(flips) for source, flips in zip(sources, chosen, strict=True)]
            other = method.solve(tried)
            if other[1].residual < solution.residual:
                break
        else:
            break
        (u, solution), sources = other, tried
    return u, solution, sources


def balanced(outputs: KnownOutputs, shift_gradient: Tensor) -> KnownOutputs:
    """Outputs whose masks fit the gradient of the shift in front of their ReLU, as far as few flips achieve that.

    Whatever is added to a channel in front of a ReLU (by a BatchNorm, or as a bias) has the sum of the active entries'
    delta for its gradient, to a few units of rounding. A channel where the sum misses it has a wrong mask, and the one,
    two or three most doubtful entries that make up for the difference are flipped. This needs no solution of the layer.

    Args:
        outputs: what is known below the ReLU, (B, c, ...).
        shift_gradient: (c,), summed over the batch.
    """
    delta, masked, margin = map(by_channel, (outputs.delta, outputs.masked_delta, outputs.margin))
    size = delta.hypot(masked).norm(dim=1)  # one of the two is zero
    missing = shift_gradient - delta.sum(1)
    share = missing.abs() / size.clamp(min=1e-300)
    tolerance = max(BALANCED, USUAL * float(share[size > 0].median())) if (size > 0).any() else BALANCED
    flips = torch.zeros_like(delta, dtype=torch.bool)
    for channel in (share > tolerance).nonzero()[:, 0].tolist():
        doubt = (margin[channel] - ZERO).abs()
        near = (doubt < DOUBTFUL).nonzero()[:, 0]
        near = near[doubt[near].argsort()][:SINGLES]
        change = masked[channel, near] - delta[channel, near]
        chosen = _making_up(float(missing[channel]), change, tolerance * float(size[channel]))
        flips[channel, near[chosen]] = True
    if not flips.any():
        return outputs
    shape = outputs.delta.transpose(0, 1).shape
    return outputs.flipped(flips.view(shape).transpose(0, 1))


def _making_up(missing: float, change: Tensor, tolerance: float) -> list[int]:
    """The first one, two or three of the changes (n,) whose sum is what is missing; none where none are."""
    fits = ((change - missing).abs() < tolerance).nonzero()
    if len(fits):
        return [int(fits[0])]
    some = change[:PAIRS]
    place = torch.arange(len(some), device=change.device)
    fits = ((some[:, None] + some - missing).abs() < tolerance) & (place[:, None] < place)
    if fits.any():
        return _earliest(fits)
    some, place = some[:TRIPLES], place[:TRIPLES]
    ordered = (place[:, None, None] < place[:, None]) & (place[:, None] < place)
    fits = ((some[:, None, None] + some[:, None] + some - missing).abs() < tolerance) & ordered
    return _earliest(fits) if fits.any() else []


def _earliest(fits: Tensor) -> list[int]:
    """The place, of those marked, whose indices have the least sum."""
    places = fits.nonzero()
    return places[places.sum(1).argmin()].tolist()


def for_other_noise(sources: list[Source], method: SolveMethod, budget: WorkBudget) -> Settled | None:
    """The masks for other noise than was measured that leave the least residual; None if there are no others."""
    best = None
    for factor in COARSER:
        budget.check()
        tried = [source.coarser(factor) for source in sources]
        if changes(sources, tried):
            u, solution = method.solve(tried)
            best = min(best or (u, solution, tried), (u, solution, tried), key=lambda found: found[1].residual)
    return best


def changes(before: Sequence[Source], after: Sequence[Source]) -> int:
    """Entries of the masks that differ."""
    return sum(int((old.above.delta != new.above.delta).sum()) for old, new in zip(before, after, strict=True))


def flip_gain(source: Source, u: Tensor) -> Tensor:
    """How much of the weighted squared residual each entry's flip explains at its best strength, (B, ...).

    A solution takes up most of what a wrong mask leaves, and with it the strength; the direction still shows. Zero for
    an entry that is far from doubtful or does not explain most of its channel's residual.
    """
    near = _near(source)
    if near is None:
        return torch.zeros_like(source.above.delta)
    rest = source.residual(u)
    squares = rest.flatten(1).square().sum(1)  # (c_out,)
    towards = source.map.with_weight(rest).outputs(u) * source.flip_direction()
    sizes = source.map.patch_sizes(u)
    share = towards.clamp(min=0).square() / (sizes * squares.view(source.columns)).clamp(min=1e-300)
    heard = squares * source.gradient_weights.flatten().square()
    return torch.where(near & (share > EXPLAINED), share * heard.view(source.columns), 0.0)


def _near(source: Source) -> Tensor | None:
    """Entries whose mask a residual may change; None where there are none, or no gradient to tell."""
    near = source.above.margin.abs() < RANGE
    return None if source.gradient is None or not near.any() else near


def _best_of_each_channel(gain: Tensor, least: float) -> Tensor:
    """The entry of each channel that explains most, where that is more than `least`: a mask (B, c, ...)."""
    most = gain.amax((0, *range(2, gain.dim())), keepdim=True)
    return (gain > least) & (gain == most)


def _squared_residual(sources: Sequence[Source], u: Tensor) -> float:
    """Of all equations at u, weighted."""
    return sum(float(rows.residual(u).square().sum()) for rows in rows_of(sources))
