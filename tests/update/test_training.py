import copy

import pytest
import torch
from conftest import generator
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from client.victim import share_update
from network.chain import with_moments
from network.parameters import trainable
from network.stage import run
from network.tracing import stages
from network.zoo import build_model
from update.batchnorm import after_training, before_averaging, statistic_names, use_batch_statistics
from update.gradients import averaged_gradient
from update.shared import SharedUpdate
from update.storage import StorageError, read_tensors
from update.training import FEDSGD, LocalTraining, train_locally


def lenet(dtype=torch.float32):
    return build_model("lenet", image_shape=(3, 16, 16), num_classes=10, generator=generator(1)).to(dtype)


def normed():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4, momentum=0.2), nn.Sigmoid(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * 7 * 7, 10)).eval()


def batch(count=4, dtype=torch.float32):
    return torch.rand(count, 3, 16, 16, generator=generator(2), dtype=dtype), torch.tensor([1, 7, 3, 7])[:count]


def trained_by_hand(model, images, labels, training):
    """What a client's own training loop comes to: its state dict after so many steps of torch.optim.SGD."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train(training.uses_batch_statistics)
    optimiser = torch.optim.SGD(model.parameters(), training.rate)
    parts = list(zip(images.chunk(training.batches), labels.chunk(training.batches), strict=True))
    for step in range(training.steps):
        x, y = parts[step % len(parts)]
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    return model.state_dict()


@pytest.mark.parametrize(("count", "steps", "batches"), [(4, 2, 1), (4, 4, 2), (4, 4, 4), (3, 4, 2)])
def test_local_training_is_that_of_plain_sgd(count, steps, batches):
    model, training = lenet(torch.float64), LocalTraining(steps, batches, 0.1)
    images, labels = batch(count, torch.float64)
    before = copy.deepcopy(model.state_dict())
    by_hand = trained_by_hand(model, images, labels, training)
    trained = train_locally(model, images, labels, training)
    for (name, old), new, average in zip(trainable(model).items(), trained.weights, trained.average, strict=True):
        assert torch.allclose(new, by_hand[name], rtol=0, atol=1e-14)
        assert torch.allclose((old - new) / training.reach, average, rtol=0, atol=1e-12)
        assert torch.equal(old, before[name])  # the model stays as it is


def test_one_step_is_fedsgd_bit_for_bit():
    model, (images, labels) = lenet(), batch()
    own = train_locally(model, images, labels, LocalTraining(rate=0.3)).average
    for mine, theirs in zip(own, averaged_gradient(model, images, labels), strict=True):
        assert torch.equal(mine, theirs)
    shared = share_update(model, "lenet", images, labels, 10, training=LocalTraining(rate=0.3))
    plain = share_update(model, "lenet", images, labels, 10)
    assert all(torch.equal(shared.gradients[name], plain.gradients[name]) for name in plain.gradients)


def test_several_steps_are_shared_as_the_difference_of_weights():
    model, (images, labels), training = lenet(), batch(), LocalTraining(4, 2, 0.1)
    by_hand = trained_by_hand(model, images, labels, training)
    update = share_update(model, "lenet", images, labels, 10, training=training)
    for name, old in trainable(model).items():
        gradient = (old.detach() - by_hand[name]) / 0.4
        assert torch.allclose(update.gradients[name], gradient, rtol=0, atol=2e-6)  # rounding of the weights, over 0.4


def test_the_unrolled_update_is_differentiated_through_all_steps():
    model, training = lenet(torch.float64), LocalTraining(4, 2, 0.1)
    images, labels = batch(dtype=torch.float64)
    logits = torch.randn(4, 10, generator=generator(), dtype=torch.float64)
    goal = train_locally(model, images, labels, training).average

    def loss(x, z):
        own = train_locally(model, x, z.softmax(1), training, create_graph=True).average
        return sum((p - q).square().sum() for p, q in zip(own, goal, strict=True))

    x, z = (0.9 * images).requires_grad_(), logits.requires_grad_()
    slopes = torch.autograd.grad(loss(x, z), (x, z))
    for slope, which in zip(slopes, ("images", "logits"), strict=True):
        step = 1e-5 * torch.randn(slope.shape, generator=generator(3), dtype=torch.float64)
        moves = (step, 0) if which == "images" else (0, step)
        rise = (loss(x + moves[0], z + moves[1]) - loss(x - moves[0], z - moves[1])) / 2
        assert float(rise) == pytest.approx(float((slope * step).sum()), rel=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_running_statistics_are_those_of_a_client_in_training_mode(steps):
    model, (images, labels), training = normed(), batch(), LocalTraining(steps, 1, 0.1, "train")
    by_hand = trained_by_hand(model, images, labels, training)
    before = copy.deepcopy(model.state_dict())
    update = share_update(model, "net", images, labels, 10, training=training)
    assert list(update.statistics) == statistic_names(model) == ["1.running_mean", "1.running_var"]
    for name, statistic in update.statistics.items():
        assert torch.allclose(statistic, by_hand[name], atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if steps == 1:  # and what the batch's own were follows
        variance, mean = torch.var_mean(model[0](images), (0, 2, 3))
        for own, shared in zip((mean, variance), update.batch_statistics(model), strict=True):
            assert torch.allclose(own, shared, rtol=1e-4, atol=1e-5)
    private = share_update(model, "net", images, labels, 10, training=LocalTraining(steps, 1, 0.1, "train_private"))
    assert private.statistics == {}
    assert private.batch_statistics(model) == ()


@given(steps=st.integers(1, 5))
def test_statistics_before_averaging_undo_those_after_training(steps):
    model = normed()
    use_batch_statistics(model)
    given_ = tuple(torch.rand(4, generator=generator(steps)) + 0.5 for _ in range(2))
    back = before_averaging(model, after_training(model, given_, steps), steps)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(given_, back, strict=True))


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_training_and_statistics_are_saved_bit_for_bit(tmp_path, ending):
    images, labels = batch()
    training = LocalTraining(4, 2, 0.1, "train")
    update = share_update(normed(), "net", images, labels, 10, training=training)
    update.save(tmp_path / f"u.{ending}")
    again = SharedUpdate.load(tmp_path / f"u.{ending}")
    assert again.training == training
    for section in ("gradients", "weights", "statistics"):
        mine, theirs = getattr(update, section), getattr(again, section)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_an_update_that_says_nothing_of_training_is_of_one_step(tmp_path):
    update = share_update(lenet(), "lenet", *batch(), 10)
    update.save(tmp_path / "u.npz")
    tensors, text = read_tensors(tmp_path / "u.npz")
    older = {"update": text["update"].replace('"training"', '"other"')}
    assert SharedUpdate.of(tensors, older, "old").training == FEDSGD


def test_a_training_that_does_not_suit_the_batch_is_refused(tmp_path):
    update = share_update(lenet(), "lenet", *batch(), 10, training=LocalTraining(4, 4, 0.1))
    update.save(tmp_path / "u.npz")
    tensors, text = read_tensors(tmp_path / "u.npz")
    wrong = {"update": text["update"].replace('"batch_size": 4', '"batch_size": 6')}
    with pytest.raises(ValueError, match="does not divide"):
        SharedUpdate.of(tensors, wrong, "u.npz")
    nonsense = {"update": text["update"].replace('"steps": 4', '"steps": 0')}
    with pytest.raises(StorageError, match="not a shared update"):
        SharedUpdate.of(tensors, nonsense, "u.npz")


def test_statistics_without_momentum_are_a_mean_over_all_batches():
    """As torch keeps them: the server's model has seen n batches, the client's one more."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.Flatten(), nn.Linear(784, 10))
    images, labels = torch.rand(5, 3, 16, 16, generator=generator(1)), torch.arange(5)
    for batch in range(3):
        model(torch.rand(5, 3, 16, 16, generator=generator(10 + batch)))
    trained = copy.deepcopy(model)
    trained(images)  # torch's own way
    update = share_update(model, "net", images, labels, 10, training=LocalTraining(batchnorm="train"))
    for name, statistic in update.statistics.items():
        assert torch.allclose(statistic, trained.state_dict()[name], rtol=1e-5)
    mean, variance = update.batch_statistics(model)
    seen = model[0](images)
    assert torch.allclose(mean, seen.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(variance, seen.var((0, 2, 3)), rtol=1e-3)


def test_moments_are_those_by_which_a_batch_is_normalised():
    model = normed()
    images, labels = batch()
    update = share_update(model, "net", images, labels, 10, training=LocalTraining(batchnorm="train"))
    chain, fixed = stages(model), with_moments(stages(model), update.batch_moments(model))
    assert torch.allclose(run(fixed, images), run(chain, images), atol=1e-4)
    assert torch.allclose(run(fixed, images[:1]), run(chain, images)[:1], atol=1e-4)  # which mixes no images any more
    several = share_update(model, "net", images, labels, 10, training=LocalTraining(2, 1, 0.1, "train"))
    assert several.batch_moments(model) == {}
