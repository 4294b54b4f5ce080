"""Conjugate gradients on the normal equations: when they stop, and why."""

import pytest
import torch

from attack.solve.budget import unlimited
from attack.solve.cgls import PATIENCE, Stacked, cgls
from attack.walk.equations import KnownRows


def diagonal(*values):
    """Rows x -> values x, and as many rows that say nothing of x."""
    own = torch.tensor(values, dtype=torch.float64)
    rows = KnownRows(torch.ones_like(own, dtype=torch.bool))
    return Stacked([rows, rows], [own, 0 * own], [own.shape, own.shape])


@pytest.mark.parametrize("count", [3, 5])
def test_it_stalls_once_the_residual_has_long_stopped_falling(count):
    """As many steps as there are different values, then PATIENCE more: what no x explains is all that is left."""
    operator, explained = diagonal(*range(1, count + 1)), torch.ones(count, dtype=torch.float64)
    target = torch.cat([explained, 0.5 * explained])
    found = cgls(operator, target, 0 * explained, iterations=100, tolerance=0.0, budget=unlimited())
    assert found.stopped == "stalled"
    assert count - 1 + PATIENCE <= found.iterations <= count + PATIENCE
    assert torch.allclose(found.x, 1 / torch.arange(1, count + 1, dtype=torch.float64))
