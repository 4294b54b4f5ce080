"""What Adam's first step leaves of the entries that it divides."""

import pytest
import torch
from conftest import generator

from attack.solve.quotients import bounds_of


@pytest.mark.parametrize("rate", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_the_bounds_hold_the_gradient_and_are_close_for_small_entries(rate, kind):
    drawn = generator(1)
    weights = (0.1 * torch.randn(4000, generator=drawn)).to(kind)
    gradient = (10 ** (-8 * torch.rand(4000, generator=drawn, dtype=torch.float64))).to(kind)
    gradient *= torch.randn(4000, generator=drawn).sign()
    gradient[:50] = 0
    moved = weights.clone().requires_grad_()
    moved.grad = gradient.clone()
    torch.optim.Adam([moved], rate).step()
    least, most = bounds_of((weights - moved.detach()) / rate, weights, rate, 1e-8)
    size = gradient.double().abs()
    held = (least <= size * (1 + 1e-6)) & (size <= most * (1 + 1e-6))
    assert float(held.double().mean()) > 0.95  # two deviations
    assert not most[:50].any()
    small = (size > 0) & (size < 0.01 * rate if kind == torch.float32 else size < 1e-2)
    assert float(((most - least) / size)[small].median()) < 0.05
    assert bool((most[size > 0.3] == torch.inf).all()) == (kind == torch.float32)
