"""Evaluations that are recorded and replayed, and objectives in which nothing waits for a GPU."""

import pytest
import torch
from batchnorm import smooth
from conftest import CPU, SMALL, generator, metrics_of, resolved
from torch import nn
from waits import waits_of

import main_MAGIA_sel as magia
from attack.match.common_scale import CommonScale
from attack.match.gradients import MatchingLoss
from attack.optimise.budget import Annealing, Budget, Optimiser
from attack.optimise.capture import LASTING, Evaluation
from attack.optimise.state import AttackState
from bench.speed import on_noise
from cli.victim import victim
from network.head import features_of
from network.stage import Stage
from network.zoo import build_model


def attack_of(*words):
    """State and objective of a small attack, ready for an evaluation."""
    settings = resolved(*SMALL, *words)
    update, model, _ = victim(settings, CPU)
    state, objective, _ = magia.prepare(update, model, settings)
    objective.matching.enter(0, objective.pixels.decode(state.anchor))
    state.draw_subset(2)
    return state, objective


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--model convnet",
        "--alpha 1 --restarts 2 --group_weight 1 --l2_weight 1",
        "--distance cosine --rescale none --subset_loss mean --prior rgb",
        "--prior anisotropic --box clamp",
        "--label_strategy idlg",
        "--local_steps 2 --local_lr 0.1 --local_batches 2",
        "--local_optimizer adam --local_lr 0.1 --alpha 1",
        "--class_weights 1,2,3,4,5,6,7,8,9,10 --label_smoothing 0.1",
        "--defence quantise:4",
        "--defence sign",
        "--defence topk:0.1",
        "--defence svt:0.1:1:1:0.1:0.01",
        "--signals ica",
    ],
)
def test_no_objective_waits_for_the_device(words):
    state, objective = attack_of(*words.split())
    weight = state.weigh(1.0)
    assert waits_of(lambda: state.evaluate(lambda: objective(state, weight).loss)) == []


@pytest.mark.parametrize("name", ["forward", "activations"])
def test_nor_does_one_of_known_activations(name):
    variant = on_noise(2, ["--image_size", "16", "--num_classes", "20"])[name]
    assert waits_of(variant.evaluate) == []


def test_nor_does_a_known_subset():
    model = build_model("mlp", image_shape=(3, 16, 16), num_classes=5, generator=generator())
    images, logits = torch.rand(4, 3, 16, 16), torch.randn(4, 5)
    target = tuple(torch.randn_like(parameter) for parameter in model.parameters())
    known = (torch.randn(3, 5), features_of(model, images[:3]).detach())
    loss = MatchingLoss(model, target, 0.5, known=known)
    for subset in (torch.tensor([0, 2]), torch.tensor([0, 3])):
        assert waits_of(lambda subset=subset: loss(images, logits, subset)) == []


@pytest.mark.parametrize("usual", [None, torch.tensor([0.1, 0.0, 0.2])])
def test_nor_does_a_hidden_scale(usual):
    layer = nn.Conv2d(3, 3, 3).requires_grad_(False)
    scale, images = CommonScale(torch.zeros(1, 1, 1), [Stage("layer", layer)], usual), smooth(2, generator(), 16)
    assert waits_of(lambda: scale(images)) == []


# ----------------------------------------------------------------------------------------------------
# Recordings


def faithful(variables, work):
    """A recording as a GPU makes it: the results are always in the same places."""
    results = [work().clone(), *(variable.grad.clone() for variable in variables)]

    def replay():
        for result, value in zip(results, (work(), *(variable.grad for variable in variables)), strict=True):
            result.copy_(value)
        for variable, gradient in zip(variables, results[1:], strict=True):
            variable.grad = gradient
        return results[0]

    return replay


def stale(variables, work):
    """A recording that does not read the variables again."""
    results = [work().clone(), *(variable.grad.clone() for variable in variables)]

    def replay():
        for variable, gradient in zip(variables, results[1:], strict=True):
            variable.grad = gradient.clone()
        return results[0].clone()

    return replay


def impossible(variables, work):
    raise RuntimeError("operation not permitted when stream is capturing")


def valley(recorder=None, name="lbfgs", resample=None):
    """The iterates of an attack down a narrow valley, whose prior's weight falls and which has two phases."""
    draw = torch.Generator().manual_seed(0)
    how = {"lr_schedule": "constant", "signed": False, "inner_iter": 8, "history": 5, "line_search": "strong_wolfe"}
    start = torch.full((4, 3, 2, 2), 0.3, dtype=torch.float64)
    labels = torch.zeros(4, 5, dtype=torch.float64)
    optimiser = Optimiser(name, None, **how)
    state = AttackState(z=start, label_variables=labels, generator=draw, optimiser=optimiser, recorder=recorder)
    goal, curves = (
        torch.rand(4, 3, 2, 2, generator=draw, dtype=torch.float64),
        torch.logspace(0, 3, 48).view(4, 3, 2, 2),
    )
    annealing, found = Annealing(1.0, 1e-3, 100, phases=2), []
    while state.evaluations < 120:
        weight = state.weigh(annealing.at(state.evaluations))
        state.enter(annealing.phase(state.evaluations))
        state.draw_subset(2)
        power = 2 + 2 * state.phase

        def loss(weight=weight, power=power):
            off = (curves * (state.z - goal)).square()
            parts = off.sum() + off[state.subset].sum() + weight * state.z.abs().pow(power).sum()
            return parts + state.label_variables.square().sum()

        state.minimise(loss, Budget(1000), redrawn=resample)
        found.append(state.z.detach().clone())
    return state, found


@pytest.mark.parametrize(("name", "resample"), [("lbfgs", None), ("adam", None), ("adam", 3)])
def test_recorded_evaluations_give_the_same_iterates(name, resample):
    _, alone = valley(name=name, resample=resample)
    state, found = valley(faithful, name, resample)
    assert all(map(torch.equal, found, alone))
    assert state.evaluation.replays > 80
    assert state.evaluation.why_not == ""


def test_keys_that_do_not_last_are_recorded_once():
    x, recorded = torch.zeros(3).requires_grad_(), []
    evaluation = Evaluation([x], lambda *both: recorded.append(1) or faithful(*both))

    def work():
        (x.grad,) = torch.autograd.grad((x - 1).square().sum(), x)
        return (x - 1).square().sum().detach()

    for key in range(10):
        for _ in range(20):
            evaluation(work, key)
    assert len(recorded) == 1
    for _ in range(2 * LASTING):
        evaluation(work, "lasting")
    assert len(recorded) == 2


@pytest.mark.parametrize(("recorder", "said"), [(stale, "other values"), (impossible, "stream is capturing")])
def test_a_recording_that_is_wrong_or_impossible_is_given_up(recorder, said):
    _, alone = valley()
    state, found = valley(recorder)
    assert all(map(torch.equal, found, alone))
    assert state.evaluation.replays == 0
    assert said in state.evaluation.why_not


def test_an_attack_on_the_cpu_records_nothing_and_says_so(cli):
    cli("--cuda_graphs", "off", "--device", "cpu")
    assert "--cuda_graphs (the attack does not run on a GPU)" in cli.out
    assert "on" in cli.error("--cuda_graphs", "on")
    state, _ = attack_of()
    assert state.recorder is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("words", ["", "--model convnet", "--signals auto --image_size 32 --batch_size 16"])
def test_a_gpu_replays_and_finds_the_same(cli, words):
    many = ["--device", "cuda", "--dtype", "float64", "--max_evals", 150, "--n_iter", 100, *words.split()]
    plain, replayed = (metrics_of(cli(*many, "--cuda_graphs", how, name=how)) for how in ("off", "auto"))
    assert replayed["psnr"] == pytest.approx(plain["psnr"], abs=0.1)
    assert replayed["replays_on_gpu"] > 50 or "a replay takes" in replayed["not_replayed"]
    assert plain["replays_on_gpu"] == 0
