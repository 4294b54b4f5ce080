import argparse
import dataclasses
import math
import sys

import pytest
import torch
from conftest import CPU, SIGNALS, config_of, generator, metrics_of, resolved
from hypothesis import given
from hypothesis import strategies as st

import main_MAGIA_sel as magia
from cli.victim import client_batch, victim
from client.defences import defend as defend_all
from client.privacy import epsilon, example_gradients, private_gradient
from network.head import measured_noise
from network.parameters import trainable
from network.zoo import build_model
from update.defences import NAMES, Defences
from update.gradients import averaged_gradient
from update.shared import SharedUpdate

EXACTLY = {"device": torch.device("cpu"), "dtype": torch.float64}
FLAGS = [flag.name for flag in magia.FLAGS]
ALPHAS = [1 + step / 100 for step in range(1, 10_000)]


def update(size=1000, seed=0):
    drawn = generator(seed)
    gradients = {"a": torch.randn(size, generator=drawn), "b": 10 * torch.randn(7, 5, generator=drawn)}
    return SharedUpdate(gradients, {}, "lenet", 4, (3, 16, 16), 10)


def defend(plain, words, generator):
    """One client's update, defended."""
    return defend_all([plain], Defences.parse(words), generator=generator)


def flat(one):
    return torch.cat([gradient.flatten() for gradient in one.gradients.values()])


def same(one, other):
    return all(torch.equal(gradient, other.gradients[name]) for name, gradient in one.gradients.items())


def test_none_changes_nothing():
    plain = update()
    assert defend(plain, "none", generator=generator()) == plain


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
    before, after = flat(plain), flat(pruned)
    kept = after != 0
    assert kept.sum() == max(1, round(share * len(before)))
    assert torch.equal(before[kept], after[kept])
    assert kept.all() or before[kept].abs().min() >= before[~kept].abs().max()


@pytest.mark.parametrize(
    ("defence", "words"),
    [
        ("magic", "unknown defence 'magic'"),
        ("", "unknown defence ''"),
        ("none,sign", "unknown defence 'none'"),
        ("sign,", "unknown defence ''"),
        ("noise", "noise:STD"),
        ("noise:-1", "STD must be above 0, not -1"),
        ("noise:inf", "STD must be above 0, not inf"),
        ("noise:much", "'much' is not a number"),
        ("sign,noise:nan", "STD must be above 0, not nan"),
        ("topk:0", "SHARE must be above 0 and at most 1, not 0"),
        ("topk:1.5", "topk:1.5"),
        ("clip:0", "NORM must be above 0"),
        ("quantise:0", "BITS must be at least 1 and at most 16"),
        ("quantise:2.5", "BITS '2.5' is not a whole number"),
        ("secure_sum:1", "CLIENTS must be at least 2"),
        ("secure_sum:2,clip:1,secure_sum:2", "one secure_sum"),
        ("dpsgd:1", "dpsgd:CLIP:SIGMA"),
        ("dpsgd:1:0", "SIGMA must be at least 1e-06"),
        ("clip:1,dpsgd:1:1", "dpsgd forms the gradient, it must come first"),
        ("dpsgd:1:1,dpsgd:1:1", "it must come first and once"),
        ("float16:3", "float16:3"),
    ],
)
def test_errors_name_the_value(cli, defence, words):
    with pytest.raises(ValueError, match=words):
        Defences.parse(defence)
    assert words in cli.error(f"--defence={defence}")


def test_the_flag_names_every_defence():
    text = next(flag.text for flag in magia.FLAGS if flag.name == "defence")
    assert all(name in text for name in NAMES if name != "none")


@given(st.floats(1e-3, 1e3), st.integers(0, 5))
def test_clipping_keeps_the_direction_and_bounds_the_length(norm, seed):
    plain = update(seed=seed)
    before, after = flat(plain), flat(defend(plain, f"clip:{norm}", generator=None))
    assert after.norm() <= norm * (1 + 1e-5)
    assert torch.cosine_similarity(before, after, dim=0) == pytest.approx(1)
    assert torch.equal(before, after) == (before.norm() <= norm)


@given(st.integers(1, 16), st.integers(0, 100))
def test_quantisation_errs_by_less_than_a_step_and_keeps_signs_and_zeros(bits, seed):
    plain = update()
    plain.gradients["a"][:10] = 0
    rough = defend(plain, f"quantise:{bits}", generator=generator(seed))
    for name, before in plain.gradients.items():
        after, step = rough.gradients[name], before.abs().max() / (2**bits - 1)
        assert ((after - before).abs() <= step * (1 + 1e-3)).all()
        assert ((after == 0) | (after.sign() == before.sign())).all()
        levels = (after / step).double()
        assert (levels - levels.round()).abs().max() < 1e-2
        assert after.abs().max() == pytest.approx(float(before.abs().max()), rel=1e-5)


def test_quantisation_is_right_on_average_and_comes_from_the_generator():
    plain = update(50)
    draws = torch.stack([flat(defend(plain, "quantise:1", generator=generator(seed))) for seed in range(2000)])
    spread = max(gradient.abs().max() for gradient in plain.gradients.values()) / 2 / 2000**0.5
    assert (draws.mean(0) - flat(plain)).abs().max() < 5 * spread
    assert torch.equal(draws[3], flat(defend(plain, "quantise:1", generator=generator(3))))


def test_signs_keep_each_tensors_mean_magnitude():
    plain = update()
    signs = defend(plain, "sign", generator=None)
    for name, before in plain.gradients.items():
        assert torch.equal(signs.gradients[name].sign(), before.sign())
        assert signs.gradients[name].abs().allclose(before.abs().mean())


@given(st.permutations(["clip:1.0", "noise:0.1", "topk:0.2", "quantise:3", "sign", "bfloat16"]), st.integers(1, 6))
def test_defences_are_applied_in_the_order_given(words, count):
    words, plain = words[:count], update(100)
    drawn, by_hand = generator(7), plain
    for word in words:
        by_hand = defend(by_hand, word, generator=drawn)
    assert same(defend(plain, ",".join(words), generator=generator(7)), by_hand)


def test_the_order_matters():
    plain = update()
    first, second = (flat(defend(plain, words, generator=generator())) for words in ("sign,topk:0.1", "topk:0.1,sign"))
    assert not torch.equal(first, second)


@given(st.integers(2, 5), st.integers(1, 3))
def test_a_sum_over_clients_is_the_average_over_all_their_images(clients, size):
    scene = ["--batch_size", size, "--image_size", 16, "--dtype", "float64", "--labels", "dataset"]
    summed, _, truth = victim(resolved(*scene, "--defence", f"secure_sum:{clients}"), EXACTLY)
    union, _, batch = victim(resolved(*scene, "--batch_size", clients * size), EXACTLY)
    assert torch.equal(truth.images, batch.images)
    assert torch.equal(truth.labels, batch.labels)
    assert summed.batch_size == union.batch_size == clients * size
    for name, gradient in union.gradients.items():
        assert torch.allclose(summed.gradients[name], gradient, rtol=1e-9, atol=1e-12)


def test_what_stands_before_the_sum_is_each_clients_and_what_follows_is_done_once():
    clients = [update(seed=seed) for seed in range(3)]
    each = defend_all(clients, Defences.parse("clip:1.0,secure_sum:3"))
    once = defend_all(clients, Defences.parse("secure_sum:3,clip:1.0"))
    alone = torch.stack([flat(defend(client, "clip:1.0", generator=None)) for client in clients])
    assert torch.allclose(flat(each), alone.mean(0))
    assert flat(each).norm() < 0.99
    assert flat(once).norm() == pytest.approx(1)
    with pytest.raises(ValueError, match="of 3 clients, not 2"):
        defend_all(clients[:2], Defences.parse("secure_sum:3"))


def test_all_clients_of_a_sum_are_attacked_and_counted(cli, tmp_path):
    path = tmp_path / "u.npz"
    run = cli("--defence", "secure_sum:2", "--batch_size", 2, "--indices", "4,9", "--save_update", path)
    assert cli.out.startswith("sample, labels random: 4 images 3x16x16 | secure_sum:2, 2 clients with 2 each\n")
    assert len(metrics_of(run)["psnr"]) == 4
    assert config_of(run)["batch_size"] == 2
    assert config_of(run)["schedule"] == [2, 2, 2, 2]
    batch = cli_batch(run, "4,9-11")
    assert torch.equal(batch, cli_batch(run, None))
    again = cli("--update", path, "--batch_size", 4, name="again")
    assert metrics_of(again)["final_loss"] == metrics_of(run)["final_loss"]
    message = cli.error("--defence", "secure_sum:3", "--batch_size", 48, "--indices", "60-107")
    assert "3 clients with 48 images each need images up to 203, the set has images 0 to 127" in message


def cli_batch(run, indices):
    """The true images (B, C, H, W) of a run, or what its flags name with other indices and no defence."""
    told = {name: value for name, value in config_of(run).items() if name in FLAGS}
    if indices:
        told |= {"indices": indices, "defence": "none", "batch_size": 4}
    return client_batch(argparse.Namespace(**told), "random", 10).images


def nets():
    yield "lenet", {}
    yield "mlp", {"activation": "relu"}
    yield "convnet", {}
    yield pytest.param("resnet18_cifar", {}, marks=pytest.mark.long)


@pytest.mark.parametrize(("name", "options"), nets())
def test_private_gradients_are_those_of_a_loop_over_the_examples(name, options):
    model = build_model(name, image_shape=(3, 16, 16), num_classes=10, generator=generator(), **options).double()
    images = torch.rand(3, 3, 16, 16, generator=generator(1), dtype=torch.float64)
    labels = torch.tensor([1, 5, 1])
    one_by_one = [averaged_gradient(model, images[i : i + 1], labels[i : i + 1]) for i in range(3)]
    weights = {name: weight.detach() for name, weight in trainable(model).items()}
    for at, gradient in enumerate(example_gradients(model, weights, images, labels).values()):
        assert torch.allclose(gradient, torch.stack([own[at] for own in one_by_one]), rtol=1e-9, atol=1e-12)
    lengths = [torch.cat([g.flatten() for g in own]).norm() for own in one_by_one]
    clip = float(sorted(lengths)[1])  # one is left as it is
    found = private_gradient(model, images, labels, clip, 0.0, generator())
    shares = [min(1.0, clip / float(length)) for length in lengths]
    for at, gradient in enumerate(found):
        wanted = sum(share * own[at] for share, own in zip(shares, one_by_one, strict=True)) / 3
        assert torch.allclose(gradient, wanted, rtol=1e-9, atol=1e-12)


@given(st.floats(0.01, 10), st.floats(0.1, 4), st.integers(1, 12))
def test_dp_sgd_adds_the_noise_of_its_clip_over_the_batch(clip, sigma, size):
    model = build_model("lenet", image_shape=(3, 16, 16), num_classes=10, generator=generator())
    images, labels = torch.rand(size, 3, 16, 16, generator=generator(1)), torch.arange(size) % 10
    noisy, plain = (private_gradient(model, images, labels, clip, s, generator(2)) for s in (sigma, 0.0))
    noise = torch.cat([(a - b).flatten() for a, b in zip(noisy, plain, strict=True)])
    assert noise.std() == pytest.approx(sigma * clip / size, rel=0.05)
    assert torch.cat([g.flatten() for g in plain]).norm() <= clip * (1 + 1e-5)


def test_a_batchnorm_that_mixes_examples_is_refused():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(12, 2))
    with pytest.raises(ValueError, match="BatchNorm in training mode mixes the examples"):
        private_gradient(model, torch.rand(2, 3, 2, 2), torch.tensor([0, 1]), 1.0, 1.0, generator())


def test_epsilon_falls_with_noise_and_grows_with_rounds_and_rate():
    pytest.importorskip("opacus", reason="the accountant is Opacus's")
    base = {"rate": 0.01, "rounds": 100, "delta": 1e-5}
    one = epsilon(1.0, **base)
    assert epsilon(2.0, **base) < one < epsilon(0.5, **base)
    assert epsilon(1.0, **base | {"rounds": 1}) < one < epsilon(1.0, **base | {"rate": 0.1})
    # the Gaussian mechanism once, every example sampled: Renyi divergence alpha / (2 sigma^2), the best alpha of many
    grid = [alpha / 8 + math.log((alpha - 1) / alpha) - math.log(1e-5 * alpha) / (alpha - 1) for alpha in ALPHAS]
    assert epsilon(2.0, rate=1.0, rounds=1, delta=1e-5) == pytest.approx(min(grid), rel=1e-2)


def test_the_privacy_of_a_run_is_told_and_recorded(cli):
    pytest.importorskip("opacus", reason="the accountant is Opacus's")
    run = cli("--defence", "dpsgd:0.5:2", "--dp_rounds", 10, "--dp_rate", 0.1, "--dp_delta", 1e-6)
    bound = config_of(run)["epsilon"]
    assert bound == pytest.approx(epsilon(2.0, rate=0.1, rounds=10, delta=1e-6))
    assert f"dpsgd:0.5:2, epsilon at most {bound:.3g} (delta 1e-06, rate 0.1, 10 rounds)" in cli.out
    assert "epsilon" not in config_of(cli("--defence", "clip:1", name="clipped"))


def test_without_opacus_the_attack_runs_and_epsilon_is_not_known(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    run = cli("--defence", "dpsgd:0.5:2")
    assert config_of(run)["epsilon"] is None
    assert "epsilon not computed: pip install opacus" in cli.out


@pytest.mark.parametrize("flag", ["--dp_delta=0", "--dp_delta=2", "--dp_rate=0", "--dp_rate=1.1", "--dp_rounds=0"])
def test_privacy_is_of_sensible_numbers(cli, flag):
    assert "must be" in cli.error("--defence", "dpsgd:1:1", flag)


def test_a_saved_update_says_how_it_was_defended(tmp_path):
    path = tmp_path / "u.safetensors"
    defended = dataclasses.replace(update(), defence="clip:1.0,sign")
    defended.save(path)
    assert SharedUpdate.load(path).defence == "clip:1.0,sign"
    dataclasses.replace(defended, defence="magic").save(path)
    with pytest.raises(ValueError, match="is not a shared update"):
        SharedUpdate.load(path)


def test_a_defended_update_is_what_is_attacked_and_saved(cli, tmp_path):
    path = tmp_path / "u.safetensors"
    flags = ["--labels", "unique", "--max_evals", 12, *SIGNALS]
    run = cli(*flags, "--defence", "noise:0.5", "--save_update", path)
    assert config_of(run)["defence"] == "noise:0.5"
    assert metrics_of(run)["signals_found"] == 0
    plain = tmp_path / "plain.safetensors"
    assert metrics_of(cli(*flags, "--save_update", plain, name="plain"))["signals_found"] == 3
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
    cli("--resume", again, "--n_iter", 6, name="again")
    on = cli("--resume", run, "--n_iter", 6, name="defended")
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
    rounded = defend(plain, "float16", generator=generator())
    assert dataclasses.replace(rounded, gradients=plain.gradients, defence="none") == plain
    assert rounded.defence == "float16"


def real_update():
    """The update of eight real images on a LeNet, as `defend` gets it, and the model."""
    return victim(resolved("--batch_size", 8, "--image_size", 16), CPU)[:2]


@pytest.mark.parametrize("defence", ["noise:1e-5", "noise:1e-3", "noise:0.1", "float16", "bfloat16"])
def test_the_server_can_tell_how_noisy_an_update_is(defence):
    plain, model = real_update()
    noisy = defend(plain, defence, generator=generator())
    actual = (noisy.gradients["head.weight"] - plain.gradients["head.weight"]).square().mean().sqrt()
    assert measured_noise(noisy.gradients, model) == pytest.approx(float(actual), rel=0.15)
    assert measured_noise(plain.gradients, model) < 1e-6 * plain.strength()


def test_an_update_without_the_heads_gradient_says_nothing_of_its_noise():
    plain, model = real_update()
    rest = {name: gradient for name, gradient in plain.gradients.items() if name != "head.weight"}
    assert measured_noise(rest, model) == 0
    assert measured_noise(plain.gradients, torch.nn.Sequential(model, torch.nn.ReLU())) == 0


@given(st.floats(1e-6, 1e6))
def test_noise_and_strength_scale_with_the_update(factor):
    plain, model = real_update()
    scaled = dataclasses.replace(plain, gradients={n: g.double() * factor for n, g in plain.gradients.items()})
    assert measured_noise(scaled.gradients, model) == pytest.approx(
        factor * measured_noise(plain.gradients, model), rel=1e-6
    )
    assert scaled.strength() == pytest.approx(factor * plain.strength(), rel=1e-6)


@pytest.mark.parametrize("defence", ["float16", "noise:1e39"])
def test_numbers_that_a_defence_takes_beyond_floats_are_refused(defence):
    large = dataclasses.replace(update(), gradients={"conv1.weight": torch.tensor([1.0, 1e5])})
    with pytest.raises(ValueError, match=rf"--defence {defence}: the gradient of 'conv1.weight' is not finite"):
        defend(large, defence, generator=generator())


@pytest.mark.long
def test_heeding_the_noise_pays(cli):
    flags = ["--batch_size", 4, "--num_classes", 20, "--defence", "noise:3e-3", "--n_iter", 40, "--inner_iter", 20]
    flags += ["--tv_evals", 100, "--max_evals", 200]
    heeded = metrics_of(cli(*flags, name="heeded"))
    ignored = metrics_of(cli(*flags, "--noise_weight", 0, name="ignored"))
    assert heeded["psnr_mean"] > ignored["psnr_mean"] + 3  # 5.5 measured
