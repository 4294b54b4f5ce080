"""Single images from one averaged gradient: which layer to ask, what it says, and how far down that leads.

Layers whose gradient spans their inputs are asked one after the other, the most promising first (`layer_choice`): their
inputs are told apart from their mixtures, with labels (`peel`), until all images of the batch are known somewhere. A
head whose features have no zeros has two methods of its own (`head`), for all images at once: with label counts from
random images, which an untrained network of many classes resembles, and with counts by trial. From there linear algebra
leads down, layer by layer (`attack.walk`). What cannot be certain is not used, and every layer that was asked says what
came of it.
"""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from attack.local.closed_system import ClosedSystem
from attack.local.head_in_steps import features_in_steps
from attack.local.peel_in_time import peel_in_time
from attack.match.entries import told_by
from attack.read.arithmetic import additive_noise, blurred, forward_errors, rounding_of_weights, roundings_of_weights
from attack.read.carried import carried_down, inverted, layers_below, owned
from attack.read.head.whole import WholeHead
from attack.read.jointly import Upwards, told_apart_jointly
from attack.read.layer_choice import CandidateLayer, candidate_layers, farther_up, order
from attack.read.layer_rows import LayerRows
from attack.read.left_out import left_out
from attack.read.one_step import against_one_step
from attack.read.peel import Above, unmix
from attack.read.reading import Reading, ReadingAbortedError
from attack.read.signals import Signals
from attack.read.span import Span
from attack.read.whole_pixels import WholePixels
from attack.solve.budget import OutOfTimeError, WorkBudget
from attack.solve.rounding import precision_of
from attack.walk.noise import is_after_relu, without_noise
from attack.walk.trajectory import OnePass
from attack.walk.walk import BatchGradients, Descent, descend
from network.chain import input_shapes, mixes_images, modules, shift_before
from network.parametrised import with_weights
from network.stage import Stage, run
from network.tracing import stages
from update.batchnorm import batchnorms
from update.evidence import Evidence
from update.shared import SharedUpdate

READING_WORK = 3e10  # of the programmes of a reading, see `attack.solve.programmes`: ten minutes of a core, about
SHARE = 0.5  # of the work left that one layer may take while others wait
OUT_OF_TIME = "the clock (--max_seconds) has stopped the reading"
EXPLAINED = 3.0  # units of the rounding of weights that noise in a difference of weights may be


def read_layers(
    update: SharedUpdate,
    model: nn.Module,
    *,
    generator: torch.Generator,
    in_steps: bool = False,
    labels: Tensor | None = None,
    work: float = READING_WORK,
    max_seconds: float = math.inf,
    tick: Callable[[], object] = lambda: None,
) -> Reading:
    """Tell the images of the batch apart, and follow them down, in float64, from the update and the model alone.

    Args:
        update: the client's.
        model: that it was computed on.
        generator: what starts, programmes and recovery tests are drawn from (on the CPU).
        in_steps: whether the client's one pass is followed step by step; else the update is taken for a gradient.
        labels: (B,) in the order of these steps, where they are known: the head alone is asked then.
        work: that the search may take.
        max_seconds: of wall time, after which the reading is aborted. It decides nothing else: work is what is counted.
        tick: called now and then.

    Raises:
        ValueError: nothing can be read; the message says which layers were tried and why each was no use.
        ReadingAbortedError: nothing was read before the clock ran out.
    """
    if update.is_rescaled:  # its images' errors have other lengths than the equations give them
        raise ValueError(f"by how much {update.defence} has shortened the update is not known exactly, image by image")
    if not told_by(tuple(update.gradients.values()), update).is_legible:
        raise ValueError(f"no image can be told apart: {update.defence} leaves no entry its value")
    budget = WorkBudget(work, deadline=time.perf_counter() + max_seconds, tick=tick)
    update = replace(update, gradients=with_weights(update.gradients, model))
    return _Reader(update, model, generator, budget, in_steps=in_steps, labels=labels).read()


@dataclass(frozen=True)
class Glance:
    """What a reading without the walk finds: images told apart, and whether any layer spans its inputs at all."""

    told_apart: int
    is_spanned: bool


def glance(
    update: SharedUpdate, model: nn.Module, *, generator: torch.Generator, work: float, tick: Callable[[], object]
) -> Glance:
    """How many images can be told apart with so much work, nothing followed any further.

    Raises:
        ValueError: the model cannot be taken apart.
    """
    reader = _Reader(update, model, generator, WorkBudget(work, tick=tick))
    found, _ = reader.told_apart()
    return Glance(0 if found is None else len(found), reader.is_spanned)


class _Reader:
    """One reading: the network in float64, the budget, and the rows of the layers asked so far."""

    def __init__(
        self,
        update: SharedUpdate,
        model: nn.Module,
        generator: torch.Generator,
        budget: WorkBudget,
        *,
        in_steps: bool = False,
        labels: Tensor | None = None,
    ) -> None:
        self.in_steps, self.labels = in_steps, labels
        self.update, self.model, self.generator, self.budget = update, model, generator, budget
        stages(model)  # refuses one that is not what its graph says, which a copy would not show
        self.began, self.is_aborted = time.perf_counter(), False
        self.chain: list[Stage] = stages(copy.deepcopy(model).double().requires_grad_(False))
        self.shapes = input_shapes(self.chain, update.image_shape)
        self.head = self.chain[-1].module
        self.like = self.head.weight.new_zeros(1)
        inside = None if in_steps else update.batch_size
        layers = candidate_layers(self.chain, update.image_shape, update.gradients, inside)
        layers = [layer.at_any_step(update.gradients) for layer in layers] if in_steps else layers
        self.candidates = {layer.name: layer for layer in layers}
        self.rows = LayerRows(self.chain, update.image_shape, update.batch_size)
        self.recovered: dict[str, Tensor] = {}
        self.spans: dict[str, Span] = {}
        # relative errors of each stage's inputs, by the client's arithmetic and by what its defence left out
        self.forward = [0.0] * len(self.chain)
        self.noise_shares: dict[str, float] = {}  # of the layers that were asked, see `Span.noise_share`

    def read(self) -> Reading:
        """Ask the layers in turn, then walk down from the best of them."""
        best, at = self.told_apart()
        if best is None:
            kind = ReadingAbortedError if self.is_aborted else ValueError
            raise kind(f"no image can be told apart: {self.rows.why_not()}")
        # a defence explains noise in the gradient by itself
        noise = self._noise_share(at) if self.update.defence == "none" else 0.0
        precision = min(map(precision_of, self.update.gradients.values()))  # tensors of few entries may look rounded
        coarse = forward_errors(self.model, self.update.image_shape, noise, precision)
        missing = left_out(self.update, self.chain, at.index)
        self.forward = list(map(math.hypot, coarse, missing))
        self.rows.blur(self.forward)
        best = replace(blurred(best, coarse[at.index]), left_out=missing[at.index])
        return self._in_steps(best, at) if self.in_steps else self._followed(best.surest_first(), at)

    def _noise_share(self, layer: CandidateLayer) -> float:
        """The share of a layer's gradient that is noise, and not the rounding of weights whose difference it is."""
        share, floor = self.noise_shares[layer.name], self._floor(layer)
        if floor is None:
            return share
        gradient = self.update.gradients[f"{layer.name}.weight"]
        return max(0.0, share - EXPLAINED * float(floor.norm() / gradient.norm()))

    def told_apart(self) -> tuple[Signals | None, CandidateLayer | None]:
        """The most images that one of the layers tells apart, and the layer; None where none tells any."""
        best, at = None, None
        asked = [layer for layer in self.candidates.values() if self.labels is None or self._is_head(layer)]
        waiting = order(asked, self.update.batch_size, self.like)
        while waiting:
            layer = waiting.pop(0)
            found = self._asked(layer, is_last=not waiting)
            if found is not None and (best is None or len(found) > len(best)):
                best, at = found, layer
            if self.is_aborted or (best is not None and best.complete):
                break
            waiting = farther_up(waiting, layer)
        return best, at

    @property
    def is_spanned(self) -> bool:
        """Whether the gradient of a layer that was asked determines the space of its inputs."""
        return self.rows.is_spanned

    # ------------------------------------------------------------------------------------------------
    # One layer's word

    def _asked(self, layer: CandidateLayer, *, is_last: bool) -> Signals | None:
        """What one layer says of the images; None where that is nothing. It is written down in any case."""
        began, found, facts = time.perf_counter(), None, {}
        budget = self.budget.part(1.0 if is_last else SHARE)
        try:
            span = self._span(layer)
            self.noise_shares[layer.name] = span.noise_share
            facts = {
                "rank": span.rank, "dimension": span.dimension, "gap": span.gap, "determined": span.determined,
            }  # fmt: skip
            if not span.determined:
                raise ValueError(f"dim A is {span.dimension} with a gap of {span.gap:.1f}")
            found = self._told_apart(layer, span, budget)
            note = f"{len(found)} of {self.update.batch_size} images told apart"
            if not found.complete and budget.is_spent:
                note += ", then no work was left"
        except OutOfTimeError:
            note = OUT_OF_TIME
        except (ValueError, RuntimeError, ArithmeticError) as error:  # no layer's failure ends a reading
            note = str(error).partition("\n")[0]
        self.budget.returned(budget)
        if self.budget.is_out_of_time:
            self.is_aborted = True
            note = note if note == OUT_OF_TIME else f"{note}; {OUT_OF_TIME}"
        if found is not None and len(found):
            facts |= {"residual": float(found.residuals.max()), "uncertainty": float(found.uncertainty.max())}
            self.recovered[layer.name] = layer.all_inputs(found.values)
        self.rows.note(layer.name, note, **facts, seconds=time.perf_counter() - began)
        return found if found is not None and len(found) else None

    def _span(self, layer: CandidateLayer) -> Span:
        if layer.name not in self.spans:
            how = (self.update.batch_size, self.like, self._floor(layer))
            self.spans[layer.name] = layer.span(self.update.gradients, *how)
        return self.spans[layer.name]

    def _floor(self, layer: CandidateLayer) -> Tensor | None:
        """The error of each row that is known beforehand; None of a gradient."""
        return rounding_of_weights(self.update, self.model, layer.name) if self.in_steps else None

    def _told_apart(self, layer: CandidateLayer, span: Span, budget: WorkBudget) -> Signals:
        if self.in_steps:
            return self._told_apart_in_steps(layer, span, budget)
        if (
            self._is_head(layer)
            and span.batch_size > 1
            and not layer.inputs.is_sparse
            and self.update.training.loss.is_cross_entropy
        ):
            whole = WholeHead(self.update, self.model, self.head, span, self.generator, budget)
            return whole.told_apart(layer.inputs, lambda: self._peeled(layer, span, budget))
        if layer.mixes:
            return told_apart_jointly(span, self._upwards(layer), generator=self.generator, budget=budget)
        return self._peeled(layer, span, budget)

    def _peeled(self, layer: CandidateLayer, span: Span, budget: WorkBudget, given: Signals | None = None) -> Signals:
        """One image after the other, without those that are given."""

        def tail(inputs: Tensor, outputs: Tensor) -> Tensor:
            budget.tick()
            return layer.tail(inputs, outputs)

        above = [self._above(*follower) for follower in self._linked(layer)]
        how = {"is_sparse": layer.inputs.is_sparse, "generator": self.generator, "budget": budget}
        how |= {"is_gated": layer.behind.is_sparse, "given": given}
        if layer.beneath is None:  # what lies below an inner layer of a block is no chain
            how |= {"pixels": WholePixels(self.chain[: layer.index], self.shapes)}
        return unmix(span, layer.layer, tail, above=above, loss=self.update.training.loss, **how)

    def _is_head(self, layer: CandidateLayer) -> bool:
        return layer.index == len(self.chain) - 1

    def _told_apart_in_steps(self, layer: CandidateLayer, span: Span, budget: WorkBudget) -> Signals:
        what, how = (self.update, self.model), (self.generator, budget)
        if not (self._is_head(layer) and layer.inputs.is_smooth):
            return peel_in_time(*what, layer.name, span, *how)
        if self.labels is None:
            raise ValueError("behind a smooth activation its images are told by their labels and minibatches alone")
        return features_in_steps(*what, span, self.labels, *how)

    def _upwards(self, layer: CandidateLayer) -> Upwards:
        """The network above a layer whose images are mixed further up."""

        def both(inputs: Tensor) -> tuple[Tensor, Tensor]:
            self.budget.tick()
            features = run(self.chain[layer.index : -1], inputs)
            return features, self.head(features)

        given = self._given
        gradient = given.of(self.chain[-1].name, self.like)
        if gradient is None:
            raise ValueError("the update holds no gradient of the model's last layer")
        shift = given.summed(shift_before(self.chain[: layer.index]), self.like)
        return Upwards(both, gradient, self.update.training.loss, shift)

    def _linked(self, layer: CandidateLayer) -> Iterator[tuple[str, float]]:
        """The layers behind a fully connected one that help with it, as far as the update has them."""
        return itertools.takewhile(lambda each: f"{each[0]}.weight" in self.update.gradients, layer.followers)

    def _above(self, name: str, slope: float) -> Above:
        layer = self.candidates[name]
        return Above(self._span(layer), layer.layer, layer.tail, slope)

    # ------------------------------------------------------------------------------------------------
    # Down

    def _followed(self, found: Signals, at: CandidateLayer) -> Reading:
        """The images found at a layer, at the deepest stage that leads from there."""
        for name in at.entrances:
            self.rows.note(name, f"known by {at.name}", determined=True, uncertainty=float(found.uncertainty.max()))
        doubts = self._doubts(found, at)
        reading = self._entered(found, at)
        spanned = order(list(self.candidates.values()), self.update.batch_size, self.like)
        below = layers_below(spanned, at, self.chain)
        if below and below[-1].index < reading.start:
            found, at, *some = self._carried_down(found, at, below)
            reading = self._entered(found, at) if at.index < reading.start else reading
            reading = self._with_pixels(reading, *some)
            doubts = self._doubts(*some) if doubts and found.complete else doubts  # images are surer further down
        return replace(reading, doubts=doubts)

    def _doubts(self, found: Signals, at: CandidateLayer) -> tuple[Evidence, ...]:
        """What says that the images of a layer were not used in one step."""
        return against_one_step(found, at, self._span(at), self.update.training.loss, self.generator, self.budget)

    def _with_pixels(self, reading: Reading, some: Signals, at: CandidateLayer) -> Reading:
        """With the pixels of some of the images, where a layer's inputs are these; such images then come first."""
        if mixes_images(modules(self.chain)):  # these are followed all at once
            return reading
        images = WholePixels(self.chain[: at.index], self.shapes).images(at.stage_inputs(some.values))
        if images is None or not reading.start:
            return reading
        owners, images = owned(images, reading.inputs, self.chain[: reading.start])
        order = owners + [i for i in range(len(reading)) if i not in owners]
        return replace(reading, signals=reading.signals.pick(order), inputs=reading.inputs[order], pixels=images)

    def _entered(self, found: Signals, at: CandidateLayer) -> Reading:
        """The images found at a layer, and what a walk from there makes known."""
        entered = replace(found, values=at.stage_inputs(found.values))
        features = run(self.chain[at.index : -1], entered.values)
        loss = self.update.training.loss
        loss = loss.of_batch(found.labels) if found.complete else loss
        errors = loss.errors(self.head(features), found.labels)
        return self._walked(entered, at, features, errors, self._given)

    def _carried_down(
        self, found: Signals, at: CandidateLayer, below: list[CandidateLayer]
    ) -> tuple[Signals, CandidateLayer, Signals, CandidateLayer]:
        """The images found at the lowest of these layers that all lead down to, with those told apart on the way.

        And those of them that go furthest, at the layer that they lead down to.
        """
        some, lowest = found, at
        for lower in below:
            began, budget, more, facts = time.perf_counter(), self.budget.part(SHARE), None, {}
            try:
                span, loss = self._span(lower), self.update.training.loss
                known = carried_down(some, lowest, lower, span, loss, self.chain, self.shapes)
                more = known.joined(self._peeled(lower, span, budget, known))
                note = f"{len(known)} images known by {lowest.name}, {len(more) - len(known)} more told apart"
            except OutOfTimeError:
                note, self.is_aborted = OUT_OF_TIME, True
            except (ValueError, RuntimeError, ArithmeticError) as error:  # the images stay where they were told apart
                note = str(error).partition("\n")[0]
            self.budget.returned(budget)
            if more:
                some, lowest = blurred(more, self.forward[lower.index]).surest_first(), lower
                facts = {"residual": float(some.residuals.max()), "uncertainty": float(some.uncertainty.max())}
                self.recovered[lower.name] = some.values
                found, at = (some, lowest) if len(some) >= len(found) else (found, at)
            self.rows.note(lower.name, note, **facts, seconds=time.perf_counter() - began)
            if not more:
                break
        return found, at, some, lowest

    def _in_steps(self, found: Signals, at: CandidateLayer) -> Reading:
        """The images found at a layer, each at the weights of its own step, at the deepest stage."""
        system = ClosedSystem(self.update, self.model, at.index)
        features, errors = system.at_the_head(found.values, found.labels)
        deltas = system.deltas(found.values, found.labels)
        steps = OnePass(self.update.training.coefficients(), system.sizes, system.counts, deltas)
        given = replace(self._given, additive=0.0, errors=roundings_of_weights(self.update, self.model))
        return self._walked(found, at, features, errors, given, steps)

    def _walked(
        self,
        found: Signals,
        at: CandidateLayer,
        features: Tensor,
        errors: Tensor,
        given: BatchGradients,
        steps: OnePass | None = None,
    ) -> Reading:
        """Images found by the inputs of a layer's stage, with features and errors, and what a walk makes known."""
        start, inputs = at.index, found.values
        if found.complete:
            descent = self._descended(found, start, given, steps)
            for record in descent.records:
                self.rows.note_walk(record, self.forward)
            self.recovered |= descent.inner | {self.chain[i].name: inputs for i, inputs in descent.inputs.items()}
            start = descent.deepest
            inputs = descent.inputs[start]
            if is_after_relu(self.chain[:start]):  # its noise is that of this stage, not of the one that was unmixed
                inputs = without_noise(inputs, descent.noise[self.chain[start].name])
        return self._reading(
            replace(found, values=features, deltas=errors),
            *inverted(self.chain, self.shapes, start, inputs, with_parameters=not self.in_steps),
        )

    def _reading(self, signals: Signals, start: int, inputs: Tensor) -> Reading:
        """What was found at the head and at the deepest stage."""
        seconds, layers = time.perf_counter() - self.began, list(self.rows)
        is_aborted = self.is_aborted or self.budget.is_out_of_time
        return Reading(signals, start, inputs, layers, self.recovered, seconds, is_aborted, self.in_steps)

    def _descended(self, found: Signals, index: int, given: BatchGradients, steps: OnePass | None) -> Descent:
        how = {"generator": self.generator, "budget": self.budget, "steps": steps}
        try:
            given = replace(given, loss=given.loss.of_batch(found.labels))
            return descend(self.chain, self.update.image_shape, given, index, found.values, found.labels, **how)
        except (RuntimeError, ArithmeticError):
            return Descent({index: found.values}, {}, {self.chain[index].name: torch.zeros_like(found.values)}, [])

    @cached_property
    def _given(self) -> BatchGradients:
        """What the walk takes from the update."""
        names = batchnorms(self.model)
        moments = {names[layer]: both for layer, both in self.update.batch_moments(self.model).items()}
        how = {"loss": self.update.training.loss, "moments": moments}
        return BatchGradients(
            self.update.gradients, self.update.batch_size, additive_noise(self.update, self.model), **how
        )
