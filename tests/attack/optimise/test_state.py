import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attack.optimise.budget import LR_SCHEDULES, Annealing, Budget, Optimiser, learning_rate
from attack.optimise.state import AttackState, Terms


def adam(lr=0.1, lr_schedule="constant", signed=False):
    return Optimiser("adam", lr, lr_schedule, signed, inner_iter=1, history=1, line_search="none")


@given(st.sampled_from(LR_SCHEDULES), st.floats(0, 1), st.floats(1e-3, 10))
def test_step_sizes_start_at_the_base_and_never_rise(schedule, progress, base):
    assert learning_rate(base, schedule, 0) == base
    assert 0 <= learning_rate(base, schedule, progress) <= base * (1 + 1e-12)
    assert learning_rate(base, schedule, 1) <= learning_rate(base, schedule, progress) * (1 + 1e-12)


def test_step_sizes_of_the_schedules():
    assert learning_rate(0.1, "constant", 0.9) == 0.1
    steps = [learning_rate(1.0, "step", share) for share in (0.374, 0.375, 0.625, 0.875)]
    assert steps == pytest.approx([1, 0.1, 0.01, 0.001])
    assert learning_rate(1.0, "cosine", 0.5) == pytest.approx(0.5)
    assert learning_rate(1.0, "cosine", 1.0) == pytest.approx(0, abs=1e-15)
    with pytest.raises(ValueError, match="linear"):
        learning_rate(1.0, "linear", 0.5)


def test_signed_gradients_move_every_pixel_alike_and_leave_labels():
    state = AttackState(
        z=torch.zeros(1, 1, 2, 2),
        label_variables=torch.zeros(1, 3),
        generator=torch.Generator(),
        optimiser=adam(signed=True),
    )
    slope = torch.tensor([[[[1e-6, -3.0], [2.0, 0.0]]]])
    loss = (state.z * slope).sum() + 0.25 * state.label_variables.sum()
    state.backward(loss)
    assert torch.equal(state.z.grad, slope.sign())
    assert torch.equal(state.label_variables.grad, torch.full((1, 3), 0.25))


def test_a_function_without_a_second_derivative_is_named():
    state, _ = quadratic(1, torch.zeros(2))
    value = torch.nn.functional.hardsigmoid(state.z).square().sum()
    (first,) = torch.autograd.grad(value, state.z, create_graph=True)
    with pytest.raises(ValueError, match=r"cannot be differentiated twice.*hardsigmoid"):
        state.backward(first.square().sum())
    with pytest.raises(RuntimeError, match="does not require grad"):  # any other fault stays what it is
        state.backward(torch.zeros(()))


def test_a_step_has_the_size_that_the_spent_budget_asks_for():
    state, terms = quadratic(1, torch.zeros(2), adam(0.1, "cosine"))
    rates = []
    while not state.ended(Budget(4)):
        state.minimise(lambda: terms().loss, Budget(4))
        rates.append(state.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)])
    assert Budget(10, 50, 4.0).share(5, 10, 3.0) == 0.75
    assert Budget(10).share(5, 10**9, 1e9) == 0.5


def quadratic(copies, target, optimiser=None):
    """A state of two numbers in each copy, and the terms of its squared distance to a target."""
    state = AttackState(
        z=torch.arange(2.0 * copies).view(2 * copies, 1, 1, 1),
        label_variables=torch.zeros(2 * copies, 3),
        generator=torch.Generator().manual_seed(0),
        optimiser=optimiser or adam(),
        copies=copies,
    )

    def terms():
        full = (state.z.view(copies, 2) - target).square().sum(1) + 0 * state.label_variables.sum()
        return Terms(full.mean(), full, torch.zeros(copies), torch.zeros(copies))

    return state, terms


def test_the_gain_is_that_of_the_last_hundred_evaluations_of_a_phase():
    state, terms = quadratic(1, torch.zeros(2))
    for evaluations, size in ((10, 8.0), (60, 4.0), (110, 2.0), (160, 2.0), (190, 1.0)):
        state.evaluations = evaluations
        with torch.no_grad():
            state.z.copy_(torch.tensor([0.0, math.sqrt(size)]).view(2, 1, 1, 1))
        assert state.accept(terms())
        if evaluations < 110:
            assert state.gain == math.inf
        if evaluations == 110:
            assert state.gain == pytest.approx(0.75)
    assert state.gain == pytest.approx(0.75)  # from 4, after 60 evaluations
    again, _ = quadratic(1, torch.zeros(2))
    again.load_state_dict(state.state_dict())
    assert again.gain == state.gain
    state.enter(1)
    assert state.gain == math.inf


def test_the_copy_that_matches_best_leads():
    state, terms = quadratic(3, torch.tensor([2.0, 3.5]))
    assert state.batch_size == 2
    assert state.label_logits.shape == (3, 2, 3)
    assert state.accept(terms())
    assert state.leader == 1
    with torch.no_grad():
        state.z[:2] = torch.tensor([2.0, 3.5]).view(2, 1, 1, 1)
    assert state.accept(terms())
    assert (state.leader, state.best["leader"]) == (0, 0)
    with torch.no_grad():
        state.z.fill_(math.nan)
    assert not state.accept(terms())
    assert state.z[:2].flatten().tolist() == [2.0, 3.5]
    assert state.setbacks == 1


def test_each_copy_counts_as_an_evaluation_and_the_budget_holds():
    state, terms = quadratic(3, torch.zeros(2))

    steps, budget = 0, Budget(100, 10)
    while not state.ended(budget):
        state.minimise(lambda: terms().loss, budget)
        steps += 1
    assert (steps, state.evaluations, state.ended(budget)) == (3, 9, "max_evals")


def valley(max_evals):
    """L-BFGS in a narrow valley: by step the evaluations that it took, and whether it moved the images."""
    lbfgs = Optimiser("lbfgs", None, "constant", False, inner_iter=4, history=10, line_search="strong_wolfe")
    draw, budget = torch.Generator().manual_seed(0), Budget(100, max_evals)
    start = 2 * torch.randn(4, 1, 2, 2, generator=draw, dtype=torch.float64)
    state = AttackState(z=start, label_variables=torch.zeros(4, 3).double(), generator=draw, optimiser=lbfgs)

    def loss():
        x = state.z.flatten()
        return (100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum() + 0 * state.label_logits.sum()

    steps = []
    while not state.ended(budget):
        before, spent = state.z.detach().clone(), state.evaluations
        state.minimise(loss, budget)
        steps.append((state.evaluations - spent, not torch.equal(state.z, before)))
    return steps


def test_images_that_are_held_stay_as_they_are_in_every_copy():
    lbfgs = Optimiser("lbfgs", None, "constant", False, inner_iter=4, history=10, line_search="strong_wolfe")
    draw, budget = torch.Generator().manual_seed(0), Budget(3, 20)
    start, labels = torch.randn(4, 1, 2, 2, generator=draw), torch.zeros(4, 3)
    known = {"generator": draw, "optimiser": lbfgs, "copies": 2, "held": (1,)}
    state = AttackState(z=start.clone(), label_variables=labels, **known)
    state.minimise(lambda: state.z.square().sum() + 0 * state.label_logits.sum(), budget)
    assert torch.equal(state.z[[1, 3]], start[[1, 3]])
    assert state.z[[0, 2]].norm() < 0.1 * start[[0, 2]].norm()
    assert state.ended(budget) != "held"


def test_where_all_images_are_held_one_step_ends_the_attack():
    lbfgs = Optimiser("lbfgs", None, "constant", False, inner_iter=4, history=10, line_search="strong_wolfe")
    draw, budget = torch.Generator().manual_seed(0), Budget(3, 20)
    known = {"generator": draw, "optimiser": lbfgs, "held": (0, 1)}
    state = AttackState(z=torch.ones(2, 1, 2, 2), label_variables=torch.zeros(2, 3), **known)
    state.minimise(lambda: state.z.square().sum() + 0 * state.label_logits.sum(), budget)
    assert state.ended(budget) == "held"
    assert torch.equal(state.z, torch.ones(2, 1, 2, 2))


def test_no_step_begins_that_the_budget_could_not_pay():
    """A step's bound is 5 evaluations, the first one's less where that is all there is; what is cut short is undone."""
    runs = {max_evals: valley(max_evals) for max_evals in range(2, 40)}
    assert all(sum(taken for taken, _ in steps) <= max_evals for max_evals, steps in runs.items())
    assert all(has_moved for steps in runs.values() for _, has_moved in steps)
    assert max(taken for taken, _ in runs[39]) == 6


def test_seconds_end_an_attack():
    state, _ = quadratic(1, torch.zeros(2))
    assert state.ended(Budget(5, None, 1.0)) is None
    state.seconds = 1.5
    assert state.ended(Budget(5, None, 1.0)) == "max_seconds"
    assert state.ended(Budget(5)) is None


def test_known_labels_hold_in_every_copy():
    state, _ = quadratic(2, torch.zeros(2))
    state.known_labels = torch.tensor([2])
    assert state.label_logits.argmax(2)[:, 0].tolist() == [2, 2]
    assert torch.equal(state.label_logits[:, 1], torch.zeros(2, 3))


@given(st.floats(0, 1e4), st.floats(1e-6, 1), st.floats(0, 1))
def test_annealing_ends_at_its_share_and_never_below_what_noise_asks(evaluations, final, least):
    weight = Annealing(0.1, final, 2500, least).at(evaluations)
    assert max(least, 0.1 * final) <= weight * (1 + 1e-9)
    assert weight <= max(least, 0.1) * (1 + 1e-9)
    if evaluations >= 2500:
        assert weight == pytest.approx(max(least, 0.1 * final))


@given(st.floats(0, 1e4), st.floats(1e-6, 1), st.floats(1e-6, 1))
def test_the_priors_weight_falls_by_the_same_factor_in_the_same_number_of_evaluations(weight, final, share):
    assert Annealing(weight, final, 1000).at(1000 * share) == pytest.approx(weight * final**share)


@given(st.floats(0, 1e4), st.integers(0, 10**6))
def test_a_prior_that_is_not_annealed_weighs_the_same_throughout(weight, evaluations):
    assert Annealing(weight).at(evaluations) == weight


def test_phases_are_equal_parts_of_the_horizon_and_the_last_one_stays():
    annealing = Annealing(0.1, horizon=100, phases=4)
    assert [annealing.phase(evaluations) for evaluations in (0, 24, 25, 50, 99, 100, 10**6)] == [0, 0, 1, 2, 3, 3, 3]
    assert Annealing(0.1, horizon=100).phase(100) == 0
