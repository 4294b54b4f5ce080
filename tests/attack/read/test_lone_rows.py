"""Images that single rows of a wide fully connected layer's gradient hold."""

import pytest
import torch
from conftest import metrics_of
from passes import generator, sample_images
from torch import nn

from attack.read.candidates import nobody
from attack.read.lone_rows import lone_rows, paired_rows
from attack.read.reader import read_layers
from attack.read.span import span_of
from attack.read.whole_pixels import WholePixels
from client.victim import share_update
from network.kinds.affine import Geometry
from network.stage import Stage
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
    flags = "--model mlp --activation relu --depth 1 --width 110 --labels dataset --batch_size 40 --signals on --seed 1"
    metrics = metrics_of(cli(*flags.split()))
    read = len(metrics["signals"])
    assert 0 < read < 40
    assert sum(psnr > 60 for psnr in metrics["psnr"]) >= read


FLATTENED = WholePixels([Stage("flatten", nn.Flatten())], [(3, 16, 16), (768,)])


def driven(images, units, pair=(0, 1)):
    """The span of a layer of so many units, two of which are driven by the images `pair` alone, all others by all."""
    flat, draw = images.double().flatten(1), generator(4)
    deltas = torch.randn(units, len(flat), generator=draw, dtype=torch.float64)
    deltas[2:4] = 0.0
    deltas[2:4, list(pair)] = torch.tensor([[0.3, 0.9], [0.8, -0.2]], dtype=torch.float64)
    gradient = (deltas @ flat / len(flat)).float()
    geometry = Geometry.of(nn.Linear(768, units), (768,))
    return span_of(gradient, geometry, len(flat), (deltas.sum(1) / len(flat)).float())


def test_two_rows_of_the_same_two_images_give_both_away():
    images = sample_images(range(6)).images
    span = driven(images, units=24)
    alone, _ = lone_rows(span, span, nobody(span))
    truth = images.double().flatten(1)
    assert torch.cdist(span.inputs(alone), truth).min() > 0.1  # no row holds one image
    c, errors = paired_rows(span, span, nobody(span), FLATTENED)
    apart, which = torch.cdist(span.inputs(c), truth).min(1)
    assert set(which.tolist()) == {0, 1}
    assert (apart / truth[which].norm(dim=1)).max() < 1e-4
    assert errors.max() < 1e-3


def test_rows_of_images_whose_pixels_are_not_whole_propose_nothing():
    images = 0.9 * sample_images(range(6)).images + 0.0137
    span = driven(images, units=24)
    assert len(paired_rows(span, span, nobody(span), FLATTENED)[0]) == 0
    assert len(paired_rows(span, span, nobody(span), WholePixels())[0]) == 0


def test_whole_pixels_are_rounded_and_others_are_left():
    whole = sample_images(range(3)).images.double().flatten(1)
    noise = 1e-4 * torch.randn(whole.shape, generator=generator(), dtype=torch.float64)
    rounded, is_whole = FLATTENED.rounded(whole + noise)
    assert is_whole.all()
    assert torch.allclose(rounded, whole, rtol=0, atol=1e-7)
    plain = torch.full_like(whole[:1], 0.5)  # a single colour may be anything
    others = torch.cat([0.9 * whole + 0.0137, plain])
    rounded, is_whole = FLATTENED.rounded(others)
    assert not is_whole.any()
    assert torch.equal(rounded, others)


def test_images_of_which_most_pixels_are_whole_are_not_rounded_to_others():
    """White sheets with a few pixels between two steps."""
    count, draw = 6, generator(5)
    images = torch.ones(count, 3, 16, 16)
    images[:, :, 4:8, 4:8] = torch.rand(count, 3, 4, 4, generator=draw)
    batch, model = (
        sample_images(range(count)),
        build_model(
            "mlp",
            image_shape=(3, 16, 16),
            num_classes=10,
            generator=generator(1),
            activation="relu",
            depth=1,
            width=300,
        ),
    )
    update = share_update(model, "mlp", images, batch.labels, 10)
    try:
        reading = read_layers(update, model, generator=generator(3))
    except ValueError:
        return  # nothing is claimed
    truth = images.double().flatten(1)
    errors, which = torch.cdist(reading.inputs.flatten(1), truth).min(1)
    assert (errors / truth[which].norm(dim=1) < 10 * reading.signals.uncertainty).all()


def test_a_padded_convolution_of_one_position_sees_its_input_and_zeros_beside():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 20, 16), nn.ReLU(), nn.Conv2d(20, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
        ).eval()
    batch = sample_images(range(2), num_classes=5)
    update = share_update(model, "net", batch.images, batch.labels, 5, generator=generator(2))
    reading = read_layers(update, model, generator=generator(3))
    notes = {row["layer"]: row["note"] for row in reading.layers}
    assert "2 of 2" in notes["2"], notes
    inputs = model[:2](batch.images).detach().double()
    errors = torch.cdist(reading.recovered["2"].flatten(1), inputs.flatten(1)).min(1).values
    assert (errors < 1e-4 * inputs.flatten(1).norm(dim=1)).all()


class Joined(nn.Module):
    """A block of a branch of two convolutions and one of a single one, whose channels are joined."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(20, 24, 1), nn.Conv2d(24, 64, 3, padding=1)
        self.other = nn.Conv2d(20, 24, 1)

    def forward(self, x):
        return torch.cat([self.second(self.first(x).relu()).relu(), self.other(x).relu()], 1)


def test_what_lies_below_an_inner_layer_of_a_block_is_not_asked_for_whole_pixels():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 20, 16), Joined(), nn.ReLU(), nn.Flatten(), nn.Linear(88, 5)).eval()
    batch = sample_images(range(2), num_classes=5)
    update = share_update(model, "net", batch.images, batch.labels, 5, generator=generator(2))
    reading = read_layers(update, model, generator=generator(3))
    notes = {row["layer"]: row["note"] for row in reading.layers}
    assert "2 of 2" in notes["1.second"], notes
