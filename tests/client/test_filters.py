"""The filters that federated systems ship, against their definitions written out once more in numpy."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from conftest import CPU, SIGNALS, config_of, generator, metrics_of, resolved

from attack.read.error_bars import WITHIN
from attack.read.reader import READING_WORK, read_layers
from cli.ahead import scaled_update
from cli.victim import victim
from client.defences import defend as defend_all
from client.defences import sparse_vector
from client.victim import share_update
from judge.layers import matched
from judge.verdict import CERTAIN
from network.head import features_of
from network.zoo import build_model
from update.defences import Defences
from update.shared import SharedUpdate
from update.training import FEDSGD, LocalTraining, train_locally

SEVERAL = LocalTraining(steps=4, rate=0.05)  # the weight difference is 0.2 times the averaged gradient, 0.05 a step


def update(training=FEDSGD, size=400):
    drawn = generator(3)
    gradients = {"a": torch.randn(size, generator=drawn), "b": 3 * torch.randn(7, 5, generator=drawn)}
    return SharedUpdate(gradients, {}, "lenet", 4, (3, 16, 16), 10, training=training)


def flat(one):
    return torch.cat([gradient.flatten() for gradient in one.gradients.values()]).double().numpy()


def defended(plain, words, seed=0):
    return flat(defend_all([plain], Defences.parse(words), generator=generator(seed)))


@pytest.mark.parametrize(("training", "rate"), [(FEDSGD, 1.0), (SEVERAL, 0.05)])
@pytest.mark.parametrize(("percent", "gamma"), [(10, 0.5), (99, 0.01), (50, 1e6), (0, 0.03), (100, 1e6)])
def test_percentile_and_truncation_are_of_the_weight_difference_over_the_steps(training, rate, percent, gamma):
    plain = update(training)
    step = rate * flat(plain)
    step[np.abs(step) < np.percentile(np.abs(step), percent)] = 0
    wanted = np.clip(step, -gamma, gamma) / rate
    assert np.allclose(defended(plain, f"percentile:{percent},truncate:{gamma}"), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("training", "reach"), [(FEDSGD, 1.0), (SEVERAL, 0.2)])
def test_local_privacy_clips_the_weight_difference_and_adds_the_noise_of_the_gaussian_mechanism(training, reach):
    plain = update(training, size=40_000)
    moved = reach * defended(plain, "localdp:2.5:0.5:4:1e-5")
    clipped = reach * flat(plain)
    clipped *= min(1, 2.5 / np.linalg.norm(clipped))
    noise = moved - clipped
    assert noise.std() == pytest.approx(0.5 * math.sqrt(2 * math.log(1.25e5)) / 4, rel=0.02)
    assert abs(noise.mean()) < 5 * noise.std() / len(noise) ** 0.5
    assert np.abs(np.corrcoef(noise, clipped)[0, 1]) < 5 / len(noise) ** 0.5


def test_eight_bits_are_the_nearest_whole_multiples_of_a_scale_for_each_tensor():
    plain = update()
    plain.gradients["a"][:3] = 0
    plain.gradients["c"] = torch.zeros(4)
    sent = defend_all([plain], Defences.parse("int8")).gradients
    for name, before in plain.gradients.items():
        scale = np.float32(before.abs().max() / 127) or np.float32(1)
        levels = np.rint(before.numpy() / scale)
        assert np.abs(levels).max() <= 127
        assert np.array_equal(sent[name].numpy(), levels * scale)


def test_error_feedback_sends_in_time_all_that_is_due():
    plain = update(size=90)
    assert np.array_equal(defended(plain, "feedback:0.1:1"), defended(plain, "topk:0.1"))
    own, memory = flat(plain), 0
    for rounds in range(1, 8):
        due, sent = memory + own, defended(plain, f"feedback:0.1:{rounds}")
        assert np.allclose(sent[sent != 0], due[sent != 0], rtol=1e-5)
        assert np.abs(sent[sent != 0]).min() >= np.abs(due[sent == 0]).max() * (1 - 1e-6)
        memory = due - sent
    assert np.sum(sent != 0) == round(0.1 * len(own))
    assert np.abs(sent).max() > np.abs(defended(plain, "topk:0.1")).min()


def answers(own, count, epsilon, gamma, tau, draw):
    """The entries that the sparse vector technique accepts, round by round, as it is written down."""
    threshold = tau + draw.laplace(scale=2 * gamma / epsilon)
    spread = 4 * gamma * count / (epsilon * (2 * count) ** (2 / 3))
    accepted, waiting = [], np.arange(len(own))
    while len(accepted) < count:
        above = np.minimum(np.abs(own[waiting]), gamma) + draw.laplace(scale=spread, size=waiting.shape) >= threshold
        accepted += list(waiting[above])
        waiting = waiting[~above]
    return np.unique(draw.choice(accepted, size=count))


def test_the_sparse_vector_technique_sends_as_often_what_its_rounds_would():
    own = np.linspace(0.0, 2.0, 12)
    draw, drawn, runs = np.random.default_rng(0), generator(1), 1000
    counts = np.zeros((2, len(own)))
    for _ in range(runs):
        counts[0, answers(own, 4, 3.0, 1.5, 1.0, draw)] += 1
        sent = sparse_vector({"a": torch.tensor(own)}, 0.3, 3.0, 2.0, 1.5, 1.0, generator=drawn)["a"]
        assert (sent != 0).sum() <= 4
        assert sent.abs().max() <= 1.5
        counts[1] += sent.numpy() != 0
    shares = counts / runs
    assert (np.abs(shares[0] - shares[1]) < 5 * np.sqrt(0.5 / runs)).all()
    assert shares[1][-1] > 1.5 * shares[1][0]


def test_with_little_noise_the_sparse_vector_technique_sends_clamped_values_above_the_threshold():
    plain, rate = update(SEVERAL), 0.05
    sent, step = rate * defended(plain, "svt:0.1:1e9:1e9:0.1:0.02"), rate * flat(plain)
    kept = sent != 0
    assert 0.05 * len(step) < kept.sum() <= math.ceil(0.1 * len(step))
    assert (np.abs(step[kept]) > 0.0199).all()
    assert np.allclose(sent[kept], np.clip(step[kept], -0.1, 0.1), atol=1e-6)


def test_a_threshold_out_of_reach_ends_all_the_same():
    assert 1 <= np.count_nonzero(defended(update(), "svt:0.01:1:1:1e-3:1e6")) <= 5  # its rounds would never end


@pytest.mark.parametrize(
    ("defence", "words"),
    [
        ("truncate:0", "GAMMA must be above 0 and at most 1e+30, not 0"),
        ("percentile:101", "PERCENT must be at least 0 and at most 100, not 101"),
        ("feedback:0.1", "feedback:SHARE:ROUNDS"),
        ("feedback:0.1:0", "ROUNDS must be at least 1 and at most 1000, not 0"),
        ("svt:0.1:0.1", "svt:FRACTION:EPSILON:NOISE_VAR:GAMMA:TAU"),
        ("svt:0.1:0:1:1:1", "EPSILON must be at least 1e-06, not 0"),
        ("localdp:1:1:1:2", "DELTA must be above 0 and at most 1, not 2"),
        ("int8:1", "unknown defence 'int8:1'"),
    ],
)
def test_errors_name_the_value(cli, defence, words):
    assert words in cli.error("--defence", defence)


def test_an_update_from_outside_is_matched_by_the_filter_that_is_declared(cli, tmp_path):
    """The weight difference of one step at rate 0.5, truncated by somebody else's filter."""
    plain, weights, theirs = (tmp_path / name for name in ("plain.npz", "weights.npz", "theirs.npz"))
    cli("--save_update", plain, "--n_iter", 1, name="plain")
    update = SharedUpdate.load(plain)
    np.savez(weights, **{name: weight.numpy() for name, weight in update.weights.items()})
    moved = {name: np.clip(-0.5 * gradient.numpy(), -0.005, 0.005) for name, gradient in update.gradients.items()}
    np.savez(theirs, **moved)
    facts = ["--update", theirs, "--weights", weights, "--update_kind", "difference", "--local_lr", 0.5]
    run = cli(*facts, "--defended", "truncate:0.005", "--n_iter", 2, name="theirs")
    assert not any(piece["contradicts"] for piece in metrics_of(run)["evidence"])
    own = cli("--update", plain, "--defence", "truncate:0.01", "--n_iter", 2, name="own")  # of a rate of 1
    assert metrics_of(run)["final_loss"] == pytest.approx(metrics_of(own)["final_loss"], rel=1e-3)
    as_they_stand = cli(*facts, "--n_iter", 2, name="as_they_stand")
    assert any(piece["contradicts"] for piece in metrics_of(as_they_stand)["evidence"])


# ----------------------------------------------------------------------------------------------------
# Parameters that the server does not see


def test_hidden_parameters_are_missing_from_what_is_saved_and_matched(cli, tmp_path):
    path, plain = tmp_path / "u.npz", tmp_path / "plain.npz"
    run = cli("--hidden", "conv1,head.bias", "--save_update", path, "--n_iter", 2)
    update = SharedUpdate.load(path)
    assert set(update.gradients) == {"conv2.weight", "conv2.bias", "conv3.weight", "conv3.bias", "head.weight"}
    row = next(row for row in report_rows(run) if row["topic"] == "Defence")
    assert row["here"].endswith("Encrypted, so that the server does not see it: conv1,head.bias.")
    cli("--save_update", plain, "--n_iter", 1, name="plain")
    on_top = cli("--update", plain, "--hidden", "conv1,head.bias", "--n_iter", 2, name="on_top")
    assert metrics_of(on_top)["final_loss"] == metrics_of(run)["final_loss"]
    assert config_of(on_top)["hidden"] == "conv1,head.bias"


def report_rows(run):
    return json.loads((run / "audit.json").read_text())["assumptions"]


def test_a_hidden_head_gives_no_signals(cli):
    assert metrics_of(cli("--hidden", "head", *SIGNALS))["signals_found"] == 0


def test_errors_of_hidden_parameters_name_them(cli):
    assert "'conv9'" in cli.error("--hidden", "conv9")
    assert "--hidden conv,head: nothing is left to see" in cli.error("--hidden", "conv,head")


STEPS = "--model mlp --activation relu --width 64 --local_steps 2 --local_lr 0.02 --batch_size 2".split()  # noqa: SIM905


def test_to_hide_the_head_in_several_steps_saves_no_image_of_a_fully_connected_first_layer(cli, tmp_path):
    path = tmp_path / "u.npz"
    run = metrics_of(cli("--hidden", "head", "--save_update", path, *STEPS, *SIGNALS))
    assert run["ended_by"] == "exact"
    assert run["label_accuracy"] == 1
    read = cli("--update", path, "--batch_size", 2, *SIGNALS, name="read")
    assert metrics_of(read)["ended_by"] == "exact"
    assert config_of(read)["hidden"] == "head.weight,head.bias"


def test_so_it_is_where_another_framework_sent_the_difference(cli, tmp_path):
    path, tensors, weights = tmp_path / "u.npz", tmp_path / "tensors.npz", tmp_path / "weights.npz"
    cli("--hidden", "head", "--save_update", path, *STEPS)
    shared = SharedUpdate.load(path)
    moved = {name: -shared.training.reach * tensor.numpy() for name, tensor in shared.gradients.items()}
    np.savez(tensors, **moved)
    np.savez(weights, **{name: tensor.numpy() for name, tensor in shared.weights.items()})
    words = ["--update", tensors, "--update_kind", "difference", "--weights", weights, *STEPS, *SIGNALS]
    assert metrics_of(cli(*words, "--hidden", "head", name="foreign"))["ended_by"] == "exact"
    assert "name it with --frozen" in cli.error(*words)


def test_hidden_parameters_that_moved_in_several_steps_are_moved_when_the_training_is_made_again():
    model, images, labels = seeded_mlp(), torch.rand(4, 3, 16, 16, generator=generator(1)), torch.tensor([3, 1, 4, 1])
    whole = share_update(model, "mlp", images, labels, 10, training=SEVERAL)
    shared = share_update(model, "mlp", images, labels, 10, training=SEVERAL, hidden=["head"])
    assert shared.gradients.keys() == whole.gradients.keys() - {"head.weight", "head.bias"}
    again = train_locally(model, images, labels, shared.training).average
    for own, name in zip(again, shared.gradients, strict=True):
        assert torch.allclose(own, whole.gradients[name], rtol=1e-4, atol=1e-7)
    without = train_locally(model, images, labels, SEVERAL).average  # as if the head had not moved
    assert not torch.allclose(without[0], again[0], rtol=1e-2, atol=0)


def seeded_mlp():
    return build_model("mlp", image_shape=(3, 16, 16), num_classes=10, generator=generator(0))


def test_layers_below_what_moved_unseen_are_not_read(cli):
    message = cli.error("--hidden", "head", "--local_steps", 2, "--local_lr", 0.1, "--signals", "on")
    assert "--signals on: several steps moved what is hidden (head.weight, head.bias), and with it all else" in message


def test_an_update_that_names_hidden_parameters_of_no_model_is_refused(cli, tmp_path):
    images, labels = torch.rand(3, 3, 16, 16, generator=generator(1)), torch.tensor([3, 1, 4])
    shared = share_update(seeded_mlp(), "mlp", images, labels, 10, training=SEVERAL)
    for name in ("nothing", "head.bias"):
        dataclasses.replace(shared, training=shared.training.hiding([name])).save(tmp_path / "u.npz")
        message = "hidden parameters of the update are none of model 'mlp''s, or are shared"
        assert message in cli.error("--update", tmp_path / "u.npz")


# ----------------------------------------------------------------------------------------------------
# How sure the attack is

MLP = "--model mlp --batch_size 1 --image_size 16 --num_classes 10 --activation"
FEW = ("--defence percentile:60", "--defence int8", "--defence truncate:0.1", "--hidden head.bias")
MANY = (
    *(f"--defence {each}" for each in ("percentile:10,truncate:0.01", "topk:0.5", "feedback:0.5:3", "sign")),
    *(f"--defence svt:{each}" for each in ("0.9:1e7:1e7:1:1e-9", "0.1:0.1:0.1:1e-5:1e-6")),
    *(f"--defence localdp:{each}" for each in ("1:1e-4:1:1e-5", "0.1:1e-7:1:1e-5")),
    *FEW, "--hidden head",
)  # fmt: skip


@pytest.mark.parametrize(
    ("scene", "filters"),
    [
        (f"{MLP} tanh", FEW),
        pytest.param(f"{MLP} tanh", MANY, marks=pytest.mark.long),
        pytest.param(f"{MLP} relu", MANY, marks=pytest.mark.long),
        pytest.param("--batch_size 1 --image_size 16 --num_classes 20", MANY, marks=pytest.mark.long),
    ],
)
def test_no_image_is_certain_and_wrong_under_a_filter(scene, filters):
    certain = {}
    for words in filters:
        settings = resolved(*scene.split(), *words.split())
        update, model, truth = victim(settings, CPU)
        try:
            update, _ = scaled_update(update, model, settings)
            signals = read_layers(update, model, generator=generator(1), work=READING_WORK / 500).signals
        except ValueError:  # nothing is read, and nothing is certain
            continue
        with torch.no_grad():
            features = features_of(model, truth.images).to(signals.values)
        for found, true, error in zip(*matched(signals.values, features), strict=True):
            certain[words] = float(signals.confidence[found]) >= CERTAIN
            if certain[words]:
                assert signals.labels[found] == truth.labels[true]
                assert float(error) < WITHIN
    assert certain["--hidden head.bias"]
    if "tanh" in scene:
        assert not certain["--defence percentile:60"]  # it was, and off by 6 %
