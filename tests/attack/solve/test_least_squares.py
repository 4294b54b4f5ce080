"""Least squares of matrices of any rank, as the CPU has them and as a GPU does."""

import pytest
import torch
from conftest import generator

from attack.solve.least_squares import by_singular_values, least_squares


@pytest.mark.parametrize(("rows", "columns", "rank"), [(12, 5, 5), (12, 5, 3), (5, 12, 5), (6, 6, 2), (4, 3, 0)])
def test_every_rank_gives_the_solution_of_least_norm(rows, columns, rank):
    draw = generator(rows + rank)
    left, right = (torch.randn(n, rank, generator=draw, dtype=torch.float64) for n in (rows, columns))
    matrix = left @ right.T
    goal = torch.randn(rows, 2, generator=draw, dtype=torch.float64)
    u, sigma, v = torch.linalg.svd(matrix)
    expected = v[:rank].T @ ((u[:, :rank].T @ goal) / sigma[:rank, None])
    for found in (least_squares(matrix, goal), least_squares(matrix, goal, driver="gelsd")):
        assert torch.allclose(found, expected, atol=1e-9)
    assert torch.allclose(by_singular_values(matrix, goal), expected, atol=1e-9)
