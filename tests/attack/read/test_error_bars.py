import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_head import case, generator, match

from attack.read.error_bars import WITHIN, confidence
from attack.read.head.by_random_images import recover_signals
from attack.read.head.equations import solve
from attack.read.head.error_bars import error_per_noise
from attack.read.head.gradient import HeadGradient
from attack.solve.budget import unlimited


def test_confidence_falls_with_uncertainty():
    update, model, _, _ = case([3, 11, 0, 19, 5])
    signals = recover_signals(update, model, generator=generator(2), budget=unlimited())
    assert (signals.confidence > 0.99).all()
    falling = dataclasses.replace(signals, uncertainty=torch.tensor([5e-3, 9e-3, 1e-2, 1.1e-2, 1.0]).double())
    assert (falling.confidence.diff() <= 0).all()
    assert falling.confidence[0] > 0.99
    assert falling.confidence[4] < 0.01


def test_one_dimension_is_the_normal_distribution():
    uncertainty = torch.tensor([WITHIN / 2, WITHIN, 2 * WITHIN]).double()
    expected = torch.erf(WITHIN / (2**0.5 * uncertainty))
    assert torch.allclose(confidence(uncertainty, torch.ones(3)), expected)


@given(
    spread=st.lists(st.floats(0.1, 1.0), min_size=1, max_size=40),
    uncertainty=st.floats(0.5 * WITHIN, 2 * WITHIN),
    seed=st.integers(0, 100),
)
def test_so_many_gaussian_errors_are_as_small_as_the_confidence_says(spread, uncertainty, seed):
    variances = torch.tensor(spread).double().square()
    variances *= uncertainty**2 / variances.sum()
    errors = torch.randn(4000, len(spread), generator=generator(seed), dtype=torch.float64) * variances.sqrt()
    share = (errors.norm(dim=1) < WITHIN).double().mean()
    freedom = variances.sum().square() / variances.square().sum()
    called = confidence(torch.tensor([uncertainty]), freedom[None])
    assert share == pytest.approx(called.item(), abs=0.09)  # sampling leaves 0.01, the match of two moments up to 0.06


@pytest.mark.long
def test_of_signals_called_ninety_percent_sure_ninety_percent_are_within_one_percent():
    """Noise between what all images survive and what none does, drawn anew for each update."""
    update, model, _, features = case([3, 11, 0, 19, 5])
    called, within, ratio = [], [], []
    for draw in range(120):
        noise, std = generator(1000 + draw), (1.1e-3, 1.2e-3, 1.3e-3, 1.4e-3)[draw % 4]
        noisy = {n: g + std * torch.randn(g.shape, generator=noise) for n, g in update.gradients.items()}
        signals = recover_signals(
            dataclasses.replace(update, gradients=noisy), model, generator=generator(2), budget=unlimited()
        )
        error = match(signals, features)[1]
        called.append(signals.confidence)
        within.append(error < WITHIN)
        ratio.append(error / signals.uncertainty)
    called, within, ratio = torch.cat(called), torch.cat(within).double(), torch.cat(ratio)
    assert ratio.square().mean().sqrt().item() == pytest.approx(1, abs=0.05)
    for low, high in ((0.1, 0.6), (0.6, 0.97), (0.97, 1.01)):
        some = (called >= low) & (called < high)
        assert some.sum() > 40
        sampling = (called[some] * (1 - called[some])).mean().sqrt() / some.sum().sqrt()
        assert within[some].mean() == pytest.approx(called[some].mean().item(), abs=0.03 + 3 * sampling)


def test_noise_leaves_the_residual_that_is_expected_of_it():
    update, model, labels, features = case([3, 11, 0, 19, 5])
    ratio = []
    for draw in range(8):
        noisy = {n: g + 1e-4 * torch.randn(g.shape, generator=generator(draw)) for n, g in update.gradients.items()}
        head = HeadGradient.of(dataclasses.replace(update, gradients=noisy), model)
        equations = head.equations(labels)
        at = equations.at(solve(equations, features @ head.span.right.T, 50, unlimited()))
        bars = error_per_noise(equations, at, head.weight, head.span.right, generator())
        ratio.append(at.cost / (bars.cost * head.noise**2))
        assert torch.equal(bars.expected(head.noise, at.cost), bars.length * head.noise)
        shown = bars.expected(head.noise / 10, at.cost)  # a residual that is more than noise is what counts
        assert torch.allclose(shown, bars.length * head.noise * ratio[-1] ** 0.5)
    assert sum(ratio) / len(ratio) == pytest.approx(1, abs=0.3)


@pytest.mark.long
def test_images_that_share_a_label_err_along_few_directions():
    update, model, _, features = case([4, 4, 9, 4, 2])
    ratio, freedom = [], []
    for draw in range(30):
        noise = generator(1000 + draw)
        noisy = {n: g + 1e-6 * torch.randn(g.shape, generator=noise) for n, g in update.gradients.items()}
        signals = recover_signals(
            dataclasses.replace(update, gradients=noisy), model, generator=generator(2), budget=unlimited()
        )
        ratio.append(match(signals, features)[1] / signals.uncertainty)
        freedom.append(signals.freedom)
    assert torch.cat(ratio).square().mean().sqrt().item() == pytest.approx(1, abs=0.25)  # few dimensions: they vary
    assert torch.cat(freedom).min() < 3  # one weak direction
