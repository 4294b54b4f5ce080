"""Updates of networks with BatchNorm in training mode, through the command line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from batchnorm import Plain, drawn
from conftest import SIGNALS, metrics_of, pictures_of
from PIL import Image

from update.shared import SharedUpdate

TWO = ["--batch_size", 2]  # a third of the time that three images take
LONG = ["--n_iter", 40, "--inner_iter", 20, "--max_evals", 300]
FILE = """
import sys
sys.path.insert(0, {tests!r})
from batchnorm import Plain
"""


@pytest.fixture
def net(tmp_path, request):
    """Model flags of a small network and its weights, for 8-pixel images."""
    (tmp_path / "net.py").write_text(FILE.format(tests=str(request.config.rootpath / "tests")))
    torch.save(drawn(Plain()).state_dict(), tmp_path / "weights.pt")
    model, weights = f"{tmp_path}/net.py:Plain", tmp_path / "weights.pt"
    return ["--model", model, "--image_size", 8, "--weights", weights, "--labels", "unique"]


def closest(run, own):
    """Grey levels by which each picture of a run is off, on average, from the nearest of another run's truth."""
    truth = [np.asarray(Image.open(file)).astype(int) for file in sorted((own / "truth").iterdir())]
    return np.array([min(abs(picture - other).mean() for other in truth) for picture in pictures_of(run)])


def test_pixels_are_exact_where_statistics_are_shared(cli, net):
    run = cli(*net, *TWO, "--bn", "train", *SIGNALS, "--save_update", cli.folder / "u.npz")
    figures = metrics_of(run)
    assert figures["signals_found"] == 2
    assert figures["label_accuracy"] == 1
    assert figures["ended_by"] == "exact"
    assert figures["psnr_mean"] == 100
    again = cli("--update", cli.folder / "u.npz", *net[:4], *TWO, *SIGNALS, name="again")
    assert [p.tolist() for p in pictures_of(run)] == [p.tolist() for p in pictures_of(again)]


def test_of_several_steps_the_features_of_each_minibatch_are_read_and_judged_by_themselves(cli, net):
    """BatchNorm mixes the two images of a minibatch, and not all four."""
    steps = ["--batch_size", 4, "--local_steps", 2, "--local_batches", 2, "--local_lr", 0.05]
    figures = metrics_of(cli(*net, "--bn", "train", *steps, *SIGNALS))
    assert figures["signals_found"] == 4
    assert figures["label_accuracy"] == 1
    (error,) = (row["relative_error"] for row in figures["layers"] if row["relative_error"] is not None)
    assert error < 5 * max(signal["uncertainty"] for signal in figures["signals"])
    assert "matching of the training's update" in cli.out  # pictures are not matched with all four's features at once


def test_where_they_are_kept_the_scale_is_read_or_said_to_be_open(cli, net):
    run = cli(*net, "--bn", "train_private", *SIGNALS, *LONG)
    figures = metrics_of(run)
    assert figures["signals_found"] == 3
    assert figures["psnr_mean"] > 50
    (said,) = (piece for piece in figures["evidence"] if piece["topic"] == "scale")
    assert "by 8 bits" in said["said"]


@pytest.mark.parametrize("has_weights", [True, pytest.param(False, marks=pytest.mark.long)])
def test_the_loop_keeps_the_contrast_that_batchnorm_hides(cli, net, has_weights):
    """A prior would shrink all images together. An untrained model's statistics say nothing of their contrast."""
    loop = [*(net if has_weights else [*net[:4], *net[6:]]), "--bn", "train_private"]
    budget = ["--n_iter", 40, "--inner_iter", 20, "--max_evals", 100]
    figures = metrics_of(cli(*loop, *budget))
    (said,) = (piece for piece in figures["evidence"] if piece["topic"] == "scale")
    assert "one scale common to all images" in said["said"]
    free = metrics_of(cli(*loop, *budget, "--scale_weight", 0, name="free"))
    assert not [piece for piece in free["evidence"] if piece["topic"] == "scale"]
    assert figures["psnr_mean"] > free["psnr_mean"] + 3
    assert min(ours - guess for ours, guess in zip(figures["psnr"], figures["psnr_guess"], strict=True)) > 0


def test_statistics_of_another_batch_are_not_used(cli, net):
    """They contradict the inputs that were read: what they would tell is told by gradients, or not at all."""
    cli(*net, "--bn", "train", "--save_update", cli.folder / "u.npz", "--n_iter", 1)
    update = SharedUpdate.load(cli.folder / "u.npz")
    draw = torch.Generator().manual_seed(1)
    other = {name: t * (0.5 + torch.rand(t.shape, generator=draw)) for name, t in update.statistics.items()}
    replace(update, statistics=other).save(cli.folder / "other.npz")
    run = cli("--update", cli.folder / "other.npz", *net[:4], *SIGNALS, *LONG, name="other")
    figures = metrics_of(run)
    assert figures["signals_found"] == 3
    assert not figures["pixels_read"]  # shifts of pixels would be told by means alone
    assert closest(run, cli.folder / "run").max() < 2
    assert "another batch" in next(piece["said"] for piece in figures["evidence"] if piece["topic"] == "statistics")


def test_a_batch_of_one_value_a_channel_is_refused_in_a_line(cli, tmp_path):
    (tmp_path / "one.py").write_text(
        "from torch import nn\n\n\n"
        "def net():\n"
        "    layers = [nn.Conv2d(3, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten()]\n"
        "    return nn.Sequential(*layers, nn.Linear(8, 10))\n"
    )
    said = cli.error("--model", f"{tmp_path}/one.py:net", "--bn", "train", "--batch_size", 1)
    assert "one value a channel" in said


@pytest.mark.parametrize("frozen", ["1,4"])
def test_layers_that_stay_in_eval_mode_are_read_as_such(cli, net, frozen):
    """Simulated, from the client's own file, and from a torch client's state dict without a word on modes."""
    run = cli(*net, "--bn", "train", "--bn_frozen", frozen, *SIGNALS, "--save_update", cli.folder / "u.npz")
    assert metrics_of(run)["psnr_mean"] == 100
    update = SharedUpdate.load(cli.folder / "u.npz")
    assert update.training.frozen_norms == tuple(frozen.split(","))
    again = cli("--update", cli.folder / "u.npz", *net[:4], *SIGNALS, name="again")
    assert [p.tolist() for p in pictures_of(run)] == [p.tolist() for p in pictures_of(again)]
    sent = {name: update.weights[name] - 0.1 * gradient for name, gradient in update.gradients.items()}
    torch.save({**update.weights, **sent, **update.statistics}, cli.folder / "client.pt")
    flags = ["--update", cli.folder / "client.pt", "--update_kind", "weights", "--local_lr", 0.1, "--num_classes", 10]
    theirs = cli(*flags, *net[:6], *SIGNALS, *LONG, name="theirs")
    config = json.loads((theirs / "config.json").read_text())
    assert (config["bn"], config["bn_frozen"]) == ("train", frozen)
    assert metrics_of(theirs)["signals_found"] == 3
    assert closest(theirs, run).max() < 4


def test_frozen_layers_that_do_not_fit_are_refused_in_a_line(cli, net):
    assert "no BatchNorm layer is named 'stem'" in cli.error(*net, "--bn", "train", "--bn_frozen", "stem")
    assert "goes with --bn train" in cli.error(*net, "--bn_frozen", "1")
    assert "before or after a comma" in cli.error(*net, "--bn", "train", "--bn_frozen", "1,,4")


def test_running_statistics_of_a_torch_client_give_the_batch_s(cli, net):
    """A state dict after training, rounded to float32, without a word on BatchNorm's mode."""
    own = cli(*net, *TWO, "--bn", "train", "--save_update", cli.folder / "u.npz", "--n_iter", 1)
    update = SharedUpdate.load(cli.folder / "u.npz")
    sent = {name: update.weights[name] - 0.1 * gradient for name, gradient in update.gradients.items()}
    torch.save({**update.weights, **sent, **update.statistics}, cli.folder / "client.pt")
    flags = ["--update", cli.folder / "client.pt", "--update_kind", "weights", "--local_lr", 0.1]
    run = cli(*flags, *net[:6], *TWO, *SIGNALS, *LONG, "--num_classes", 10, name="theirs")
    figures = metrics_of(run)
    assert json.loads((run / "config.json").read_text())["bn"] == "train"
    assert figures["signals_found"] == 2
    assert closest(run, own).max() < 4
