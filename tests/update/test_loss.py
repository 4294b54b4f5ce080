"""The client's losses, against torch's own; and that images are told apart under each of them."""

import json

import pytest
import torch
from torch import nn

from attack.ahead import with_scale
from attack.read.reader import read_layers
from client.victim import share_update
from data import load_batch, open_source
from network.zoo import build_model
from update.gradients import gradient_and_part
from update.loss import Loss
from update.training import LocalTraining

KINDS = [Loss(), Loss(smoothing=0.1), Loss("bce"), Loss("mse")]
WEIGHTED = [Loss(weights=(0.5, 1, 2, 4)), Loss(smoothing=0.1, weights=(0.5, 1, 2, 4))]


def case():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logits, torch.tensor([3, 0, 1, 1, 2])


def by_torch(loss, logits, labels):
    whole = nn.functional.one_hot(labels, logits.shape[1]).to(logits)
    weights = torch.tensor(loss.weights).to(logits) if loss.weights else None
    how = {"weight": weights, "label_smoothing": loss.smoothing}
    return {
        "cross_entropy": lambda: nn.functional.cross_entropy(logits, labels, **how),
        "bce": lambda: nn.functional.binary_cross_entropy_with_logits(logits, whole),
        "mse": lambda: nn.functional.mse_loss(logits, whole),
    }[loss.name]()


@pytest.mark.parametrize("loss", KINDS + WEIGHTED, ids=str)
def test_each_loss_is_torchs_and_its_errors_are_its_derivative(loss):
    logits, labels = case()
    logits.requires_grad_()
    whole = by_torch(loss, logits, labels)
    assert torch.allclose(loss.in_mean(logits, labels).mean(), whole)
    assert torch.allclose(loss.of_batch(labels).each(logits, labels).mean(), whole)
    (by_hand,) = torch.autograd.grad(loss.each(logits, labels).sum(), logits)
    assert torch.allclose(loss.errors(logits, labels), by_hand)
    soft = nn.functional.one_hot(labels, 4).double()
    assert torch.allclose(loss.in_mean(logits, soft), loss.in_mean(logits, labels))


@pytest.mark.parametrize("loss", KINDS + WEIGHTED, ids=str)
def test_errors_sum_to_zero_over_the_classes_only_with_cross_entropy(loss):
    sums = loss.errors(*case()).sum(1)
    assert (sums.abs().max() < 1e-12) == loss.is_cross_entropy


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "hinge"}, "choose one of cross_entropy, bce, mse"),
        ({"smoothing": 1.0}, "below 1"),
        ({"name": "mse", "smoothing": 0.1}, "of --loss cross_entropy"),
        ({"name": "bce", "weights": (1.0, 2.0)}, "of --loss cross_entropy"),
        ({"weights": (1.0, 0.0)}, "above 0"),
    ],
)
def test_a_loss_that_makes_no_sense_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Loss(**settings)


TEN = tuple(torch.linspace(0.2, 5, 10).tolist())
OF_TEN = [*KINDS, Loss(weights=TEN), Loss(smoothing=0.1, weights=TEN)]
READ = [({"name": "mlp", "activation": "relu", "width": 64}, loss) for loss in OF_TEN]
READ += [({"name": "lenet"}, loss) for loss in OF_TEN if loss.is_cross_entropy]  # whose smooth head has equations


@pytest.mark.parametrize(("net", "loss"), READ, ids=str)
def test_images_are_told_apart_under_every_loss_and_followed(loss, net):
    draw = torch.Generator().manual_seed(1)
    model = build_model(**net, image_shape=(3, 16, 16), num_classes=10, generator=draw)
    how = {"labels": "dataset", "num_classes": 10, "generator": draw, "image_size": 16}
    batch = load_batch(open_source("sample", None), range(3), **how)
    update = share_update(model, net["name"], batch.images, batch.labels, 10, training=LocalTraining(loss=loss))
    update, _ = with_scale(update, model, draw, reads=True)
    reading = read_layers(update, model, generator=draw)
    assert len(reading) == 3
    assert sorted(reading.signals.labels.tolist()) == sorted(batch.labels.tolist())
    if net["name"] == "mlp":  # down to the pixels
        pixels = reading.inputs.reshape(3, -1).float()
        off = torch.cdist(pixels, batch.images.flatten(1)).min(1).values / pixels.norm(dim=1)
        assert reading.start <= 1
        assert off.max() < 1e-3


def test_label_smoothing_is_cross_entropys(cli):
    cli("--loss", "bce", "--label_smoothing", "0.1", expect=2)
    assert "of --loss cross_entropy" in cli.err


@pytest.mark.parametrize("defence", ["none", "dpsgd:1000:1e-6"])
@pytest.mark.parametrize("loss", [Loss(weights=TEN), Loss(smoothing=0.1, weights=TEN)], ids=str)
def test_a_client_with_class_weights_shares_torchs_gradient(loss, defence):
    draw = torch.Generator().manual_seed(1)
    model = build_model("mlp", image_shape=(3, 16, 16), num_classes=10, generator=draw).double()
    images, labels = torch.rand(3, 3, 16, 16, generator=draw).double(), torch.tensor([3, 8, 8])
    training = LocalTraining(loss=loss)
    update = share_update(model, "mlp", images, labels, 10, training=training, defence=defence, generator=draw)
    expected = torch.autograd.grad(by_torch(loss, model(images), labels), tuple(model.parameters()))
    for found, wanted in zip(update.gradients.values(), expected, strict=True):
        assert (found - wanted).abs().max() < (1e-12 if defence == "none" else 0.01)


def test_a_part_of_the_batch_counts_as_it_does_in_the_whole():
    draw = torch.Generator().manual_seed(1)
    images, labels, loss = torch.rand(4, 3, 16, 16, generator=draw).double(), torch.tensor([3, 8, 0, 9]), OF_TEN[-1]
    model = build_model("mlp", image_shape=(3, 16, 16), num_classes=10, generator=draw).double()
    every = [gradient_and_part(model, images, labels, torch.tensor([i]), loss) for i in range(4)]
    for layer, whole in enumerate(every[0][0]):
        assert torch.allclose(sum(part[layer] for _, part in every) / 4, whole)


def test_class_weights_are_one_for_each_class(cli):
    cli("--class_weights", "1,2,3", expect=2)
    assert "3 numbers for 10 classes" in cli.err


@pytest.mark.parametrize("flags", [("--loss", "mse"), ("--class_weights", "1,2,3,4,5,6,7,8,9,1")])
def test_a_saved_update_keeps_its_loss(cli, tmp_path, flags):
    path = tmp_path / "update.safetensors"
    own = cli(*flags, "--save_update", path, name="own")
    again = cli("--update", path, name="again")
    for name in ("images/rec_000.png", "images/rec_002.png"):
        assert (own / name).read_bytes() == (again / name).read_bytes()
    cli("--update", path, "--loss", "bce", name="wrong", expect=2)
    assert f"the update has {'mse' if 'mse' in flags else 'cross_entropy'}" in cli.err


def test_a_run_under_class_weights_is_resumed(cli):
    run = cli("--class_weights", "1,2,3,4,5,6,7,8,9,1")
    cli("--resume", run, "--n_iter", 6)
    assert json.loads((run / "config.json").read_text())["class_weights"] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 1]
