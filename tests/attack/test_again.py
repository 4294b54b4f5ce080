"""Blocks between what the walk knows and a max-pool: read once more from pictures."""

from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from batchnorm import relative_errors
from conftest import generator
from torch import nn

import main_MAGIA_sel as magia
from attack.again import is_read_again, known_between
from attack.prepare import Known
from attack.read.signals import Signals
from attack.solve.budget import WorkBudget, unlimited
from cli.ahead import known_from_pictures
from cli.settings import resolve
from client.victim import share_update
from network.chain import index_of
from network.stage import run
from network.tracing import stages

IMAGES, CHANNELS, SIDE = 4, 8, 8


class Block(nn.Module):
    """Two convolutions beside nothing."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        return self.relu2(x + self.conv2(self.relu1(self.conv1(x))))


class Net(nn.Sequential):
    """A block above a stem, with a max-pool or without."""

    def __init__(self, *, pooled=True):
        torch.manual_seed(0)
        size = CHANNELS * (SIDE // 2 if pooled else SIDE) ** 2
        pool = [nn.MaxPool2d(2)] if pooled else []
        stem = [nn.Conv2d(3, CHANNELS, 3, padding=1), nn.ReLU(), *pool]
        super().__init__(*stem, Block(), nn.Flatten(), nn.Linear(size, 10))


def scene(*, pooled=True, defence="none", error=1e-4):
    """An update, its model, its images, and what is known of it: the head's inputs."""
    model, labels = Net(pooled=pooled), torch.arange(IMAGES)
    images = torch.rand(IMAGES, 3, SIDE, SIDE, generator=generator())
    update = share_update(model, "net", images, labels, 10)
    update = replace(update, defence=defence)
    chain = stages(model)
    start = index_of(chain, str(len(model) - 1)) - 1
    with torch.no_grad():
        inputs = run(chain[:start], images)
    nothing = torch.zeros(IMAGES)
    features = inputs.flatten(1)
    signals = Signals(features, labels, torch.zeros(IMAGES, 10), nothing, 1 + nothing, error + nothing, nothing, IMAGES)
    inner = next(stage.name for stage in stages(model) if "Residual" in type(stage.module).__name__)
    row = {"layer": f"{inner.split('.')[0]}.conv1", "note": "too few equations", "uncertainty": None}
    return update, model, images, Known(IMAGES, signals, features, labels, start, inputs.double(), layers=[row])


def between(update, model, known, pictures, clock=None):
    return known_between(update, model, known, pictures, generator(), clock or unlimited())


def test_the_blocks_input_takes_the_place_of_its_output():
    update, model, images, known = scene()
    seen = []

    def pictures(known):
        seen.append(known.start)
        return images + 0.05 * torch.randn(images.shape, generator=generator())

    found, chain = between(update, model, known, pictures), stages(model)
    with torch.no_grad():
        exact, predicted = (run(chain[: found.start], x) for x in (images, pictures(known)))
    assert found.start == known.start - 2
    assert seen[0] > seen[1] == found.start  # the second pictures are by what the first have told
    assert (relative_errors(found.inputs, exact.double()) < relative_errors(predicted, exact) / 2).all()
    (row,) = found.layers
    assert row["note"].startswith("too few equations; from pictures and gradients")
    assert 0 < row["uncertainty"] < 0.1
    assert torch.equal(found.recovered[chain[found.start].name], found.inputs)


def test_blocks_are_read_as_often_as_pictures_improve():
    update, model, images, known = scene(error=1e-2)
    off = [0.12, 0.03, 0.03, 0.03]

    def pictures(_):
        return images + off.pop(0) * torch.randn(images.shape, generator=generator())

    between(update, model, known, pictures)
    assert len(off) == 1  # the third pictures were no better than the second


def test_poor_pictures_tell_nothing():
    update, model, images, known = scene()
    poor = torch.rand(images.shape, generator=generator(5)) * 9
    found = between(update, model, known, lambda _: poor)
    assert replace(found, likely=None) == known
    assert torch.equal(found.likely, poor.double())  # a course has made them all the same


def test_what_leads_pictures_away_from_what_the_walk_knows_is_dropped():
    update, model, images, known = scene()
    off = [0.03, 0.1]  # the second are by what the first have told

    seen = [images + each * torch.randn(images.shape, generator=generator()) for each in off]
    found = between(update, model, known, lambda _, left=list(seen): left.pop(0))
    assert replace(found, likely=None) == known
    assert torch.equal(found.likely, seen[0].double())


def test_a_clock_that_has_run_out_leaves_what_is_known():
    update, model, images, known = scene()
    assert between(update, model, known, lambda _: images, WorkBudget(deadline=0.0)) is known


@pytest.mark.parametrize(("what", "applies"), [
    ({}, True),
    ({"pooled": False}, False),
    ({"defence": "topk:0.5"}, False),
])  # fmt: skip
def test_it_is_for_whole_updates_of_networks_with_a_max_pool(what, applies):
    update, model, _, known = scene(**what)
    assert is_read_again(update, model, known) == applies


def test_it_is_not_for_pixels_that_are_known_or_for_walks_that_end_at_the_pool():
    update, model, images, known = scene()
    assert not is_read_again(update, model, replace(known, start=0, inputs=images, pixels=images))
    assert not is_read_again(update, model, replace(known, start=known.start - 2))
    assert not is_read_again(update, model, replace(known, inputs=known.inputs[:2]))


def test_an_attack_of_few_evaluations_has_none_to_spare():
    update, model, _, known = scene()
    few = Namespace(max_evals=40)
    assert known_from_pictures(update, model, known, few, None, None) is known


@pytest.mark.long
def test_the_attack_makes_the_first_pictures():
    update, model, images, known = scene()
    settings, _ = resolve(["--quiet", "--n_iter", "12"], magia.FLAGS, "")
    found = known_from_pictures(update, model, known, settings, magia.build_objective, magia.attack)
    with torch.no_grad():
        exact = run(stages(model)[: found.start], images)
    assert found.start == known.start - 2
    assert relative_errors(found.inputs, exact.double()).max() < 0.05
