"""A residual block's input from a prediction and the block's equations."""

import pytest
import torch
from torch import nn

from attack.solve.budget import OutOfTimeError, WorkBudget, unlimited
from attack.walk.again import is_reread, reread
from attack.walk.layer_source import BatchGradients
from attack.walk.noise import relative
from network.chain import inputs_along, parametrised
from network.stage import Residual, Stage, run

IMAGES, CHANNELS, SIDE = 3, 8, 8


def scene(images=IMAGES):
    """A chain with one block above a max-pool, true images, their labels, and the gradients that they leave."""
    torch.manual_seed(0)
    names = ("stem", "conv1", "conv2")
    stem, conv1, conv2 = (
        Stage(name, nn.Conv2d(c, CHANNELS, 3, padding=1, dtype=torch.float64))
        for name, c in zip(names, (3, CHANNELS, CHANNELS), strict=True)
    )
    head = Stage("head", nn.Linear(CHANNELS * (SIDE // 2) ** 2, 10, dtype=torch.float64))
    block = Stage("block", Residual([conv1, Stage("inside", nn.ReLU()), conv2], []))
    first = [stem, Stage("relu", nn.ReLU()), Stage("pool", nn.MaxPool2d(2))]
    chain = [*first, block, Stage("behind", nn.ReLU()), Stage("flat", nn.Flatten()), head]
    truth, labels = torch.rand(images, 3, SIDE, SIDE, dtype=torch.float64), torch.arange(images) % 10
    layers = list(parametrised(chain))
    loss = nn.functional.cross_entropy(run(chain, truth), labels)
    grads = torch.autograd.grad(loss, [layer.module.weight for layer in layers])
    sent = {f"{layer.name}.weight": grad for layer, grad in zip(layers, grads, strict=True)}
    return chain, truth, labels, BatchGradients(sent, images)


def read(images=IMAGES, off=0.05, error=1e-4, inner=(), start=5, budget=None):
    """What is read from pictures that are so far off, and the true input of the block."""
    chain, truth, labels, gradients = scene(images)
    with torch.no_grad():
        outputs, exact = run(chain[:5], truth), run(chain[:3], truth)
        inside = {stage.name: inputs for stage, inputs in inputs_along(chain, truth) if stage.name in inner}
    pictures = truth + off * torch.randn(truth.shape, dtype=torch.float64)
    errors, how = torch.full((images,), error, dtype=torch.float64), {"budget": budget or unlimited()}
    how["generator"] = torch.Generator().manual_seed(0)
    found = reread(chain, gradients, start, outputs, errors, labels, pictures, inside, **how)
    with torch.no_grad():
        return found, relative(run(chain[:3], pictures) - exact, exact), exact


def test_gradients_and_outputs_correct_what_pictures_predict():
    (block,), predicted, exact = read()
    error = relative(block.inputs - exact, exact)
    assert block.index == 3
    assert (error < predicted / 2).all()
    assert (block.inputs >= 0).all()


def test_the_expected_error_is_that_of_the_input():
    (block,), _, exact = read(error=1e-3)
    error = relative(block.inputs - exact, exact)
    assert float(block.errors.median() / 4) < float(error.median()) < float(4 * block.errors.median())


def test_inputs_that_the_walk_found_inside_the_block_tell_more():
    """Twelve images are too many for the last layer's gradient alone."""
    errors = [
        float(relative(block.inputs - exact, exact).median())
        for (block,), _, exact in (read(12), read(12, inner=("conv2",)))
    ]
    assert errors[1] < 0.7 * errors[0]


def test_pictures_that_miss_what_is_known_are_not_used():
    assert read(off=3.0)[0] == []


def test_outputs_that_say_less_than_pictures_are_not_used():
    assert read(error=0.5)[0] == []


def test_only_a_block_right_above_is_read():
    chain, *_ = scene()
    assert is_reread(chain[:5])
    assert not is_reread(chain[:3])
    assert not is_reread(chain[:1])


def test_a_clock_that_has_run_out_ends_it():
    with pytest.raises(OutOfTimeError):
        read(budget=WorkBudget(deadline=0.0))
