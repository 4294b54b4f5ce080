import csv
import json

import pytest
from PIL import Image

import benchmark

FAST = ["--image_size", "16", "--n_iter", "2", "--inner_iter", "4"]


def run(*words, expect=0):
    assert benchmark.main([*map(str, words), "--threads", "1"]) == expect


def table(out):
    with (out / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_signals_are_counted_and_plotted(tmp_path, capsys):
    run("signals", "--batch_sizes", "2,4", "--num_classes", "20,4", "--seeds", "0", "--out", tmp_path, *FAST)
    rows = table(tmp_path)
    assert [(r["num_classes"], r["batch_size"]) for r in rows] == [("20", "2"), ("20", "4"), ("4", "2"), ("4", "4")]
    for row in rows[:3]:
        assert row["found"] == row["labels_right"] == row["within_1_percent"] == row["batch_size"]
        assert float(row["worst_error"]) < 0.01
    assert rows[3]["found"] == "0"
    assert "no image can be told apart" in rows[3]["note"]
    assert (tmp_path / "signals.png").stat().st_size > 5000
    assert capsys.readouterr().out == (tmp_path / "table.md").read_text()


def test_a_grid_compares_presets_on_the_same_updates(tmp_path, capsys):
    words = ["--presets", "magia,paper", "--batch_sizes", "2,3", "--seeds", "0,1", "--max_evals", "12"]
    run("grid", *words, "--out", tmp_path, "--image_size", "16", "--inner_iter", "4", "--signals", "off")
    rows = table(tmp_path)
    assert list(rows[0]) == [
        "preset", "batch_size", "labels", "model", "seed", "psnr_mean", "ssim_mean", "label_accuracy", "signals_found",
        "evaluations", "seconds", "status", "max_evals",
    ]  # fmt: skip
    assert len(rows) == 8
    assert {(r["preset"], r["batch_size"], r["seed"]) for r in rows} == {
        (p, b, s) for p in ("magia", "paper") for b in "23" for s in "01"
    }
    assert all(int(r["evaluations"]) <= 12 for r in rows)
    judged = {json.loads(file.read_text())["psnr_mean"] for file in (tmp_path / "runs").glob("*/metrics.json")}
    assert {float(r["psnr_mean"]) for r in rows} == judged
    assert len(judged) == 8
    configs = [json.loads(file.read_text()) for file in (tmp_path / "runs").glob("*/config.json")]
    assert {(c["preset"], c["batch_size"], c["seed"]) for c in configs} == {
        (r["preset"], int(r["batch_size"]), int(r["seed"])) for r in rows
    }
    plots = [f"{measure}_vs_{x}.png" for measure in ("psnr", "ssim") for x in ("batch", "evaluations", "seconds")]
    for name in (*plots, "wall.png"):
        assert Image.open(tmp_path / name).size[0] > 200
    assert (tmp_path / "summary.md").read_text().count("\n") == 6
    assert capsys.readouterr().out == (tmp_path / "table.md").read_text()


def test_peers_run_on_the_same_updates(tmp_path):
    words = ["--presets", "magia", "--peer", "breaching", "--peer_attacks", "modern,deepleakage", "--seeds", "0"]
    words += ["--batch_sizes", "2", "--max_evals", "20,40", "--image_size", "16", "--signals", "off"]
    run("grid", *words, "--out", tmp_path)
    rows = table(tmp_path)
    names = ["magia", "breaching modern", "breaching deepleakage"]
    assert [row["preset"] for row in rows] == [name for name in names for _ in range(2)]
    assert [row["evaluations"] for row in rows[2:]] == ["20", "40", "20", "40"]
    judged = {json.loads(file.read_text())["psnr_mean"] for file in (tmp_path / "runs").glob("*/metrics.json")}
    assert {float(row["psnr_mean"]) for row in rows} == judged
    originals = {(file.parent.name, file.read_bytes()) for file in (tmp_path / "runs").glob("*/images/rec_000.png")}
    assert len(originals) == 6
    with Image.open(tmp_path / "wall.png") as wall:
        assert wall.size[1] > 1.5 * wall.size[0] * 0.5


def test_a_budget_of_seconds_ends_every_run(tmp_path):
    words = ["--presets", "magia,dlg", "--batch_sizes", "2", "--seeds", "0", "--max_seconds", "2"]
    run("grid", *words, "--out", tmp_path, "--image_size", "16", "--inner_iter", "4", "--signals", "off")
    for row in table(tmp_path):
        assert row["status"] == "max_seconds"
        assert 2 <= float(row["seconds"]) < 20


def test_a_cell_that_fails_says_so_and_the_others_go_on(tmp_path, capsys):
    words = ["--presets", "magia", "--models", "lenet", "--batch_sizes", "2,3", "--seeds", "0", "--max_evals", "5"]
    run("grid", *words, "--out", tmp_path, "--image_size", "16", "--num_classes", "2", "--labels", "unique", expect=1)
    assert [row["status"] for row in table(tmp_path)] == ["max_evals", "exit 2"]
    assert "1 of 2 cells failed: exit 2" in capsys.readouterr().err


def test_a_grid_of_which_nothing_ran_says_so(tmp_path, capsys):
    words = ["--presets", "magia", "--batch_sizes", "500", "--seeds", "0,0", "--max_evals", "5"]
    run("grid", *words, "--out", tmp_path, expect=1)
    assert len(table(tmp_path)) == 1
    assert "1 of 1 cells failed" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--resume", "--run_name", "--save_dir", "--update", "--show_schedule"])
def test_flags_that_a_cell_sets_itself_are_refused(tmp_path, capsys, flag):
    run("grid", "--out", tmp_path, f"{flag}=x", expect=2)
    assert f"{flag}: not in a benchmark" in capsys.readouterr().err


def test_a_finished_cell_is_not_run_again(tmp_path, monkeypatch):
    words = ["signals", "--batch_sizes", "2", "--num_classes", "20", "--seeds", "0", "--out", tmp_path, *FAST]
    run(*words)
    (cell,) = (tmp_path / "cells").iterdir()
    cell.write_text(json.dumps(json.loads(cell.read_text()) | {"note": "kept"}))
    run(*words)
    assert table(tmp_path)[0]["note"] == "kept"


def test_defences_are_measured_with_and_without_images(tmp_path):
    words = ["--batch_sizes", "3", "--seeds", "0", *FAST]
    defences = "none,--frozen=head.bias,--frozen=head,noise:1"
    run("defences", "--defences", defences, "--out", tmp_path / "both", *words)
    rows = {row["defence"]: row for row in table(tmp_path / "both")}
    assert [rows[name]["found"] for name in defences.split(",")] == ["3", "3", "0", "0"]
    assert float(rows["none"]["psnr_mean"]) > float(rows["noise:1"]["psnr_mean"])
    assert [rows[name]["status"] for name in defences.split(",")] == ["exact", "exact", "n_iter", "n_iter"]
    run("defences", "--defences", "none", "--signals_only", "--out", tmp_path / "signals", *words)
    assert "psnr_mean" not in table(tmp_path / "signals")[0]


def test_two_processes_measure_what_one_does(tmp_path):
    words = ["signals", "--batch_sizes", "2,3", "--num_classes", "20", "--seeds", "0,1", *FAST]
    run(*words, "--out", tmp_path / "one")
    run(*words, "--out", tmp_path / "two", "--jobs", 2)
    one, two = table(tmp_path / "one"), table(tmp_path / "two")
    assert len(one) == 4
    for a, b in zip(one, two, strict=True):
        assert float(a.pop("worst_error")) == pytest.approx(float(b.pop("worst_error")), rel=1e-3)
        assert a | {"signal_seconds": ""} == b | {"signal_seconds": ""}


def test_a_peer_that_fails_costs_its_cell_only(tmp_path):
    words = ["--presets", "magia", "--peer", "breaching", "--peer_attacks", "modern", "--seeds", "0"]
    run(
        "grid",
        *words,
        "--batch_sizes",
        "2",
        "--max_evals",
        "90",
        "--out",
        tmp_path,
        "--frozen",
        "conv1",
        *FAST,
        expect=1,
    )
    ours, peer = table(tmp_path)
    assert ours["status"] == "n_iter"
    assert peer["status"] == "ValueError: breaching cannot attack updates with frozen parameters"
    assert peer["psnr_mean"] == ""


def test_errors_are_one_line(tmp_path, capsys, monkeypatch):
    run("defences", "--defences", "magic", "--seeds", "0", "--out", tmp_path, *FAST, expect=2)
    assert "unknown defence 'magic'" in capsys.readouterr().err.splitlines()[-1]
    run("grid", "--peer", "breaching", "--peer_attacks", "magic", "--out", tmp_path, expect=2)
    assert "breaching has invertinggradients, modern" in capsys.readouterr().err
    run("grid", "--peer", "breaching", "--max_seconds", "9", "--out", tmp_path, expect=2)
    assert "bounded by evaluations" in capsys.readouterr().err
    run("grid", "--peer_attacks", "modern", "--out", tmp_path, expect=2)
    assert "give --peer" in capsys.readouterr().err
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    run("grid", "--peer", "breaching", "--out", tmp_path, expect=2)
    assert "requirements-benchmark.txt" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["grid", "--out", str(tmp_path), "--unknown", "1"])
    assert stop.value.code == 2
    assert "--unknown" in capsys.readouterr().err
    for words in (["--presets", "magic"], ["--models", "magic"], ["--labels", "magic"]):
        with pytest.raises(SystemExit) as stop:
            benchmark.main(["grid", *words, "--out", str(tmp_path)])
        assert stop.value.code == 2
        assert "'magic' is none of" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["signals", "--batch_sizes", "two", "--out", str(tmp_path)])
    assert stop.value.code == 2
