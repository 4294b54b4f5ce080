import copy
import math
from dataclasses import replace

import pytest
import torch
from passes import sample_images
from torch import nn

import main_MAGIA_sel as magia
from attack.match.activations import ForwardLoss, ForwardMatching, SumOfSquares, course_for, says_enough
from attack.match.entries import observed
from attack.match.phases import GAIN, POOLED, Course, Phase, phases_for
from attack.match.softening import softened
from attack.optimise.budget import Budget, Optimiser
from attack.optimise.pixels import PixelMap
from attack.optimise.state import AttackState
from client.defences import defend_received
from client.victim import share_update
from network.chain import index_of
from network.head import features_of
from network.stage import Stage, run
from network.tracing import stages
from network.unwalked import Unwalked
from network.zoo import build_model
from priors import Prior
from schedules import Schedule


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scene(name, start, count=2, uses_gradients=None):
    """Images, and the loss from the true inputs of a stage."""
    net = build_model(name, image_shape=(3, 16, 16), num_classes=10, generator=generator())
    data = sample_images(range(count))
    update = share_update(net, name, data.images, data.labels, 10)
    chain = stages(net)
    index = index_of(chain, start)
    with torch.no_grad():
        inputs = run(chain[:index], data.images)
    loss = ForwardLoss(chain, (3, 16, 16), index, inputs, data.labels, update.gradients, uses_gradients=uses_gradients)
    return data.images, loss


def test_a_sum_of_squares_can_be_differentiated_twice():
    x = torch.rand(2, 3, dtype=torch.float64, generator=generator()).requires_grad_()
    assert SumOfSquares.apply(x).item() == pytest.approx(float((x.detach() ** 2).sum()))
    assert torch.autograd.gradcheck(SumOfSquares.apply, x)
    assert torch.autograd.gradgradcheck(SumOfSquares.apply, x)


def psnr(a, b):
    return float(-10 * (a - b).square().flatten(1).mean(1).log10().mean())


@pytest.mark.parametrize(
    ("name", "start"),
    [("lenet", "head"), ("lenet", "conv3"), ("convnet", "head"), ("resnet18", "body.layer1.1"), ("lenet5", "hidden1")],
)
def test_the_truth_has_no_loss(name, start):
    images, loss = scene(name, start, uses_gradients=True)
    activations, gradients = (term.detach() for term in loss(images))
    assert float(activations) < 1e-10
    assert float(gradients) < 1e-9
    noisy = (images + 0.1 * torch.randn(images.shape, generator=generator())).clamp(0, 1)
    assert all(float(term.detach()) > 1e-4 for term in loss(noisy))


def test_what_is_smaller_than_the_noise_counts_as_stopped_by_the_relu():
    net = build_model("convnet", image_shape=(3, 16, 16), num_classes=10, generator=generator())
    images, labels = torch.rand(2, 3, 16, 16, generator=generator()), torch.tensor([1, 2])
    update = share_update(net, "convnet", images, labels, 10)
    chain, features = stages(net), features_of(net, images).detach()
    noisy = features + 1e-7 * torch.randn(features.shape, generator=generator())
    head = index_of(chain, "head")
    clean, blind, aware = (
        ForwardLoss(chain, (3, 16, 16), head, inputs, labels, update.gradients, uncertainty=uncertainty)
        for inputs, uncertainty in ((features, 0.0), (noisy, 0.0), (noisy, 1e-5))
    )
    assert torch.equal(clean.active, aware.active)
    assert not torch.equal(clean.active, blind.active)
    assert float(aware(images)[0]) < 1e-10 < float(blind(images)[0])


def test_an_entry_that_may_be_inactive_is_compared_as_output_of_the_relu():
    net = build_model("convnet", image_shape=(3, 16, 16), num_classes=10, generator=generator())
    images, labels, off = torch.rand(2, 3, 16, 16, generator=generator()), torch.tensor([1, 2]), 0.03
    chain, features = stages(net), features_of(net, images).detach()
    size = features.square().mean(1, keepdim=True).sqrt()
    told = (features + off * size * torch.randn(features.shape, generator=generator())).clamp(min=0)
    held, doubted = (
        ForwardLoss(chain, (3, 16, 16), index_of(chain, "head"), told, labels, {}, 1e-6, doubt=doubt)
        for doubt in (0.0, off)
    )
    left = (held.units[0] * float(held(images)[0]), doubted.units[0] * float(doubted(images)[0]))
    assert left[1] == pytest.approx(float((told - features).square().sum() / told.square().sum()), rel=1e-3)
    assert left[1] < 0.1 * left[0]


@pytest.mark.parametrize("name", ["lenet", "convnet"])
def test_every_term_is_measured_by_what_grey_images_leave(name):
    images, loss = scene(name, "head", uses_gradients=True)
    activations, gradients = (float(term.detach()) for term in loss(torch.full_like(images, 0.5)))
    assert activations == pytest.approx(1, rel=1e-4)
    assert gradients == pytest.approx(len(loss.weights), rel=1e-4)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_smooth_activations_are_compared_before_they_saturate(activation):
    net = build_model(
        "mlp", image_shape=(3, 16, 16), num_classes=10, generator=generator(), activation=activation, depth=1, width=64
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= 6  # what goes into the activation is 28 and more: some of what comes out is 0 or 1 exactly
    images, labels = torch.rand(2, 3, 16, 16, generator=generator()), torch.tensor([1, 2])
    update = share_update(net, "mlp", images, labels, 10)
    chain, head = stages(net), index_of(stages(net), "head")
    features = features_of(net, images).detach()

    def error(images, inputs, uncertainty=0.0):
        what = (inputs, labels, update.gradients)
        loss = ForwardLoss(chain, (3, 16, 16), head, *what, uncertainty=uncertainty, uses_gradients=False)
        return float(loss(images)[0].detach())

    half_way = 0.5 + (images - 0.5) / 2
    assert error(half_way, features) == pytest.approx(0.25, rel=0.01)  # linear in the images
    assert error(images, features) < 1e-5
    noisy = features + 1e-4 * torch.randn(features.shape, generator=generator())
    assert error(images, noisy, 1e-4) < error(images, noisy) / 10  # what is saturated says little once it is noisy


def test_the_loss_chooses_gradients_by_what_is_known():
    assert scene("convnet", "head")[1].weights  # 1,024 activations for 768 pixels
    assert not scene("resnet18_cifar", "body.layer2.0")[1].weights  # 16,384
    assert not scene("resnet18", "body.layer1.0")[1].weights  # a max-pool below


def test_phases_are_gentler_below_a_max_pool():
    assert phases_for(scene("resnet18", "body.layer1.0")[1].chain)[0].hardness < 2
    assert phases_for(scene("convnet", "head")[1].chain)[0].hardness > 10
    assert all(math.isinf(phase.hardness) for phase in phases_for(scene("lenet", "head")[1].chain))


def forward_attack(images, loss, phases, budget=None, state=None, least_gain=math.inf):
    """The attack loop on the forward loss, from grey; its state and what ended it. No phase goes on by itself."""
    pixels = PixelMap((3, 16, 16), "sigmoid", 0.5, 0.5)
    course = Course(phases, least_gain=least_gain)
    objective = magia.Objective(ForwardMatching(loss, course), Prior("opponent", 3.0, 1.0), course, pixels)
    state = state or fresh_state(images, pixels)
    schedule = Schedule("constk", batch_size=len(images), n_iter=10**6, k=2, l_iter=0, a=0.0, b=0.0)
    ended = magia.attack(state, objective, schedule, budget or Budget(10**6), lambda *_: None)
    return objective.images(state)[0].detach(), state, ended


def fresh_state(images, pixels):
    return AttackState(
        z=pixels.encode(torch.full_like(images, 0.5)),
        label_variables=torch.zeros(len(images), 10),
        generator=generator(),
        optimiser=Optimiser("lbfgs", None, "constant", False, inner_iter=20, history=100, line_search="strong_wolfe"),
        known_labels=torch.zeros(len(images), dtype=torch.long),
    )


PHASES = (Phase(60, 1e-2, 20), Phase(100, 1e-3, 20), Phase(150, 1e-4, 60))


def test_images_come_back_from_activations():
    images, loss = scene("convnet", "head")
    found, state, ended = forward_attack(images, loss, PHASES)
    assert psnr(found, images) > 30
    assert ended == "course"
    assert 310 <= state.evaluations < 340
    assert state.phase == 2


def test_the_last_phase_goes_on_for_as_long_as_the_objective_falls():
    images, loss = scene("lenet", "head")
    short = (Phase(40, 1e-3), Phase(40, 1e-4))
    found, state, ended = forward_attack(images, loss, short, least_gain=0.1)
    assert ended == "course"
    assert state.evaluations > 150  # of which the phases ask for 80
    assert state.gain < 0.1
    early, _, _ = forward_attack(images, loss, short, Budget(10**6, max_evals=100))
    assert psnr(found, images) > psnr(early, images) + 0.5


def test_a_course_that_is_resumed_within_a_phase_ends_like_one_that_was_not():
    images, loss = scene("convnet", "head")
    phases = (Phase(30, 1e-2, 20), Phase(60, 1e-3, 20), Phase(30, 1e-4, 60))
    whole, _, _ = forward_attack(images, loss, phases)
    _, half, ended = forward_attack(images, loss, phases, Budget(3))
    assert ended == "n_iter"
    assert 30 < half.evaluations < 90
    again = fresh_state(images, PixelMap((3, 16, 16), "sigmoid", 0.5, 0.5))
    again.load_state_dict(copy.deepcopy(half.state_dict()))
    resumed, _, _ = forward_attack(images, loss, phases, state=again)
    assert torch.equal(resumed, whole)


def test_behind_kinks_a_course_ends_sooner():
    gains = [course_for(*reversed(loss_before("head", name, 1e-6))).least_gain for name in ("lenet", "convnet")]
    assert 0 < 10 * gains[0] < gains[1] < 0.2


def test_a_course_weighs_the_prior_by_phase_and_never_below_what_noise_asks():
    course = Course(PHASES, least=5e-4)
    weights = [course.at(evaluations) / course.at(0) for evaluations in (0, 59, 60, 159, 160, 10**6)]
    assert weights == pytest.approx([1, 1, 0.1, 0.1, 0.05, 0.05])
    assert [course.ended(evaluations, 0.0) for evaluations in (0, 309, 310)] == [None, None, "course"]
    assert course.ended(310, 2 * GAIN) is None
    assert Course(()).ended(0, math.inf) == "exact"


def loss_before(stage, name, uncertainty):
    """The loss for two images whose inputs of a stage are known, and the chain up to that stage."""
    net = build_model(name, image_shape=(3, 32, 32), num_classes=10, generator=generator())
    images, labels = torch.rand(2, 3, 32, 32, generator=generator()), torch.tensor([1, 2])
    chain, update = stages(net), share_update(net, name, images, labels, 10)
    start = index_of(chain, stage)
    known = run(chain[:start], images).detach()
    loss = ForwardLoss(chain, (3, 32, 32), start, known, labels, update.gradients, uncertainty=uncertainty)
    return loss, chain[:start]


def test_a_course_ends_where_the_noise_in_the_activations_asks():
    ends = []
    for uncertainty in (1e-1, 1e-2):
        loss, chain = loss_before("head", "convnet", uncertainty)
        ends.append(course_for(chain, loss).at(10**6))
    assert ends[1] == pytest.approx(1e-2 * ends[0], rel=0.5)


def test_phases_whose_softness_drowns_the_images_are_left_out():
    """Behind seven layers of VGG what soft kinks add has grown a million times; behind a ResNet's stem it has not."""
    deep = course_for(*reversed(loss_before("conv7", "vgg11", 1e-6)))
    shallow = course_for(*reversed(loss_before("body.layer1.0", "resnet18", 1e-6)))
    assert deep.phases == phases_for(loss_before("conv7", "vgg11", 1e-6)[1])[-len(deep.phases) :]
    assert 3 <= len(deep.phases) < len(shallow.phases)


def test_behind_two_pools_no_phase_has_grey_images_farther_off_than_hard_kinks():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(400, 10))
    images, labels, chain = torch.rand(2, 3, 32, 32, generator=generator()), torch.tensor([1, 2]), stages(net)
    update, known = share_update(net, "net", images, labels, 10), run(chain[:7], images).detach()
    loss = ForwardLoss(chain, (3, 32, 32), 7, known, labels, update.gradients, uncertainty=1e-6)
    course = course_for(chain[:7], loss)
    offs = [float(loss(loss.grey, softened(loss.chain, p.hardness, loss.grey))[0].detach()) for p in course.phases]
    assert 3 <= len(offs) < len(POOLED)
    assert max(offs) < 1
    (softer, *_) = (phase for phase in reversed(POOLED) if phase not in course.phases)
    assert float(loss(loss.grey, softened(loss.chain, softer.hardness, loss.grey))[0].detach()) > 1


def test_where_all_softness_drowns_the_images_the_last_phase_is_not_softened(monkeypatch):
    monkeypatch.setattr("attack.match.activations.DROWNED_BEHIND_POOLS", 0.0)  # as behind 52 layers of a MobileNetV2
    loss, chain = loss_before("conv7", "vgg11", 1e-6)
    (phase,) = course_for(chain, loss).phases
    assert phase == replace(phases_for(chain)[-1], hardness=math.inf)


@pytest.mark.parametrize("name", ["lenet", "convnet"])
def test_the_uncertainty_is_what_the_error_of_the_inputs_leaves_at_the_truth(name):
    net = build_model(name, image_shape=(3, 16, 16), num_classes=10, generator=generator())
    images, labels = torch.rand(2, 3, 16, 16, generator=generator()), torch.tensor([1, 2])
    update = share_update(net, name, images, labels, 10)
    features = features_of(net, images).detach()
    error = 1e-4 * features.norm() / features.numel() ** 0.5
    noisy = features + error * torch.randn(features.shape, generator=generator())
    chain = stages(net)
    what = (noisy, labels, update.gradients)
    loss = ForwardLoss(chain, (3, 16, 16), index_of(chain, "head"), *what, uncertainty=1e-4, uses_gradients=False)
    assert loss.uncertainty == pytest.approx(float(loss(images)[0].detach()) ** 0.5, rel=0.3)


@pytest.mark.parametrize(
    ("name", "start", "size", "enough"),
    [
        ("resnet18", "body.layer1.1", 64, True),
        ("resnet18", "head", 32, True),
        ("resnet18", "head", 64, False),  # 512 features for 12,288 pixels
        ("resnet18_cifar", "head", 64, True),  # no pool that would keep gradients from helping
    ],
)
def test_a_few_activations_behind_a_max_pool_do_not_replace_the_gradient(name, start, size, enough):
    net = build_model(name, image_shape=(3, size, size), num_classes=10, generator=generator())
    chain = stages(net)[: index_of(stages(net), start)]
    with torch.no_grad():
        inputs = run(chain, torch.rand(2, 3, size, size, generator=generator()))
    assert says_enough(chain, (3, size, size), inputs) == enough


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_few_activations_behind_batchnorm_in_training_mode_do_not_replace_the_gradient(mode):
    """A small ResNet of which the head's inputs were known had 11.6 dB by them and 21.3 by its gradient."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).train(mode == "train")
    chain = stages(nn.Sequential(net, nn.Flatten(), nn.Linear(4 * 14 * 14, 10)))[:-1]
    for known, enough in ((8, mode == "eval"), (64, True)):  # of 768 pixels
        assert says_enough(chain, (3, 16, 16), torch.rand(2, known, generator=generator()) + 0.1) == enough


def test_activations_behind_an_opaque_stage_replace_the_gradient_only_where_they_are_plenty():
    net = build_model("resnet18_cifar", image_shape=(3, 16, 16), num_classes=10, generator=generator())
    opaque = [Stage("all below", Unwalked(net, "a reason", head="head"))]
    for pixels, enough in ((2, True), (1, False)):  # known activations for each pixel, about
        inputs = torch.rand(2, pixels * 3 * 16 * 16, generator=generator())
        assert says_enough(opaque, (3, 16, 16), inputs) == enough
        assert says_enough([], (3, 16, 16), inputs)


def test_gradients_of_which_entries_were_left_out_are_matched_as_what_is_known_of_them():
    net = build_model("lenet", image_shape=(3, 16, 16), num_classes=10, generator=generator())
    images, labels = torch.rand(2, 3, 16, 16, generator=generator()), torch.tensor([3, 5])
    update = defend_received(share_update(net, "lenet", images, labels, 10), "topk:0.1")
    chain = stages(net)
    start = index_of(chain, "head")
    with torch.no_grad():
        inputs = run(chain[:start], images)
    what = (chain, (3, 16, 16), start, inputs, labels, update.gradients)
    values, entries = (
        float(ForwardLoss(*what, uses_gradients=True, observed=known)(images)[1].detach())
        for known in (None, observed(update, net))
    )
    assert entries < 1e-6 < 1e-2 < values


def test_a_layer_of_which_nothing_was_sent_is_left_out():
    net = build_model("lenet", image_shape=(3, 16, 16), num_classes=10, generator=generator())
    images, labels = torch.rand(2, 3, 16, 16, generator=generator()), torch.tensor([3, 5])
    gradients = dict(share_update(net, "lenet", images, labels, 10).gradients)
    gradients["conv1.weight"] = torch.zeros_like(gradients["conv1.weight"])
    chain = stages(net)
    with torch.no_grad():
        inputs = run(chain[: index_of(chain, "head")], images)
    loss = ForwardLoss(chain, (3, 16, 16), index_of(chain, "head"), inputs, labels, gradients, uses_gradients=True)
    assert len(loss.weights) == 2
    assert float(loss(images)[1].detach()) < 1e-6


def test_a_gradient_too_faint_for_its_squares_to_be_told_from_zero_is_left_out():
    images, loss = scene("lenet", "head", uses_gradients=True)
    net = build_model("lenet", image_shape=(3, 16, 16), num_classes=10, generator=generator())
    data = sample_images(range(2))
    sent = share_update(net, "lenet", data.images, data.labels, 10).gradients
    faint = dict(sent) | {"conv1.weight": 1e-25 * sent["conv1.weight"]}
    chain = stages(net)
    index = index_of(chain, "head")
    inputs = run(chain[:index], images).detach()
    heard = ForwardLoss(chain, (3, 16, 16), index, inputs, data.labels, faint, uses_gradients=True)
    assert len(heard.weights) == len(loss.weights) - 1
    assert all(torch.isfinite(term) for term in heard(torch.full_like(images, 0.3)))


def test_a_shortened_course_has_the_same_phases():
    course = Course((Phase(10, 1.0, 2.0), Phase(5, 0.1, 8.0)), least_gain=0.1)
    short = course.shortened(0.5)
    assert [(phase.evaluations, phase.hardness) for phase in short.phases] == [(5, 2.0), (3, 8.0)]
    assert (short.evaluations, short.least_gain) == (8, 0.1)
