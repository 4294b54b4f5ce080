"""The run directory: a contract with other programs, and a place where nothing is lost."""

import math
import os
import random
import re
import shlex
import time

import numpy as np
import pytest
import torch
from conftest import SIGNALS, SMALL, config_of, metrics_of, pictures_of, trace_of, without_times
from PIL import Image
from processes import KILLED, Child, forked, holder_that_dies, program, program_that_dies_in

import main_MAGIA_sel as magia
from attack import ahead
from judge.run_directory import TRACE, RunDirectory
from update.storage import replace_atomically


def test_the_run_directory_is_complete(cli, curves):
    run = cli("--seed", 3)
    names = {str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()}
    images = {name.format(i) for i in range(3) for name in ("images/rec_{:03d}.png", "truth/true_{:03d}.png")}
    assert names == images | {
        "config.json", "metrics.json", "trace.csv", "checkpoint.pt", "original.png", "reconstruction.png",
        "comparison.png", "history.gif", "curves.png", "audit.json", "report.html",
    }  # fmt: skip
    config, figures = config_of(run), metrics_of(run)
    assert {flag.name for flag in magia.FLAGS} <= config.keys()
    assert config["seed"] == 3
    assert config["device"] in ("cpu", "cuda")
    assert config["versions"]["torch"] == torch.__version__
    assert {"command", "git_commit", "git_dirty"} <= config.keys()
    assert list(trace_of(run)[0]) == list(TRACE)
    assert sorted(figures["assignment"]) == [0, 1, 2]
    for name in ("psnr_mean", "ssim_mean", "mse_mean", "label_accuracy", "recovered", "psnr_mean_best_match",
                 "evaluations", "seconds", "final_loss"):  # fmt: skip
        assert math.isfinite(figures[name])
    assert len(figures["psnr"]) == len(figures["ssim"]) == 3
    assert pictures_of(run)[0].shape == (16, 16, 3)
    assert Image.open(run / "history.gif").n_frames == 5  # the start and four steps
    assert float(trace_of(run)[-1]["psnr_mean"]) == pytest.approx(figures["psnr_mean"], abs=1e-3)
    last = cli.out.splitlines()[-1]
    shares = r"identified \d/3 among 127 others \| bit for bit \d/3 \| certified \d/3"
    assert re.fullmatch(rf"PSNR \d+\.\d\d dB \| SSIM -?\d\.\d\d \| labels \d/3 \| {shares} \| loss .* s", last)


def test_quiet_prints_the_last_line_only(cli):
    cli("--quiet")
    assert len(cli.out.splitlines()) == 1
    assert cli.err == ""


def test_log_every_thins_the_trace(cli):
    run = cli("--log_every", 3, "--n_iter", 7, "--max_evals", 1000)
    assert [row["step"] for row in trace_of(run)] == ["0", "3", "6"]


def test_the_default_name_says_what_the_run_is(tmp_path):
    assert (
        magia.main([*SMALL, "--n_iter", "1", "--save_dir", str(tmp_path), "--seed", "4", "--sel_mode", "const1"]) == 0
    )
    (run,) = (entry for entry in tmp_path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    assert re.fullmatch(r"sample_B3_const1_seed4_\d{8}-\d{6}", run.name)


def test_grey_images_work(cli, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "grey.npz", images=rng.integers(0, 256, (4, 28, 28), np.uint8), labels=np.arange(4))
    run = cli("--dataset", "npz", "--data_path", tmp_path / "grey.npz", "--labels", "dataset")
    assert pictures_of(run)[0].shape == (16, 16)


def test_a_run_starts_from_the_images_of_another(cli):
    first = cli("--n_iter", 12, name="first")
    second = cli("--init", first / "images", "--n_iter", 1, "--tv_weight", 0, name="second")
    start = cli("--n_iter", 1, "--tv_weight", 0, name="grey")
    assert metrics_of(second)["psnr_mean"] > metrics_of(start)["psnr_mean"] + 1


def test_an_existing_run_is_kept_unless_told(cli):
    run = cli()
    stamp = (run / "metrics.json").stat().st_mtime_ns
    assert "run exists" in cli.error("--run_name", "run")
    assert (run / "metrics.json").stat().st_mtime_ns == stamp
    (run / "images" / "rec_999.png").write_bytes(b"stale")
    cli("--overwrite")
    assert not (run / "images" / "rec_999.png").exists()


def test_overwrite_never_empties_a_folder_that_is_no_run(cli, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    assert "not a run directory" in cli.error("--run_name", "precious", "--overwrite")
    assert (precious / "thesis.tex").exists()


# ---------------------------------------------------------------------------------------------------- nothing is lost


def test_a_resumed_run_keeps_the_signals_it_began_with(cli, monkeypatch):
    run = cli("--labels", "unique", "--model", "lenet5", *SIGNALS)
    before = torch.load(run / "checkpoint.pt", weights_only=True)["signals"]
    assert len(before["labels"]) == 3
    monkeypatch.setattr(ahead, "read_layers", lambda *_, **__: pytest.fail("searched again"))
    cli("--resume", run, "--n_iter", 6, *SIGNALS)
    after = torch.load(run / "checkpoint.pt", weights_only=True)["signals"]
    assert all(torch.equal(after[name], before[name]) for name in ("labels", "values", "deltas"))
    assert metrics_of(run)["signals_found"] == 3


def test_a_run_that_read_features_alone_is_resumed(cli, tmp_path):
    """The inputs of the last layer, behind an activation that is not walked through."""
    layers = "nn.Flatten(), nn.Linear(768, 64), nn.Softplus(), nn.Linear(64, 10)"
    (tmp_path / "net.py").write_text(f"from torch import nn\n\n\ndef net():\n    return nn.Sequential({layers})\n")
    flags = ["--model", f"{tmp_path}/net.py:net", "--batch_size", 2, *SIGNALS]
    run = cli(*flags, "--labels", "unique", "--frozen", "1")
    began = torch.load(run / "checkpoint.pt", weights_only=True)
    assert (began["start"], began["inputs"].shape) == (3, (2, 64))
    cli(*flags, "--resume", run, "--n_iter", 6)
    assert metrics_of(run)["signals_found"] == 2


def test_the_command_is_that_of_the_run_not_of_the_process(cli, monkeypatch):
    monkeypatch.setattr("sys.argv", ["a", "worker", "of", "many", "runs"])
    run = cli("--seed", 3)
    words = [*SMALL, "--save_dir", str(cli.folder), "--run_name", "run", "--seed", "3"]
    assert config_of(run)["command"] == shlex.join(["python", "main_MAGIA_sel.py", *words])


def test_config_keeps_the_schedule_of_the_steps_that_were_run(cli):
    run = cli("--n_iter", 100_000_000, "--max_evals", 20, "--sel_mode", "constk", "--sel_k", 1)
    assert config_of(run)["schedule"] == [1] * metrics_of(run)["steps"]
    assert (run / "config.json").stat().st_size < 10_000
    cli("--resume", run, "--n_iter", 100_000_000, "--max_evals", 40)
    assert config_of(run)["schedule"] == [1] * metrics_of(run)["steps"] == [int(row["S"]) for row in trace_of(run)]


def test_a_run_on_a_saved_update_says_nothing_of_what_the_client_did(cli, curves, tmp_path):
    path = tmp_path / "u.npz"
    cli("--save_update", path, "--defence", "bfloat16", "--labels", "unique", name="inside")
    run = cli("--update", path)
    config = config_of(run)
    for name in ("dataset", "data_path", "indices", "labels", "frozen", "defence", "save_update"):
        assert config[name] is None, name
    assert "labels" not in cli.out.splitlines()[0]
    assert cli.out.splitlines()[0] == f"{path}: 3 images 3x16x16 | bfloat16"  # the protocol's defence is public


def test_overwriting_removes_what_runs_write_and_nothing_else(cli):
    run = cli()
    (run / "notes.txt").write_text("mine")
    (run / "images" / "mine.png").write_bytes(b"mine")
    (run / "images" / "rec_999.png").write_bytes(b"a run's")
    cli("--overwrite", "--batch_size", 2)
    assert (run / "notes.txt").read_text() == "mine"
    assert sorted(file.name for file in (run / "images").iterdir()) == ["mine.png", "rec_000.png", "rec_001.png"]


def test_another_programs_folder_is_never_emptied(cli, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["ResNet"], "num_labels": 10}')
    (model / "checkpoint.pt").write_bytes(b"weights")
    assert "is not a run directory" in cli.error("--run_name", "model", "--overwrite")
    assert (model / "checkpoint.pt").read_bytes() == b"weights"


def test_a_link_to_a_run_is_not_overwritten(cli, tmp_path):
    run = cli()
    (tmp_path / "link").symlink_to(run)
    message = cli.error("--run_name", "link", "--overwrite")
    assert f"{tmp_path / 'link'} is a symbolic link" in message
    assert (run / "metrics.json").exists()


@pytest.mark.parametrize("name", ["run", "new"])
def test_an_update_saved_into_its_run_directory_stays_there(cli, name):
    cli()
    path = cli.folder / name / "u.npz"
    flags = ["--overwrite"] if name == "run" else []
    cli("--save_update", path, *flags, name=name)
    cli("--update", path, name="again")
    assert (cli.folder / name / "metrics.json").exists()


@forked
@pytest.mark.parametrize("culprit", ["prepare", "open_record"])
def test_what_stops_a_run_that_is_being_prepared_costs_the_old_one_nothing(cli, culprit):
    run = cli()
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    words = [*SMALL, "--save_dir", cli.folder, "--run_name", "run", "--overwrite"]
    assert Child(cli.folder / "child", program_that_dies_in, culprit, *words).wait() == KILLED
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    cli("--overwrite")


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_two_runs_at_once_do_not_mix(cli, flag):
    run = cli("--n_iter", 2)
    before = metrics_of(run)
    other = RunDirectory(run, resume=True)
    assert "another run is writing there" in cli.error("--run_name", "run", flag)
    assert metrics_of(run) == before
    other.close()
    cli("--overwrite")


@forked
def test_a_dead_processs_lock_does_not_hold(cli):
    run = cli("--n_iter", 2)
    assert Child(cli.folder / "child", holder_that_dies, run).wait() == KILLED
    cli("--overwrite")


def test_no_two_writers_share_a_temporary_file(tmp_path):
    def outer(temporary):
        temporary.write_text("outer")
        replace_atomically(tmp_path / "file", lambda other: other.write_text("inner"))

    replace_atomically(tmp_path / "file", outer)
    assert (tmp_path / "file").read_text() == "outer"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_names_the_file_that_was_wanted(tmp_path):
    path = tmp_path / "missing" / "file"
    with pytest.raises(OSError, match="missing/file'"):
        replace_atomically(path, lambda temporary: temporary.write_text("text"))


def test_a_name_of_the_greatest_length_can_be_replaced(tmp_path):
    path = tmp_path / ("x" * 255)
    for text in ("first", "second"):
        replace_atomically(path, lambda temporary, text=text: temporary.write_text(text))
        assert path.read_text() == text


@forked
def test_what_cannot_be_written_costs_nothing_but_itself(cli):
    whole = cli(name="whole")
    limit = (whole / "checkpoint.pt").stat().st_size * 9 // 10
    assert max(file.stat().st_size for file in whole.rglob("*") if file.suffix in (".json", ".csv")) < limit
    words = [*SMALL, "--save_dir", cli.folder, "--run_name", "full"]
    child = Child(cli.folder / "child", program, *words, limit=limit)
    full = cli.folder / "full"
    assert child.wait() == 1
    assert "full/checkpoint.pt could not be written" in child.err
    assert "Traceback" not in child.err
    assert metrics_of(full)["psnr_mean"] == pytest.approx(metrics_of(whole)["psnr_mean"], abs=1e-3)
    assert len(pictures_of(full)) == 3
    cli("--resume", full, "--n_iter", 5, name="full")  # the checkpoint it began with is still there
    assert not list(full.rglob("*.partial"))


def test_a_run_may_begin_without_a_checkpoint_and_costs_no_run_that_has_one(cli, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    old = cli()
    before = config_of(old)
    monkeypatch.setattr(torch, "save", full)
    with RunDirectory(cli.folder / "new") as run:
        run.begin({"seed": 1}, {})
        assert run.failures == ["checkpoint.pt"]
    assert "No space left" in capsys.readouterr().err
    with RunDirectory(old, overwrite=True) as run, pytest.raises(ValueError, match="No space left"):
        run.begin({"seed": 1}, {})
    assert config_of(old) == before


@forked
def test_an_old_run_is_not_given_up_for_one_that_cannot_be_kept(cli):
    run = cli()
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    words = [*SMALL, "--save_dir", cli.folder, "--run_name", "run", "--overwrite"]
    child = Child(cli.folder / "child", program, *words, limit=2000)
    assert child.wait() == 2
    assert "cannot write the run directory" in child.err
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


KILLS = int(os.environ.get("MAGIA_KILLS", "3"))


@forked
def test_a_run_that_is_killed_at_any_moment_can_be_resumed(cli, curves):
    flags = ["--n_iter", 12, "--checkpoint_every", 1]
    whole, draw = cli(*flags, name="whole"), random.Random(KILLS)
    for number in range(KILLS):
        name = f"killed{number}"
        run = cli.folder / name
        words = [*SMALL, *flags, "--save_dir", cli.folder, "--run_name", name, "--quiet"]
        child = Child(cli.folder / "child", program, *words)
        deadline = time.monotonic() + 60
        while not run.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.7))
        child.process.kill()
        child.wait()
        cli("--resume", run, "--n_iter", 12, name=name)
        assert without_times(run) == without_times(whole)
