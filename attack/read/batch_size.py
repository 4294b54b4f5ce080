"""How many images an update was averaged over, where nobody says: read off the ranks of its gradients.

A layer of P positions has a gradient of rank B P, if it is wide enough to have a higher one, and the space of inputs
that is consistent with its rows has dimension B (`span`). Layers of one position are asked first, the head among them:
its rows sum to zero, so it is believed below K - 1 images. A layer that some image does not reach says less, so the
largest count is the batch's.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from attack.read.layer_choice import candidate_layers
from attack.read.span import span_of
from attack.solve.rounding import precision_of
from network.head import Head
from network.kinds.affine import Geometry
from network.parametrised import with_weights
from network.tracing import stages

GAP = 20.0  # ratio of neighbouring singular values that may end a rank: rounding alone leaves 30 and more


def count_images(gradients: Mapping[str, Tensor], model: nn.Module, image_shape: Sequence[int]) -> int:
    """B of an averaged update, from its gradients by parameter name.

    Raises:
        ValueError: no layer's gradient tells.
    """
    try:
        head = Head.of(model)
    except ValueError as error:
        raise ValueError(f"the batch size cannot be read off this model: set --batch_size ({error})") from None
    gradients = with_weights(gradients, model)
    try:
        found = [(p.name, p.geometry) for p in candidate_layers(stages(model), tuple(image_shape), gradients)]
    except ValueError:  # what has no chain may still have a head
        found = [(head.weight.removesuffix(".weight"), Geometry.of(head.layer, (head.layer.in_features,)))]
    found = [place for place in found if f"{place[0]}.weight" in gradients]
    for _, group in itertools.groupby(sorted(found, key=_positions), key=_positions):
        count = max(_count(gradients[f"{n}.weight"], at, f"{n}.weight" == head.weight) for n, at in group)
        if count:
            return count
    raise ValueError("the batch size cannot be read off the gradients: set --batch_size")


def _positions(place: tuple[str, Geometry]) -> int:
    return place[1].positions


def _count(gradient: Tensor, geometry: Geometry, is_head: bool) -> int:
    """Images behind a layer's gradient, shaped as its weight; 0 where that is open."""
    matrix = gradient.double().flatten(1)  # (c_out, c_in k^2)
    room = min(int(matrix.any(1).sum()) - is_head, int(matrix.any(0).sum()))
    lengths = matrix.norm(dim=1, keepdim=True)
    evened = matrix / torch.where(lengths > 0, lengths, 1.0)  # rounding is relative, so now all rows are as exact
    rank = _rank(evened, room, precision_of(gradient))
    count = -(-rank // geometry.positions)
    if not rank or count * geometry.positions >= room:
        return 0
    span = span_of(gradient, geometry, count)
    return count if span.determined and span.dimension == count else 0


def _rank(matrix: Tensor, room: int, eps: float) -> int:
    """Singular values before the last gap between what rounding cannot be and what it is; 0 where they leave none."""
    sigma = torch.linalg.svdvals(matrix)[: room + 1]
    rounding = eps * sigma[0]
    gaps = ((sigma[:-1] > rounding) & (sigma[:-1] > GAP * sigma[1:])).nonzero()
    rank = int(gaps[-1]) + 1 if len(gaps) else 0
    return rank if rank < room and sigma[rank] < rounding else 0
