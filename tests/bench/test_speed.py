import csv

import pytest
import torch

import benchmark
from attack.match.gradients import MatchingLoss
from bench import speed
from bench.speed import PublishedMatching, arithmetic, first_at, growth, in_turns, on_noise, peak_memory
from network.zoo import build_model
from update.storage import write_tensors

CPU = torch.device("cpu")
FAST = ["--image_size", "16", "--num_classes", "20", "--inner_iter", "4"]


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_leaves_its_tables(tmp_path, capsys):
    words = ["speed", "--out", tmp_path, "--batch_sizes", 2, "--course", 2, "--reading", 2, "--max_evals", 12]
    assert benchmark.main([*map(str, words), "--device", "cpu", *FAST]) == 0
    rows = table(tmp_path / "speed.csv")
    names = ["network", "batch_size", "device", "variant", "ms_per_evaluation", "ratio_to_published", "peak_mib"]
    assert list(rows[0]) == names
    assert [row["variant"] for row in rows] == ["published", "loop", "forward", "activations"]
    assert float(rows[0]["ratio_to_published"]) == 1
    assert all(float(row["ms_per_evaluation"]) > 0 and float(row["peak_mib"]) > 0 for row in rows)
    limits = table(tmp_path / "limits.csv")
    assert [row["variant"] for row in limits] == [row["variant"] for row in rows]
    assert all(0 < float(row["share_of_limit"]) < 1 for row in limits)
    courses = table(tmp_path / "courses.csv")
    assert [row["variant"] for row in courses] == ["published", "loop", "program", "forward"]
    assert all(0 <= int(row["evaluations"]) <= 12 for row in courses)
    assert float(courses[2]["best_db"]) > 60  # so small a net gives its images away: nothing is left to be optimised
    stages = {row["stage"]: float(row["B=2"]) for row in table(tmp_path / "stages.csv")}
    assert stages["whole"] >= stages["unmixing"] > 0
    assert capsys.readouterr().out == (tmp_path / "speed.md").read_text()


@pytest.mark.long
def test_evaluations_alone_of_several_networks(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "TURNS", 1)
    monkeypatch.setattr(speed, "FULL", 1)
    words = ["--batch_sizes", "2", "--device", "cpu", "--evaluations_only", "--models", "lenet,mlp --depth 1", *FAST]
    assert benchmark.main(["speed", "--out", str(tmp_path), *words]) == 0
    limits = table(tmp_path / "limits.csv")
    assert [row["network"] for row in limits] == ["lenet"] * 4 + ["mlp depth 1"] * 4
    assert all(0 < float(row["share_of_limit"]) < 1 for row in limits)
    assert "Whole attacks" not in (tmp_path / "speed.md").read_text()


@pytest.mark.long
def test_the_command_takes_a_network_its_weights_and_a_seed(tmp_path, capsys):
    weights = tmp_path / "weights.npz"
    model = build_model("mlp", image_shape=(3, 16, 16), num_classes=10, generator=torch.Generator())
    write_tensors(weights, model.state_dict())
    words = ["speed", "--out", tmp_path, "--batch_sizes", 2, "--course", 2, "--reading", 2, "--max_evals", 4]
    words += ["--device", "cpu", "--image_size", 16, "--num_classes", 10, "--inner_iter", 4]
    own = ["--model", "mlp", "--weights", weights, "--seed", 1]
    assert benchmark.main([*map(str, words), *map(str, own)]) == 0
    assert float(table(tmp_path / "courses.csv")[2]["best_db"]) > 60
    assert benchmark.main([*map(str, words), "--resume"]) == 2
    assert "--resume: not in a benchmark" in capsys.readouterr().err


def test_the_published_closure_has_the_value_of_the_loops():
    variant = on_noise(3, FAST)["loop"]
    model, target = variant.objective.matching.model, variant.objective.matching.target
    images, logits = torch.rand(3, 3, 16, 16), torch.randn(3, 20)
    subset = torch.tensor([2, 0])
    two = PublishedMatching(model, target, 0.9)(images, logits, subset)
    one = MatchingLoss(model, target, 0.9, rescale="none")(images, logits, subset)
    assert two.total.item() == pytest.approx(one.total.item(), rel=1e-5)


def test_what_is_timed_has_as_many_threads_as_a_run(monkeypatch):
    seen = {}

    def note(name):
        work = getattr(speed, name)
        monkeypatch.setattr(
            speed, name, lambda *args, **how: seen.setdefault(name, torch.get_num_threads()) and work(*args, **how)
        )

    for name in ("arithmetic", "attacked", "read_layers"):  # of an evaluation, an attack and a reading
        note(name)
    monkeypatch.setattr(speed, "TURNS", speed.LEAST)
    torch.set_num_threads(2)
    speed.evaluations(2, FAST)
    speed.course("loop", 2, FAST, 4)
    speed.reading_stages(2, FAST)
    assert seen == {"arithmetic": 1, "attacked": 1, "read_layers": 1}
    assert torch.get_num_threads() == 2


def test_variants_take_turns_and_each_has_its_own_time():
    log = []
    seconds = in_turns({"a": lambda: log.append("a"), "b": lambda: log.append("b")}, CPU)
    assert log[-4:] == ["a", "b", "a", "b"]
    assert len(seconds["a"]) == len(seconds["b"]) > 3


def test_peak_memory_is_what_was_held_at_once():
    def work():
        first = torch.zeros(2**18)  # 1 MiB
        second = first + 1
        del first
        return second + 1

    assert peak_memory(work, CPU) == pytest.approx(2, abs=0.01)


def test_arithmetic_counts_multiplications_and_additions():
    a = torch.rand(3, 5)
    assert arithmetic(lambda: a @ a.T) == 2 * 3 * 5 * 3


def test_growth_is_a_power_of_the_batch_size():
    rows = growth({2: {"span": 0.5, "whole": 3.0}, 8: {"span": 8.0}})
    assert rows[0] == {"stage": "span", "B=2": 0.5, "B=8": 8.0, "power_of_B": pytest.approx(2)}
    assert rows[1]["power_of_B"] is None


@pytest.mark.parametrize("seconds", [(0.0, 1.0), (1.0, 0.0), (-1e-4, 1.0), (1.0, -1e-4), (0.0, 0.0)])
def test_a_stage_that_takes_no_time_grows_with_no_power(seconds):
    (row,) = growth({size: {"unmixing": own} for size, own in zip((2, 8), seconds, strict=True)})
    assert row == {"stage": "unmixing", "B=2": seconds[0], "B=8": seconds[1], "power_of_B": None}


def test_a_level_is_reached_where_it_is_first_exceeded():
    points = [(18.0, 20, 1.0), (21.0, 40, 2.0), (19.0, 60, 3.0), (22.0, 80, 4.0)]
    assert first_at(points, 20) == (21.0, 40, 2.0)
    assert first_at(points, 30) == (None, None, None)
