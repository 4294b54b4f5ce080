import numpy as np

from attack.solve.programmes import direction_by_zeros


def test_entries_that_are_exactly_zero_are_zeros():
    rows = np.concatenate([np.eye(4), 2 * np.eye(4)])
    direction, zeros = direction_by_zeros(rows, np.array([3.0, 0, 0, 0]))
    assert np.allclose(direction, [1, 0, 0, 0])
    assert zeros.tolist() == [False, True, True, True] * 2


def test_zeros_that_noise_hides_give_the_direction():
    draw = np.random.default_rng(0)
    truth = np.append(1.0, np.zeros(9)) @ np.linalg.qr(draw.standard_normal((10, 10)))[0]
    rows = draw.standard_normal((60, 10))
    rows[:30] -= np.outer(rows[:30] @ truth, truth)  # thirty entries are zero there
    rows[30:] *= np.sign(rows[30:] @ truth)[:, None]  # no entry is negative
    noisy = rows + 1e-8 * draw.standard_normal(rows.shape)
    direction, zeros = direction_by_zeros(noisy, truth + 1e-6 * draw.standard_normal(10))
    assert zeros[:30].all()
    assert not zeros[30:].any()
    assert np.linalg.norm(direction - truth) < 1e-7
