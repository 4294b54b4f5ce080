"""Which layers' inputs may be told apart from one another, and in which order that is tried.

A layer is worth trying where its gradient spans its inputs (`Geometry.is_spanned`), every entry of an input lies in
some patch, and the network behind it can be run from the layer's inputs and outputs alone, as it cannot inside a
residual block, where the skip passes by, unless the layer's inputs give those of the block first
(`attack.read.beneath`). Of a grouped convolution one group may give them, the one whose span is clearest. Where a layer
from there on mixes the images of the batch, no image can be judged by itself, and all of them are told apart at once
(`attack.read.jointly`). The head is tried last: it tells K - 1 images apart at most, and between it and the last
convolution there is mostly a pool, which ends the walk down.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attack.read.beneath import Beneath
from attack.read.signals import Tail
from attack.read.span import Span, span_of
from network.chain import input_shapes, mixes_images, unmixed_from
from network.kinds import UNKNOWN, Kind, kind_of
from network.kinds.affine import Geometry, group_of, rows_of_group
from network.kinds.joining import Part
from network.kinds.norm import scale_and_shift
from network.stage import Chain, Residual, Stage, run

ROOMY = 1.5  # times the rank needed that a layer should have room for: with less the equations bear little witness


@dataclass(frozen=True)
class CandidateLayer:
    """A layer that may be tried.

    Attributes:
        name: of the layer.
        index: in the chain, of the layer or of the residual stage that it begins.
        layer: inputs -> outputs.
        geometry: of the layer.
        inputs: the kind of activation that its inputs come out of; of pixels, and where something hides it, unknown.
        tail: the network behind it.
        bias_gradient: of what is added to its outputs, (c_out,), or None.
        behind: the kind of activation that its outputs go through; unknown behind the head.
        followers: the fully connected layers behind a fully connected one that an activation each, z above zero and s z
            below, and nothing else stands in front of: names and s.
        mixes: whether BatchNorm in training mode is behind it.
        centred: whether that follows right behind it.
        beneath: what lies below it in a residual block; None of a layer that takes the stage's own inputs.
        entrances: the layers that take the stage's inputs, which `beneath` gives.
        rows: the layer's rows in the gradient, of a group of a grouped convolution.
    """

    name: str
    index: int
    layer: nn.Module
    geometry: Geometry
    inputs: Kind
    tail: Tail
    bias_gradient: Tensor | None
    behind: Kind
    followers: tuple[tuple[str, float], ...] = ()
    mixes: bool = False
    centred: bool = False
    beneath: Beneath | None = None
    entrances: tuple[str, ...] = ()
    rows: slice | None = None

    def all_inputs(self, inputs: Tensor) -> Tensor:
        """The inputs (N, ...) of all groups, from those of the layer."""
        return inputs if self.rows is None else run(self.beneath.chain[:-1], self.stage_inputs(inputs))

    def stage_inputs(self, inputs: Tensor) -> Tensor:
        """The inputs (N, ...) of the stage `index`, from those of the layer."""
        return inputs if self.beneath is None else self.beneath.inputs(inputs)

    def sees_everything(self, like: Tensor) -> bool:
        """Whether every entry of an input lies in some patch."""
        return bool((self.geometry.coverage(like) > 0).all())

    def at_any_step(self, gradients: Mapping[str, Tensor]) -> "CandidateLayer":
        """The layer, for an update of several steps: a BatchNorm behind it changes, and tells no bias gradient."""
        return replace(self, bias_gradient=gradients.get(f"{self.name}.bias"))

    def is_asked(self, batch_size: int) -> bool:
        """Whether images can be told apart: of a batch that is mixed, by the zeros of a ReLU and by several patches."""
        if self.beneath is not None and (self.mixes or not self.beneath.is_told):
            return False
        return not self.mixes or (self.inputs.is_sparse and self.geometry.positions > 1 and batch_size > 1)

    def span(self, gradients: Mapping[str, Tensor], batch_size: int, like: Tensor, floor: Tensor | None = None) -> Span:
        """The space of its inputs, on the device of `like`; `floor` as in `span_of`.

        Raises:
            ValueError: the update holds no gradient of it.
        """
        gradient = gradients.get(f"{self.name}.weight")
        if gradient is None:
            raise ValueError("the update holds no gradient of it")
        return span_of(
            (gradient if self.rows is None else gradient[self.rows]).to(like.device),
            self.geometry,
            batch_size,
            self.bias_gradient,
            saturating=self.behind.is_saturating,
            centred=self.centred,
            floor=floor,
        )


def candidate_layers(
    chain: Chain, image_shape: tuple[int, ...], gradients: Mapping[str, Tensor], batch_size: int | None = None
) -> list[CandidateLayer]:
    """Every layer of the chain that its inputs and outputs suffice to run the network from, from the images up.

    Where the batch size is given, layers inside residual blocks are among them whose inputs give the block's, see
    `attack.read.beneath`.
    """
    shapes, first = input_shapes(chain, image_shape), unmixed_from(chain)
    found = []
    for index, stage in enumerate(chain):
        for layer, behind, beside in _entrances(stage):
            rest = [*behind, *chain[index + 1 :]]
            below = (kind_of_inputs(chain[:index], shapes), shapes[index])
            followers = () if isinstance(stage.module, Residual) else _followers(chain, index)
            tail = _tail(behind, beside, chain[index + 1 :])
            facts = {"index": index, "tail": tail, "followers": followers, "mixes": index < first}
            found.append(_candidate(layer, rest, below, gradients, **facts))
        for layer, behind, beneath, rows in _inside(stage, shapes[index], batch_size, gradients):
            rest = [*behind, *chain[index + 1 :]]
            below = (kind_of_inputs(beneath.chain, beneath.shapes), beneath.shapes[-1])
            tail = _tail(behind, stage.module.shortcut, chain[index + 1 :], beneath)
            if rows is not None:
                tail = _with_all_groups(tail, stage.module.body[len(beneath.chain) - 1].module, beneath, rows)
            entrances = tuple(entrance.name for entrance, *_ in _entrances(stage))
            facts = {"index": index, "tail": tail, "mixes": index < first, "beneath": beneath, "entrances": entrances}
            found.append(_candidate(layer, rest, below, gradients, **facts, rows=rows))
    return [layer for layer in found if layer is not None]


def _candidate(
    layer: Stage, rest: Chain, below: tuple[Kind, tuple[int, ...]], gradients: Mapping[str, Tensor], **facts: object
) -> CandidateLayer | None:
    """A layer, with what follows it, and kind and shape of its inputs; None of a convolution that is not read."""
    inputs, shape = below
    try:
        geometry = Geometry.of(layer.module, shape)
    except ValueError:
        return None
    centred, rows = bool(rest) and mixes_images([rest[0].module]), facts.get("rows")
    bias_gradient = None if centred else _bias_gradient(layer, rest, gradients)
    return CandidateLayer(
        name=layer.name,
        layer=layer.module,
        geometry=geometry,
        inputs=inputs,
        bias_gradient=bias_gradient if rows is None or bias_gradient is None else bias_gradient[rows],
        behind=_activation_behind(rest),
        centred=centred,
        **facts,
    )


def order(candidates: list[CandidateLayer], batch_size: int, like: Tensor) -> list[CandidateLayer]:
    """Those of the layers that span their inputs, the most promising first."""

    def promise(layer: CandidateLayer) -> tuple:
        ratio = layer.geometry.bound(like) / (batch_size * layer.geometry.positions)
        guessed = not layer.inputs.is_activation and layer.behind.has_kink  # neither zeros nor smoothness help
        is_tight = ratio < ROOMY
        lone = not layer.mixes  # what is mixed lies lower, is judged by the head as well, and leads further down
        return guessed, is_tight and lone, not layer.geometry.overlaps, lone, is_tight, layer.index

    useful = [
        c
        for c in candidates
        if c.geometry.is_spanned(batch_size, like) and c.sees_everything(like) and c.is_asked(batch_size)
    ]
    return sorted(useful, key=promise)


def farther_up(waiting: list[CandidateLayer], failed: CandidateLayer) -> list[CandidateLayer]:
    """The layers in the order to ask them in, after one that has not told all images apart.

    Where the layer lies inside a residual block, a long way of ReLUs may be behind it. One entry in these that rounding
    has switched spoils the deltas of its image at every layer below, by some thousandths. So the next one asked lies
    halfway up among its like, and those passed by come last: 22 inner layers of a ResNet-101 are asked five times.
    """
    alike = [each for each in waiting if each.beneath is not None and each.index > failed.index]
    if failed.beneath is None or not alike:
        return waiting
    passed = alike[: len(alike) // 2]
    names = {each.name for each in passed}
    return [each for each in waiting if each.name not in names] + passed


def kind_of_inputs(chain: Chain, shapes: list[tuple[int, ...]]) -> Kind:
    """The kind of the chain's last activation; unknown where there is none, or something behind it hides its zeros."""
    for index, stage in reversed(list(enumerate(chain))):
        kind = kind_of(stage.module)
        if kind.is_activation:
            return kind
        if not kind.keeps_zeros(stage.module, shapes[index], shapes[index + 1]):
            return UNKNOWN
    return UNKNOWN


def _entrances(stage: Stage) -> Iterator[tuple[Stage, Chain, Chain | None]]:
    """The layers that take a stage's inputs: each with what follows it in its branch, and the branch beside."""
    module = stage.module
    if kind_of(module).is_affine:
        yield stage, (), None
    elif isinstance(module, Residual):
        for branch, other in ((module.body, module.shortcut), (module.shortcut, module.body)):
            if branch and kind_of(branch[0].module).is_affine:
                yield branch[0], branch[1:], other


def _inside(
    stage: Stage, shape: tuple[int, ...], batch_size: int | None, gradients: Mapping[str, Tensor]
) -> Iterator[tuple[Stage, Chain, Beneath, slice | None]]:
    """The layers inside a residual stage whose inputs give the stage's: what follows them, and what lies below.

    Of a grouped convolution it is one group, as a layer of its own, with its rows in the gradient.
    """
    if batch_size is None or not isinstance(stage.module, Residual):
        return
    body = stage.module.body
    for at, layer in enumerate(body):
        if at and kind_of(layer.module).is_affine:
            below, rows = body[:at], None
            if getattr(layer.module, "groups", 1) > 1:
                index = _clearest_group(layer, gradients)
                group = group_of(layer.module, index)
                part = Part(index * group.in_channels, group.in_channels)
                below, rows = [*below, Stage(layer.name, part)], rows_of_group(layer.module, index)
                layer = replace(layer, module=group)
            beneath = Beneath.of(below, shape, batch_size, gradients)
            if beneath is not None:
                yield layer, body[at + 1 :], beneath, rows
            return


def _clearest_group(layer: Stage, gradients: Mapping[str, Tensor]) -> int:
    """The group whose gradient has most directions that stand out; the first where there is no gradient."""
    gradient = gradients.get(f"{layer.name}.weight")
    if gradient is None:
        return 0
    groups = gradient.detach().double().flatten(1).unflatten(0, (layer.module.groups, -1))
    return int(torch.linalg.svdvals(groups).clamp(min=1e-300).log().sum(1).argmax())


def _with_all_groups(tail: Tail, layer: nn.Conv2d, beneath: Beneath, rows: slice) -> Tail:
    """The tail behind one group of a layer: the other groups' outputs are those of the inputs that `beneath` gives."""

    def behind(inputs: Tensor, outputs: Tensor) -> Tensor:
        with torch.no_grad():
            others = layer(run(beneath.chain[:-1], beneath.inputs(inputs)))
        return tail(inputs, torch.cat([others[:, : rows.start], outputs, others[:, rows.stop :]], 1))

    return behind


def _tail(
    behind: Chain, beside: Chain | None, rest: Chain, beneath: Beneath | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    def tail(inputs: Tensor, outputs: Tensor) -> Tensor:
        outputs = run(behind, outputs)
        if beside is None:
            return run(rest, outputs)
        return run(rest, outputs + run(beside, inputs if beneath is None else beneath.inputs(inputs)))

    return tail


def _bias_gradient(layer: Stage, behind: Chain, gradients: Mapping[str, Tensor]) -> Tensor | None:
    """The gradient of the layer's own bias, or that of the BatchNorm behind a layer without one, per unit of output."""
    own = gradients.get(f"{layer.name}.bias")
    if own is not None or not behind:
        return own
    norm, shift = behind[0].module, gradients.get(f"{behind[0].name}.bias")
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or not norm.affine or shift is None:
        return None
    return shift.to(norm.weight) * scale_and_shift(norm, 2)[0]


def _activation_behind(chain: Chain) -> Kind:
    kinds = (kind_of(stage.module) for stage in chain)
    return next((kind for kind in kinds if kind.is_activation), UNKNOWN)


def _followers(chain: Chain, index: int) -> tuple[tuple[str, float], ...]:
    found = []
    while index + 2 < len(chain) and all(isinstance(chain[i].module, nn.Linear) for i in (index, index + 2)):
        between = chain[index + 1].module
        slope = kind_of(between).slope_below_zero(between)
        if slope is None:
            break
        index += 2
        found.append((chain[index].name, slope))
    return tuple(found)
