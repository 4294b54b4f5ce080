import pytest
import torch

from attack.solve.budget import unlimited
from attack.solve.levenberg import DampingRule, levenberg


class Valleys:
    """Rosenbrock's curved valley, f = (10 (y - x^2), 1 - x), for each problem; it counts linearisations."""

    def __init__(self):
        self.linearisations = 0

    def cost(self, x, which):
        return self._f(x).square().sum(1)

    def linearised(self, x, which):
        self.linearisations += 1
        f, one = self._f(x), torch.ones_like(x[:, 0])
        jacobian = torch.stack([torch.stack([-20 * x[:, 0], 10 * one], 1), torch.stack([-one, 0 * one], 1)], 1)
        turned = jacobian.transpose(1, 2)
        return f.square().sum(1), turned @ jacobian, (turned @ f[..., None])[..., 0]

    def bend(self, x, step, which):
        second = torch.stack([-20 * step[:, 0].square(), torch.zeros_like(step[:, 0])], 1)
        jacobian = torch.stack([torch.stack([-20 * x[:, 0], -torch.ones_like(x[:, 0])], 1), torch.zeros_like(x)], 1)
        jacobian[:, 1, 0] = 10
        return (jacobian @ second[..., None])[..., 0]

    def _f(self, x):
        return torch.stack([10 * (x[:, 1] - x[:, 0].square()), 1 - x[:, 0]], 1)


STARTS = torch.tensor([[-1.2, 1.0], [0.0, 3.0], [2.0, -2.0]], dtype=torch.float64)


@pytest.mark.parametrize("accelerated", [False, True])
def test_the_end_of_every_valley_is_found(accelerated):
    found = levenberg(Valleys(), STARTS, DampingRule(), iterations=200, budget=unlimited(), accelerated=accelerated)
    assert torch.allclose(found.x, torch.ones_like(STARTS), atol=1e-6)
    assert found.cost.max() < 1e-12


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_so_many_steps_are_taken_and_no_more(iterations):
    problem = Valleys()
    found = levenberg(problem, STARTS[:1], DampingRule(), iterations=iterations, budget=unlimited())
    assert problem.linearisations == 1 + iterations
    assert found.cost[0] > 1e-12


def test_what_is_good_enough_is_left_alone():
    start = torch.tensor([[1.0, 1.1], [0.0, 3.0]], dtype=torch.float64)  # |f|^2 of 1 and of 901
    found = levenberg(Valleys(), start, DampingRule(), iterations=200, budget=unlimited(), enough=2.0)
    assert torch.equal(found.x[0], start[0])
    assert found.cost[1] <= 2


class Uneven:
    """f = (x - 1, 1e-5 (y - 1)): unknowns without a common unit."""

    slopes = torch.tensor([1.0, 1e-5], dtype=torch.float64)

    def cost(self, x, which):
        return (self.slopes * (x - 1)).square().sum(1)

    def linearised(self, x, which):
        f = self.slopes * (x - 1)
        normal = torch.diag(self.slopes.square()).expand(len(x), 2, 2)
        return f.square().sum(1), normal, self.slopes * f


@pytest.mark.parametrize("is_scaled", [False, True])
def test_unknowns_in_units_of_their_own_are_damped_alike(is_scaled):
    start = torch.zeros(1, 2, dtype=torch.float64)
    rule = DampingRule(accepted=0.5, is_scaled=is_scaled)
    x = levenberg(Uneven(), start, rule, iterations=3, budget=unlimited()).x[0]
    assert abs(float(x[0]) - 1) < 1e-4
    assert (abs(float(x[1]) - 1) < 1e-4) == is_scaled
