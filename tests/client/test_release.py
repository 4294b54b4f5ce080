"""Epsilon of one release of an update, by the analytic Gaussian mechanism."""

import json
import math
from types import SimpleNamespace

import pytest

from cli.settings import privacy_of
from client.privacy import Release, gaussian_epsilon, gaussian_multiplier
from update.defences import Defences


def of(text):
    return Release.of(Defences.parse(text))


def test_epsilon_is_that_of_the_normal_distribution():
    """delta = Phi(1/2 - 1) - e Phi(-1/2 - 1) = 0.3085375 - 2.7182818 * 0.0668072 = 0.1269367 for epsilon 1, noise 1."""
    assert gaussian_epsilon(1.0, 0.1269367) == pytest.approx(1.0, rel=1e-5)
    # total variation 2 Phi(1/4) - 1 = 0.1974127 of two normals half a deviation apart is delta at epsilon 0
    assert gaussian_epsilon(2.0, 0.19741) == pytest.approx(0.0, abs=1e-4)
    assert gaussian_epsilon(2.0, 0.19742) == 0.0
    # the multiplier that Balle and Wang's algorithm 1 gives for (1, 1e-5), where the classical bound has 4.84
    assert gaussian_multiplier(1.0, 1e-5) == pytest.approx(3.7306, rel=1e-4)


def test_epsilon_falls_with_noise_and_with_delta_and_never_overflows():
    noise = [1e-9, 1e-6, 1e-3, 0.1, 1.0, 10.0, 1e3, 1e6]
    found = [gaussian_epsilon(each, 1e-5) for each in noise]
    assert found == sorted(found, reverse=True)
    assert all(math.isfinite(each) for each in found)
    deltas = [gaussian_epsilon(0.5, delta) for delta in (1e-300, 1e-100, 1e-10, 1e-5, 0.1, 0.9)]
    assert deltas == sorted(deltas, reverse=True)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 100.0, 1e6])
def test_the_calibrated_noise_has_its_epsilon(epsilon):
    assert gaussian_epsilon(gaussian_multiplier(epsilon, 1e-6), 1e-6) == pytest.approx(epsilon, rel=1e-6)


@pytest.mark.parametrize(
    ("text", "level", "multiplier"),
    [
        ("dpsgd:0.5:2", "example", 2.0),
        ("dpsgd:0.5:2,topk:0.1", "example", 2.0),
        ("clip:0.5,noise:2", "client", 4.0),
        ("topk:0.5,clip:2,noise:1,int8", "client", 0.5),
        ("localdp:2:1:10:1e-5", "client", math.sqrt(2 * math.log(1.25e5)) / 10 / 2),
    ],
)
def test_a_mechanism_hides_an_example_or_the_client(text, level, multiplier):
    assert (of(text).level, of(text).multiplier) == (level, pytest.approx(multiplier))


@pytest.mark.parametrize(
    "text",
    ["none", "noise:1", "noise:1,clip:1", "clip:1,topk:0.1,noise:1", "dpsgd:1:1,secure_sum:2", "clip:1e300,noise:1"],
)
def test_where_nothing_bounds_the_update_there_is_no_mechanism(text):
    assert of(text) is None


def test_the_privacy_of_one_release_is_told_and_recorded(cli):
    run = cli("--defence", "clip:1,noise:2", "--dp_delta", 1e-6)
    config = json.loads((run / "config.json").read_text())
    assert config["release_level"] == "client"
    assert config["release_epsilon"] == pytest.approx(gaussian_epsilon(2.0, 1e-6))
    assert f"epsilon of one release {config['release_epsilon']:.3g} (client, delta 1e-06)" in cli.out


def test_statistics_that_are_shared_as_they_are_make_no_release_private():
    settings = SimpleNamespace(dp_delta=1e-5)
    kept, shared = (SimpleNamespace(defence="clip:1,noise:2", statistics=own) for own in ({}, {"bn.running_mean": 0}))
    assert privacy_of(kept, settings)["release_level"] == "client"
    assert privacy_of(shared, settings) == {}
