"""Training a model to attack, from the command line."""

import re

import numpy as np
import pytest
import torch
from conftest import SIGNALS, generator, metrics_of

import train_victim
from data import load_batch, open_source
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


OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.aux = nn.Linear(8, 10)
        self.fc = nn.Linear(8, {outputs})

    def forward(self, x):
        x = self.drop(torch.relu(self.norm(self.conv(x)))).mean((2, 3))
        return (self.fc(x), self.aux(x)) if self.training else self.fc(x)
"""


def sample_images(count, size):
    how = {"labels": "dataset", "num_classes": 10, "generator": generator(), "image_size": size}
    return load_batch(open_source("sample", None), range(count), **how).images


def own_model(folder, outputs=10) -> str:
    (folder / "net.py").write_text(OWN.replace("{outputs}", str(outputs)))
    return f"{folder / 'net.py'}:Net"


def statistics_at(model, images):
    """Mean and variance (C,) of what comes into the model's layer `norm`."""
    seen = []
    hook = model.norm.register_forward_hook(lambda layer, inputs, outputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images)
    hook.remove()
    return seen[0].mean((0, 2, 3)), seen[0].var((0, 2, 3))


@pytest.mark.parametrize("epochs", [0, 2])
def test_checkpoints_of_outside_models_have_calibrated_statistics_and_are_attacked(cli, tmp_path, epochs):
    name, out = own_model(tmp_path), tmp_path / "own.safetensors"
    words = ["--model", name, "--image_size", "16", "--train_batch", "64", "--hold_out", "0"]
    assert train_victim.main([*words, "--epochs", str(epochs), "--out", str(out)]) == 0
    model = build_model(name, image_shape=(3, 16, 16), num_classes=10, generator=generator())
    load_checkpoint(model, out)
    images = sample_images(128, size=16)
    mean, variance = statistics_at(model, images)
    torch.testing.assert_close(model.norm.running_mean, mean, rtol=0, atol=0.02 * float(variance.max()) ** 0.5)
    torch.testing.assert_close(model.norm.running_var, variance, rtol=0.05, atol=0)
    run = cli("--model", name, "--weights", out, "--batch_size", 2, "--max_evals", 2, *SIGNALS)
    assert metrics_of(run)["signals_found"] == 2


def test_training_repeats_with_dropout_and_leaves_the_global_generator_alone(tmp_path):
    state, name = torch.get_rng_state(), own_model(tmp_path)
    words = ["--model", name, "--image_size", "16"]
    for file in "ab":
        assert train_victim.main([*words, "--out", str(tmp_path / f"{file}.npz")]) == 0
    a, b = (read_tensors(tmp_path / f"{file}.npz")[0] for file in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_of_one_logit_is_trained(tmp_path, capsys):
    images, labels = sample_images(16, size=16), torch.arange(16) % 2
    arrays = {"images": (images * 255).byte().permute(0, 2, 3, 1).numpy(), "labels": labels.numpy()}
    np.savez(tmp_path / "two.npz", **arrays)
    words = ["--model", own_model(tmp_path, outputs=1), "--dataset", "npz", "--data_path", str(tmp_path / "two.npz")]
    words += ["--num_classes", "2", "--train_batch", "5", "--hold_out", "0", "--out", str(tmp_path / "v.npz")]
    assert train_victim.main(words) == 0  # sixteen images in fives: the last one joins the batch before
    assert "loss" in capsys.readouterr().out


def test_a_model_of_torchvision_is_calibrated_and_loaded_again(tmp_path):
    out = tmp_path / "s.safetensors"
    words = ["--model", "torchvision:shufflenet_v2_x0_5", "--image_size", "32", "--epochs", "0", "--out", str(out)]
    assert train_victim.main(words) == 0
    model = build_model(words[1], image_shape=(3, 32, 32), num_classes=10, generator=generator())
    load_checkpoint(model, out)
    with torch.no_grad():
        logits = model(sample_images(8, size=32))
    assert 1e-3 < logits.std(0).mean() < 1e3  # statistics of a new model leave 1e-6 between images, or make 1e6


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--epochs -1", ["--epochs", "at least 0"]),
        ("--lr 1e30 --model convnet --image_size 16 --train_batch 40", ["--lr 1e+30", "not finite"]),
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
