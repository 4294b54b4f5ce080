"""Training a model to attack, from the command line."""

import re

import pytest
import torch
from conftest import generator, metrics_of

import train_victim
from network.zoo import build_model
from update.shared import SharedUpdate
from update.storage import read_tensors
from update.weights import load_checkpoint

FAST = ["--image_size", "16", "--train_batch", "32", "--model", "mlp", "--width", "32", "--depth", "1"]


def test_training_learns_and_its_checkpoint_is_attacked(cli, tmp_path, capsys):
    out = tmp_path / "v.safetensors"
    words = [*FAST, "--epochs", "6", "--lr", "1e-2", "--out", str(out)]
    assert train_victim.main(words) == 0
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.2
    model = ["--model", "mlp", "--width", 32, "--depth", 1, "--weights", out, "--labels", "dataset"]
    run = cli(*model, "--n_iter", 2, "--save_update", tmp_path / "update.npz")
    assert metrics_of(run)["evaluations"] > 0
    trained, attacked = read_tensors(out)[0], SharedUpdate.load(tmp_path / "update.npz").weights
    assert trained.keys() == attacked.keys()
    assert all(torch.equal(attacked[name], weight) for name, weight in trained.items())


def test_one_seed_repeats_a_training_and_leaves_the_global_generator_alone(tmp_path):
    state = torch.get_rng_state()
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        train_victim.main([*FAST, "--seed", seed, "--out", str(tmp_path / f"{name}.npz")])
    a, b, c = (read_tensors(tmp_path / f"{name}.npz")[0] for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["head.weight"], c["head.weight"])
    assert torch.equal(torch.get_rng_state(), state)


def test_batchnorm_statistics_are_those_of_training(tmp_path):
    out = tmp_path / "r.npz"
    assert train_victim.main(["--model", "vgg11", "--image_size", "16", "--train_batch", "64", "--out", str(out)]) == 0
    model = build_model("vgg11", image_shape=(3, 16, 16), num_classes=10, generator=generator())
    load_checkpoint(model, out)
    assert model.bn1.running_mean.abs().max() > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--epochs 0", ["--epochs", "at least 1"]),
        ("--out model.txt", ["model.txt", ".safetensors"]),
        ("--num_classes 3", ["--num_classes"]),
        ("--hold_out 1", ["--hold_out 1", "0 of 128"]),
        ("--model lenet --depth 3", ["--depth is no option of lenet"]),
        ("--dataset npz", ["--data_path"]),
        ("--model vgg", ["vgg", "vgg11"]),
    ],
)
def test_wrong_input_is_one_line(capsys, flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = train_victim.main(flags.split())
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert all(word in err for word in words), err
