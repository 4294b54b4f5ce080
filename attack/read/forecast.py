"""What a network gives away before anybody has sent anything: from its stages, image shape and batch size alone.

For each linear or convolutional layer:

- Spanned. Its averaged gradient has rank B P at most. Up to c_out, and below c_in k^2, the row space holds every patch
  of every image, and the layer's inputs can be told apart without anything above it.
- Determined from above. With inputs known further up, delta is, and each input channel has c_out k^2 gradient rows for
  B H W unknowns. Forward rows add up to c_out P an image; behind a ReLU about half of them are known.
- Determined together. Inside a residual block, a layer whose own equations are too few has the block's output beside
  them, for the block's input in place of its own (`block`); equations and unknowns are then those.

What a stage between layers tells of its inputs, and why not, is asked of its kind, as the walk asks it. The walk starts
at the lowest layer that is spanned and can be asked (`attack.read.layer_choice`), or at the head, and goes down while
the steps are determined. An estimate for typical weights: zeros in delta, closed channels or a singular weight can make
it worse.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from attack.read.layer_choice import candidate_layers, order
from attack.walk.equations import ENOUGH
from network.chain import Layer, input_shapes, measured, mixed_below, parametrised
from network.embedding import PatchEmbedding
from network.kinds import kind_of
from network.kinds.affine import is_spanned
from network.kinds.joining import is_joined
from network.kinds.norm import MIXES
from network.parametrised import why_no_gradient
from network.perceptrons import Perceptron
from network.stage import Chain, Residual

ONE_BY_ONE = "its tokens are told apart one by one, and neither their images nor their positions"


class Step(NamedTuple):
    """The equations of a step down to a layer's input, over the batch, and what they are to tell.

    `reason` says in words why the step cannot be taken at all; empty where it can.
    """

    equations: int
    unknowns: int
    reason: str = ""

    @property
    def is_determined(self) -> bool:
        """Whether there are enough equations."""
        return not self.reason and self.equations >= ENOUGH * self.unknowns


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
    steps, _ = forecast.steps(chain, Told(0.0), tuple(image_shape))
    like = next(iter(layers.values())).module.weight.new_zeros(1)
    asked = order(candidate_layers(chain, tuple(image_shape), {}, batch_size), batch_size, like)
    asked = [layer for layer in asked if layer.geometry.overlaps and not why_no_gradient(layer.layer)]
    asked = {name for layer in asked for name in (layer.name, *layer.entrances)}
    rows = [_row(layer, steps[name], batch_size) for name, layer in layers.items()]
    is_known = False
    for row in reversed(rows):  # from the head down
        is_known = row["layer"] in asked or (is_known and row["determined"])
        row["known"] = is_known
    reasons = {name: steps[name].reason or why_no_gradient(layer.module) for name, layer in layers.items()}
    if embedding is not None:
        rows = [_embedding_row(embedding, batch_size), *(row for row in rows if row["layer"] != embedding.name)]
        reasons[embedding.name] = embedding.why_not(batch_size)
    above = {row["layer"] for row in rows}
    told = [_place_row(place, batch_size) for place in places if place.first not in above]
    start = int(embedding is not None)
    rows = [*rows[:start], *told, *rows[start:]]
    reasons |= {place.first: place.why_not(batch_size) or ONE_BY_ONE for place in places}
    deepest = next((row["layer"] for row in rows if row["known"]), None)
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


class _Forecast:
    """The steps down a chain, for a batch of so many images; layers by name."""

    def __init__(self, layers: dict[str, Layer], batch_size: int) -> None:
        self.layers, self.batch_size = layers, batch_size

    def steps(self, chain: Chain, told: Told, shape: tuple[int, ...]) -> tuple[dict[str, Step], Told]:
        """By layer, the step to its input; and what is known of the chain's own input once these are solved.

        Args:
            chain: a model's, or a branch's, for inputs of that shape.
            told: of the chain's outputs.
        """
        found: dict[str, Step] = {}
        shapes, is_behind_norm = input_shapes(chain, shape) if chain else [], False
        for index in reversed(range(len(chain))):
            stage, kind = chain[index], kind_of(chain[index].module)
            if is_behind_norm and not kind.is_affine:
                told = told if told.reason else Told(reason=MIXES)
            is_behind_norm = kind.is_norm and kind.mixes_images(stage.module)
            if is_behind_norm:  # a part of the equations of the layer below it
                continue
            if isinstance(stage.module, Residual):
                found |= self._block(stage.module, told, shapes[index])
                told = Told(1.0)
            elif kind.is_affine:
                found[stage.name] = self._layer(self.layers[stage.name], told)
                told = Told(1.0)
            else:
                reason = kind.why_not(stage.module, shapes[index], shapes[index + 1])
                told = told if told.reason else Told(min(told.share, kind.known_share), reason)
        return found, Told(reason=MIXES) if is_behind_norm and not told.reason else told

    def _layer(self, layer: Layer, told: Told) -> Step:
        kind, unknowns = kind_of(layer.module), self.batch_size * math.prod(layer.input_shape)
        reason = told.reason or kind.why_not(layer.module, layer.input_shape, layer.output_shape)
        known = int(told.share * self.batch_size * math.prod(layer.output_shape))
        return Step(0 if reason else kind.equations(layer.module, known), unknowns, reason)

    def _block(self, module: Residual, told: Told, shape: tuple[int, ...]) -> dict[str, Step]:
        """The steps inside a residual block: the lowest layers of both branches share theirs, since they share u."""
        body, _ = self.steps(module.body, told if is_joined(module) else told._replace(share=0.0), shape)
        shortcut, _ = self.steps(module.shortcut, told, shape)
        found = body | shortcut
        lowest = [next(parametrised(branch)).name for branch in (module.body, module.shortcut) if has_layers(branch)]
        reason = next((found[name].reason for name in found if found[name].reason), "")
        if reason or not lowest or lowest[0] not in body:  # the walk ends inside the block, above its lowest layers
            return found | {name: found[name]._replace(reason=found[name].reason or reason) for name in lowest}
        last = [stage.name for stage in parametrised(module.body)][-1]
        unknowns = found[lowest[0]].unknowns
        size = unknowns if is_joined(module) else self.batch_size * math.prod(self.layers[last].output_shape)
        outputs = int(told.share * size)
        for name in body:
            if name != lowest[0] and not body[name].is_determined and name not in mixed_below(module.body):
                together = Step(body[name].equations + outputs, unknowns)
                found[name] = together if together.is_determined else body[name]
        total = sum(found[name].equations for name in lowest) + (0 if has_layers(module.shortcut) else outputs)
        return found | dict.fromkeys(lowest, Step(total, unknowns))


def has_layers(chain: Chain) -> bool:
    """Whether there is a linear or convolutional layer in a chain."""
    return any(True for _ in parametrised(chain))
