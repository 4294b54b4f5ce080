"""Local training and BatchNorm in training mode, from the command line."""

import pytest
import torch
from conftest import SIGNALS, config_of, metrics_of, pictures_of, without_times

from update.shared import SharedUpdate

TRAINED = ["--local_steps", 3, "--local_lr", 0.1]
NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
"""


@pytest.fixture
def net(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(NET)
    return f"{path}:net"


def test_an_update_of_four_steps_gives_its_images_away(cli):
    flags = ["--batch_size", 4, "--local_steps", 4, "--local_lr", 0.1, "--local_batches", 2]
    run = cli(*flags, "--n_iter", 40, "--inner_iter", 20, "--max_evals", 60, *SIGNALS, "--num_classes", 20)
    figures = metrics_of(run)
    assert figures["label_accuracy"] == 1
    assert figures["exact_way"] is False
    assert figures["replays"] is False
    assert figures["psnr_mean"] > 20  # 24 measured
    assert "steps x rate 0.4" in cli.out
    assert "labels by trial" in cli.out


@pytest.mark.long
def test_without_unrolling_the_same_update_gives_nothing(cli):
    flags = ["--n_iter", 20, "--inner_iter", 20, "--max_evals", 40, "--num_classes", 20]
    cli(*TRAINED, *flags, *SIGNALS, "--save_update", cli.folder / "u.npz", name="unrolled")
    unrolled = metrics_of(cli.folder / "unrolled")["final_loss"]
    update = SharedUpdate.load(cli.folder / "u.npz")
    SharedUpdate(**{**vars(update), "training": type(update.training)()}).save(cli.folder / "plain.npz")
    cli("--update", cli.folder / "plain.npz", *flags, *SIGNALS, name="plain")
    assert metrics_of(cli.folder / "plain")["final_loss"] > 10 * unrolled


@pytest.mark.long
def test_a_saved_update_is_attacked_as_the_one_in_hand(cli):
    flags, steps = (
        ["--n_iter", 2, "--batch_size", 2, *SIGNALS],
        ["--local_steps", 4, "--local_lr", 0.1, "--local_batches", 2],
    )
    first = cli(*steps, *flags, "--save_update", cli.folder / "u.safetensors", name="first")
    again = cli("--update", cli.folder / "u.safetensors", *flags, name="again")
    assert [p.tolist() for p in pictures_of(first)] == [p.tolist() for p in pictures_of(again)]
    names = ("local_steps", "local_batches", "local_lr", "bn")
    assert [config_of(again)[n] for n in names] == [4, 2, 0.1, "eval"]


def test_a_resumed_run_ends_as_one_that_never_stopped(cli):
    flags = ["--local_lr", 0.1, "--batch_size", 2, "--local_steps", 4, "--local_batches", 2, *SIGNALS]
    whole = cli(*flags, name="whole")
    cli(*flags, "--n_iter", 2, name="halves")
    halves = cli(*flags, "--resume", name="halves")
    assert without_times(whole) == without_times(halves)


def test_where_weights_hardly_move_the_exact_way_is_taken(cli):
    flags = ["--local_steps", 2, "--local_lr", 1e-8, "--dtype", "float64", "--model", "lenet"]
    figures = metrics_of(cli(*flags, "--labels", "unique", *SIGNALS))
    assert figures["exact_way"] is True
    assert figures["signals_found"] == 3
    assert figures["local_drift"] < 1e-3
    assert all(signal["uncertainty"] >= figures["local_drift"] for signal in figures["signals"])
    assert "taken for one gradient" in cli.out
    assert figures["replays"] is True
    assert "the steps on what was read make it" in cli.out
    assert "told apart" in cli.error(*TRAINED, "--signals", "on")


@pytest.mark.parametrize("mode", ["train", "train_private"])
def test_batchnorm_in_training_mode_is_read_above_its_last_layer(cli, net, mode):
    run = cli("--model", net, "--bn", mode, "--labels", "unique", *SIGNALS, "--save_update", cli.folder / "u.npz")
    figures = metrics_of(run)
    assert figures["signals_found"] == 3
    assert figures["label_accuracy"] == 1
    notes = {row["layer"]: row["note"] for row in figures["layers"]}
    assert notes["0"] == "1006 equations for 2304 unknowns"
    assert f"statistics {'shared' if mode == 'train' else 'kept'}" in cli.out
    assert bool(SharedUpdate.load(cli.folder / "u.npz").statistics) == (mode == "train")
    again = cli("--update", cli.folder / "u.npz", "--model", net, *SIGNALS, name="again")
    assert [p.tolist() for p in pictures_of(run)] == [p.tolist() for p in pictures_of(again)]


def test_shared_statistics_sharpen_the_images(cli, net):
    flags = ["--model", net, "--labels", "unique", *SIGNALS, "--n_iter", 60, "--inner_iter", 20, "--max_evals", 120]
    psnr = {m: metrics_of(cli(*flags, "--bn", m, name=m))["psnr_mean"] for m in ("train", "train_private")}
    assert psnr["train"] > psnr["train_private"] + 2


def test_a_difference_from_outside_is_unrolled_too(cli, net):
    server, training = cli.folder / "server.pt", ["--local_steps", 2, "--local_lr", 0.01, "--bn", "train"]
    cli("--model", net, *training, "--save_update", cli.folder / "u.npz", name="own")
    update = SharedUpdate.load(cli.folder / "u.npz")
    torch.save(update.weights, server)
    moved = {name: -0.02 * gradient for name, gradient in update.gradients.items()}
    buffers = {name: new - update.weights[name] for name, new in update.statistics.items()}
    torch.save(moved | buffers, cli.folder / "difference.pt")
    theirs = ["--update", cli.folder / "difference.pt", "--update_kind", "difference", "--weights", server]
    size = ["--model", net, "--num_classes", 10, "--image_size", 16]
    run = cli(*theirs, *size, *training, "--batch_size", 3, name="theirs")
    assert config_of(run)["local_steps"] == 2
    assert "2 steps of plain SGD" in cli.out
    assert metrics_of(run)["final_loss"] == pytest.approx(metrics_of(cli.folder / "own")["final_loss"], rel=0.05)
    torch.save(moved, cli.folder / "difference.pt")
    assert "holds no '1.running_mean'" in cli.error(*theirs, *size, *training, "--batch_size", 3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--local_steps 2", "--local_steps 2 needs --local_lr"),
        ("--local_steps 0 --local_lr 0.1", "--local_steps"),
        ("--local_steps 2 --local_lr 0", "--local_lr"),
        ("--local_steps 2 --local_lr nan", "--local_lr"),
        ("--batch_size 5 --local_steps 4 --local_lr 0.1 --local_batches 4", "minibatches of 2 are 3"),
        ("--local_steps 4 --local_lr 0.1 --local_batches 3", "not whole passes through 3 minibatches"),
        ("--local_batches 3", "not whole passes"),
        ("--local_batches 0", "--local_batches"),
        ("--bn train", "the model has no BatchNorm layers"),
        ("--bn train --model resnet18 --batch_size 1", "one value a channel"),
        ("--bn batch", "'batch' is none of eval, train, train_private"),
    ],
)
def test_wrong_flags_are_one_line(cli, flags, words):
    assert words in cli.error(*flags.split())


def test_max_seconds_ends_the_search_for_labels_and_leaves_time_for_steps(cli):
    words = ["--batch_size", 8, "--num_classes", 100, "--local_steps", 4, "--local_lr", 0.1, "--signals", "auto"]
    run = cli(*words, "--max_seconds", 2, "--image_size", 32)
    figures = metrics_of(run)
    assert "--max_seconds stopped their search" in cli.out
    assert figures["trial_aborted"] is True
    assert figures["steps"] >= 1
    assert figures["seconds"] < 20


@pytest.mark.long
def test_one_pass_of_minibatches_is_read_step_by_step_and_its_pictures_follow(cli):
    flags = ["--model", "convnet", "--batch_size", 4, "--local_steps", 2, "--local_batches", 2, "--local_lr", 0.1]
    run = cli(*flags, "--labels", "dataset", *SIGNALS, "--n_iter", 300, "--inner_iter", 20, "--max_evals", 200)
    figures = metrics_of(run)
    assert figures["signals_found"] == 4
    assert figures["label_accuracy"] == 1
    assert [signal["step"] for signal in figures["signals"]] == [0, 0, 1, 1]
    assert all(signal["confidence"] > 0.999 for signal in figures["signals"])
    assert figures["exact_way"] is True
    assert figures["psnr_mean"] > 30
    assert "read step by step" in cli.out
    (head,) = (row for row in figures["layers"] if row["layer"] == "head")
    assert head["relative_error"] < 1e-4


@pytest.mark.long
def test_a_resumed_run_keeps_what_was_read_step_by_step(cli):
    flags = ["--model", "convnet", "--batch_size", 4, "--local_steps", 2, "--local_batches", 2, "--local_lr", 0.1]
    flags += ["--labels", "dataset", *SIGNALS]
    whole = cli(*flags, name="whole")
    cli(*flags, "--n_iter", 2, name="halves")
    halves = cli(*flags, "--resume", name="halves")
    assert without_times(whole) == without_times(halves)
