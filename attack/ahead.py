"""What the server knows before the first step: read from the update, unmixed, inferred, or granted."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attack.local.drift import EXACT, expected_drift
from attack.local.local_labels import LocalLabels, labels_by_trial
from attack.match.activations import says_enough
from attack.prepare import Known, all_labels
from attack.published.ica import unmixed_features
from attack.published.labels import infer_labels
from attack.read.clip_factor import unscaled
from attack.read.evidence import of_features, of_pixels
from attack.read.reader import Reading, ReadingAbortedError, read_layers
from attack.read.signals import Signals
from network.tracing import stages
from network.zoo import place_of
from update.evidence import Evidence
from update.shared import SharedUpdate

# Share of the update that a trial of labels leaves, beyond which the declared training is doubted: five steps of plain
# SGD leave 4e-4 on a small network, five with momentum 0.57, five of Adam 0.85.
FOREIGN = 0.5


@dataclass(frozen=True)
class Means:
    """How the server goes about it.

    Attributes:
        signals: as --signals: auto, on, off or ica.
        label_strategy: as --label_strategy.
        max_seconds: after which a reading is aborted.
        tick: called now and then while it goes on.
        granted: the true labels (B,), where --label_strategy known grants them.
    """

    signals: str
    label_strategy: str
    max_seconds: float
    tick: Callable[[], object]
    granted: Tensor | None = None

    @property
    def reads(self) -> bool:
        """Whether single images are sought in the update."""
        return self.signals in ("auto", "on")


def with_scale(update: SharedUpdate, model: nn.Module, generator: torch.Generator) -> tuple[SharedUpdate, float | None]:
    """The update as long as it was before its clients shortened it, and the factor that undoes that.

    The factor is None where they did not, or where nothing tells it.
    """
    if not update.is_rescaled:
        return update, None
    try:
        return unscaled(update, model, generator=generator)
    except (ValueError, RuntimeError, ArithmeticError):  # a singular system, say: the attack goes on
        return update, None


def read_ahead(update: SharedUpdate, model: nn.Module, means: Means, generator: torch.Generator) -> Known:
    """Signals, features and labels that are known before the first step.

    Raises:
        ValueError: --signals on or ica, or a --label_strategy, and model or update do not permit it.
    """
    drift, reading, features, is_aborted = None, None, torch.empty(0), False
    if means.reads:
        if not update.training.is_one_step:
            drift = expected_drift(update, model, generator)
        try:
            reading = _read(update, model, means, generator, drift)
        except ValueError as error:
            if means.signals == "on":
                raise ValueError(f"--signals on: {error}") from None
            is_aborted = isinstance(error, ReadingAbortedError)
    elif means.signals == "ica":
        try:
            features = unmixed_features(update, model, generator=generator)
        except ValueError as error:
            raise ValueError(f"--signals ica: {error}") from None
    labels = infer_labels(means.label_strategy, update, model, means.granted)
    signals = None if reading is None else reading.signals
    local_labels = None if signals else _local_labels(update, model, means, generator, labels)
    known = _known(update, model, signals, features, labels, local_labels)
    if reading is None:
        return replace(known, drift=drift, is_aborted=is_aborted, evidence=tuple(_of_trial(local_labels)))
    facts = {name: getattr(reading, name) for name in ("layers", "recovered", "seconds", "is_aborted")}
    known = replace(known, evidence=tuple(_evidence(update, model, reading, generator)))
    return replace(_at_stage(known, update, model, reading.start, reading.inputs), drift=drift, **facts)


def _of_trial(found: LocalLabels | None) -> Iterator[Evidence]:
    """A word on a declared training that no labels fit."""
    if found is not None and found.distance > FOREIGN:
        said = (
            f"the declared training, tried on grey images, leaves {found.distance:.2g} of the update with the best "
            "labels: the client's optimiser, its rate, its steps or its minibatches may be others"
        )
        yield Evidence("training", said, found.distance)


def _evidence(
    update: SharedUpdate, model: nn.Module, reading: Reading, generator: torch.Generator
) -> Iterator[Evidence]:
    """What was read, against what was assumed."""
    out_of_range = [] if reading.start else of_pixels(reading.inputs.reshape(-1, *update.image_shape))
    yield from out_of_range or of_features(reading.signals.values, model, update.image_shape, generator)


def known_again(
    update: SharedUpdate, model: nn.Module, means: Means, generator: torch.Generator, began: Mapping
) -> Known:
    """What a resumed run knew when it began, from the checkpoint that it `began` with.

    Raises:
        ValueError: as `read_ahead`.
    """
    signals = Signals(**began["signals"]) if began["signals"] else None
    local_labels = LocalLabels(**began["local_labels"]) if began["local_labels"] else None
    features = torch.empty(0)
    if signals is None and means.signals == "ica":
        features = unmixed_features(update, model, generator=generator)
    labels = infer_labels(means.label_strategy, update, model, means.granted)
    known = _known(update, model, signals, features, labels, local_labels)
    if signals is not None:
        known = _at_stage(known, update, model, began["start"], began["inputs"])
    facts = {"layers": began["layers"], "seconds": began["signals_seconds"], "is_aborted": began["is_aborted"]}
    evidence = tuple(Evidence(**piece) for piece in began["evidence"])
    return replace(known, drift=began["drift"], evidence=evidence, **facts)


def _known(
    update: SharedUpdate,
    model: nn.Module,
    signals: Signals | None,
    features: Tensor,
    labels: Tensor | None,
    local_labels: LocalLabels | None,
) -> Known:
    """Signals, features and labels, where the model is."""
    place = place_of(model)
    if signals is not None:
        signals = signals.to(place["device"])
        features = signals.values
    if local_labels and local_labels.is_believed:
        labels = local_labels.labels.to(place["device"])
    labels = all_labels(signals, labels)
    return Known(update.batch_size, signals, features.to(**place), labels, local_labels=local_labels)


def _at_stage(known: Known, update: SharedUpdate, model: nn.Module, start: int, inputs: Tensor) -> Known:
    """With the inputs (N, ...) of the deepest stage that are known of the images whose signals were read."""
    place, below = place_of(model), stages(model)[:start]
    inputs = inputs.to(place["device"])
    pixels = None if start else inputs.reshape(-1, *update.image_shape).clamp(0, 1).to(**place)
    enough = says_enough(below, update.image_shape, inputs)
    return replace(known, start=start, inputs=inputs, pixels=pixels, says_enough=enough)


def _read(
    update: SharedUpdate, model: nn.Module, means: Means, generator: torch.Generator, drift: float | None
) -> Reading:
    """A reading of the update; of one that has drifted a little, all images or nothing, and no surer than the drift.

    Raises:
        ValueError: nothing can be read, or the update has drifted too far to be read as a gradient.
    """
    if drift is not None and not drift < EXACT:
        raise ValueError(f"local training moves the update by {drift:.1e}: it is read as a gradient up to {EXACT:g}")
    reading = read_layers(update, model, generator=generator, max_seconds=means.max_seconds, tick=means.tick)
    if drift is None:
        return reading
    if len(reading) < update.batch_size:
        raise ValueError(f"{len(reading)} of {update.batch_size} images told apart after local training, not all")
    uncertainty = torch.hypot(reading.signals.uncertainty, torch.full_like(reading.signals.uncertainty, drift))
    return replace(reading, signals=replace(reading.signals, uncertainty=uncertainty))


def _local_labels(
    update: SharedUpdate, model: nn.Module, means: Means, generator: torch.Generator, labels: Tensor | None
) -> LocalLabels | None:
    """Labels by trial after several steps, or the order of those that are known; None where there is no use for one."""
    training = update.training
    needed = training.batches > 1 if labels is not None else means.reads
    if training.is_one_step or not needed:
        return None
    try:
        return labels_by_trial(update, model, generator, labels)
    except ValueError:
        return None
