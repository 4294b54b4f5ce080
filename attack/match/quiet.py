"""Images that move an update little, begun again after a course, alone.

A course fits all images at once, and what is left of the others' errors in the gradients drowns a quiet image. It ends
in a wrong place, or nearly there in later phases, which fit these errors with it. Its own error then stands in the
gradients for all, and steps of Gauss-Newton lead no further. With the others found, the part that they have in the
gradients can be taken off, and the first phases of the course lead the quiet ones from grey to their places.
"""

from dataclasses import replace

import torch
from torch import Tensor

from attack.match.activations import ForwardLoss, ForwardMatching
from attack.match.phases import Course
from attack.optimise.budget import Budget
from attack.optimise.pixels import PixelMap
from attack.optimise.state import AttackState
from attack.solve.budget import WorkBudget
from priors import Prior

# The length of an image's delta over that of the loudest, up to which an image is quiet. In two batches of 8 from a
# trained ConvNet it is 0.03 to 0.15 for five images, which end their courses at 24.5 to 33 dB, and 0.5 to 1 for the
# others, which end at 41 to 50 dB. What activations leave, image by image, tells only two of the five.
QUIET = 0.3

PHASES = 2  # of the course; a third loses what was won, as it fits what is left of the others' errors


def quiet(loss: ForwardLoss) -> list[int]:
    """The quiet ones among the images, by index."""
    if loss.below is not None:
        return []
    loudness = loss.delta.flatten(1).norm(dim=1)
    return (loudness < QUIET * loudness.max()).nonzero().flatten().tolist()


def shortened(course: Course) -> Course:
    """Its phases through which images are begun again."""
    return replace(course, phases=course.phases[:PHASES])


def begun_again(
    loss: ForwardLoss, course: Course, prior: Prior, pixels: PixelMap, state: AttackState, clock: WorkBudget
) -> tuple[Tensor, int]:
    """Images (B, C, H, W) through a course from grey, with the optimiser of an attack's state, and the evaluations.

    No more are made than the course has.

    Raises:
        OutOfTimeError: the clock has run out.
    """
    variables = {"z": pixels.encode(loss.grey), "label_variables": loss.grey.new_zeros(len(loss.grey), 0)}
    alone = AttackState(**variables, generator=torch.Generator(), optimiser=state.optimiser)
    matching, budget = ForwardMatching(loss, course), Budget(course.evaluations, course.evaluations)

    def objective() -> Tensor:
        images = pixels.decode(alone.z)
        return matching(images, alone.label_logits, alone.subset).total + alone.prior_weight * prior(images)

    while not alone.ended(budget):
        clock.check()
        alone.enter(course.phase(alone.evaluations))
        alone.weigh(course.at(alone.evaluations))
        matching.enter(alone.phase, pixels.decode(alone.anchor))
        alone.minimise(objective, budget)
        pixels.project_(alone.z)
    return pixels.decode(alone.z.detach()), alone.evaluations
