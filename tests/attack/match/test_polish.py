import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import SIGNALS, metrics_of
from torch import nn

import main_MAGIA_sel as magia
from attack.match.activations import ForwardLoss, ForwardMatching
from attack.match.phases import Course, Phase
from attack.match.polish import Polish, above_kinks, can_be_polished
from attack.optimise.budget import Budget, Optimiser
from attack.optimise.pixels import PixelMap
from attack.optimise.state import AttackState
from client.victim import share_update
from network.chain import index_of
from network.stage import Gate, Residual, Stage, run
from network.tracing import stages
from network.zoo import build_model
from priors import Prior
from schedules import Schedule

LABELS = torch.tensor([3, 7])
SHORT = Course((Phase(5, 1e-9),), least_gain=math.inf)
SOFT = Course((Phase(60, 2e-3, 20), Phase(120, 2e-4, 20)))  # which finds images of this size


def images(levels):
    """Smooth images (2, 3, 16, 16); with levels, their pixels are whole steps."""
    draw = torch.Generator().manual_seed(1)
    coarse = torch.rand(2, 3, 5, 5, generator=draw)
    smooth = nn.functional.interpolate(coarse, 16, mode="bicubic").clamp(0.1, 0.9)
    return (levels * smooth).round() / levels if levels else smooth


def near(truth, noise=0.003):
    return (truth + noise * torch.randn(truth.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)


def scene(truth, name="convnet", start="head", course=SHORT, sure=0.0):
    """An objective of a short course, and the polish that follows; a network may be sure of the first image's label."""
    net = build_model(name, image_shape=(3, 16, 16), num_classes=10, generator=torch.Generator().manual_seed(0))
    net.head.bias.data[LABELS[0]] += sure
    update = share_update(net, name, truth, LABELS, 10)
    losses = []
    for each in (copy.deepcopy(net).double(), net):
        chain, dtype = stages(each), next(each.parameters()).dtype
        index = index_of(chain, start)
        with torch.no_grad():
            inputs = run(stages(net)[:index], truth).to(dtype)
        below = {f"{layer}.weight" for layer in above_kinks(chain[: index - 2])}
        only = {layer: sent for layer, sent in update.gradients.items() if layer in below}
        losses.append(ForwardLoss(chain, (3, 16, 16), index, inputs, LABELS, only, 1e-6, uses_gradients=True))
    polish = Polish(lambda: tuple(losses), course, Prior("opponent"))
    pixels = PixelMap((3, 16, 16), spectral_power=0.5)
    return magia.Objective(ForwardMatching(losses[1], course), Prior("opponent"), course, pixels, polish=polish)


def state_at(objective, start):
    optimiser = Optimiser("lbfgs", None, "constant", False, 20, 10, "strong_wolfe")
    variables = {"z": objective.pixels.encode(start), "label_variables": torch.zeros(2, 10)}
    state = AttackState(**variables, generator=torch.Generator(), optimiser=optimiser)
    state.evaluations = 2000  # as after a long course
    return state


def attacked(objective, state, budget, steps):
    schedule = Schedule("constk", batch_size=2, n_iter=100, k=2, l_iter=0, a=0.0, b=0.0)
    return magia.attack(state, objective, schedule, budget, lambda state, *_: steps.append(state.evaluations))


@pytest.mark.parametrize("levels", [255, 0])
def test_what_follows_a_course_is_exact_and_whole_steps_are_taken_where_images_have_them(levels):
    truth = images(levels)
    objective, steps = scene(truth), []
    state = state_at(objective, near(truth))
    if not levels:
        state.enter(1)  # the course is over
    assert attacked(objective, state, Budget(100), steps) == "course"
    found = objective.images(state)[0].detach()
    assert (found - truth).square().mean() < 1e-8
    assert objective.polish.is_whole == bool(levels)
    assert torch.equal((255 * found).round(), (255 * truth).round()) or not levels
    (said,) = objective.polish.evidence
    assert ("whole steps" in said.said) == bool(levels)
    assert not said.contradicts


def test_no_more_evaluations_are_made_than_allowed():
    truth = images(0)
    objective, steps = scene(truth), []
    state = state_at(objective, near(truth))
    state.enter(1)
    assert attacked(objective, state, Budget(100, max_evals=2100), steps) == "max_evals"
    assert 2050 < state.evaluations <= 2100
    assert len(objective.polish.left) == 2


def test_no_step_is_made_where_time_is_out():
    truth = images(0)
    objective = scene(truth)
    state = state_at(objective, near(truth))
    state.enter(1)
    objective.polish.step(state, objective.pixels, Budget(100, max_seconds=1e-9))
    assert objective.polish.stopped == "max_seconds"
    assert not objective.polish.evidence


def test_images_of_the_course_are_kept_where_a_step_does_not_fit_into_memory():
    def too_large():
        raise MemoryError

    truth = images(0)
    objective = scene(truth)
    objective = replace(objective, polish=replace(objective.polish, losses=too_large))
    state = state_at(objective, near(truth))
    state.enter(1)
    assert attacked(objective, state, Budget(100), []) == "course"
    assert torch.equal(state.z, objective.pixels.encode(near(truth)))
    (said,) = objective.polish.evidence
    assert "memory" in said.said


def test_images_stay_where_a_step_leaves_more():
    truth = images(0)
    objective = scene(truth)
    state = state_at(objective, truth.flip(0))
    state.evaluations = 500  # of which half may be made once more
    state.enter(1)
    while not objective.polish.stopped:
        objective.polish.step(state, objective.pixels, Budget(100))
    left = objective.polish.left
    assert left == sorted(left, reverse=True)
    assert not objective.polish.is_whole
    assert state.evaluations <= 750


def first_astray(truth, start, sure):
    """A scene in which the first image moves the update little, and its state at the end of a course."""
    objective = scene(truth, course=SOFT, sure=sure)
    state = state_at(objective, start)
    state.enter(len(SOFT.phases))
    return objective, state


def test_an_image_in_a_wrong_place_is_begun_again_alone_and_a_resumed_attack_goes_on_alike():
    truth = images(0)
    wrong = torch.cat([truth[:1].flip(3), near(truth)[1:]])
    objective, state = first_astray(truth, wrong, sure=4.0)
    objective.polish.step(state, objective.pixels, Budget(100))
    assert objective.polish.again == 1
    assert ((objective.images(state)[0] - truth).square().flatten(1).mean(1) < 1e-4).all()

    other, resumed = first_astray(truth, wrong, sure=4.0)
    resumed.load_state_dict(copy.deepcopy(state.state_dict()))
    most = state.evaluations + 60
    for each, its in ((objective, state), (other, resumed)):
        each.polish.step(its, each.pixels, Budget(100, max_evals=most))
    assert torch.equal(state.z, resumed.z)
    assert (state.evaluations, state.phase) == (resumed.evaluations, resumed.phase)
    assert "begun again" in objective.polish.evidence[0].said


def test_an_image_that_has_been_begun_again_stays_as_it_was_where_that_leaves_less():
    truth = images(0)
    objective, state = first_astray(truth, torch.cat([near(truth, 3e-5)[:1], near(truth, 1e-5)[1:]]), sure=6.0)
    objective.polish.step(state, objective.pixels, Budget(100))
    assert state.evaluations > 2200  # it was tried
    assert objective.polish.again == 0
    assert ((objective.images(state)[0] - truth).square().flatten(1).mean(1) < 2e-9).all()


def test_nothing_is_begun_again_where_evaluations_are_missing():
    truth = images(0)
    objective, state = first_astray(truth, torch.cat([truth[:1].flip(3), near(truth)[1:]]), sure=4.0)
    objective.polish.step(state, objective.pixels, Budget(100, max_evals=2300))
    assert objective.polish.again == 0
    assert state.evaluations < 2100  # a step of all


@pytest.mark.parametrize("branched", [Residual, Gate])
def test_only_layers_above_all_kinks_are_compared(branched):
    layers = {name: nn.Conv2d(3, 3, 1) for name in ("first", "inner", "outer", "last")}
    block = branched([Stage("inner", layers["inner"]), Stage("relu", nn.ReLU()), Stage("outer", layers["outer"])], [])
    chain = [Stage("first", layers["first"]), Stage("block", block), Stage("last", layers["last"])]
    assert sorted(set(above_kinks(chain)) & set(layers)) == ["last", "outer"]


def test_noise_and_largest_entries_leave_nothing_to_polish():
    plain = [Stage("layer", nn.Conv2d(3, 3, 1)), Stage("relu", nn.ReLU())]
    assert can_be_polished(plain, 1e-6)
    assert not can_be_polished(plain, 1e-3)
    assert not can_be_polished([*plain, Stage("pool", nn.MaxPool2d(2))], 1e-6)
    assert not can_be_polished([*plain, Stage("norm", nn.BatchNorm2d(3))], 1e-6)


@pytest.mark.long
def test_a_run_ends_with_the_polish_and_a_resumed_one_keeps_it(cli):
    flags = ("--model", "convnet", "--batch_size", 4, *SIGNALS, "--n_iter", 300, "--inner_iter", 20)
    run = cli(*flags)
    before = metrics_of(run)
    assert before["ended_by"] == "course"
    assert [piece["topic"] for piece in before["evidence"]].count("polish") == 1
    assert all(before["equal_bits"])
    cli(*flags, "--resume", run)
    assert all(metrics_of(run)["equal_bits"])
