"""The whole training of a fully connected network as one system: which image was in which step, and the images.

The first layer's movement tells the space of the images, in which an image is B numbers. A step on images with weights
a_ti in place of a minibatch has the gradient sum_i a_ti g(x_i). So the whole training is a smooth function of the
images Q (B, B) and of the weights A (steps, B), which are 1/b for the images of a step's minibatch and 0 for others.
Levenberg-Marquardt fits both to the update, from a start at which all images are alike in all steps. Each pass is then
rounded to the nearest division into minibatches, and the images are fitted once more in that order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import jvp

from attack.local.kernel_form import LayerInSteps
from attack.solve.budget import WorkBudget
from attack.solve.least_squares import least_squares
from attack.solve.levenberg import DampingRule, Differentiated, LevenbergSolution, levenberg
from network.stage import Chain, Stage
from update.loss import Loss
from update.training import LocalTraining, Order

ROUNDS, STEPS = 10, 4  # of Levenberg-Marquardt, at most, and its steps before weights are rounded
SLOW = 0.9  # a round that leaves more of the squared residual is the last
POLISHED = 20  # steps on images alone
MOST = 2e10  # multiplications of a derivative by all unknowns, at most: some ten seconds of a core
CLOSE = 1e-3  # share of the update left, from which on an order is taken for the right one and images are polished
RULE = DampingRule(first=1e-6, refused=5.0, accepted=0.2, refusals=10, patience=3)
POLISH = DampingRule(first=1e-10, refused=5.0, accepted=0.1, patience=3)


@dataclass(frozen=True)
class Solution:
    """What was found.

    Attributes:
        order: as in `LocalTraining.order`; None where none explains the update.
        inputs: (B, r), the images' coordinates.
        left: the share of the update that the training on them leaves.
        variance: (B,), of the error of each image's coordinates, summed; zero where they were given.
        certificates: (B,), the weight with which what each image makes of the first layer is part of its movement.
    """

    order: Order | None
    inputs: Tensor
    left: float
    variance: Tensor
    certificates: Tensor


class Training:
    """The training of a fully connected network, on weighted images.

    No weight is formed, see `attack.local.kernel_form`.

    Args:
        chain: of linear layers and activations, in float64.
        labels: (B,) class indices.
        training: the client's; its rule is linear.
        goal: by parameter name, what the client shares; names that are missing are not compared.
    """

    def __init__(self, chain: Chain, labels: Tensor, training: LocalTraining, goal: Mapping[str, Tensor]) -> None:
        self.chain, self.labels, self.rule, self.goal = chain, labels, training, goal
        self.table = training.coefficients()
        self.size = sum(stage.module.weight.numel() for stage in self._linear)

    @property
    def _linear(self) -> list[Stage]:
        return [stage for stage in self.chain if isinstance(stage.module, nn.Linear)]

    def left(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """What training on inputs (B, r) with weights (steps, B) leaves of the goal, relative to each parameter's."""
        parts = []
        for name, layer in self._trained(inputs, weights).items():
            moved = dict(zip(("weight", "bias"), layer.movement(), strict=True))
            goals = {kind: self.goal[f"{name}.{kind}"] for kind in moved if f"{name}.{kind}" in self.goal}
            parts += [(moved[kind] - goal).flatten() / goal.norm() for kind, goal in goals.items()]
        return torch.cat(parts) / len(parts) ** 0.5

    def certificates(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """(B,), the weight with which each image's column, times the image, is part of the first layer's movement."""
        name = self.chain[0].name
        columns = self._trained(inputs, weights)[name].columns()
        met = ((columns @ self.goal[f"{name}.weight"]) * inputs).sum(1)
        return least_squares((columns @ columns.T) * (inputs @ inputs.T), met[:, None])[:, 0]

    def in_turn(self, inputs: Tensor, columns: Tensor) -> tuple[Tensor, Order]:
        """Labels and order of a client's one pass, step by step, from the columns of the images.

        A column is then the image's delta at the weights of its step, which are known as soon as the steps before are.
        So the images of the next step, and their labels, are those whose deltas point along their columns.

        Args:
            inputs: (B, r).
            columns: (m, B).
        """
        labels, layers, order = self.labels.clone(), self._at_start(), []
        is_open = torch.ones_like(labels, dtype=torch.bool)
        for size in self.rule.sizes_of(len(inputs)):
            best, label = self._fits(inputs, layers, columns).max(1)
            own = best.where(is_open, -torch.inf).topk(size).indices
            labels[own], is_open[own] = label[own], False
            order.append(tuple(sorted(own.tolist())))
            weights = torch.zeros_like(best).index_fill(0, own, 1 / size)
            self.with_labels(labels)._step(inputs, weights, layers)
        return labels, tuple(order)

    def _fits(self, x: Tensor, layers: Mapping[str, LayerInSteps], columns: Tensor) -> Tensor:
        """(B, K), how nearly the delta of each image and label at the next step points along the image's column."""
        first, *rest = self.chain
        outputs = layers[first.name].outputs(x).requires_grad_()
        with torch.enable_grad():
            x = outputs
            for stage in rest:
                x = layers[stage.name].outputs(x) if stage.name in layers else stage.module(x)
            return label_fits(self.rule.loss, x, outputs, columns)

    def with_labels(self, labels: Tensor) -> "Training":
        """The same on images with other labels (B,)."""
        return Training(self.chain, labels, self.rule, self.goal)

    def _at_start(self) -> dict[str, LayerInSteps]:
        """The linear layers by name, before the first step."""
        layers = {}
        for stage in self._linear:
            weight, bias = stage.module.weight, stage.module.bias
            layers[stage.name] = LayerInSteps(self.table, weight, bias, trains_bias=bias is not None)
        return layers

    def _trained(self, inputs: Tensor, weights: Tensor) -> dict[str, LayerInSteps]:
        """The linear layers by name, after all steps."""
        layers = self._at_start()
        for own in weights:
            self._step(inputs, own, layers)
        return layers

    def _step(self, x: Tensor, own: Tensor, layers: Mapping[str, LayerInSteps]) -> None:
        """One step of all layers, on images with these weights (B,)."""
        inputs, slopes = {}, {}
        for stage in self.chain:
            if stage.name in layers:
                inputs[stage.name] = x
                x = layers[stage.name].outputs(x)
            else:
                x, slopes[stage.name] = jvp(stage.module, (x,), (torch.ones_like(x),))
        loss = self.rule.loss
        if loss.is_open:  # with class weights a minibatch's loss is divided by the mean weight of its images
            own = own / (own @ loss.of_classes(x)[self.labels])
        delta = loss.errors(x, self.labels) * own[:, None]
        for stage in reversed(self.chain):
            if stage.name not in layers:
                delta = delta * slopes[stage.name]
                continue
            below = layers[stage.name].pulled(delta)
            layers[stage.name].step(inputs[stage.name], delta)
            delta = below


def label_fits(loss: Loss, logits: Tensor, outputs: Tensor, columns: Tensor) -> Tensor:
    """(B, K), how nearly the delta that each label gives each image points along the image's column.

    Args:
        loss: the client's.
        logits: (B, K), made of the outputs.
        outputs: (B, m) of the first layer, with their graph.
        columns: (m, B).
    """
    fits = []
    for label in range(logits.shape[1]):
        own = loss.each(logits, torch.full_like(outputs[:, 0], label).long()).sum()
        (delta,) = torch.autograd.grad(own, outputs, retain_graph=True)
        fits.append(nn.functional.cosine_similarity(delta, columns.T))
    return torch.stack(fits, 1)


class Assignment:
    """The weights of images in steps as unknowns, and the order that they come nearest to.

    Passes in the same order share their weights.

    Raises:
        ValueError: minibatches leave images out of each pass.
    """

    def __init__(self, rule: LocalTraining, count: int) -> None:
        self.sizes, self.passes, self.count = rule.sizes_of(count), rule.passes, count
        self.own_passes = rule.passes if rule.shuffle else 1
        if sum(self.sizes) != count:
            raise ValueError("minibatches leave images out of each pass")

    @property
    def unknowns(self) -> int:
        """How many weights there are; none where each step takes all images."""
        return 0 if len(self.sizes) == 1 else self.own_passes * len(self.sizes) * self.count

    def weights(self, x: Tensor) -> Tensor:
        """A (steps, B) of unknowns (d,)."""
        if not self.unknowns:
            return x.new_full((self.passes, self.count), 1 / self.count)
        return x.view(self.own_passes, -1).expand(self.passes, -1).reshape(-1, self.count)

    def sums(self, x: Tensor) -> Tensor:
        """How far the weights of a step, and those of an image in a pass, are from those of one image each."""
        own = x.view(-1, max(1, len(self.sizes)), self.count)
        of_images = torch.einsum("pmn,m->pn", own, torch.tensor(self.sizes).to(x))
        return torch.cat([(own.sum(2) - 1).flatten(), (of_images - 1).flatten()]) if self.unknowns else x

    def rounded(self, x: Tensor) -> Order:
        """The nearest order: in each pass, every image in one minibatch of the right size."""
        if not self.unknowns:
            return (tuple(range(self.count)),) * self.passes
        order, size = [], torch.tensor(self.sizes)
        for own in x.view(self.own_passes, -1, self.count).detach().cpu():
            rows, images = linear_sum_assignment(-own.repeat_interleave(size, 0).numpy())
            places = torch.arange(len(size)).repeat_interleave(size).numpy()[rows]
            order += [tuple(sorted(images[places == step].tolist())) for step in range(len(size))]
        return tuple(order) * (self.passes // self.own_passes)

    def of(self, order: Sequence[Sequence[int]], like: Tensor) -> Tensor:
        """A (steps, B) of an order."""
        weights = like.new_zeros(len(order), self.count)
        for step, images in enumerate(order):
            weights[step, list(images)] = 1 / len(images)
        return weights


def solve_training(
    training: Training, inputs: Tensor, along: Tensor | None, *, enough: float, budget: WorkBudget
) -> Solution:
    """The order of the images, and the images where only guesses are given, that leave least of the goal.

    Args:
        training: the client's.
        inputs: (B, r), to begin with, or as they are.
        along: (r,), 1 along true images; None where the inputs are given.
        enough: share of the goal that may be left; an order that leaves less ends the search.
        budget: its clock is asked.

    Raises:
        ValueError: minibatches leave images out of each pass, or there are too many unknowns.
        OutOfTimeError: the budget's clock has run out.
    """
    system = _System(training, inputs, along)
    enough = CLOSE if system.free else enough
    x, before, moved, found = system.start, torch.inf, torch.zeros_like(system.start), None
    best = system.rounded(x)
    for _ in range(ROUNDS if system.places.unknowns else 0):
        found = levenberg(Differentiated(system.residual), x[None], RULE, iterations=STEPS, budget=budget)
        moved, x = found.x[0] - x, found.x[0]
        best = min(best, system.rounded(x), key=lambda solution: solution.left)
        if best.left < enough or float(found.cost) > SLOW * before:
            break
        before = float(found.cost)
    if not system.free:
        return best if best.left < CLOSE else replace(best, order=None)
    if found is not None and best.left >= CLOSE:  # passes that are nearly alike: images are told, their order is not
        return system.without_order(found, moved)
    return system.polished(best, budget)


def solve_in_turn(training: Training, inputs: Tensor, columns: Tensor) -> tuple[Tensor, Solution]:
    """Labels (B,) and order of one pass, of images (B, r) with columns (m, B); no order where it leaves too much.

    Raises:
        ValueError: minibatches leave images out of each pass.
    """
    places = Assignment(training.rule, len(inputs))
    labels, order = training.in_turn(inputs, columns)
    relabelled, weights = training.with_labels(labels), places.of(order, inputs)
    left, exact = float(relabelled.left(inputs, weights).norm()), inputs.new_zeros(len(inputs))
    certificates = relabelled.certificates(inputs, weights)
    return labels, Solution(order if left < CLOSE else None, inputs, left, exact, certificates)


class _System:
    """Images, where only guesses of them are given, and their weights in steps, as one least-squares problem."""

    def __init__(self, training: Training, inputs: Tensor, along: Tensor | None) -> None:
        self.training, self.inputs, self.along = training, inputs, along
        self.places = Assignment(training.rule, len(inputs))
        self.free = 0 if along is None else inputs.numel()
        unknowns, steps = self.free + self.places.unknowns, training.rule.steps
        if unknowns * steps * len(inputs) * training.size > MOST:
            raise ValueError(f"{unknowns} unknowns in {steps} steps are too many")

    @property
    def start(self) -> Tensor:
        """The images to begin with, all alike in all steps (d,)."""
        alike = self.inputs.new_full((self.places.unknowns,), 1 / len(self.inputs))
        return torch.cat([self.inputs.flatten()[: self.free], alike])

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, r), and the unknowns that are weights."""
        return (x[: self.free].view(self.inputs.shape) if self.free else self.inputs), x[self.free :]

    def residual(self, x: Tensor) -> Tensor:
        """What the training leaves, and sums that are not one."""
        own, weights = self.split(x)
        return torch.cat([self._left(own, self.places.weights(weights)), self.places.sums(weights)])

    def _left(self, own: Tensor, weights: Tensor) -> Tensor:
        parts = [self.training.left(own, weights)]
        return torch.cat(parts if self.along is None else [*parts, own @ self.along - 1])

    def rounded(self, x: Tensor) -> Solution:
        """The images in the nearest order."""
        own, weights = self.split(x)
        order = self.places.rounded(weights)
        return self._solution(order, own, self.places.of(order, own), own.new_zeros(len(own)))

    def without_order(self, found: LevenbergSolution, moved: Tensor) -> Solution:
        """The images of a fit whose weights come near no order. Further steps would move them as the last have."""
        own, weights = self.split(found.x[0])
        variance = (_variance(found, self.residual) + moved.square())[: self.free].view(own.shape).sum(1)
        return self._solution(None, own, self.places.weights(weights), variance)

    def polished(self, solution: Solution, budget: WorkBudget) -> Solution:
        """The images once more, in a given order."""
        weights, shape = self.places.of(solution.order, solution.inputs), self.inputs.shape

        def alone(x: Tensor) -> Tensor:
            return self._left(x.view(shape), weights)

        start = solution.inputs.reshape(1, -1)
        found = levenberg(Differentiated(alone), start, POLISH, iterations=POLISHED, budget=budget)
        own, variance = found.x.view(shape), _variance(found, alone).view(shape).sum(1)
        return self._solution(solution.order, own, weights, variance)

    def _solution(self, order: Order | None, own: Tensor, weights: Tensor, variance: Tensor) -> Solution:
        """Images (B, r) at these weights (steps, B), with what the training on them leaves."""
        left = float(self.training.left(own, weights).norm())
        return Solution(order, own, left, variance, self.training.certificates(own, weights))


def _variance(found: LevenbergSolution, residual: Callable[[Tensor], Tensor]) -> Tensor:
    """Of each unknown (d,), if what is left is noise that all equations share."""
    f = residual(found.x[0])
    noise = float(f.square().sum()) / max(1, len(f) - found.x.shape[1])
    return noise * torch.linalg.pinv(found.normal[0], hermitian=True).diagonal()
