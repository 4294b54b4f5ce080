"""The image of a batch of one, from the gradients of a patch projection and of the positions behind it."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import config_of, metrics_of, without_times
from torch import nn

from attack.ahead import Means, read_ahead
from attack.read.by_positions import NoEmbeddingError, VagueImageError, read_by_positions
from attack.read.forecast import explain
from attack.read.reader import read_layers
from client.victim import share_update
from data import load_batch, open_source
from network.embedding import patch_embedding
from network.head import features_of
from network.tracing import stages
from network.zoo import build_model
from update.optimiser import LocalOptimiser
from update.training import FEDSGD, LocalTraining

FILE = Path(transformers.__file__)
PLACED = ("with_class_token", "with_mean", "with_spare_places", "cut", "gridded")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Client:
    """A transformer and what a client with few images sends."""

    def __init__(self, name, count=1, training=FEDSGD, **how):
        model = f"{FILE}:{name}"
        self.net = build_model(model, image_shape=(3, 16, 16), num_classes=10, generator=generator(1))
        draw = {"num_classes": 10, "generator": generator(), "image_size": 16}
        self.batch = load_batch(open_source("sample", None), range(5, 5 + count), labels="dataset", **draw)
        pair = (self.batch.images, self.batch.labels)
        self.update = share_update(self.net, model, *pair, 10, training=training, generator=generator(2), **how)

    def error(self, reading):
        """Relative, of the image."""
        truth = self.batch.images.double()
        return float((reading.inputs - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", PLACED)
def test_one_image_is_read_to_its_pixels_with_its_label(name):
    client = Client(name)
    reading = read_by_positions(client.update, client.net)
    assert client.error(reading) < 3 * float(reading.signals.uncertainty) < 1e-3
    assert reading.start == 0
    assert reading.signals.labels.tolist() == client.batch.labels.tolist()
    assert abs(float(reading.signals.certificates) - 1) < 1e-4
    assert reading.layers[0]["layer"] == "project"


def test_several_steps_of_one_image_are_one_equation():
    rule = LocalOptimiser(momentum=0.9, weight_decay=0.01)
    client = Client("with_class_token", training=LocalTraining(5, 1, 0.01, optimiser=rule))
    assert client.error(read_by_positions(client.update, client.net)) < 1e-2


def test_steps_that_do_not_add_up_are_not_read():
    training = LocalTraining(3, 1, 0.001, optimiser=LocalOptimiser("adam"))
    client = Client("with_class_token", training=training)
    with pytest.raises(NoEmbeddingError):
        read_by_positions(client.update, client.net)


def test_two_images_that_are_declared_as_one_are_not_believed():
    client = Client("with_class_token", count=2)
    with pytest.raises(ValueError, match="within"):
        read_by_positions(replace(client.update, batch_size=1), client.net)


def test_noise_is_not_taken_for_an_image():
    client = Client("with_class_token", defence="noise:0.01")
    with pytest.raises(ValueError, match="within"):
        read_by_positions(client.update, client.net)


def test_an_image_that_is_only_likely_begins_the_attack(cli):
    flags = ["--model", f"{FILE}:with_class_token", "--batch_size", 1, "--signals", "auto", "--labels", "dataset"]
    run = cli(*flags, "--defence", "bfloat16", "--max_evals", 8)
    assert "1 of 1 images told apart, down to the inputs of head" in cli.out
    assert "the attack begins with the likely image" in cli.out
    assert metrics_of(run)["psnr_mean"] > 20
    whole = without_times(run)
    cli(*flags, "--defence", "bfloat16", "--n_iter", 1, name="halves")
    halves = cli(*flags, "--defence", "bfloat16", "--max_evals", 8, "--resume", name="halves")
    assert without_times(halves)[1:] == whole[1:]
    grey = cli(*flags, "--defence", "bfloat16", "--max_evals", 8, "--init", "uniform", name="uniform")
    assert metrics_of(grey)["psnr_mean"] < 15


def test_an_image_that_is_no_likelier_than_grey_is_not_proposed():
    client = Client("with_class_token", defence="noise:0.01")
    with pytest.raises(VagueImageError) as vague:
        read_by_positions(client.update, client.net)
    assert vague.value.image is None


def test_as_many_patches_as_channels_are_said_to_be_too_many():
    client = Client("narrow")
    with pytest.raises(ValueError, match="16 patches are not told by tokens of 16 channels"):
        read_by_positions(client.update, client.net)


def test_frozen_positions_tell_nothing():
    client = Client("with_class_token", frozen=["places"])
    with pytest.raises(NoEmbeddingError, match=r"places|no learnable"):
        read_by_positions(client.update, client.net)


def test_dropout_behind_the_tokens_hides_no_pixels():
    client = Client("with_class_token")
    model = copy.deepcopy(client.net).train()
    loss = nn.functional.cross_entropy(model(client.batch.images), client.batch.labels)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    reading = read_by_positions(replace(client.update, gradients=gradients), client.net)
    assert client.error(reading) < 1e-3
    assert reading.signals.labels.tolist() == client.batch.labels.tolist()


def test_clipping_hides_no_pixels():
    client = Client("with_class_token", defence="clip:0.1")
    assert client.update.is_rescaled
    assert client.error(read_by_positions(client.update, client.net)) < 1e-3


def test_a_server_knows_all_of_one_image_before_the_first_step():
    client = Client("cut")
    known = read_ahead(client.update, client.net, Means("auto", "none", 60.0, lambda: None), generator(3))
    assert known.is_exact


def test_the_command_line_reports_an_exact_image(cli):
    flags = ["--model", f"{FILE}:with_mean", "--batch_size", 1, "--signals", "on", "--labels", "dataset"]
    run = cli(*flags, "--mean", "0.5", "--std", "0.3")
    assert "1 of 1 images told apart, pixels and all" in cli.out
    metrics = metrics_of(run)
    assert metrics["psnr_mean"] > 60
    assert metrics["label_accuracy"] == 1
    assert metrics["ended_by"] == "exact"
    assert metrics["signals"][0]["confidence"] > 0.99
    assert config_of(run)["mean"] == [0.5]


def test_one_image_is_promised_and_two_are_not():
    net = Client("with_class_token").net
    embedding = patch_embedding(net, (3, 16, 16))
    one, two = (explain(stages(net), (3, 16, 16), count, embedding) for count in (1, 2))
    assert [(row["layer"], row["known"], row["deepest"]) for row in one] == [
        ("project", True, True),
        ("head", True, False),
    ]
    assert [row["deepest"] for row in two] == [False, True]
    assert two[0]["reason"] == "the gradient of places is a sum over the images of the batch"


def test_explain_says_it(cli):
    cli("--model", f"{FILE}:with_class_token", "--explain", "--batch_size", 1)
    assert "the deepest inputs to be expected exactly: the inputs of project" in cli.out


@pytest.mark.parametrize(("count", "name"), [(2, "with_mean"), (4, "with_class_token"), (6, "with_class_token")])
def test_several_images_are_told_apart_at_the_head(count, name):
    client = Client(name, count)
    reading = read_layers(client.update, client.net, generator=generator(3))
    found, truth = reading.signals.values, features_of(client.net, client.batch.images).double()
    nearest = torch.cdist(found, truth).argmin(1)
    assert sorted(nearest.tolist()) == list(range(count))
    assert reading.signals.labels.tolist() == client.batch.labels[nearest].tolist()
    assert ((found - truth[nearest]).norm(dim=1) < 1e-3 * found.norm(dim=1)).all()
