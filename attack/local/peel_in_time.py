"""Images of a client that went through them once, a minibatch a step: told apart at a layer, step by step.

The update is a sum over all images, as a gradient is, but each image's delta is that of its own step's weights. At the
first step these are the server's. So the images of the first minibatch are told apart as in a gradient; then the layers
above are moved as the client moved them (`closed_system`), and the images of the next minibatch are told apart in what
is left of the same span.

Behind a ReLU all images of all steps are told apart at once, by their zeros alone (`attack.read.by_zeros`). The layer's
gradient then gives every image's delta by least squares. The step and the label of an image are those at which the
network above gives this delta.

What was found of all steps is believed by its replay: trained on it, the layer makes its own part of the update, but
for what the expected errors of the images leave. Where images are missing there is no such word. Then the images that
were found first must speak for themselves, by certificates as exact as their values, and by labels that no other comes
near: the errors of later steps may have made differences of labels part of the span.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from attack.local.closed_system import ClosedSystem
from attack.read.by_zeros import told_by_zeros
from attack.read.candidates import ImageEquations, by_position, nobody
from attack.read.layer_choice import CandidateLayer, candidate_layers
from attack.read.peel import unmix
from attack.read.signals import Signals
from attack.read.span import Span
from attack.solve.budget import WorkBudget
from network.chain import index_of
from network.tracing import stages
from update.shared import SharedUpdate

PAIRED = 30.0  # expected errors by which a true image's certificate may be off: up to 13 were seen, of others 700
UNPAIRED = 1e-2  # but never by more
CLEAR_LABEL = 10.0  # times its own mismatch that the next best label's must be
UNCLEAR = 1e-4  # and at least this
REPLAYED = 10.0  # times what the images' expected errors leave that a replay may leave: right ones leave 0.1 to 2.6
CLOSE = 1e-2  # but never a larger share of the layer's gradient: a training that breaks the network repeats nothing
SWAPS = 1.0  # times the same, from which on another order of the images is tried
ROUNDS = 12  # of such trials, at most
SCALINGS = 8  # steps of Newton's method to the scale at which a certificate is 1
STRIDE = 0.1  # largest step of the scale's logarithm
NUDGE = 1e-4  # of the scale's logarithm, by which certificates are differentiated
SHARE = 0.2  # of the work for single steps, where zeros have not told all images


def peel_in_time(
    update: SharedUpdate, model: nn.Module, name: str, span: Span, generator: torch.Generator, budget: WorkBudget
) -> Signals:
    """The images of a client's one pass that a layer tells apart, in the order of their steps.

    Args:
        update: the client's.
        model: that the server sent out.
        name: of the layer, one of `candidate_layers`.
        span: of its part of the update.
        generator: what programmes and starts are drawn from (on the CPU).
        budget: images that are not found before its work or its time is spent are omitted.

    Raises:
        ValueError: the layers above it depend on more than its inputs.
        OutOfTimeError: the budget's clock has run out before anything was certain.
    """
    system = ClosedSystem(update, model, index_of(stages(model), name))
    layers = candidate_layers(system.chain, update.image_shape, update.gradients)
    (layer,) = (layer for layer in layers if layer.name == name)
    gradient = update.gradients[f"{name}.weight"]
    return PeelInTime(system, layer, span, gradient, generator, budget).told_apart()


@dataclass(frozen=True)
class _Order:
    """Which images, as indices (b,), are in each step; the coordinates (B, dim A), zeros and labels (B,) of all."""

    parts: list[Tensor]
    c: Tensor
    zeros: Tensor
    labels: Tensor


class PeelInTime:
    """One layer's images.

    Args:
        system: the network from the layer's stage up.
        layer: one of the system's own `candidate_layers`.
        span: of the layer's part of the update.
        gradient: of the layer's weight in the update.
        generator: what programmes and starts are drawn from (on the CPU).
        budget: images that are not found before its work or its time is spent are omitted.
    """

    def __init__(
        self,
        system: ClosedSystem,
        layer: CandidateLayer,
        span: Span,
        gradient: Tensor,
        generator: torch.Generator,
        budget: WorkBudget,
    ) -> None:
        self.system, self.layer, self.span, self.generator, self.budget = system, layer, span, generator, budget
        self.gradient = gradient.reshape(len(span.rows), -1).to(span.basis) * span.rows[:, None]

    def told_apart(self) -> Signals:
        """The images found, in the order of their steps: all of each step but, maybe, the last."""
        found = self._all_by_zeros()
        return self._peeled() if found is None else found

    # ------------------------------------------------------------------------------------------------
    # All at once

    def _all_by_zeros(self) -> Signals | None:
        """All images of the batch, where their zeros tell them and their replay is the update; None where not."""
        span = self._scaled_span
        if span is None or not self.layer.inputs.is_sparse or not 1 < span.dimension == span.batch_size:
            return None
        c, zeros = told_by_zeros(self._equations(span), self.generator, self.budget)
        if len(c) < span.batch_size:
            return None
        order = self._ordered(c, zeros)
        found = self._described(order)
        expected, left = self._expected(found), self._left_in(order)
        for _ in range(0 if self.is_rough else ROUNDS):
            if left <= SWAPS * expected:
                break
            swapped = min(self._swapped(order), key=self._left_in)
            if self._left_in(swapped) >= left:
                break
            order, left = swapped, self._left_in(swapped)
        return self._described(order) if left <= min(CLOSE, REPLAYED * expected) else None

    @property
    def is_rough(self) -> bool:
        """Whether a BatchNorm behind the layer, which the client trains, tells the scale of inputs, nearly."""
        return self.span.ones is None

    @property
    def _scaled_span(self) -> Span | None:
        """The span with what tells the scale of inputs; None where nothing does."""
        if not self.is_rough:
            return self.span
        told = self.layer.bias_gradient
        return None if told is None else self.span.with_ones(told)

    def _ordered(self, c: Tensor, zeros: Tensor) -> _Order:
        """Step after step, the images whose deltas the tail gives best."""
        system, c = self.system, c.clone()
        deltas = ImageEquations(self.span, self.layer.layer, self.layer.tail, system.training.loss).deltas_told(c)
        parts, labels, rest = [], torch.zeros_like(c[:, 0], dtype=torch.long), torch.arange(len(c), device=c.device)
        system.restart()
        for size, count in zip(system.sizes, system.counts, strict=True):
            told = deltas[rest] / count
            off, own = (self._equations().mislabelled(c[rest], told) / told.norm(dim=1, keepdim=True)).min(1)
            order = off.argsort()
            part = rest[order[:size]]
            labels[part] = own[order[:size]]
            if self.is_rough:
                c[part] = self._paired(c[part], zeros[part], labels[part])
            system.learn(self.span.inputs(c[part]), labels[part])
            parts.append(part)
            rest = rest[order[size:]]
        return _Order(parts, c, zeros, labels)

    def _paired(self, c: Tensor, zeros: Tensor, labels: Tensor) -> Tensor:
        """Coordinates (b, dim A) of images of the present step, scaled such that their certificates are 1."""
        equations = self._equations()
        for _ in range(SCALINGS):
            certificates, slope = _certificates(equations, c, zeros, labels)
            c = c * ((1 - certificates) / slope).clamp(-STRIDE, STRIDE).exp()[:, None]
        return c

    def _swapped(self, order: _Order) -> Iterator[_Order]:
        """The order with two images of different steps in each other's place."""
        for later in range(len(order.parts)):
            for earlier in range(later):
                for i in range(len(order.parts[later])):
                    for j in range(len(order.parts[earlier])):
                        parts = [part.clone() for part in order.parts]
                        parts[later][i], parts[earlier][j] = order.parts[earlier][j], order.parts[later][i]
                        yield replace(order, parts=parts)

    def _left_in(self, order: _Order) -> float:
        """The share of the layer's weighted gradient that a replay of the training in this order leaves."""
        self.budget.check()
        each = torch.cat(order.parts)
        return self._left(self.span.inputs(order.c[each]), order.labels[each])

    def _left(self, values: Tensor, labels: Tensor) -> float:
        """The same of inputs (B, ...) with labels (B,), in the order of their steps."""
        system = self.system
        system.restart()
        for part in system.parts(len(values)):
            system.learn(values[part], labels[part])
        replayed = system.update[f"{self.layer.name}.weight"].reshape(self.gradient.shape)
        return float((replayed * self.span.rows[:, None] - self.gradient).norm() / self.gradient.norm())

    def _expected(self, found: Signals) -> float:
        """The share that the expected errors of these images leave, and noise."""
        deltas, patches = by_position(found.deltas) * self.span.rows, self.span.geometry.patches(found.values)
        sizes = (deltas.norm(dim=2) * patches.norm(dim=2)).norm(dim=1) * self._counts(found)
        blurred = (sizes * found.uncertainty).norm() / (self.span.batch_size * self.gradient.norm())
        return float(torch.hypot(blurred, blurred.new_tensor(self.span.noise_share)))

    def _described(self, order: _Order) -> Signals:
        """The images as signals, step by step, the surest of a step first."""
        found = nobody(self.span)
        self.system.restart()
        for part in order.parts:
            equations, c, zeros = self._equations(self._scaled_span), order.c[part], order.zeros[part]
            own = equations.described(c, zeros, order.labels[part])
            if self.is_rough:  # the scale is that of the certificates, and what told it nearly says nothing of errors
                _, slope = _certificates(equations, c, zeros, own.labels)
                scale = equations.pairing_noise(c, own.deltas) / slope.abs()
                own = replace(own, uncertainty=torch.hypot(equations.by_zeros(c, zeros)[1], scale))
            own = own.surest_first()
            found = found.joined(own)
            self.system.learn(own.values, own.labels)
        return found

    # ------------------------------------------------------------------------------------------------
    # Step by step

    def _peeled(self) -> Signals:
        """The images of one step after the other, as far as the network above is known."""
        system, layer, found = self.system, self.layer, nobody(self.span)
        system.restart()
        for step, size in enumerate(system.sizes):
            budget = self.budget.part(SHARE / (len(system.sizes) - step))
            own = unmix(
                self._own_span(),
                layer.layer,
                layer.tail,
                is_sparse=layer.inputs.is_sparse,
                generator=self.generator,
                budget=budget,
                loss=system.training.loss,
                given=self._beside(found),
                enough=partial(self._are_enough, size),
            )
            self.budget.returned(budget)
            own = own.pick(self._speaks_for_itself(own))
            own = own.pick(own.residuals.argsort()[:size]).surest_first()
            found = found.joined(own)
            if len(own) < size:
                return found
            system.learn(own.values, own.labels)
        is_certified = self._left(found.values, found.labels) <= min(CLOSE, REPLAYED * self._expected(found))
        return found if is_certified else found.pick(torch.arange(system.sizes[0], device=found.labels.device))

    def _are_enough(self, size: int, found: Signals) -> bool:
        """Whether so many of the images speak for themselves."""
        return len(found) >= size and int(self._speaks_for_itself(found).sum()) >= size

    def _speaks_for_itself(self, found: Signals) -> Tensor:
        """Whether each image's certificate is as exact as its values, and its label no other's, (N,)."""
        equations = self._equations()
        mismatch = equations.mismatch(found.values.flatten(1) @ self.span.basis.T)
        best, other = mismatch.topk(2, dim=1, largest=False)[0].T
        is_clear = other > (CLEAR_LABEL * best).clamp(min=UNCLEAR)
        return is_clear & ((found.certificates - 1).abs() < (PAIRED * found.uncertainty).clamp(max=UNPAIRED))

    def _beside(self, found: Signals) -> Signals:
        """Images of earlier steps, their deltas as they count beside an image of the present one."""
        counts = self._counts(found) / self.system.counts[self.system.step]
        return replace(found, deltas=found.deltas * counts.view(-1, *[1] * (found.deltas.dim() - 1)))

    def _counts(self, found: Signals) -> Tensor:
        """How much each image counts in the update, in the order of the steps, (N,)."""
        each = torch.tensor(self.system.counts).repeat_interleave(torch.tensor(self.system.sizes))
        return each.to(found.values)[: len(found)]

    # ------------------------------------------------------------------------------------------------
    # At the present step

    def _own_span(self, span: Span | None = None) -> Span:
        """A span (None: the layer's own), scaled such that an image of the present step counts as one of a mean."""
        span, count = span or self.span, self.system.counts[self.system.step]
        return replace(span, sigma=span.sigma / count, noise=span.noise / count)

    def _equations(self, span: Span | None = None) -> ImageEquations:
        """Of a single image of the present step, in a span, or in the layer's own."""
        return ImageEquations(self._own_span(span), self.layer.layer, self.layer.tail, self.system.training.loss)


def _certificates(equations: ImageEquations, c: Tensor, zeros: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The certificates (N,) of inputs, and their derivative by the logarithm of the inputs' scale."""
    here, there = (equations.described(factor * c, zeros, labels).certificates for factor in (1.0, 1 + NUDGE))
    return here, (there - here) / NUDGE
