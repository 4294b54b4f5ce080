from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import nn

from attack.solve.budget import unlimited
from attack.solve.cgls import Stacked
from attack.solve.gauss_newton import NonlinearEquations, Tangent, gauss_newton
from attack.walk.equations import KnownRows


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_tangent_is_the_jacobian_and_its_transpose():
    pool, conv = nn.MaxPool2d(2), nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64)

    def function(x):
        return conv(x).sigmoid(), pool(x)

    x, v = double(2, 2, 4, 4), double(2, 2, 4, 4, seed=1)
    tangent = Tangent(function, x)
    moved = [(a - b) / 2e-6 for a, b in zip(function(x + 1e-6 * v), function(x - 1e-6 * v), strict=True)]
    image = tangent.forward(v)
    for found, expected in zip(image, moved, strict=True):
        assert torch.allclose(found, expected.detach(), atol=1e-8)
    y = [double(*part.shape, seed=2) for part in image]
    along = sum(float((a * b).sum()) for a, b in zip(image, y, strict=True))
    assert along == pytest.approx(float((v * tangent.adjoint(y)).sum()), rel=1e-9)


def equations_of(function, truth, is_positive):
    """All of the function's single value is known."""
    target = function(truth)[0]
    rows = Stacked([KnownRows(torch.ones_like(target))], [torch.ones(1)], [target.shape])
    scale = torch.ones(1, dtype=truth.dtype)
    return NonlinearEquations(function, function, [rows], [rows], [target.flatten()], scale, is_positive)


def test_gauss_newton_finds_a_square_root():
    truth = 1 + double(1, 3, 4).abs()
    equations = equations_of(lambda x: (x.square(),), truth, is_positive=False)
    solution = gauss_newton(equations, torch.full_like(truth, 3.0), budget=unlimited())
    assert torch.allclose(solution.x, truth, rtol=1e-6)
    assert solution.residual < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_what_may_not_be_negative_is_the_best_that_is_not(seed):
    mix, target = double(16, 8, seed=seed), double(1, 16, seed=seed + 10)
    equations = replace(
        equations_of(lambda x: (x @ mix.to(x).T,), torch.ones(1, 8, dtype=torch.float64), is_positive=True),
        targets=[target.flatten()],
    )
    x = gauss_newton(equations, torch.ones(1, 8, dtype=torch.float64), budget=unlimited()).x
    best, length = nnls(mix.numpy(), target.flatten().numpy())
    assert (best == 0).any()
    assert np.allclose(x.numpy(), best, atol=1e-4)
    assert float(equations.residual(x).norm()) == pytest.approx(length, rel=1e-6)
