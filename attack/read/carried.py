"""Images told apart at one layer, at a layer further down, one by one.

The walk (`attack.walk`) takes the batch as a whole: a layer's gradient is the sum of all images. Where only some images
were told apart, or the walk has ended, each image goes down by itself. What its inputs of the upper layer tell of the
lower layer's outputs are linear equations for its coordinates in the lower layer's A, which holds the inputs of all
images: B unknowns, and far more equations. What they give is judged by the lower layer's own gradient, as every
candidate is. The images are then taken out of that gradient, and what is left has a span of its own, in which further
images are found.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attack.read.beneath import ERRED
from attack.read.candidates import ImageEquations
from attack.read.layer_choice import CandidateLayer
from attack.read.signals import Signals
from attack.read.span import Span
from attack.walk.equations import ENOUGH
from attack.walk.noise import beside, size_of
from network.chain import is_parametrised
from network.kinds import kind_of, pulled_below
from network.known_outputs import KnownOutputs, UndeterminedError
from network.stage import Chain, Residual, run
from update.loss import Loss

NEAR = 1e-2  # relative distance from an image's own activations within which they are those of its pixels


def layers_below(candidates: Sequence[CandidateLayer], at: CandidateLayer, chain: Chain) -> list[CandidateLayer]:
    """The layers that the inputs of a layer lead down to one after the other, in that order; none within blocks."""
    by_index = {each.index: each for each in candidates if each.layer is chain[each.index].module and not each.mixes}
    found = []
    for index in reversed(range(at.index)):
        module = chain[index].module
        if isinstance(module, Residual) or (kind_of(module).is_affine and index not in by_index):
            break
        if index in by_index:
            found.append(by_index[index])
    return found


def carried_down(
    found: Signals,
    at: CandidateLayer,
    lower: CandidateLayer,
    span: Span,
    loss: Loss,
    chain: Chain,
    shapes: Sequence[tuple[int, ...]],
) -> Signals:
    """Those of the images whose inputs of a lower layer are told, and fit that layer's gradient.

    Args:
        found: images told apart at a layer.
        at: that layer.
        lower: the next layer below it, see `layers_below`.
        span: of the lower layer.
        loss: of each image.
        chain: the model's.
        shapes: of one image's activations, before each stage.

    Raises:
        ValueError: the lower layer's gradient does not determine its inputs, or what lies between the layers does not
            let them through.
    """
    if not span.determined:
        raise ValueError("its gradient does not determine its inputs")
    equations, values = ImageEquations(span, lower.layer, lower.tail, loss), at.stage_inputs(found.values)
    error = found.uncertainty.clamp(min=ERRED)
    noise = beside(error * size_of(values), values).expand_as(values)
    told = KnownOutputs.of(values, torch.zeros_like(values), noise)
    for index in reversed(range(lower.index + 1, at.index)):
        told = pulled_below(chain[index].module, told, shapes[index])
    goal, known = (told.values - equations.offset).flatten(1), told.known.flatten(1)
    enough = known.sum(1) >= ENOUGH * len(equations.outputs)
    if not enough.any():
        raise UndeterminedError("too few of the layer's outputs are told")
    c, within = _least_squares(equations.outputs, goal[enough], known[enough].to(goal))
    errors = torch.hypot(within, equations.span.turned(c @ equations.rows.flatten(1)))
    signals, is_believed = equations.as_they_are(c, found.labels[enough], errors)
    return signals.pick(is_believed)


def _least_squares(rows: Tensor, goal: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates c (N, d) with c rows (d, m) = goal (N, m) where it is known, and their relative errors (N,)."""
    normal = torch.einsum("nm,dm,em->nde", known, rows, rows)
    inverse = torch.linalg.pinv(normal, hermitian=True)
    c = torch.einsum("nde,em,nm->nd", inverse, rows, known * goal)
    level = ((c @ rows - goal) * known).square().sum(1) / (known.sum(1) - len(rows))
    variance = inverse.diagonal(dim1=1, dim2=2).sum(1).clamp(min=0) * level
    return c, variance.sqrt() / c.norm(dim=1)


def owned(images: Tensor, inputs: Tensor, chain: Chain) -> tuple[list[int], Tensor]:
    """Which of the inputs (N, ...) of the stage behind a chain images (M, C, H, W) have, and the images that have any.

    Two images that come down to the same inputs are both left out, since one of them at least is no image of the batch.
    """
    own = run(chain, images).flatten(1)
    distances = torch.cdist(own, inputs.flatten(1)) / own.norm(dim=1, keepdim=True)
    errors, owners = distances.min(1)
    is_alone = (owners[:, None] == owners).sum(1) == 1
    kept = (errors < NEAR) & is_alone
    return owners[kept].tolist(), images[kept]


def inverted(
    chain: Chain, shapes: Sequence[tuple[int, ...]], start: int, inputs: Tensor, *, with_parameters: bool
) -> tuple[int, Tensor]:
    """The lowest stage to which exact inverses of single stages lead from the inputs of `start`, and its inputs.

    Args:
        chain: the model's.
        shapes: of one image's activations, before each stage.
        start: index of the stage whose inputs are known.
        inputs: of all images known, (N, ...).
        with_parameters: whether stages with parameters are passed: in steps they have others at each of them.
    """
    while start:
        module, shape = chain[start - 1].module, shapes[start - 1]
        below = kind_of(module).inverted(module, inputs, shape)
        if below is None or (is_parametrised(module) and not with_parameters):
            break
        start, inputs = start - 1, below
    return start, inputs
