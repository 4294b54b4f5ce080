"""After the course: Gauss-Newton steps through hard kinks, without a prior, until nothing but rounding is left.

A course ends with softened kinks and a prior, and L-BFGS leaves a thousand times the residual of the true images. What
the true images leave is rounding, so the equations themselves, each as a residual of its own, have more to say:

    z(x) = a  for every image,        G(x) = G  of the layers whose delta no kink below the known activations touches.

The gradient of a layer further down jumps with every wrong mask above it, and a step through such jumps misleads. Of
the layers taken only the inputs depend on masks, and these have no jumps.

A step solves the linearised equations by conjugate gradients (`attack.solve.gauss_newton`), on pixels scaled by how
much the equations say of each: weakly seen pixels come last otherwise. It moves the images only if less is left.
Pixels of whole steps of 1/255 are tried after each step, and taken where they leave less than the pixels found, and
nothing but rounding: then the client's images had 8 bits, and these are they.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from attack.local.levels import nearest_levels
from attack.match.activations import ForwardLoss
from attack.match.astray import astray, begun_again, first_phases
from attack.match.phases import Course
from attack.optimise.budget import Annealing, Budget
from attack.optimise.pixels import PixelMap
from attack.optimise.state import AttackState
from attack.solve.budget import OutOfTimeError, WorkBudget
from attack.solve.cgls import Solution
from attack.solve.gauss_newton import Linearised, Tangent, gauss_newton
from network.chain import is_walked, mixes_images, modules
from network.kinds import kind_of
from network.memory import is_out_of_memory
from network.stage import Branched, Chain
from priors import Prior
from update.evidence import POLISH, Evidence

# What rounding to float32 leaves at most: expected relative errors of known activations up to which there is anything
# to polish, since beyond it the directions that equations hardly see fill with noise, and only a prior holds them; and
# what pixels of whole steps may leave of the equations.
ROUNDED = 2e-5

# Weight of an image's activations beside the gradients of layers, all relative to their own size. A trained ConvNet,
# B=4: activations settle first, and with a weight of 1 the steps go on with them.
ACTIVATIONS = 0.3

# Of conjugate gradients in the first step; each later one has twice as many. Images are not yet at their masks in early
# steps, and later ones gain by what conjugate gradients learn on the way.
ITERATIONS = 50
PROBES = 20  # random vectors by which it is estimated what the equations say of a pixel
FAINTEST = 0.03  # of what they say of pixels on average: no pixel is scaled as if they said less
SHARE = 0.5  # of the evaluations of the course that may be spent; an iteration takes a third to a half of one's time
EXACT = 1e-6  # of the equations: what the rounding of float32 leaves, and more
TRIED = 2  # steps after which images that were begun again are to leave less than those of the course
SETTLED = 0.99  # a step that leaves more than this share of what was left is the last
EDGE = 1e-6  # from black and white, which the box never reaches


def above_kinks(chain: Chain) -> list[str]:
    """Layers of the chain from which no kink is on the way to its end, by name."""
    return _above_kinks(chain)[0]


def _above_kinks(chain: Chain) -> tuple[list[str], bool]:
    """These layers, and whether there is no kink in the chain at all."""
    found: list[str] = []
    for stage in reversed(chain):
        if isinstance(stage.module, Branched):
            branches = [_above_kinks(branch) for branch in stage.module.branches]
            found += [name for names, _ in branches for name in names]
            if not all(is_smooth for _, is_smooth in branches):
                return found, False
        elif kind_of(stage.module).has_kink:
            return found, False
        else:
            found.append(stage.name)
    return found, True


def can_be_polished(chain: Chain, uncertainty: float) -> bool:
    """Whether a chain below activations of this relative error has equations that steps can follow.

    Which entries of a max-pool were the largest is not known, and images that BatchNorm mixes have no activations of
    their own.
    """
    kinds = [kind_of(module) for module in modules(chain)]
    is_plain = is_walked(chain) and not mixes_images(modules(chain)) and not any(kind.is_max_pool for kind in kinds)
    return is_plain and uncertainty <= ROUNDED


@dataclass(frozen=True)
class Equations:
    """What images leave of the equations, each relative to its right side, in float64; linearised in float32.

    Attributes:
        exact: known activations and gradients of layers, in float64.
        rough: the same in float32.
        scale: of pixels (B, C, H, W), in float32.
    """

    exact: ForwardLoss
    rough: ForwardLoss
    scale: Tensor
    is_positive: bool = False
    size: float = 1.0

    @classmethod
    def at(cls, exact: ForwardLoss, rough: ForwardLoss, images: Tensor) -> "Equations":
        """Pixels scaled by how much the equations say of each at these images (B, C, H, W)."""
        draw, told = torch.Generator().manual_seed(0), torch.zeros_like(images, dtype=torch.float32)
        plain = _linearised(rough, images, torch.ones_like(told))
        for _ in range(PROBES):
            told += plain.adjoint(torch.randn(sum(plain.counts), generator=draw).to(told)).square()
        return cls(exact, rough, (told / told.mean() + FAINTEST).rsqrt())

    def residual(self, x: Tensor) -> Tensor:
        """Flat."""
        return -_residual(self.exact, x)

    def linearised(self, x: Tensor) -> Linearised:
        """On x / scale."""
        return _linearised(self.rough, x, self.scale)

    def held(self, x: Tensor) -> Tensor:
        """Within black and white."""
        return x.clamp(0, 1)


def _residual(loss: ForwardLoss, images: Tensor) -> Tensor:
    with torch.enable_grad():  # the layers' gradients are taken
        return torch.cat([each.detach().flatten() for each in _weighed(loss, images)])


def _linearised(loss: ForwardLoss, images: Tensor, scale: Tensor) -> Linearised:
    return Linearised.of_values(Tangent(partial(_weighed, loss), images.float()), scale)


def _weighed(loss: ForwardLoss, images: Tensor) -> list[Tensor]:
    """The differences that images leave; activations, of which there are those of B images, with their weight."""
    activations, *gradients = loss.differences(images)
    return [ACTIVATIONS * math.sqrt(len(images)) * activations, *gradients]


@dataclass
class Polish:
    """The steps that follow a course.

    A checkpoint keeps in the state's phase how many were made: behind the course's phases there is one in which images
    that have gone astray are begun again, and one more for each step.

    Attributes:
        losses: of the images (B, C, H, W), in float64 and in float32.
        course: that comes before.
        prior: of images that are begun again.
        apart: how many of the state's leading images the equations leave out, since their pixels are known.
        left: what the images leave of the equations, before the first step and after each.
        again: the number of images that were begun again.
        is_whole: whether pixels of whole steps of 1/255 were taken.
        has_room: whether steps fit into memory.
        stopped: why no step follows; empty as long as one does.
    """

    losses: Callable[[], tuple[ForwardLoss, ForwardLoss]]
    course: Course
    prior: Prior
    apart: int = 0
    left: list[float] = field(default_factory=list)
    again: int = 0
    is_whole: bool = False
    has_room: bool = True
    stopped: str = ""
    clock: WorkBudget = field(default_factory=WorkBudget, init=False)

    @property
    def phase(self) -> int:
        """The first that is the polish's."""
        return len(self.course.phases)

    def is_on(self, state: AttackState) -> bool:
        """Whether the course is over."""
        return state.phase >= self.phase

    def step(self, state: AttackState, pixels: PixelMap, budget: Budget) -> None:
        """Move the state's images by one step, or find in `stopped` why there is none."""
        state.step += 1
        ends = math.inf if budget.max_seconds is None else time.perf_counter() + budget.max_seconds - state.seconds
        self.clock = WorkBudget(deadline=ends)
        try:
            self._step(state, pixels, budget)
        except OutOfTimeError:
            self.stopped = "max_seconds"
        except (MemoryError, RuntimeError) as error:  # the course's images are there, whatever a step would need
            if not is_out_of_memory(error):
                raise
            self.stopped, self.has_room = "course", False

    def _step(self, state: AttackState, pixels: PixelMap, budget: Budget) -> None:
        """As `step`, which deals with what there is no room for."""
        self.left = self.left or [self._left(self._images(state, pixels))]
        if self.left[-1] < EXACT:
            self.stopped = "course"
            return
        if state.phase == self.phase:
            is_better = self._begin_again(state, pixels, budget)
            state.enter(self.phase + 1 + (TRIED if is_better else 0))
            if is_better:
                return
        self._move(state, pixels, budget)

    def _begin_again(self, state: AttackState, pixels: PixelMap, budget: Budget) -> bool:
        """Begin images astray again alone, and move to where first steps of all lead from there, if it leaves less."""
        loss, images = self.losses()[1], self._images(state, pixels)
        which, course = astray(loss, images), first_phases(self.course)
        if not which or _bound(budget) < state.evaluations + course.evaluations + _cost(TRIED):
            return False
        found, spent = begun_again(loss.alone(which, images), course, self.prior, pixels, state, self.clock)
        state.evaluations += spent
        x = images.double()
        x[which] = found.double()
        for made in range(TRIED):
            x = self._moved(x, ITERATIONS << made, state).x
        is_better = self._take(x, state, pixels)
        self.again = len(which) if is_better else 0
        return is_better

    def _move(self, state: AttackState, pixels: PixelMap, budget: Budget) -> None:
        """Move the state by a step, unless no evaluations are left for one."""
        made = state.phase - self.phase - 1
        most, bound = (1 + SHARE) * (state.evaluations - _cost(made)), _bound(budget)
        room = int(min(most, bound) - state.evaluations) - PROBES
        if room < ITERATIONS // 2:
            self.stopped = "course" if most <= bound else "max_evals"
            return
        x, before = self._images(state, pixels).double(), self.left[-1]
        found = self._moved(x, min(room, ITERATIONS << made), state)
        whole = nearest_levels(found.x)
        is_whole = self._left(whole) < min(found.residual, ROUNDED)
        is_better = self._take(whole if is_whole else found.x, state, pixels)
        self.is_whole = is_whole and is_better
        if is_whole or self.left[-1] > SETTLED * before:
            self.stopped = "course"
        state.enter(state.phase + 1)

    def _moved(self, x: Tensor, iterations: int, state: AttackState) -> Solution:
        """Where a step of so many iterations leads."""
        found = gauss_newton(Equations.at(*self.losses(), x), x, budget=self.clock, inner=iterations, steps=1)
        state.evaluations += PROBES + found.iterations
        return found

    def _take(self, x: Tensor, state: AttackState, pixels: PixelMap) -> bool:
        """Move the state to images, if they leave less; whether they do."""
        z = pixels.encode(x.to(state.z), EDGE)
        left = self._left(pixels.decode(z))
        is_better = left < self.left[-1]
        if is_better:
            with torch.no_grad():
                state.z[self.apart :].copy_(z)
        self.left.append(min(left, self.left[-1]))
        return is_better

    def _images(self, state: AttackState, pixels: PixelMap) -> Tensor:
        """The state's images that have a part in the equations."""
        return pixels.decode(state.z.detach()[self.apart :])

    def _left(self, images: Tensor) -> float:
        """What images leave of the equations."""
        exact, _ = self.losses()
        return float(_residual(exact, images.double()).norm())

    @property
    def evidence(self) -> list[Evidence]:
        """A word on what the steps have brought; none where none was made."""
        if not self.has_room:
            return [Evidence(POLISH, "the steps after the course did not fit into memory")]
        if len(self.left) < 2:
            return []
        said = f"pictures leave {self.left[-1]:.1e} of known activations and gradients, {self.left[0]:.1e} before the "
        said += f"last {len(self.left) - 1} steps, by Gauss-Newton"
        said += f"; images begun again alone before these: {self.again}" if self.again else ""
        said += "; pixels of whole steps of 1/255 leave the least" if self.is_whole else ""
        return [Evidence(POLISH, said, self.left[-1])]


def _cost(steps: int) -> int:
    """Evaluations of the first steps."""
    return steps * PROBES + ITERATIONS * ((1 << steps) - 1)


def _bound(budget: Budget) -> float:
    """On evaluations."""
    return math.inf if budget.max_evals is None else budget.max_evals


def why_over(state: AttackState, course: Course | Annealing, polish: Polish | None, budget: Budget) -> str | None:
    """The reason why the attack is over, or None. A course that is over is followed by the polish, if there is one."""
    is_on = polish is not None and polish.is_on(state)
    over = polish.stopped if is_on else course.ended(state.spent, state.gain)
    if over == "course" and polish is not None and not is_on and state.copies == 1:
        state.enter(polish.phase)
        over = None
    return over or state.ended(budget)
