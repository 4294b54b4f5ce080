"""Inputs behind a ReLU as extreme rays of a cone: linear programmes that find them, one layer's or several layers'.

The inputs of a layer are non-negative and about half zero, and lie in a space of few dimensions. A programme's solution
has as many zeros as it has unknowns; re-weighted, it has many more, and then it is an image.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from attack.read.candidates import ImageEquations
from attack.read.span import Span
from attack.solve.budget import WorkBudget
from attack.solve.programmes import Programme, direction_by_zeros

PROGRAMME_ROWS = 40  # inequalities per unknown in a programme; more cost time and pin the ray down no better
SLACK = 3.0  # standard deviations of noise that an entry may be negative by: with none, true rays are infeasible
SLACKER = (1.0, 4.0, 0.25)  # and multiples of that, in turn
UNUSED = 1e-6  # of the largest entry: a basis that is smaller at some place says nothing there, no image does
# Zeros that a ray must have beyond the dim A - 1 that any extreme ray has; with fewer it is taken for chance.
SPARE_ZEROS = 2


def _used(basis: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """An input's entries as functions of the coordinates, (n, dim), and the indices of those that any image uses."""
    rows = basis.T.cpu().numpy()
    scale = np.abs(rows).max(1)
    return rows, np.flatnonzero(scale > UNUSED * scale.max())


def single_programme(rest: Span) -> Programme:
    """Inputs are non-negative, with a mean of 1."""
    rows, used = _used(rest.basis)
    slack = SLACK * _entry_noise(rest) * len(used) ** 0.5
    return Programme(rows[used], np.zeros(len(used)), rows[used].mean(0, keepdims=True), slack)


def linked_programme(layers: list[ImageEquations], slopes: Sequence[float], *, is_sparse: bool) -> Programme:
    """Inputs of several layers as one programme, each the activation of the outputs of the layer below.

    The activation f is z above zero and s z below. For z = W a + b, both f(z) - s z and f(z) - z are non-negative, and
    of each pair one is zero. Both are linear in the coordinates of the two layers' inputs. Every layer adds B unknowns
    and as many zeros as it has units, twice as many as its inputs have by themselves behind a ReLU.

    Args:
        layers: from below.
        slopes: s of the activation in front of each layer but the first.
        is_sparse: whether the first layer's own inputs come out of a ReLU.
    """
    size, blocks, bounds, equalities, slack = layers[0].span.dimension, [], [], [], 0.0
    for k, layer in enumerate(layers):
        along = layer.along.mean(1).cpu().numpy()
        centre = along / (along @ along)  # the shortest coordinates of the right scale
        rows, used = _used(layer.span.basis)
        unit = np.abs(rows[used] @ centre).mean()
        slack = max(slack, SLACK * _entry_noise(layer.span) * np.linalg.norm(centre) / unit)
        place = np.zeros((1, len(layers)))
        place[0, k] = 1
        equalities.append(np.kron(place, along[None]))
        if not k and is_sparse:
            blocks.append(np.kron(place, rows[used] / unit))
            bounds.append(np.zeros(len(used)))
        if k:
            below, offset = layers[k - 1].outputs.T.cpu().numpy(), layers[k - 1].offset.detach().cpu().numpy()
            for slope, some in ((slopes[k - 1], used), (1.0, slice(None))):
                link = np.kron(place, rows[some])
                link[:, (k - 1) * size : k * size] -= slope * below[some]
                blocks.append(link / unit)
                bounds.append(slope * offset[some] / unit)
    return Programme(np.concatenate(blocks), np.concatenate(bounds), np.concatenate(equalities), slack)


def extreme_rays(
    rest: Span,
    programme: Programme,
    count: int,
    generator: torch.Generator,
    budget: WorkBudget,
    *,
    is_sparse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Up to `count` different inputs: coordinates (N, dim A), and where they are zero (N, n).

    Fewer where the budget's work is spent before. Inputs that are not sparse have no zeros.
    """
    rows, used = _used(rest.basis)
    unknowns, found = programme.constraints.shape[1], []
    for attempt in range(count):
        if budget.is_spent:
            break
        chosen = torch.randperm(len(programme.bounds), generator=generator)[: PROGRAMME_ROWS * unknowns].numpy()
        slack = programme.slack * SLACKER[attempt % len(SLACKER)]
        solution = programme.part(chosen).sparse_point(slack, generator, budget)
        if solution is None:
            continue
        ray, silent = solution[: rest.dimension] / np.linalg.norm(solution[: rest.dimension]), np.zeros(0, dtype=int)
        if is_sparse:
            ray, silent = direction_by_zeros(rows[used], ray)
        if unknowns == rest.dimension and silent.sum() < rest.dimension + SPARE_ZEROS:
            continue
        zeros = np.zeros(len(rows), dtype=bool)
        zeros[used[silent]] = True
        if all(ray @ other < 1 - 1e-6 for other, _ in found):
            found.append((ray, zeros))
    rays = np.array([ray for ray, _ in found]).reshape(-1, rest.dimension)
    zeros = np.array([zeros for _, zeros in found], dtype=bool).reshape(-1, len(rows))
    return torch.from_numpy(rays).to(rest.basis), torch.from_numpy(zeros).to(rest.basis.device)


def _entry_noise(span: Span) -> float:
    """Standard deviation of the noise in an entry of the basis, in its worst direction."""
    rows = span.geometry.patches(span.inputs(torch.eye(span.dimension).to(span.basis))) @ span.right.T
    weak = (rows / span.sigma).flatten(1)
    return span.noise * float(torch.linalg.matrix_norm(weak, 2)) / span.geometry.positions**0.5


def pinned(span: Span, along: Tensor | None, c: Tensor) -> tuple[Tensor, Tensor]:
    """Rays (N, dim A) as their zeros give them within this span, and these zeros, (N, n).

    With one dimension the ray is fixed, and no zeros are chosen.

    Args:
        span: of all that a ray can be.
        along: (dim A, P), 1 at each position for a true image; the scale stays as it is where that is None.
        c: (N, dim A), near the rays.
    """
    rows, used = _used(span.basis)
    rays, zeros = c.cpu().numpy().copy(), np.zeros((len(c), len(rows)), dtype=bool)
    for i, ray in enumerate(rays if c.shape[1] > 1 else []):
        direction, silent = direction_by_zeros(rows[used], ray)
        rays[i], zeros[i, used[silent]] = (direction @ ray) * direction, True
    rays = torch.from_numpy(rays).to(c)
    if along is not None:
        rays = rays / (rays @ along).mean(1, keepdim=True)
    return rays, torch.from_numpy(zeros).to(c.device)


def zeros_of(value: Tensor) -> Tensor:
    """Which entries (n,) of one input are zero but for noise, if a good part of them is."""
    noise = -value.min().clamp(max=0)  # nothing else makes an entry negative
    return value.abs() <= 3 * noise
