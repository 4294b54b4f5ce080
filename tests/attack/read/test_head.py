import dataclasses
import itertools
import math

import pytest
import torch
from conftest import SIGNALS, metrics_of, resolved
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attack.read.head.by_random_images import choose_labels, recover_signals
from attack.read.head.equations import HeadEquations, HeadSpan, solve
from attack.read.head.gradient import HeadGradient
from attack.read.head.noise import additive_noise, noise_floor, row_weights
from attack.read.label_counts import PLAUSIBLE, RIVALS, LabelCounts
from attack.read.random_images import SAMPLE, random_features
from attack.solve.budget import OutOfTimeError, WorkBudget, unlimited
from attack.solve.rounding import precision_of
from client.victim import share_update
from data import load_batch, open_source
from network.head import features_of
from network.zoo import build_model


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def case(labels, name="lenet", num_classes=20, dtype=torch.float32, first=0):
    """An update of real images with the given labels, its model, and what the signals should be."""
    source, indices = open_source("sample", None), range(first, first + len(labels))
    images = load_batch(
        source, indices, labels="dataset", num_classes=10, generator=generator(), image_size=16
    ).images.to(dtype)
    model = build_model(name, image_shape=(3, 16, 16), num_classes=num_classes, generator=generator(1)).to(dtype)
    labels = torch.tensor(labels)
    update = share_update(model, name, images, labels, num_classes)
    return update, model, labels, features_of(model, images).detach().double()


def match(signals, features):
    """For each signal the nearest true image, and the relative error of its features."""
    distance = torch.cdist(signals.values, features) / features.norm(dim=1)
    return distance.argmin(1), distance.min(1).values


def read(update, model):
    return recover_signals(update, model, generator=generator(2), budget=unlimited())


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("lenet", [7]),
        ("lenet", [3, 11, 0, 19, 5]),
        ("lenet", [4, 4, 9, 4, 2]),
        ("convnet", [3, 11, 0, 19, 5]),
        ("convnet", [4, 4, 9, 4, 2]),
        ("resnet18", [3, 11, 0, 19, 5]),
        ("mlp", [3, 11, 0, 19, 5]),
        ("mlp", [4, 4, 9, 4, 2]),
        ("lenet", [4, 4, 9, 4, 2, 7, 7, 15, 0, 1, 9, 12, 3, 3, 16, 18, 19]),  # 17 images, 20 classes
    ],
)
def test_every_label_and_feature_vector_is_read_from_a_float32_update(name, labels):
    update, model, truth, features = case(labels, name)
    signals = read(update, model)
    assert len(signals) == len(labels)
    nearest, error = match(signals, features)
    assert sorted(nearest.tolist()) == list(range(len(labels)))
    assert torch.equal(signals.labels, truth[nearest])
    assert error.max() < 0.01
    assert (signals.certificates - 1).abs().max() < 0.05


def test_float64_updates_give_features_to_many_digits():
    update, model, _, features = case([3, 11, 0, 19, 5], dtype=torch.float64)
    signals = read(update, model)
    assert len(signals) == 5
    assert match(signals, features)[1].max() < 1e-12


def test_the_gradient_is_the_sum_of_its_signals():
    update, model, _, _ = case([3, 11, 0, 3, 5])
    signals = read(update, model)
    rebuilt = signals.deltas.T @ signals.values / 5
    assert torch.allclose(rebuilt, update.gradients["head.weight"].double(), atol=1e-5)


def head_of(model, update):
    weight, bias = model.head.weight.detach().double(), model.head.bias.detach().double()
    return weight, bias, *(update.gradients[f"head.{name}"].double() for name in ("weight", "bias"))


def equations_of(model, update, labels):
    weight, bias, gradient, bias_gradient = head_of(model, update)
    rows = row_weights(gradient, additive_noise(gradient), precision_of(update.gradients["head.weight"]))
    span = HeadSpan.of(rows[:, None] * gradient, len(labels))
    return HeadEquations(span, rows, weight, bias, bias_gradient, labels)


def test_the_certificate_is_one_over_the_batch_size_for_true_pairs_only():
    update, model, labels, features = case([3, 11, 0, 19, 5])
    weight, bias, gradient, _ = head_of(model, update)
    span = HeadSpan.of(gradient, 5)
    errors = (features @ weight.T + bias).softmax(1) - torch.nn.functional.one_hot(labels, 20)
    assert torch.allclose(span.certificate(features, errors), torch.full((5,), 0.2).double(), atol=1e-3)
    assert ((span.certificate(features.roll(1, 0), errors) - 0.2).abs() > 0.1).all()


def test_the_equations_hold_at_the_truth():
    update, model, labels, features = case([3, 11, 0, 3, 5], dtype=torch.float64)
    equations = equations_of(model, update, labels)
    q = features @ HeadSpan.of(equations.rows[:, None] * head_of(model, update)[2], 5).right.T
    assert equations.at(q).cost < 1e-20


def test_derivatives_of_the_equations_agree_with_autograd():
    update, model, labels, _ = case([3, 11, 0, 3])
    equations = equations_of(model, update, labels)
    q = torch.randn(4, 4, generator=generator()).double()
    at = equations.at(q)
    jacobian = torch.autograd.functional.jacobian(lambda q: equations.at(q).f, q).reshape(-1, 16)
    assert torch.allclose(equations.normal(at), jacobian.T @ jacobian)
    f = torch.randn(at.f.shape, generator=generator(1)).double()
    assert torch.allclose(equations.vjp(at, f).flatten(), jacobian.T @ f.flatten())
    v = torch.randn(4, 4, generator=generator(2)).double()

    def along(step):
        return torch.autograd.functional.jvp(lambda q: equations.at(q).f, q + step * v, v)[1]

    assert torch.allclose(equations.hvp(at, v), (along(1e-5) - along(-1e-5)) / 2e-5, rtol=1e-5, atol=1e-7)


def test_starts_that_saturate_do_no_harm():
    """Far out, softmax is one-hot and the normal matrix is singular."""
    update, model, labels, _ = case([3, 11, 0, 19, 5])
    equations = equations_of(model, update, labels)
    start = 1e6 * torch.randn(5, 5, generator=generator()).double()
    end = solve(equations, start, 20, unlimited())
    assert end.isfinite().all()
    assert equations.at(end).cost <= equations.at(start).cost


def test_row_weights_lift_images_that_share_a_label_out_of_rounding():
    update, model, _, _ = case([4, 4, 9, 4, 2, 9, 4])
    gradient, eps = head_of(model, update)[2], torch.finfo(torch.float32).eps
    scaled = row_weights(gradient, additive_noise(gradient), eps)[:, None] * gradient

    def contrast(matrix):
        return float(torch.linalg.svdvals(matrix)[6] / noise_floor(matrix, eps))

    assert contrast(scaled) > 10 * contrast(gradient)


def test_added_noise_is_measured_and_rounding_recognised():
    update, model, _, _ = case([3, 11, 0, 19, 5])
    gradient = head_of(model, update)[2]
    noisy = gradient + 1e-3 * torch.randn(gradient.shape, generator=generator()).double()
    assert additive_noise(noisy) == pytest.approx(1e-3, rel=0.2)
    assert additive_noise(gradient) < 1e-8
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert precision_of(noisy.to(dtype).double()) == torch.finfo(dtype).eps


@given(st.lists(st.floats(-3, 6), min_size=2, max_size=12), st.integers(1, 30))
@example([0.0, 1.964776765737536e-10, 1.964776765737536e-10], 7)  # a tie up to rounding
def test_label_counts_are_whole_and_sum_to_the_batch(expected, batch_size):
    size = len(expected)
    counts = LabelCounts(torch.tensor(expected).double(), torch.eye(size).double(), batch_size)
    likeliest = counts.likeliest()
    assert likeliest.sum() == batch_size
    assert (likeliest >= 0).all()
    assert torch.equal(likeliest, likeliest.round())
    assert torch.equal(counts.plausible()[0], likeliest)
    for price, other in counts.exchanges(likeliest):
        if math.isfinite(price):
            before, after = ((n - counts.expected).square().sum() for n in (likeliest, other))
            assert price == pytest.approx(float(after - before), abs=1e-9)
            assert price >= -1e-9


def sets_of_labels(classes, batch_size):
    """All counts (K,) of so many labels."""
    for bars in itertools.combinations(range(batch_size + classes - 1), classes - 1):
        edges = (-1, *bars, batch_size + classes - 1)
        yield [after - before - 1 for before, after in itertools.pairwise(edges)]


PRECISIONS = [0.113, 0.317, 0.917, 3.17]  # at none of them is a set of labels just as far off as is plausible


@settings(max_examples=30)
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6), st.integers(1, 6), st.sampled_from(PRECISIONS))
def test_plausible_are_the_counts_nearest_to_what_is_expected_of_all_there_are(shares, batch_size, precision):
    expected = torch.tensor(shares).double() * batch_size / sum(shares)
    counts = LabelCounts(expected, precision * torch.eye(len(shares)).double(), batch_size)

    def distance(tried):
        return float(precision * (torch.as_tensor(tried).double() - expected).square().sum())

    every = sorted(distance(tried) for tried in sets_of_labels(len(shares), batch_size))
    near = [each for each in every[:RIVALS] if each < every[0] + PLAUSIBLE]
    assert [distance(tried) for tried in counts.plausible()] == pytest.approx(near, abs=1e-9)


def test_the_right_counts_of_real_images_are_plausible():
    far = []
    for seed in range(6):
        labels = torch.randint(20, (16,), generator=generator(seed)).tolist()
        update, model, truth, _ = case(labels, first=16 * seed)
        sample = random_features(model, update.image_shape, SAMPLE, generator(seed)).double()
        counts = LabelCounts.of(HeadGradient.of(update, model), sample)
        off = torch.bincount(truth, minlength=20) - counts.expected
        far.append(float(off @ counts.precision @ off))
    assert max(far) < PLAUSIBLE


def test_labels_that_the_bias_leaves_open_are_settled_by_the_fit():
    """The likeliest counts are made wrong by one exchange; the right ones are among the plausible."""
    update, model, truth, features = case([3, 11, 0, 19, 5])
    head = HeadGradient.of(update, model)
    right = torch.bincount(truth, minlength=20).double()
    wrong = right.clone()
    wrong[3], wrong[4] = 0, 1
    doubt = LabelCounts(0.6 * wrong + 0.4 * right, torch.eye(20).double(), 5)
    assert torch.equal(doubt.likeliest(), wrong)
    mean = features.mean(0) + 0.1 * (features.roll(1, 0) - features.mean(0))
    _, labels = choose_labels(head, doubt, mean @ head.span.right.T, unlimited())
    assert sorted(labels.tolist()) == sorted(truth.tolist())


def test_without_the_bias_gradient_features_are_still_read():
    update, model, truth, features = case([3, 11, 0, 3, 5])
    without = {name: g for name, g in update.gradients.items() if name != "head.bias"}
    signals = read(dataclasses.replace(update, gradients=without), model)
    nearest, error = match(signals, features)
    assert sorted(nearest.tolist()) == [0, 1, 2, 3, 4]
    assert torch.equal(signals.labels, truth[nearest])
    assert error.max() < 0.01


@pytest.mark.parametrize("labels", [[3, 11, 0, 19, 5], [4, 4, 9, 4, 2]])
def test_what_is_claimed_of_a_noisy_update_is_right(labels):
    update, model, truth, features = case(labels)

    def read_noisy(scale):
        noisy = {n: g + scale * torch.randn(g.shape, generator=generator(3)) for n, g in update.gradients.items()}
        return read(dataclasses.replace(update, gradients=noisy), model)

    counts = []
    for scale in (1e-7, 1e-5, 1e-4, 1e-3):
        signals = read_noisy(scale)
        nearest, error = match(signals, features)
        assert torch.equal(signals.labels, truth[nearest])
        assert error.max() < 0.1
        counts.append(len(signals))
    assert counts[:2] == [5, 5]
    assert min(counts) >= 1
    assert len(read_noisy(1e-1)) == 0


def test_an_update_rounded_to_sixteen_bits_still_gives_labels_away():
    update, model, truth, features = case([3, 11, 0, 19, 5])
    rounded = {n: g.half().float() for n, g in update.gradients.items()}
    signals = read(dataclasses.replace(update, gradients=rounded), model)
    nearest, error = match(signals, features)
    assert len(signals) >= 4
    assert torch.equal(signals.labels, truth[nearest])
    assert error.max() < 0.05


def test_models_and_batches_that_do_not_permit_signals_say_so():
    update, model, _, _ = case([0, 1, 2, 3, 4])
    with pytest.raises(ValueError, match=r"batch_size is 20: .*at most 19"):
        read(dataclasses.replace(update, batch_size=20), model)
    frozen = dataclasses.replace(update, gradients={n: g for n, g in update.gradients.items() if "head" not in n})
    with pytest.raises(ValueError, match="no gradient of the model's last layer"):
        read(frozen, model)
    model.head = torch.nn.Sequential(model.head, torch.nn.ReLU())
    with pytest.raises(ValueError, match="last layer is not linear"):
        read(update, model)


FLAGS = "--signals auto --batch_size 4 --num_classes 20 --indices 0,10,20,1 --labels dataset --n_iter 3".split()  # noqa: SIM905


@pytest.mark.long
def test_the_run_records_its_signals(cli):
    run = cli(*FLAGS)
    figures = metrics_of(run)
    assert figures["signals_found"] == len(figures["signals"]) == 4
    assert figures["signals_label_accuracy"] == figures["label_accuracy"] == 1
    assert figures["signals_seconds"] > 0
    assert sorted(s["label"] for s in figures["signals"]) == [0, 0, 0, 1]
    assert all(math.isclose(s["certificate"], 1, abs_tol=0.05) for s in figures["signals"])
    assert "signals: 4 of 4" in cli.out


def test_signals_can_be_switched_off_and_are_not_in_the_paper_preset(cli):
    assert metrics_of(cli(*FLAGS, "--signals", "off"))["signals_found"] == 0
    assert resolved("--preset", "paper").signals == "off"


def test_signals_that_must_be_had_and_cannot_are_an_error(cli):
    message = cli.error("--batch_size", 6, "--num_classes", 6, "--signals", "on")
    assert "--signals on: no image can be told apart" in message
    assert "for 6 images" in message
    assert metrics_of(cli("--batch_size", 6, "--num_classes", 6, *SIGNALS, name="auto"))["signals_found"] == 0


@pytest.mark.long
def test_images_that_share_a_label_come_out_sharper_with_signals(cli):
    flags = "--batch_size 3 --num_classes 20 --indices 0,10,20 --labels dataset --image_size 32 --inner_iter 20"
    flags = [*flags.split(), "--n_iter", 300, "--max_evals", 150]
    read = metrics_of(cli(*flags, "--signals", "auto", name="on"))
    mixed = metrics_of(cli(*flags, "--signals", "off", name="off"))
    assert read["psnr_mean"] > mixed["psnr_mean"] + 10  # 22 measured


def test_a_search_ends_when_its_time_is_up():
    update, model, labels, _ = case([3, 11, 0, 19, 5])
    with pytest.raises(OutOfTimeError):
        recover_signals(update, model, generator=generator(), budget=WorkBudget(deadline=0))
    assert len(read(update, model)) == len(labels)
