import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from attack.optimise.lbfgs import LBFGS, Pairs, Probe, cubic_minimum, strong_wolfe

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def valley(seed=0, dtype=F64):
    """Two variables of different shapes, and Rosenbrock's function of both."""
    source = generator(seed)
    variables = [torch.randn(shape, generator=source, dtype=dtype).requires_grad_() for shape in ((9,), (3, 4))]

    def loss():
        x = torch.cat([v.flatten() for v in variables])
        return (10 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()

    return variables, loss


def closure_of(variables, loss, calls):
    def closure():
        value = loss()
        calls.append(value.item())
        for variable, gradient in zip(variables, torch.autograd.grad(value, variables), strict=True):
            variable.grad = gradient
        return value

    return closure


def own(variables, lr=1.0, history=10, line_search="strong_wolfe", max_eval=25):
    return LBFGS(variables, lr=lr, max_iter=20, max_eval=max_eval, history=history, line_search=line_search)


def librarys(variables, lr=1.0, history=10, line_search="strong_wolfe", max_eval=25):
    how = {"tolerance_grad": 0, "tolerance_change": 0, "line_search_fn": None if line_search == "none" else line_search}
    return torch.optim.LBFGS(variables, lr=lr, max_iter=20, max_eval=max_eval, history_size=history, **how)


@pytest.mark.parametrize("history", [3, 100])
@pytest.mark.parametrize(("line_search", "lr"), [("strong_wolfe", 1.0), ("none", 1e-2)])
def test_every_evaluation_is_the_librarys_to_rounding(line_search, lr, history):
    tried = []
    for build in (own, librarys):
        (variables, loss), calls = valley(), []
        optimiser = build(variables, lr, history, line_search)
        for _ in range(2):
            optimiser.step(closure_of(variables, loss, calls))
        tried.append(calls)
    mine, theirs = (torch.tensor(calls[:30], dtype=F64) for calls in tried)  # later, rounding has grown
    assert torch.allclose(mine, theirs, rtol=1e-6)
    assert min(tried[0]) < 0.7 * tried[0][0]


def test_it_reaches_a_minimum():
    variables, loss = valley(seed=3)
    optimiser, calls = own(variables), []
    for _ in range(12):
        optimiser.step(closure_of(variables, loss, calls))
    assert max(float(v.grad.abs().max()) for v in variables) < 1e-6


@given(seed=st.integers(0, 1000), many=st.integers(1, 9), history=st.integers(1, 6))
def test_the_direction_is_that_of_the_inverse_hessian_updated_pair_by_pair(seed, many, history):
    """H <- (1 - s y^T / sy) H (1 - y s^T / sy) + s s^T / sy from gamma I, over the pairs that are still held."""
    n, source = 12, generator(seed)
    hessian = torch.randn(n, n, generator=source, dtype=F64)
    hessian = hessian @ hessian.T + torch.eye(n, dtype=F64)
    pairs, g, kept = Pairs(history, torch.zeros(n, dtype=F64)), torch.randn(n, generator=source, dtype=F64), []
    pairs.direction(g)
    for _ in range(many):
        s = torch.randn(n, generator=source, dtype=F64)
        y = hessian @ s
        g = g + y
        found = pairs.direction(g, s, y)
        kept = [*kept, (s, y)][-history:]
    inverse = torch.eye(n, dtype=F64) * (s @ y) / (y @ y)
    for s, y in kept:
        left = torch.eye(n, dtype=F64) - torch.outer(s, y) / (s @ y)
        inverse = left @ inverse @ left.T + torch.outer(s, s) / (s @ y)
    assert torch.allclose(found, -inverse @ g, rtol=1e-6, atol=1e-8 * float(g.norm()))


def test_a_step_ends_near_its_bound_on_evaluations_and_after_its_iterations():
    variables, loss = valley()
    for bound in (2, 5, 12):
        calls = []
        own(variables, max_eval=bound).step(closure_of(variables, loss, calls))
        assert len(calls) <= bound + 1
    calls = []
    own(variables, max_eval=1000).step(closure_of(variables, loss, calls))
    assert len(calls) >= 21


def test_where_it_was_stopped_it_goes_on():
    (variables, loss), calls = valley(), []
    optimiser = own(variables, history=4)
    for _ in range(3):
        optimiser.step(closure_of(variables, loss, calls))
    kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimiser.state_dict().items()}
    copies = [v.detach().clone() for v in variables]
    optimiser.step(closure_of(variables, loss, calls))
    (others, loss), again = valley(seed=9), []
    with torch.no_grad():
        for other, copy in zip(others, copies, strict=True):
            other.copy_(copy)
    resumed = own(others, history=4)
    resumed.load_state_dict(kept)
    resumed.step(closure_of(others, loss, again))
    assert again == calls[-len(again) :]
    assert all(torch.equal(a, b) for a, b in zip(others, variables, strict=True))


def test_a_state_of_other_variables_is_refused():
    (variables, loss), calls = valley(), []
    optimiser = own(variables)
    optimiser.step(closure_of(variables, loss, calls))
    with pytest.raises(ValueError, match="other variables"):
        own(variables[:1]).load_state_dict(optimiser.state_dict())
    with pytest.raises(KeyError):
        own(variables).load_state_dict(torch.optim.Adam(variables).state_dict())


def test_a_gradient_that_is_not_finite_moves_nothing():
    variables, loss = valley()
    before = [v.detach().clone() for v in variables]
    own(variables).step(closure_of(variables, lambda: loss() * float("nan"), []))
    assert all(torch.equal(a, b) for a, b in zip(variables, before, strict=True))


@pytest.mark.parametrize("line_search", ["strong_wolfe", "none"])
def test_a_step_size_beyond_float32_is_no_error(line_search):
    variables, loss = valley(dtype=torch.float32)
    own(variables, lr=1e308, line_search=line_search).step(closure_of(variables, loss, []))


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.1, 5))
def test_the_cubic_of_a_parabola_is_the_parabola(first, second, curvature):
    assume(abs(first - second) >= 0.1)

    def at(t):
        return Probe(t, curvature * t * t / 2, curvature * t, torch.zeros(1))

    assert cubic_minimum(at(first), at(second), (-5.0, 5.0)) == pytest.approx(0, abs=1e-6)
    assert cubic_minimum(at(first), at(second), (1.0, 5.0)) == pytest.approx(1.0)


@given(st.floats(0.01, 100), st.floats(0.05, 20))
def test_a_line_search_ends_where_loss_and_slope_have_fallen(scale, t):
    def at(t):
        u = t / scale
        return Probe(t, u**4 / 4 - u**2 + 0.3 * u**3 - u, (u**3 - 2 * u + 0.9 * u**2 - 1) / scale, torch.zeros(1))

    start = at(0.0)
    found, calls = strong_wolfe(at, start, t, 1.0, 25)
    assert calls <= 26
    assert found.f <= start.f + 1e-4 * found.t * start.slope
    assert abs(found.slope) <= 0.9 * abs(start.slope)
