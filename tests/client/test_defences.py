import dataclasses

import pytest
import torch
from conftest import CPU, SIGNALS, config_of, generator, metrics_of, resolved
from hypothesis import given
from hypothesis import strategies as st

from cli.victim import victim
from client.defences import defend
from update.head import measured_noise
from update.shared import SharedUpdate


def update(size=1000):
    gradients = {"a": torch.randn(size, generator=generator()), "b": 10 * torch.randn(7, 5, generator=generator(1))}
    return SharedUpdate(gradients, {}, "lenet", 4, (3, 16, 16), 10)


def test_none_changes_nothing():
    plain = update()
    assert defend(plain, "none", generator=generator()) is plain


def test_noise_has_the_standard_deviation_asked_for_and_comes_from_the_generator():
    plain = update(100_000)
    noisy, same = (defend(plain, "noise:0.01", generator=generator(2)) for _ in range(2))
    assert (noisy.gradients["a"] - plain.gradients["a"]).std().item() == pytest.approx(0.01, rel=0.02)
    assert torch.equal(noisy.gradients["b"], same.gradients["b"])


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_rounding_keeps_the_type_and_loses_the_bits(name):
    plain = update()
    rounded = defend(plain, name, generator=generator()).gradients["a"]
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, plain.gradients["a"].to(getattr(torch, name)).float())
    assert not torch.equal(rounded, plain.gradients["a"])


@given(st.floats(0.001, 1.0))
def test_topk_keeps_the_largest_entries_of_the_whole_update(share):
    plain = update()
    pruned = defend(plain, f"topk:{share}", generator=generator())
    before, after = (torch.cat([g.flatten() for g in u.gradients.values()]) for u in (plain, pruned))
    kept = after != 0
    assert kept.sum() == max(1, round(share * len(before)))
    assert torch.equal(before[kept], after[kept])
    assert kept.all() or before[kept].abs().min() >= before[~kept].abs().max()


@pytest.mark.parametrize(
    ("defence", "words"),
    [
        ("magic", "unknown defence 'magic'"),
        ("noise", "noise:STD"),
        ("noise:-1", "noise:-1"),
        ("noise:inf", "noise:inf"),
        ("noise:much", "'much' is not a number"),
        ("topk:0", "topk:0"),
        ("topk:1.5", "topk:1.5"),
        ("float16:3", "float16:3"),
    ],
)
def test_errors_name_the_value(defence, words):
    with pytest.raises(ValueError, match=words):
        defend(update(), defence, generator=generator())


def test_a_defended_update_is_what_is_attacked_and_saved(cli, tmp_path):
    path = tmp_path / "u.safetensors"
    run = cli("--defence", "noise:0.5", "--save_update", path)
    assert config_of(run)["defence"] == "noise:0.5"
    assert metrics_of(run)["signals_found"] == 0
    plain = tmp_path / "plain.safetensors"
    cli("--save_update", plain, name="plain")
    saved, bare = SharedUpdate.load(path), SharedUpdate.load(plain)
    difference = torch.cat([(saved.gradients[n] - bare.gradients[n]).flatten() for n in bare.gradients])
    assert difference.std().item() == pytest.approx(0.5, rel=0.05)
    assert "noise:x" in cli.error("--defence", "noise:x")


def test_frozen_parameters_are_neither_shared_nor_matched(cli, tmp_path):
    path = tmp_path / "u.npz"
    run = cli("--frozen", "conv1,head.bias", "--save_update", path, "--labels", "unique", *SIGNALS)
    update = SharedUpdate.load(path)
    assert set(update.gradients) == {"conv2.weight", "conv2.bias", "conv3.weight", "conv3.bias", "head.weight"}
    assert metrics_of(run)["signals_found"] == 3
    again = cli("--update", path, *SIGNALS, name="again")
    assert metrics_of(again)["final_loss"] == metrics_of(run)["final_loss"]
    assert "says itself which gradients it holds" in cli.error("--update", path, "--frozen", "conv1")


def test_a_defence_goes_on_top_of_a_received_update(cli, tmp_path):
    path, defended = tmp_path / "u.safetensors", tmp_path / "defended.safetensors"
    cli("--save_update", path, name="plain")
    run = cli("--save_update", defended, "--defence", "noise:0.1", name="defended")
    again = cli("--update", path, "--defence", "noise:0.1", name="again")
    assert config_of(again)["defence"] == "noise:0.1"
    assert metrics_of(again)["final_loss"] == metrics_of(run)["final_loss"]
    cli("--resume", again, "--n_iter", 6)
    on = cli("--resume", run, "--n_iter", 6)
    assert metrics_of(again)["final_loss"] == metrics_of(on)["final_loss"]


def test_a_frozen_head_gives_no_signals(cli):
    assert metrics_of(cli("--frozen", "head", *SIGNALS))["signals_found"] == 0
    message = cli.error("--frozen", "head", "--signals", "on")
    assert "--signals on: no image can be told apart: head: the update holds no gradient of it" in message


def test_freezing_errors_name_the_value(cli):
    assert "'conv9'" in cli.error("--frozen", "conv9")
    assert "nothing is left" in cli.error("--frozen", "conv,head")


def test_rounded_and_plain_updates_differ_only_in_gradients():
    plain = update()
    assert dataclasses.replace(defend(plain, "float16", generator=generator()), gradients=plain.gradients) == plain


def real_update():
    """The update of eight real images on a LeNet, as `defend` gets it, and the model."""
    return victim(resolved("--batch_size", 8, "--image_size", 16), CPU)[:2]


@pytest.mark.parametrize("defence", ["noise:1e-5", "noise:1e-3", "noise:0.1", "float16", "bfloat16"])
def test_the_server_can_tell_how_noisy_an_update_is(defence):
    plain, model = real_update()
    noisy = defend(plain, defence, generator=generator())
    actual = (noisy.gradients["head.weight"] - plain.gradients["head.weight"]).square().mean().sqrt()
    assert measured_noise(noisy, model) == pytest.approx(float(actual), rel=0.15)
    assert measured_noise(plain, model) < 1e-6 * plain.strength()


def test_an_update_without_the_heads_gradient_says_nothing_of_its_noise():
    plain, model = real_update()
    rest = {name: gradient for name, gradient in plain.gradients.items() if name != "head.weight"}
    assert measured_noise(dataclasses.replace(plain, gradients=rest), model) == 0
    assert measured_noise(plain, torch.nn.Sequential(model, torch.nn.ReLU())) == 0


@given(st.floats(1e-6, 1e6))
def test_noise_and_strength_scale_with_the_update(factor):
    plain, model = real_update()
    scaled = dataclasses.replace(plain, gradients={n: g.double() * factor for n, g in plain.gradients.items()})
    assert measured_noise(scaled, model) == pytest.approx(factor * measured_noise(plain, model), rel=1e-6)
    assert scaled.strength() == pytest.approx(factor * plain.strength(), rel=1e-6)


@pytest.mark.parametrize("defence", ["float16", "noise:1e39"])
def test_numbers_that_a_defence_takes_beyond_floats_are_refused(defence):
    large = dataclasses.replace(update(), gradients={"conv1.weight": torch.tensor([1.0, 1e5])})
    with pytest.raises(ValueError, match=rf"--defence {defence}: the gradient of 'conv1.weight' is not finite"):
        defend(large, defence, generator=generator())


def test_heeding_the_noise_pays(cli):
    flags = ["--batch_size", 4, "--num_classes", 20, "--defence", "noise:3e-3", "--n_iter", 40, "--inner_iter", 20]
    flags += ["--tv_evals", 200, "--max_evals", 400]
    heeded = metrics_of(cli(*flags, name="heeded"))
    ignored = metrics_of(cli(*flags, "--noise_weight", 0, name="ignored"))
    assert heeded["psnr_mean"] > ignored["psnr_mean"] + 3
