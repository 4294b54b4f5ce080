"""Images that have gone astray in a course, begun again after it, alone.

A course fits all images at once. One that moves the update little is drowned in the gradients by what is left of the
others' errors, and may end in a wrong place. Its own error then stands in the gradients for all, and steps of
Gauss-Newton lead no further. With the others found, the part that they have in the gradients can be taken off, and the
first phases of the course lead it from grey to its place.
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

# An image is astray that leaves so many times as much of its activations, relative to their size, as the median image.
# In two batches of 8 from a trained ConvNet one that ends a course at 24.5 dB leaves 8.4 times as much and one at 29.7
# dB 2.9 times, others 1.2 at most; in a batch of 4, all of them right, it is 1.4 at most.
ASTRAY = 2.0

PHASES = 2  # of the course; a third loses what was won, as it fits what is left of the others' errors


def astray(loss: ForwardLoss, images: Tensor) -> list[int]:
    """Those of the images (B, C, H, W) that have gone astray, by index."""
    if loss.below is not None:
        return []
    off, known = loss.differences(images)[0].detach(), loss.inputs
    left = off.flatten(1).norm(dim=1) / known.flatten(1).norm(dim=1)
    return (left > ASTRAY * left.median()).nonzero().flatten().tolist()


def first_phases(course: Course) -> Course:
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
