"""Images that were told apart at one layer are followed to the layers below it one by one."""

from dataclasses import replace

import pytest
import torch
from passes import generator, sample_images
from torch import nn

from attack.read import reader as reader_module
from attack.read.candidates import ImageEquations, nobody
from attack.read.carried import carried_down, layers_below, owned
from attack.read.layer_choice import candidate_layers
from attack.read.reader import read_layers
from client.victim import share_update
from network.chain import input_shapes
from network.stage import run
from network.tracing import stages
from network.zoo import build_model
from update.loss import CROSS_ENTROPY

SHAPE = (3, 16, 16)


def no_walk(*_, **__):
    """A walk that ends where it begins."""
    raise ArithmeticError


class Client:
    """A ReLU network of two hidden layers, its float32 update of a few images, and its layers in float64."""

    def __init__(self, count=10, width=80):
        net = {"activation": "relu", "depth": 2, "width": width}
        self.net = build_model("mlp", image_shape=SHAPE, num_classes=10, generator=generator(1), **net)
        self.batch = sample_images(range(count))
        self.update = share_update(self.net, "mlp", self.batch.images, self.batch.labels, 10)
        self.chain = stages(self.net.double().requires_grad_(False))
        self.layers = candidate_layers(self.chain, SHAPE, self.update.gradients)
        self.like = self.batch.images.double()[:0].flatten()

    def span(self, layer):
        return layer.span(self.update.gradients, len(self.batch.labels), self.like)

    def found(self, layer, which, error=1e-7):
        """Signals of the images `which` at a layer, as a reading would have them."""
        values = run(self.chain[: layer.index], self.batch.images[which].double())
        span = self.span(layer)
        equations, labels = ImageEquations(span, layer.layer, layer.tail), self.batch.labels[which]
        errors = torch.full((len(which),), error, dtype=torch.float64)
        signals, _ = equations.as_they_are(values @ span.basis.T, labels, errors)
        return replace(signals, values=values)

    def carried(self, found, upper, lower):
        how = (self.span(lower), CROSS_ENTROPY, self.chain, input_shapes(self.chain, SHAPE))
        return carried_down(found, upper, lower, *how)


def test_some_images_of_a_batch_are_carried_down_to_their_pixels():
    client = Client()
    first, second, _ = client.layers
    assert [layer.name for layer in layers_below(client.layers, second, client.chain)] == ["hidden1"]
    which = [7, 2, 5]
    below = client.carried(client.found(second, which), second, first)
    truth = client.batch.images[which].double().flatten(1)
    assert below.labels.tolist() == client.batch.labels[which].tolist()
    errors = (below.values - truth).norm(dim=1) / truth.norm(dim=1)
    assert errors.max() < 1e-4
    assert (errors < 10 * below.uncertainty).all()


def test_what_is_no_image_of_the_batch_is_not_carried_down():
    client = Client()
    first, second, _ = client.layers
    found = client.found(second, [0, 1, 2])
    mixed = replace(found, values=found.values + 0.05 * found.values[[1, 2, 0]])
    assert len(client.carried(mixed, second, first)) == 0
    strange = replace(found, labels=(found.labels + 1) % 10)
    assert len(client.carried(strange, second, first)) == 0


def test_a_layer_that_does_not_determine_its_inputs_takes_no_images():
    client = Client()
    first, second, _ = client.layers
    span = replace(client.span(first), spanned=False)
    how = (CROSS_ENTROPY, client.chain, input_shapes(client.chain, SHAPE))
    with pytest.raises(ValueError, match="does not determine"):
        carried_down(client.found(second, [0]), second, first, span, *how)


def test_images_that_go_down_further_than_others_come_first_with_their_pixels(monkeypatch):
    client, down = Client(), reader_module.carried_down
    ten = client.found(client.layers[1], list(range(10)))
    monkeypatch.setattr(reader_module, "unmix", lambda span, *_, **how: nobody(span) if how["given"] else ten)
    monkeypatch.setattr(reader_module, "carried_down", lambda *given: down(*given).pick([7, 2, 5]))
    monkeypatch.setattr(reader_module, "descend", no_walk)
    net = nn.Module.float(client.net).requires_grad_(True)
    reading = read_layers(client.update, net, generator=generator(3))
    assert (len(reading), len(reading.pixels)) == (10, 3)
    truth = client.batch.images.double()
    errors, which = torch.cdist(reading.pixels.flatten(1), truth.flatten(1)).min(1)
    assert errors.max() < 1e-3
    below = stages(net.double())[: reading.start]
    assert below
    errors, order = torch.cdist(reading.inputs, run(below, truth)).min(1)
    assert errors.max() < 1e-3
    assert order[:3].tolist() == which.tolist()
    assert sorted(order.tolist()) == list(range(10))
    assert torch.equal(reading.signals.labels, client.batch.labels[order])


def test_images_whose_pixels_are_no_ones_own_are_left_out():
    client = Client()
    chain = client.chain[: client.layers[1].index]
    images = client.batch.images.double()
    inputs = run(chain, images[:4])
    which, kept = owned(images[[2, 0, 5, 3, 3]], inputs, chain)
    assert which == [2, 0]
    assert torch.equal(kept, images[[2, 0]])


def test_a_reading_of_some_images_ends_at_their_pixels_and_finds_more_there(monkeypatch):
    client, peeled = Client(), reader_module.unmix
    three = client.found(client.layers[1], [4, 8, 1])

    def only_three_at_hidden2(span, layer, tail, **how):
        if how["given"] is not None:
            return peeled(span, layer, tail, **how)
        return three if how["is_sparse"] else nobody(span)

    monkeypatch.setattr(reader_module, "unmix", only_three_at_hidden2)
    net = nn.Module.float(client.net).requires_grad_(True)
    reading = read_layers(client.update, net, generator=generator(3))
    assert reading.start == 0
    assert len(reading) > 3
    truth = client.batch.images.double().flatten(1)
    errors, which = torch.cdist(reading.inputs.flatten(1), truth).min(1)
    assert (errors / truth[which].norm(dim=1)).max() < 1e-4
    assert len(set(which.tolist())) == len(reading)
    assert torch.equal(reading.signals.labels, client.batch.labels[which])
    notes = {row["layer"]: row["note"] for row in reading.layers}
    assert "images known by hidden2" in notes["hidden1"]
