"""The course of an attack from known activations: hardness of the kinks and weight of the prior, phase by phase."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from network.chain import modules
from network.kinds import kind_of
from network.stage import Chain

# L-BFGS drops pairs whose curvature y.s is below 1e-10. Exact activations bring the relative loss down to 1e-8, and the
# curvature of pairs falls likewise. So the loss is multiplied by UNITS.
UNITS = 1e5

# The weight of the prior (--tv_weight) at which the phases' weights were measured. Another --tv_weight scales them.
MEASURED_AT = 4e-3


@dataclass(frozen=True)
class Phase:
    """So many evaluations with one hardness of the kinks and one weight of the prior.

    Attributes:
        evaluations: closure evaluations, at least in the last phase, in others at most.
        prior_weight: of the prior.
        hardness: beta times the root mean square of the values that enter a kink; infinite: no softening.
        width: within which an entry may be the largest of its window, relative to the known outputs' root mean square,
            see `maxima`; 0: kinks are softened.
    """

    evaluations: int
    prior_weight: float
    hardness: float = math.inf
    width: float = 0.0


# ReLUs only. Measured on the trained ConvNet. A start that is softer, with a tenth of the prior, ends 8 dB lower.
RECTIFIED = (
    Phase(100, 2e-3, 20),
    Phase(200, 2e-4, 20),
    Phase(300, 2e-5, 60),
    Phase(400, 2e-6, 200),
    Phase(600, 2e-7, 800),
)

# A max-pool below the known layer. The largest entry of each window must be found while the maximum is still nearly a
# mean, under a prior that holds everything else. From the hardness of RECTIFIED on, the ResNet-18 stem ends at 20 dB.
POOLED = (
    Phase(60, 3.0, 0.7),
    Phase(80, 1.0, 1.5),
    Phase(100, 3e-1, 3),
    Phase(100, 1e-1, 6),
    Phase(100, 3e-2, 12),
    Phase(100, 1e-2, 30),
    Phase(100, 3e-3, 80),
)

# Where a course below a max-pool begins with pictures (`attack.opening`): what softer phases find is in them.
BEGUN = 12

# The same, once its largest entries are nearly found: their windows are matched, with the gradient of the layer below.
ASSIGNED = (
    Phase(100, 1e-3, width=0.15),
    Phase(100, 3e-4, width=0.08),
    Phase(100, 1e-4, width=0.04),
    Phase(100, 3e-5, width=0.02),
    Phase(100, 1e-5, width=0.01),
    Phase(100, 3e-6, width=0.005),
)

# The last phase goes on until a hundred evaluations lower the objective by less than this share of it. LeNet, 48
# images: 27.6 dB after 550 evaluations, 28.8 after 1,158, where a hundred still lower it by 0.8 %, and 29.7 after
# 2,046, where they lower it by 0.25 %. Behind kinks the objective falls for longer than pictures gain: a trained
# ResNet-18, 4 images, has 38.4 dB after 1,287 evaluations, 39.2 where a hundred lower it by 4 %, and 38.8 by 0.8 %.
GAIN = 1e-3
GAIN_BEHIND_KINKS = 0.05

# Sigmoid and tanh have no kinks. Under a heavier prior images come sooner: LeNet, 48 images, has 29.4 dB after 1,196
# evaluations, and 28.8 where the third phase has 150.
SMOOTH = (Phase(50, 5e-2), Phase(100, 5e-3), Phase(450, 5e-4), Phase(300, 5e-5))


def max_pools(chain: Chain) -> int:
    """The number of max-pools in the chain."""
    return sum(kind_of(module).is_max_pool for module in modules(chain))


def is_pooled(chain: Chain) -> bool:
    """Whether a max-pool is in the chain."""
    return max_pools(chain) > 0


def is_kinked(chain: Chain) -> bool:
    """Whether a ReLU, a max-pool or the like is in the chain."""
    return any(kind_of(module).has_kink for module in modules(chain))


def phases_for(chain: Chain, *, is_begun: bool = False) -> tuple[Phase, ...]:
    """The phases for the stages between images and the known activations, or what is left of them of a course that
    begins with pictures."""
    if is_pooled(chain):
        return tuple(phase for phase in POOLED if phase.hardness >= BEGUN or not is_begun)
    return RECTIFIED if is_kinked(chain) else SMOOTH


def least_gain_for(chain: Chain) -> float:
    """The relative decrease of the objective down to which the last phase goes on."""
    return GAIN_BEHIND_KINKS if is_kinked(chain) else GAIN


@dataclass(frozen=True)
class Course:
    """Hardness of the kinks and weight of the prior, phase by phase, over an attack's closure evaluations.

    The last phase goes on for as long as the objective still falls. A course without phases is over at once: the images
    are exact, nothing is left to be optimised.

    Attributes:
        phases: in their order.
        least: lower bound on the prior's weight, set by the noise in the known activations.
        scale: factor of the phases' weights of the prior.
        least_gain: of the objective, down to which the last phase goes on.
    """

    phases: Sequence[Phase]
    least: float = 0.0
    scale: float = 1.0
    least_gain: float = GAIN

    @property
    def evaluations(self) -> int:
        """Of all phases."""
        return sum(phase.evaluations for phase in self.phases)

    def shortened(self, share: float) -> "Course":
        """The same phases, each with this share of its evaluations."""
        phases = (replace(phase, evaluations=math.ceil(share * phase.evaluations)) for phase in self.phases)
        return replace(self, phases=tuple(phases))

    @property
    def weight(self) -> float:
        """The prior's weight at the start, relative to that of the activations."""
        return self.scale * self.phases[0].prior_weight if self.phases else 0.0

    def phase(self, evaluations: float) -> int:
        """The index of the phase after so many evaluations; the last one stays."""
        ends = itertools.accumulate(phase.evaluations for phase in self.phases)
        return min(sum(evaluations >= end for end in ends), len(self.phases) - 1)

    def at(self, evaluations: float) -> float:
        """The prior's weight after so many evaluations, in the units of `ForwardMatching`."""
        return UNITS * max(self.least, self.scale * self.phases[self.phase(evaluations)].prior_weight)

    def ended(self, evaluations: float, gain: float) -> str | None:
        """The reason why the attack has ended: `course`, `exact` where there was nothing to do, or None.

        Args:
            evaluations: so far.
            gain: the objective's recent relative decrease, see `attack.optimise.state.AttackState.gain`.
        """
        if not self.phases:
            return "exact"
        is_through = evaluations >= self.evaluations
        return "course" if is_through and gain < self.least_gain else None
