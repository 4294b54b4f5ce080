"""An update whose tensors may be in another layout than torch's, which no shape shows: the first layout that fits.

Features can be told apart in any layout of the layers below them, so a wrong one shows in the pixels alone: those that
explain the features lie far outside [0, 1], or, where they are read, are no picture, or do not replay. Then the other
layouts are tried, for the weights and the update together, and for the update alone. One counts where all images are
told apart, and their pixels contradict nothing.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attack.match.replay import replay_alone
from attack.match.softening import kinked_chain
from attack.prepare import Known
from cli.ahead import SIGNALS_SHARE, scaled_update
from update import checked
from update.evidence import FIT, PIXELS, Evidence, contradictions
from update.layouts import SUSPECTED, relaid, suspected
from update.shared import SharedUpdate

LAYOUT = "layout"  # the topic of a layout that was found
SMOOTHER = 0.6  # roughness of pixels in another order, relative, that shows that they are in it: right ones have 0.2
UNFITTING = 1e-2  # residual of a layer's equations that no noise explains: those of another layout leave 0.1


class Prepared(NamedTuple):
    """An attack that may begin: the update, the factor that its scale was undone by, the model, and what follows."""

    update: SharedUpdate
    scale: float | None
    model: nn.Module
    state: object
    objective: object
    known: Known


def prepared(
    prepare: Callable,
    update: SharedUpdate,
    model: nn.Module,
    settings: argparse.Namespace,
    granted: Tensor | None,
    began: Mapping | None,
) -> Prepared:
    """The attack in torch's layout, or in the first other one that fits where that does not.

    Args:
        prepare: makes state, objective, and what is known, of update, model and the last three arguments.
        update: as it was received.
        model: with the weights that the server sent out.
        settings: of the run.
        granted: true labels (B,), or None.
        began: the checkpoint that a resumed run began with: it keeps its layout.

    Raises:
        ValueError: as `prepare`, or the checkpoint's evidence is damaged.
    """

    def tried(update: SharedUpdate, model: nn.Module) -> Prepared:
        restored, scale = scaled_update(update, model, settings)
        return Prepared(restored, scale, model, *prepare(restored, model, settings, granted, began))

    open_layouts = list(_others(update, model)) if settings.update else []
    if began is not None:
        number = _number_in(began)
        kept = next((other for other in open_layouts if other.number == number), None)
        return tried(update, model) if kept is None else tried(*kept.of(update, model))
    started = time.perf_counter()
    first = tried(update, model)
    if not open_layouts or not _is_doubted(first):
        return first
    for other in open_layouts:
        spent = time.perf_counter() - started
        if settings.max_seconds and spent + first.known.seconds > SIGNALS_SHARE * settings.max_seconds:
            break
        found = tried(*other.of(update, model))
        if _fits(found):
            evidence = (other.evidence, *found.known.evidence)
            return found._replace(known=replace(found.known, evidence=evidence))
    return first


@dataclass(frozen=True)
class _Other:
    """A layout, and whether the weights are in it too."""

    layout: tuple[str, ...]
    with_weights: bool

    @property
    def number(self) -> int:
        return 2 * list(SUSPECTED).index(self.layout) + self.with_weights

    @property
    def evidence(self) -> Evidence:
        whose = "weights and update are" if self.with_weights else "the update is"
        said = f"no pixels fit torch's layout: {whose} taken to have {SUSPECTED[self.layout]}, which they do fit"
        return Evidence(LAYOUT, said, float(self.number))

    def of(self, update: SharedUpdate, model: nn.Module) -> tuple[SharedUpdate, nn.Module]:
        """Update and model in torch's layout; that no image fits was said of the layout as it came."""
        gradients = relaid(update.gradients, model, update.image_shape, self.layout)
        evidence = tuple(piece for piece in update.evidence if piece.topic != FIT)
        update = replace(update, gradients=gradients, evidence=evidence)
        if self.with_weights:
            state = relaid(model.state_dict(), model, update.image_shape, self.layout)
            model = copy.deepcopy(model)
            model.load_state_dict(state)
        return update, model


def _others(update: SharedUpdate, model: nn.Module) -> Iterator[_Other]:
    if update.training.is_plain:
        for layout in suspected(model, update.image_shape):
            yield from (_Other(layout, with_weights) for with_weights in (True, False))


def _number_in(began: Mapping) -> int | None:
    """The number of the layout in a checkpoint's evidence; None where there is none."""
    for piece in checked.sequence(began["evidence"], "evidence"):
        held = checked.mapping(piece, "a piece of evidence", ("topic", "figure"))
        if held["topic"] == LAYOUT:
            return int(checked.real(held["figure"], "evidence.figure", 0))
    return None


def _is_doubted(found: Prepared) -> bool:
    pieces = contradictions((*found.update.evidence, *found.known.evidence))
    if any(piece.topic in (FIT, PIXELS) for piece in pieces):
        return True
    if found.known.is_exact:
        return _is_smoother_otherwise(found) or not _replays(found)
    return kinked_chain(found.model) is None and any(map(_contradicts_itself, found.known.layers))


def _fits(found: Prepared) -> bool:
    return found.known.is_followed and not _is_doubted(found)


def _contradicts_itself(row: Mapping) -> bool:
    """Whether no inputs fit a layer's gradient and its outputs, as happens where kinks hide entries."""
    return row["determined"] is False and row["residual"] is not None and row["residual"] > UNFITTING


def _is_smoother_otherwise(found: Prepared) -> bool:
    """Whether pixels that were read are far smoother pictures in the order (h, w, c)."""
    pixels = found.known.pixels
    return pixels.shape[1] > 1 and _roughness(_by_rows(pixels)) < SMOOTHER * _roughness(pixels)


def _replays(found: Prepared) -> bool:
    """Whether the training on pixels that were read gives the update."""
    known = found.known
    labels = torch.nn.functional.one_hot(known.labels, found.update.num_classes).to(known.pixels)
    return not replay_alone(found.update, found.model, known, known.pixels, labels, 0).contradicts


def _by_rows(pixels: Tensor) -> Tensor:
    """Pixels (N, C, H, W) whose entries are taken for those of (N, H, W, C)."""
    count, channels, height, width = pixels.shape
    return pixels.reshape(count, height, width, channels).permute(0, 3, 1, 2)


def _roughness(pixels: Tensor) -> float:
    """The mean distance of neighbours."""
    return float(torch.cat([pixels.diff(dim=axis).abs().flatten() for axis in (2, 3)]).mean())
