"""Expected errors by the client's arithmetic: float32, or bfloat16 and float16, of which the server cannot know."""

import pytest
import torch
from batchnorm import Blocks, Plain, Shared, drawn, ordered, relative_errors
from test_reader import Scene, generator
from torch import nn

from attack.read.arithmetic import forward_errors
from attack.read.reader import read_layers
from network.head import features_of

WITHIN = 3.0  # times its expected error that no image is off


def under_autocast(scene, dtype, rate=None):
    """The scene's update as autocast computes it, as gradients or as what SGD of a rate makes of the weights."""
    images, labels = scene.batch.images, scene.batch.labels
    scale = 1024.0 if dtype == torch.float16 else 1.0  # as GradScaler does, or small errors underflow
    with torch.autocast("cpu", dtype):
        loss = nn.functional.cross_entropy(scene.net(images), labels)
    parameters = dict(scene.net.named_parameters())
    found = zip(parameters, torch.autograd.grad(scale * loss, tuple(parameters.values())), strict=True)
    sent = {name: gradient / scale for name, gradient in found}
    if rate is not None:
        sent = {n: ((p - rate * sent[n]) - p).detach() / -rate for n, p in parameters.items()}
    scene.update.gradients.update(sent)


@pytest.mark.parametrize(
    ("name", "dtype", "rate", "net"),
    [
        ("mlp", torch.bfloat16, 0.1, {"activation": "relu", "width": 64}),
        ("convnet", torch.bfloat16, None, {}),
        ("convnet", torch.bfloat16, 0.1, {}),
        ("convnet", torch.float16, None, {}),
        ("convnet", torch.float16, None, {"trained": True}),
    ],
)
def test_no_image_is_worse_than_expected_under_autocast(name, dtype, rate, net):
    scene = Scene(name, 3, **net)
    under_autocast(scene, dtype, rate)
    signals = scene.read().signals
    with torch.no_grad():
        true = features_of(scene.net, scene.batch.images).double()
    errors = torch.cdist(signals.values, true).min(1).values / signals.values.norm(dim=1)
    assert len(signals) == 3
    assert (errors < WITHIN * signals.uncertainty).all()


def test_exact_arithmetic_adds_nothing_and_coarse_arithmetic_adds_with_depth():
    scene = Scene("convnet", 2)
    assert not any(forward_errors(scene.net, (3, 16, 16), 1e-7, 2e-16))
    errors = forward_errors(scene.net, (3, 16, 16), 1.0, 1e-7)
    half = forward_errors(scene.net, (3, 16, 16), 0.1 * torch.finfo(torch.bfloat16).eps, 1e-7)
    assert errors[0] < errors[-1] < 1e-2
    assert half == pytest.approx([error / 2 for error in errors])


@pytest.mark.parametrize(
    ("net", "mode", "frozen"), [(Plain, "train", ()), (Blocks, "train", ("1", "3", "4", "5")), (Blocks, "eval", ())]
)
def test_no_layer_s_inputs_are_worse_than_expected_in_float32(net, mode, frozen):
    """Equations tell some of them to 1e-7, and the client's own forward pass is off by ten times as much."""
    shared = Shared(drawn(net()), mode=mode, frozen=frozen)
    reading = read_layers(shared.update, shared.model, generator=generator())
    found = [row for row in reading.layers if row["uncertainty"] is not None and row["layer"] in reading.recovered]
    assert len(found) >= 3
    for row in found:
        inputs, truth = reading.recovered[row["layer"]], shared.inputs[row["layer"]]
        errors = relative_errors(inputs, truth[ordered(inputs, truth)])
        assert errors.max() < 5 * row["uncertainty"]
