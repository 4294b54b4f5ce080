import dataclasses
import math

import pytest
import torch
from conftest import config_of, metrics_of

from data import load_batch, open_source
from gradients import share_update
from models import build_model
from signals import Span, certificate, noise_floor, recover_signals, softmax_error, solve


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def case(labels, name="lenet", num_classes=20, dtype=torch.float32):
    """An update of real images with the given labels, its model, and what the signals should be."""
    source = open_source("sample", None)
    images = load_batch(
        source, range(len(labels)), labels="dataset", num_classes=10, generator=generator(), image_size=16
    ).images.to(dtype)
    model = build_model(name, image_shape=(3, 16, 16), num_classes=num_classes, generator=generator(1)).to(dtype)
    labels = torch.tensor(labels)
    update = share_update(model, name, images, labels, num_classes)
    return update, model, labels, model.features(images).detach().double()


def span_of(update):
    gradient, bias_gradient = (update.gradients[f"head.{name}"] for name in ("weight", "bias"))
    return Span.of(gradient.double(), bias_gradient.double(), noise_floor(gradient.double(), gradient.dtype))


def match(signals, features):
    """For each signal the nearest true image, and the relative error of its features."""
    distance = torch.cdist(signals.features, features) / features.norm(dim=1)
    return distance.argmin(1), distance.min(1).values


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("lenet", [7]),
        ("lenet", [3, 11, 0, 19, 5]),
        ("lenet", [4, 4, 9, 4, 2]),
        ("convnet", [3, 11, 0, 19, 5]),
        ("convnet", [4, 4, 9, 4, 2]),
        ("mlp", [3, 11, 0, 19, 5]),
    ],
)
def test_every_label_and_feature_vector_is_read_from_a_float32_update(name, labels):
    update, model, truth, features = case(labels, name)
    signals = recover_signals(update, model, generator=generator(2))
    assert signals.rank == len(labels)
    nearest, error = match(signals, features)
    assert sorted(nearest.tolist()) == list(range(len(labels)))
    assert torch.equal(signals.labels, truth[nearest])
    assert error.max() < 0.01
    assert (signals.certificates - 1).abs().max() < 0.05


def test_what_is_found_is_right_even_where_not_all_is():
    """This MLP's features are so alike that images with one label drown in rounding: what is claimed must be true."""
    update, model, truth, features = case([4, 4, 9, 4, 2], "mlp")
    signals = recover_signals(update, model, generator=generator(2))
    nearest, error = match(signals, features)
    assert 0 < len(signals) < 5
    assert torch.equal(signals.labels, truth[nearest])
    assert error.max() < 0.01


def test_float64_updates_give_features_to_many_digits():
    update, model, _, features = case([3, 11, 0, 19, 5], dtype=torch.float64)
    assert match(recover_signals(update, model, generator=generator(2)), features)[1].max() < 1e-8


def test_the_gradient_is_the_sum_of_its_signals():
    update, model, _, _ = case([3, 11, 0, 3, 5])
    signals = recover_signals(update, model, generator=generator(2))
    rebuilt = signals.errors.T @ signals.features / 5
    assert torch.allclose(rebuilt, update.gradients["head.weight"].double(), atol=1e-5)


def test_the_certificate_is_one_over_the_batch_size_for_true_pairs_only():
    update, model, labels, features = case([3, 11, 0, 19, 5])
    weight, bias = model.head.weight.detach().double(), model.head.bias.detach().double()
    span = span_of(update)
    errors = softmax_error(features, labels, weight, bias)
    assert torch.allclose(certificate(span, features, errors), torch.full((5,), 0.2).double(), atol=1e-3)
    assert ((certificate(span, features.roll(1, 0), errors) - 0.2).abs() > 0.1).all()


def test_nothing_is_claimed_of_an_update_drowned_in_noise():
    update, model, _, _ = case([3, 11, 0, 19, 5])
    noisy = {n: g + 0.05 * torch.randn(g.shape, generator=generator(3)) for n, g in update.gradients.items()}
    try:
        signals = recover_signals(dataclasses.replace(update, gradients=noisy), model, generator=generator(2))
    except ValueError:
        return  # the rank is that of noise
    assert len(signals) == 0


def test_the_noise_floor_lies_between_signal_and_rounding():
    update, _, _, _ = case([3, 11, 0, 19, 5])
    gradient = update.gradients["head.weight"]
    sigma = torch.linalg.svdvals(gradient.double())
    assert sigma[5] < noise_floor(gradient.double(), torch.float32) < sigma[4]


def test_models_and_ranks_that_do_not_permit_signals_say_so():
    update, model, _, _ = case([3, 11, 0, 19, 5], num_classes=20)
    model.head = torch.nn.Linear(192, 20, bias=False)
    with pytest.raises(ValueError, match="not linear with a bias"):
        recover_signals(update, model, generator=generator())
    update, model, _, _ = case([0, 1, 2, 3, 4, 5], num_classes=10)
    with pytest.raises(ValueError, match=r"rank 6.*beyond 5 with 10 classes"):
        recover_signals(update, model, generator=generator())


FLAGS = "--batch_size 4 --num_classes 20 --indices 0,10,20,1 --labels dataset --n_iter 3".split()  # noqa: SIM905


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
    assert metrics_of(cli(*FLAGS, "--signals", "off", name="off"))["signals_found"] == 0
    paper = cli(*FLAGS, "--preset", "paper", name="paper")
    assert metrics_of(paper)["signals_found"] == 0
    assert config_of(paper)["signals"] == "off"


def test_signals_that_must_be_had_and_cannot_are_an_error(cli):
    message = cli.error("--batch_size", 6, "--labels", "unique", "--signals", "on")
    assert "--signals on" in message
    assert "rank 6" in message
    assert metrics_of(cli("--batch_size", 6, "--labels", "unique", name="auto"))["signals_found"] == 0


def test_images_that_share_a_label_come_out_sharper_with_signals(cli):
    flags = "--batch_size 3 --num_classes 20 --indices 0,10,20 --labels dataset --image_size 32 --inner_iter 20"
    flags = [*flags.split(), "--n_iter", 300, "--max_evals", 500]
    read = metrics_of(cli(*flags, name="on"))
    mixed = metrics_of(cli(*flags, "--signals", "off", name="off"))
    assert read["psnr_mean"] > mixed["psnr_mean"] + 3


def test_starts_that_saturate_do_no_harm():
    """Far out, softmax is one-hot and every equation holds to no purpose: the normal matrix is exactly zero there."""
    update, model, labels, _ = case([3, 11, 0, 19, 5])
    weight, bias = model.head.weight.detach().double(), model.head.bias.detach().double()
    q, residual = solve(span_of(update), weight, bias, 1e6 * torch.randn(5, 5, generator=generator()).double(), labels)
    assert q.isfinite().all()
    assert residual.isfinite().all()
