"""Matching of known activations, set up from the update: what stands below them, as the client ran it."""

from typing import NamedTuple

from torch import nn

from attack.match.activations import ForwardLoss, ForwardMatching, course_for
from attack.match.common_scale import HELD, CommonScale
from attack.match.entries import observed
from attack.match.penalties import Penalty
from attack.match.phases import MEASURED_AT, UNITS, Course
from attack.prepare import Known
from network.chain import mixes_images, modules, with_moments
from network.stage import Chain
from network.tracing import stages
from network.zoo import place_of
from update.evidence import STATISTICS
from update.shared import SharedUpdate


class Followed(NamedTuple):
    """What takes the place of matched gradients: the matching, its course, further terms, and the scale left open."""

    matching: ForwardMatching
    course: Course
    penalties: list[Penalty]
    scale: CommonScale | None


def known_activations(update: SharedUpdate, model: nn.Module, known: Known) -> ForwardLoss:
    """What the attack lowers where the activations of all images are known; of some images it has no gradients.

    Where BatchNorm mixes the batch below, it has none either: they would not be those of images by themselves.
    """
    trained = stages(model)
    mixes = mixes_images(modules(trained[: known.start]))
    return ForwardLoss(
        [*_below(update, model, known), *trained[known.start :]],
        update.image_shape,
        known.start,
        known.inputs.to(**place_of(model)),
        known.labels[: len(known.inputs)],
        update.gradients,
        known.uncertainty,
        uses_gradients=None if known.is_complete and not mixes else False,
        observed=observed(update, model),
        client_loss=update.training.loss,
    )


def followed(update: SharedUpdate, model: nn.Module, known: Known, prior_weight: float = MEASURED_AT) -> Followed:
    """For activations that are known of all images.

    BatchNorm in training mode has normalised the client's batch by statistics which the client shares or keeps. By
    shared ones it is an ordinary layer, and the images are found one by one; else the images are run together, and
    what such a layer hides of them is held, see `common_scale`.
    """
    below, loss = _below(update, model, known), known_activations(update, model, known)
    course = Course(()) if known.is_exact else course_for(below, loss, prior_weight)
    scale = CommonScale.of(below)
    penalties = [Penalty("scale", HELD * UNITS, scale)] if scale else []
    return Followed(ForwardMatching(loss, course), course, penalties, scale)


def _below(update: SharedUpdate, model: nn.Module, known: Known) -> Chain:
    """The stages below the known activations, with BatchNorm as it normalised the client's batch.

    It is in the client's mode where the client keeps its statistics, or where what was read says that they are of
    another batch.
    """
    is_believed = all(piece.topic != STATISTICS for piece in known.evidence)
    return with_moments(stages(model)[: known.start], update.batch_moments(model) if is_believed else {})
