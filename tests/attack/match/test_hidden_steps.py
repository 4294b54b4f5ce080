"""Features are claimed no more exactly than the steps allow that a client may have made."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import SIGNALS
from passes import OnePass

from attack.match.hidden_steps import hidden_drift
from attack.prepare import Known
from attack.read.signals import Signals
from network.head import features_of
from network.zoo import build_model
from update.storage import write_tensors

SHARE = 0.2  # of its size that the last convolution has: it moves fast then, and the head, as much larger, hardly


def drifting():
    """A ConvNet whose features drift, and whose head says little of that."""
    net = build_model("convnet", image_shape=(3, 16, 16), num_classes=10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for tensor, factor in ((net.conv3.weight, SHARE), (net.conv3.bias, SHARE), (net.head.weight, 1 / SHARE)):
            tensor *= factor
    return net


def attacked(cli, folder, scene, kind, *flags):
    """The signals that a run reports of a client's weights, and their errors at the server's weights."""
    reach = scene.training.steps * scene.training.rate
    sent = copy.deepcopy(scene.update.gradients)
    if kind != "gradient":
        old = {name: weight.detach() for name, weight in scene.net.named_parameters()}
        new = {name: weight - reach * sent[name] for name, weight in old.items()}
        sent = new if kind == "weights" else {name: new[name] - old[name] for name in new}
        flags = (*flags, "--local_lr", reach)
    write_tensors(folder / "update.safetensors", sent)
    write_tensors(folder / "server.safetensors", scene.net.state_dict())
    of_update = ["--update", folder / "update.safetensors", "--weights", folder / "server.safetensors"]
    run = cli(*SIGNALS, *of_update, "--update_kind", kind, "--model", "convnet", "--n_iter", 1, *flags)
    told = json.loads((run / "metrics.json").read_text())["signals"]
    values = torch.load(run / "checkpoint.pt", weights_only=True)["signals"]["values"]
    truth = features_of(scene.net, scene.batch.images).detach().double()
    errors = (torch.cdist(values, truth) / truth.norm(dim=1)).amin(1).tolist()
    return told, errors


KINDS = [
    ("weights", 2, 3e-4),
    pytest.param("difference", 3, 1e-3, marks=pytest.mark.long),
    pytest.param("gradient", 3, 1e-3, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("kind", "count", "rate"), KINDS)
def test_no_feature_is_certain_that_hidden_steps_have_moved(cli, tmp_path, kind, count, rate):
    """A step for each image, declared as one step. The head fits that as well; features are off by 5 to 18 %."""
    told, errors = attacked(cli, tmp_path, OnePass(drifting(), count, count, rate), kind, "--batch_size", count)
    assert max(errors) > 0.02
    for signal, error in zip(told, errors, strict=True):
        assert error <= 5 * signal["uncertainty"]
        assert error <= 0.01 or signal["confidence"] < 0.999
    assert "which would have moved its features by up to" in cli.out


@pytest.mark.long
def test_one_step_stays_certain_where_the_update_tells_it_from_several(cli, tmp_path):
    told, errors = attacked(cli, tmp_path, OnePass(drifting(), 3, 1, 0.05), "gradient")
    assert max(errors) < 1e-3
    assert all(signal["confidence"] > 0.999 for signal in told)


def test_where_nothing_drifts_nothing_is_said():
    scene, images = OnePass("convnet", 2, 1, 0.05), torch.rand(2, 3, 16, 16)
    nothing = Known(2, None, torch.empty(0), None)
    assert hidden_drift(scene.update, scene.net, nothing, images) is None
    pixels = replace(nothing, signals=Signals.none(images, (256,), (10,), 2), start=0, inputs=images, pixels=images)
    assert hidden_drift(scene.update, scene.net, pixels, images) is None
