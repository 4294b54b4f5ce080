import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import benchmark
import main_MAGIA_sel as magia
from bench.batches import batch_indices, tuning_images
from bench.networks import short_names
from bench.searches import SEARCHES
from data import SAMPLE, parse_indices
from network.zoo import build_model
from update.storage import write_tensors

pytestmark = pytest.mark.usefixtures("quick_pictures")
FAST = ["--image_size", "16", "--n_iter", "2", "--inner_iter", "4"]


def run(command, *words, expect=0):
    """A benchmark of one batch, unless --batches says otherwise: the last flag counts."""
    assert benchmark.main([command, "--batches", "0", *map(str, words), "--threads", "1"]) == expect


def wait_for(condition, seconds=90):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def table(out):
    return read(out / "table.csv")


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_signals_are_counted_and_plotted(tmp_path, capsys):
    run("signals", "--batch_sizes", "2,4", "--num_classes", "20,4", "--seeds", "0", "--out", tmp_path, *FAST)
    rows = sorted(table(tmp_path), key=lambda row: -int(row["num_classes"]))
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
        "preset", "batch_size", "labels", "model", "batch", "seed", "psnr_mean", "ssim_mean", "label_accuracy",
        "identification", "bit_exact", "certified", "signals_found", "evaluations", "seconds", "status", "max_evals",
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
    words = ["--presets", "magia,gradinversion", "--batch_sizes", "2", "--seeds", "0", "--max_seconds", "1"]
    run("grid", *words, "--out", tmp_path, "--image_size", "16", "--inner_iter", "4", "--signals", "off")
    rows = table(tmp_path)
    assert len(rows) == 2
    for row in rows:
        assert row["status"] == "max_seconds"
        assert 1 <= float(row["seconds"]) < 20


def test_a_cell_that_fails_says_so_and_the_others_go_on(tmp_path, capsys):
    words = ["--presets", "magia", "--models", "lenet", "--batch_sizes", "2,3", "--seeds", "0", "--max_evals", "5"]
    run("grid", *words, "--out", tmp_path, "--image_size", "16", "--num_classes", "2", "--labels", "unique", expect=1)
    good, bad = table(tmp_path)
    assert good["status"] == "max_evals"
    assert bad["status"].startswith("failed: ")
    assert bad["psnr_mean"] == ""
    assert "1 of 2 cells failed" in capsys.readouterr().err.splitlines()[-1]
    assert "3 unique labels need at least 3 classes" in bad["status"]


def test_a_grid_of_which_nothing_ran_says_so(tmp_path, capsys):
    words = ["--presets", "magia", "--batch_sizes", "3", "--seeds", "0,0", "--max_evals", "5"]
    run("grid", *words, "--labels", "unique", "--num_classes", "2", "--out", tmp_path, expect=1)
    assert len(table(tmp_path)) == 1
    assert "1 of 1 cells failed" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--resume", "--run_name", "--save_dir", "--update", "--show_schedule"])
def test_flags_that_a_cell_sets_itself_are_refused(tmp_path, capsys, flag):
    run("grid", "--out", tmp_path, f"{flag}=x", expect=2)
    assert f"{flag}: not in a benchmark" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag",
    ["--num_classes 10", "--labels unique", "--defence=sign", "--local_steps 2", "--weights w.npz", "--dtype float64"],
)
@pytest.mark.parametrize("command", ["grid", "tune", "defences"])
def test_an_attack_brings_no_flags_of_the_victim(tmp_path, capsys, command, flag):
    run(command, "--presets", f"magia,dlg {flag}", "--out", tmp_path, expect=2)
    err = capsys.readouterr().err
    assert f"--presets dlg {flag}: {flag.replace('=', ' ').split()[0]} is the victim's" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_finished_cell_is_not_run_again(tmp_path, monkeypatch):
    words = ["signals", "--batch_sizes", "2", "--num_classes", "20", "--seeds", "0", "--out", tmp_path, *FAST]
    run(*words)
    (cell,) = (tmp_path / "cells").iterdir()
    cell.write_text(json.dumps(json.loads(cell.read_text()) | {"note": "kept"}))
    run(*words)
    assert table(tmp_path)[0]["note"] == "kept"


def test_a_cell_without_its_figures_is_no_finished_one(tmp_path):
    words = ["grid", "--presets", "grey_image", "--batch_sizes", "2", "--seeds", "0", "--out", tmp_path]
    run(*words)
    (cell,) = (tmp_path / "cells").iterdir()
    row = json.loads(cell.read_text())
    cell.write_text(json.dumps({name: value for name, value in row.items() if name != "psnr_mean"}))
    run(*words)
    assert table(tmp_path)[0]["psnr_mean"] == str(row["psnr_mean"])


def test_what_is_listed_twice_or_with_other_blanks_is_measured_once(tmp_path):
    words = ["--presets", "grey_image, mean_image,mean_image", "--labels", "random, random", "--models", "lenet, lenet"]
    run("grid", *words, "--batch_sizes", "2, 2", "--seeds", "0", "--max_evals", "4", "--out", tmp_path / "grid")
    assert [row["preset"] for row in table(tmp_path / "grid")] == ["grey_image", "mean_image"]
    asked = benchmark.build_parser().parse_args(
        ["defences", "--defences", "none  sign none", "--presets", "dlg  --init grey, dlg --init grey", "--out", "x"]
    )
    assert asked.defences == ["none", "sign"]
    assert asked.presets == ["dlg --init grey"]


def test_a_setting_that_two_searches_share_counts_once(tmp_path):
    words = ["--presets", "dlg,dlg --init grey", "--batch_sizes", "2", "--seeds", "0", "--image_size", "16"]
    run("tune", *words, "--max_evals", "2", "--out", tmp_path)
    assert {line["runs"] for line in read(tmp_path / "summary.csv")} == {"1"}
    presets = [row["preset"] for row in table(tmp_path)]
    assert len(set(presets)) == len(presets)


def test_no_defence_is_no_grid(tmp_path, capsys):
    for text in ("", " "):
        with pytest.raises(SystemExit) as stop:
            benchmark.main(["defences", "--defences", text, "--out", str(tmp_path)])
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert "no defence is named" in err
        assert err.count("\n") == 1


@pytest.mark.long
def test_defences_are_measured_with_signals_and_without(tmp_path):
    words = ["--batch_sizes", "3", "--seeds", "0", *FAST]
    defences = "none --frozen=head.bias noise:1"
    run("defences", "--defences", defences, "--out", tmp_path / "both", *words)
    rows = {(row["defence"], row["preset"].split()[-1]): row for row in table(tmp_path / "both")}
    guesses = [rows.pop((name, "mean_image")) for name in defences.split()]
    assert len({row["psnr_mean"] for row in guesses}) == 1
    assert list(rows) == [(name, mode) for name in defences.split() for mode in ("auto", "off")]
    assert [row["signals_found"] for row in rows.values()] == ["3", "0", "3", "0", "0", "0"]
    assert [row["status"] for row in rows.values()] == ["exact", "n_iter", "exact", "n_iter", "n_iter", "n_iter"]
    assert float(rows["none", "auto"]["psnr_mean"]) > float(rows["none", "off"]["psnr_mean"]) + 20
    page = (tmp_path / "both" / "overview.md").read_text()
    assert "PSNR (dB), magia --signals auto | PSNR (dB), magia --signals off | PSNR (dB), mean_image | SSIM" in page
    assert [line.split("|")[1].strip() for line in page.splitlines()[4:]] == defences.split()
    run("defences", "--defences", "none", "--signals_only", "--out", tmp_path / "signals", *words)
    (row,) = table(tmp_path / "signals")
    assert row["found"] == "3"
    assert "psnr_mean" not in row


@pytest.mark.parametrize("command", [["defences"], ["defences", "--signals_only"]])
def test_one_bad_cell_does_not_end_a_grid_of_defences(tmp_path, capsys, command):
    words = ["--defences", "noise:1e39 none", "--seeds", "0", "--batch_sizes", "2", "--presets", "magia"]
    run(*command, *words, "--out", tmp_path, *FAST, expect=1)
    bad, *_, good = (row for row in table(tmp_path) if row.get("preset") != "mean_image")
    assert "--defence noise:1e39: the gradient of" in bad["status"]
    assert good.get("found") or good["signals_found"] == "2"
    assert "cells failed" in capsys.readouterr().err.splitlines()[-1]


def test_one_bad_cell_does_not_end_a_grid_of_signals(tmp_path):
    words = ["--labels", "unique", "--num_classes", "20", "--batch_sizes", "2,21", "--seeds", "0"]
    run("signals", *words, "--out", tmp_path, *FAST, expect=1)
    good, bad = table(tmp_path)
    assert good["found"] == "2"
    assert "21 unique labels need" in bad["status"]
    assert (tmp_path / "signals.png").is_file()


def test_guesses_stand_beside_attacks_and_no_table_shows_what_they_are_made_of(tmp_path):
    words = ["--presets", "grey_image,mean_image", "--batch_sizes", "16", "--batches", "0,1,2", "--seeds", "0"]
    run("grid", *words, "--max_evals", "5", "--out", tmp_path)
    rows = table(tmp_path)
    assert len(rows) == 6
    with np.load(SAMPLE) as sample:
        images = sample["images"] / 255.0
    guesses = {"grey_image": 0.5, "mean_image": images[96:128].mean(0)}
    for row in rows:
        own = images[16 * int(row["batch"]) :][:16]
        psnr = -10 * np.log10(((own - guesses[row["preset"]]) ** 2).mean((1, 2, 3)))
        assert float(row["psnr_mean"]) == pytest.approx(psnr.mean(), abs=1e-3)
        assert row["label_accuracy"] == ""
        assert 10 < float(row["psnr_mean"]) < 14


@pytest.mark.long
def test_an_attack_on_noise_shows_what_its_prior_paints(tmp_path):
    """It knows model and batch size, and finds none of the labels that the same attack reads off the update."""
    words = ["--presets", "magia,prior_alone,prior_alone --init uniform", "--batch_sizes", "2", "--seeds", "0"]
    words += ["--max_evals", "6", "--labels", "unique", "--defence", "clip:1", *FAST]
    run("grid", *words, "--out", tmp_path)
    attack, alone, other = table(tmp_path)
    assert (attack["signals_found"], attack["label_accuracy"]) == ("2", "1.0")
    assert (alone["signals_found"], alone["label_accuracy"]) == ("0", "0.0")
    assert float(attack["psnr_mean"]) > float(alone["psnr_mean"])
    assert float(alone["psnr_mean"]) > float(other["psnr_mean"]) + 1


def test_a_network_from_outside_has_cells_as_others_have(tmp_path, capsys):
    file = tmp_path / "nets.py"
    file.write_text(
        "from torch import nn\n\ndef small():\n    return nn.Sequential(nn.Flatten(), nn.Linear(768, 10))\n"
    )
    words = ["--presets", "magia", "--batch_sizes", "2", "--seeds", "0", "--max_evals", "2", "--num_classes", "10"]
    run("grid", *words, "--models", f"{file}:small", "--out", tmp_path / "out", *FAST[:2])
    assert [row["model"] for row in table(tmp_path / "out")] == ["nets.py:small"]
    with pytest.raises(SystemExit):
        run("grid", *words, "--models", "no_such_network", "--out", tmp_path / "out")
    assert "torchvision:NAME, FILE.py:FACTORY" in capsys.readouterr().err


def test_batches_are_disjoint_and_leave_the_images_for_tuning_out():
    for count in (256, 1000, 10_000):
        shown = [parse_indices(batch_indices(batch, size, count)) for size in (1, 8, 64) for batch in range(3)]
        tuning = parse_indices(batch_indices(0, len(tuning_images(count)), count, tuning=True))
        assert all(len(indices) == size for indices, size in zip(shown, (1, 1, 1, 8, 8, 8, 64, 64, 64), strict=True))
        for batches in (shown[:3], shown[3:6], shown[6:]):
            everything = [index for indices in batches for index in indices]
            assert len(set(everything)) == len(everything)
            assert not set(everything) & set(tuning)
    assert tuning == list(range(192, 256))
    assert batch_indices(2, 32, 128) == "64-95"
    assert batch_indices(0, 32, 128, tuning=True) == "96-127"
    with pytest.raises(ValueError, match="32 are there for tuning"):
        batch_indices(0, 33, 128, tuning=True)


@pytest.mark.parametrize("command", ["grid", "signals", "defences", "schedules"])
def test_a_batch_beyond_the_images_that_are_shown_is_refused_before_anything_runs(tmp_path, capsys, command):
    run(command, "--batch_sizes", "48", "--batches", "0,1,2", "--out", tmp_path, expect=2)
    err = capsys.readouterr().err
    assert err.endswith("batch 2 of 48 images: of the source's 128, 96 are shown\n")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_that_came_to_nothing_counts_as_the_mean_image(tmp_path):
    """DLG's start lies outside the box; two evaluations leave it there. A third cell cannot run at all."""
    words = ["--presets", "dlg,mean_image", "--batch_sizes", "2", "--seeds", "0,1", "--max_evals", "2"]
    run("grid", *words, "--out", tmp_path, "--image_size", "16")
    assert [row["status"] for row in table(tmp_path)][:2] == ["diverged"] * 2
    lost, mean = read(tmp_path / "summary.csv")
    assert (lost["runs"], lost["failed"], mean["failed"]) == ("2", "1", "0")
    assert (lost["psnr_mean"], lost["ssim_mean"]) == (mean["psnr_mean"], mean["ssim_mean"])
    assert float(lost["psnr_mean"]) > float(table(tmp_path)[0]["psnr_mean"])
    assert "100 % failed" in (tmp_path / "overview.md").read_text()


def test_models_and_presets_may_bring_flags_of_their_own(tmp_path):
    spear = "mlp --activation relu --depth 5 --width 200 --num_classes 10 --labels dataset"
    words = ["--presets", "magia,dlg --init grey", "--models", f"lenet,{spear}", "--batch_sizes", "3", "--seeds", "0"]
    run("grid", *words, "--max_evals", "4", "--out", tmp_path, "--image_size", "16", "--signals", "off")
    rows = table(tmp_path)
    assert [(row["preset"], row["labels"], row["model"]) for row in rows] == [
        (preset, labels, model)
        for preset in ("magia", "dlg --init grey")
        for labels, model in (("random", "lenet"), ("dataset", "mlp activation relu depth 5 width 200 K=10"))
    ]
    configs = [json.loads(file.read_text()) for file in (tmp_path / "runs").glob("*/config.json")]
    assert {(c["model"], c["depth"], c["width"], c["num_classes"]) for c in configs} == {
        ("lenet", None, None, 100),
        ("mlp", 5, 200, 10),
    }
    assert {(c["preset"], c["init"]) for c in configs} == {("magia", "grey"), ("dlg", "grey")}
    assert len(list(tmp_path.glob("wall_*.png"))) == len(list(tmp_path.glob("psnr_vs_batch_*.png"))) == 2


def test_a_checkpoint_that_was_changed_makes_other_cells(tmp_path):
    weights = tmp_path / "weights.npz"
    words = ["--num_classes", "20", "--models", f"lenet --weights {weights}", "--batch_sizes", "2", "--seeds", "0"]
    found = []
    for scale in (0.5, 0.6):
        model = build_model("lenet", image_shape=(3, 16, 16), num_classes=20, generator=torch.Generator())
        write_tensors(weights, {name: scale * tensor for name, tensor in model.state_dict().items()})
        run("signals", *words, "--out", tmp_path / "out", *FAST)
        found.append(table(tmp_path / "out")[0]["worst_error"])
    assert found[0] != found[1]


def test_networks_that_are_not_the_same_have_names_of_their_own():
    behind = "lenet --num_classes 10 --weights "
    ways = {"e1/net.pt": "e1/net", "e2/net.pt": "e2/net", "a/b/n.npz": "a/b/n", "c/b/n.npz": "c/b/n", "x/one.pt": "one"}
    ways |= {"same.npz": "same.npz", "same.pt": "same.pt"}
    names = short_names(["lenet", *(behind + way for way in ways)])
    assert list(names.values()) == ["lenet", *(f"lenet K=10 ({name})" for name in ways.values())]
    labelled = short_names([f"lenet --weights net.pt --labels {labels}" for labels in ("random", "dataset")])
    assert set(labelled.values()) == {"lenet (net)"}


def test_two_checkpoints_of_one_name_have_rows_and_plots_of_their_own(tmp_path):
    ways = [tmp_path / epoch / "net.npz" for epoch in ("e1", "e2")]
    for scale, way in enumerate(ways, 1):
        way.parent.mkdir()
        model = build_model("lenet", image_shape=(3, 16, 16), num_classes=100, generator=torch.Generator())
        write_tensors(way, {name: scale * tensor for name, tensor in model.state_dict().items()})
    words = ["--models", ",".join(f"lenet --weights {way}" for way in ways), "--presets", "grey_image"]
    run("grid", *words, "--batch_sizes", "2", "--seeds", "0", "--image_size", "16", "--out", tmp_path / "out")
    assert [line["model"] for line in read(tmp_path / "out" / "summary.csv")] == ["lenet (e1/net)", "lenet (e2/net)"]
    assert len(list((tmp_path / "out").glob("wall_*.png"))) == 2


def test_images_that_were_changed_make_other_cells(tmp_path):
    """Those that are shown, in a folder with a class, and those that an attack starts from."""
    photos, starts = tmp_path / "photos" / "class", tmp_path / "starts"
    words = ["--presets", f"grey_image,magia --init {starts}", "--batch_sizes", "2", "--seeds", "0", "--max_evals", "2"]
    words += ["--dataset", "folder", "--data_path", photos.parent, "--signals", "off", "--out", tmp_path / "out"]
    found = []
    for shown, started in ((10, 20), (30, 20), (30, 40), (30, 40)):
        for folder, value in ((photos, shown), (starts, started)):
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(2):
                Image.new("RGB", (16, 16), (value, 0, 50 * number)).save(folder / f"{number}.png")
        run("grid", *words)
        found.append([(row["psnr_mean"], row["seconds"]) for row in table(tmp_path / "out")])
    (first, second, third, fourth) = found
    assert first[0] != second[0] == third[0]
    assert second[1] != third[1]
    assert third == fourth


def test_every_schedule_is_run_to_its_end(tmp_path):
    words = ["--schedules", "constk,sigmoid", "--batch_sizes", "3", "--seeds", "0", "--image_size", "16"]
    run("schedules", *words, "--out", tmp_path, "--n_iter", "6", "--inner_iter", "2")
    assert [row["status"] for row in table(tmp_path)] == ["n_iter"] * 4
    configs = [json.loads(file.read_text()) for file in (tmp_path / "runs").glob("*/config.json")]
    assert [len(config["schedule"]) for config in configs] == [6] * 4


def test_settings_are_searched_on_images_that_no_table_shows(tmp_path):
    words = ["--presets", "cpa", "--batch_sizes", "2", "--seeds", "0", "--image_size", "16", "--num_classes", "10"]
    run("tune", *words, "--max_evals", "4", "--out", tmp_path)
    configs = [json.loads(file.read_text()) for file in (tmp_path / "runs").glob("*/config.json")]
    assert {config["indices"] for config in configs} == {"96-97"}
    assert {config["tv_weight"] for config in configs} == set(SEARCHES["cpa"]["tv_weight"])
    assert {config["init"] for config in configs} == set(SEARCHES["cpa"]["init"])
    tried = [tuple(config[name] for name in SEARCHES["cpa"]) for config in configs]
    assert len(set(tried)) == len(tried)
    psnr = [float(line["psnr_mean"]) for line in read(tmp_path / "summary.csv")]
    assert psnr == sorted(psnr, reverse=True)


ENDLESS = ["grid", "--presets", "magia", "--batch_sizes", "2", "--seeds", "0,1,2", "--max_evals", "100000"]
ENDLESS += ["--signals", "off", "--image_size", "16"]


def test_ctrl_c_ends_a_grid_and_what_it_interrupted_is_not_finished(tmp_path, capsys, monkeypatch):
    step = magia.magia_step
    monkeypatch.setattr(magia, "magia_step", lambda *args: signal.raise_signal(signal.SIGINT) or step(*args))
    run(*ENDLESS, "--out", tmp_path, expect=130)
    assert "the same command goes on from there" in capsys.readouterr().err
    assert len(list(tmp_path.glob("runs/*/trace.csv"))) == 1
    assert not list(tmp_path.glob("cells/*.json"))


@pytest.mark.long
def test_ctrl_c_ends_two_processes_as_well(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "benchmark.py", *ENDLESS, "--out", str(tmp_path), "--threads", "1", "--jobs", "2"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: any(file.stat().st_size > 300 for file in tmp_path.glob("runs/*/trace.csv")))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in err
    assert not list(tmp_path.glob("cells/*.json"))


@pytest.mark.long
@pytest.mark.xdist_group("pool")  # of local processes, which the next test with as many goes on with
def test_two_processes_measure_what_one_does(tmp_path):
    words = ["signals", "--batch_sizes", "2", "--num_classes", "20", "--seeds", "0,1", *FAST]
    run(*words, "--out", tmp_path / "one")
    run(*words, "--out", tmp_path / "two", "--jobs", 2)
    one, two = table(tmp_path / "one"), table(tmp_path / "two")
    assert len(one) == 2
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
    assert peer["status"] == "failed: ValueError: breaching cannot attack updates with frozen parameters"
    assert peer["psnr_mean"] == ""


def test_errors_are_one_line(tmp_path, capsys, monkeypatch):
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
    for words in (
        ["defences", "--defences", "none --unknown"],
        ["grid", "--presets", "dlg --unknown 1"],
        ["grid", "--models", "mlp --depth none"],
    ):
        with pytest.raises(SystemExit) as stop:
            benchmark.main([*words, "--out", str(tmp_path)])
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["signals", "--batch_sizes", "two", "--out", str(tmp_path)])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["grid", "--device", "zzz"], "--device zzz"),
        (["signals", "--device", "zzz"], "--device zzz"),
        (["speed", "--device", "zzz"], "--device zzz"),
        (["grid", "--presets", "magia,dlg --device zzz"], "--device zzz"),
        (["grid", "--presets", "magia,dlg --init /nowhere"], "--init /nowhere"),
        (["grid", "--models", "lenet,lenet --weights /nonexistent.npz"], "no such file: /nonexistent.npz"),
        (["signals", "--models", "lenet --weights /nonexistent.npz"], "no such file: /nonexistent.npz"),
        (["grid", "--frozen", "zzz"], "no parameter's name starts with 'zzz'"),
        (["grid", "--image_size", "8"], "lenet takes square images"),
    ],
)
def test_flags_with_which_no_cell_could_run_are_refused_before_any_runs(tmp_path, capsys, words, said):
    run(*words, "--out", tmp_path / "out", expect=2)
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["table.csv", "summary.md", "origin.json", "wall.png", "speed.csv"])
@pytest.mark.parametrize("command", ["grid", "speed"])
def test_files_of_others_are_not_overwritten(tmp_path, capsys, name, command):
    (tmp_path / name).write_text("mine")
    run(command, "--out", tmp_path, expect=2)
    assert f"{name} is not of a benchmark" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("flag", ["--batch_si", "--max_eval", "--scheduled", "--dev"])
def test_no_flag_is_known_by_its_beginning(tmp_path, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["grid", "--out", str(tmp_path / "out"), flag, "2"])
    assert stop.value.code == 2
    assert flag in capsys.readouterr().err
