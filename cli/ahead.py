"""From settings to what is known before the first step, see `attack.ahead`."""

import argparse
import math

from torch import Tensor, nn

from attack.ahead import READS, Means, known_again, read_ahead, with_scale
from attack.prepare import Known
from cli.console import ReadingBar
from cli.runtime import stream
from update.shared import SharedUpdate

SIGNALS_SHARE = 0.5  # of max_seconds, after which a reading is aborted


def scaled_update(
    update: SharedUpdate, model: nn.Module, settings: argparse.Namespace
) -> tuple[SharedUpdate, float | None]:
    """The update as long as it was before its clients shortened it, and the factor that undoes that.

    Where nothing tells the factor only the update's direction is left to match: --distance, unless it was given,
    becomes relative_cosine.
    """
    restored, scale = with_scale(update, model, stream(settings.seed, "scale"), reads=settings.signals in READS)
    if update.is_rescaled and scale is None:
        settings.distance = settings.distance or "relative_cosine"
    return restored, scale


def known_ahead(
    update: SharedUpdate, model: nn.Module, settings: argparse.Namespace, granted: Tensor | None, began: dict | None
) -> Known:
    """What is known before the first step; a resumed run passes the checkpoint it `began` with, and keeps that.

    Raises:
        ValueError: --signals on or ica, or a --label_strategy, and model or update do not permit it.
    """
    seconds = SIGNALS_SHARE * settings.max_seconds if settings.max_seconds else math.inf
    with ReadingBar(quiet=settings.quiet) as bar:
        means = Means(settings.signals, settings.label_strategy, seconds, bar.update, granted, bar.set_description)
        generator = stream(settings.seed, "signals")
        if began is not None:
            return known_again(update, model, means, generator, began)
        return read_ahead(update, model, means, generator)
