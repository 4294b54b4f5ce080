import copy
import itertools
import math
import time
from functools import cache

import pytest
import torch
from torch import nn

from attack.read import reader as reader_module
from attack.read.layer_choice import candidate_layers, order
from attack.read.layer_rows import COLUMNS
from attack.read.reader import read_layers
from client.victim import share_update
from data import load_batch, open_source
from network.chain import index_of
from network.stage import run
from network.tracing import stages
from network.zoo import build_model


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Scene:
    """A float32 net, what a client sends, and what a reading ought to find."""

    def __init__(self, name, count, num_classes=10, trained=False, labels="dataset", frozen=(), defence="none", **net):
        self.net = build_model(name, image_shape=(3, 16, 16), num_classes=num_classes, generator=generator(1), **net)
        source = open_source("sample", None)
        draw = {"num_classes": num_classes, "generator": generator(), "image_size": 16}
        self.batch = load_batch(source, range(count), labels=labels, **draw)
        if trained:  # a few steps make its softmax unlike that of random images
            more = load_batch(source, range(20, 120), labels="dataset", **draw)
            optimiser = torch.optim.Adam(self.net.parameters(), 3e-3)
            for _ in range(20):
                optimiser.zero_grad()
                nn.functional.cross_entropy(self.net(more.images), more.labels).backward()
                optimiser.step()
        self.update = share_update(
            self.net,
            name,
            self.batch.images,
            self.batch.labels,
            num_classes,
            frozen=frozen,
            defence=defence,
            generator=generator(2),
        )

    def read(self, seed=3, seconds=math.inf, **settings):
        return read_layers(self.update, self.net, generator=generator(seed), max_seconds=seconds, **settings)

    @torch.no_grad()
    def truth(self, start):
        return run(self.chain[:start], self.batch.images.double())

    @property
    def chain(self):
        return stages(copy.deepcopy(self.net).double())

    def errors(self, reading):
        """By image read: the relative error of its inputs, and which of the batch it is, by its features."""
        features = self.truth(len(stages(self.net)) - 1)
        which = torch.cdist(reading.signals.values, features).argmin(1)
        truth = self.truth(reading.start)[which].flatten(1)
        return (reading.inputs.flatten(1) - truth).norm(dim=1) / truth.norm(dim=1), which


def assert_all_read(scene, reading, error=1e-3):
    off, which = scene.errors(reading)
    assert sorted(which.tolist()) == list(range(len(scene.batch.labels)))  # each once
    assert torch.equal(reading.signals.labels, scene.batch.labels[which])
    assert off.max() < error
    errors = scene.chain[-1].module(reading.signals.values).softmax(1) - nn.functional.one_hot(
        reading.signals.labels, scene.update.num_classes
    )
    assert torch.allclose(reading.signals.deltas, errors.detach(), atol=1e-5)
    assert (reading.signals.uncertainty.diff() >= 0).all()  # surest first


def row_of(reading, name):
    return next(row for row in reading.layers if row["layer"] == name)


KINDS = [
    ("mlp", 6, {"width": 64}, "flatten"),
    ("mlp", 6, {"width": 64, "activation": "tanh"}, "flatten"),
    ("mlp", 6, {"width": 64, "activation": "gelu"}, "flatten"),
    ("mlp", 6, {"width": 64, "activation": "relu", "depth": 3}, "flatten"),
    ("lenet", 3, {}, "conv1"),
    ("lenet5", 4, {}, "flatten"),
    ("convnet", 3, {}, "flatten"),
    ("resnet18", 3, {}, "body.layer1.0"),
    pytest.param("resnet18_cifar", 1, {}, "body.conv1", marks=pytest.mark.long),
    ("vgg11", 3, {}, "conv3"),
]


@cache
def read_once(name, count, **net):
    """A scene and its reading, for all tests that look at it."""
    scene = Scene(name, count, **net)
    return scene, scene.read()


@pytest.mark.parametrize(("name", "count", "net", "start"), KINDS)
def test_every_kind_of_network_gives_its_images_away(name, count, net, start):
    """With how deep the walk leads: 0 is the images themselves."""
    scene, reading = read_once(name, count, **net)
    assert_all_read(scene, reading)
    assert reading.start <= index_of(scene.chain, start)


@pytest.mark.parametrize(
    ("name", "net"), [("mlp", {"width": 64}), ("lenet", {}), ("convnet", {}), ("mlp", {"activation": "relu"})]
)
def test_a_trained_network_gives_them_away_as_well(name, net):
    scene = Scene(name, 3, trained=True, **net)
    reading = scene.read()
    has_walked_to_pixels = name == "lenet" and reading.start == 0  # two convolutions below what was told apart
    assert_all_read(scene, reading, error=1e-2 if has_walked_to_pixels else 1e-3)


@pytest.mark.parametrize(("activation", "depth"), [("sigmoid", 2), ("relu", 3)])
def test_there_may_be_more_images_than_classes_and_labels_that_repeat(activation, depth):
    scene = Scene("mlp", 14, num_classes=10, activation=activation, depth=depth, width=128)
    assert len(scene.batch.labels.unique()) < 14
    reading = scene.read()
    assert_all_read(scene, reading)
    assert reading.start == 0
    assert reading.inputs.shape == (14, 3, 16, 16)


@pytest.mark.parametrize("defence", ["none", "noise:1e-5"])
def test_a_convolution_with_a_channel_for_each_patch_gives_its_images_away(defence):
    """Four images of 16 positions in 64 channels; errors are as expected without a row to spare that shows noise."""
    parts = (nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 24, 3, 2, 1), nn.Conv2d(24, 64, 3, 1, 1))
    last = nn.Linear(64 * 16, 10)
    weights = generator()
    for layer in (*parts, last):
        bound = layer.weight[0].numel() ** -0.5
        for parameter in layer.parameters():
            parameter.detach().uniform_(-bound, bound, generator=weights)
    net = nn.Sequential(*itertools.chain(*((part, nn.ReLU()) for part in parts)), nn.Flatten(), last)
    draw = {"labels": "dataset", "num_classes": 10, "generator": generator(), "image_size": 16}
    batch = load_batch(open_source("sample", None), range(4), **draw)
    update = share_update(net, "small", batch.images, batch.labels, 10, defence=defence, generator=generator(2))
    reading = read_layers(update, net, generator=generator(3))
    assert torch.equal(reading.signals.labels.sort().values, batch.labels.sort().values)
    truth = run(stages(copy.deepcopy(net).double())[:4], batch.images.double()).detach().flatten(1)
    found = reading.recovered["4"].flatten(1)
    off = (torch.cdist(found, truth) / truth.norm(dim=1)).min(1).values
    assert ((off < 1e-6) | (off < 2 * reading.signals.uncertainty)).all()
    assert off.max() < 3e-3


def test_zeros_behind_a_relu_are_zero_however_far_the_walk_went():
    scene, reading = read_once("resnet18", 3)
    _, which = scene.errors(reading)
    stopped = scene.truth(reading.start)[which] == 0
    assert stopped.any()
    assert not reading.inputs[stopped].any()


def test_many_classes_and_random_labels():
    scene = Scene("lenet", 8, num_classes=50, labels="random")
    assert_all_read(scene, scene.read())


@pytest.mark.parametrize("name", ["convnet", "lenet", "mlp"])
def test_one_image_is_read_anywhere(name):
    scene = Scene(name, 1)
    assert_all_read(scene, scene.read(), error=1e-4)


# ----------------------------------------------------------------------------------------------------
# What is missing, noisy, or not enough


def test_a_frozen_layer_is_passed_over():
    scene = Scene("mlp", 5, activation="relu", depth=3, width=80, frozen=("hidden2",))
    reading = scene.read()
    assert_all_read(scene, reading)
    assert row_of(reading, "hidden2")["note"].startswith("the update holds no gradient of it")
    assert row_of(reading, "hidden3")["note"] == "5 of 5 images told apart"


def test_a_frozen_head_is_no_obstacle_to_the_layers_below():
    scene = Scene("mlp", 5, activation="relu", depth=3, width=80, frozen=("head",))
    assert_all_read(scene, scene.read())


def test_where_only_the_first_layer_is_frozen_its_inputs_follow_from_its_outputs_or_not_at_all():
    scene = Scene("convnet", 3, frozen=("conv1", "conv2", "conv3"))
    reading = scene.read()
    assert_all_read(scene, reading)
    assert row_of(reading, "conv3")["determined"] is False


def test_what_cannot_be_read_says_why():
    scene = Scene("convnet", 12)
    with pytest.raises(ValueError, match=r"no image can be told apart: 4 layers .* for 12 images") as caught:
        scene.read()
    assert "\n" not in str(caught.value)
    scene = Scene("convnet", 4, frozen=("head",))
    with pytest.raises(ValueError, match="head: the update holds no gradient of it"):
        scene.read()


def test_a_model_that_cannot_be_walked_says_so():
    scene = Scene("mlp", 2)
    with pytest.raises(ValueError, match="the last stage, 2, is not linear"):
        read_layers(scene.update, nn.Sequential(nn.Flatten(), nn.Linear(768, 10), nn.Tanh()), generator=generator())


def attempt(scene, seconds=math.inf, **settings):
    """A reading and no reason, or no reading and the reason."""
    try:
        return scene.read(seconds=seconds, **settings), ""
    except ValueError as error:
        return None, str(error)


RELU = ("mlp", {"activation": "relu", "depth": 3, "width": 80})
SHALLOW = ("mlp", {"activation": "relu", "depth": 1, "width": 80})
SIGMOID = ("mlp", {"width": 80})
CONVNET = ("convnet", {})


def assert_right(scene, reading):
    """Labels and features of what was read are right, and no image was read twice."""
    off, which = scene.errors(reading)
    assert len(which.unique()) == len(which)
    assert torch.equal(reading.signals.labels, scene.batch.labels[which])
    assert off.max() < 0.1
    features = (reading.signals.values - scene.truth(len(scene.chain) - 1)[which]).norm(dim=1)
    assert (features < 0.1 * reading.signals.values.norm(dim=1)).all()


@pytest.mark.parametrize(
    ("net", "defence"),
    [(net, weak) for net in (RELU, SIGMOID, CONVNET) for weak in ("noise:1e-4", "bfloat16")]
    + [(net, weaker) for net in (RELU, SIGMOID) for weaker in ("noise:1e-6", "float16")]
    + [(RELU, "topk:0.7"), (SIGMOID, "topk:0.5"), (CONVNET, "topk:0.5")],
)
def test_a_weak_defence_leaves_every_image_to_be_read(net, defence):
    name, options = net
    scene = Scene(name, 4, defence=defence, **options)
    reading = scene.read()
    assert len(reading.inputs) == 4
    assert_right(scene, reading)


@pytest.mark.parametrize(
    ("net", "defence"),
    [(SHALLOW, "noise:1e-3"), (SIGMOID, "noise:5e-4"), pytest.param(CONVNET, "noise:2e-4", marks=pytest.mark.long)],
)
def test_what_is_claimed_of_a_defended_update_is_right(net, defence):
    """Noise between what all images survive and what none does."""
    name, options = net
    scene = Scene(name, 4, defence=defence, **options)
    reading = scene.read()
    assert 1 <= len(reading.inputs) < 4
    assert_right(scene, reading)


@pytest.mark.parametrize("net", [RELU, SIGMOID, CONVNET])
def test_of_what_noise_drowns_nothing_is_claimed(net):
    name, options = net
    reading, reason = attempt(Scene(name, 4, defence="noise:1e-2", **options))
    assert reading is None
    assert "0 of 4 images told apart" in reason


class ResidualBlock(nn.Module):
    """BatchNorm, a skip, and an activation of the test's choice."""

    def __init__(self, activation, width):
        super().__init__()
        self.a, self.na = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.b, self.nb = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.inner, self.outer = activation(), activation()

    def forward(self, x):
        return self.outer(self.nb(self.b(self.inner(self.na(self.a(x))))) + x)


def fully_connected(activation):
    widths = [(768, 96), (96, 96), (96, 96)]
    layers = [layer for a, b in widths for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(96, 10))


def residual(activation):
    stem = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), activation()
    down = nn.Conv2d(64, 64, 3, stride=4, padding=1), activation()
    return nn.Sequential(*stem, *down, ResidualBlock(activation, 64), nn.Flatten(), nn.Linear(256, 10))


def leaky():
    return nn.LeakyReLU(0.1)


@pytest.mark.parametrize(
    ("network", "activation", "count", "start"),
    [
        (fully_connected, leaky, 5, 0),
        (fully_connected, nn.SiLU, 5, 0),
        (fully_connected, nn.ReLU6, 4, 0),
        (residual, leaky, 1, 5),
        (residual, nn.SiLU, 2, 5),
        (residual, nn.GELU, 2, 5),
    ],
)
def test_networks_of_other_activations_are_read(network, activation, count, start):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = network(activation).eval()
    scene = Scene("mlp", count)
    scene.net = net
    scene.update = share_update(net, "net", scene.batch.images, scene.batch.labels, 10)
    reading = scene.read()
    assert_all_read(scene, reading)
    assert reading.start <= start


# ----------------------------------------------------------------------------------------------------
# Bounds


def test_a_search_that_ends_for_want_of_work_says_so():
    """A layer that was not searched to the end is no layer in which nothing can be told apart."""
    scene = Scene("mlp", 4, activation="relu", depth=3, width=80)
    reading, reason = attempt(scene, work=0.0)
    assert reading is None
    assert "0 of 4 images told apart, then no work was left" in reason


def test_the_clock_aborts_and_says_so():
    scene = Scene("resnet18_cifar", 2)
    for seconds in (0.0, 0.5):
        began = time.perf_counter()
        reading, reason = attempt(scene, seconds)
        assert time.perf_counter() - began < seconds + 4
        notes = reason if reading is None else "; ".join(row["note"] for row in reading.layers)
        assert "the clock (--max_seconds) has stopped" in notes
        assert reading is None or reading.is_aborted
        assert seconds or reading is None


@pytest.mark.parametrize("net", [RELU, SIGMOID])
def test_what_is_read_depends_on_work_and_not_on_the_clock(net, monkeypatch):
    """The clock is asked as often as ever and always says that hardly any time is left."""
    name, options = net
    scene = Scene(name, 4, **options)
    first = scene.read()
    real, began = time.perf_counter, time.perf_counter()
    monkeypatch.setattr(time, "perf_counter", lambda: began + 1000 * (real() - began))
    second = scene.read(seconds=1e6)
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.signals.values, second.signals.values)
    assert not second.is_aborted


def test_a_layer_that_fails_ends_no_reading(monkeypatch):
    real, calls = reader_module.unmix, []

    def failing(span, *args, **settings):
        calls.append(span)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("singular")
        return real(span, *args, **settings)

    monkeypatch.setattr(reader_module, "unmix", failing)
    scene = Scene("mlp", 5, activation="relu", depth=3, width=80)
    reading = scene.read()
    assert_all_read(scene, reading)
    assert any(row["note"].startswith("singular") for row in reading.layers)


def test_a_walk_that_fails_leaves_what_was_known(monkeypatch):
    def failing(*args, **settings):
        raise torch.linalg.LinAlgError("singular")

    monkeypatch.setattr(reader_module, "descend", failing)
    scene = Scene("mlp", 5, activation="relu", depth=3, width=80)
    reading = scene.read()
    assert_all_read(scene, reading)
    assert reading.start == 0  # one by one, where each layer's gradient spans its inputs
    assert "images known by hidden2" in reading.layers[0]["note"]


def test_the_same_generator_reads_the_same():
    scene, ticks = Scene("mlp", 5, width=64), []
    state = torch.get_rng_state()
    first, second = (scene.read(seed=7, tick=lambda: ticks.append(1)) for _ in range(2))
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.signals.values, second.signals.values)
    assert ticks
    assert torch.equal(state, torch.get_rng_state())  # nothing is drawn from elsewhere


def test_the_rows_say_what_was_measured():
    reading = read_once("resnet18", 3)[1]
    names = [row["layer"] for row in reading.layers]
    assert (names[0], names[-1]) == ("body.conv1", "head")
    for row in reading.layers:
        assert tuple(row) == COLUMNS
        assert row["rank_bound"] == 3 * row["positions"]
        assert row["note"] or not row["seconds"]
        assert row["residual"] is None or math.isfinite(row["residual"])
    asked = [row for row in reading.layers if row["dimension"]]
    assert [row["dimension"] for row in asked] == [3]
    assert asked[0]["gap"] > 100
    assert asked[0]["rank"] == asked[0]["rank_bound"]
    assert row_of(reading, "body.layer1.0.conv1")["determined"]
    assert row_of(reading, "body.layer1.0.conv1")["uncertainty"] < 1e-3


# ----------------------------------------------------------------------------------------------------
# Which layers


def choice(name, count, side=32, **net):
    model = build_model(name, image_shape=(3, side, side), num_classes=10, generator=generator(), **net)
    chain = stages(model)
    return [layer.name for layer in order(candidate_layers(chain, (3, side, side), {}), count, torch.zeros(1))]


def test_the_deepest_layer_with_room_comes_first_and_the_head_late():
    assert choice("resnet18", 4)[0] == "body.layer2.1.conv1"
    assert choice("resnet18", 16)[0] == "body.layer3.1.conv1"
    assert choice("resnet18_cifar", 16)[0] == "body.layer4.1.conv1"
    assert choice("mlp", 8, activation="relu", depth=3) == ["hidden2", "hidden3", "head", "hidden1"]
    assert choice("mlp", 8)[0] == "hidden1"  # behind it a sigmoid, through which equations are followed
    assert choice("convnet", 8) == ["head"]
    assert choice("convnet", 10) == []


def test_a_batchnorm_stands_in_for_a_bias():
    scene = Scene("vgg11", 2)
    found = {p.name: p.bias_gradient for p in candidate_layers(stages(scene.net), (3, 16, 16), scene.update.gradients)}
    outputs, net = [], scene.net
    net.conv8.register_forward_hook(lambda module, inputs, out: outputs.append(out))
    loss = nn.functional.cross_entropy(net(scene.batch.images), scene.batch.labels)
    (delta,) = torch.autograd.grad(loss, outputs)
    assert torch.allclose(found["conv8"], delta.sum((0, 2, 3)), atol=1e-6)


def test_the_network_behind_a_block_takes_its_skip_along():
    net = build_model("resnet18", image_shape=(3, 32, 32), num_classes=10, generator=generator())
    chain, images = stages(net), torch.rand(2, 3, 32, 32, generator=generator())
    for layer in candidate_layers(chain, (3, 32, 32), {}):
        inputs = run(chain[: layer.index], images)
        assert torch.allclose(layer.tail(inputs, layer.layer(inputs)), net(images), atol=1e-5), layer.name
