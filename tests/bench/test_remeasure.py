"""Rows of results/data are measured again by their own commands."""

import subprocess
from pathlib import Path

import pytest

import benchmark
from bench import remeasure
from bench.results_page import read_rows, write_rows

ORIGIN = {"commit": "c2", "date": "2026-02-02 10:00", "device": "a core", "seconds": "1"}
OLD = {"batch_size": "2", "psnr": "99.9", "labels_right": "9", "runs": "7", "diverged": "7", "command": ""} | ORIGIN


def in_this_process(command, **how):
    """A benchmark's command within this process, which has imported all that it needs; other commands as they are."""
    if Path(command[1]).name != "benchmark.py":
        return RUN(command, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(how["cwd"])
        return subprocess.CompletedProcess(command, benchmark.main(command[2:]), "", "")


RUN = subprocess.run


def test_rows_are_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(remeasure, "program", lambda: {"commit": "c3", "date": "2026-03-03 10:00"})
    monkeypatch.setattr(subprocess, "run", in_this_process)
    small = "--image_size 16 --num_classes 10"
    commands = (
        f"python main_MAGIA_sel.py --batch_size 2 {small} --n_iter 2 --signals off",
        f'python benchmark.py grid --presets "grey_image" --batch_sizes 2 --batches 0 --seeds 0 {small} --out DIR',
        "python benchmark.py tune",
    )
    rows = [OLD | {"command": text} for text in commands]
    write_rows(tmp_path, "small", rows)
    words = ["small", "--folder", str(tmp_path), "--machine", "this machine"]
    assert remeasure.main([*words, "--rows", "num_classes"]) == 0
    attack, guess, other = read_rows(tmp_path, "small")
    for new, command in ((attack, commands[0]), (guess, commands[1])):
        assert new["command"] == command
        assert 0 < float(new["psnr"]) < 60
        assert float(new["seconds"]) >= 0
        assert (new["commit"], new["date"], new["device"]) == ("c3", "2026-03-03 10:00", "this machine")
    assert 0 <= int(attack["labels_right"]) <= 2
    assert (guess["labels_right"], guess["runs"], guess["diverged"]) == ("", "1", "")
    assert other == rows[2]
    assert remeasure.main([*words, "--rows", "tune"]) == 1
    assert read_rows(tmp_path, "small") == [attack, guess, other]


def test_rows_of_speed_take_their_lines_of_one_run(tmp_path, monkeypatch):
    variants, runs = ("published", "loop", "forward", "activations"), []

    def run(command, **how):
        if "speed" not in command:
            return RUN(command, **how)
        runs.append(command)
        out = Path(how["cwd"]) / "out"
        out.mkdir()
        for name, figures in (("speed", "ms_per_evaluation,ratio_to_published"), ("limits", "share_of_limit,gflop")):
            lines = [f"{variant},2,{index + 1},{(index + 1) / 8}" for index, variant in enumerate(variants)]
            (out / f"{name}.csv").write_text("\n".join([f"variant,batch_size,{figures}", *lines]) + "\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(remeasure, "program", lambda: {"commit": "c3", "date": "2026-03-03 10:00"})
    command = "python benchmark.py speed --batch_sizes 2 --device cpu --evaluations_only --out DIR"
    old = dict.fromkeys(("batch_size", "milliseconds", "ratio", "share"), "2") | ORIGIN | {"command": command}
    kinds = (("", "published"), ("activations and gradients", "forward"), ("activations", "forward"), ("", "magic"))
    rows = [old | {"matched": matched, "variant": variant} for matched, variant in kinds]
    write_rows(tmp_path, "small", rows)
    assert remeasure.main(["small", "--folder", str(tmp_path)]) == 1  # there is no such variant
    published, both, alone, other = read_rows(tmp_path, "small")
    assert len(runs) == 1
    figures = [[row[name] for name in ("milliseconds", "ratio", "share")] for row in (published, both, alone)]
    assert figures == [["1.0", "0.1", "100.0%"], ["3.0", "0.4", "300.0%"], ["4.0", "0.5", "400.0%"]]
    assert alone["commit"] == "c3"
    assert other == rows[3]


def test_commands_are_measured_with_the_data_and_checkpoints_that_are_named(tmp_path):
    words = ["--data_path", "cifar10_test.npz", "--weights", "a.npz", "--models", "mlp --weights b.npz,lenet"]
    data, weights = tmp_path / "data.npz", tmp_path / "weights"
    assert remeasure.with_paths(words, data, weights) == [
        "--data_path", str(data), "--weights", f"{weights}/a.npz", "--models", f"mlp --weights {weights}/b.npz,lenet",
    ]  # fmt: skip


def test_a_network_from_outside_is_a_file_of_the_project():
    words = ["--models", "examples/small_resnet.py:resnet8 --bn train"]
    assert remeasure.with_paths(words, None, None)[1] == f"{remeasure.ROOT}/examples/small_resnet.py:resnet8 --bn train"
    words = ["--model", "examples/small_vit.py:with_mean"]
    assert remeasure.with_paths(words, None, None)[1] == f"{remeasure.ROOT}/examples/small_vit.py:with_mean"


def test_a_reading_alone_has_the_names_of_a_whole_attack():
    line = {"found": "3", "labels_right": "2", "batch_size": "4", "signal_seconds": "1.5"}
    assert remeasure.of_reading(line) == {"signals_found": "3", "label_accuracy": 0.5, "seconds": "1.5"}


def test_a_table_that_is_not_there_is_wrong_input(tmp_path, capsys):
    assert remeasure.main(["none", "--folder", str(tmp_path)]) == 2
    assert "none.csv" in capsys.readouterr().err


def test_a_text_that_no_command_contains_is_wrong_input(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(remeasure, "program", dict)
    write_rows(tmp_path, "small", [OLD])
    assert remeasure.main(["small", "--folder", str(tmp_path), "--rows", "resnet"]) == 2
    assert "no command of small contains 'resnet'" in capsys.readouterr().err
