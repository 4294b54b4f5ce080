"""Inputs behind a ReLU as extreme rays of a cone: linear programmes that find them, one layer's or several layers'.

The inputs of a layer are non-negative and about half zero, and lie in a space of few dimensions. A programme's solution
has as many zeros as it has unknowns; re-weighted, it has many more, and then it is an image.
"""

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from attack.read.candidates import Equations
from attack.read.span import Span

REWEIGHTS = 5  # programmes per ray: measured, 3 to 5 settle
SOFT = 0.1  # of the mean entry: what an entry must exceed to count as large when a programme is re-weighted
PROGRAMME_ROWS = 40  # inequalities per unknown in a programme; more cost time and pin the ray down no better
FEASIBLE = 1e-9  # the solver's tolerances, below the slack that noise needs: 1e-6 for float32
LONGEST = 10.0  # seconds that a programme may take; usual ones take 0.005 to 0.3
SLACK = 3.0  # standard deviations of noise that an entry may be negative by: with none, true rays are infeasible
SLACKER = (1.0, 4.0, 0.25)  # and multiples of that, in turn
ZERO = 1e-4  # of the largest entry: below this an entry of a programme's solution is zero
UNUSED = 1e-6  # of the largest entry: a basis that is smaller at some place says nothing there, no image does
MARGIN = 2  # zeros beyond those that any extreme ray has, dim A - 1 of them, and without which one is taken for chance
TRIMS = 3  # times that the zeros of a ray are chosen by the noise they show
OUTLIER = 12.0  # times the median of the zeros' noise: beyond it an entry is no zero
TURNED = 1e-2  # of the cosine, that pinning a ray down may turn it by


@dataclass(frozen=True)
class Programme:
    """Inputs as a polyhedron: constraints v >= bounds - slack and equalities v = 1; v begins with the coordinates c.

    Constraints are scaled such that their left sides are of the order of 1 for the batch's images.
    """

    constraints: np.ndarray  # (m, unknowns)
    bounds: np.ndarray  # (m,)
    equalities: np.ndarray  # (e, unknowns)
    slack: float

    def part(self, chosen: np.ndarray) -> "Programme":
        """The same with some of the constraints."""
        return replace(self, constraints=self.constraints[chosen], bounds=self.bounds[chosen])

    def solve(self, objective: np.ndarray, slack: float, deadline: float) -> np.ndarray | None:
        """The v that minimises objective . v, or None where the solver says anything but that it succeeded."""
        solution = linprog(
            objective,
            A_ub=-self.constraints,
            b_ub=slack - self.bounds,
            A_eq=self.equalities,
            b_eq=np.ones(len(self.equalities)),
            bounds=(None, None),
            method="highs-ds",
            options={
                "primal_feasibility_tolerance": FEASIBLE,
                "dual_feasibility_tolerance": FEASIBLE,
                "time_limit": min(LONGEST, max(0.01, deadline - time.perf_counter())),
            },
        )
        return solution.x if solution.status == 0 else None


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


def linked_programme(stages: list["Equations"]) -> Programme:
    """Inputs of several layers, each relu of the outputs of the one below, as one programme.

    For z = W a + b, both relu(z) and relu(z) - z are non-negative, and of each pair one is zero. Both are linear in the
    coordinates of the two layers' inputs. Every layer adds B unknowns and as many zeros as it has units, twice as
    many as its inputs have by themselves.
    """
    size, blocks, bounds, equalities, slack = stages[0].span.dimension, [], [], [], 0.0
    for k, stage in enumerate(stages):
        along = stage.along.mean(1).cpu().numpy()
        centre = along / (along @ along)  # the shortest coordinates of the right scale
        rows, used = _used(stage.span.basis)
        unit = np.abs(rows[used] @ centre).mean()
        slack = max(slack, SLACK * _entry_noise(stage.span) * np.linalg.norm(centre) / unit)
        place = np.zeros((1, len(stages)))
        place[0, k] = 1
        blocks.append(np.kron(place, rows[used] / unit))
        bounds.append(np.zeros(len(used)))
        equalities.append(np.kron(place, along[None]))
        if k:
            below = stages[k - 1]
            link = np.kron(place, rows)
            link[:, (k - 1) * size : k * size] -= below.outputs.T.cpu().numpy()
            blocks.append(link / unit)
            bounds.append(below.offset.detach().cpu().numpy() / unit)
    return Programme(np.concatenate(blocks), np.concatenate(bounds), np.concatenate(equalities), slack)


def extreme_rays(
    rest: Span, programme: Programme, count: int, generator: torch.Generator, deadline: float
) -> tuple[Tensor, Tensor]:
    """Up to `count` different sparse non-negative inputs: coordinates (N, dim A), and where they are zero (N, n)."""
    rows, used = _used(rest.basis)
    unknowns, found = programme.constraints.shape[1], []
    for attempt in range(count):
        if time.perf_counter() > deadline:
            break
        chosen = torch.randperm(len(programme.bounds), generator=generator)[: PROGRAMME_ROWS * unknowns].numpy()
        slack = programme.slack * SLACKER[attempt % len(SLACKER)]
        solution = _sparse_solution(programme.part(chosen), slack, generator, deadline)
        if solution is None:
            continue
        ray, silent = _pinned(rows[used], solution[: rest.dimension])
        if unknowns == rest.dimension and silent.sum() < rest.dimension + MARGIN:
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


def _sparse_solution(
    programme: Programme, slack: float, generator: torch.Generator, deadline: float
) -> np.ndarray | None:
    """A solution with many constraints at their bounds, or None if no programme has any."""
    three = torch.randint(len(programme.bounds), (3,), generator=generator).numpy()
    objective, best = -programme.constraints[three].mean(0), None
    for _ in range(REWEIGHTS):
        solution = programme.solve(objective, slack, deadline)
        if solution is None:
            break
        done = best is not None and np.allclose(solution, best, rtol=0, atol=1e-7 * np.abs(solution).max())
        best = solution
        if done:
            break
        excess = (programme.constraints @ best - programme.bounds).clip(min=0)
        objective = (1 / (excess + SOFT * excess.mean())) @ programme.constraints
    return best


def pinned(span: Span, along: Tensor | None, c: Tensor) -> tuple[Tensor, Tensor]:
    """Rays (N, dim A) as their zeros give them within this span, and these zeros, (N, n).

    Where the span has one dimension there is nothing to choose from, and what is zero is so in all of it.

    Args:
        span: of all that a ray can be.
        along: (dim A, P), what is 1 at each position for a true image; the scale stays as it is where that is None.
        c: (N, dim A), near them.
    """
    rows, used = _used(span.basis)
    rays, zeros = c.cpu().numpy().copy(), np.zeros((len(c), len(rows)), dtype=bool)
    for i, ray in enumerate(rays if c.shape[1] > 1 else []):
        direction, silent = _pinned(rows[used], ray)
        rays[i], zeros[i, used[silent]] = (direction @ ray) * direction, True
    rays = torch.from_numpy(rays).to(c)
    if along is not None:
        rays = rays / (rays @ along).mean(1, keepdim=True)
    return rays, torch.from_numpy(zeros).to(c.device)


def _pinned(rows: np.ndarray, ray: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The direction of unit length that is smallest where the ray is zero, and where that is, (n,).

    A programme's solution is exact in dim A entries and carries their noise; this one averages over all zeros. What is
    small and yet too large for the noise of the others is no zero and left out.
    """
    direction = ray / np.linalg.norm(ray)
    entries = rows @ direction
    zeros = entries < ZERO * entries.max()
    for _ in range(TRIMS):
        if zeros.sum() < len(ray) - 1:
            break
        least = np.linalg.eigh(rows[zeros].T @ rows[zeros])[1][:, 0]
        least *= np.sign(least @ direction)
        if least @ direction < 1 - TURNED:
            break
        direction, entries = least, rows @ least
        zeros = np.abs(entries) < max(OUTLIER * np.median(np.abs(entries[zeros])), 1e-12 * entries.max())
    return direction, zeros


def zeros_of(value: Tensor) -> Tensor:
    """Which entries (n,) of one input are zero but for noise, if a good part of them is."""
    noise = -value.min().clamp(max=0)  # nothing else makes an entry negative
    return value.abs() <= 3 * noise
