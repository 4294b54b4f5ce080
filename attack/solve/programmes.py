"""Linear programmes for sparse points of a polyhedron, and the direction that a point's zeros give."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import linprog

from attack.solve.budget import WorkBudget

REWEIGHTS = 5  # programmes per point: measured, 3 to 5 settle
SOFT = 0.1  # of the mean entry: what an entry must exceed to count as large when a programme is re-weighted
FEASIBLE = 1e-9  # the solver's tolerances, below the slack that noise needs: 1e-6 for float32
ITERATIONS = 60  # of the simplex method for each unknown, at most
ZERO = 1e-4  # of the largest entry: below this an entry of a programme's solution is zero
TRIMS = 3  # times that the zeros of a point are chosen by the noise they show
OUTLIER = 12.0  # times the median of the zeros' noise: beyond it an entry is no zero
TURNED = 1e-2  # of the cosine, that zeros may turn a direction by


@dataclass(frozen=True)
class Programme:
    """Points as a polyhedron: constraints v >= bounds - slack and equalities v = 1; v begins with the coordinates c.

    Constraints are scaled such that their left sides are of the order of 1 for the points that are sought.
    """

    constraints: np.ndarray  # (m, unknowns)
    bounds: np.ndarray  # (m,)
    equalities: np.ndarray  # (e, unknowns)
    slack: float

    def part(self, chosen: np.ndarray) -> "Programme":
        """The same with some of the constraints."""
        return replace(self, constraints=self.constraints[chosen], bounds=self.bounds[chosen])

    def solve(self, objective: np.ndarray, slack: float, budget: WorkBudget) -> np.ndarray | None:
        """The v that minimises objective . v, or None where the solver says anything but that it succeeded.

        The work that is spent is iterations times constraints times unknowns.

        Raises:
            OutOfTimeError: the budget's clock has run out.
        """
        budget.check()
        rows, unknowns = self.constraints.shape
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
                "maxiter": ITERATIONS * unknowns,
            },
        )
        budget.spend(max(1, solution.nit) * rows * unknowns)
        return solution.x if solution.status == 0 else None

    def sparse_point(self, slack: float, generator: torch.Generator, budget: WorkBudget) -> np.ndarray | None:
        """A point with many constraints at their bounds, or None if no programme has any.

        Re-weighting towards sparse solutions follows Candes, Wakin, Boyd 2008.
        """
        three = torch.randint(len(self.bounds), (3,), generator=generator).numpy()
        objective, best = -self.constraints[three].mean(0), None
        for _ in range(REWEIGHTS):
            solution = self.solve(objective, slack, budget)
            if solution is None:
                break
            done = best is not None and np.allclose(solution, best, rtol=0, atol=1e-7 * np.abs(solution).max())
            best = solution
            if done:
                break
            excess = (self.constraints @ best - self.bounds).clip(min=0)
            objective = (1 / (excess + SOFT * excess.mean())) @ self.constraints
        return best


def direction_by_zeros(rows: np.ndarray, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The direction of unit length that is smallest where a point is zero, and which entries are zero, (n,).

    A programme's solution is exact in as many entries as it has unknowns, and carries their noise; this direction
    averages over all zeros. An entry that is small and yet too large for the noise of the others is left out.

    Args:
        rows: (n, unknowns), the entries as functions of the coordinates.
        point: (unknowns,).
    """
    direction = point / np.linalg.norm(point)
    entries = rows @ direction
    zeros = entries < ZERO * entries.max()
    for _ in range(TRIMS):
        if zeros.sum() < len(point) - 1:
            break
        least = np.linalg.eigh(rows[zeros].T @ rows[zeros])[1][:, 0]
        least *= np.sign(least @ direction)
        if least @ direction < 1 - TURNED:
            break
        direction, entries = least, rows @ least
        zeros = np.abs(entries) < max(OUTLIER * np.median(np.abs(entries[zeros])), 1e-12 * entries.max())
    return direction, zeros
