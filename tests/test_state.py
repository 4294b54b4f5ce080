import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from state import LR_SCHEDULES, AttackState, learning_rate


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
