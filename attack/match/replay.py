"""The client's training, replayed on what was found: the certificate, and what it says of trainings not declared."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attack.match.hidden_steps import hidden_drift
from attack.match.phases import is_pooled
from attack.prepare import Known
from attack.read.error_bars import WITHIN
from attack.solve.rounding import precision_of, share_of
from network.chain import is_walked
from network.head import measured_noise
from network.parameters import trainable
from network.tracing import stages
from update.evidence import HIDDEN, REPLAY, SURE, Evidence
from update.optimiser import LocalOptimiser
from update.shared import SharedUpdate
from update.training import LocalTraining, train_locally

EXACT = 1e-2  # share of the update that pixels which were read may leave: they are exact to a hundredth
# Share that pictures may leave which follow the known activations of all images, from FEW evaluations on. A ConvNet's
# leave 0.02 to 0.11 after 20 evaluations and fewer later, and 0.51 to 0.89 where the client normalised its images.
CLOSE = 0.4
FEW = 20
NEARER = 0.5  # share of what the declared training leaves that another may leave to be proposed
STEPS = 200  # no training of more steps is tried for a proposal: each takes as long as the declared one, for its steps


@dataclass(frozen=True)
class Replay:
    """What the training leaves of the update when it is replayed on the final images.

    Attributes:
        left: share of the update; infinite where it is no number.
        noise: share of the update that is noise.
        most: share that may be left for other reasons; infinite where nothing vouches for the images.
        is_needed: whether nothing is certain without it: the client made several steps, or none of SGD.
        was_replayed: whether the steps, made again on what was read, were found to make the update already.
        explains_first_layer: whether the images make all of the first layer's movement, in whatever order of the steps.
        drift: relative error (N,) of each image's features if the steps were others, see `hidden_steps`; or None.
        nearest: the training, of some that were not declared, which leaves least, in words, and the share that it
            leaves; None where none leaves clearly less.
    """

    left: float
    noise: float
    most: float = math.inf
    is_needed: bool = False
    was_replayed: bool = False
    explains_first_layer: bool = False
    drift: Tensor | None = None
    nearest: tuple[str, float] | None = None

    @property
    def fits(self) -> bool:
        """Whether the images make the update, to a hundredth or to its noise."""
        return self.left <= max(EXACT, min(CLOSE, SURE * self.noise))

    @property
    def contradicts(self) -> bool:
        """Whether images that follow from the update do not make it."""
        return self.left > max(self.most, SURE * self.noise)

    @property
    def evidence(self) -> list[Evidence]:
        """A word on images that follow from the update and do not make it, and on the training that would.

        Where they make it, on steps that it may hide.
        """
        if not self.contradicts:
            return [_of_hidden_steps(self.drift)] if self.drift is not None and self.drift.max() > WITHIN else []
        said = f"the training, replayed on the images that were found, leaves {self.left:.2g} of the update"
        said += ": it was another one"
        if self.nearest is not None:
            said += f"; nearest comes {self.nearest[0]}, which leaves {self.nearest[1]:.2g}"
        return [Evidence(REPLAY, said, self.left, contradicts=True)]

    @property
    def is_certificate(self) -> bool:
        """Whether images may be called certain."""
        return not self.is_needed or self.makes_update or self.explains_first_layer

    @property
    def makes_update(self) -> bool:
        """Whether the steps, made again on what was found, make the update."""
        return self.was_replayed or self.fits


def _of_hidden_steps(drift: Tensor) -> Evidence:
    said = (
        "it does not tell at which of several steps an image would have been used, which would have moved its features "
        f"by up to {float(drift.max()):.2g} of their length: their errors include it"
    )
    return Evidence(HIDDEN, said, float(drift.max()))


def replayed(
    update: SharedUpdate, model: nn.Module, known: Known, images: Tensor, labels: Tensor, evaluations: int
) -> Replay:
    """The client's training on what an attack of so many evaluations ended with, and the nearest that would make it.

    Args:
        update: the client's.
        model: that it was computed on, BatchNorm in the mode of the training.
        known: what was read before the attack.
        images: (B, C, H, W), in [0, 1].
        labels: class probabilities (B, K).
    """
    found = replay_alone(update, model, known, images, labels, evaluations)
    found = replace(found, drift=hidden_drift(update, model, known, images))
    return replace(found, nearest=_nearest(update, model, images, labels, found.left)) if found.contradicts else found


def replay_alone(
    update: SharedUpdate, model: nn.Module, known: Known, images: Tensor, labels: Tensor, evaluations: int
) -> Replay:
    """The same, without trying other trainings; arguments as of `replayed`."""
    return Replay(
        left_over(update, model, images, labels),
        noise_share(update, model),
        _left_at_most(known, model, evaluations, update.training),
        not update.training.is_gradient,
        known.is_replayed,
        known.is_explained,
    )


def _left_at_most(known: Known, model: nn.Module, evaluations: int, training: LocalTraining) -> float:
    """The share of the update that the client's training may leave on what was found, but for noise.

    Infinite where nothing vouches for the pictures. Below a max-pool good pictures leave most of it: which entry was
    the largest decides on gradients. An order that is not known leaves some of it, too. Where images were read step by
    step the layers above have been replayed already, and a training that goes far makes much of little errors.
    """
    if training.shuffle and training.passes > 1 and training.order is None:
        return math.inf
    if known.is_explained and training.batches > 1:  # an order that was found has been replayed already
        return math.inf
    if known.is_exact:
        return EXACT
    chain = stages(model)[: known.start] if known.is_followed else []
    is_followed = known.is_followed and not known.in_steps and is_walked(chain) and not is_pooled(chain)
    return CLOSE if is_followed and evaluations >= FEW else math.inf


def left_over(update: SharedUpdate, model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """|u - g| / |g|, with g the update and u that of the same training on other images.

    Args:
        update, model, images, labels: as in `replayed`.
    """
    goal = update.targets(model)
    with torch.enable_grad():
        own = train_locally(model, images.detach(), labels.detach(), update.training).average
    return share_of([u - g for u, g in zip(own, goal, strict=True)], goal)


def noise_share(update: SharedUpdate, model: nn.Module) -> float:
    """The share of the update that is noise: what its head's sums show, and rounding, that of sent weights included.

    The sums of several steps show what was not declared, weight decay or Adam, and are asked where noise was added.
    """
    rounding = max(precision_of(gradient) for gradient in update.gradients.values())
    training, sent = update.training, 0.0
    speaks = training.loss.is_cross_entropy and (training.is_gradient or update.defence != "none")
    shown = measured_noise(update.gradients, model) if speaks else 0.0
    if not training.is_gradient:
        weights = sum(float(weight.detach().double().square().sum()) for weight in trainable(model).values())
        count = sum(weight.numel() for weight in trainable(model).values())
        coarse = max(torch.finfo(gradient.dtype).eps for gradient in update.gradients.values())
        sent = coarse * (weights / count) ** 0.5 / training.reach
    return max(rounding, math.hypot(shown, sent) / update.strength())


# ----------------------------------------------------------------------------------------------------
# Trainings that were not declared


def _nearest(
    update: SharedUpdate, model: nn.Module, images: Tensor, labels: Tensor, left: float
) -> tuple[str, float] | None:
    """The training, of those that clients often make, whose weights come nearest to the client's on these images.

    Where no rate was declared, only what shares the gradient of one step is comparable, and nothing is proposed.
    """
    declared, best = update.training, None
    if declared.rate is None:
        return None
    old, combination = trainable(model), declared.combination()
    shared = update.targets(model)
    moved = [  # w_N - w_0
        (combination.alpha - 1) * weight.detach() - combination.total * gradient
        for weight, gradient in zip(old.values(), shared, strict=True)
    ]
    for other in _others(declared, len(images)):
        with torch.enable_grad():
            trained = train_locally(model, images.detach(), labels.detach(), other)
        own = other.combination()
        walked = [
            (own.alpha - 1) * weight.detach() - own.total * mean.detach()
            for weight, mean in zip(old.values(), trained.average, strict=True)
        ]
        found = share_of([p - q for p, q in zip(walked, moved, strict=True)], moved)
        if found < NEARER * left and (best is None or found < best[1]):
            best = str(other), found
    return best


def _others(declared: LocalTraining, batch_size: int) -> Iterator[LocalTraining]:
    """Trainings that differ from the declared one in a thing that is easily forgotten or mistaken."""
    plain = replace(declared, steps=1, batches=1, sizes=None, order=None, optimiser=LocalOptimiser())
    yield plain
    yield replace(plain, rate=declared.rate * declared.steps)
    optimiser, sgd = declared.optimiser, declared.optimiser.name == "sgd"
    for momentum in (0.9, 0.0) if sgd else ():
        for decay in {0.0, 1e-4, 5e-4, 1e-3, 1e-2, optimiser.decay}:
            rule = replace(optimiser, momentum=momentum, nesterov=False, weight_decay=decay)
            yield from _allowed(declared, optimiser=rule)
    for name in ("sgd", "adam", "adamw"):
        yield from _allowed(declared, optimiser=LocalOptimiser(name))
    for batches in range(1, batch_size + 1):
        for passes in {declared.passes, 1, declared.steps // batches}:
            if 1 < passes * batches <= STEPS and -(-batch_size // -(-batch_size // batches)) == batches:
                for momentum in {optimiser.momentum, 0.9} if sgd else {0.0}:
                    rule = replace(optimiser, momentum=momentum, nesterov=optimiser.nesterov and momentum > 0)
                    yield from _allowed(
                        declared, steps=passes * batches, batches=batches, sizes=None, order=None, optimiser=rule
                    )


def _allowed(declared: LocalTraining, **changes: object) -> Iterator[LocalTraining]:
    """The declared training with these changes; nothing where it is the declared one, or cannot be."""
    try:
        other = replace(declared, **changes)
    except ValueError:
        return
    if other != declared:
        yield other
