"""Rows that are planned: clients as they are, leakage against epsilon, and the identification figure's."""

import shlex

import pytest
import torch
from PIL import Image

import benchmark
from bench import decision, epsilons, settings
from bench.guesses import of_noise
from bench.planned import Planned, keep
from bench.results_page import read_rows
from client.privacy import Release
from update.defences import Defences
from update.shared import SharedUpdate

EVERY = [*settings.PLANNED, *epsilons.PLANNED, *decision.PLANNED]


def test_no_two_rows_of_a_table_have_one_name():
    assert len({(row.table, row.key) for row in EVERY}) == len(EVERY)


def test_every_row_is_a_command_that_the_benchmark_takes():
    """Its own words at least; the attack's are checked when it runs."""
    parser = benchmark.build_parser()
    for row in EVERY:
        words = shlex.split(row.command)
        assert words[:2] == ["python", "benchmark.py"]
        assert parser.parse_known_args(words[2:])[0].out.name == "DIR"


@pytest.mark.parametrize("row", [row for row in epsilons.PLANNED if row.names["level"] in epsilons.LEVELS], ids=str)
def test_the_noise_of_a_row_has_the_epsilon_of_its_name(row):
    release = Release.of(Defences.parse(row.says["defence"]))
    assert release.level == row.names["level"]
    assert release.epsilon(epsilons.DELTA) == pytest.approx(float(row.names["epsilon"]), rel=1e-2)


def test_rows_are_kept_in_the_order_of_the_plan_and_may_have_new_columns(tmp_path):
    plan = [Planned("t", {"name": name}, {}, "python") for name in "abc"]
    keep(tmp_path, plan[2], {"name": "c", "old": "1"}, plan)
    keep(tmp_path, plan[0], {"name": "a", "new": "2"}, plan)
    assert read_rows(tmp_path, "t") == [{"name": "a", "new": "2"}, {"name": "c", "new": ""}]
    keep(tmp_path, plan[0], {"name": "a", "new": "3"}, plan[:2])
    assert read_rows(tmp_path, "t") == [{"name": "a", "new": "3"}]


def test_noise_in_an_updates_place_has_its_length_and_nothing_else_of_it():
    drawn = torch.Generator().manual_seed(0)
    weights = {"bn.running_mean": torch.zeros(2), "w": torch.rand(50, 40)}
    facts = {"model": "lenet", "batch_size": 2, "image_shape": (3, 8, 8), "num_classes": 4}
    update = SharedUpdate({"w": torch.rand(50, 40)}, weights, **facts, statistics={"bn.running_mean": torch.ones(2)})
    noise = of_noise(update, drawn)
    a, b = update.gradients["w"], noise.gradients["w"]
    assert float(b.norm()) == pytest.approx(float(a.norm()), rel=1e-5)
    assert abs(float((a * b).sum() / a.norm() ** 2)) < 0.1
    assert noise.statistics["bn.running_mean"].tolist() == [0, 0]


def test_the_figure_of_epsilon_has_a_panel_for_each_measure(tmp_path):
    measured = dict.fromkeys(epsilons.PANELS, "0.5")
    rows = [{**row.names, **measured} for row in epsilons.PLANNED]
    epsilons.plot_epsilons(rows, tmp_path / "epsilon.png")
    with Image.open(tmp_path / "epsilon.png") as picture:
        assert picture.width > 2.5 * picture.height
