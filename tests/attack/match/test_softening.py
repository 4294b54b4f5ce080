"""Kinks made soft: what replaces them, when, and that the loop gets further by it."""

import math

import pytest
import torch
from conftest import CPU, generator, resolved
from torch import nn

import main_MAGIA_sel as magia
from attack.match.gradients import MatchingLoss
from attack.match.softening import HARDNESSES, SoftenedMatching, kinked_chain, softened
from cli.victim import victim
from network.chain import modules
from network.kinds import kind_of
from network.kinds.pool import SoftMaximum
from network.stage import run
from network.tracing import stages
from network.zoo import build_model
from update.gradients import averaged_gradient


@pytest.mark.parametrize(
    "settings",
    [(2, 2, 0, False), (2, 2, 0, True), (3, 2, 1, False), (3, 1, 1, False), (4, 3, 1, True)],
)
def test_the_soft_maximum_hardens_into_the_pool(settings):
    kernel, stride, padding, ceil = settings
    pool = nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil)
    x = torch.randn(2, 3, 7, 7, generator=generator())
    hard = pool(x)
    assert torch.allclose(SoftMaximum(pool, 1e4)(x), hard, atol=1e-3)
    soft = SoftMaximum(pool, 10.0)(x)
    assert soft.shape == hard.shape
    assert ((soft >= hard - 1e-6) & (soft <= hard + math.log(kernel**2) / 10 + 1e-6)).all()


def test_softening_is_in_units_of_what_goes_into_the_kink():
    chain = stages(build_model("convnet", image_shape=(3, 16, 16), num_classes=10, generator=generator()))
    x = torch.rand(2, 3, 16, 16, generator=generator())
    assert softened(chain, math.inf, x) is chain
    off = [
        float((run(softened(chain, beta, x)[:-1], x) - run(chain[:-1], x)).abs().max().detach())
        for beta in (10, 100, 1000)
    ]
    assert off[0] > 5 * off[1] > 25 * off[2] > 0


@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_every_kink_is_as_hard_as_asked_also_inside_a_residual_block_and_behind_it(name):
    net = build_model(name, image_shape=(3, 16, 16), num_classes=10, generator=generator())
    x = torch.rand(2, 3, 16, 16, generator=generator())
    soft, hardnesses = softened(stages(net), 7.0, x), []

    def measure(module, inputs):
        hardnesses.append(module.beta * float(inputs[0].square().mean().sqrt()))

    for module in modules(soft):
        if hasattr(module, "beta"):
            module.register_forward_pre_hook(measure)
    with torch.no_grad():
        run(soft, x)
    assert len(hardnesses) == sum(kind_of(module).has_kink for module in modules(stages(net)))
    assert hardnesses == pytest.approx([7.0] * len(hardnesses), rel=1e-4)


def objective_of(*words):
    """The objective that a command line without signals leads to."""
    settings = resolved("--batch_size", 2, "--num_classes", 10, "--signals", "off", *words)
    update, model, _ = victim(settings, CPU)
    return magia.prepare(update, model, settings)[1]


@pytest.mark.parametrize(
    ("words", "distance", "soft"),
    [
        (["--model", "convnet"], "relative", True),
        (["--model", "vgg11"], "relative", True),
        (["--model", "mlp", "--activation", "relu"], "relative", True),
        (["--model", "mlp", "--activation", "gelu"], "l2", False),
        (["--model", "lenet"], "l2", False),
        (["--model", "lenet5"], "l2", False),
        (["--model", "convnet", "--distance", "cosine"], "cosine", True),
        (["--model", "convnet", "--soften", "off"], "l2", False),
        (["--model", "convnet", "--preset", "paper"], "l2", False),
        (["--model", "convnet", "--preset", "invertinggradients", "--label_strategy", "optimise"], "cosine", False),
    ],
)
def test_networks_with_kinks_are_softened_by_themselves_and_published_attacks_are_not(words, distance, soft):
    objective = objective_of(*words)
    matching = objective.matching
    assert isinstance(matching, SoftenedMatching) == soft
    assert objective.annealing.phases == (len(HARDNESSES) if soft else 1)
    assert (matching.loss if soft else matching).distance == distance


def test_a_model_that_cannot_be_walked_is_matched_as_it_is():
    class Twice(nn.Sequential):
        """Features of two paths side by side, which no chain of stages says."""

        def forward(self, x):
            return self[-1](torch.cat([self[0](x), self[1](x)], 1))

    assert kinked_chain(Twice(nn.Flatten(), nn.Sequential(nn.Flatten(), nn.ReLU()), nn.Linear(8, 2))) is None


def case(name):
    """A network, the matching loss of two true images, and images, certain labels and the subset to evaluate it at."""
    model = build_model(name, image_shape=(3, 16, 16), num_classes=10, generator=generator()).double()
    truth, images = torch.rand(2, 2, 3, 16, 16, dtype=torch.float64, generator=generator(1))
    labels = torch.tensor([3, 7])
    logits = 200.0 * nn.functional.one_hot(labels, 10).double()
    loss = MatchingLoss(model, averaged_gradient(model, truth, labels), distance="relative")
    return truth, images, loss, logits, torch.tensor([1])


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("vgg11", "resnet18")]


@pytest.mark.parametrize("name", ["convnet", *LONG])
def test_the_truth_is_matched_ever_better_as_kinks_harden(name):
    truth, images, loss, logits, subset = case(name)
    matching = SoftenedMatching(loss, kinked_chain(loss.model), (5.0, 50.0, 5000.0, math.inf))
    off = []
    for phase in range(matching.phases):
        matching.enter(phase, images)
        off.append(float(matching(truth, logits, subset).full.detach()))
    assert off[0] > off[1] > 10 * off[2]
    assert off[2] < 1e-2
    assert off[3] < 1e-20


def test_a_soft_network_has_a_gradient_that_finite_differences_confirm():
    _, images, loss, logits, subset = case("convnet")
    matching = SoftenedMatching(loss, kinked_chain(loss.model), (5.0,))
    matching.enter(0, images)

    def total(x):
        return matching(x, logits, subset).total

    assert torch.autograd.gradcheck(total, images.requires_grad_(), fast_mode=True, atol=1e-7)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_relative_distances_do_not_heed_sizes(factor):
    _, images, loss, logits, subset = case("convnet")
    none = tuple(torch.zeros_like(g) for g in loss.target)
    big = MatchingLoss(loss.model, tuple(factor * g for g in loss.target), distance="relative")
    assert big.unit == pytest.approx(factor**2 * loss.unit)
    assert MatchingLoss(loss.model, none, distance="relative").unit == 1
    plain = MatchingLoss(loss.model, loss.target)(images, logits, subset)
    own = loss(images, logits, subset)
    assert float(own.subset.detach()) == pytest.approx(float(plain.subset.detach()) / loss.unit)
    pairs = list(zip(averaged_gradient(loss.model, images, logits.softmax(1)), loss.target, strict=True))
    squares = torch.cat([((p - q).square() / q.square().mean()).flatten() for p, q in pairs])
    assert float(own.full.detach()) == pytest.approx(float(squares.mean()))
