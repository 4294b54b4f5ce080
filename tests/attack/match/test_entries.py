"""What a defended update says of the gradient, against what the clients' own functions make of one."""

import math

import pytest
import torch
from conftest import generator, metrics_of
from hypothesis import given
from hypothesis import strategies as st

from attack.match.entries import CORNER, UNLIKELY, WRONG_SIGN, Answers, Entries, Rounded, Signs, Within, observed
from attack.published.presets import PRESETS
from client.defences import ACTS, quantised, signs, sparse_vector
from client.victim import share_update
from network.zoo import build_model
from update.defences import Defences
from update.optimiser import LocalOptimiser
from update.shared import SharedUpdate
from update.training import FEDSGD, LocalTraining, train_locally


def gradients(seed=0):
    """Two tensors of different size, as by parameter name."""
    drawn = generator(seed)
    return {"a": torch.randn(40, generator=drawn).double(), "b": 10 * torch.randn(7, 5, generator=drawn).double()}


def entries_of(named):
    return tuple(named.values())


def within(sent, words, relative=False):
    return Within(sent, relative, steps=tuple(Defences.parse(words).of_gradient(FEDSGD)))


def test_hand_computed_cases():
    sent = (torch.tensor([3.0, 0.0, -2.0]), torch.tensor([0.0]))
    other = (torch.tensor([1.0, 1.5, -2.0]), torch.tensor([-5.0]))
    assert Entries(sent)(other) == 4 + 2.25 + 25
    assert within(sent, "topk:0.5")(other) == 4 + 0 + 9
    assert within(sent, "percentile:40,truncate:3")(other) == 4 + 0 + 9
    assert within(sent, "truncate:3")((torch.tensor([7.0, 1.5, -2.0]), torch.tensor([0.0]))) == 0 + 1.5**2
    bounds = within((torch.tensor([127.0, 0.0]),), "int8")
    assert bounds((torch.tensor([128.0, -0.75]),)) == 0.5**2 + 0.25**2
    bounds = within((torch.tensor([9.0, -4.0, 0.0]),), "feedback:0.6:2")
    assert bounds((torch.tensor([4.0, -1.0, 5.0]),)) == 1 + 1 + 1
    sent, other = (torch.tensor([2.0, -2.0]),), (torch.tensor([1.0, 4.0]),)
    assert Signs(sent)(other) == WRONG_SIGN * 16 + 2 * 0.5**2
    rounded = Rounded((torch.tensor([3.0, 0.0]),), steps=3)
    assert (rounded.sizes, rounded.variances) == ([1.0], [pytest.approx(1 / 6)])
    r = math.sqrt(0.25 + CORNER**2) - CORNER
    assert float(rounded((torch.tensor([3.5, 0.0]),))) == pytest.approx(-2 / 6 * math.log(1 - r))


def test_what_a_defence_may_have_left_out_is_a_share_of_each_tensor():
    sent = (torch.tensor([3.0, 0.0, 4.0, 0.0]), torch.zeros(2), torch.ones(3))
    pruned = math.sqrt(2 * 1.0**2 / 3) / 5  # the least that was sent is 1
    assert within(sent, "topk:0.5").missing == [pytest.approx(pruned), 1.0, 0.0]
    assert within(sent, "truncate:4").missing == [1.0, 1.0, 0.0]
    assert within(sent, "truncate:5").missing == [0.0, 1.0, 0.0]
    assert within(sent, "int8").missing == pytest.approx([math.sqrt(2 * (4 / 254) ** 2 / 3) / 5, 1, 0], abs=1e-6)
    assert Entries(sent).missing == [0.0] * 3
    assert [kind.is_legible for kind in (Entries, Within, Rounded, Signs, Answers)] == [True] * 3 + [False] * 2


@given(st.integers(0, 10**6), st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_a_gradient_is_no_distance_from_what_is_left_of_it(seed, share):
    own = gradients(seed)
    other = {name: -2 * gradient for name, gradient in own.items()}
    for words in (f"topk:{share}", f"feedback:{share}:3", f"percentile:{100 - 99 * share}", "truncate:0.3", "int8"):
        step = Defences.parse(words).steps[0]
        told = within(entries_of(ACTS[step.name](own, *step.amounts)), words)
        assert float(told(entries_of(own))) < 1e-20 < float(told(entries_of(other)))
    told = Signs(entries_of(signs(own)))
    assert float(told(entries_of(own))) < 1e-20 < float(told(entries_of(other)))


@pytest.mark.parametrize(
    "kind", [Entries, Signs, lambda *a: within(a[0], "topk:0.5", a[1]), lambda *a: Rounded(*a, steps=3)]
)
def test_relative_distances_are_the_same_whatever_the_size_of_a_tensor(kind):
    sent, other = entries_of(signs(gradients())), entries_of(gradients(1))
    plain = float(kind(sent, True)(other))
    assert plain > 0
    larger = [(1e3 * first, second) for first, second in (sent, other)]
    assert float(kind(larger[0], True)(larger[1])) == pytest.approx(plain, rel=1e-9)


def test_a_gradient_of_nothing_is_one_relative_unit_away():
    sent = entries_of(gradients())
    assert float(Entries(sent, True)(tuple(torch.zeros_like(q) for q in sent))) == pytest.approx(1)
    silent = (torch.zeros(4), torch.ones(4))  # a tensor of zeros has no size to measure by
    assert math.isfinite(float(Entries(silent, True)((torch.ones(4), torch.ones(4)))))


def test_of_what_is_whole_nothing_was_pruned():
    sent, other = entries_of(gradients()), entries_of(gradients(1))
    assert float(within(sent, "topk:1")(other)) == float(Entries(sent)(other))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_gradient_is_the_likeliest_of_its_multiples(bits):
    own = {"a": torch.randn(20_000, generator=generator(3)).double() ** 3}
    likelihood = Rounded(entries_of(quantised(own, bits, generator=generator())), steps=2**bits - 1)
    distances = {scale: float(likelihood((scale * own["a"],))) for scale in (0.5, 0.8, 1.0, 1.25, 2.0)}
    assert min(distances, key=distances.get) == 1.0


@pytest.mark.parametrize("noise_var", [0.5, 20.0])
def test_noisy_answers_are_compared_with_what_a_gradient_would_send_on_average(noise_var):
    own = {"a": 0.3 * torch.randn(20_000, generator=generator(3)).double()}
    sent = sparse_vector(own, 1.0, 1e6, noise_var, 1.0, 0.0, generator=generator())
    told = Answers(entries_of(sent), gamma=1.0, spread=2 / noise_var)
    distances = {scale: float(told((scale * own["a"],))) for scale in (-1.0, 0.0, 0.4, 1.0, 1.6)}
    assert min(distances, key=distances.get) == 1.0
    missing = Answers((torch.tensor([0.0, 0.5]),), gamma=1.0, spread=1e-3)
    assert float(missing((torch.tensor([9.0, 0.5]),))) < 1e-9
    assert float(missing((torch.tensor([9.0, 3.0]),))) == pytest.approx(2.5**2)


def test_it_goes_on_beyond_what_can_have_been_rounded():
    likelihood = Rounded((torch.tensor([1.0, 0.0]),), steps=1)
    at = [float(likelihood((torch.tensor([1.0, r]),))) for r in (0.5, UNLIKELY, UNLIKELY + CORNER, 2.0, 4.0)]
    assert at == sorted(at)
    assert math.isfinite(at[-1])
    assert float(Rounded((torch.zeros(3),), steps=1)((torch.ones(3),))) == 3  # a tensor of zeros was not rounded


def test_where_rounding_becomes_impossible_its_likelihood_has_no_kink():
    likelihood = Rounded((torch.tensor([1.0, 0.0]).double(),), steps=1)
    edge = math.sqrt((UNLIKELY + CORNER) ** 2 - CORNER**2)
    at = [torch.tensor([1.0, edge + shift], dtype=torch.float64, requires_grad=True) for shift in (-1e-6, 1e-6)]
    below, above = (torch.autograd.grad(likelihood((p,)), p)[0][1] for p in at)
    assert float(above) == pytest.approx(float(below), rel=1e-4)


@pytest.mark.parametrize(
    ("defence", "kind"),
    [
        ("none", Entries),
        ("topk:0.1", Within),
        ("topk:0.1,float16", Within),
        ("noise:0.1,percentile:10,truncate:0.1,int8", Within),
        ("int8,localdp:1:1:1:1e-5", Entries),
        ("svt:0.1:1:1:1:0,float16", Answers),
        ("noise:0.1,sign", Signs),
        ("quantise:3", Rounded),
        ("topk:0.1,quantise:3", Rounded),
        ("sign,noise:0.1", Entries),
        ("topk:0.1,secure_sum:2", Entries),
    ],
)
def test_the_last_defence_decides(defence, kind):
    model = build_model("lenet5", image_shape=(1, 16, 16), num_classes=5, generator=generator())
    own = {name: torch.ones_like(weight) for name, weight in model.named_parameters()}
    assert type(observed(SharedUpdate(own, {}, "lenet5", 2, (1, 16, 16), 5, defence=defence), model)) is kind


@pytest.mark.parametrize(("defence", "gain"), [("topk:0.1", 6), ("sign", 4), ("quantise:3", 1.5), ("truncate:0.1", 6)])
def test_it_brings_images_out(cli, defence, gain):
    flags = ["--batch_size", 2, "--n_iter", 20, "--inner_iter", 20, "--max_evals", 70, "--defence", defence]
    told = metrics_of(cli(*flags, name="told"))
    as_they_stand = metrics_of(cli(*flags, "--distance", "l2", name="as_they_stand"))
    assert told["psnr_mean"] > as_they_stand["psnr_mean"] + gain


def test_published_attacks_match_entries_as_they_stand():
    assert all("distance" in preset for name, preset in PRESETS.items() if name != "magia")


@pytest.mark.parametrize("rule", [{"name": "adam"}, {"name": "adam", "weight_decay": 0.1}, {"name": "adamw"}])
def test_one_step_of_adam_is_compared_by_what_it_leaves_of_each_entry(rule):
    model = build_model("lenet", image_shape=(3, 16, 16), num_classes=10, generator=generator(1))
    images, labels = torch.rand(2, 3, 16, 16, generator=generator(2)), torch.tensor([1, 7])
    training = LocalTraining(rate=1e-3, optimiser=LocalOptimiser(**rule))
    update = share_update(model, "lenet", images, labels, 10, training=training)
    entries = observed(update, model)
    own, other = (train_locally(model, x, labels, entries.imitated(training)).average for x in (images, images.flip(0)))
    assert entries(own) < 1e-2 * entries(other)
    turned = tuple(-each for each in own)
    assert entries(turned) > entries(other)
