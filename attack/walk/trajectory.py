"""The weights of the layers on the way down, at each step of a client that made several.

A client that goes through its images once uses each of them at one step, and sees it with the weights of that step. As
soon as inputs and deltas of the images of a step are known at a layer, the layer's gradient at that step is known, and
with it the weights of the next:

    W_t = alpha_t W_0 - sum_{s<t} beta_t,s g_s,    g_s = (1 / b_s) sum_{i in s} corr(delta_i, u_i)

So a layer's equations for its inputs u hold weights that depend on u. They are solved with the weights that the last
solution gives, until these no longer change; the inputs of the first step need none, and each solution makes the
weights of one more step right.
"""

import copy
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from network.chain import is_parametrised, parameters, run_with
from network.kinds import pulled_below
from network.kinds.affine import LinearMap
from network.known_outputs import KnownOutputs
from network.stage import Chain, Stage, run
from update.training import Coefficients


@dataclass(frozen=True)
class OnePass:
    """A client's one pass, of B images in the order of its steps.

    Attributes:
        coefficients: of its steps.
        sizes: images in each step.
        counts: how much an image of each step counts in the update, where 1 is its share in a mean over all images.
        deltas: (B, ...) the derivative of each image's own loss by the inputs that the walk starts from.
    """

    coefficients: Coefficients
    sizes: Sequence[int]
    counts: Sequence[float]
    deltas: Tensor

    @property
    def parts(self) -> list[slice]:
        """The images of each step."""
        ends = list(itertools.accumulate(self.sizes))
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    @property
    def each(self) -> Tensor:
        """The count of each image, (B,)."""
        return self.deltas.new_tensor(self.counts).repeat_interleave(self.lengths)

    @property
    def lengths(self) -> Tensor:
        """`sizes`, beside the deltas."""
        return torch.tensor(self.sizes, device=self.deltas.device)

    def until(self, step: int) -> int:
        """Images of the steps up to one."""
        return sum(self.sizes[: step + 1])


class Trajectory:
    """Weights at each step of layers whose inputs are known; one step where there are no more.

    Args:
        steps: the client's; None where all images were seen at the same weights.
        trained: names of the parameters that move.
    """

    def __init__(self, steps: OnePass | None, trained: Collection[str]) -> None:
        self.steps, self._trained = steps, trained
        self._moved: dict[nn.Parameter, Tensor] = {}  # (steps, ...)

    def run(self, chain: Chain, inputs: Tensor) -> Tensor:
        """What comes out of the chain's end, (B, ...), each image by the weights of its step."""
        if not self._is_moved(chain):
            return run(chain, inputs)
        return torch.cat([run_with(chain, inputs[part], now) for part, now in self._each_step()])

    def map_of(self, module: nn.Module, shape: tuple[int, ...]) -> "LinearMap | MovingMap":
        """A layer's linear part.

        Raises:
            ValueError: neither a linear layer nor a plain convolution.
        """
        linear = LinearMap.of(module, shape)
        if module.weight not in self._moved:
            return linear
        maps = tuple(linear.with_weight(weight) for weight in self._moved[module.weight])
        return MovingMap(maps, tuple(self.steps.parts))

    def bias_of(self, module: nn.Module) -> Tensor:
        """(c_out,), or (B, c_out) where it moves; zeros where the layer has none."""
        if module.bias is None:
            return module.weight.new_zeros(len(module.weight))
        if module.bias not in self._moved:
            return module.bias.detach()
        return self._moved[module.bias].repeat_interleave(self.steps.lengths, 0)

    def pulled(self, stage: Stage, outputs: KnownOutputs, shape: tuple[int, ...]) -> KnownOutputs:
        """What is known below a stage that is not solved for.

        Raises:
            UndeterminedError: the stage's outputs do not tell its inputs.
        """
        if not self._is_moved([stage]):
            return pulled_below(stage.module, outputs, shape)
        found = []
        for part, now in self._each_step():
            module = copy.deepcopy(stage.module)
            for mine, parameter in zip(module.parameters(), stage.module.parameters(), strict=True):
                mine.copy_(now.get(parameter, parameter))
            found.append(pulled_below(module, outputs.part(part), shape))
        return KnownOutputs.joined(found)

    def learn(self, stages: Chain, inputs: Tensor, delta: Tensor) -> float:
        """Take the weights of some stages from the first one's inputs (B, ...), and delta (B, ...) at the last's end.

        Args:
            stages: none of which is a residual stage.
            inputs: in the order of the steps.
            delta: weighted as the images count.

        Returns:
            the largest change of a parameter's way, relative to the way; 0 where no parameter moves.
        """
        own = [p for stage in stages for p in self._trained_in(stage)]
        if not own:
            return 0.0
        table, ways, learnt = self.steps.coefficients, [[p.detach()] for p in own], []
        for step, (part, count) in enumerate(zip(self.steps.parts[:-1], self.steps.counts, strict=False), 1):
            now = [way[-1].requires_grad_() for way in ways]
            with torch.enable_grad():
                outputs = run_with(stages, inputs[part], dict(zip(own, now, strict=True)))
                mean = (outputs * delta[part]).sum() / (count * len(outputs))
                learnt.append(torch.autograd.grad(mean, now, materialize_grads=True))
            for way, gradients in zip(ways, zip(*learnt, strict=True), strict=True):
                way.append(table.weights(step, way[0].detach(), gradients))
        ways = [torch.stack(way).detach() for way in ways]
        change = max(self._changed(p, way) for p, way in zip(own, ways, strict=True))
        self._moved |= dict(zip(own, ways, strict=True))
        return change

    def _trained_in(self, stage: Stage) -> list[nn.Parameter]:
        if not is_parametrised(stage.module):
            return []
        return [p for name, p in stage.module.named_parameters() if f"{stage.name}.{name}" in self._trained]

    def _changed(self, parameter: nn.Parameter, way: Tensor) -> float:
        """How far a parameter's way (steps, ...) is from the one that was known, relative to its length."""
        length = float((way - way[0]).norm())
        return float((way - self._moved.get(parameter, parameter.detach())).norm()) / length if length else 0.0

    def _is_moved(self, chain: Chain) -> bool:
        return any(parameter in self._moved for parameter in parameters(chain))

    def _each_step(self) -> Iterator[tuple[slice, dict[nn.Parameter, Tensor]]]:
        """The images of each step, and the parameters that they met."""
        for step, part in enumerate(self.steps.parts):
            yield part, {parameter: way[step] for parameter, way in self._moved.items()}


@dataclass(frozen=True)
class MovingMap:
    """A layer's linear part where each image meets the weights of its own step: a `LinearMap` for each step.

    Attributes:
        maps: one for each step.
        parts: the images of each.
    """

    maps: tuple[LinearMap, ...]
    parts: tuple[slice, ...]

    @property
    def weight(self) -> Tensor:
        """That of the first step."""
        return self.maps[0].weight

    @property
    def taps(self) -> int:
        """Of the layer, see `LinearMap.taps`."""
        return self.maps[0].taps

    @property
    def groups(self) -> int:
        """Of the layer."""
        return self.maps[0].groups

    def with_weight(self, weight: Tensor) -> LinearMap:
        """The same map with one weight for all images."""
        return self.maps[0].with_weight(weight)

    def squared(self) -> "MovingMap":
        """The same map with each weight squared."""
        return replace(self, maps=tuple(each.squared() for each in self.maps))

    def float(self) -> "MovingMap":
        """The same in float32."""
        return replace(self, maps=tuple(each.float() for each in self.maps))

    def outputs(self, u: Tensor) -> Tensor:
        """W_t * u, (B, c_out, ...)."""
        return torch.cat([each.outputs(u[part]) for each, part in zip(self.maps, self.parts, strict=True)])

    def inputs(self, delta: Tensor, weight: Tensor | None = None) -> Tensor:
        """The adjoint of `outputs`, with one weight for all images if one is given."""
        if weight is not None:
            return self.maps[0].inputs(delta, weight)
        return torch.cat([each.inputs(delta[part]) for each, part in zip(self.maps, self.parts, strict=True)])

    def weights(self, u: Tensor, delta: Tensor) -> Tensor:
        """sum_i corr(delta_i, u_i), of the weight's shape."""
        return self.maps[0].weights(u, delta)

    def patch_sizes(self, u: Tensor) -> Tensor:
        """|patch|^2 of what each output sees, see `LinearMap.patch_sizes`."""
        return self.maps[0].patch_sizes(u)

    def shifted(self, delta: Tensor) -> Tensor:
        """delta at every place where a weight of the kernel meets an input, see `LinearMap.shifted`."""
        return self.maps[0].shifted(delta)
