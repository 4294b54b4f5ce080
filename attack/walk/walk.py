"""Down, layer by layer: from the exact inputs of one layer to those of the layers below it, by linear algebra.

Once inputs and labels are known at one place, one backward pass of the known tail gives every image's own delta there,
and the layer below obeys equations that are linear in its own input, see `equations`. Their solution is the next known
place. Between the layers:

- Other stages. Each kind of layer says what known outputs tell of its inputs (`network.kinds`).
- Masks. Behind a ReLU an entry is active or not; recovered with noise, inactive entries are not quite zero. Noise is
  measured by the entries below zero (`noise`), and masks that it leaves in doubt are decided by the residual (`masks`).
- Residual blocks. The body's layers but the lowest are solved by their gradient alone; the body's output is then known,
  and out - body is the shortcut's output, wherever the ReLU behind the sum is active. Where no ReLU stands there and
  the shortcut is the identity, that is the block's input, and the lower layers of the body need not be solved.
- Layers of a body whose gradient has too few rows. Their input is a function of the block's input, which the block maps
  to its output. Both together determine the block's input, nonlinearly, see `block`.
- Gates in front of a sum. What such a gate puts out is not known, and delta below it depends on what comes into it. So
  the layer below it is one of those whose equations are taken together with the block's; delta is then a function too.

Images that are too weak. An image that the network is sure of hardly moves the gradient, and its inputs come out
accordingly: in a trained network's batch of 32 the loudest may be 5,000 times as loud as the quietest. The walk goes on
without a few of them: below, their inputs are only the best that there are, and gradients are trusted no further than
these images' share in them. Pixels cannot be improved any more, so they are found of all images or of none.

Several steps. Each image has met the weights of its own step, which its inputs and those of earlier steps tell
(`trajectory`). Residual blocks are not solved as a whole there.

Every layer leaves a `Record`. The walk ends at the first layer that is not believed, and the record says why.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from attack.solve.budget import OutOfTimeError, WorkBudget
from attack.walk.block import Together
from attack.walk.equations import ENOUGH
from attack.walk.gates import contradicted, gates_behind, is_held
from attack.walk.gauge import Gauge, is_part_of_layer_below, why_not_in_front
from attack.walk.layer_solve import LayerSolver, Record, SolvedLayer
from attack.walk.layer_source import BatchGradients, layer_source
from attack.walk.masks import balanced
from attack.walk.methods import Alone, BlockInput, LayerInBlock, SolveMethod, rows_of
from attack.walk.noise import beside, is_after_relu, noise_of, relative, size_of
from attack.walk.normalised import BehindNorm
from attack.walk.per_image import Factors
from attack.walk.sources import (
    BehindNormSource,
    GatedSource,
    IdentitySource,
    NormalisedSource,
    SkippedBlock,
    Source,
)
from attack.walk.trajectory import MovingMap, OnePass, Trajectory
from attack.walk.way import Given, Way
from network.chain import input_shapes, inputs_along, mean_before, parameters, parametrised, shift_before, skips
from network.kinds import kind_of
from network.kinds.affine import LinearMap
from network.kinds.joining import is_joined
from network.kinds.norm import MIXES
from network.kinds.product import CUT_OFF
from network.known_outputs import KnownOutputs, UndeterminedError
from network.stage import Chain, Gate, Residual, Stage, run
from update.loss import Loss

ROUNDS = 12  # in which the weights along a client's steps must settle, once those of every step have been met
SETTLED = 1e-6  # relative change of a way that is none


@dataclass(frozen=True)
class Descent:
    """Where the walk ended.

    Attributes:
        inputs: exact inputs (B, ...) by the index of the stage that takes them, the start's among them.
        inner: those of layers within residual stages, by name.
        noise: standard deviation of the errors of both, by name of stage or layer, broadcasts to them.
        records: one for each layer tried, in the order of the walk.
    """

    inputs: dict[int, Tensor]
    inner: dict[str, Tensor]
    noise: dict[str, Tensor]
    records: list[Record]

    @property
    def deepest(self) -> int:
        """The lowest stage whose inputs are known."""
        return min(self.inputs)


@torch.no_grad()
def descend(
    chain: Chain,
    image_shape: Sequence[int],
    gradients: BatchGradients,
    start: int,
    inputs: Tensor,
    labels: Tensor,
    *,
    generator: torch.Generator,
    budget: WorkBudget,
    steps: OnePass | None = None,
) -> Descent:
    """Walk down from the inputs (B, ...) of stage `start`, with labels (B,), as far as the equations determine.

    Args:
        chain: of the model that the update was computed on, in float64.
        image_shape: (C, H, W).
        gradients: of the update.
        start: index of the stage whose inputs are known.
        inputs: float64, exact but for noise.
        labels: class indices.
        generator: what recovery tests are drawn from, on the CPU.
        budget: whose clock is asked; when it has run out the walk ends, and its last record says so.
        steps: of a client that made several, with the images in their order: each layer's weights at them are found
            with its inputs, see `trajectory`. None where all images were seen at the same weights.
    """
    walk = _Walk(gradients, generator, budget, steps)
    shapes = input_shapes(chain, image_shape)
    way = Way.from_known(_first_outputs(chain, start, inputs, labels, gradients.loss, steps))
    known, walk.noises[chain[start].name] = {start: inputs}, way.outputs.noise
    for index in reversed(range(start)):
        stage, began = chain[index], time.perf_counter()
        try:
            if not _is_solved_for(stage):
                way = walk.past(way, stage, shapes[index], chain[:index])
                continue
            needs_all = not any(parametrised(chain[:index]))
            if needs_all and walk.too_weak.any():
                weak = int(walk.too_weak.sum())
                raise UndeterminedError(f"pixels come of all images or of none: {weak} are too weak")
            given, method = walk.given(stage, way, shapes[index], chain[:index])
            how = {"is_rectified": is_after_relu(chain[:index]), "needs_all": needs_all}
            solved = walk.solve(stage.name, given, method, **how)
        except (UndeterminedError, OutOfTimeError) as stop:
            walk.stopped(stage.name, stop, time.perf_counter() - began)
            break
        known[index] = solved.u
        if index:
            way = Way.from_known(solved.outputs)
    return Descent(known, walk.inner, walk.noises, walk.records)


def _is_solved_for(stage: Stage) -> bool:
    """Whether a stage's inputs are solved for, rather than told by its kind."""
    return isinstance(stage.module, Residual) or kind_of(stage.module).is_affine


def _first_outputs(
    chain: Chain, start: int, inputs: Tensor, labels: Tensor, loss: Loss, steps: OnePass | None
) -> KnownOutputs:
    """What is known of the outputs below `start`, by one backward pass of the stages above."""
    if steps is None:
        delta = loss.delta(partial(run, chain[start:]), inputs, labels)
    else:
        delta = steps.deltas * beside(steps.each, steps.deltas)
    nothing = torch.zeros_like(beside(size_of(inputs), inputs))  # beyond rounding, and what shows below zero
    return KnownOutputs.of(inputs, delta, noise_of(inputs, nothing, is_after_relu=is_after_relu(chain[:start])))


@dataclass(frozen=True)
class _Block:
    """A residual stage on the walk.

    Attributes:
        module: the stage's module.
        above: what is known of its output.
        shape: of its input, one image's.
        below: the stages whose outputs that input is.
    """

    module: Residual
    above: KnownOutputs
    shape: tuple[int, ...]
    below: Chain


@dataclass(frozen=True)
class _Branch:
    """What a branch of a residual stage says of the stage's input.

    Attributes:
        given: what says something of the input.
        output: of the branch, once a layer in it is solved; None before.
        output_error: (B,) relative error of the layer's input that the output comes from.
        flips: where the branch's gradient has decided masks behind the block otherwise.
        onward: how to find the block's input, where a layer was only found together with it.
        tells_all: whether its output tells all of the block's input, whatever its lower layers say.
    """

    given: list[Given]
    output: Tensor | None
    output_error: Tensor | None
    flips: Tensor
    onward: SolveMethod | None
    tells_all: bool = False


class _Walk:
    """What the walk carries along: records, the activations found, and which images are too weak."""

    def __init__(
        self, gradients: BatchGradients, generator: torch.Generator, budget: WorkBudget, steps: OnePass | None
    ) -> None:
        self.gradients, self.generator, self.budget = gradients, generator, budget
        self.steps, self.trajectory = steps, Trajectory(steps, gradients.gradients)
        self.records: list[Record] = []
        self.inner: dict[str, Tensor] = {}
        self.noises: dict[str, Tensor] = {}
        self.too_weak = torch.zeros(gradients.batch_size, dtype=torch.bool)

    def solve(
        self, name: str, given: list[Given], method: SolveMethod, *, is_rectified: bool, needs_all: bool
    ) -> SolvedLayer:
        """A layer's input; its record is kept.

        Raises:
            UndeterminedError: it is not believed.
        """
        solver, sources = LayerSolver(self.budget, self.too_weak, needs_all), [each.source for each in given]
        settled = partial(self._along_steps, given, method) if self.steps else None
        solved = solver.solve(name, sources, method, is_after_relu=is_rectified, settled=settled)
        self.records.append(solved.record)
        if not solved.record.determined:
            raise UndeterminedError(solved.record.reason)
        self.too_weak, self.noises[name] = solved.record.too_weak, solved.noise
        for source in solved.sources:
            if isinstance(source, GatedSource):
                self._gate_told(source, solved.u, solved.noise)
        return solved

    def _gate_told(self, source: GatedSource, u: Tensor, noise: Tensor) -> None:
        """Compare a gate with its own layers' gradients, where the input u of the layer in front of it is known."""
        for gate, inputs, delta in gates_behind(source, u):
            contradicted(gate, inputs, delta, self.gradients)
            errors = beside(relative(noise.expand_as(u), u) * size_of(inputs), inputs)
            self._told_along([gate], KnownOutputs.of(inputs, delta, errors))

    def stopped(self, name: str, stop: Exception, seconds: float) -> None:
        """Keep a record of why the walk has ended at a stage, unless a layer's record says it already."""
        reason = "the clock (--max_seconds) has stopped the walk" if isinstance(stop, OutOfTimeError) else str(stop)
        if not self.records or self.records[-1].determined:
            self.records.append(Record(name, reason, seconds=seconds))

    def _along_steps(self, given: list[Given], method: Alone) -> list[Source]:
        """What is given with the weights of each image's own step, which the input itself makes.

        The outputs of later steps say nothing until the weights of these are right, one step more in each round.
        """
        last, change, u = len(self.steps.sizes) - 1, math.inf, None
        for step in range(last + ROUNDS):
            told = [each.source.told_of(self.steps.until(step)) for each in given]
            u = method.approached(told, u if step > last else None)
            before, change = change, max(self.trajectory.learn(each.stages, u, each.way.top.delta) for each in given)
            given = [self._given(self._again(each.way), each.layer, each.shape) for each in given]
            if step >= last and (change < SETTLED or change > before):
                break
        return [each.source for each in given]

    def past(self, way: Way, stage: Stage, shape: tuple[int, ...], rest: Chain) -> Way:
        """Past a stage that is not solved for; `rest` are the stages below it.

        BatchNorm in training mode is handed on to the layer below it, whose equations it is a part of.
        """
        kind = kind_of(stage.module)
        if way.norm is not None:
            raise UndeterminedError(why_not_in_front(stage.module))
        passed = (*way.passed, (stage, shape, rest))
        if way.held or (isinstance(stage.module, Gate) and not way.outputs.is_told and self.steps is None):
            if not is_held(stage.module):
                raise UndeterminedError(CUT_OFF)
            return replace(way, passed=passed, held=(stage, *way.held))
        if is_part_of_layer_below(stage.module, shape, rest) and self.steps is None:
            return replace(way, passed=passed, norm=stage)
        if isinstance(stage.module, Gate) and self.steps is not None and parameters([stage]):
            raise UndeterminedError("a gate's weights move from step to step")
        outputs = self.trajectory.pulled(stage, way.outputs, shape)
        if isinstance(stage.module, Gate):
            contradicted(stage, outputs.values, way.outputs.delta, self.gradients)
            self._told_along([stage], outputs)
        if kind.is_rectifier:
            shift = self.gradients.summed(shift_before([*rest, stage]), outputs.values)
            outputs = outputs if shift is None else balanced(outputs, shift)
        return replace(way, passed=passed, outputs=outputs)

    def _again(self, way: Way) -> Way:
        """The same with the weights that are known by now."""
        new = Way.from_known(way.top)
        for passed in way.passed:
            new = self.past(new, *passed)
        return new

    def _given(self, way: Way, layer: Stage | None, shape: tuple[int, ...]) -> Given:
        """A layer, or the input itself, as a source at the end of a way."""
        if layer is None:
            return Given(IdentitySource(way.outputs), way, layer, shape)
        linear, bias = self._linear(layer.module, shape), self.trajectory.bias_of(layer.module)
        return Given(layer_source(layer, linear, bias, way, self.gradients, self._mask_error()), way, layer, shape)

    def _linear(self, module: nn.Module, shape: tuple[int, ...]) -> LinearMap | MovingMap:
        try:
            return self.trajectory.map_of(module, shape)
        except ValueError as error:
            raise UndeterminedError(str(error)) from None

    def given(self, stage: Stage, way: Way, shape: tuple[int, ...], below: Chain) -> tuple[list[Given], SolveMethod]:
        """All that says something of the input, of that shape, of a layer or residual stage, and how to find it.

        Args:
            stage: the layer, or the residual stage.
            way: that ends behind it, or behind the BatchNorm in training mode that follows.
            shape: of the input.
            below: the stages whose outputs the input is.
        """
        if not isinstance(stage.module, Residual):
            given = [self._given(way, stage, shape)]
            return given, self._method(given, shape, below)
        if way.norm is not None or way.held:
            raise UndeterminedError(CUT_OFF if way.held else MIXES)
        outputs, joined = way.outputs, is_joined(stage.module)
        block = _Block(stage.module, outputs, shape, below)
        body = self._branch(stage.module.body, outputs if joined else outputs.untold(), shape, block)
        outputs = rest = outputs.flipped(body.flips)
        if not joined:
            rest = outputs.untold() if body.output is None else _without(outputs, body)
        if body.tells_all:
            return self._skipped(block, rest, shape, way.outputs.delta)
        shortcut = self._branch(stage.module.shortcut, rest, shape, block)
        given = [*body.given, *shortcut.given]
        return given, body.onward or self._method(given, shape, below)

    def _skipped(
        self, block: _Block, rest: KnownOutputs, shape: tuple[int, ...], delta: Tensor
    ) -> tuple[list[Given], SolveMethod]:
        """The input of a block whose body's output tells all of it; the lower layers of the body take what it makes."""
        way = Way.from_known(rest)
        self._told_along(block.module.body, rest)
        given = [Given(SkippedBlock(rest, block.module, delta), way, None, shape)]
        return given, self._method(given, shape, block.below)

    def _told_along(self, chain: Chain, inputs: KnownOutputs) -> None:
        """Keep what the layers of a chain take that were not solved for, from the chain's inputs."""
        errors = relative(inputs.noise.expand_as(inputs.values), inputs.values).cpu()
        for stage, taken in inputs_along(chain, inputs.values):
            if stage.name not in self.inner and kind_of(stage.module).is_affine:
                self.inner[stage.name] = taken
                self.records.append(Record(stage.name, noise=errors, too_weak=self.too_weak))

    def _method(self, given: Sequence[Given], shape: tuple[int, ...], below: Chain) -> SolveMethod:
        """By linear equations, or by those of a layer in front of BatchNorm in training mode."""
        how = ((self.gradients.batch_size, *shape), self.generator, self.budget)
        sources = [each.source for each in given]
        if not any(isinstance(source, BehindNormSource) for source in sources):
            return Alone(*how)
        if not all(isinstance(source, NormalisedSource | IdentitySource) for source in sources):
            shift = self.gradients.summed(shift_before(below), sources[0].above.values)
            return BehindNorm(*how, Factors(is_after_relu(below), shift))
        shift = self.gradients.summed(shift_before(below), sources[0].above.values)
        return BehindNorm(*how, Gauge(is_after_relu(below), shift, mean_before(below)))

    def _mask_error(self) -> Tensor:
        """(B,) of images that are too weak: with errors e of their inputs, about sqrt(e) of their delta is wrong."""
        if not self.too_weak.any():
            return torch.zeros(len(self.too_weak))
        return torch.where(self.too_weak, self.records[-1].noise.clamp(max=1).sqrt(), 0.0)

    def _branch(self, chain: Chain, outputs: KnownOutputs, shape: tuple[int, ...], block: _Block) -> _Branch:
        """Down a branch to its lowest layer, which says something of the block's input."""
        branch = _Branch([], None, None, torch.zeros_like(outputs.known), None)
        shapes, same_mask = input_shapes(chain, shape) if chain else [], not is_joined(block.module)
        way = Way.from_known(outputs)
        for index in reversed(range(len(chain))):
            stage = chain[index]
            if not _is_solved_for(stage):
                way = self.past(way, stage, shapes[index], chain[:index])
                same_mask = same_mask and not kind_of(stage.module).is_activation
                continue
            below = chain[:index] if index else block.below
            given, method = self.given(stage, way, shapes[index], below)
            if way.held and chain is not block.module.body:
                raise UndeterminedError(CUT_OFF)
            if index == 0:
                onward = BlockInput(self._together(block, 0, way.outputs.delta), []) if way.held else branch.onward
                return replace(branch, given=given, onward=onward)
            is_alone = isinstance(method, Alone) and chain is block.module.body and self.steps is None
            sources, around = [each.source for each in given], block
            if way.held and not skips(block.module) and method.count(sources) >= ENOUGH * method.unknowns:
                around = _Block(Residual(chain[index:]), block.above.untold(), shapes[index], below)
                method = LayerInBlock(self._together(around, 0, way.outputs.delta))
            elif is_alone and (way.held or 0 < method.count(sources) < method.unknowns):
                in_block = LayerInBlock(self._together(block, index, way.outputs.delta))
                is_enough = way.held or in_block.count(sources) >= ENOUGH * in_block.unknowns
                method = in_block if is_enough else method
            solved = self.solve(stage.name, given, method, is_rectified=is_after_relu(below), needs_all=False)
            if isinstance(method, LayerInBlock) and around is block:
                branch = replace(branch, onward=BlockInput(method.together, rows_of(solved.sources)))
            if branch.output is None:
                output = self.trajectory.run(chain[index:], solved.u)
                branch = replace(branch, output=output, output_error=solved.record.noise)
                if same_mask:  # the mask that these equations have judged is that of the ReLU behind the block
                    flips = solved.sources[0].above.delta.bool() != sources[0].above.delta.bool()
                    branch = replace(branch, flips=flips.view_as(branch.flips))
                if self._tells_all(branch, chain, block):
                    return replace(branch, tells_all=True)
            self.inner[stage.name] = solved.u
            way = Way.from_known(solved.outputs)
        if way.norm is not None or way.held:
            raise UndeterminedError(CUT_OFF if way.held else MIXES)
        return replace(branch, given=[self._given(way, None, shape)])

    def _tells_all(self, branch: _Branch, chain: Chain, block: _Block) -> bool:
        """Whether a body's output tells all of the block's input."""
        if chain is not block.module.body or not skips(block.module) or self.steps is not None:
            return False
        return bool(_without(block.above.flipped(branch.flips), branch).sure.all())

    def _together(self, block: _Block, index: int, delta: Tensor) -> Together:
        """All that is known of a block, around a layer of its body, with delta at that layer's output."""
        return Together(
            block.module,
            index,
            (len(delta), *block.shape),
            IdentitySource(block.above).rows(),
            delta,
            is_positive=is_after_relu(block.below),
            generator=self.generator,
            budget=self.budget,
        )


def _without(outputs: KnownOutputs, body: _Branch) -> KnownOutputs:
    """What is known of the shortcut's output, as exactly as the body's is."""
    errors = beside(body.output_error.to(body.output) * size_of(body.output), body.output)
    return replace(outputs, values=outputs.values - body.output, noise=outputs.noise.hypot(errors))
