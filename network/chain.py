"""A model as a chain of stages: the one place that says in which order its layers are applied.

A chain takes images (B, C, H, W) to logits (B, K). Its stages are torch modules and `Branched`, two chains side by side
whose outputs add up (`Residual`) or are multiplied (`Product`); the last stage is the linear head. The first may be
`Unwalked`, a part of the model that is only run. What is true of a kind of module stands in `network.kinds`. A stage is
named as its module is in the model, so `name + ".weight"` is the name of its parameter and of its gradient. Stages
without parameters have a name to be shown and no more. `tracing` makes a model's chain.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from network.kinds import kind_of
from network.stage import Branched, Chain, Product, Residual, Stage
from network.unwalked import Unwalked


def index_of(chain: Chain, name: str) -> int:
    """Where the stage of that name stands, or the one that holds it in a branch.

    Raises:
        ValueError: no stage has that name.
    """
    for index, stage in enumerate(chain):
        if name in _names_in(stage):
            return index
    raise ValueError(f"no stage is named {name!r}: the chain has {', '.join(stage.name for stage in chain)}")


def _names_in(stage: Stage) -> Iterator[str]:
    """The name of a stage, and of all that is in its branches."""
    yield stage.name
    if isinstance(stage.module, Branched):
        for inner in itertools.chain(*stage.module.branches):
            yield from _names_in(inner)


def parametrised(chain: Chain) -> Iterator[Stage]:
    """The linear and convolutional stages, those in branches too, in the order in which they are applied."""
    for stage in chain:
        if isinstance(stage.module, Branched):
            for branch in stage.module.branches:
                yield from parametrised(branch)
        elif kind_of(stage.module).is_affine:
            yield stage


def in_products(chain: Chain) -> set[str]:
    """The names of the linear and convolutional stages that stand in a factor of a product, as those of a gate do."""
    found: set[str] = set()
    for stage in chain:
        if isinstance(stage.module, Product):
            found |= {inner.name for inner in parametrised([stage])}
        elif isinstance(stage.module, Branched):
            found |= set().union(*map(in_products, stage.module.branches))
    return found


def is_parametrised(module: object) -> bool:
    """Whether what a stage applies has parameters."""
    return bool(parameters([Stage("", module)]))


def run_with(chain: Chain, x: Tensor, parameters: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """What comes out of the chain's end with other tensors in the place of these parameters."""
    for stage in chain:
        module = stage.module
        if isinstance(module, Branched):
            x = module.together(*(run_with(branch, x, parameters) for branch in module.branches))
        elif isinstance(module, nn.Module) and is_parametrised(module):
            own = {name: parameters.get(parameter, parameter) for name, parameter in module.named_parameters()}
            x = functional_call(module, own, (x,))
        else:
            x = module(x)
    return x


def parameters(chain: Chain) -> list[nn.Parameter]:
    """The parameters of all that the stages apply, each once."""
    each = (inner for inner in modules(chain) if isinstance(inner, nn.Module))
    return list(dict.fromkeys(parameter for module in each for parameter in module.parameters()))


def below_norms(chain: Chain) -> dict[str, str]:
    """The linear and convolutional stages right below a BatchNorm, and that, by name; those in branches too."""
    found: dict[str, str] = {}
    for index, stage in enumerate(chain):
        if isinstance(stage.module, Branched):
            found |= below_norms(stage.module.body) | below_norms(stage.module.shortcut)
        elif kind_of(stage.module).is_affine and chain[index + 1 :] and kind_of(chain[index + 1].module).is_norm:
            found[stage.name] = chain[index + 1].name
    return found


def modules(chain: Chain) -> Iterator[Callable[[Tensor], Tensor]]:
    """What the stages apply, those in branches and opaque stages too, in the order in which they are applied."""
    for stage in chain:
        if isinstance(stage.module, Branched):
            yield from modules([*stage.module.body, *stage.module.shortcut])
        elif isinstance(stage.module, Unwalked):
            yield from stage.module.layers()
        else:
            yield stage.module


def mixed_below(chain: Chain) -> set[str]:
    """The names of the layers of a chain right below a BatchNorm in training mode, none inside residual stages."""
    pairs = itertools.pairwise(chain)
    return {below.name for below, stage in pairs if mixes_images([stage.module])}


def shift_before(chain: Chain) -> str | None:
    """The bias that is added right in front of the ReLU in which a chain ends; None where there is no such thing.

    Its gradient is the sum, over images and positions, of the active entries' delta. A max-pool behind the ReLU hands
    on all of delta, so it changes nothing.
    """
    while chain and kind_of(chain[-1].module).is_max_pool:
        chain = chain[:-1]
    if len(chain) < 2 or not kind_of(chain[-1].module).is_rectifier:
        return None
    return _last_bias(chain[:-1])


def mean_before(chain: Chain) -> Tensor | None:
    """The mean (C,), over the batch and all positions, in front of the ReLU in which a chain ends.

    BatchNorm in training mode gives its outputs the mean beta; sums of several have the sum. None of anything else.
    """
    if len(chain) < 2 or not kind_of(chain[-1].module).is_rectifier:
        return None
    return _last_mean(chain[-2:-1])


def _last_mean(chain: Chain) -> Tensor | None:
    if not chain:
        return None
    module = chain[-1].module
    if isinstance(module, Residual):
        means = [_last_mean(branch) for branch in (module.body, module.shortcut)]
        return None if any(mean is None for mean in means) else sum(means)
    return module.bias.detach() if mixes_images([module]) and getattr(module, "bias", None) is not None else None


def _last_bias(chain: Chain) -> str | None:
    last = chain[-1]
    if isinstance(last.module, Residual):
        branches = (_last_bias(branch) for branch in (last.module.body, last.module.shortcut) if branch)
        return next(filter(None, branches), None)
    kind = kind_of(last.module)
    is_shift = kind.is_affine or kind.is_norm or isinstance(last.module, nn.GroupNorm)
    has_bias = is_shift and getattr(last.module, "bias", None) is not None
    return f"{last.name}.bias" if has_bias else None


def is_walked(chain: Chain) -> bool:
    """Whether all of a model is in its chain, and no part of it is run as a whole."""
    return not any(isinstance(stage.module, Unwalked) for stage in chain)


def unmixed_from(chain: Chain) -> int:
    """The first stage behind all that mixes the images of a batch, BatchNorm in training mode; 0 if nothing does."""
    mixing = [index for index, stage in enumerate(chain) if mixes_images(modules([stage]))]
    return mixing[-1] + 1 if mixing else 0


def mixes_images(modules: Iterable[object]) -> bool:
    """Whether what one of the modules makes of an image depends on the others of the batch."""
    return any(kind_of(module).mixes_images(module) for module in modules)


@torch.no_grad()
def inputs_along(chain: Chain, x: Tensor) -> Iterator[tuple[Stage, Tensor]]:
    """Each linear, convolutional and residual stage, those in branches too, with what it takes, (B, ...)."""
    for stage in chain:
        if isinstance(stage.module, Residual) or kind_of(stage.module).is_affine:
            yield stage, x
        if isinstance(stage.module, Branched):
            yield from inputs_along(stage.module.body, x)
            yield from inputs_along(stage.module.shortcut, x)
        x = stage.module(x)


def skips(module: Residual) -> bool:
    """Whether a stage adds its own input to what its body makes, and mixes no images."""
    return not module.shortcut and not mixes_images(modules(module.body))


def first_layer(chain: Chain) -> str:
    """The name of the first stage that does more than to flatten."""
    return next(stage.name for stage in chain if not kind_of(stage.module).is_reshape)


def substituted(chain: Chain, change: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> list[Stage]:
    """The chain with `change(module)` in place of every module, in branches too."""
    return [
        replace(
            stage,
            module=type(stage.module)(*(substituted(branch, change) for branch in stage.module.branches))
            if isinstance(stage.module, Branched)
            else change(stage.module),
        )
        for stage in chain
    ]


def in_float32(chain: Chain) -> list[Stage]:
    """A copy of the chain, its parameters in float32."""
    return substituted(chain, lambda module: copy.deepcopy(module).float())


Moments = Mapping[nn.Module, tuple[Tensor, Tensor]]  # mean and variance (C,) by which a layer normalises


def with_moments(chain: Chain, moments: Moments) -> list[Stage]:
    """The chain with each BatchNorm in eval mode by these means and variances (C,), where they are given.

    By the statistics of its own batch BatchNorm does to each image what it did in training mode, and mixes none.
    """

    def change(module: nn.Module) -> nn.Module:
        if module not in moments:
            return module
        fixed = copy.deepcopy(module).eval()
        fixed.track_running_stats = True
        fixed.running_mean.copy_(moments[module][0])
        fixed.running_var.copy_(moments[module][1].clamp(min=0))  # rounding may have left less
        return fixed

    return substituted(chain, change)


@torch.no_grad()
def input_shapes(chain: Chain, image_shape: Sequence[int]) -> list[tuple[int, ...]]:
    """The shape of one image's activations before each stage and after the last: one more than there are stages."""
    x = _blank(chain, image_shape)
    shapes = [tuple(x.shape[1:])]
    for stage in chain:
        x = stage.module(x)
        shapes.append(tuple(x.shape[1:]))
    return shapes


@dataclass(frozen=True)
class Layer:
    """A linear or convolutional layer among images of one shape, z_p = W patch_p(a) + b at positions p = 1..P.

    Attributes:
        name: of the stage.
        module: the layer.
        input_shape: of one image: (d,) or (C, H, W).
        output_shape: of one image: (c_out,) or (c_out, H', W').
    """

    name: str
    module: nn.Linear | nn.Conv2d
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    @property
    def positions(self) -> int:
        """P."""
        is_linear = isinstance(self.module, nn.Linear)  # the channels of a linear layer on tokens come last
        return math.prod(self.output_shape[:-1] if is_linear else self.output_shape[1:])

    @property
    def channels_out(self) -> int:
        """c_out, the rows of the gradient as a matrix; of each group, where there are groups."""
        return self.module.weight.shape[0] // getattr(self.module, "groups", 1)

    @property
    def patch(self) -> int:
        """c_in k^2, the columns of the gradient as a matrix; of each group, where there are groups."""
        return self.module.weight[0].numel()


@torch.no_grad()
def measured(chain: Chain, image_shape: Sequence[int]) -> list[Layer]:
    """Every linear and convolutional layer of the chain for images (C, H, W), in the order they are applied."""
    found: list[Layer] = []
    _measure(chain, _blank(chain, image_shape), found)
    return found


def _measure(chain: Chain, x: Tensor, found: list[Layer]) -> Tensor:
    for stage in chain:
        if isinstance(stage.module, Branched):
            x = stage.module.together(*(_measure(branch, x, found) for branch in stage.module.branches))
            continue
        y = stage.module(x)
        if kind_of(stage.module).is_affine:
            found.append(Layer(stage.name, stage.module, tuple(x.shape[1:]), tuple(y.shape[1:])))
        x = y
    return x


def _blank(chain: Chain, image_shape: Sequence[int]) -> Tensor:
    """Two images: BatchNorm in training mode asks for more than one value per channel."""
    layers = (module for module in modules(chain) if isinstance(module, nn.Module))
    tensors = (t for layer in layers for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point())
    return next(tensors, torch.zeros(())).new_zeros(2, *image_shape)
