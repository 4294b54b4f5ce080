"""Which images were in which step: sought by training on soft assignments, then rounded.

Images and labels are known. A step on images with weights a_ti in place of a minibatch has the gradient
sum_i a_ti g(x_i), so the whole training is a smooth function of the weights A (steps, B), which are 1/b for the images
of a step's minibatch and 0 for the others. Levenberg-Marquardt fits A to the update, from a start at which all images
are alike in all steps; each pass is then rounded to the nearest division into minibatches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import jvp, vmap

from attack.solve.budget import WorkBudget
from attack.solve.levenberg import DampingRule, levenberg
from network.stage import Chain, Stage
from update.training import LocalTraining

ROUNDS, STEPS = 5, 3  # of Levenberg-Marquardt, at most, and its steps before weights are rounded
TOGETHER = 64  # weights of A by which the training is differentiated at once
MOST = 128  # weights of A, at most
RULE = DampingRule(first=1e-8, refused=10.0, accepted=0.1, patience=3)


@dataclass(frozen=True)
class Found:
    """An order, as in `LocalTraining.order`, and the share of the update that the training in that order leaves."""

    order: tuple[tuple[int, ...], ...]
    left: float


class Training:
    """The training of a fully connected network, on weighted images.

    No weight is formed: a layer's weights before step t are alpha_t W_0 - sum_s beta_ts D_s^T H_s, with the inputs H_s
    and the deltas D_s (B, ...) of earlier steps, so they act on few images by the images' inner products.

    Args:
        chain: of linear layers and activations, in float64.
        inputs: (B, n).
        labels: (B,) class indices.
        training: the client's; its rule is linear.
        goal: by parameter name, what the client shares; names that are missing are not compared.
    """

    def __init__(
        self, chain: Chain, inputs: Tensor, labels: Tensor, training: LocalTraining, goal: Mapping[str, Tensor]
    ) -> None:
        self.chain, self.inputs, self.labels, self.training, self.goal = chain, inputs, labels, training, goal
        table = training.coefficients()
        self.alpha, self.beta = table.alpha.tolist(), table.beta
        self.shares = table.beta[-1] / table.beta[-1].sum()

    def left(self, weights: Tensor) -> Tensor:
        """What the training with weights (steps, B) leaves of the goal, relative to each parameter's, flat."""
        past: list[dict[str, tuple[Tensor, Tensor]]] = []
        for step, own in enumerate(weights):
            past.append(self._step(step, own, past))
        parts = []
        for stage in self.chain:
            if f"{stage.name}.weight" in self.goal or f"{stage.name}.bias" in self.goal:
                inputs = torch.cat([each[stage.name][0] for each in past])
                deltas = torch.cat([share * each[stage.name][1] for share, each in zip(self.shares, past, strict=True)])
                moved = {"weight": deltas.T @ inputs, "bias": deltas.sum(0)}
                goals = {name: self.goal.get(f"{stage.name}.{name}") for name in moved}
                parts += [(moved[n] - goal).flatten() / goal.norm() for n, goal in goals.items() if goal is not None]
        return torch.cat(parts) / len(parts) ** 0.5

    def _step(self, step: int, own: Tensor, past: Sequence[dict]) -> dict[str, tuple[Tensor, Tensor]]:
        """Inputs and deltas, weighted, of each linear layer at the weights before a step."""
        x, inputs, slopes = self.inputs, {}, {}
        for stage in self.chain:
            if isinstance(stage.module, nn.Linear):
                inputs[stage.name] = x
                x = self._forward(stage, step, x, past)
            else:
                x, slopes[stage.name] = jvp(stage.module, (x,), (torch.ones_like(x),))
        delta, made = self.training.loss.errors(x, self.labels) * own[:, None], {}
        for stage in reversed(self.chain):
            if isinstance(stage.module, nn.Linear):
                made[stage.name] = inputs[stage.name], delta
                delta = self._backward(stage, step, delta, past)
            else:
                delta = delta * slopes[stage.name]
        return made

    def _forward(self, stage: Stage, step: int, x: Tensor, past: Sequence[dict]) -> Tensor:
        out = self.alpha[step] * nn.functional.linear(x, stage.module.weight, stage.module.bias)
        if not step:
            return out
        inputs, deltas = self._moved(stage, step, past)
        shift = deltas.sum(0) if stage.module.bias is not None else 0.0
        return out - (x @ inputs.T) @ deltas - shift

    def _backward(self, stage: Stage, step: int, delta: Tensor, past: Sequence[dict]) -> Tensor:
        out = self.alpha[step] * delta @ stage.module.weight
        if not step:
            return out
        inputs, deltas = self._moved(stage, step, past)
        return out - (delta @ deltas.T) @ inputs

    def _moved(self, stage: Stage, step: int, past: Sequence[dict]) -> tuple[Tensor, Tensor]:
        """Inputs of all earlier steps, and their deltas times beta."""
        pairs = [each[stage.name] for each in past]
        factors = self.beta[step, :step]
        return (
            torch.cat([inputs for inputs, _ in pairs]),
            torch.cat([factor * deltas for factor, (_, deltas) in zip(factors, pairs, strict=True)]),
        )


class _Assignment:
    """The least-squares problem of A: what training leaves, and that weights sum to 1 by step and by image and pass."""

    def __init__(self, training: Training, sizes: Sequence[int], passes: int, *, is_free: bool) -> None:
        self.training, self.sizes, self.passes = training, list(sizes), passes
        self.count, self.own_passes = len(training.inputs), passes if is_free else 1

    @property
    def start(self) -> Tensor:
        """(1, unknowns): all images alike."""
        unknowns = self.own_passes * len(self.sizes) * self.count
        return self.training.inputs.new_full((1, unknowns), 1 / self.count)

    def weights(self, x: Tensor) -> Tensor:
        """A (steps, B) of unknowns (d,)."""
        own = x.view(self.own_passes, len(self.sizes), self.count)
        return own.expand(self.passes, -1, -1).reshape(-1, self.count)

    def residual(self, x: Tensor) -> Tensor:
        """What is left, and the sums of weights that are not 1."""
        own = x.view(self.own_passes, len(self.sizes), self.count)
        by_image = torch.einsum("pmn,m->pn", own, own.new_tensor(self.sizes, dtype=own.dtype))
        return torch.cat([self.training.left(self.weights(x)), (own.sum(2) - 1).flatten(), (by_image - 1).flatten()])

    def cost(self, x: Tensor, which: Tensor) -> Tensor:
        """|f|^2 (1,)."""
        return torch.stack([self.residual(each).square().sum() for each in x])

    def linearised(self, x: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """|f|^2, J^T J and J^T f; J column by column, by forward differentiation."""
        x = x[0]
        columns = []
        for some in torch.eye(len(x)).to(x).split(TOGETHER):
            columns.append(vmap(lambda v: jvp(self.residual, (x,), (v,))[1])(some))
        jacobian, f = torch.cat(columns), self.residual(x)
        return f.square().sum()[None], (jacobian @ jacobian.T)[None], (jacobian @ f)[None]

    def rounded(self, x: Tensor) -> tuple[tuple[int, ...], ...]:
        """The nearest order: in each pass, every image in one minibatch of the right size."""
        order = []
        for each in x.view(self.own_passes, len(self.sizes), self.count).detach().cpu():
            size = torch.tensor(self.sizes)
            rows, images = linear_sum_assignment(-each.repeat_interleave(size, 0).numpy())
            places = torch.arange(len(self.sizes)).repeat_interleave(size).numpy()[rows]
            order += [tuple(sorted(images[places == step].tolist())) for step in range(len(self.sizes))]
        return tuple(order) * (self.passes // self.own_passes)

    def of(self, order: Sequence[Sequence[int]]) -> Tensor:
        """A (steps, B) of an order."""
        weights = self.training.inputs.new_zeros(len(order), self.count)
        for step, images in enumerate(order):
            weights[step, list(images)] = 1 / len(images)
        return weights


def found_order(training: Training, *, enough: float, budget: WorkBudget) -> Found:
    """The order that leaves least of the goal, as far as this search finds it.

    Args:
        training: on the images, in any order.
        enough: share of the goal that may be left; an order that leaves less ends the search.
        budget: its clock is asked.

    Raises:
        ValueError: images of a pass are left out, or there are too many weights to seek.
        OutOfTimeError: the budget's clock has run out.
    """
    rule, count = training.training, len(training.inputs)
    sizes = rule.sizes_of(count)
    if sum(sizes) != count:
        raise ValueError("minibatches leave images out of each pass")
    problem = _Assignment(training, sizes, rule.passes, is_free=rule.shuffle)
    x = problem.start
    if x.shape[1] > MOST:
        raise ValueError(f"{x.shape[1]} weights of images in steps are too many to seek")
    best, before = None, None
    for _ in range(ROUNDS):
        x = levenberg(problem, x, RULE, iterations=STEPS, budget=budget).x
        order = problem.rounded(x[0])
        left = float(training.left(problem.of(order)).norm())
        if best is None or left < best.left:
            best = Found(order, left)
        if best.left < enough or order == before:
            break
        before = order
    return best
