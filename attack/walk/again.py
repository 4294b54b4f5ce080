"""A residual block's input once more, from a prediction of it: what the block's equations add to pictures.

The walk takes an input for known or for unknown. Where the equations of a block do not determine its input, pictures of
the images are found all the same, by what is known above, and these predict the input u to a few per cent. So u is
where three kinds of equations agree best, each entry in units of its expected error:

    gradient rows   of the layers whose delta does not depend on u: the last one of the body, and of the shortcut
    the output y    where the ReLU behind the sum is active, y(u) is known; elsewhere it is not above zero
    the prediction  of every entry, and u >= 0

Layers further up in the body whose inputs the walk has found add what they tell. Gauss-Newton (`gauss_newton`) begins
at the prediction. The expected error of what it finds is drawn: predictions and right sides are disturbed by their
expected errors, and the linearised equations answer. Below, the block's input is the known output of the next block.

An entry of y within its error of zero may be active or not, so known outputs with relative errors e leave about sqrt(e)
of delta wrong, which counts as noise of the gradient rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attack.solve.budget import WorkBudget
from attack.solve.cgls import cgls
from attack.solve.gauss_newton import NonlinearEquations, gauss_newton
from attack.walk.equations import GradientRows, KnownRows, Rows, stack
from attack.walk.layer_source import BatchGradients
from attack.walk.noise import beside, relative, size_of
from network.chain import in_float32, input_shapes
from network.kinds import kind_of
from network.kinds.affine import LinearMap
from network.known_outputs import ZERO
from network.stage import Chain, Residual, Stage, delta_before, run

OFF = 1.5  # times what a prediction misses the known outputs by: its expected error one block further down
NEAR, FAR = 0.03, 0.3  # least relative error that is expected of a prediction, and most of one that is of use
FINEST = 1e-3  # least relative error that outputs count with: finer ones take more iterations and add nothing in sight
# Share of the prediction's expected error, by the median image, that equations must leave or less. It is 0.4 where they
# tell something, and 0.8 at `layer2.0` of four photographs of 224 pixels: off by 13 % there, predicted to 14 %.
BETTER = 0.5
STEPS, INNER = 7, 60  # of Gauss-Newton, and iterations of CGLS in each
DRAWN = 150  # iterations of CGLS that the answer to drawn errors takes, at most


@dataclass(frozen=True)
class Reread:
    """The input of a residual stage as pictures and the stage's equations tell it.

    Attributes:
        index: of the stage in the chain.
        inputs: (B, ...), in float64.
        errors: (B,) their expected relative errors.
    """

    index: int
    inputs: Tensor
    errors: Tensor


def is_reread(chain: Chain) -> bool:
    """Whether the chain ends in a residual stage and a ReLU."""
    return len(chain) > 1 and kind_of(chain[-1].module).is_rectifier and isinstance(chain[-2].module, Residual)


@torch.no_grad()
def reread(
    chain: Chain,
    gradients: BatchGradients,
    start: int,
    inputs: Tensor,
    errors: Tensor,
    labels: Tensor,
    pictures: Tensor,
    inner: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    budget: WorkBudget,
) -> list[Reread]:
    """The inputs of the residual stages below `start`, one after the other, as far as equations improve on pictures.

    Args:
        chain: of the model that the update was computed on, in float64; no stage mixes images.
        gradients: of the update.
        start: index of the stage whose inputs are known.
        inputs: (B, ...) in float64, zero where they are zero.
        errors: (B,) their relative errors.
        labels: (B,) class indices.
        pictures: (B, C, H, W) in float64, of the same images.
        inner: inputs of layers inside residual stages, by name, where the walk has found them.
        generator: what errors are drawn from, on the CPU.
        budget: whose clock is asked.

    Raises:
        OutOfTimeError: the budget's clock has run out.
    """
    found: list[Reread] = []
    index, outputs = start, inputs
    while is_reread(chain[:index]):
        delta = gradients.loss.delta(partial(run, chain[index:]), outputs, labels)
        index -= 2
        prediction = run(chain[:index], pictures)
        shape = prediction.shape[1:]
        block = _Block.of(chain[index].module, gradients, outputs, errors, delta, inner, shape)
        off = OFF * relative(run(chain[index : index + 2], prediction) - outputs, outputs)
        if not float(off.median()) < FAR:
            break
        off = off.clamp(min=NEAR)
        outputs, errors = block.solved(prediction, off, generator, budget)
        if not float((errors / off).median()) < BETTER:
            break
        found.append(Reread(index, outputs, errors))
    return found


@dataclass(frozen=True)
class _Told:
    """A place in a branch of which something is known: the inputs of a layer with delta, or of a ReLU.

    Attributes:
        branch, index: of the stage in a block, 0 the body.
        rows: on the stage's inputs.
        active: of a ReLU, which of its outputs are.
    """

    branch: int
    index: int
    rows: Rows
    active: Tensor | None = None


@dataclass(frozen=True)
class _Block:
    """What is known of a residual stage without its input.

    Attributes:
        module: the stage's, in float64.
        told: in its branches.
        output: rows on its output.
        active: which outputs of the ReLU behind it are.
    """

    module: Residual
    told: Sequence[_Told]
    output: Rows
    active: Tensor

    @classmethod
    def of(
        cls,
        module: Residual,
        gradients: BatchGradients,
        outputs: Tensor,
        errors: Tensor,
        delta: Tensor,
        inner: Mapping[str, Tensor],
        shape: Sequence[int],
    ) -> "_Block":
        """Of the outputs (B, ...) of the ReLU behind the stage, with relative errors (B,) and the derivatives by them.

        The stage's input has that shape, one image's.

        The gradient rows' noise is that of delta, where wrong masks leave more than rounding.
        """
        active = _active(outputs, errors)
        delta = delta * active
        loudness = delta.flatten(1).norm(dim=1)
        wrong = float(((loudness.square() * errors).sum() / loudness.square().sum().clamp(min=1e-300)).sqrt())
        row, told = partial(_row, gradients, max(wrong, FINEST)), []
        for number, branch in enumerate(module.branches):
            told += _told_of(number, branch, shape, errors, delta, inner, row)
        return cls(module, told, _known(torch.where(active, outputs, 0.0), errors), active)

    def solved(
        self, prediction: Tensor, off: Tensor, generator: torch.Generator, budget: WorkBudget
    ) -> tuple[Tensor, Tensor]:
        """The stage's input (B, ...) and its expected relative errors (B,), from a prediction with such errors."""
        equations = self._equations(prediction, off)
        limits = {"inner": INNER, "last": INNER, "steps": STEPS}
        u = gauss_newton(equations, prediction, budget=budget, **limits).x
        free = u > 0
        linear = equations.linearised(u).within(free)
        draw = {"generator": generator, "dtype": torch.float32}
        play = torch.randn(u.shape, **draw).to(u.device) * free * beside(off * size_of(prediction), u).float()
        targets = linear.forward(play)
        targets = targets + torch.randn(targets.shape, **draw).to(targets)
        targets[-u.numel() :] = 0  # what is predicted is that there is no deviation
        back = cgls(linear, targets, linear.start(), iterations=DRAWN, budget=budget)
        return u, relative((linear.step(back.x) - play).to(u), u)

    def _equations(self, prediction: Tensor, off: Tensor) -> NonlinearEquations:
        rows = [*(place.rows for place in self.told), self.output, _known(prediction, off)]
        stacked = [stack([each]) for each in rows]
        return NonlinearEquations(
            function=self._values(self.module),
            rough=self._values(Residual(*(in_float32(branch) for branch in self.module.branches))),
            rows=[operator for operator, _ in stacked],
            rough_rows=[stack([each.float()])[0] for each in rows],
            targets=[target for _, target in stacked],
            scale=torch.ones_like(off).view(-1, *(1,) * (prediction.dim() - 1)),
            is_positive=True,
        )

    def _values(self, module: Residual) -> Callable[[Tensor], Sequence[Tensor]]:
        """The stage's input to what is told in its branches, to its output, and to itself."""

        def values(u: Tensor) -> Sequence[Tensor]:
            found, ends = {}, []
            for number, branch in enumerate(module.branches):
                x = u.clone()  # so that each value has a place of its own in the graph
                for index, stage in enumerate(branch):
                    found[number, index] = x
                    x = stage.module(x)
                ends.append(x)
            told = [_one_sided(found[place.branch, place.index], place.active) for place in self.told]
            return *told, _one_sided(sum(ends), self.active), u.clone()

        return values


def _one_sided(z: Tensor, active: Tensor | None) -> Tensor:
    """Inputs of a ReLU that are compared with its outputs: those of inactive entries where they are above zero."""
    return z if active is None else torch.where(active, z, z.relu())


def _active(outputs: Tensor, errors: Tensor) -> Tensor:
    """Which outputs (B, ...) of a ReLU are more than what relative errors (B,) make of zeros."""
    return outputs > ZERO * beside(errors * size_of(outputs), outputs)


def _known(values: Tensor, errors: Tensor) -> Rows:
    """Values (B, ...) with relative errors (B,)."""
    weight = 1 / (errors.clamp(min=FINEST) * size_of(values)).clamp(min=1e-300)
    return Rows(KnownRows(torch.ones_like(values, dtype=torch.bool)), values, beside(weight, values).expand_as(values))


def _row(gradients: BatchGradients, wrong: float, stage: Stage, shape: Sequence[int], delta: Tensor) -> Rows | None:
    """A layer's gradient rows on its inputs, of whose delta so much is wrong; None where the update has none."""
    sent = gradients.of(stage.name, delta)
    if sent is None or not sent.any() or kind_of(stage.module).why_not(stage.module, tuple(shape)):
        return None
    noise = gradients.error(stage.name, delta).max().hypot(wrong * sent.square().mean().sqrt())
    operator = GradientRows(LinearMap.of(stage.module, tuple(shape)), delta)
    return Rows(operator, sent, (1 / noise).view(*[1] * sent.dim()))


def _told_of(
    number: int,
    branch: Chain,
    shape: Sequence[int],
    errors: Tensor,
    delta: Tensor,
    inner: Mapping[str, Tensor],
    row: Callable[[Stage, Sequence[int], Tensor], Rows | None],
) -> list[_Told]:
    """What is told in a branch: from its end up to the first stage that is not linear, or whose outputs are not known.

    Args:
        number: of the branch.
        branch: its stages.
        shape: of its inputs, one image's.
        errors: (B,) relative errors of `inner`.
        delta: (B, ...) of the branch's output.
        inner: inputs of layers that were found, by name.
        row: what a layer's gradient says of its inputs of that shape, with delta of its outputs.
    """
    found: list[_Told] = []
    shapes = input_shapes(branch, shape) if branch else []
    for index in reversed(range(len(branch))):
        stage = branch[index]
        kind = kind_of(stage.module)
        if kind.is_rectifier and index + 1 < len(branch) and branch[index + 1].name in inner:
            outputs = inner[branch[index + 1].name].to(delta)
            active = _active(outputs, errors)
            found.append(_Told(number, index, _known(torch.where(active, outputs, 0.0), errors), active))
            delta = delta * active
            continue
        is_scale = kind.is_norm and not kind.normalises_images(stage.module, shapes[index])
        if not (kind.is_affine or is_scale):
            break
        rows = row(stage, shapes[index], delta) if kind.is_affine else None
        if rows is not None:
            found.append(_Told(number, index, rows))
        delta = delta_before(stage.module, delta.new_zeros(len(delta), *shapes[index]), delta)
    return found
