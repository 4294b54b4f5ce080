"""Images that single rows of a wide fully connected layer's gradient hold."""

import pytest
import torch
from conftest import metrics_of
from passes import generator, sample_images

from attack.read.reader import read_layers
from client.victim import share_update
from network.zoo import build_model


class Wide:
    """A client of a ReLU network with one wide hidden layer, and what a reading finds in its update."""

    def __init__(self, width, count, seed=1, **settings):
        self.batch = sample_images(range(count))
        shape, net = (3, 16, 16), {"activation": "relu", "depth": 1, "width": width}
        model = build_model("mlp", image_shape=shape, num_classes=10, generator=generator(seed), **net)
        how = {"generator": generator(2), **settings}
        update = share_update(model, "mlp", self.batch.images, self.batch.labels, 10, **how)
        self.reading = read_layers(update, model, generator=generator(3))
        self.found = self.reading.signals
        self.errors = torch.cdist(self.reading.inputs.flatten(1), self.batch.images.double().flatten(1))

    @property
    def nearest(self):
        """The true image that each image found is nearest to, and the relative distance."""
        errors, which = self.errors.min(1)
        return which, errors / self.batch.images.double().flatten(1).norm(dim=1)[which]


@pytest.mark.parametrize(("width", "count"), [(200, 32), (400, 48)])
def test_a_wide_layer_gives_every_image_away_with_its_label(width, count):
    wide = Wide(width, count)
    which, errors = wide.nearest
    assert sorted(which.tolist()) == list(range(count))
    assert errors.max() < 1e-4
    assert torch.equal(wide.found.labels, wide.batch.labels[which])
    assert (errors < 10 * wide.found.uncertainty).all()
    assert (wide.found.certificates - 1).abs().max() < 1e-2
    assert wide.reading.start == 0


@pytest.mark.parametrize("seed", range(3))
def test_of_a_layer_too_narrow_for_its_batch_only_true_images_are_claimed(seed):
    wide = Wide(120, 40, seed)
    which, errors = wide.nearest
    assert 0 < len(wide.found) < 40
    assert len(set(which.tolist())) == len(which)
    assert errors.max() < 1e-3
    assert torch.equal(wide.found.labels, wide.batch.labels[which])


@pytest.mark.parametrize("defence", ["noise:1e-6", "float16"])
def test_what_is_claimed_of_a_defended_wide_layer_is_right(defence):
    wide = Wide(200, 24, defence=defence)
    assert len(wide.found)
    which, errors = wide.nearest
    assert errors.max() < 0.05
    assert (errors < 10 * wide.found.uncertainty).all()
    assert torch.equal(wide.found.labels, wide.batch.labels[which])


def test_of_rows_that_noise_drowns_nothing_is_claimed():
    with pytest.raises(ValueError, match="told apart"):
        Wide(200, 24, defence="noise:1e-3")


def test_images_read_in_part_stand_among_the_attacks_pictures(cli):
    flags = "--model mlp --activation relu --depth 1 --width 150 --labels dataset --batch_size 40 --signals on --seed 1"
    metrics = metrics_of(cli(*flags.split()))
    read = len(metrics["signals"])
    assert 0 < read < 40
    assert sum(psnr > 60 for psnr in metrics["psnr"]) >= read
