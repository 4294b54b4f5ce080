"""What a network gives away before anybody has sent anything: from its stages, image shape and batch size alone.

For each linear or convolutional layer:

- Spanned. Its averaged gradient has rank B P at most. Up to c_out, and below c_in k^2, the row space holds every patch
  of every image, and the layer's inputs can be told apart without anything above it.
- Determined from above. With inputs known further up, delta is, and each input channel has c_out k^2 gradient rows for
  B H W unknowns. Forward rows add up to c_out P an image; behind a ReLU about half of them are known. A stride sorts
  the positions into classes, and rows that one has too many do not make up for those that another lacks.
- Behind a gate in front of a sum. What the gate puts out is not known, so its layers and the one below it are told
  together with the block's input, or that layer's input by its own gradient.
- Determined together. Inside a residual block, a layer whose own equations are too few has the block's output beside
  them, for the block's input in place of its own (`block`); equations and unknowns are then those.

What a stage between layers tells of its inputs, and why not, is asked of its kind, as the walk asks it. The walk starts
at the lowest layer that is spanned and can be asked (`attack.read.layer_choice`), or at the head, and goes down while
the steps are determined. An estimate for typical weights: zeros in delta, closed channels or a singular weight can make
it worse.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from attack.read.layer_choice import candidate_layers, order
from attack.walk.equations import ENOUGH
from attack.walk.gates import is_held
from attack.walk.gauge import is_part_of_layer_below, why_not_in_front
from attack.walk.per_image import ROOM
from network.chain import Layer, in_products, input_shapes, measured, mixed_below, parametrised, skips
from network.embedding import PatchEmbedding
from network.kinds import kind_of
from network.kinds.affine import is_spanned
from network.kinds.joining import is_joined
from network.kinds.norm import MIXES
from network.kinds.product import CUT_OFF
from network.parametrised import why_no_gradient
from network.perceptrons import Perceptron
from network.stage import Chain, Gate, Residual

RARE = 0.05  # cases expected in a batch up to which a thing is not expected
ONE_BY_ONE = "its tokens are told apart one by one, and neither their images nor their positions"


class Step(NamedTuple):
    """The equations of a step down to a layer's input, over the batch, and what they are to tell.

    `reason` says in words why the step cannot be taken at all; empty where it can. `is_told` says that the input needs
    no equations, since the block's is known. `room` is how many equations each unknown takes.
    """

    equations: int
    unknowns: int
    reason: str = ""
    is_told: bool = False
    room: float = ENOUGH

    @property
    def is_determined(self) -> bool:
        """Whether there are enough equations."""
        return not self.reason and (self.is_told or self.equations >= self.room * self.unknowns)


def explain(
    chain: Chain,
    image_shape: Sequence[int],
    batch_size: int,
    embedding: PatchEmbedding | None = None,
    places: Sequence[Perceptron] = (),
) -> list[dict]:
    """One row for each linear or convolutional layer, from the images up.

    The patch projection of a transformer, `embedding`, has a row although what follows it is not walked, and so have
    the `places` whose single tokens may be told apart.

    Columns: layer, input_shape, positions (P), rank_bound (B P), rank_room (min(c_out, c_in k^2)), spanned, equations
    and unknowns of the step down to this layer's input, determined, known (its inputs are to be expected), deepest (the
    lowest of these) and reason (why the step down cannot be taken, or the layer's gradient not be read, in words).
    """
    layers = {layer.name: layer for layer in measured(chain, image_shape)}
    forecast = _Forecast(layers, batch_size)
    forecast.down(chain, Told(), tuple(image_shape))
    steps = forecast.steps
    like = next(iter(layers.values())).module.weight.new_zeros(1)
    asked = order(candidate_layers(chain, tuple(image_shape), {}, batch_size), batch_size, like)
    asked = [layer for layer in asked if layer.geometry.overlaps and not why_no_gradient(layer.layer)]
    entry = asked[0].index if asked else 0
    asked = {name: layer.index for layer in asked for name in (layer.name, *layer.entrances)}
    rows = [_row(layer, steps[name], batch_size) for name, layer in layers.items()]
    known, is_known = {}, False
    for name, step in steps.items():  # from the head down, as the walk goes
        is_spanned = name in asked
        if is_spanned and asked[name] < entry:  # below the layer that is asked first, images are carried down to it
            is_spanned = is_known and not step.reason
        known[name] = is_known = is_spanned or (is_known and step.is_determined)
    rows = [{**row, "known": known[row["layer"]]} for row in rows]
    reasons = {name: steps[name].reason or why_no_gradient(layer.module) for name, layer in layers.items()}
    if embedding is not None:
        rows = [_embedding_row(embedding, batch_size), *(row for row in rows if row["layer"] != embedding.name)]
        reasons[embedding.name] = embedding.why_not(batch_size)
    above = {row["layer"] for row in rows}
    told = [_place_row(place, batch_size) for place in places if place.first not in above]
    start = int(embedding is not None)
    rows = [*rows[:start], *told, *rows[start:]]
    reasons |= {place.first: place.why_not(batch_size) or ONE_BY_ONE for place in places}
    beside = in_products(chain)  # what a layer of a gate takes is no activation that the walk goes on from
    deepest = next((row["layer"] for row in rows if row["known"] and row["layer"] not in beside), None)
    return [{**row, "deepest": row["layer"] == deepest, "reason": reasons[row["layer"]]} for row in rows]


def _row(layer: Layer, step: Step, batch_size: int) -> dict:
    is_known = not kind_of(layer.module).why_not(layer.module, layer.input_shape, layer.output_shape)
    is_readable = is_known and not why_no_gradient(layer.module)
    return {
        "layer": layer.name,
        "input_shape": layer.input_shape,
        "positions": layer.positions,
        "rank_bound": batch_size * layer.positions,
        "rank_room": min(layer.channels_out, layer.patch),
        "spanned": is_readable and is_spanned(batch_size, layer.positions, layer.channels_out, layer.patch),
        "equations": step.equations,
        "unknowns": step.unknowns,
        "determined": step.is_determined,
    }


def _embedding_row(embedding: PatchEmbedding, batch_size: int) -> dict:
    """The step from the gradient of a position embedding to the patches of one image."""
    is_known, patches = not embedding.why_not(batch_size), batch_size * embedding.positions
    return {
        "layer": embedding.name,
        "input_shape": embedding.input_shape,
        "positions": embedding.positions,
        "rank_bound": patches,
        "rank_room": min(embedding.width, embedding.patch),
        "spanned": is_spanned(batch_size, embedding.positions, embedding.width, embedding.patch),
        "equations": embedding.width * embedding.patch,
        "unknowns": patches * embedding.patch,
        "determined": is_known,
        "known": is_known,
    }


def _place_row(place: Perceptron, batch_size: int) -> dict:
    """The tokens of a perceptron: they are told apart, and not the images that they belong to."""
    count = batch_size * place.tokens
    return {
        "layer": place.first,
        "input_shape": (place.tokens, place.width),
        "positions": place.tokens,
        "rank_bound": count,
        "rank_room": min(place.width, place.outer.out_features),
        "spanned": not place.why_not(batch_size),
        "equations": 0,
        "unknowns": count * place.width,
        "determined": False,
        "known": False,
    }


class Told(NamedTuple):
    """What is known of a stage's outputs: the share of them, or the reason why not even delta is known."""

    share: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class _Block:
    """A residual stage on the way down.

    Attributes:
        module: the stage's module.
        told: of its outputs.
        shape: of its input, one image's.
    """

    module: Residual
    told: Told
    shape: tuple[int, ...]

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of one image."""
        return input_shapes(self.module.body or self.module.shortcut, self.shape)[-1]

    def is_told_by(self, branch: Chain) -> bool:
        """Whether a branch's output gives all of the block's input: no ReLU is behind the sum, nothing in the other."""
        return branch is self.module.body and skips(self.module) and self.told == Told(1.0)


@dataclass
class _Entry:
    """What the branches of a block say of its input.

    Attributes:
        layers: that take it.
        equations: for it, those of these layers and the entries that are known by themselves.
        reason: why the walk ends in the block, in words; empty where it does not.
        is_told: whether all of it is known, whatever the layers say.
    """

    layers: list[str] = field(default_factory=list)
    equations: int = 0
    reason: str = ""
    is_told: bool = False


class _Forecast:
    """The steps down a chain, for a batch of so many images; layers by name.

    `steps` has those found so far, in the order in which the walk takes them.
    """

    def __init__(self, layers: dict[str, Layer], batch_size: int) -> None:
        self.layers, self.batch_size = layers, batch_size
        self.steps: dict[str, Step] = {}

    def down(self, chain: Chain, told: Told, shape: tuple[int, ...], block: _Block | None = None) -> _Entry:
        """Take the steps down a model's chain, or down a branch of a block, for inputs of that shape.

        Args:
            chain: the model's, or the branch.
            told: of the chain's outputs.
            shape: of its inputs.
            block: whose branch it is.
        """
        shapes, norm, held = input_shapes(chain, shape) if chain else [], None, []
        for index in reversed(range(len(chain))):
            stage, kind, lowest = chain[index], kind_of(chain[index].module), block is not None and not index
            is_behind_image_norm = norm is not None and not kind_of(norm.module).mixes_images(norm.module)
            if norm is not None and not told.reason:
                told = told._replace(reason=why_not_in_front(stage.module))
            norm = stage if is_part_of_layer_below(stage.module, shapes[index], chain[:index]) else None
            if norm is not None:  # a part of the equations of the layer below it
                continue
            is_untold_gate = isinstance(stage.module, Gate) and told == Told() and block is not None
            if (held or is_untold_gate) and is_held(stage.module):
                held.append(stage)
                continue
            if held and not kind.is_affine:
                told = self._cut_off(held)
                held = []
            if isinstance(stage.module, Residual) and lowest:
                return self._branches(_Block(stage.module, told, shapes[index]))
            if isinstance(stage.module, Residual):
                told = self._past_block(stage.name, _Block(stage.module, told, shapes[index]))
            elif kind.is_affine:
                step = self._layer(self.layers[stage.name], told)
                step = step._replace(room=ROOM) if is_behind_image_norm else step
                names = [*(layer.name for layer in parametrised(held)), stage.name]
                if lowest:
                    self.steps |= dict.fromkeys(names, step)
                    return _Entry(names, step.equations, step.reason)
                if held:
                    step = self._in_front_of_gate(step, block, chain[:index])
                else:
                    step = self._in_block(step, block, chain, index)
                self.steps |= dict.fromkeys(names, step)
                told, held = Told(1.0), []
                if block is not None and step.is_determined and block.is_told_by(chain):
                    return _Entry(equations=self._entries(shape), is_told=True)
            else:
                reason = kind.why_not(stage.module, shapes[index], shapes[index + 1])
                reason = reason or (kind.needs_all if told.share < 1 else "")
                told = told if told.reason else Told(min(told.share, kind.known_share), reason)
                self.steps |= {layer.name: self._in_gate(layer.name, told.reason) for layer in parametrised([stage])}
        told = self._cut_off(held) if held else told
        reason = told.reason or (MIXES if norm is not None else "")
        return _Entry(equations=int(told.share * self._entries(shape)), reason=reason)

    def _entries(self, shape: Sequence[int]) -> int:
        """Of all images' activations of that shape."""
        return self.batch_size * math.prod(shape)

    def _layer(self, layer: Layer, told: Told) -> Step:
        kind, unknowns = kind_of(layer.module), self._entries(layer.input_shape)
        reason = told.reason or kind.why_not(layer.module, layer.input_shape, layer.output_shape)
        reason = reason or self._silent(layer, told.share)
        known = int(told.share * self._entries(layer.output_shape))
        if reason:
            return Step(0, unknowns, reason)
        return Step(kind.equations(layer.module, known, layer.input_shape, self.batch_size), unknowns)

    def _cut_off(self, held: Chain) -> Told:
        """What is known below a gate whose outputs are not, and below what was passed with it: nothing."""
        self.steps |= {layer.name: self._in_gate(layer.name, CUT_OFF) for layer in parametrised(held)}
        return Told(reason=CUT_OFF)

    def _in_front_of_gate(self, step: Step, block: _Block, below: Chain) -> Step:
        """The step to a layer in front of a gate: alone where it can be, unless the block's output is its input too."""
        if step.is_determined and not skips(block.module):
            return step
        return self._with_block(step, block, below)

    def _in_gate(self, name: str, reason: str) -> Step:
        """The step to a layer of a gate, whose input follows from what the gate multiplies."""
        unknowns = self._entries(self.layers[name].input_shape)
        return Step(0, unknowns, reason) if reason else Step(unknowns, unknowns, is_told=True)

    def _silent(self, layer: Layer, share: float) -> str:
        """Why outputs that an activation cuts off leave a grouped layer's inputs open; empty where they do not.

        Where an image has no active output of a group, neither its values nor its delta tell of its inputs there.
        """
        groups = getattr(layer.module, "groups", 1)
        off = groups * self.batch_size * (1 - share) ** (layer.positions * layer.channels_out)
        is_gated = 0 < share < 1  # of a body's output nothing is known, and that cuts nothing off
        if not is_gated or off <= RARE:
            return ""
        return f"an image has all outputs cut off in one of its {groups} groups, in about {off:.2g} cases"

    def _in_block(self, step: Step, block: _Block | None, chain: Chain, index: int) -> Step:
        """The step to a layer of a block's body, with the block's output beside it where it is too short alone."""
        if block is None or chain is not block.module.body or step.is_determined or step.reason:
            return step
        if chain[index].name in mixed_below(chain):
            return step
        together = self._with_block(step, block, chain[:index])
        return together if together.is_determined else step

    def _with_block(self, step: Step, block: _Block, below: Chain) -> Step:
        """The step to a layer's input h and the block's input together; `below` is the part of the body that makes h.

        Where the shortcut is the identity, the block's output nearly is its input. Elsewhere h has to tell it, and what
        an activation has cut off of h tells nothing of what came in.
        """
        is_cut = bool(below) and not skips(block.module)
        told = int((kind_of(below[-1].module).known_share if is_cut else 1.0) * step.unknowns)
        outputs = int(block.told.share * self._entries(block.output_shape))
        return Step(min(step.equations, told) + outputs, self._entries(block.shape), step.reason)

    def _past_block(self, name: str, block: _Block) -> Told:
        """Take the steps inside a residual stage; what is known of its input. The layers that take it share a step."""
        before = set(self.steps)
        entry = self._branches(block)
        inside = [layer for layer in self.steps if layer not in before]
        above = [layer for layer in inside if layer not in entry.layers]
        if entry.is_told:
            for layer in reversed([stage.name for stage in parametrised(block.module.body)]):
                unknowns = self._entries(self.layers[layer].input_shape)
                self.steps.setdefault(layer, Step(unknowns, unknowns, is_told=True))
            return Told(1.0)
        stuck = next((layer for layer in above if not self.steps[layer].is_determined), None)
        reason = entry.reason or (f"the inputs of {stuck}, in the same block, are not told" if stuck else "")
        shared = Step(entry.equations, self._entries(block.shape), reason)
        for layer in entry.layers:  # they come last
            del self.steps[layer]
        self.steps |= dict.fromkeys(entry.layers, shared)
        if shared.is_determined or entry.layers:
            return Told(1.0)
        return Told(reason=reason or f"too little is told of the input of {name}")

    def _branches(self, block: _Block) -> _Entry:
        """Take the steps inside both branches, and collect what they say of the block's input."""
        found, joined = _Entry(), is_joined(block.module)
        for branch in (block.module.body, block.module.shortcut):
            told = block.told if joined or branch is block.module.shortcut else block.told._replace(share=0.0)
            more = self.down(branch, told, block.shape, block)
            found.layers += more.layers
            found.equations += more.equations
            found.reason = found.reason or more.reason
            if more.is_told:
                return more
        return found
