"""Labels of one step of Adam, from columns of the head's gradient that single images have made."""

import pytest
import torch
from conftest import generator
from torch import nn

from attack.read.quotient_labels import labels_of_quotients
from client.victim import share_update
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
