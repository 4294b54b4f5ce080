"""How many images an update was averaged over, where nobody says: read off the ranks of its gradients.

A layer of P positions has a gradient of rank B P, if it is wide enough to have a higher one, and the space of inputs
that is consistent with its rows has dimension B (`span`). Layers of one position are asked first, the head among them:
its rows sum to zero, so it is believed below K - 1 images. A layer that some image does not reach says less, so the
largest count is the batch's.

The rank ends where noise begins. Of gradients the noise is their rounding, which no number shows better than the gap
that it leaves. New weights were rounded entry by entry, by an amount that their size tells, and divided by the rate.
Such noise is simulated, and what stands out of it is counted. Weak images may be below it, and then the count is a
least one: two images of one label leave hardly more than one, on untrained networks one part in 600 of it.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attack.read.layer_choice import candidate_layers
from attack.read.span import span_of
from attack.solve.rounding import precision_of, rounding_of
from network.head import Head
from network.kinds.affine import Geometry
from network.parametrised import with_weights
from network.tracing import stages

GAP = 20.0  # ratio of neighbouring singular values that may end a rank: rounding alone leaves 30 and more
DRAWN = 3.0  # times the largest singular value of noise as it is drawn, which the true noise does not exceed: 2.3 seen
HIDDEN = 1000.0  # times the same: where all that stands out is this far above noise, noise hides no image


@dataclass(frozen=True)
class ImageCount:
    """So many images, or at least so many where noise may hide some."""

    images: int
    is_exact: bool

    def __str__(self) -> str:
        return f"{'' if self.is_exact else 'at least '}{self.images} image{'s' if self.images > 1 else ''}"


def count_images(
    gradients: Mapping[str, Tensor],
    model: nn.Module,
    image_shape: Sequence[int],
    noise: Mapping[str, Tensor] | None = None,
) -> ImageCount:
    """B of an averaged update, from its gradients by parameter name.

    Args:
        gradients: as shared.
        model: that they are of.
        image_shape: (C, H, W).
        noise: standard deviation of each entry's error by the rounding of new weights, by parameter name; None or
            empty where gradients themselves were shared.

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
    known = gradients.keys() & noise.keys() if noise else gradients.keys()
    found = [place for place in found if f"{place[0]}.weight" in known]
    least = 0
    for _, group in itertools.groupby(sorted(found, key=_positions), key=_positions):
        counts = [_count(gradients[n], at, n == head.weight, noise[n] if noise else None) for n, at in _named(group)]
        least = max(least, *(count.images for count in counts))
        if any(count.is_exact and count.images == least for count in counts):
            return ImageCount(least, is_exact=True)
    if least:
        return ImageCount(least, is_exact=False)
    raise ValueError("the batch size cannot be read off the gradients: set --batch_size")


def noise_of_weights(new: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
    """The standard deviation that the rounding of new weights, by name, leaves in each entry of (old - new) / rate.

    Empty where there are none, or where they were not rounded.
    """
    rounded = {name: rounding_of(weights) for name, weights in new.items()}
    if any(each is None for each in rounded.values()):
        return {}
    return {name: each / rate for name, each in rounded.items()}


def _named(group: Iterator[tuple[str, Geometry]]) -> Iterator[tuple[str, Geometry]]:
    return ((f"{name}.weight", geometry) for name, geometry in group)


def _positions(place: tuple[str, Geometry]) -> int:
    return place[1].positions


def _count(gradient: Tensor, geometry: Geometry, is_head: bool, noise: Tensor | None) -> ImageCount:
    """Images behind a layer's gradient, shaped as its weight; none where that is open."""
    matrix = gradient.double().flatten(1)  # (c_out, c_in k^2)
    room = min(int(matrix.any(1).sum()) - is_head, int(matrix.any(0).sum()))
    rank, is_exact = _rank(matrix, room, precision_of(gradient)) if noise is None else _rank_above(matrix, room, noise)
    count = -(-rank // geometry.positions)
    if not rank or count * geometry.positions >= room:
        return ImageCount(0, is_exact=False)
    span = span_of(gradient, geometry, count)
    if span.determined and span.dimension == count:
        return ImageCount(count, is_exact)
    return ImageCount(0 if noise is None else count, is_exact=False)


def _rank(matrix: Tensor, room: int, eps: float) -> tuple[int, bool]:
    """Singular values before the last gap between what rounding cannot be and what it is; 0 where they leave none."""
    lengths = matrix.norm(dim=1, keepdim=True)
    evened = matrix / torch.where(lengths > 0, lengths, 1.0)  # rounding is relative, so now all rows are as exact
    sigma = torch.linalg.svdvals(evened)[: room + 1]
    rounding = eps * sigma[0]
    gaps = ((sigma[:-1] > rounding) & (sigma[:-1] > GAP * sigma[1:])).nonzero()
    rank = int(gaps[-1]) + 1 if len(gaps) else 0
    return (rank, True) if rank < room and sigma[rank] < rounding else (0, False)


def _rank_above(matrix: Tensor, room: int, noise: Tensor) -> tuple[int, bool]:
    """Singular values that noise of these deviations cannot be, and whether it can hide none."""
    noise = noise.double().flatten(1).to(matrix)
    rounding = torch.finfo(torch.float32).eps * matrix.norm(dim=1)  # of the gradient, before it became a step
    rows = 1 / torch.hypot(rounding, noise.norm(dim=1)).clamp(min=torch.finfo(torch.float64).tiny)
    sigma = torch.linalg.svdvals(rows[:, None] * matrix)
    draw = torch.Generator().manual_seed(0)
    drawn = rows[:, None] * noise * torch.randn(noise.shape, generator=draw, dtype=torch.float64).to(noise)
    floor = float(torch.linalg.svdvals(drawn)[0])
    rank = int((sigma > DRAWN * floor).sum())
    return (rank, bool(sigma[rank - 1] > HIDDEN * floor)) if 0 < rank < room else (0, False)
