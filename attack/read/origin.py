"""Which client made an update that came from outside: the first supposition under which its images are told apart.

An image that is told apart fits equations with more witnesses than unknowns. Under a wrong supposition on the client
(a sum in place of the mean, another loss, a nominal batch size) no image fits, so each supposition is tried with
little work, the declared client first, and the first under which any image is told apart is the client's.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from attack.read.clip_factor import by_head, common_factor, single_images, times, weighed
from attack.read.reader import READING_WORK, glance
from attack.read.signals import Signals
from update.evidence import ERRORS, FIT, LOSS, SCALE, Evidence
from update.loss import Loss
from update.shared import SharedUpdate

GLANCE = 0.01 * READING_WORK  # of work for each supposition: some six seconds at most
SMOOTHINGS = (0.1, 0.2, 0.05)  # of labels, that clients use
USUAL = (0.5, 2.0, *(2.0**power for power in range(8, 25, 8)))  # factors of losses, and of AMP's loss scaling
SEVERAL = 3  # single images that are enough to see whether they count alike
UNEQUAL = 2e-3  # relative: factors of single images that differ by more are several
BLURRED = 10.0  # and by so many expected errors of the images
ROUNDED = 1e-3  # relative: a factor so close to a usual one is that one


@dataclass(frozen=True)
class Supposition:
    """One way in which the client may have differed from the declared one: the update under it, and how it is said."""

    update: SharedUpdate
    evidence: Evidence | None = None

    def result(self, told_apart: int) -> SharedUpdate:
        """The update, with the evidence that the supposition holds, which settles others of its topic, and its length.

        Where it tells only some of the images apart it may fit them by chance, and nothing is certain: under focal
        loss three of four images fit a factor of 1.2, and two of the three were wrong.
        """
        if self.evidence is None:
            return self.update
        evidence, count = self.evidence, self.update.batch_size
        if told_apart < count:
            said = f"{evidence.said}; but only {told_apart} of {count} images fit that"
            evidence = replace(evidence, said=said, contradicts=True)
        open_still = (piece for piece in self.update.evidence if piece.topic not in (evidence.topic, SCALE))
        return replace(self.update, evidence=(*open_still, evidence))


def explained(
    update: SharedUpdate,
    model: nn.Module,
    *,
    nominal: int | None,
    generator: torch.Generator,
    tick: Callable[[], object] = lambda: None,
) -> SharedUpdate:
    """The update under the first supposition that tells its images apart, with the evidence of it.

    Args:
        update: as declared, with the batch size that its ranks show.
        nominal: the batch size that was declared, where the ranks show a smaller one.
        generator: what starts and programmes are drawn from (on the CPU).
        tick: called now and then.
    """
    tried, is_spanned, singles = 0, False, _Singles(update, model, generator)
    has_tiny_errors = any(piece.topic == ERRORS for piece in update.evidence)  # rounding may keep images from fitting
    for supposition in _suppositions(update, model, nominal, singles):
        try:
            found = glance(
                weighed(supposition.update, model, generator=generator, work=GLANCE),
                model,
                generator=generator,
                work=GLANCE,
                tick=tick,
            )
        except ValueError:  # a model that cannot be taken apart says nothing under any supposition
            return update
        is_believed = found.told_apart and not (has_tiny_errors or singles.are_weighted)
        if found.told_apart == supposition.update.batch_size or is_believed:
            return supposition.result(found.told_apart)
        tried, is_spanned = tried + 1, is_spanned or found.is_spanned
        if not is_spanned:
            return update
    if has_tiny_errors:
        return update
    said = _of_weights(singles.found) if singles.are_weighted else _nothing_fits(tried)
    return replace(update, evidence=(*update.evidence, said))


def _suppositions(
    update: SharedUpdate, model: nn.Module, nominal: int | None, singles: "_Singles"
) -> Iterator[Supposition]:
    """The client as declared, then others, the most frequent first, without what sums over the classes exclude."""
    if any(piece.topic == LOSS for piece in update.evidence):
        yield from _other_losses(update, [Loss("bce"), Loss("mse")])
        return
    yield Supposition(update)
    if nominal is not None and nominal != update.batch_size:
        others = tuple(piece for piece in update.evidence if piece.overrules != "batch_size")
        yield Supposition(replace(update, batch_size=nominal, evidence=others))
    if singles.are_weighted:
        yield from _class_weights(update, singles.all_found)
        return
    for factor in _factors(update, model, singles):
        yield Supposition(times(update, factor), _of_scale(1 / factor, update.batch_size))
    if update.training.loss == Loss():
        yield from _other_losses(update, [Loss(smoothing=each) for each in SMOOTHINGS])


class _Singles:
    """Images that are told apart whatever their scale is: sought once, where they are asked for."""

    def __init__(self, update: SharedUpdate, model: nn.Module, generator: torch.Generator) -> None:
        self.update, self.model, self.generator = update, model, generator

    @cached_property
    def found(self) -> Signals | None:
        """Several images where they are to be had, since their factors may differ; None without any."""
        return self._sought(min(SEVERAL, self.update.batch_size))

    @cached_property
    def all_found(self) -> Signals | None:
        """As many images as are to be had."""
        return self._sought(self.update.batch_size)

    def _sought(self, enough: int) -> Signals | None:
        return single_images(self.update, self.model, self.generator, GLANCE, enough=enough)

    @property
    def are_weighted(self) -> bool:
        """Whether the factors of single images differ by more than their errors explain."""
        if self.found is None or len(self.found) < 2:
            return False
        factors, errors = self.found.certificates, self.found.uncertainty
        return bool((factors - factors[0]).abs().max() > factors.abs().max() * (UNEQUAL + BLURRED * errors.max()))


def _factors(update: SharedUpdate, model: nn.Module, singles: _Singles) -> Iterator[float]:
    """Factors by which the update becomes a mean: of single images, then of the head, of either sign.

    With class weights the size of a factor is that of the weights, which are taken relative to the batch's anyway.
    """
    if singles.found is not None and update.training.loss.is_open:
        told = [math.copysign(1.0, common_factor(singles.found))]
    elif singles.found is not None:
        told = [common_factor(singles.found)]
    else:
        told = [sign * (_by_head(times(update, sign), model, singles.generator) or 0.0) for sign in (1.0, -1.0)]
        told = told if any(told) else [1 / update.batch_size]  # nothing tells a factor: a sum is the likeliest
    for factor in told:
        if factor and abs(factor - 1) > ROUNDED:
            yield usual(factor, update.batch_size)


def _by_head(update: SharedUpdate, model: nn.Module, generator: torch.Generator) -> float | None:
    try:
        return by_head(update, model, generator)[0]
    except (ValueError, RuntimeError, ArithmeticError):  # a singular system, say
        return None


def usual(factor: float, batch_size: int) -> float:
    """The factor, or a usual one that it is but for rounding: 1 / B, a power of two, their negatives."""
    names = [1.0, 1 / batch_size, float(batch_size), *USUAL, *(1 / each for each in USUAL)]
    near = min(names, key=lambda name: abs(abs(factor) / name - 1))
    if abs(abs(factor) / near - 1) > ROUNDED:
        return factor
    return near if factor > 0 else -near


def _of_scale(scale: float, batch_size: int) -> Evidence:
    """What is said of an update that is `scale` times the averaged gradient."""
    said = f"it is {scale:g} times the averaged gradient"
    if abs(scale) == batch_size > 1:
        said = f"it is {'minus ' if scale < 0 else ''}the sum over {batch_size} images, not their mean"
    elif scale == -1:
        said = "it is minus the averaged gradient"
    elif abs(scale) == 2.0**16:
        said += ", the first scale of mixed-precision training"
    return Evidence(SCALE, f"{said}: it was divided by {scale:g}", scale)


def _other_losses(update: SharedUpdate, losses: Sequence[Loss]) -> Iterator[Supposition]:
    for loss in losses:
        said = f"its errors are those of {loss}, which was not declared: it is taken for the loss"
        training = replace(update.training, loss=loss)
        yield Supposition(replace(update, training=training), Evidence(LOSS, said, loss.smoothing or None))


def _class_weights(update: SharedUpdate, found: Signals | None) -> Iterator[Supposition]:
    """The client whose classes have the weights of single images, where images of one label weigh alike.

    Classes of which no image is found share what is left of B, the sum of the weights by which torch divides. Other
    clients count images of one label alike by chance only, and where no label is there twice they cannot be told from
    this one by anything, and are attacked alike.
    """
    if update.training.loss.weights or found is None or _spread(found) > UNEQUAL:
        return
    weights, rest = 1 / found.certificates, update.batch_size - len(found)
    if not bool((weights > 0).all()):
        return
    left = (update.batch_size - float(weights.sum())) / rest if rest else 1.0
    classes = [left if left > 0 else 1.0] * update.num_classes
    for label in found.labels.unique().tolist():
        classes[label] = float(weights[found.labels == label].mean())
    training = replace(update.training, loss=replace(update.training.loss, weights=tuple(classes)))
    is_torchs = abs(float(weights.sum()) / update.batch_size - 1) < UNEQUAL or rest
    kind = "" if is_torchs else "a focal loss, or class weights divided by the number of images, "
    said = f"its images do not count alike: {_weights_told(found)}, where a mean has 1: {kind}taken for class weights"
    figure = float(weights.max() / weights.min())
    yield Supposition(replace(update, training=training), Evidence("weights", said, figure, overrules="class_weights"))


def _spread(found: Signals) -> float:
    """By how much the weights of images with one label differ, relative, at most."""
    same = [found.certificates[found.labels == label] for label in found.labels.unique().tolist()]
    return max(float((own / own[0] - 1).abs().max()) for own in same)


def _weights_told(found: Signals) -> str:
    each = sorted(zip(found.labels.tolist(), (1 / found.certificates).tolist(), strict=True))
    return "single ones have the weights " + ", ".join(f"{weight:.3g} (label {label})" for label, weight in each)


def _of_weights(found: Signals) -> Evidence:
    """What is said of images whose errors have weights of their own, which are not taken for those of classes."""
    kind = "class weights, or a focal loss" if _spread(found) < UNEQUAL else "a focal loss, or weights of single images"
    said = f"its images do not count alike: {_weights_told(found)}, where the mean as declared has 1: {kind}"
    figure = float(found.certificates.max() / found.certificates.min())
    return Evidence("weights", said, figure, contradicts=True)


def _nothing_fits(tried: int) -> Evidence:
    said = (
        "a layer's gradient spans the inputs of its images, but no image fits the client as declared, nor any of "
        f"{tried - 1} others (sums, scales, signs, losses): the loss, the optimiser, the steps or the model may differ"
    )
    return Evidence(FIT, said, None, contradicts=True)
