"""Matching of known activations, set up from the update: what stands below them, as the client ran it."""

import copy
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from torch import Tensor, nn

from attack.local.closed_system import ClosedSystem
from attack.local.passes import as_one_pass
from attack.match.activations import ForwardLoss, ForwardMatching, course_for
from attack.match.below import TrainedBelow
from attack.match.common_scale import HELD, CommonScale
from attack.match.entries import observed
from attack.match.maxima import Maxima
from attack.match.penalties import MomentsLoss, Penalty
from attack.match.phases import MEASURED_AT, UNITS, Course
from attack.match.polish import Polish, above_kinks, can_be_polished
from attack.match.rest import without_known
from attack.prepare import Known
from network.chain import Moments, modules, with_moments
from network.tracing import stages
from network.zoo import place_of
from priors import Prior
from update.evidence import STATISTICS
from update.shared import SharedUpdate

# Weight of shared moments' squared relative errors beside the activations'. A small net of which the head's inputs are
# known ends at 38 dB with 1, 27 with 0.1, 28 with 0.01; with the common scale held beside it, 69 with 1, 26 without.
MOMENTS = 1.0


class Followed(NamedTuple):
    """What takes the place of matched gradients.

    These are the matching, its course, further terms, the scale left open, and the steps after the course.
    """

    matching: ForwardMatching
    course: Course
    penalties: list[Penalty]
    scale: CommonScale | None
    polish: Polish | None


def known_activations(update: SharedUpdate, model: nn.Module, known: Known) -> ForwardLoss:
    """What the attack lowers where the activations of all images are known; of some images it has no gradients."""
    return _loss(update, model, known, _moments(update, model, known))


def _loss(
    update: SharedUpdate, model: nn.Module, known: Known, moments: Moments, only: Mapping[str, Tensor] | None = None
) -> ForwardLoss:
    """The loss, with the gradients that it needs, or with `only` these."""
    chain, labels, below = stages(model), known.labels[: len(known.inputs)], None
    if known.uses:
        update, labels = as_one_pass(update), known.labels[list(known.uses)]
    if known.in_steps and known.start:
        deltas = ClosedSystem(update, model, known.start).deltas(known.inputs.double(), labels)
        below = TrainedBelow(update.training, deltas.to(**place_of(model)))
    return ForwardLoss(
        chain,
        update.image_shape,
        known.start,
        known.inputs.to(**place_of(model)),
        labels,
        update.gradients if only is None else only,
        known.uncertainty,
        doubt=known.uncertainty_at(chain[known.start]),
        uses_gradients=only is not None or (None if known.is_complete else False),
        observed=observed(update, model),
        client_loss=update.training.loss.of_batch(labels),
        below=below,
        uses=known.uses,
        moments=moments,
    )


def followed(
    update: SharedUpdate, model: nn.Module, known: Known, prior: Prior, prior_weight: float = MEASURED_AT
) -> Followed:
    """For activations that are known of all images.

    BatchNorm in training mode has normalised the client's batch by statistics which the client shares or keeps. By
    shared ones it is an ordinary layer, and the images are found one by one; else the images are run together, and
    what such a layer hides of them is held, see `common_scale`. Where gradients are matched too, the images are run
    together in any case, since the client's gradients mix them, and shared statistics are a term of their own.

    Leading images whose pixels are known have no part in it: it is all of the others alone.
    """
    apart = known.apart
    update, known = without_known(update, model, known)
    moments = _moments(update, model, known)
    loss = _loss(update, model, known, moments)
    below, penalties = stages(model)[: known.start], []
    if moments and loss.weights:
        penalties = [Penalty("statistics", MOMENTS * UNITS, MomentsLoss(below, moments))]
    below = below if loss.weights else with_moments(below, moments)
    maxima = None if known.is_exact else _maxima(update, model, known, loss, moments)
    course = Course(())
    if not known.is_exact:
        course = course_for(below, loss, prior_weight, maxima, is_begun=known.likely is not None)
    scale = CommonScale.of(below, moments)
    penalties += [Penalty("scale", HELD * UNITS, scale)] if scale else []
    polish = _polish(update, model, known, loss, course, prior, apart)
    return Followed(ForwardMatching(loss, course, maxima), course, penalties, None if moments else scale, polish)


def _polish(
    update: SharedUpdate,
    model: nn.Module,
    known: Known,
    loss: ForwardLoss,
    course: Course,
    prior: Prior,
    apart: int,
) -> Polish | None:
    """Steps after a course; None where they have nothing to go by."""
    chain = stages(model)
    is_whole = known.is_complete and not known.uses and observed(update, model).is_whole
    if not course.phases or not is_whole or not can_be_polished(loss.chain, known.uncertainty_at(chain[known.start])):
        return None
    named = {f"{name}.weight" for name in above_kinks(loss.chain)}
    only = {name: sent for name, sent in update.gradients.items() if name in named}

    @cache
    def losses() -> tuple[ForwardLoss, ForwardLoss]:
        return tuple(_loss(update, each, known, {}, only) for each in (copy.deepcopy(model).double(), model))

    return Polish(losses, course, prior, apart)


def _maxima(update: SharedUpdate, model: nn.Module, known: Known, loss: ForwardLoss, moments: Moments) -> Maxima | None:
    """What a max-pool says whose outputs are known; None where there is none, or the update is not whole."""
    if not known.is_complete or known.uses or not observed(update, model).is_whole:
        return None
    outputs, chain = known.inputs.to(**place_of(model)), stages(model)
    facts = (update.gradients, update.image_shape, known.uncertainty_at(chain[known.start]))
    return Maxima.of(chain[: known.start], outputs, loss.delta, *facts, moments)


def _moments(update: SharedUpdate, model: nn.Module, known: Known) -> Moments:
    """By which BatchNorm has normalised the client's batch, of layers below the known activations.

    There are none where the client keeps them, or where what was read says that they are of another batch.
    """
    if any(piece.topic == STATISTICS for piece in known.evidence):
        return {}
    below = set(modules(stages(model)[: known.start]))
    return {layer: both for layer, both in update.batch_moments(model).items() if layer in below}
