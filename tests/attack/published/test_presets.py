"""Published attacks as settings of the one loop: what each minimises and moves, read off its trace."""

import csv
import re
from functools import cache

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, SMALL, metrics_of, resolved

import main_MAGIA_sel as magia
from attack.published.presets import PRESETS, TUNED
from cli.victim import victim

pytestmark = pytest.mark.usefixtures("quick_pictures")
PEERS = [name for name in PRESETS if name != "magia"]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """What calls a short run of a preset, once for all tests: its figures, the columns of its trace, its directory."""
    folder = tmp_path_factory.mktemp("presets")
    return cache(lambda *words: short_run(folder / str(len(list(folder.iterdir()))), *words))


def short_run(folder, preset, *flags):
    words = [*SMALL, "--batch_size", 2, "--n_iter", 1000, "--max_evals", 90, "--inner_iter", 20]
    words += ["--signals", PRESETS[preset]["signals"]]
    words += ["--save_dir", folder, "--run_name", preset, "--quiet", "--preset", preset, *flags]
    assert magia.main(list(map(str, words))) == 0
    run = folder / preset
    with (run / "trace.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ("S", "loss", "loss_full", "loss_subset", "prior")
    return metrics_of(run), {name: np.array([float(row[name]) for row in rows]) for name in names}, run


@pytest.mark.parametrize("preset", PEERS)
def test_every_published_attack_uses_its_budget_and_comes_nearer_to_the_gradient(run_of, preset):
    figures, trace, _ = run_of(preset)
    assert 60 < figures["evaluations"] <= 90
    assert figures["signals_found"] == 0
    assert trace["loss_full"].min() < 0.5 * trace["loss_full"][0]


@pytest.mark.parametrize("preset", ["dlg", "idlg"])
def test_deep_leakage_minimises_the_squared_distance_alone(run_of, preset):
    _, trace, _ = run_of(preset)
    assert trace["loss"] == pytest.approx(trace["loss_full"], rel=1e-5)


def test_the_paper_mixes_full_batch_subsets_of_two_and_a_prior_of_constant_weight(run_of):
    _, trace, _ = run_of("paper", "--batch_size", 3)
    assert set(trace["S"]) == {2}
    expected = 0.999 * trace["loss_full"] + 0.001 * trace["loss_subset"] + 5e-3 * trace["prior"]
    assert trace["loss"] == pytest.approx(expected, rel=1e-4)


def test_inverting_gradients_takes_angles_signs_and_granted_labels(run_of):
    figures, trace, run = run_of("invertinggradients", "--labels", "unique")
    assert trace["loss"] == pytest.approx(trace["loss_full"] + 3e-2 * trace["prior"], rel=1e-4)
    assert trace["loss_full"].max() <= 2
    assert figures["label_accuracy"] == 1  # granted without their order
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    update, model, _ = victim(resolved("--preset", "invertinggradients", "--batch_size", 2), CPU)
    fresh, objective, _ = magia.prepare(
        update, model, resolved("--preset", "invertinggradients"), granted=torch.tensor([1, 2])
    )
    fresh.backward(objective(fresh, 1e-2).loss)
    assert set(fresh.z.grad.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert state["variables"][0].min() >= 0
    assert state["variables"][0].max() <= 1


def test_gradinversion_starts_twice_and_cpa_matches_unmixed_features_by_angle(run_of):
    figures, trace, _ = run_of("gradinversion")
    assert figures["evaluations"] == 2 * len(trace["S"])
    _, trace, _ = run_of("cpa")
    features = (trace["loss"] - trace["loss_full"] - 1e-2 * trace["prior"]) / 0.1
    assert (features > -1e-5).all()
    assert features.max() <= 2
    assert features[-1] < features[0]


@pytest.mark.parametrize(("model", "there"), [("resnet18", True), ("lenet", False)])
def test_batchnorm_statistics_enter_where_the_model_has_them(model, there):
    settings = resolved("--preset", "gradinversion", "--batch_size", 2, "--model", model)
    update, net, _ = victim(settings, CPU)
    penalties = magia.prepare(update, net, settings)[1].penalties
    assert ("batchnorm" in [penalty.name for penalty in penalties]) == there
    assert ("0.1 batchnorm" in map(repr, penalties)) == there


@pytest.mark.parametrize("preset", PEERS)
def test_every_published_attack_starts_as_its_source_does(preset):
    """Mean and spread of the start: clamped normal, normal, normal in units of CIFAR-10's colours, or grey."""
    settings = resolved("--preset", preset, "--batch_size", 4)
    update, net, _ = victim(settings, CPU)
    state, objective, _ = magia.prepare(update, net, settings, granted=torch.zeros(4, dtype=torch.int64))
    start = objective.images(state).detach()
    mean, std = {
        "paper": ([0.316] * 3, [0.411] * 3),
        "dlg": ([0.0] * 3, [1.0] * 3),
        "idlg": ([0.0] * 3, [1.0] * 3),
        **dict.fromkeys((f"{name}_tuned" for name in TUNED if "init" in TUNED[name]), ([0.5] * 3, [0.02] * 3)),
    }.get(preset, ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]))
    assert start.mean((0, 1, 3, 4)).tolist() == pytest.approx(mean, abs=0.05)
    assert start.std((0, 1, 3, 4)).tolist() == pytest.approx(std, abs=0.05)


def test_time_is_charged_for_the_attack_and_not_for_its_record(cli, monkeypatch):
    """A clock that ticks with every evaluation of the objective: Adam takes one in a step, the record another."""
    ticks, evaluate = [0], magia.Objective.__call__
    monkeypatch.setattr("attack.optimise.state.time.perf_counter", lambda: ticks[0])
    monkeypatch.setattr(magia.Objective, "__call__", lambda *a: ticks.__setitem__(0, ticks[0] + 1) or evaluate(*a))
    run = cli("--preset", "invertinggradients", "--batch_size", 2, "--n_iter", 7)
    assert metrics_of(run)["evaluations"] == 7
    assert metrics_of(run)["seconds"] == 7
    assert ticks[0] == 14


def test_the_documentation_says_of_every_preset_what_it_is():
    text = (ROOT / "docs" / "benchmark.md").read_text()
    table = text[text.index("## Presets") :]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.M) == list(PRESETS)
