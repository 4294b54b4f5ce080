"""Single images from one averaged gradient: which layer to ask, what it says, and how far down that leads.

Layers whose gradient spans their inputs are asked one after the other, the most promising first (`choice`): their
inputs are told apart from their mixtures, with labels (`unmix`), until all images of the batch are known somewhere. A
smooth head has two ways of its own, all images at once: with label counts from random images (`recovery`), which an
untrained network of many classes resembles, and with counts by trial (`joint`). From there linear algebra leads down,
layer by layer (`layers`). What cannot be certain is not used, and every layer that was asked says what came of it.
"""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attack.read.head.by_random_images import Signals, recover_signals
from attack.read.head.by_trial import unmix_head
from attack.read.head.noise import precision_of
from attack.read.layer_choice import SMOOTH, Place, order, places
from attack.read.peel import Above, unmix
from attack.read.random_images import SAMPLE, random_features
from attack.read.signals import Inputs
from attack.read.span import Span, span_of
from attack.walk.forecast import explain
from attack.walk.walk import Descent, Record, Update, after_relu, descend, without_noise
from network.chain import Chain, Residual, Stage, index_of, input_shapes, parametrised, run, unmixed_from
from network.head import Head, measured_noise
from network.normalise import Normalise
from network.tracing import stages
from update.shared import SharedUpdate

LONGEST = 900.0  # seconds that a reading takes at most, whatever it is allowed
SHARE = 0.5  # of the time left that one layer may take while others wait
DESCENT = 0.25  # of all the time that is kept for the walk down
COLUMNS = (
    "layer", "positions", "rank_bound", "rank", "dimension", "gap", "spanned", "determined", "residual", "uncertainty",
    "seconds", "note",
)  # fmt: skip
UNIFORM = 0.5  # variation of a softmax over random images, relative to its mean: untrained ones lie far below
ROUNDED = 10.0  # units of rounding beyond which what the head's rows sum to is noise that was added


@dataclass(frozen=True)
class Reading:
    """What a network's gradient says of N of the batch's B images.

    Attributes:
        signals: of the N images, surest first; features are the inputs of the head.
        start: index in `network.chain.stages` of the deepest stage whose inputs are known for all N images.
        inputs: (N, ...) float64, they, in the same order; images themselves where `start` is 0.
        layers: one row for each linear or convolutional layer that was asked or walked through, from the images up:
            layer, positions, rank_bound, rank, dimension, gap, spanned, determined, residual, uncertainty, seconds,
            note; None where nothing was measured.
        recovered: inputs (n, ...) of every layer and residual stage that were believed, by its name; n may be less than
            N, and the order another, where a layer was asked and no walk led from it.
    """

    signals: Signals
    start: int
    inputs: Tensor
    layers: list[dict]
    recovered: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.signals)


def read_layers(
    update: SharedUpdate,
    model: nn.Module,
    *,
    generator: torch.Generator,
    max_seconds: float = math.inf,
    tick: Callable[[], object] = lambda: None,
) -> Reading:
    """Tell the images of the batch apart, and follow them down, in float64, from the update and the model alone.

    Args:
        update: the client's.
        model: that it was computed on.
        generator: what starts, programmes and rehearsals are drawn from (on the CPU).
        max_seconds: of wall time, after which nothing new is begun.
        tick: called now and then.

    Raises:
        ValueError: nothing can be read; the message says which layers were tried and why each was no use.
    """
    if update.is_rescaled:  # its images' errors have other lengths than the equations give them
        raise ValueError(f"by how much {update.defence} has shortened the update is not known exactly, image by image")
    return _Reader(update, model, generator, max_seconds, tick).read()


class _Reader:
    """One reading: the network in float64, the clock, and the rows of the layers asked so far."""

    def __init__(
        self,
        update: SharedUpdate,
        model: nn.Module,
        generator: torch.Generator,
        max_seconds: float,
        tick: Callable[[], object],
    ) -> None:
        self.update, self.model, self.generator, self.tick = update, model, generator, tick
        stages(model)  # refuses one that is not what its graph says, which a copy would not show
        self.began = time.perf_counter()
        self.deadline = self.began + min(max_seconds, LONGEST)
        self.chain: list[Stage] = stages(copy.deepcopy(model).double().requires_grad_(False))
        self.shapes = input_shapes(self.chain, update.image_shape)
        self.head = self.chain[-1].module
        self.like = self.head.weight.new_zeros(1)
        self.first = unmixed_from(self.chain)  # below it, an image's delta depends on the others
        self.places = {
            place.name: place
            for place in places(self.chain, update.image_shape, update.gradients)
            if place.index >= self.first
        }
        self.rows = _blank_rows(self.chain, update.image_shape, update.batch_size)
        self.recovered: dict[str, Tensor] = {}

    def read(self) -> Reading:
        """Ask the layers in turn, then walk down from the best of them."""
        best, at = None, None
        waiting = order(list(self.places.values()), self.update.batch_size, self.like)
        for place in waiting:
            if time.perf_counter() > self.deadline:
                self._note(place.name, "no time was left")
                continue
            found = self._asked(place, is_last=place is waiting[-1])
            if found is not None and (best is None or len(found) > len(best)):
                best, at = found, place
            if best is not None and best.complete:
                break
        if best is None:
            raise ValueError(f"no image can be told apart: {self._why_not()}")
        return self._followed(best.pick(best.uncertainty.argsort()), at.index)

    # ------------------------------------------------------------------------------------------------
    # One layer's word

    def _asked(self, place: Place, *, is_last: bool) -> Inputs | None:
        """What one layer says of the images; None where that is nothing. It is written down in any case."""
        began = time.perf_counter()
        left = (1 - DESCENT) * (self.deadline - began)
        until = began + left * (1.0 if is_last else SHARE)
        found, facts = None, {}
        try:
            span = self._span(place)
            facts = {
                "rank": span.rank, "dimension": span.dimension, "gap": span.gap, "determined": span.determined,
            }  # fmt: skip
            if not span.determined:
                raise ValueError(f"dim A is {span.dimension} with a gap of {span.gap:.1f}")
            found = self._told_apart(place, span, until)
            note = f"{len(found)} of {self.update.batch_size} images told apart"
            if not found.complete and time.perf_counter() > until:
                note += ", then no time was left"
        except (ValueError, RuntimeError, ArithmeticError) as error:  # no layer's failure ends a reading
            note = str(error).partition("\n")[0]
        if found is not None and len(found):
            facts |= {"residual": float(found.residuals.max()), "uncertainty": float(found.uncertainty.max())}
            self.recovered[place.name] = found.values
        self._note(place.name, note, **facts, seconds=time.perf_counter() - began)
        return found if found is not None and len(found) else None

    def _span(self, place: Place) -> Span:
        gradient = self.update.gradients.get(f"{place.name}.weight")
        if gradient is None:
            raise ValueError("the update holds no gradient of it")
        return span_of(
            gradient.to(self.like.device),
            place.geometry,
            self.update.batch_size,
            place.bias_gradient,
            saturating=place.saturating,
        )

    def _told_apart(self, place: Place, span: Span, until: float) -> Inputs:
        is_head = place.index == len(self.chain) - 1
        if is_head and span.batch_size > 1 and place.kind in SMOOTH:
            return self._smooth_head(place, span, until)

        def tail(inputs: Tensor, outputs: Tensor) -> Tensor:
            self.tick()
            return place.tail(inputs, outputs)

        above = [self._above(name) for name in self._linked(place)]
        return unmix(
            span, place.layer, tail, activation=place.kind, generator=self.generator, deadline=until, above=above
        )

    def _linked(self, place: Place) -> Iterator[str]:
        """The layers behind a fully connected one after a ReLU that help with it, as far as the update has them."""
        names = place.followers if place.kind == "relu" else ()
        return itertools.takewhile(lambda name: f"{name}.weight" in self.update.gradients, names)

    def _above(self, name: str) -> Above:
        place = self.places[name]
        return Above(self._span(place), place.layer, place.tail)

    def _smooth_head(self, place: Place, span: Span, until: float) -> Inputs:
        """All images of a head after a smooth activation at once: the likelier way first, then the other."""
        ways = [self._by_random_images, self._by_trial]
        if self._varies():
            ways.reverse()
        best = None
        for way in ways:
            now = time.perf_counter()
            share = until if way is ways[-1] else now + SHARE * (until - now)
            try:
                found = way(place, span, share)
            except ValueError as error:
                if best is None and way is ways[-1]:
                    raise ValueError(str(error)) from None
                continue
            if best is None or len(found) > len(best):
                best = found
            if best.complete:
                break
        return best

    def _varies(self) -> bool:
        """Whether the softmax differs from random image to random image, as a trained network's does."""
        features = random_features(self.model, self.update.image_shape, SAMPLE, self.generator).to(self.like)
        p = self.head(features).softmax(1)
        return float(p.std(0).mean() / p.mean()) > UNIFORM

    def _by_random_images(self, place: Place, span: Span, until: float) -> Inputs:
        signals = recover_signals(
            self.update,
            self.model,
            generator=self.generator,
            max_seconds=until - time.perf_counter(),
            tick=self.tick,
        )
        return Inputs(
            values=signals.features,
            labels=signals.labels,
            deltas=signals.errors,
            residuals=signals.residuals,
            shares=signals.certificates,
            uncertainty=signals.uncertainty,
            freedom=signals.freedom,
            batch_size=span.batch_size,
        )

    def _by_trial(self, place: Place, span: Span, until: float) -> Inputs:
        weight, bias = self.head.weight, self.head.bias
        return unmix_head(
            span,
            weight,
            weight.new_zeros(len(weight)) if bias is None else bias,
            self.update.gradients[f"{place.name}.weight"],
            place.bias_gradient,
            non_negative=place.kind == "sigmoid",
            generator=self.generator,
            deadline=until,
        )

    # ------------------------------------------------------------------------------------------------
    # Down

    def _followed(self, found: Inputs, index: int) -> Reading:
        """The images found at a stage, at the deepest stage that leads from there."""
        start, inputs = index, found.values
        if found.complete:
            descent = self._descended(found, index)
            for record in descent.records:
                self._note_walk(record)
            self.recovered |= descent.inner | {self.chain[i].name: inputs for i, inputs in descent.inputs.items()}
            start = descent.deepest
            inputs = descent.inputs[start]
            if after_relu(self.chain[:start]):  # its noise is that of this stage, not of the one that was unmixed
                inputs = without_noise(inputs, descent.noise[self.chain[start].name])
        while start and isinstance(front := self.chain[start - 1].module, (nn.Flatten, nn.Identity, Normalise)):
            start -= 1
            inputs = inputs.reshape(len(inputs), *self.shapes[start])
            inputs = front.pixels(inputs) if isinstance(front, Normalise) else inputs
        features = run(self.chain[index:-1], found.values)
        errors = self.head(features).softmax(1) - nn.functional.one_hot(found.labels, self.update.num_classes)
        signals = Signals(
            labels=found.labels,
            features=features,
            errors=errors,
            residuals=found.residuals,
            certificates=found.shares,
            uncertainty=found.uncertainty,
            freedom=found.freedom,
            rank=found.batch_size if found.complete else len(found),
            seconds=time.perf_counter() - self.began,
        )
        return Reading(signals, start, inputs, list(self.rows.values()), self.recovered)

    def _descended(self, found: Inputs, index: int) -> Descent:
        given = Update(self.update.gradients, self.update.batch_size, additive=self._additive())
        try:
            return descend(
                self.chain,
                self.update.image_shape,
                given,
                index,
                found.values,
                found.labels,
                generator=self.generator,
                deadline=self.deadline,
            )
        except (RuntimeError, ArithmeticError):
            return Descent({index: found.values}, {}, {self.chain[index].name: torch.zeros_like(found.values)}, [])

    def _additive(self) -> float:
        """Noise that was added to the gradients; 0 where no more than rounding shows."""
        gradient, _ = Head.of(self.model).among(self.update.gradients)
        noise = measured_noise(self.update.gradients, self.model)
        if gradient is None or noise < ROUNDED * precision_of(gradient) * float(
            gradient.double().square().mean().sqrt()
        ):
            return 0.0
        return noise

    # ------------------------------------------------------------------------------------------------
    # What is written down

    def _note(self, name: str, note: str, **facts: object) -> None:
        row = self.rows[name]
        notes = [row["note"], note] if row["note"] else [note]
        row |= facts | {"note": "; ".join(notes), "seconds": row["seconds"] + facts.get("seconds", 0.0)}

    def _note_walk(self, record: Record) -> None:
        noise, row = float(record.noise.max()) if len(record.noise) else None, self._row_of(record.name)
        if row is None:
            self._note(next(iter(self.rows)), record.reason)
            return
        known = f"known from above, but {record.behind} fell behind" if record.behind else "known from above"
        self._note(
            row,
            record.reason or known,
            determined=record.determined,
            residual=None if math.isnan(record.residual) else record.residual,
            uncertainty=noise,
            seconds=record.seconds,
        )

    def _row_of(self, name: str) -> str | None:
        """The layer whose inputs the walk has sought at a stage: the first of a block, the one below a pool.

        None where no layer is left below.
        """
        if name in self.rows:
            return name
        index = index_of(self.chain, name)
        if isinstance(self.chain[index].module, Residual):
            return next(parametrised([self.chain[index]])).name
        below = [stage.name for stage in parametrised(self.chain[:index])]
        return below[-1] if below else None

    def _why_not(self) -> str:
        """In a line, what came of each layer that was asked, and how many were not worth asking."""
        asked = [f"{row['layer']}: {row['note']}" for row in self.rows.values() if row["note"]]
        others = len(self.rows) - len(asked)
        if others:
            asked.append(
                f"{others} layers have too many positions or too few channels for {self.update.batch_size} images"
            )
        return "; ".join(asked)


def _blank_rows(chain: Chain, image_shape: Sequence[int], batch_size: int) -> dict[str, dict]:
    """A row for every layer, with what is known of it without any measurement."""
    known = ("layer", "positions", "rank_bound", "spanned")
    return {
        row["layer"]: dict.fromkeys(COLUMNS) | {name: row[name] for name in known} | {"seconds": 0.0, "note": ""}
        for row in explain(chain, image_shape, batch_size)
    }
