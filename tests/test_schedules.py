import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedules import MODES, sigmoid_decay, subset_size

SETTINGS = {"batch_size": 8, "n_iter": 300, "k": 2, "l_iter": 100, "a": -0.1, "b": 200.0}
sizes = st.integers(1, 300)
steps = st.integers(0, 1000)
lengths = st.integers(1, 1000)


@given(
    st.sampled_from(MODES), steps, sizes, lengths, st.integers(-5, 500), lengths, st.floats(-9, 9), st.floats(-9, 900)
)
def test_every_mode_stays_in_range(mode, step, batch_size, n_iter, k, l_iter, a, b):
    size = subset_size(mode, step, batch_size=batch_size, n_iter=n_iter, k=k, l_iter=l_iter, a=a, b=b)
    assert isinstance(size, int)
    assert 1 <= size <= batch_size


@given(steps, sizes, lengths)
def test_linear_modes_follow_the_formulas_exactly(step, batch_size, length):
    settings = SETTINGS | {"batch_size": batch_size, "l_iter": length, "n_iter": length}
    up = math.ceil(Fraction(batch_size * (step + 1), length)) if step < length else batch_size
    down = math.ceil(batch_size * (1 - Fraction(step, length))) if step < length else 1
    for mode in ("linear_inc_l", "linear_inc_total"):
        assert subset_size(mode, step, **settings) == min(up, batch_size)
    for mode in ("linear_dec_l", "linear_dec_total"):
        assert subset_size(mode, step, **settings) == max(down, 1)


def test_constant_modes():
    assert subset_size("const1", 7, **SETTINGS) == 1
    assert subset_size("constk", 7, **SETTINGS) == 2
    assert [subset_size("constk", 0, **SETTINGS | {"k": k}) for k in (-3, 0, 5, 8, 99)] == [1, 1, 5, 8, 8]


def test_ramps_at_their_ends():
    ramp = [subset_size("linear_inc_l", t, **SETTINGS) for t in (0, 12, 13, 99, 100, 5000)]
    assert ramp == [1, 2, 2, 8, 8, 8]  # ceil(0.08), ceil(1.04), ceil(1.12), 8, ...
    assert [subset_size("linear_dec_total", t, **SETTINGS) for t in (0, 1, 150, 299, 300)] == [8, 8, 4, 1, 1]
    assert subset_size("linear_inc_l", 0, **SETTINGS | {"l_iter": 0}) == 8
    assert subset_size("linear_dec_l", 0, **SETTINGS | {"l_iter": 0}) == 1


def test_sigmoid_of_the_spec_falls_around_step_200():
    falling = [subset_size("sigmoid", t, **SETTINGS) for t in range(300)]
    assert falling[0] == 8
    assert falling[200] == 4  # one half at b
    assert falling[-1] == 1
    assert falling == sorted(falling, reverse=True)


@given(st.integers(0, 10**6), st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_sigmoid_decay_never_overflows(step, a, b):
    value = sigmoid_decay(step, a, b)
    assert 0 <= value <= 1
    assert sigmoid_decay(step, -a, b) == pytest.approx(1 - value, abs=1e-12)


@given(st.integers(0, 1000), st.floats(-0.5, 0.5), st.floats(0, 1000))
def test_sigmoid_decay_is_the_logistic_curve(step, a, b):
    assert sigmoid_decay(step, a, b) == pytest.approx(1 / (1 + math.exp(-a * (step - b))), rel=1e-9)


@pytest.mark.parametrize(
    ("mode", "change", "word"),
    [
        ("cosine", {}, "cosine"),
        ("linear_inc_l", {"l_iter": -1}, "l_iter.*-1"),
        ("linear_dec_total", {"n_iter": -2}, "n_iter.*-2"),
        ("const1", {"batch_size": 0}, "batch_size.*0"),
        ("sigmoid", {"a": math.nan}, "nan"),
        ("sigmoid", {"b": math.inf}, "inf"),
    ],
)
def test_errors_name_the_value(mode, change, word):
    with pytest.raises(ValueError, match=word):
        subset_size(mode, 0, **SETTINGS | change)


def test_negative_step_is_refused():
    with pytest.raises(ValueError, match=r"step.*-1"):
        subset_size("const1", -1, **SETTINGS)
