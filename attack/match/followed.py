"""Matching of known activations, set up from the update: what stands below them, as the client ran it."""

from typing import NamedTuple

from torch import nn

from attack.local.closed_system import ClosedSystem
from attack.match.activations import ForwardLoss, ForwardMatching, course_for
from attack.match.below import TrainedBelow
from attack.match.common_scale import HELD, CommonScale
from attack.match.entries import observed
from attack.match.penalties import Penalty
from attack.match.phases import MEASURED_AT, UNITS, Course
from attack.prepare import Known
from network.chain import Moments, mixes_images, modules, with_moments
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

    Where BatchNorm mixes the batch, it has none either: they would not be those of images by themselves.
    """
    return _loss(update, model, known, *_as_trained(update, model, known))


def _loss(update: SharedUpdate, model: nn.Module, known: Known, chain: Chain, moments: Moments) -> ForwardLoss:
    mixes = bool(moments) or mixes_images(modules(chain))
    labels, below = known.labels[: len(known.inputs)], None
    if known.in_steps and known.start:
        deltas = ClosedSystem(update, model, known.start).deltas(known.inputs.double(), labels)
        below = TrainedBelow(update.training, deltas.to(**place_of(model)))
    return ForwardLoss(
        chain,
        update.image_shape,
        known.start,
        known.inputs.to(**place_of(model)),
        labels,
        update.gradients,
        known.uncertainty,
        uses_gradients=None if known.is_complete and not mixes else False,
        observed=observed(update, model),
        client_loss=update.training.loss.of_batch(labels),
        below=below,
    )


def followed(update: SharedUpdate, model: nn.Module, known: Known, prior_weight: float = MEASURED_AT) -> Followed:
    """For activations that are known of all images.

    BatchNorm in training mode has normalised the client's batch by statistics which the client shares or keeps. By
    shared ones it is an ordinary layer, and the images are found one by one; else the images are run together, and
    what such a layer hides of them is held, see `common_scale`.
    """
    chain, moments = _as_trained(update, model, known)
    below, loss = chain[: known.start], _loss(update, model, known, chain, moments)
    course = Course(()) if known.is_exact else course_for(below, loss, prior_weight)
    scale = CommonScale.of(below)
    penalties = [Penalty("scale", HELD * UNITS, scale)] if scale else []
    return Followed(ForwardMatching(loss, course), course, penalties, scale)


def _as_trained(update: SharedUpdate, model: nn.Module, known: Known) -> tuple[Chain, Moments]:
    """The model's chain with BatchNorm as it normalised the client's batch, and the moments by which it did so.

    There are none where the client keeps them, or where what was read says that they are of another batch.
    """
    is_believed = all(piece.topic != STATISTICS for piece in known.evidence)
    moments = update.batch_moments(model) if is_believed else {}
    return with_moments(stages(model), moments), moments
