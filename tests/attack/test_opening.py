"""Where a course below a max-pool begins."""

from dataclasses import replace

import pytest
import torch
from batchnorm import drawn
from conftest import generator, metrics_of, without_times
from torch import nn

from attack.again import is_read_again
from attack.match.phases import BEGUN, POOLED
from attack.opening import SHARE, is_opened, opened
from attack.prepare import Known
from attack.read.signals import Signals
from client.victim import share_update
from data import load_batch, open_source
from network.stage import run
from network.tracing import stages

MODEL = """
import torch
from torch import nn


def pooled():
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*stem, nn.Flatten(), nn.Linear(1536, 10))
"""


def scene(pool=None, side=32):
    """An update of a network with a max-pool, its model, its images, and the inputs of the layer behind the pool."""
    pool = pool or [nn.MaxPool2d(2)]
    size = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), *pool)(torch.zeros(1, 3, side, side)).numel()
    model = drawn(nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), *pool, nn.Flatten()))
    model.append(nn.Linear(size, 10))
    draw = {"num_classes": 10, "generator": generator(), "image_size": side}
    batch = load_batch(open_source("sample", None), [0, 1], labels="dataset", **draw)
    update = share_update(model, "net", batch.images, batch.labels, 10)
    chain = stages(model)
    start = len(chain) - 2
    with torch.no_grad():
        inputs = run(chain[:start], batch.images)
    nothing = torch.zeros(2)
    features = inputs.flatten(1)
    signals = Signals(features, batch.labels, torch.zeros(2, 10), nothing, 1 + nothing, 1e-6 + nothing, nothing, 2)
    return update, model, batch.images, Known(2, signals, features, batch.labels, start, inputs.double())


class Course:
    """Notes what courses begin with; its pictures are all of one grey, a tenth lighter each time."""

    def __init__(self, images):
        self.images, self.begun = images, []

    def __call__(self, known, share, *, is_whole=False):
        self.begun.append((known.likely, share, is_whole))
        return torch.full_like(self.images, 0.1 * len(self.begun))


def test_it_is_half_way_between_a_course_from_grey_and_one_from_an_estimate():
    update, model, images, known = scene()
    course = Course(images)
    found = opened(update, model, known, course, generator())
    (first, *how), (second, *other) = course.begun
    assert first is None
    assert how == other == [SHARE, False]
    assert (second - images).square().mean() < 0.01  # 20 dB
    torch.testing.assert_close(found.likely, torch.full_like(images, 0.15).double())
    assert replace(found, likely=None) == known


def test_without_an_estimate_the_first_pictures_are_softened_again():
    update, model, images, known = scene([nn.MaxPool2d(3, 3)])  # 10 positions for 32 pixels
    course = Course(images)
    found = opened(update, model, known, course, generator())
    (_, second) = course.begun
    assert torch.equal(second[0], torch.full_like(images, 0.1))
    assert second[1:] == (SHARE, True)
    torch.testing.assert_close(found.likely, torch.full_like(images, 0.15).double())


def test_pictures_that_are_there_take_the_place_of_the_first_course():
    update, model, images, known = scene()
    course = Course(images)
    found = opened(update, model, replace(known, likely=torch.full_like(images, 0.3).double()), course, generator())
    ((first, _, is_whole),) = course.begun
    assert is_whole
    torch.testing.assert_close(first, torch.full_like(images, 0.3), check_dtype=False)
    torch.testing.assert_close(found.likely, torch.full_like(images, 0.2).double())


def test_it_is_for_activations_of_all_images_above_a_max_pool():
    update, model, images, known = scene()
    assert is_opened(model, known)
    assert not is_read_again(update, model, known)
    assert not is_opened(model, replace(known, start=1, inputs=images.new_zeros(2, 24, 32, 32).double()))
    assert not is_opened(model, replace(known, inputs=known.inputs[:1]))
    assert not is_opened(model, replace(known, start=0, inputs=images, pixels=images))
    assert not is_opened(model, replace(known, start=None, inputs=None, signals=None))
    assert not is_opened(model, replace(known, held=(0,)))


@pytest.fixture
def attacked(cli, tmp_path):
    """Runs the command line on two images of a network with a max-pool."""
    (tmp_path / "net.py").write_text(MODEL)
    model = ["--model", f"{tmp_path / 'net.py'}:pooled", "--batch_size", 2, "--labels", "dataset", "--signals", "on"]
    model += ["--inner_iter", 20]
    return lambda *flags, **how: cli(*model, *flags, **how)


def test_an_attack_begins_where_the_course_is_nearly_hard(attacked, cli):
    begun = attacked("--n_iter", 3)
    assert "the attack begins with pictures by these" in cli.out
    grey = attacked("--max_evals", 75, name="grey")  # has no evaluations to spare
    assert "the attack begins with" not in cli.out
    assert metrics_of(begun)["psnr_mean"] > metrics_of(grey)["psnr_mean"] + 3
    assert 0 < BEGUN < POOLED[-1].hardness


def test_another_start_that_was_asked_for_is_left_as_it_is(attacked, cli):
    attacked("--n_iter", 1, "--init", "uniform")
    assert "the attack begins with" not in cli.out


def test_resumed_it_ends_as_without_a_break(attacked):
    whole = without_times(attacked("--n_iter", 4))
    attacked("--n_iter", 2, name="halves")
    assert without_times(attacked("--n_iter", 4, "--resume", name="halves")) == whole
