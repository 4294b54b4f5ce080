import dataclasses
from functools import cache

import pytest
from conftest import CPU, SIGNALS, config_of, generator, metrics_of, resolved
from hypothesis import given, settings
from hypothesis import strategies as st

from attack.read.clip_factor import unscaled
from attack.read.reader import read_layers
from cli.victim import victim
from network.zoo import build_model


def clipped(*words, clip="clip:0.5"):
    """A clipped update, its model, and the factor that undoes it."""
    same_images = next((word for word in clip.split(",") if "sum" in word), "none")
    plain, model, _ = victim(resolved(*words, "--defence", same_images), CPU)
    update = victim(resolved(*words, "--defence", clip), CPU)[0]
    return update, model, plain.strength() / update.strength()


LENET = ["--batch_size", 4, "--image_size", 16, "--num_classes", 20]
MLP = ["--batch_size", 3, "--image_size", 16, "--model", "mlp", "--activation", "relu", "--labels", "unique"]


@pytest.mark.parametrize("words", [LENET, [*LENET, "--labels", "dataset"], MLP])
def test_the_scale_of_a_clipped_update_is_found(words):
    update, model, factor = clipped(*words)
    assert factor > 2
    restored, found = unscaled(update, model, generator=generator())
    assert found == pytest.approx(factor, rel=1e-5)
    assert restored.defence == "none"
    assert restored.strength() == pytest.approx(factor * update.strength(), rel=1e-5)


@cache
def clipped_once():
    """A clipped update, its model, the same update restored, and the factor that was found."""
    update, model, _ = clipped(*LENET, clip="clip:1.0")
    return update, model, *unscaled(update, model, generator=generator())


@settings(max_examples=20)
@given(st.floats(1e-4, 1.0))
def test_whatever_the_scale_is(clip):
    update, model, whole, factor = clipped_once()
    smaller = dataclasses.replace(update, gradients={n: clip * g for n, g in update.gradients.items()})
    again, larger = unscaled(smaller, model, generator=generator())
    assert larger == pytest.approx(factor / clip, rel=1e-4)
    assert again.strength() == pytest.approx(whole.strength(), rel=1e-4)


def test_noise_leaves_about_the_scale():
    update, model, factor = clipped(*LENET, clip="clip:0.5,noise:1e-4")
    assert unscaled(update, model, generator=generator())[1] == pytest.approx(factor, rel=0.05)


@pytest.mark.parametrize("defence", ["dpsgd:0.5:1e-6", "clip:0.5,secure_sum:2"])
def test_factors_of_each_image_or_client_leave_the_length_but_no_signals(cli, defence):
    update, model, factor = clipped(*LENET, clip=defence)
    restored, found = unscaled(update, model, generator=generator())
    assert found == pytest.approx(factor, rel=0.05)
    with pytest.raises(ValueError, match=f"by how much {defence} has shortened the update is not known"):
        read_layers(restored, model, generator=generator())
    assert "is not known exactly" in cli.error("--defence", defence, "--signals", "on")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_without_the_head_single_images_tell_the_scale(batch_size):
    update, model, factor = clipped(*MLP, "--batch_size", batch_size)
    headless = {name: g for name, g in update.gradients.items() if name.startswith("hidden")}
    restored, found = unscaled(dataclasses.replace(update, gradients=headless), model, generator=generator())
    assert found == pytest.approx(factor, rel=1e-5)
    assert restored.defence == "none"


def test_what_tells_no_scale_is_refused():
    update, _, _ = clipped(*LENET)
    headless = dataclasses.replace(update, gradients={"conv1.weight": update.gradients["conv1.weight"]})
    model = build_model("lenet", image_shape=(3, 16, 16), num_classes=20, generator=generator())
    with pytest.raises(ValueError, match="by how much the update was scaled"):
        unscaled(headless, model, generator=generator())


def test_clipping_hides_nothing_from_a_run(cli):
    words = ["--labels", "unique", *SIGNALS]
    plain, hidden = cli(*words, name="plain"), cli(*words, "--defence", "clip:0.1", name="clipped")
    assert metrics_of(hidden)["signals_found"] == 3
    assert metrics_of(hidden)["psnr_mean"] == pytest.approx(metrics_of(plain)["psnr_mean"], abs=3)
    assert config_of(hidden)["scale"] > 2
    assert config_of(plain)["scale"] is None


def test_an_update_of_unknown_scale_is_matched_by_its_direction(cli):
    run = cli("--frozen", "head", "--defence", "clip:0.1")
    assert "relative_cosine matching" in cli.out
    assert (config_of(run)["scale"], config_of(run)["distance"]) == (None, "relative_cosine")
    cli("--frozen", "head", "--defence", "clip:0.1", "--distance", "l2", name="l2")
    assert "l2 matching" in cli.out
