"""The number of images in an update, read off the ranks of its gradients."""

import itertools

import pytest
import torch
from conftest import generator

from attack.read.batch_size import count_images, noise_of_weights
from data import load_batch, open_source
from network.parameters import trainable
from network.zoo import build_model
from update.gradients import averaged_gradient
from update.received import averaged_gradients, new_weights
from update.training import LocalTraining

SHAPE = (3, 16, 16)


def case(name, batch_size):
    """A model with 10 classes, and the gradients of a batch."""
    model = build_model(name, image_shape=SHAPE, num_classes=10, generator=generator(1))
    how = {"labels": "random", "num_classes": 10, "generator": generator(), "image_size": 16}
    batch = load_batch(open_source("sample", None), range(batch_size), **how)
    gradients = averaged_gradient(model, batch.images, batch.labels)
    return model, dict(zip(trainable(model), gradients, strict=True))


def counted_after_a_step(model, gradients, rate, kind):
    old = {name: parameter.detach() for name, parameter in trainable(model).items()}
    new = {name: old[name] - rate * gradient for name, gradient in gradients.items()}
    sent = new if kind == "weights" else {name: new[name] - old[name] for name in new}
    noise = noise_of_weights(new_weights(sent, model, kind), rate)
    combination = LocalTraining(rate=rate).combination()
    return count_images(averaged_gradients(sent, model, kind, combination, "it"), model, SHAPE, noise)


@pytest.mark.parametrize(
    ("model", "batch_size"),
    [("convnet", 1), ("convnet", 8), ("mlp", 9), ("mlp", 12), ("lenet", 5), ("lenet", 8), ("resnet18_cifar", 4)],
)
def test_the_batch_size_is_read_off_the_ranks(model, batch_size):
    model, gradients = case(model, batch_size)
    found = count_images(gradients, model, SHAPE)
    assert (found.images, found.is_exact) == (batch_size, True)


@pytest.mark.parametrize("kind", ["weights", "difference"])
@pytest.mark.parametrize("rate", [1.0, 1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize(("model", "batch_size"), [("convnet", 3), ("mlp", 3), ("lenet", 2)])
def test_rounded_weights_tell_it_at_small_rates(model, batch_size, rate, kind):
    found = counted_after_a_step(*case(model, batch_size), rate, kind)
    assert (found.images, found.is_exact) == (batch_size, True)


@pytest.mark.parametrize(
    ("model", "batch_size", "rate"),
    [
        *itertools.product(["convnet", "mlp", "lenet"], [3, 8], [1e-2, 1e-4, 1e-6]),
        ("resnet18_cifar", 3, 1e-2),
    ],
)
def test_noise_that_may_hide_images_leaves_a_least_number_and_never_more(model, batch_size, rate):
    try:
        found = counted_after_a_step(*case(model, batch_size), rate, "weights")
    except ValueError:
        return
    assert found.images == batch_size if found.is_exact else found.images <= batch_size


@pytest.mark.parametrize("model", ["lenet", "convnet"])
@pytest.mark.parametrize("batch_size", [9, 10, 12])  # K - 1 and more: the head's rows sum to zero in any case
def test_a_batch_that_no_layer_can_count_is_asked_for(model, batch_size):
    model, gradients = case(model, batch_size)
    with pytest.raises(ValueError, match="set --batch_size"):
        count_images(gradients, model, SHAPE)


def test_noise_is_not_counted():
    model, gradients = case("mlp", 3)
    noisy = {name: g + 1e-4 * torch.randn(g.shape, generator=generator()) for name, g in gradients.items()}
    with pytest.raises(ValueError, match="set --batch_size"):
        count_images(noisy, model, SHAPE)
