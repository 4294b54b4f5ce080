"""A fully connected first layer gives all images away, whatever the client's steps were."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import metrics_of, pictures_of
from torch import nn

from attack.ahead import Means, read_ahead
from attack.local import unrolled
from attack.local.columns import ColumnSearch
from attack.local.first_layer import NoSuchLayerError, read_first_layer
from attack.local.levels import off_levels, snapped
from attack.local.unrolled import Assignment, Training
from attack.match.replay import left_over, replay_alone
from attack.read.span import span_of
from attack.solve.budget import OutOfTimeError, WorkBudget, unlimited
from client.victim import share_update
from data import load_batch, open_source
from network.head import features_of
from network.kinds.affine import Geometry
from network.tracing import stages
from network.zoo import build_model
from update.optimiser import LocalOptimiser
from update.training import LocalTraining, train_locally


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@cache
def images(count, first=0):
    draw = {"num_classes": 10, "generator": generator(), "image_size": 16}
    return load_batch(open_source("sample", None), range(first, first + count), labels="dataset", **draw)


class Client:
    """A float32 MLP and what a client sends after its steps, in minibatches of half of the images."""

    def __init__(self, count, passes, rate=0.02, *, batches=2, shuffle=False, pixels=lambda x: x, model="mlp", **net):
        rules = {
            name: net.pop(name) for name in ("momentum", "weight_decay", "nesterov", "name", "clip") if name in net
        }
        if model == "mlp":
            net = {"activation": "relu", "width": 96, **net}
        self.net = build_model(model, image_shape=(3, 16, 16), num_classes=10, generator=generator(1), **net)
        self.images, self.labels = pixels(images(count).images), images(count).labels
        rule = LocalOptimiser(**rules)
        self.training = LocalTraining(passes * batches, batches, rate, optimiser=rule, shuffle=shuffle)
        sent = {"options": net, "training": self.training, "generator": generator(2)}
        self.update = share_update(self.net, model, self.images, self.labels, 10, **sent)

    def read(self, seed=3, budget=None):
        return read_first_layer(self.update, self.net, generator=generator(seed), budget=budget or unlimited())

    def judged(self, reading):
        """Whose image each is, and their relative errors."""
        found, truth = reading.inputs.flatten(1), self.images.flatten(1).double()
        apart = torch.cdist(found, truth)
        return apart.argmin(1), apart.min(1).values / truth.norm(dim=1)[apart.argmin(1)]


CASES = {
    "relu": {"passes": 3, "shuffle": True},
    "relu, momentum": {"passes": 4, "shuffle": True, "momentum": 0.9, "rate": 0.005},
    "relu, decay": {"passes": 2, "weight_decay": 0.01, "momentum": 0.5, "nesterov": True},
    "sigmoid": {"passes": 2, "activation": "sigmoid", "rate": 0.1},
    "tanh": {"passes": 3, "activation": "tanh", "momentum": 0.5},
    "leaky_relu": {"passes": 1, "batches": 1, "activation": "gelu"},
}


@pytest.mark.parametrize("case", CASES)
def test_every_pixel_and_label_is_read_whatever_the_steps(case):
    client = Client(6, **CASES[case])
    reading = client.read()
    whose, errors = client.judged(reading)
    assert sorted(whose.tolist()) == list(range(6))
    assert torch.equal(reading.inputs.float(), client.images[whose])
    assert torch.equal(reading.signals.labels, client.labels[whose])
    assert bool((errors <= 5 * reading.signals.uncertainty).all())
    assert bool((reading.signals.confidence > 0.999).all())
    assert reading.is_explained
    features = features_of(client.net, client.images)[whose].double()
    assert torch.allclose(reading.signals.values, features, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_the_order_of_the_steps_is_found(activation):
    """Images come in the order of the minibatches; trained on them, the network makes the update."""
    client = Client(6, 2, 0.05, activation=activation)
    reading = client.read()
    assert reading.order is None
    whose, _ = client.judged(reading)
    assert [sorted(part.tolist()) for part in whose.split(3)] == [[0, 1, 2], [3, 4, 5]]
    again = train_locally(client.net, reading.inputs.float(), reading.signals.labels, client.training).average
    for own, sent in zip(again, client.update.gradients.values(), strict=True):
        assert float((own - sent).norm()) < 1e-3 * float(sent.norm())


def test_rows_that_one_image_alone_has_moved_tell_columns():
    """Each column pairs with one image and with no other."""
    client = Client(8, 3, shuffle=True, depth=1, width=200)
    moved, bias = (client.update.gradients[f"hidden1.{name}"] for name in ("weight", "bias"))
    span = span_of(moved, Geometry((768,), (200,)), 8, bias)
    rate = client.training.rate * client.training.steps
    layer = client.net.hidden1.double()
    weights = layer.weight.detach(), layer.bias.detach()
    after = weights[0] - rate * moved, weights[1] - rate * bias
    search = ColumnSearch(span, bias, [weights, after], lambda x: x.view(-1, 3, 16, 16))
    columns = search.lone()
    assert len(columns) >= 4
    inputs = client.images.flatten(1).double() @ span.right.T
    paired = ((inputs / span.sigma) @ torch.stack([column.coordinates for column in columns], 1)).abs()  # (8, found)
    shares = paired / paired.sum(0)
    assert shares.amax(0).min() > 0.999
    assert len(set(shares.argmax(0).tolist())) == len(columns)


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
def test_certificates_are_measured_and_as_exact_as_the_errors_that_are_claimed(activation):
    client = Client(6, 2, 0.05, activation=activation, pixels=lambda x: x * 0.97 + 0.011)  # no whole steps of 1/255
    off = {}
    for noise in (0.0, 1e-5):
        draw, sent = generator(9), client.update.gradients
        noisy = {
            n: g + noise * g.square().mean().sqrt() * torch.randn(g.shape, generator=draw) for n, g in sent.items()
        }
        disturbed = replace(client.update, gradients=noisy)
        signals = read_first_layer(disturbed, client.net, generator=generator(3), budget=unlimited()).signals
        off[noise] = (signals.certificates - 1).abs()
        assert bool((off[noise] < 5 * signals.uncertainty).all())
    assert 0 < float(off[0.0].max()) < 1e-5
    assert bool((off[0.0] != off[1e-5]).all())


def test_one_pass_tells_labels_and_order_step_by_step():
    """At a rate at which the network changes between two steps, so that labels at the server's weights are wrong."""
    client = Client(6, 1, 0.03, batches=6, shuffle=True, momentum=0.9, width=200)
    reading = client.read()
    whose, _ = client.judged(reading)
    assert torch.equal(reading.signals.labels, client.labels[whose])
    in_order = replace(client.update, training=replace(client.training, order=reading.order))
    labels = nn.functional.one_hot(reading.signals.labels, 10).float()
    assert left_over(in_order, client.net, reading.inputs.float(), labels) < 1e-4


def test_an_order_that_is_not_found_contradicts_nothing(monkeypatch):
    monkeypatch.setattr(unrolled, "MOST", 0.0)  # of any system
    client = Client(6, 2, 0.05)
    client.training = replace(client.training, order=((0, 2, 4), (1, 3, 5)) * 2)
    client.update = share_update(
        client.net, "mlp", client.images, client.labels, 10,
        options=client.update.options, training=client.training, generator=generator(2),
    )  # fmt: skip
    sent = replace(client.update, training=replace(client.training, order=None))
    known = read_ahead(sent, client.net, Means("on", "optimise", 1e9, lambda: None), generator(3))
    assert known.is_exact
    labels = nn.functional.one_hot(known.labels, 10).float()
    replay = replay_alone(known.as_trained(sent), client.net, known, known.pixels, labels, 0)
    assert replay.left > 1e-2
    assert not replay.contradicts


def test_an_order_that_the_client_drew_is_handed_on():
    client = Client(4, 1, 0.05, shuffle=True)
    known = read_ahead(client.update, client.net, Means("on", "optimise", 1e9, lambda: None), generator(3))
    assert known.is_exact
    assert sorted(sum(known.order, ())) == [0, 1, 2, 3]
    again = known.as_trained(client.update)
    assert left_over(again, client.net, known.pixels, known.labels) < 1e-4
    assert left_over(client.update, client.net, known.pixels, known.labels) > 1e-3


def shrunk(x):
    """Pixels that are no whole steps of 1/255."""
    return 0.0271 + 0.9137 * x


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_errors_are_as_large_as_expected_where_pixels_are_not_whole(activation):
    client = Client(6, 2, pixels=shrunk, activation=activation)
    assert bool((off_levels(client.images) > 0.2).all())
    reading = client.read()
    whose, errors = client.judged(reading)
    sure = reading.signals.confidence > 0.999
    assert sure.sum() >= 4
    assert bool((errors[sure] <= 5 * reading.signals.uncertainty[sure]).all())
    assert errors[sure].max() < 1e-3
    assert torch.equal(reading.signals.labels, client.labels[whose])


def test_a_share_of_another_image_that_zeros_leave_open_is_taken_out_by_whole_pixels():
    """Image 1 is off wherever image 0 is, so column 0 and half of column 1 have the zeros of column 0."""
    truth = images(3).images.flatten(1).double()
    columns = torch.randn(60, 3, generator=generator(4), dtype=torch.float64)
    columns[:30, :2], columns[30:40, 1], columns[40:, 2], columns[45:47, 0] = 0, 0, 0, 0
    weight, geometry = torch.zeros(60, 768, dtype=torch.float64), Geometry((768,), (60,))
    span = span_of((columns @ truth).float(), geometry, 3, columns.sum(1).float())
    search = ColumnSearch(span, columns.sum(1), [(weight, weight[:, 0])], lambda x: x.view(-1, 3, 16, 16))
    own = torch.linalg.lstsq(span.left, columns * span.rows[:, None]).solution
    own = torch.stack([own[:, 0] + 0.5 * own[:, 1], own[:, 1], own[:, 2]])
    mixed = search.images([search.settled(c / c.norm()) for c in own])
    assert mixed.is_open.tolist() == [False, True, False]
    assert float((mixed.inputs[1] - truth[1]).norm() / truth[1].norm()) > 0.01
    found = search.told_by_levels(mixed)
    assert torch.allclose(found.inputs, truth, atol=1e-4)


def test_images_that_are_nearly_right_snap_to_whole_pixels():
    truth = images(5).images.double()
    basis = torch.linalg.qr(truth.flatten(1).T)[0].T
    drawn = torch.randn(5, 5, generator=generator(1), dtype=torch.float64)
    off = (truth.flatten(1) + 0.003 * drawn @ basis).clone()
    off[4] = off[0] + 0.3 * (off[1] - off[0])  # a mixture of two
    found, is_whole = snapped(off, basis, lambda x: x.view(-1, 3, 16, 16), lambda x: x.flatten(1))
    assert is_whole.tolist() == [True, True, True, True, False]
    assert torch.equal(found[:4].float(), truth[:4].float())
    assert torch.equal(found[4].flatten(), off[4])


def test_one_image_alone_is_read():
    client = Client(1, 3, batches=1)
    _, errors = client.judged(client.read())
    assert float(errors) < 1e-6


def test_images_that_are_alike_are_counted():
    client = Client(3, 2, batches=1, pixels=lambda x: x[[0, 1, 1]])
    with pytest.raises(ValueError, match=r"for 3 images|of 3 images"):
        client.read()


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_images_of_one_colour_are_read_right_or_not_at_all(activation):
    """Their pixels have no differences, which independent component analysis begins with."""
    colours = torch.tensor([[0.2, 0.5, 0.3], [0.8, 0.1, 0.4]])
    client = Client(2, 2, activation=activation, pixels=lambda x: colours[:, :, None, None].expand(x.shape))
    try:
        reading = client.read()
    except ValueError:
        return
    _, errors = client.judged(reading)
    sure = reading.signals.confidence > 0.999
    assert bool((errors[sure] <= 5 * reading.signals.uncertainty[sure]).all())


def test_whole_pixels_of_a_few_colours_prove_nothing():
    """Two flat images have three numbers each: a mixture that is whole by chance is no image."""
    colours = torch.tensor([[51.0, 102, 153], [0, 204, 51]], dtype=torch.float64) / 255
    flat = colours.repeat_interleave(64, 1)
    basis = torch.linalg.qr(flat.T)[0].T
    _, is_whole = snapped(flat.mean(0, keepdim=True), basis, lambda x: x.view(-1, 3, 8, 8), lambda x: x)
    assert not is_whole.any()


def test_images_without_zeros_enough_are_counted():
    with pytest.raises(ValueError, match="0 of 4 images have zeros enough at hidden1"):
        Client(4, 2, width=12).read()


@pytest.mark.parametrize(
    "settings",
    [{"name": "adam"}, {"clip": 1.0}, {"model": "lenet"}],
    ids=["adam", "clip", "convolution"],
)
def test_what_is_no_sum_over_images_is_left_alone(settings):
    client = Client(2, 1, **settings)
    with pytest.raises(NoSuchLayerError, match=r"fully connected layer|no sum"):
        client.read()


def test_the_clock_ends_the_search():
    with pytest.raises(OutOfTimeError):
        Client(4, 1).read(budget=WorkBudget(deadline=0.0))


def test_too_large_a_system_leaves_the_order_open():
    client = Client(6, 3)
    client.update = replace(client.update, training=replace(client.training, steps=6))
    reading = client.read()
    assert reading.is_explained


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_in_kernel_form_is_the_clients(momentum):
    client = Client(4, 2, 0.1, momentum=momentum, activation="tanh", width=16)
    chain = stages(client.net.double().requires_grad_(False))[1:]
    goal = {name: gradient.double() for name, gradient in client.update.gradients.items()}
    training = Training(chain, client.labels, client.training, goal)
    places = Assignment(client.training, 4)
    inputs = client.images.flatten(1).double()
    right = places.of([part.tolist() for part in client.training.schedule(4)], inputs)
    assert float(training.left(inputs, right).norm()) < 1e-4
    assert float(training.left(inputs, right.flip(0)).norm()) > 1e-3


def test_weights_are_rounded_to_the_nearest_order():
    places = Assignment(LocalTraining(4, 2, 0.1, shuffle=True), 4)
    order = ((1, 3), (0, 2), (0, 1), (2, 3))
    weights = places.of(order, torch.zeros(1, dtype=torch.float64))
    noisy = weights + 0.1 * torch.rand(4, 4, generator=generator(), dtype=torch.float64)
    assert places.rounded(noisy.flatten()) == order
    assert torch.equal(places.weights(weights.flatten()), weights)
    assert float(places.sums(weights.flatten()).abs().max()) == 0


MLP = ["--model", "mlp", "--activation", "relu", "--width", 128, "--signals", "auto"]
STEPS = ["--local_steps", 6, "--local_lr", 0.02, "--local_batches", "2,1", "--local_shuffle", "--local_momentum", 0.9]


def test_a_shuffled_client_is_read_and_certified_by_its_first_layer(cli):
    run = cli(*MLP, *STEPS, "--save_update", cli.folder / "u.npz", name="whole")
    figures = metrics_of(run)
    assert figures["psnr_mean"] == 100
    assert figures["label_accuracy"] == 1
    assert figures["explains_first_layer"] is True
    assert all(signal["confidence"] > 0.999 for signal in figures["signals"])
    assert "read at the first layer" in cli.out
    again = cli("--update", cli.folder / "u.npz", "--signals", "auto", name="again")
    assert [p.tolist() for p in pictures_of(run)] == [p.tolist() for p in pictures_of(again)]
