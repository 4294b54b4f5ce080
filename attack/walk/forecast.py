"""What a network gives away before anybody has sent anything: from its stages, image shape and batch size alone.

For each linear or convolutional layer:

- Spanned. Its averaged gradient has rank B P at most. Up to c_out, and below c_in k^2, the row space holds every patch
  of every image, and the layer's inputs can be told apart without anything above it.
- Determined from above. With inputs known further up, delta is, and each input channel has c_out k^2 gradient rows for
  B H W unknowns. Forward rows add up to c_out P an image; behind a ReLU about half of them are known.
- Determined together. Inside a residual block, a layer whose own equations are too few has the block's output beside
  them, for the block's input in place of its own (`together`); equations and unknowns are then those.

The walk starts at the lowest layer that is spanned and can be asked (`choice`), or at the head, and goes down while the
steps are determined. An estimate for typical weights: zeros in delta, closed channels or a singular weight can make it
worse.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from attack.read.layer_choice import order, places
from attack.read.span import is_spanned
from network.chain import Chain, Layer, Residual, measured

KNOWN_BEHIND_RELU = 0.5  # share of a ReLU's outputs that are active, about
INVERTIBLE = (nn.Sigmoid, nn.Tanh, nn.BatchNorm2d, nn.Flatten, nn.Dropout, nn.Identity)
MARGIN = 1.05  # equations for each unknown below which noise is blown up too far


class Step(NamedTuple):
    """The equations of a step down to a layer's input, over the batch, and what they are to tell."""

    equations: int
    unknowns: int

    @property
    def is_determined(self) -> bool:
        """Whether there are enough of them."""
        return self.equations >= MARGIN * self.unknowns


def explain(chain: Chain, image_shape: Sequence[int], batch_size: int) -> list[dict]:
    """One row for each linear or convolutional layer, from the images up.

    Columns: layer, input_shape, positions (P), rank_bound (B P), rank_room (min(c_out, c_in k^2)), spanned, equations
    and unknowns of the step down to this layer's input, determined, known (its inputs are to be expected) and deepest
    (the lowest of these).
    """
    layers = {layer.name: layer for layer in measured(chain, image_shape)}
    steps, _ = _steps(chain, 0.0, layers, batch_size)
    rows = [_row(layer, steps[name], batch_size) for name, layer in layers.items()]
    like = next(iter(layers.values())).module.weight.new_zeros(1)
    asked = {place.name for place in order(places(chain, image_shape, {}), batch_size, like) if place.overlaps}
    is_known = False
    for row in reversed(rows):  # from the head down
        is_known = row["layer"] in asked or (is_known and row["determined"])
        row["known"] = is_known
    deepest = next((row["layer"] for row in rows if row["known"]), None)
    return [row | {"deepest": row["layer"] == deepest} for row in rows]


def _row(layer: Layer, step: Step | None, batch_size: int) -> dict:
    room = min(layer.channels_out, layer.patch)
    step = step or Step(0, batch_size * math.prod(layer.input_shape))
    return {
        "layer": layer.name,
        "input_shape": layer.input_shape,
        "positions": layer.positions,
        "rank_bound": batch_size * layer.positions,
        "rank_room": room,
        "spanned": is_spanned(batch_size, layer.positions, layer.channels_out, layer.patch),
        "equations": step.equations,
        "unknowns": step.unknowns,
        "determined": step.is_determined,
    }


def _steps(
    chain: Chain, share: float | None, layers: dict[str, Layer], batch_size: int
) -> tuple[dict[str, Step | None], float | None]:
    """By layer, the step to its input; and the share of the chain's own input that is known once that is solved.

    Args:
        chain: a model's, or a branch's.
        share: of the chain's outputs that are known; None where delta is not: a pool of more than one position, or an
            activation that cannot be inverted, keeps it from coming down.
        layers: by name.
        batch_size: B.
    """
    found: dict[str, Step | None] = {}
    for stage in reversed(chain):
        module = stage.module
        if isinstance(module, Residual):
            found |= _block(module, share, layers, batch_size)
            share = 1.0
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            layer = layers[stage.name]
            known = None if share is None else int(share * batch_size * math.prod(layer.output_shape))
            unknowns = batch_size * math.prod(layer.input_shape)
            found[stage.name] = None if known is None else Step(module.weight.numel() + known, unknowns)
            share = 1.0
        elif isinstance(module, nn.ReLU):
            share = None if share is None else min(share, KNOWN_BEHIND_RELU)
        elif not isinstance(module, INVERTIBLE):
            share = None
    return found, share


def _block(module: Residual, share: float | None, layers: dict[str, Layer], batch_size: int) -> dict[str, Step | None]:
    """The steps inside a residual block: the lowest layers of both branches share theirs, since they share u."""
    body, _ = _steps(module.body, None if share is None else 0.0, layers, batch_size)
    shortcut, _ = _steps(module.shortcut, share, layers, batch_size)
    lowest = [_names(branch)[0] for branch in (module.body, module.shortcut) if _names(branch)]
    found = body | shortcut
    if share is None or not lowest:
        return found
    outputs = int(share * batch_size * math.prod(layers[_names(module.body)[-1]].output_shape))
    unknowns = found[lowest[0]].unknowns
    for name in _names(module.body)[1:]:
        if body[name] and not body[name].is_determined:
            together = Step(body[name].equations + outputs, unknowns)
            found[name] = together if together.is_determined else body[name]
    total = sum(found[name].equations for name in lowest) + (0 if module.shortcut else outputs)
    return found | dict.fromkeys(lowest, Step(total, unknowns))


def _names(chain: Chain) -> list[str]:
    return [stage.name for stage in chain if isinstance(stage.module, (nn.Linear, nn.Conv2d))]
