"""The command line as people use it: flags, run directory, presets, resume, saved updates, errors."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, SIGNALS, SMALL, config_of, metrics_of, pictures_of, resolved, trace_of, without_times
from PIL import Image
from processes import Child, forked, program

import main_MAGIA_sel as magia
from cli.settings import resolve
from cli.victim import victim
from schedules import MODES, subset_size
from update.shared import SharedUpdate

SPEC_COMMANDS = [
    "--sel_mode constk --sel_k 2",
    "--sel_mode linear_inc_l --sel_l_iter 100",
    "--sel_mode linear_dec_total",
    "--sel_mode sigmoid --sig_a -0.1 --sig_b 200",
    "--sel_mode const1 --n_iter 300 --batch_size 32 --tv_weight 5e-3 --optimizer lbfgs",
]


# ---------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("command", SPEC_COMMANDS)
def test_the_commands_of_the_source_document_resolve_as_written(command):
    words = command.split()
    settings, given = resolve(words, magia.FLAGS)
    assert [f"--{name}" for name in given] == words[::2]
    for name, text in zip(given, words[1::2], strict=True):
        assert getattr(settings, name) == type(given[name])(text)


def test_a_subset_term_without_weight_is_not_computed(cli):
    run = cli("--alpha", 1, "--n_iter", 2)
    assert {float(row["loss_subset"]) for row in trace_of(run)} == {0.0}


@pytest.mark.parametrize("mode", MODES)
def test_every_selection_mode_runs_and_follows_its_schedule(cli, curves, mode):
    run = cli("--sel_mode", mode, "--sel_k", 2, "--sel_l_iter", 3, "--sig_a", -1, "--sig_b", 2)
    sizes = [int(row["S"]) for row in trace_of(run)]
    settings = {"batch_size": 3, "n_iter": 4, "k": 2, "l_iter": 3, "a": -1.0, "b": 2.0}
    assert sizes == [subset_size(mode, t, **settings) for t in range(4)]
    assert config_of(run)["schedule"] == sizes


@pytest.mark.parametrize(
    "flags",
    [
        "--model mlp",
        "--model convnet --labels unique",
        "--optimizer adam --lr 0.1",
        "--box clamp --init uniform",
        "--box none --init normal --prior anisotropic --line_search none --resample closure --rescale none",
        "--prior rgb --chroma_weight 0 --curvature_weight 0",
        "--subset_loss mean --alpha 0.9",
        "--subset_loss partial --alpha 0.9 --sel_k 99",
        "--dtype float64 --tv_final 1 --spectral_power 0 --chroma_gain 1",
        "--indices 5,1-2 --labels dataset",
        "--restarts 2 --group_weight 0.1 --l2_weight 0.1",
        pytest.param("--model resnet18 --bn_weight 0.01 --restarts 2 --optimizer adam", marks=pytest.mark.long),
        "--signals ica --feature_distance cosine",
        "--signals auto --model lenet5",
    ],
)
def test_flags_run(cli, flags):
    run = cli(*flags.split())
    assert math.isfinite(metrics_of(run)["psnr_mean"])
    losses = [float(row["loss"]) for row in trace_of(run)]
    assert all(map(math.isfinite, losses))
    assert len(losses) == 4


def test_a_flag_given_by_hand_beats_the_preset():
    paper = resolved("--preset", "paper")
    assert (paper.box, paper.tv_weight, paper.line_search) == ("none", 5e-3, "none")
    mixed = resolved("--preset", "paper", "--box", "clamp")
    assert (mixed.box, mixed.tv_weight) == ("clamp", 5e-3)
    plain = resolved()
    assert {k: v for k, v in vars(plain).items() if k != "preset"} == {
        k: v for k, v in vars(resolved("--preset", "magia")).items() if k != "preset"
    }


def test_show_schedule_prints_and_plots_and_stops(cli, tmp_path):
    cli("--show_schedule", "--sel_mode", "linear_inc_total", "--n_iter", 6)
    lines = cli.out.splitlines()
    assert lines[1:7] == ["0 1", "1 1", "2 2", "3 2", "4 3", "5 3"]
    plot = lines[-1].removeprefix("plot: ")
    assert Image.open(plot).size[0] > 300
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("optimizer", "budget", "least"),
    [("lbfgs", 1, 0), ("lbfgs", 2, 2), ("lbfgs", 5, 2), ("lbfgs", 17, 11), ("adam", 3, 3)],
)
def test_max_evals_is_never_exceeded(cli, optimizer, budget, least):
    too_small = (optimizer, budget) == ("lbfgs", 1)  # its first step takes two evaluations
    run = cli("--optimizer", optimizer, "--max_evals", budget, "--n_iter", 50, expect=int(too_small))
    assert ("no step succeeded before max_evals ended" in cli.err) == too_small
    figures = metrics_of(run)
    assert least <= figures["evaluations"] <= budget
    assert figures["ended_by"] == "max_evals"


def test_max_seconds_begins_no_further_step(cli):
    run = cli("--max_seconds", 1, "--n_iter", 100_000, "--checkpoint_every", 0)
    figures, rows = metrics_of(run), trace_of(run)
    assert figures["ended_by"] == "max_seconds"
    assert figures["seconds"] >= 1
    assert len(rows) > 1
    assert float(rows[-2]["seconds"]) < 1
    cli("--resume", run, "--max_seconds", figures["seconds"] + 0.5, "--n_iter", 100_000)
    assert metrics_of(run)["seconds"] >= figures["seconds"] + 0.5
    assert len(trace_of(run)) > len(rows)


# ---------------------------------------------------------------------------------------------------- restarts


def test_the_restart_that_matches_best_is_the_result(cli):
    run = cli("--restarts", 3, "--optimizer", "adam", "--signals", "off", "--n_iter", 6)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert state["variables"][0].shape == (9, 3, 16, 16)
    assert state["counters"][1] == 18
    settings = resolved(*SMALL, "--restarts", "3", "--signals", "off")
    update, model, _ = victim(settings, CPU)
    attack, objective, _ = magia.prepare(update, model, settings)
    attack.load_state_dict(state | {"optimizer": attack.optimizer.state_dict()})
    copies = objective.images(attack).detach()
    losses = [
        float(objective.matching(images, logits, torch.arange(3)).full)
        for images, logits in zip(copies, attack.label_logits, strict=True)
    ]
    assert losses.index(min(losses)) == attack.leader
    assert max(losses) > min(losses)
    shown = torch.from_numpy(np.stack(pictures_of(run))).permute(0, 3, 1, 2) / 255
    distance = (copies - shown).abs().amax((1, 2, 3, 4))
    assert int(distance.argmin()) == attack.leader
    assert float(distance.min()) < 0.5 / 255 + 1e-6


def test_group_consistency_draws_restarts_together(cli):
    def spread(*flags, name):
        run = cli("--restarts", 2, "--n_iter", 8, "--inner_iter", 4, "--signals", "off", *flags, name=name)
        z = torch.load(run / "checkpoint.pt", weights_only=True)["variables"][0]
        return float((z[:3] - z[3:]).square().mean())

    assert spread("--group_weight", 100, name="together") < 0.5 * spread(name="apart")


# ---------------------------------------------------------------------------------------------------- quality


def test_two_real_images_are_reconstructed(cli):
    flags = "--batch_size 2 --image_size 32 --num_classes 100 --inner_iter 20 --max_evals 300 --n_iter 300"
    run = cli(*flags.split())
    figures = metrics_of(run)
    assert figures["psnr_mean"] > 27  # 35 dB measured
    assert figures["label_accuracy"] == 1
    assert figures["recovered"] == 1


# ---------------------------------------------------------------------------------------------------- repeatability


def test_where_nothing_is_read_the_run_says_why(cli):
    cli("--model", "convnet", "--batch_size", 40, "--n_iter", 1, *SIGNALS)
    assert "signals: none used, no image can be told apart: 4 layers have too many positions" in cli.out


def test_one_seed_repeats_a_run_and_another_does_not(cli):
    first, again, other = cli(name="a"), cli(name="b"), cli("--seed", 1, name="c")
    assert without_times(first) == without_times(again)
    assert without_times(first) != without_times(other)


def test_the_global_generators_are_left_alone(cli):
    torch.manual_seed(5)
    np.random.seed(5)
    expected = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())
    cli("--labels", "random", "--init", "uniform")
    assert (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()) == expected


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_an_attack_on_a_saved_update_is_bit_for_bit_the_in_process_one(cli, tmp_path, ending):
    path = tmp_path / f"update{ending}"
    inside = cli("--save_update", path, name="inside")
    outside = cli("--update", path, name="outside")
    assert [p.tolist() for p in pictures_of(inside)] == [p.tolist() for p in pictures_of(outside)]
    mine, theirs = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (inside, outside))
    for a, b in zip(mine["variables"], theirs["variables"], strict=True):
        assert torch.equal(a, b)
    for name in ("step", "S", "loss", "loss_full", "loss_subset", "prior", "evaluations"):
        assert [row[name] for row in trace_of(inside)] == [row[name] for row in trace_of(outside)]
    assert [row["psnr_mean"] for row in trace_of(outside)] == [""] * 4
    assert not (outside / "original.png").exists()
    assert not (outside / "comparison.png").exists()
    assert "psnr_mean" not in metrics_of(outside)
    assert cli.out.splitlines()[-1].startswith("certified 0/3 | loss ")


def test_an_update_brings_its_own_model_and_batch_size(cli, tmp_path):
    path = tmp_path / "update.npz"
    cli("--save_update", path, "--seed", 5, name="inside")
    flags = ["--n_iter", "1", "--inner_iter", "2", "--save_dir", str(tmp_path), "--run_name", "outside"]
    assert magia.main([*flags, "--update", str(path)]) == 0
    config = config_of(tmp_path / "outside")
    assert (config["batch_size"], config["num_classes"], config["model"]) == (3, 10, "lenet")


def test_an_update_without_weights_takes_them_from_the_seed_or_a_checkpoint(cli, tmp_path):
    path = tmp_path / "update.npz"
    inside = cli("--save_update", path, name="inside")
    update = SharedUpdate.load(path)
    bare = SharedUpdate(**{**vars(update), "weights": {}})
    bare.save(tmp_path / "bare.npz")
    np.savez(tmp_path / "weights.npz", **{name: w.numpy() for name, w in update.weights.items()})
    seeded = cli("--update", tmp_path / "bare.npz", name="seeded")
    loaded = cli("--update", tmp_path / "bare.npz", "--weights", tmp_path / "weights.npz", name="loaded")
    for run in (seeded, loaded):
        assert [p.tolist() for p in pictures_of(run)] == [p.tolist() for p in pictures_of(inside)]


@pytest.mark.parametrize(
    "flags", ["", "--optimizer adam", "--resample closure", "--checkpoint_every 0", "--restarts 2"]
)
def test_a_stopped_and_resumed_run_ends_like_one_that_never_stopped(cli, flags):
    flags = ["--sel_mode", "constk", *flags.split()]
    whole = cli(*flags, "--n_iter", 9, name="whole")
    half = cli(*flags, "--n_iter", 5, name="half")
    cli("--resume", half, "--n_iter", 9, name="half")
    assert without_times(half) == without_times(whole)


def test_resume_by_budget_and_name(cli, curves):
    whole = cli("--n_iter", 30, "--max_evals", 40, name="whole")
    half = cli("--n_iter", 30, "--max_evals", 20, name="half")
    cli("--n_iter", 30, "--max_evals", 40, "--resume", name="half")
    assert without_times(half) == without_times(whole)


def test_a_resumed_run_keeps_the_settings_it_began_with(cli):
    run = cli("--tv_weight", 0.5)
    cli("--resume", run, "--n_iter", 7)
    assert config_of(run)["tv_weight"] == 0.5
    assert len(trace_of(run)) == 7
    message = cli.error("--resume", run, "--batch_size", 4)
    assert "--batch_size 4" in message
    assert "began with 3" in message


def test_rows_and_frames_after_the_checkpoint_are_taken_back(cli):
    whole = cli("--n_iter", 6, name="whole")
    crashed = cli("--n_iter", 4, name="crashed")
    with (crashed / "trace.csv").open("a") as file:  # what a run that was killed after its checkpoint leaves
        file.write("4,2,9,9,9,9,99,9,9\n")
    cli("--resume", crashed, "--n_iter", 6, name="crashed")
    assert without_times(crashed) == without_times(whole)


@forked
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_a_complete_run_that_can_go_on(tmp_path, sign):
    flags = [*SMALL, "--n_iter", "100000", "--save_dir", str(tmp_path), "--run_name", "run"]
    child = Child(tmp_path / "child", program, *flags)
    run = tmp_path / "run"
    deadline = time.time() + 60
    while not (run / "trace.csv").exists() or len((run / "trace.csv").read_text().splitlines()) < 3:
        assert time.time() < deadline
        assert child.process.is_alive()
        time.sleep(0.02)
    os.kill(child.process.pid, sign)
    assert child.wait() == 130
    assert "Traceback" not in child.err
    assert child.out.splitlines()[-1].startswith("PSNR ")
    assert str(run) in child.out
    figures = metrics_of(run)
    assert figures["ended_by"] == "interrupt"
    assert figures["steps"] == len(trace_of(run))
    assert len(list((run / "images").iterdir())) == 3
    assert (run / "comparison.png").exists()
    steps = figures["steps"]
    assert magia.main(["--resume", str(run), "--n_iter", str(steps + 2), "--quiet"]) == 0
    assert metrics_of(run)["steps"] == steps + 2


# ---------------------------------------------------------------------------------------------------- wrong numbers


def test_a_diverging_run_goes_back_and_never_writes_nan(cli, curves):
    run = cli("--line_search", "none", "--lr", 1e18, "--box", "none", "--n_iter", 10, "--dtype", "float32", expect=1)
    assert "not finite" in cli.err
    assert metrics_of(run)["ended_by"] == "non-finite"
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert all(v.isfinite().all() for v in checkpoint["variables"])
    assert math.isfinite(metrics_of(run)["psnr_mean"])


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--sel_mode cosine", ["cosine", "sigmoid"]),
        ("--sel_l_iter -4", ["l_iter", "-4"]),
        ("--sel_k -5", ["--sel_k", "-5", "at least 1"]),
        (f"--n_iter {'9' * 400}", ["--n_iter", "out of range"]),
        ("--num_classes 100000000", ["--num_classes", "100000000", "at most 100000"]),
        ("--image_size 100000", ["--image_size", "100000", "at most 1024"]),
        ("--image_size 65", ["65x65"]),
        ("--indices 0-99999999999", ["0-99999999999", "at most 1000000"]),
        ("--chroma_gain 1e-40", ["--chroma_gain", "1e-40"]),
        ("--spectral_power 100", ["--spectral_power", "100"]),
        ("--defence noise:1e308", ["noise:1e308", "not finite"]),
        ("--device meta", ["meta"]),
        ("--run_name ../x", ["../x", "--save_dir"]),
        ("--run_name ..", ["--run_name .."]),
        ("--frozen head.bias,", ["head.bias,", "comma"]),
        ("--resume /nowhere/run --run_name other", ["--run_name other", "/nowhere/run"]),
        ("--save_batch batch.npy", ["batch.npy", ".npz"]),
        ("--save_batch batch.npz --batch_size 500", ["500", "128"]),
        ("--n_iter 0", ["--n_iter", "0", "at least 1"]),
        ("--batch_size -1", ["--batch_size", "-1", "at least 1"]),
        ("--batch_size two", ["two", "integer"]),
        ("--batch_size 129", ["129", "128"]),
        ("--tv_weight -1", ["--tv_weight", "-1"]),
        ("--tv_weight nan", ["--tv_weight", "nan"]),
        ("--alpha 1.5", ["--alpha", "1.5", "at most 1"]),
        ("--sig_a inf", ["--sig_a", "inf"]),
        ("--optimizer sgd", ["sgd", "adam"]),
        ("--unknown 1", ["--unknown"]),
        ("--indices 1,200,3", ["200", "0 to 127"]),
        ("--indices 1,x", ["'x'"]),
        ("--indices 1,2", ["--batch_size 3", "2"]),
        ("--labels unique --batch_size 11", ["11", "10"]),
        ("--labels dataset --num_classes 2", ["label 2", "--num_classes"]),
        ("--image_size 8", ["8x8", "16"]),
        ("--dataset folder", ["--data_path"]),
        ("--dataset folder --data_path /nowhere", ["/nowhere"]),
        ("--dataset npz --data_path /nowhere.npz", ["/nowhere.npz"]),
        ("--weights /nowhere.pt", ["/nowhere.pt"]),
        ("--update /nowhere.npz", ["/nowhere.npz"]),
        ("--save_update update.txt", ["update.txt", ".safetensors"]),
        ("--init /nowhere", ["/nowhere"]),
        ("--init photos --restarts 2", ["--init photos", "2 restarts"]),
        ("--signals ica --frozen head", ["--signals ica", "no gradient of the head"]),
        ("--max_seconds 0", ["--max_seconds", "above 0"]),
        ("--restarts 0", ["--restarts", "at least 1"]),
        ("--device tpu9", ["tpu9"]),
        ("--resume", ["bad"]),
        ("--resume /nowhere", ["/nowhere"]),
        ("--save_dir /proc/nowhere", ["/proc/nowhere"]),
    ],
)
def test_wrong_input_is_one_line_that_names_the_value(cli, flags, words):
    message = cli.error(*flags.split())
    for word in words:
        assert word in message


def test_numbers_with_exponents_are_not_taken_for_flags():
    assert resolved("--sig_b", "-1e308", "--sig_a", "-1E-2").sig_b == -1e308


@pytest.mark.parametrize("flags", ["--lr 1e308", "--label_std 1e308", "--tv_weight 1e308", "--defence noise:1e30"])
@pytest.mark.parametrize("budget", ["--max_evals 60", "--n_iter 3"])
def test_where_no_step_succeeds_the_status_says_so(cli, curves, flags, budget):
    run = cli(*flags.split(), *budget.split(), expect=1)
    assert "no step succeeded" in cli.err or "not finite" in cli.err
    assert len(pictures_of(run)) == 3


def test_a_budget_of_no_time_is_said(cli):
    cli("--max_seconds", 1e-9, expect=1)
    assert "no step succeeded before max_seconds ended" in cli.err


def test_names_of_frozen_parameters_may_be_set_apart_by_spaces(cli, tmp_path):
    cli("--frozen", "head.bias, conv1", "--save_update", tmp_path / "u.npz")
    assert set(SharedUpdate.load(tmp_path / "u.npz").gradients) == {
        "conv2.weight", "conv2.bias", "conv3.weight", "conv3.bias", "head.weight",
    }  # fmt: skip


def test_a_saved_batch_is_the_data_it_came_from(cli, tmp_path):
    path = tmp_path / "batch.npz"
    cli("--save_batch", path, "--image_size", 32, "--indices", "5,0,7")
    assert not (tmp_path / "run").exists()
    with np.load(path) as batch, np.load(ROOT / "samples" / "cifar10_sample128.npz") as sample:
        assert np.array_equal(batch["images"], sample["images"][[5, 0, 7]])
        assert np.array_equal(batch["labels"], sample["labels"][[5, 0, 7]])
    flags = ["--labels", "dataset", "--image_size", 32]
    there = cli("--dataset", "npz", "--data_path", path, *flags, name="there")
    here = cli("--indices", "5,0,7", *flags, name="here")
    assert [p.tolist() for p in pictures_of(here)] == [p.tolist() for p in pictures_of(there)]


def test_a_run_that_is_not_one_cannot_be_resumed(cli):
    run = cli()
    (run / "trace.csv").write_text("a,b\n1,2\n")
    assert "trace.csv is not the trace of a run" in cli.error("--resume", run)
    (run / "config.json").write_text("{}")
    assert "config.json is not of a run" in cli.error("--resume", run)
    (run / "config.json").write_text("[1]")
    assert "holds no settings" in cli.error("--resume", run)


def small_update(*flags):
    """The update that a run with SMALL and these flags attacks."""
    return victim(resolved(*SMALL, *flags), CPU)[0]


def test_a_damaged_update_is_refused(cli, tmp_path):
    path = tmp_path / "update.safetensors"
    small_update().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "update.safetensors is damaged" in cli.error("--update", path)


def test_flags_that_contradict_an_update_are_refused(cli, tmp_path):
    small_update("--batch_size", 4).save(tmp_path / "four.npz")
    message = cli.error("--update", tmp_path / "four.npz")
    assert "--batch_size 3: the update has 4" in message


def test_a_damaged_checkpoint_is_refused(cli):
    run = cli()
    (run / "checkpoint.pt").write_bytes(b"nothing")
    assert "checkpoint.pt is damaged" in cli.error("--resume", run)
    torch.save({"variables": []}, run / "checkpoint.pt")
    assert "not the checkpoint of a run" in cli.error("--resume", run)


def wrong(update, **changes):
    """The update with one of its parts replaced."""
    return SharedUpdate(**{**vars(update), **changes})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda u: wrong(u, image_shape=(-3, 32, 32)), ["image_shape", "-3"]),
        (lambda u: wrong(u, image_shape=(3, 10**9, 10**9)), ["image_shape", "1000000000"]),
        (lambda u: wrong(u, batch_size=0), ["batch_size 0"]),
        (lambda u: wrong(u, gradients={}), ["no gradients"]),
        (lambda u: wrong(u, gradients={n: 0 * g for n, g in u.gradients.items()}), ["all gradients are zero"]),
        (lambda u: wrong(u, gradients={n: g.int() for n, g in u.gradients.items()}), ["conv1.weight", "int32"]),
        (lambda u: wrong(u, gradients={n: g + 0j for n, g in u.gradients.items()}), ["conv1.weight", "complex64"]),
        (lambda u: wrong(u, weights={n: g / 0 for n, g in u.weights.items()}), ["weight 'conv1.weight'", "not finite"]),
        (lambda u: wrong(u, weights={n: g.int() for n, g in u.weights.items()}), ["conv1.weight", "int32"]),
        (lambda u: wrong(u, weights={n: g + 0j for n, g in u.weights.items()}), ["conv1.weight", "complex64"]),
    ],
)
def test_what_no_client_sends_is_refused(cli, tmp_path, change, words):
    small_update().save(tmp_path / "good.npz")
    change(SharedUpdate.load(tmp_path / "good.npz")).save(tmp_path / "bad.npz")
    message = cli.error("--update", tmp_path / "bad.npz")
    for word in ("bad.npz", *words):
        assert word in message


def test_an_update_with_words_for_numbers_is_refused(cli, tmp_path):
    small_update().save(tmp_path / "good.npz")
    with np.load(tmp_path / "good.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "bad.npz", **(arrays | {"gradient/head.bias": np.array(["many", "words"])}))
    assert "not of numbers" in cli.error("--update", tmp_path / "bad.npz")


@pytest.mark.parametrize("factor", [1e30, 1e-30])
def test_gradients_of_any_size_end(cli, tmp_path, factor):
    small_update().save(tmp_path / "good.npz")
    update = SharedUpdate.load(tmp_path / "good.npz")
    wrong(update, gradients={n: g * factor for n, g in update.gradients.items()}).save(tmp_path / "odd.npz")
    flags = [*SMALL, "--save_dir", str(tmp_path), "--run_name", "odd", "--update", str(tmp_path / "odd.npz")]
    assert magia.main(flags) in (0, 1)


def test_a_gradient_that_is_not_finite_is_refused(cli, tmp_path):
    small_update().save(tmp_path / "good.npz")
    update = SharedUpdate.load(tmp_path / "good.npz")
    update.gradients["head.bias"][0] = math.inf
    update.save(tmp_path / "bad.npz")
    message = cli.error("--update", tmp_path / "bad.npz")
    assert "head.bias" in message
    assert "not finite" in message


def test_an_error_in_the_real_process_has_no_traceback():
    command = [sys.executable, ROOT / "main_MAGIA_sel.py", "--batch_size", "500"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


def test_config_is_strict_json(cli):
    text = (cli() / "config.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in config.json"))


def test_a_reading_that_the_clock_stops_is_said_to_be_stopped(cli):
    run = cli("--max_seconds", 1e-6, *SIGNALS, name="short", expect=1)
    assert "until --max_seconds stopped the reading" in cli.out
    assert metrics_of(run)["signals_aborted"] is True
    whole = cli("--max_seconds", 600, *SIGNALS, name="long")
    assert "stopped the reading" not in cli.out
    assert "signals_aborted" not in metrics_of(whole)
