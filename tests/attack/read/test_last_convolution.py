"""Labels from the bias of a convolution in which a model ends."""

from dataclasses import replace

import pytest
import torch
from conftest import metrics_of
from torch import nn

from attack.read.last_convolution import labels_of_last_convolution
from client.victim import share_update
from data import load_batch, open_source
from update.shared import SharedUpdate

FILE = """
from torch import nn

def net():
    last = nn.Conv2d(24, 10, 1)
    last.bias.data.fill_(0.5)  # opens every channel
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(), last, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
"""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ending_in(*layers):
    model = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(), *layers).eval()
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            layer.bias.data.add_(0.5)  # opens every channel
    return model


def convolution(has_relu=True):
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return ending_in(nn.Conv2d(24, 10, 1), *([nn.ReLU()] if has_relu else []), *pool)


def sent(model, labels, **how) -> SharedUpdate:
    draw = {"num_classes": 10, "generator": generator(), "image_size": 16}
    images = load_batch(open_source("sample", None), range(len(labels)), labels="random", **draw).images
    return share_update(model, "net", images, torch.tensor(labels), 10, generator=generator(2), **how)


@pytest.mark.parametrize("has_relu", [True, False])
@pytest.mark.parametrize("labels", [[3], [1, 5, 9], [2, 2, 2, 7], [0, 0, 4, 4]])
def test_labels_are_told_as_often_as_they_are_there(has_relu, labels):
    model = convolution(has_relu)
    found = labels_of_last_convolution(sent(model, labels), model, generator(3))
    assert found.labels.tolist() == labels
    assert found.is_believed


def test_a_class_whose_channel_is_closed_is_told_where_it_is_the_only_one():
    model = convolution()
    with torch.no_grad():
        model[2].weight[6], model[2].bias[6] = 0.0, -1.0
    found = labels_of_last_convolution(sent(model, [2, 6, 6]), model, generator(3))
    assert found.labels.tolist() == [2, 6, 6]
    with torch.no_grad():
        model[2].weight[5], model[2].bias[5] = 0.0, -1.0
    assert labels_of_last_convolution(sent(model, [2, 6, 6]), model, generator(3)) is None


def test_other_models_and_noise_tell_nothing():
    linear = ending_in(nn.Flatten(), nn.Linear(24 * 64, 10))
    mixing = ending_in(nn.Conv2d(24, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(1))
    for model in (linear, mixing):
        assert labels_of_last_convolution(sent(model, [1, 2]), model, generator(3)) is None
    model = convolution()
    update = replace(sent(model, [1, 2]), defence="noise:0.1")
    assert labels_of_last_convolution(update, model, generator(3)) is None


def test_the_command_line_uses_them_and_a_resumed_run_too(cli):
    path = cli.folder / "net.py"
    path.write_text(FILE)
    flags = ["--model", f"{path}:net", "--labels", "unique", "--signals", "auto"]
    run = cli(*flags)
    assert "labels counted by the last convolution's bias" in cli.out
    assert metrics_of(run)["label_accuracy"] == 1
    cli(*flags, "--n_iter", 6, "--resume")
    assert metrics_of(run)["label_accuracy"] == 1
