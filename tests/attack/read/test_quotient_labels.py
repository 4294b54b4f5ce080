"""Labels of one step of Adam, from columns of the head's gradient that single images have made."""

import json

import pytest
import torch
from conftest import generator
from torch import nn

from attack.read.quotient_labels import classes_of_signs, labels_of_quotients
from client.victim import share_update
from update.loss import Loss
from update.optimiser import LocalOptimiser
from update.training import LocalTraining


def shared(rule, activation=nn.ReLU, count=3, rate=1e-2):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2000), activation(), nn.Linear(2000, 10))
    model[1].bias.data -= 0.6  # a feature is on for few images
    model[3].weight.data *= 8  # a network that knows something: its images have different errors
    images = 2 * torch.rand(count, 3, 4, 4, generator=generator(3)) - 0.5
    labels = torch.randint(10, (count,), generator=generator(4))
    training = LocalTraining(rate=rate, optimiser=LocalOptimiser(**rule))
    return share_update(model, "net", images, labels, 10, training=training), model, labels


@pytest.mark.parametrize(
    "rule", [{"name": "adam"}, {"name": "adamw", "weight_decay": 0.0}, {"name": "adam", "eps": 1e-6}]
)
def test_labels_of_all_images_are_found(rule):
    update, model, labels = shared(rule)
    assert labels_of_quotients(update, model).sort().values.tolist() == labels.sort().values.tolist()


def test_nothing_is_said_where_features_have_both_signs_or_too_little_is_left():
    assert labels_of_quotients(*shared({"name": "adam"}, nn.Tanh)[:2]) is None
    assert labels_of_quotients(*shared({"name": "adam"}, rate=1e-6)[:2]) is None


def several(count, **changes):
    """Some steps of Adam on images of an untrained network, and the labels."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 100), nn.ReLU(), nn.Linear(100, 10))
    images, labels = torch.rand(count, 3, 4, 4, generator=generator(3)), torch.tensor([3, 8, 8, 0, 5][:count])
    rule = LocalOptimiser(**({"name": "adam"} | changes.pop("rule", {})))
    training = LocalTraining(**({"steps": 5, "rate": 1e-3, "optimiser": rule} | changes))
    return share_update(model, "net", images, labels, 10, training=training), model, labels


@pytest.mark.parametrize("rule", [{}, {"name": "adamw"}, {"betas": (0.5, 0.9)}])
@pytest.mark.parametrize("count", [2, 4, 5])
def test_after_several_steps_signs_tell_the_classes(rule, count):
    update, model, labels = several(count, rule=rule)
    assert classes_of_signs(update, model).tolist() == labels.unique().tolist()


def test_signs_are_not_asked_where_other_things_make_them():
    assert classes_of_signs(*several(4, rule={"weight_decay": 0.1})[:2]) is None
    assert classes_of_signs(*several(4, rule={"name": "sgd"})[:2]) is None
    assert classes_of_signs(*several(4, loss=Loss(smoothing=0.1))[:2]) is None
    assert classes_of_signs(*several(4, steps=2, batches=2)[:2]) is None


@pytest.mark.long
def test_an_attack_keeps_the_classes_of_signs_where_no_trial_finds_labels(cli):
    steps = ("--local_optimizer", "adam", "--local_steps", 5, "--local_lr", 1e-2)
    run = cli("--signals", "auto", "--model", "convnet", "--batch_size", 4, "--seed", 1, *steps, "--n_iter", 1)
    figures = json.loads((run / "metrics.json").read_text())
    assert figures["trial_distance"] > 0.25
    assert set(figures["true_labels"]) <= set(figures["labels"])
