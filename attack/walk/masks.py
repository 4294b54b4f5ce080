"""Which entries of a ReLU were active: masks that noise leaves in doubt are decided by the gradient's residual.

One wrong mask adds or lacks one delta times one patch in one channel of the gradient. Masks are decided in two steps.
First, channels that hold a doubtful entry are left out, and at that solution the residual of these channels decides.
Then single entries are changed that explain a notable share of all that is left: a wrong mask of a faint image leaves
no more than noise may leave, but it leaves it in one channel and one direction.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attack.solve.budget import WorkBudget
from attack.solve.cgls import Solution
from attack.walk.methods import SolveMethod, rows_of
from attack.walk.sources import LayerSource, Source, by_channel
from network.known_outputs import RANGE

GAIN = 0.2  # share of a channel's squared residual that changing one entry of a mask must take away
STANDS_OUT = 10.0  # a channel whose residual is so many times the median has a wrong mask
EXPLAINED = 0.5  # share of a channel's squared residual that one entry must explain to be changed by itself
NOTABLE = 0.03  # share of all the squared residual that it must explain where noise might have left as much
SINGLE_FLIPS = 16  # times that such entries are changed
COARSER = (4.0, 16.0, 64.0, 0.4)  # times the noise that masks are tried for where the residual contradicts them
ROUNDS = 4  # of deciding masks and solving again

Settled = tuple[Tensor, Solution, list[Source]]  # an input, the solver's word, and the sources with their masks


def settle(sources: list[Source], method: SolveMethod, enough: float, budget: WorkBudget) -> Settled:
    """Solve; where the residual is more than enough, let it decide the doubtful masks, and solve again."""
    u, solution = method.solve(sources)
    if solution.residual < enough:
        return change_single_masks((u, solution, sources), method, enough, budget)
    best = u, solution, sources
    trial = method.solve([source.cautious() for source in sources])[0] if method.is_linear else u
    for _ in range(ROUNDS):
        budget.check()
        decided = [source.flipped(flips_at(source, trial)) for source in sources]
        if not changes(sources, decided):
            break
        sources = decided
        u, solution = method.solve(sources)
        if solution.residual < best[1].residual:
            best = u, solution, sources
        if solution.residual < enough:
            break
        trial, _ = method.solve([_without_outliers(source, u) for source in sources])
    return change_single_masks(best, method, enough, budget)


def change_single_masks(found: Settled, method: SolveMethod, enough: float, budget: WorkBudget) -> Settled:
    """Change the entries whose masks explain most of the residual and solve again, as long as that helps."""
    u, solution, sources = found
    for _ in range(SINGLE_FLIPS):
        budget.check()
        if solution.residual < enough and not method.is_linear:
            break
        least = NOTABLE * _squared_residual(sources, u) if solution.residual < enough else 0.0
        gains = [flip_gain(source, u) for source in sources]
        most = max(float(each.max()) for each in gains)
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


def flips_at(source: Source, u: Tensor) -> Tensor:
    """Where the gradient's residual at u asks for another mask: (B, ...), at most `ROUNDS` entries a channel.

    With S = <patch, r> and |patch|^2 at every place, a flip of delta d lowers |r|^2 by 2 d S - d^2 |patch|^2.
    """
    flips = torch.zeros_like(source.above.known)
    near = _near(source)
    if near is None:
        return flips
    patches = _patch_sizes(source, u)
    for _ in range(ROUNDS):
        rest = source.residual(u)
        squares = rest.flatten(1).square().sum(1)  # (c_out,)
        change = source.above.masked_delta - source.above.delta
        gain = 2 * change * source.map.with_weight(rest).outputs(u) - change.square() * patches
        gain = torch.where(near & stands_out(squares).view(source.columns), gain, -torch.inf)
        best = by_channel(gain).max(1).values  # (c_out,)
        worth = torch.where(best > GAIN * squares, best, torch.inf)
        chosen = gain == worth.view(source.columns)
        if not chosen.any():
            break
        source, flips = source.flipped(chosen), flips ^ chosen
    return flips


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
    sign = (source.above.masked_delta - source.above.delta).sign()
    towards = source.map.with_weight(rest).outputs(u) * sign
    share = towards.clamp(min=0).square() / (_patch_sizes(source, u) * squares.view(source.columns)).clamp(min=1e-300)
    heard = squares * source.gradient_weights().flatten().square()
    return torch.where(near & (share > EXPLAINED), share * heard.view(source.columns), 0.0)


def stands_out(squares: Tensor) -> Tensor:
    """Which channels' squared residuals (c,) are far above the others'."""
    return squares > STANDS_OUT**2 * squares.median()


def _near(source: Source) -> Tensor | None:
    """Entries whose mask a residual may change; None where there are none, or no gradient to tell."""
    near = source.above.margin.abs() < RANGE
    return None if source.gradient is None or not near.any() else near


def _patch_sizes(source: LayerSource, u: Tensor) -> Tensor:
    """|patch|^2 at every place of the output, (B, 1, ...)."""
    return source.map.with_weight(torch.ones_like(source.map.weight[:1])).outputs(u.square())


def _without_outliers(source: Source, u: Tensor) -> Source:
    """Without the channels whose gradient stands out at u."""
    if source.gradient is None:
        return source
    return source.without_outliers(stands_out(source.residual(u).flatten(1).square().sum(1)))


def _best_of_each_channel(gain: Tensor, least: float) -> Tensor:
    """The entry of each channel that explains most, where that is more than `least`: a mask (B, c, ...)."""
    most = gain.amax((0, *range(2, gain.dim())), keepdim=True)
    return (gain > least) & (gain == most)


def _squared_residual(sources: Sequence[Source], u: Tensor) -> float:
    """Of all equations at u, weighted."""
    return sum(float(rows.residual(u).square().sum()) for rows in rows_of(sources))
