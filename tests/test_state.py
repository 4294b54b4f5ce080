import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from state import LR_SCHEDULES, AttackState, Terms, annealed_weight, learning_rate


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
        make_optimizer=lambda variables: torch.optim.SGD(variables, lr=1.0),
    )
    slope = torch.tensor([[[[1e-6, -3.0], [2.0, 0.0]]]])
    loss = (state.z * slope).sum() + 0.25 * state.label_variables.sum()
    state.backward(loss, signed=True)
    state.set_learning_rate(0.5)
    state.optimizer.step()
    assert torch.equal(state.z.detach(), -0.5 * slope.sign())
    assert torch.equal(state.label_variables.detach(), torch.full((1, 3), -0.125))
    assert math.isclose(state.optimizer.param_groups[0]["lr"], 0.5)


def quadratic(copies, target):
    """A state of two numbers in each copy, and the terms of its squared distance to a target."""
    state = AttackState(
        z=torch.arange(2.0 * copies).view(2 * copies, 1, 1, 1),
        label_variables=torch.zeros(2 * copies, 3),
        generator=torch.Generator().manual_seed(0),
        make_optimizer=lambda variables: torch.optim.SGD(variables, lr=0.1),
        copies=copies,
    )

    def terms():
        full = (state.z.view(copies, 2) - target).square().sum(1) + 0 * state.label_variables.sum()
        return Terms(full.mean(), full, torch.zeros(copies), torch.zeros(copies))

    return state, terms


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

    def closure():
        loss = terms().loss
        state.backward(loss)
        return loss

    steps = 0
    while not state.ended(100, 10):
        state.minimise(closure, 10)
        steps += 1
    assert (steps, state.evaluations, state.ended(100, 10)) == (3, 9, "max_evals")


def test_seconds_end_an_attack():
    state, _ = quadratic(1, torch.zeros(2))
    assert state.ended(5, None, 1.0) is None
    state.seconds = 1.5
    assert state.ended(5, None, 1.0) == "max_seconds"
    assert state.ended(5, None, None) is None


def test_known_labels_hold_in_every_copy():
    state, _ = quadratic(2, torch.zeros(2))
    state.known_labels = torch.tensor([2])
    assert state.label_logits.argmax(2)[:, 0].tolist() == [2, 2]
    assert torch.equal(state.label_logits[:, 1], torch.zeros(2, 3))


@given(st.floats(0, 1e4), st.floats(1e-6, 1), st.floats(0, 1))
def test_annealing_ends_at_its_share_and_never_below_what_noise_asks(evaluations, final, least):
    weight = annealed_weight(0.1, evaluations, final=final, horizon=2500, least=least)
    assert max(least, 0.1 * final) <= weight * (1 + 1e-9)
    assert weight <= max(least, 0.1) * (1 + 1e-9)
    if evaluations >= 2500:
        assert weight == pytest.approx(max(least, 0.1 * final))
