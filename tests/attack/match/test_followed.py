"""Known activations with BatchNorm in training mode below them."""

from dataclasses import replace

import pytest
import torch
from batchnorm import Plain, Shared
from torch import nn

from attack.match.followed import followed
from attack.match.penalties import MomentsLoss
from attack.prepare import Known
from network.chain import index_of
from network.stage import Stage, run
from network.tracing import stages
from priors import Prior
from update.evidence import STATISTICS, Evidence


def of_head(mode):
    """An update in training mode, what is matched where the head's inputs are known, and the images."""
    shared = Shared(Plain(), mode=mode)
    chain = stages(shared.model)
    start = index_of(chain, "11")
    with torch.no_grad():
        inputs = run(chain[:start], shared.images)
    known = Known(len(inputs), None, inputs, shared.labels, start, inputs)
    return shared, known, followed(shared.update, shared.model, known, Prior("rgb"))


@pytest.mark.parametrize("mode", ["train", "train_private"])
def test_gradients_of_mixed_layers_are_matched_by_the_whole_batch(mode):
    """The head's inputs are 56 numbers an image: without the gradients below, pictures end at 15 dB."""
    shared, _, found = of_head(mode)
    loss, images = found.matching.loss, shared.images
    assert len(loss.weights) == 3
    assert all(float(term.detach()) < 1e-6 for term in loss(images))
    one_moved = torch.cat([images[:1].flip(3), images[1:]])
    assert float(loss(one_moved)[1].detach()) > 1e-2
    assert [penalty.name for penalty in found.penalties] == (["statistics"] if mode == "train" else []) + ["scale"]
    assert (found.scale is None) == (mode == "train")  # shared statistics tell it, and 8 bits need not
    if mode == "train":
        assert all(float(penalty.loss(images).detach()) < 1e-9 for penalty in found.penalties)
        assert all(float(penalty.loss(0.9 * images).detach()) > 1e-3 for penalty in found.penalties)


def test_moments_of_another_batch_are_not_held():
    shared, known, _ = of_head("train")
    known = replace(known, evidence=(Evidence(STATISTICS, "they are of another batch"),))
    assert [penalty.name for penalty in followed(shared.update, shared.model, known, Prior("rgb")).penalties] == [
        "scale"
    ]


def test_moments_are_those_in_front_of_each_layer():
    chain = [Stage("0", nn.Linear(2, 2, bias=False)), Stage("1", nn.BatchNorm1d(2))]
    with torch.no_grad():
        chain[0].module.weight.copy_(torch.eye(2))
    images, norm = torch.tensor([[0.0, 2.0], [2.0, 2.0]]), chain[1].module
    moments = {norm: (torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]))}
    # the first channel is right, and the second is off by a deviation and has no variance
    assert float(MomentsLoss(chain, moments)(images)) == pytest.approx((1 + 1) / 2, rel=1e-3)
