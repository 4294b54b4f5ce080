import pytest
import torch
from conftest import generator
from passes import sample_images
from torch import nn

from attack.local.local_labels import LocalLabels, labels_by_trial
from attack.prepare import Known
from attack.solve.budget import WorkBudget
from client.victim import share_update
from data import load_batch, open_source
from network.zoo import build_model
from update.optimiser import LocalOptimiser
from update.training import LocalTraining


def shared(training, count=4, num_classes=20, frozen=(), labels="unique"):
    net = build_model("lenet", image_shape=(3, 16, 16), num_classes=num_classes, generator=generator(1))
    draw = {"labels": labels, "num_classes": num_classes, "generator": generator(2), "image_size": 16}
    batch = load_batch(open_source("sample", None), range(count), **draw)
    how = {"training": training, "frozen": frozen}
    return share_update(net, "lenet", batch.images, batch.labels, num_classes, **how), net, batch.labels


def minibatches(labels, batches):
    return [sorted(part.tolist()) for part in labels.chunk(batches)]


@pytest.mark.parametrize("batches", [1, 2])
def test_labels_are_found_with_their_minibatches(batches):
    update, net, labels = shared(LocalTraining(4, batches, 0.1))
    trial = labels_by_trial(update, net, generator())
    assert trial.is_believed
    assert minibatches(trial.labels, batches) == minibatches(labels, batches)


def test_a_label_that_occurs_twice_is_found_twice():
    update, net, labels = shared(LocalTraining(4, 1, 0.1), num_classes=3, labels="random")
    assert len(set(labels.tolist())) < 4
    assert minibatches(labels_by_trial(update, net, generator()).labels, 1) == minibatches(labels, 1)


def test_of_labels_that_are_given_only_the_order_is_sought():
    update, net, labels = shared(LocalTraining(4, 4, 0.1))
    trial = labels_by_trial(update, net, generator(), given=labels.sort().values)
    assert torch.equal(trial.labels, labels)


def test_without_the_heads_gradient_there_are_no_labels():
    update, net, _ = shared(LocalTraining(2, 1, 0.1), frozen=["head"])
    with pytest.raises(ValueError, match="holds no gradient"):
        labels_by_trial(update, net, generator())


def test_the_clock_ends_the_search_with_the_best_labels_so_far():
    update, net, _ = shared(LocalTraining(4, 2, 0.1))
    ticks = []
    out = labels_by_trial(update, net, generator(), budget=WorkBudget(deadline=0.0, tick=lambda: ticks.append(1)))
    assert out.is_aborted
    assert len(out.labels) == 4
    assert len(ticks) == 1
    whole = labels_by_trial(update, net, generator(), budget=WorkBudget(tick=lambda: ticks.append(1)))
    assert not whole.is_aborted
    assert whole.distance < out.distance
    assert len(ticks) > 10


def test_labels_of_32_images_in_minibatches_of_8_take_few_trainings():
    """Each is of one image a step: the whole search costs less than 300 trainings of all images."""
    update, net, labels = shared(LocalTraining(4, 4, 0.03), count=32, labels="random")
    said = []
    trial = labels_by_trial(update, net, generator(), work=8e9, say=said.append)
    counts = torch.bincount(labels, minlength=20)
    right = torch.minimum(counts, torch.bincount(trial.labels, minlength=20)).sum()
    assert right >= 28
    assert trial.is_believed
    assert said[0].startswith("labels by trial, start 1 of")
    assert "the best leave" in said[0]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)])
def test_labels_of_a_small_network_of_two_convolutions_are_found_in_their_minibatches(seed):
    """The distances of the labels found are those of the true ones; single changes end at 2 to 5 times as much."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64, 60), nn.ReLU(), nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 10),
    )  # fmt: skip
    training, batch = LocalTraining(4, 4, 0.01, optimiser=LocalOptimiser(momentum=0.9)), sample_images(range(32))
    update = share_update(net, "own", batch.images, batch.labels, 10, training=training)
    trial = labels_by_trial(update, net, generator(), work=8e9)
    assert minibatches(trial.labels, 4) == minibatches(batch.labels, 4)


def test_the_search_keeps_to_its_budget_of_work():
    update, net, _ = shared(LocalTraining(4, 2, 0.1), count=8, labels="random")
    asked = []
    budget = WorkBudget(tick=lambda: asked.append(1))
    few = labels_by_trial(update, net, generator(), budget=budget, work=5e8)
    assert not few.is_aborted
    assert len(asked) < 15  # 5e8 multiplications are ten trainings of four steps
    more = labels_by_trial(update, net, generator(), work=2e10)
    assert more.distance <= few.distance


def test_weighted_minibatches_and_momentum_are_searched_as_they_are():
    rules = LocalOptimiser(momentum=0.9, schedule="linear")
    update, net, labels = shared(LocalTraining(4, 2, 0.03, optimiser=rules, sizes=(3, 1)))
    trial = labels_by_trial(update, net, generator())
    assert [sorted(part.tolist()) for part in trial.labels.split([3, 1])] == [
        sorted(part.tolist()) for part in labels.split([3, 1])
    ]


def test_the_order_of_a_shuffling_client_is_sought_with_its_labels():
    training = LocalTraining(6, 2, 0.03, shuffle=True)
    net = build_model("lenet", image_shape=(3, 16, 16), num_classes=20, generator=generator(1))
    batch = load_batch(
        open_source("sample", None), range(4), labels="unique", num_classes=20, generator=generator(2), image_size=16
    )
    update = share_update(net, "lenet", batch.images, batch.labels, 20, training=training, generator=generator(8))
    own = training.shuffled(4, generator(8))
    assert len({frozenset(map(frozenset, own.order[first : first + 2])) for first in (0, 2, 4)}) > 1
    trial = labels_by_trial(update, net, generator())
    assert sorted(trial.labels.tolist()) == sorted(batch.labels.tolist())
    right = [
        len({*trial.labels[list(mine)].tolist()} & {*batch.labels[list(theirs)].tolist()})
        for mine, theirs in zip(trial.order, own.order, strict=True)
    ]
    assert sum(right) >= 8  # of 12, of which chance has 6
    kept = LocalLabels.restored(vars(trial), 4, 20)
    assert kept.order == trial.order
    with pytest.raises(ValueError, match=r"local_labels\.order 4"):
        LocalLabels.restored(vars(trial) | {"order": [[4]]}, 4, 20)
    known = Known(4, None, torch.empty(0), None, local_labels=trial)
    assert known.as_trained(update).training.order == trial.order
