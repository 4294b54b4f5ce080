"""From settings to what is known before the first step, see `attack.ahead`."""

import argparse
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from attack.again import is_read_again, known_between
from attack.ahead import READS, Means, known_again, read_ahead, with_scale
from attack.opening import is_opened, opened
from attack.optimise.budget import Budget
from attack.prepare import Known
from attack.solve.budget import OutOfTimeError, WorkBudget
from cli.console import ReadingBar
from cli.runtime import stream
from cli.settings import schedule_of
from cli.start import first_state, pixel_map
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


def known_from_pictures(
    update: SharedUpdate,
    model: nn.Module,
    known: Known,
    settings: argparse.Namespace,
    build_objective: Callable,
    attack: Callable,
    began: dict | None = None,
) -> Known:
    """What is known once pictures have told what they can: what to begin with, and blocks that are read again by them.

    See `attack.opening` and `attack.again`. An attack whose evaluations are bounded (--max_evals) has none to spare.

    Args:
        update: as it was shared.
        model: that it was computed on.
        known: what was read of it.
        settings: of the attack.
        build_objective: of update, model, known, pixels and settings.
        attack: moves a state by an objective, a schedule and a budget, and reports its steps.
        began: the record of a run that is resumed, which keeps what was known; None at the start.
    """
    if began is not None or settings.max_evals is not None or not is_opened(model, known):
        return known
    left = SIGNALS_SHARE * settings.max_seconds - known.seconds if settings.max_seconds else math.inf
    with ReadingBar(quiet=settings.quiet) as bar:
        clock = WorkBudget(deadline=time.perf_counter() + left, tick=bar.update)

        def course(known: Known, share: float, *, is_whole: bool = False) -> Tensor:
            clock.check()
            pixels = pixel_map(update, model, known, settings)
            begun = replace(known, likely=None) if is_whole else known
            objective = build_objective(update, model, begun, pixels, settings)
            shortened, state = objective.annealing.shortened(share), first_state(update, known, pixels, settings)
            seconds = clock.deadline - time.perf_counter()
            most = settings.restarts * shortened.evaluations
            budget = Budget(most, most, seconds)  # whatever n_iter is: a run may be resumed with another
            objective = replace(objective, annealing=shortened)
            attack(state, objective, schedule_of(settings), budget, lambda *_: bar.update())
            return objective.images(state)[state.leader].detach().clamp(0, 1)

        return _from_pictures(update, model, known, settings, course, clock)


def _from_pictures(
    update: SharedUpdate,
    model: nn.Module,
    known: Known,
    settings: argparse.Namespace,
    course: Callable[..., Tensor],
    clock: WorkBudget,
) -> Known:
    """The same by pictures after a share of a `course`, until the clock has run out.

    A start that was asked for, or several of them, are left as they are.
    """
    is_free = settings.init == "grey" and settings.restarts == 1
    generator = stream(settings.seed, "opening")

    def begun(known: Known) -> Known:
        return opened(update, model, known, course, generator) if is_free else replace(known, likely=None)

    def pictures(known: Known) -> Tensor:
        is_new = known.likely is None or not is_free  # else what was read since says where to go
        return course(begun(known) if is_new else known, 1.0)  # by half of one, layers are read half as well

    if is_read_again(update, model, known):
        known = known_between(update, model, known, pictures, stream(settings.seed, "between"), clock)
    with contextlib.suppress(OutOfTimeError):
        return begun(known)
    return known
