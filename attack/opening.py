"""Where a course below a max-pool begins: half-way between the pictures of two short ones.

Such a course ends where a few windows of the pool, and kinks above it, are decided wrongly. Two courses that begin
elsewhere go wrong elsewhere. Where they agree they are mostly right; half-way between them nothing is decided that is
in doubt, and the last phases decide it anew, with all that is right around it. Known inputs of three stages of a
trained ResNet-18, the deepest last:

    one course, from grey    31.9    22.0    18.3 dB    after   642   684   749 evaluations
    from between two         35.7    23.2    19.1               816   841   869 in all

The first course begins with grey images. The second begins with a linear estimate (`attack.match.estimate`), or where
there is none with the pictures of the first, softened again. Pictures that are there already take the place of the
first course.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from attack.match.estimate import estimated_pictures
from attack.match.followed import known_activations
from attack.match.phases import is_pooled
from attack.prepare import Known
from network.tracing import stages
from update.shared import SharedUpdate

SHARE = 0.5  # of a course's evaluations, that either of the two has: with a quarter photographs turn black at first


def is_opened(model: nn.Module, known: Known) -> bool:
    """Whether a course on what is known of all images goes through a max-pool."""
    is_free = known.is_followed and not known.is_exact and not known.held
    return is_free and is_pooled(stages(model)[: known.start])


def opened(
    update: SharedUpdate,
    model: nn.Module,
    known: Known,
    course: Callable[..., Tensor],
    generator: torch.Generator,
) -> Known:
    """What is known, with the pictures that its course begins with.

    Args:
        update: as it was shared.
        model: that it was computed on.
        known: what was read of it, of which `is_opened` is true.
        course: pictures (B, C, H, W) by what is known, after a share of its course; of all phases where `is_whole`, and
            else of those that are left where it begins with pictures.
        generator: of random images, on the CPU.
    """
    first, second = known.likely, None
    if first is None:
        first = course(known, SHARE)
        second = estimated_pictures(known_activations(update, model, known), generator)
    is_whole = second is None
    other = course(replace(known, likely=first if is_whole else second), SHARE, is_whole=is_whole)
    return replace(known, likely=(0.5 * (first.to(other) + other)).double().cpu())
