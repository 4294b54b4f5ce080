"""Which layers' inputs may be told apart from one another, and in which order that is tried.

A layer is worth trying where its gradient spans its inputs (`span.is_spanned`), every entry of an input lies in some
patch, and the network behind it can be run from the layer's inputs and outputs alone, as it cannot inside a residual
block, where the skip passes by. The head is tried last: it tells K - 1 images apart at most, and what lies between it
and the last convolution is mostly a pool, which ends the walk down.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from attack.read.signals import Tail
from attack.read.span import Geometry
from network.chain import ACTIVATIONS, Chain, Residual, input_shapes, run

PIXELS = "pixels"  # what the first layer takes: no activation is in front of it
SMOOTH = ("sigmoid", "tanh", "gelu")  # activations without a kink, through which equations can be followed anywhere
SATURATING = ("sigmoid", "tanh")
ROOMY = 1.5  # times the rank needed that a layer should have room for: with less the equations bear little witness


@dataclass(frozen=True)
class Place:
    """A layer that may be tried.

    Attributes:
        name: of the layer.
        index: in the chain, of the layer or of the residual stage that it begins.
        layer: inputs -> outputs.
        geometry: of the layer.
        kind: the activation that its inputs come out of, in small letters, or `pixels`.
        tail: the network behind it.
        bias_gradient: of what is added to its outputs, (c_out,), or None.
        behind: the activation that its outputs go through, in small letters; empty behind the head.
        followers: the fully connected layers behind it that a ReLU each and nothing else stands in front of.
    """

    name: str
    index: int
    layer: nn.Module
    geometry: Geometry
    kind: str
    tail: Tail
    bias_gradient: Tensor | None
    behind: str
    followers: tuple[str, ...] = ()

    @property
    def saturating(self) -> bool:
        """Whether its outputs go through a sigmoid or tanh."""
        return self.behind in SATURATING

    @property
    def overlaps(self) -> bool:
        """Whether patches overlap enough to say which belong together; a single one has nothing to be confused with."""
        geometry = self.geometry
        return geometry.positions == 1 or max(geometry.stride) < max(geometry.kernel) - 1

    def sees_everything(self, like: Tensor) -> bool:
        """Whether every entry of an input lies in some patch."""
        return bool((self.geometry.coverage(like) > 0).all())


def places(chain: Chain, image_shape: tuple[int, ...], gradients: Mapping[str, Tensor]) -> list[Place]:
    """Every layer of the chain that its inputs and outputs suffice to run the network from, from the images up."""
    shapes = input_shapes(chain, image_shape)
    found = []
    for index, stage in enumerate(chain):
        for first, behind, passed in _entrances(chain, index):
            try:
                geometry = Geometry.of(first.module, shapes[index])
            except ValueError:
                continue  # a kind of convolution that is not read
            found.append(
                Place(
                    name=first.name,
                    index=index,
                    layer=first.module,
                    geometry=geometry,
                    kind=kind_of_inputs(chain[:index], shapes),
                    tail=_tail(behind, passed, chain[index + 1 :]),
                    bias_gradient=_bias_gradient(first, [*behind, *chain[index + 1 :]], gradients),
                    behind=_activation_behind([*behind, *chain[index + 1 :]]),
                    followers=() if isinstance(stage.module, Residual) else _followers(chain, index),
                )
            )
    return found


def order(candidates: list[Place], batch_size: int, like: Tensor) -> list[Place]:
    """Those of the places that span their inputs, the most promising first."""

    def promise(place: Place) -> tuple:
        ratio = place.geometry.bound(like) / (batch_size * place.geometry.positions)
        guessed = place.kind not in ("relu", *SMOOTH) and place.behind == "relu"  # neither zeros nor smoothness
        return guessed, ratio < ROOMY, not place.overlaps, place.index

    useful = [p for p in candidates if p.geometry.is_spanned(batch_size, like) and p.sees_everything(like)]
    return sorted(useful, key=promise)


def kind_of_inputs(chain: Chain, shapes: list[tuple[int, ...]]) -> str:
    """What comes out of the chain: the name of its last activation, `pixels`, or the class of what hides it."""
    for index, stage in reversed(list(enumerate(chain))):
        module = stage.module
        if isinstance(module, ACTIVATIONS):
            return type(module).__name__.lower()
        is_trivial = math.prod(shapes[index]) == math.prod(shapes[index + 1])
        if not isinstance(module, nn.MaxPool2d) and (
            not is_trivial or isinstance(module, (Residual, nn.Linear, nn.Conv2d, nn.BatchNorm2d))
        ):
            return type(module).__name__.lower()
    return PIXELS


def _entrances(chain: Chain, index: int) -> Iterator[tuple]:
    """The layers that take a stage's inputs: each with what follows it in its branch, and the branch beside."""
    module = chain[index].module
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        yield chain[index], (), None
    elif isinstance(module, Residual):
        for branch, other in ((module.body, module.shortcut), (module.shortcut, module.body)):
            if branch and isinstance(branch[0].module, (nn.Linear, nn.Conv2d)):
                yield branch[0], branch[1:], other


def _tail(behind: Chain, beside: Chain | None, rest: Chain) -> Callable[[Tensor, Tensor], Tensor]:
    def tail(inputs: Tensor, outputs: Tensor) -> Tensor:
        outputs = run(behind, outputs)
        return run(rest, outputs if beside is None else outputs + run(beside, inputs))

    return tail


def _bias_gradient(stage: object, behind: Chain, gradients: Mapping[str, Tensor]) -> Tensor | None:
    """That of the layer's own bias, or of the BatchNorm behind a layer without one."""
    own = gradients.get(f"{stage.name}.bias")
    if own is not None or not behind:
        return own
    norm = behind[0].module
    shift = gradients.get(f"{behind[0].name}.bias")
    if not isinstance(norm, nn.BatchNorm2d) or not norm.affine or shift is None:
        return None
    return shift.to(norm.weight) * (norm.weight * (norm.running_var + norm.eps).rsqrt()).detach()


def _activation_behind(chain: Chain) -> str:
    for stage in chain:
        if isinstance(stage.module, ACTIVATIONS):
            return type(stage.module).__name__.lower()
    return ""


def _followers(chain: Chain, index: int) -> tuple[str, ...]:
    found = []
    while (
        index + 2 < len(chain)
        and isinstance(chain[index + 1].module, nn.ReLU)
        and isinstance(chain[index + 2].module, nn.Linear)
        and isinstance(chain[index].module, nn.Linear)
    ):
        index += 2
        found.append(chain[index].name)
    return tuple(found)
