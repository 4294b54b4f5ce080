"""The scale that BatchNorm hides of a whole batch."""

import pytest
import torch
from batchnorm import Plain, Shared, drawn, smooth
from conftest import generator
from torch import nn

from attack.match.common_scale import CommonScale
from network.normalise import normalised
from network.stage import run
from network.tracing import stages
from update.batchnorm import use_batch_statistics


def plain(*, mean=None, trains=True):
    model = normalised(drawn(Plain()), 3, mean, None)
    if trains:
        use_batch_statistics(model)
    return model


@pytest.mark.parametrize("mean", [None, [0.4, 0.5, 0.6]])
def test_a_factor_changes_nothing_but_this_term(mean):
    chain, images = stages(plain(mean=mean)), smooth(4, generator(1))
    scale = CommonScale.of(chain)
    other = scale.centre + 0.8 * (images - scale.centre)
    assert torch.allclose(run(chain, other), run(chain, images), atol=1e-3)
    before, after = float(scale(images)), float(scale(other))
    assert after != pytest.approx(before, rel=0.01)
    log = lambda value: value**0.5  # noqa: E731
    assert min(abs(log(after) - log(before)), log(after) + log(before)) == pytest.approx(2 * 0.2231, rel=0.01)


@pytest.mark.parametrize("factor", [0.93, 1.0, 1.21])
@pytest.mark.parametrize("mean", [None, [0.4, 0.5, 0.6]])
def test_eight_bits_tell_the_factor(factor, mean):
    scale, images = CommonScale.of(stages(plain(mean=mean))), smooth(4, generator(1))
    found, said = scale.read(scale.centre + (images - scale.centre) / factor)
    assert said.figure == pytest.approx(factor, abs=2e-4)
    assert "8 bits" in said.said
    assert (found - images).abs().max() < 1e-3


def test_rough_pixels_leave_it_open():
    scale, images = CommonScale.of(stages(plain())), smooth(4, generator(1))
    rough = images + 0.01 * torch.randn(images.shape, generator=generator(2))
    found, said = scale.read(rough)
    assert torch.equal(found, rough)
    assert said.said.endswith("it is open")


def test_nothing_is_hidden_in_eval_mode_or_behind_a_layer_that_is_not_normalised():
    assert CommonScale.of(stages(plain(trains=False))) is None
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)).eval()
    use_batch_statistics(model)
    assert CommonScale.of(stages(model)) is None


@pytest.mark.parametrize("mean", [None, [0.4, 0.5, 0.6]])
def test_a_model_that_has_seen_no_images_leaves_the_usual_colours(mean):
    """Its running variance of 1 is none that images could have: they would be driven to the edges of their range."""
    model = normalised(Plain().eval(), 3, mean, None)
    use_batch_statistics(model)
    scale, images = CommonScale.of(stages(model)), 0.48 + 0.25 * torch.randn(4, 3, 8, 8, generator=generator(1))
    assert float(scale(images)) < 0.02
    for factor in (0.5, 2.0):
        assert float(scale(scale.centre + factor * (images - scale.centre))) > 0.5


class Late(nn.Sequential):
    """BatchNorm behind the first activation, which hides the scale if no bias stands in front; 8-pixel images."""

    def __init__(self, bias):
        first = nn.Conv2d(3, 8, 3, bias=bias)
        super().__init__(first, nn.ReLU(), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


@pytest.mark.parametrize(
    ("model", "mode", "is_hidden"),
    [
        (Plain(), "train_private", True),
        (Plain(), "train", False),
        (Plain(), "eval", False),
        (Late(bias=False), "train_private", True),
        (Late(bias=True), "train_private", False),
    ],
    ids=str,
)
def test_beside_gradients_a_scale_is_held_where_the_update_hides_it(model, mode, is_hidden):
    shared = Shared(model, mode=mode)
    scale = CommonScale.beside_gradients(shared.update, shared.model)
    assert (scale is not None) == is_hidden
    if is_hidden:
        assert float(scale(0.3 * shared.images)) > float(scale(shared.images)) + 1
