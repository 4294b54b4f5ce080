"""The client's optimiser, against torch.optim step for step."""

import copy

import pytest
import torch
from conftest import generator
from torch import nn

from client.victim import share_update
from network.parameters import trainable
from network.zoo import build_model
from update.optimiser import LocalOptimiser
from update.training import LocalTraining, train_locally

SGD, SCHEDULERS = torch.optim.SGD, torch.optim.lr_scheduler
RULES = {
    "momentum": ({"momentum": 0.9}, lambda p: SGD(p, 0.1, momentum=0.9)),
    "nesterov": ({"momentum": 0.9, "nesterov": True}, lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True)),
    "decay": ({"weight_decay": 0.3}, lambda p: SGD(p, 0.1, weight_decay=0.3)),
    "all": (
        {"momentum": 0.9, "weight_decay": 0.3, "nesterov": True},
        lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=0.3, nesterov=True),
    ),
    "clip": ({"clip": 0.5, "momentum": 0.5}, lambda p: SGD(p, 0.1, momentum=0.5)),
    "prox": ({"prox": 0.7, "momentum": 0.9}, lambda p: SGD(p, 0.1, momentum=0.9)),
    "prox and clip": ({"prox": 0.7, "clip": 0.5}, lambda p: SGD(p, 0.1)),
    "adam": ({"name": "adam"}, lambda p: torch.optim.Adam(p, 0.1)),
    "adam, decay": ({"name": "adam", "weight_decay": 0.3}, lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.3)),
    "adam, prox": ({"name": "adam", "prox": 0.7}, lambda p: torch.optim.Adam(p, 0.1)),
    "adam, betas": ({"name": "adam", "betas": (0.5, 0.9)}, lambda p: torch.optim.Adam(p, 0.1, betas=(0.5, 0.9))),
    "adam, no memory": ({"name": "adam", "betas": (0.0, 0.0)}, lambda p: torch.optim.Adam(p, 0.1, betas=(0.0, 0.0))),
    "adamw": ({"name": "adamw"}, lambda p: torch.optim.AdamW(p, 0.1)),
    "adamw, decay": ({"name": "adamw", "weight_decay": 0.3}, lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.3)),
    "adamw, betas, eps": (
        {"name": "adamw", "betas": (0.8, 0.95), "eps": 0.01},
        lambda p: torch.optim.AdamW(p, 0.1, betas=(0.8, 0.95), eps=0.01),
    ),
}
RATES = {
    "constant": None,
    "cosine": lambda optimiser: SCHEDULERS.CosineAnnealingLR(optimiser, T_max=6),
    "linear": lambda optimiser: SCHEDULERS.LinearLR(optimiser, 1.0, 0.0, total_iters=6),
    "step:2:0.1": lambda optimiser: SCHEDULERS.StepLR(optimiser, 2, 0.1),
    "exponential:0.7": lambda optimiser: SCHEDULERS.ExponentialLR(optimiser, 0.7),
    "warmup:3": lambda optimiser: SCHEDULERS.LinearLR(optimiser, 1 / 3, 1.0, total_iters=2),
    "warmup:20": lambda optimiser: SCHEDULERS.LinearLR(optimiser, 1 / 20, 1.0, total_iters=19),
    "warmup:1": None,
    "warmup:2:cosine": lambda optimiser: SCHEDULERS.SequentialLR(
        optimiser,
        [SCHEDULERS.LinearLR(optimiser, 1 / 2, 1.0, total_iters=1), SCHEDULERS.CosineAnnealingLR(optimiser, T_max=4)],
        milestones=[2],
    ),
    "warmup:2:linear": lambda optimiser: SCHEDULERS.SequentialLR(
        optimiser,
        [
            SCHEDULERS.LinearLR(optimiser, 1 / 2, 1.0, total_iters=1),
            SCHEDULERS.LinearLR(optimiser, 1.0, 0.0, total_iters=4),
        ],
        milestones=[2],
    ),
    "1,0.5,0.25,1,2,0.1": lambda optimiser: SCHEDULERS.LambdaLR(optimiser, [1, 0.5, 0.25, 1, 2, 0.1, 1].__getitem__),
    "1,0.5": lambda optimiser: SCHEDULERS.LambdaLR(optimiser, lambda step: 1 if step < 3 else 0.5),  # of each pass
}


def setting(count=7):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    return model, torch.rand(count, 3, 2, 2, generator=generator(1)).double(), torch.arange(count) % 5


def by_torch(model, images, labels, training, made, schedule=None):
    """The client's own loop, with torch's own parts: the weights that it ends at."""
    model = copy.deepcopy(model)
    start = [p.detach().clone() for p in model.parameters()]
    optimiser = made(list(model.parameters()))
    rates = schedule and schedule(optimiser)
    for part in training.schedule(len(images)):
        optimiser.zero_grad()
        loss = training.loss.each(model(images[part]), labels[part]).mean()
        pull = sum((p - q).square().sum() for p, q in zip(model.parameters(), start, strict=True))
        (loss + training.optimiser.prox / 2 * pull).backward()
        if training.optimiser.clip:
            nn.utils.clip_grad_norm_(model.parameters(), training.optimiser.clip)
        optimiser.step()
        if rates:
            rates.step()
    return list(model.parameters())


@pytest.mark.parametrize("rule", RULES)
def test_every_step_is_that_of_torch(rule):
    (facts, made), (model, images, labels) = RULES[rule], setting()
    training = LocalTraining(6, 3, 0.1, optimiser=LocalOptimiser(**facts), sizes=(3, 3, 1))
    trained = train_locally(model, images, labels, training)
    for mine, theirs in zip(trained.weights, by_torch(model, images, labels, training, made), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)
    combination = training.combination()
    for old, new, average in zip(trainable(model).values(), trained.weights, trained.average, strict=True):
        assert torch.allclose(combination.difference(old, new), average, rtol=0, atol=1e-11)


@pytest.mark.parametrize("schedule", RATES)
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_rates_are_those_of_torchs_schedulers(schedule, momentum):
    model, images, labels = setting(6)
    training = LocalTraining(6, 3, 0.1, optimiser=LocalOptimiser(momentum=momentum, schedule=schedule))
    theirs = by_torch(model, images, labels, training, lambda p: SGD(p, 0.1, momentum=momentum), RATES[schedule])
    for mine, other in zip(train_locally(model, images, labels, training).weights, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["momentum", "nesterov", "decay", "all", "clip", "prox"])
def test_the_weights_before_every_step_are_the_combination_that_the_coefficients_say(rule):
    (facts, _), (model, images, labels) = RULES[rule], setting(6)
    facts = {**facts, "schedule": "cosine"}
    training = LocalTraining(6, 3, 0.1, optimiser=LocalOptimiser(**facts))
    found, parts = training.coefficients(), training.schedule(6)
    start = [p.detach() for p in model.parameters()]
    gradients, walk = [], training.optimiser.begun(start)
    for step, factor in enumerate(training.optimiser.factors(6, 2)):
        for index, weight in enumerate(walk.weights):
            told = found.alpha[step] * start[index]
            told = told - sum(found.beta[step, s] * gradients[s][index] for s in range(step))
            assert torch.allclose(weight, told, rtol=0, atol=1e-12)
        assert not found.beta[step, step:].any()
        here = [weight.requires_grad_() for weight in walk.weights]
        named = dict(zip(trainable(model), here, strict=True))
        logits = torch.func.functional_call(model, named, (images[parts[step]],))
        loss = training.loss.each(logits, labels[parts[step]]).mean()
        gradients.append(walk.direction(torch.autograd.grad(loss, here)))
        with torch.no_grad():
            walk.move(gradients[-1], 0.1 * factor)
    assert float(found.beta[-1].sum()) == pytest.approx(training.reach, rel=1e-12)


def test_of_plain_sgd_the_coefficients_are_the_rate_itself():
    training = LocalTraining(7, 1, 0.3)
    found = training.coefficients()
    assert torch.equal(found.alpha, torch.ones(8, dtype=torch.float64))
    assert torch.equal(found.beta, 0.3 * torch.ones(8, 7, dtype=torch.float64).tril(-1))
    assert training.reach == 7 * 0.3


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_differentiated_through_all_steps(rule):
    (facts, _), (model, images, labels) = RULES[rule], setting(4)
    training = LocalTraining(4, 2, 0.1, optimiser=LocalOptimiser(**{**facts, "schedule": "cosine"}))
    goal = [torch.randn(p.shape, generator=generator(3), dtype=torch.float64) for p in model.parameters()]

    def loss(x):
        own = train_locally(model, x, labels, training, create_graph=True).average
        return sum((p * q).sum() for p, q in zip(own, goal, strict=True))

    x = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(x), x)
    step = 1e-6 * torch.randn(x.shape, generator=generator(4), dtype=torch.float64)
    rise = (loss(x + step) - loss(x - step)).detach() / 2
    assert float(rise) == pytest.approx(float((slope * step).sum()), rel=1e-5)


def test_entries_that_no_gradient_reaches_leave_adams_slopes_finite():
    model, images, labels = setting(4)
    model[1].weight.data[0], model[1].bias.data[0], model[2] = 0.0, -1.0, nn.ReLU()  # a unit that is off for all images
    training = LocalTraining(2, 1, 0.1, optimiser=LocalOptimiser("adam"))
    x = images.clone().requires_grad_()
    own = train_locally(model, x, labels, training, create_graph=True).average
    (slope,) = torch.autograd.grad(sum(p.square().sum() for p in own), x)
    assert slope.isfinite().all()


@pytest.mark.parametrize("rule", ["all", "adamw"])
def test_the_update_is_what_the_weights_difference_gives(rule):
    (facts, made), (images, labels) = RULES[rule], (torch.rand(4, 3, 16, 16, generator=generator(2)), torch.arange(4))
    model = build_model("lenet", image_shape=(3, 16, 16), num_classes=10, generator=generator(1)).double()
    training = LocalTraining(4, 2, 0.1, optimiser=LocalOptimiser(**facts))
    update = share_update(model, "lenet", images.double(), labels, 10, training=training)
    new, found = by_torch(model, images.double(), labels, training, made), training.coefficients()
    for (name, old), after in zip(trainable(model).items(), new, strict=True):
        told = (found.alpha[-1] * old - after) / found.beta[-1].sum()
        assert torch.allclose(update.gradients[name], told, rtol=0, atol=1e-10)


def test_a_shuffling_client_keeps_its_order_to_itself():
    model, images, labels = setting(5)
    training = LocalTraining(6, 2, 0.1, sizes=(2, 2), shuffle=True)
    update = share_update(model, "net", images, labels, 5, training=training, generator=generator(7))
    assert update.training.order is None
    own = training.shuffled(5, generator(7))
    drawn = [sorted(torch.cat(own.schedule(5)[step : step + 2]).tolist()) for step in (0, 2, 4)]
    assert all(len(set(each)) == 4 for each in drawn)
    assert len({*map(tuple, drawn)}) > 1  # the fifth image is not always the one that is dropped
    trained = train_locally(model, images, labels, own)
    for name, average in zip(update.gradients, trained.average, strict=True):
        assert torch.allclose(update.gradients[name], average, atol=1e-12)


def test_autocast_rounds_the_clients_activations():
    model, images, labels = setting(4)
    model, images = model.float(), images.float()
    exact, coarse = (LocalTraining(2, 1, 0.1, precision=each) for each in ("float32", "bfloat16"))
    with torch.autocast("cpu", torch.bfloat16):
        by_hand = torch.nn.functional.cross_entropy(model(images), labels)
    by_hand = torch.autograd.grad(by_hand, tuple(model.parameters()))
    first = train_locally(model, images, labels, LocalTraining(precision="bfloat16")).average
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(first, by_hand, strict=True))
    fine, rough = (train_locally(model, images, labels, each).average for each in (exact, coarse))
    left = max(float((p - q).norm() / p.norm()) for p, q in zip(fine, rough, strict=True))
    assert 1e-4 < left < 0.05


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"name": "lion"}, "--local_optimizer"),
        ({"momentum": 1.0}, "--local_momentum"),
        ({"name": "adam", "momentum": 0.9}, "not of adam"),
        ({"nesterov": True}, "needs --local_momentum"),
        ({"weight_decay": -1.0}, "--local_weight_decay"),
        ({"prox": float("inf")}, "--local_prox"),
        ({"clip": 0.0}, "--local_clip"),
        ({"schedule": "poly"}, "--local_schedule"),
        ({"schedule": "step:0:0.1"}, "--local_schedule"),
        ({"schedule": "exponential:0"}, "--local_schedule"),
        ({"schedule": "1,-1"}, "--local_schedule"),
        ({"schedule": "warmup"}, "--local_schedule"),
        ({"schedule": "warmup:0"}, "--local_schedule"),
        ({"schedule": "warmup:2:steep"}, "--local_schedule"),
        ({"schedule": "warmup:2:cosine:1"}, "--local_schedule"),
        ({"name": "adam", "betas": (0.9, 1.0)}, "--local_betas"),
        ({"name": "adam", "betas": (0.9,)}, "--local_betas"),
        ({"name": "adam", "eps": 0.0}, "--local_eps"),
        ({"betas": (0.5, 0.9)}, "not of sgd"),
    ],
)
def test_rules_that_cannot_be_are_refused(facts, words):
    with pytest.raises(ValueError, match=words):
        LocalOptimiser(**facts)


def test_factors_of_another_number_of_steps_are_refused():
    with pytest.raises(ValueError, match="3 factors, for 4 steps in 2 passes"):
        LocalTraining(4, 2, 0.1, optimiser=LocalOptimiser(schedule="1,1,1"))
