"""The client's losses, against torch's own; and that images are told apart under each of them."""

import pytest
import torch
from torch import nn

from attack.read.reader import read_layers
from client.victim import share_update
from data import load_batch, open_source
from network.zoo import build_model
from update.loss import Loss
from update.training import LocalTraining

KINDS = [Loss(), Loss(smoothing=0.1), Loss("bce"), Loss("mse")]


def case():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logits, torch.tensor([3, 0, 1, 1, 2])


def by_torch(loss, logits, labels):
    whole = nn.functional.one_hot(labels, logits.shape[1]).to(logits)
    return {
        "cross_entropy": lambda: nn.functional.cross_entropy(logits, labels, label_smoothing=loss.smoothing),
        "bce": lambda: nn.functional.binary_cross_entropy_with_logits(logits, whole),
        "mse": lambda: nn.functional.mse_loss(logits, whole),
    }[loss.name]()


@pytest.mark.parametrize("loss", KINDS, ids=str)
def test_each_loss_is_torchs_and_its_errors_are_its_derivative(loss):
    logits, labels = case()
    logits.requires_grad_()
    assert torch.allclose(loss.each(logits, labels).mean(), by_torch(loss, logits, labels))
    (by_hand,) = torch.autograd.grad(loss.each(logits, labels).sum(), logits)
    assert torch.allclose(loss.errors(logits, labels), by_hand)
    soft = nn.functional.one_hot(labels, 4).double()
    assert torch.allclose(loss.each(logits, soft), loss.each(logits, labels))


@pytest.mark.parametrize("loss", KINDS, ids=str)
def test_errors_sum_to_zero_over_the_classes_only_with_cross_entropy(loss):
    sums = loss.errors(*case()).sum(1)
    assert (sums.abs().max() < 1e-12) == loss.is_cross_entropy


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "hinge"}, "choose one of cross_entropy, bce, mse"),
        ({"smoothing": 1.0}, "below 1"),
        ({"name": "mse", "smoothing": 0.1}, "of --loss cross_entropy"),
    ],
)
def test_a_loss_that_makes_no_sense_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Loss(**settings)


READ = [({"name": "mlp", "activation": "relu", "width": 64}, loss) for loss in KINDS]
READ += [({"name": "lenet"}, loss) for loss in KINDS if loss.is_cross_entropy]  # whose smooth head has equations


@pytest.mark.parametrize(("net", "loss"), READ, ids=str)
def test_images_are_told_apart_under_every_loss_and_followed(loss, net):
    draw = torch.Generator().manual_seed(1)
    model = build_model(**net, image_shape=(3, 16, 16), num_classes=10, generator=draw)
    how = {"labels": "dataset", "num_classes": 10, "generator": draw, "image_size": 16}
    batch = load_batch(open_source("sample", None), range(3), **how)
    update = share_update(model, net["name"], batch.images, batch.labels, 10, training=LocalTraining(loss=loss))
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


def test_a_saved_update_keeps_its_loss(cli, tmp_path):
    path = tmp_path / "update.safetensors"
    own = cli("--loss", "mse", "--save_update", path, name="own")
    again = cli("--update", path, name="again")
    for name in ("images/rec_000.png", "images/rec_002.png"):
        assert (own / name).read_bytes() == (again / name).read_bytes()
    cli("--update", path, "--loss", "bce", name="wrong", expect=2)
    assert "the update has mse" in cli.err
