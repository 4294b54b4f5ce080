"""One layer's input: solved, tested, and believed or not."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attack.solve.budget import WorkBudget
from attack.solve.cgls import Solution
from attack.walk.block import SETTLED_NOISE
from attack.walk.masks import changes, for_other_noise, settle
from attack.walk.methods import SolveMethod
from attack.walk.noise import at_least, noise_of, size_of
from attack.walk.sources import Source
from network.known_outputs import KnownOutputs

DETERMINED = 1e-2  # relative error of the recovery test up to which a layer counts as determined
TOO_WEAK = 0.1  # share of the images that may be too weak to be believed: their pictures suffer, all others gain
TRUSTED = 1e-3  # relative residual beyond which equations are wrong, unless noise explains it
# Times what the recovery test says. It draws the errors of known outputs entry by entry; those of outputs that were
# solved for lie in few directions, and move more. The inputs of a LeNet's `conv2`, and then of `conv1`, were off by 1.8
# and 3.7 times what the test says, and by 0.8 and 1.5 times what is claimed now, at most.
TOGETHER = 2.0
CONTRADICTED = 3.0  # units of the gradient's own noise beyond which noise does not explain a residual


@dataclass(frozen=True)
class Record:
    """What became of one layer's inputs.

    Attributes:
        name: of the layer, or of the residual stage.
        reason: why its inputs are not believed; empty if they are.
        equations, unknowns: how many, over the batch.
        residual: |A u - b| / |b|, rows weighted by one over their noise.
        noise: (B,) each image's relative error as far as it shows; of images that are too weak it says little.
        flips: entries of masks that the residual decided otherwise.
        too_weak: (B,) images that are not believed here.
        iterations: of the last solve.
        seconds: wall time.
    """

    name: str
    reason: str = ""
    equations: int = 0
    unknowns: int = 0
    residual: float = math.nan
    noise: Tensor = field(default_factory=lambda: torch.zeros(0))
    flips: int = 0
    too_weak: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    iterations: int = 0
    seconds: float = 0.0

    @property
    def determined(self) -> bool:
        """Whether its inputs are believed."""
        return not self.reason


@dataclass(frozen=True)
class SolvedLayer:
    """A layer's input u (B, ...), the standard deviation of its errors, and the sources with their masks as decided.

    There is no `u` where the record says that the input is not believed.
    """

    record: Record
    u: Tensor | None = None
    noise: Tensor | None = None
    sources: tuple[Source, ...] = ()

    @property
    def outputs(self) -> KnownOutputs:
        """What is known of the outputs of the stage below."""
        return KnownOutputs.of(self.u, sum(source.delta(self.u) for source in self.sources), self.noise)


@dataclass(frozen=True)
class LayerSolver:
    """What the solution of every layer of a walk has in common.

    Attributes:
        budget: whose clock is asked.
        too_weak: (B,) images that were not believed further up.
        needs_all: whether none may be too weak, as for pixels.
    """

    budget: WorkBudget
    too_weak: Tensor
    needs_all: bool

    def solve(
        self,
        name: str,
        sources: list[Source],
        method: SolveMethod,
        *,
        is_after_relu: bool,
        settled: Callable[[], list[Source]] | None = None,
    ) -> SolvedLayer:
        """The input that all sources agree on, and whether it is believed.

        Two figures decide: the recovery test, in which a known random input must come back, and the residual, which
        must be noise.

        Args:
            name: of the layer or residual stage.
            sources: what says something of the input.
            method: how it is found.
            is_after_relu: whether it is never negative.
            settled: the sources as they are once what the input itself moves in them is known.

        Raises:
            OutOfTimeError: the budget's clock has run out.
        """
        began = time.perf_counter()
        record = Record(name, equations=method.count(sources), unknowns=method.unknowns, too_weak=self.too_weak)

        def ended(reason: str, **facts: object) -> Record:
            return replace(record, reason=reason, seconds=time.perf_counter() - began, **facts)

        if record.equations < method.room * record.unknowns:
            few = f"{record.equations} equations for {record.unknowns} unknowns"
            return SolvedLayer(ended(few if method.room == 1.0 else f"{few}: behind such a norm {method.room:g} times"))
        noise = method.noise(sources)
        error = method.recovery_test(sources, noise) if method.is_linear else None
        too_weak = self.too_weak if error is None else self._weakened(self.too_weak, error)
        if too_weak is None:
            return SolvedLayer(ended(_comes_back(error)))
        sources = sources if settled is None else settled()
        u, solution, decided = self._solved(sources, method, SETTLED_NOISE * noise)
        flips = changes(sources, decided)
        if error is None:
            error = method.recovery_test(decided, max(noise, solution.residual))
        else:  # the equations are linear, and so are errors in noise
            error = error * max(1.0, solution.residual / noise)
        spread = method.spread(decided, u, solution, error)
        if not is_after_relu:  # behind a ReLU errors show below zero
            spread = at_least(TOGETHER * error.to(u), spread, u)
        spread = noise_of(u, spread, is_after_relu=is_after_relu)
        errors = (size_of(spread) / size_of(u)).cpu()
        facts = {"residual": solution.residual, "noise": errors, "flips": flips, "iterations": solution.iterations}
        if (too_weak := self._weakened(too_weak, error)) is None:
            return SolvedLayer(ended(_comes_back(error), **facts))
        if not solution.residual < self._most(method, noise):
            return SolvedLayer(ended(f"its equations contradict each other by {solution.residual:.1e}", **facts))
        if (too_weak := self._weakened(too_weak, errors)) is None:
            return SolvedLayer(ended(f"it came out with an error of {float(errors.max()):.1e} of its size", **facts))
        return SolvedLayer(ended("", too_weak=too_weak, **facts), u, spread, tuple(decided))

    def _solved(
        self, sources: list[Source], method: SolveMethod, enough: float
    ) -> tuple[Tensor, Solution, list[Source]]:
        """With the masks that leave the least residual."""
        found = settle(sources, method, enough, self.budget)
        if not found[1].residual < enough and method.tries_noise:
            other = for_other_noise(sources, method, self.budget)
            if other is not None and other[1].residual < found[1].residual:
                found = settle(other[2], method, enough, self.budget)
        return found

    def _most(self, method: SolveMethod, noise: float) -> float:
        """The residual that may be left."""
        return max(TRUSTED, CONTRADICTED * noise) if method.is_linear else max(method.least, SETTLED_NOISE * noise)

    def _weakened(self, too_weak: Tensor, error: Tensor) -> Tensor | None:
        """These images (B,) and those that relative errors (B,) show to be too weak; None where that is too many."""
        both = too_weak | ~(error < DETERMINED).cpu()
        return None if int(both.sum()) > (0 if self.needs_all else TOO_WEAK * len(both)) else both


def _comes_back(error: Tensor) -> str:
    return f"a known input comes back with a relative error of {float(error.max()):.1e} only"
