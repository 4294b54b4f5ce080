"""What is known before the first step: read from the update, unmixed, inferred, or granted, as the flags say."""

import argparse
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from attack.local.drift import EXACT, expected_drift
from attack.local.local_labels import Trial, labels_by_trial
from attack.match.activations import says_enough
from attack.prepare import Known, all_labels
from attack.published.ica import unmixed_features
from attack.published.labels import infer_labels
from attack.read.clip_factor import unscaled
from attack.read.head.by_random_images import Signals
from attack.read.reader import Reading, read_layers
from cli.console import Search
from cli.runtime import stream
from network.tracing import stages
from network.zoo import place_of
from update.shared import SharedUpdate

SIGNALS_SHARE = 0.5  # of max_seconds, that the search for signals may take at most


def with_scale(
    update: SharedUpdate, model: nn.Module, settings: argparse.Namespace
) -> tuple[SharedUpdate, float | None]:
    """The update as long as it was before its clients shortened it, and the factor that undoes that.

    The factor is None where they did not, or where nothing tells it. In the latter case only the update's direction is
    left to match: --distance, unless it was given, becomes relative_cosine.
    """
    if not update.is_rescaled:
        return update, None
    try:
        return unscaled(update, model, generator=stream(settings.seed, "scale"))
    except (ValueError, RuntimeError, ArithmeticError):  # a singular system, say: the attack goes on
        settings.distance = settings.distance or "relative_cosine"
        return update, None


def read_ahead(
    update: SharedUpdate, model: nn.Module, settings: argparse.Namespace, granted: Tensor | None, began: dict | None
) -> Known:
    """Signals, features and labels that are known before the first step.

    A resumed run passes the checkpoint it `began` with, and keeps what is in there.

    Raises:
        ValueError: --signals on or ica, or a --label_strategy, and model or update do not permit it.
    """
    generator, place = stream(settings.seed, "signals"), place_of(model)
    signals, start, inputs, layers, recovered, features = None, None, None, [], {}, torch.empty(0)
    drift, trial = None, None
    if began is not None:
        signals = Signals(**began["signals"]) if began["signals"] else None
        start, inputs, layers, drift = began["start"], began["inputs"], began["layers"], began["drift"]
        trial = Trial(**began["trial"]) if began["trial"] else None
    elif settings.signals in ("auto", "on"):
        if not update.training.is_one_step:
            drift = expected_drift(update, model, generator)
        try:
            reading = _read(update, model, settings, generator, drift)
            signals, start, inputs = reading.signals, reading.start, reading.inputs
            layers, recovered = reading.layers, reading.recovered
        except ValueError as error:
            if settings.signals == "on":
                raise ValueError(f"--signals on: {error}") from None
    if signals:
        signals, inputs = signals.to(place["device"]), inputs.to(place["device"])
        features = signals.features
    elif settings.signals == "ica":
        try:
            features = unmixed_features(update, model, generator=generator)
        except ValueError as error:
            raise ValueError(f"--signals ica: {error}") from None
    labels = infer_labels(settings.label_strategy, update, model, granted)
    if signals is None and began is None:
        trial = _tried(update, model, settings, generator, labels)
    if trial and trial.is_believed:
        labels = trial.labels.to(place["device"])
    pixels, below = None, stages(model)[:start] if signals else []
    if signals and all(isinstance(stage.module, nn.Flatten) for stage in below):
        pixels = inputs.reshape(-1, *update.image_shape).clamp(0, 1).to(**place)
    read = (start, inputs, pixels) if signals else (None, None, None)
    enough = not signals or says_enough(below, update.image_shape, inputs)
    known = (update.batch_size, signals, features.to(**place), all_labels(signals, labels), *read)
    return Known(*known, says_enough=enough, drift=drift, trial=trial, layers=layers, recovered=recovered)


def _read(
    update: SharedUpdate,
    model: nn.Module,
    settings: argparse.Namespace,
    generator: torch.Generator,
    drift: float | None,
) -> Reading:
    """The engine's reading; of an update that has drifted a little, all of it or nothing, and no surer than that.

    Raises:
        ValueError: nothing can be read, or the update has drifted too far to be read as a gradient.
    """
    if drift is not None and not drift < EXACT:
        raise ValueError(f"local training moves the update by {drift:.1e}: it is read as a gradient up to {EXACT:g}")
    seconds = SIGNALS_SHARE * settings.max_seconds if settings.max_seconds else math.inf
    with Search(quiet=settings.quiet) as bar:
        reading = read_layers(update, model, generator=generator, max_seconds=seconds, tick=bar.update)
    if drift is None:
        return reading
    if len(reading) < update.batch_size:
        raise ValueError(f"{len(reading)} of {update.batch_size} images told apart after local training, not all")
    uncertainty = torch.hypot(reading.signals.uncertainty, torch.full_like(reading.signals.uncertainty, drift))
    return replace(reading, signals=replace(reading.signals, uncertainty=uncertainty))


def _tried(
    update: SharedUpdate,
    model: nn.Module,
    settings: argparse.Namespace,
    generator: torch.Generator,
    labels: Tensor | None,
) -> Trial | None:
    """Labels by trial after several steps, or the order of those that are known; None where there is no use for one."""
    training = update.training
    needed = training.batches > 1 if labels is not None else settings.signals in ("auto", "on")
    if training.is_one_step or not needed:
        return None
    try:
        return labels_by_trial(update, model, generator, labels)
    except ValueError:
        return None
