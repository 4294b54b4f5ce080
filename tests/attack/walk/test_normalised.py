"""The equations behind BatchNorm in training mode: their derivatives, their truth, and what becomes of the walk."""

import pytest
import torch
from batchnorm import Blocks, Plain, Shared, drawn, ordered, relative_errors
from conftest import generator

from attack.read.reader import read_layers
from attack.solve.budget import WorkBudget
from attack.walk.masks import balanced
from attack.walk.normalised import NormalisedAt
from attack.walk.sources import Normalisation, NormalisedSource
from attack.walk.walk import BatchGradients, descend
from network.chain import shift_before
from network.kinds import pulled_below
from network.kinds.affine import LinearMap
from network.known_outputs import KnownOutputs
from network.stage import run
from update.batchnorm import batchnorms


@pytest.fixture(scope="module")
def plain():
    return Shared(drawn(Plain()), 3, double=True)


def source_of(shared: Shared, layer: str, norm: str, relu: str) -> NormalisedSource:
    """The equations of a layer from exact knowledge of all above it."""
    names = [stage.name for stage in shared.chain]
    above = run(shared.chain[: names.index(relu) + 1], shared.images.double())
    leaf = above.clone().requires_grad_()
    with torch.enable_grad():
        loss = shared.update.training.loss.each(run(shared.chain[names.index(relu) + 1 :], leaf), shared.labels).sum()
    (delta,) = torch.autograd.grad(loss, leaf)
    noise = 1e-9 * torch.ones_like(above)
    known = pulled_below(torch.nn.ReLU(), KnownOutputs.of(above, delta, noise), above.shape[1:])
    module, batchnorm = (shared.chain[names.index(name)].module for name in (layer, norm))
    gradients = [3 * shared.update.gradients[f"{norm}.{kind}"].double() for kind in ("weight", "bias")]
    usual = batchnorm.running_mean, (batchnorm.running_var + batchnorm.eps).sqrt()
    return NormalisedSource(
        name=layer,
        map=LinearMap.of(module, shared.inputs[layer].shape[1:]),
        bias=torch.zeros(len(module.weight), dtype=torch.float64),
        above=known,
        gradient=3 * shared.update.gradients[f"{layer}.weight"].double(),
        precision=1e-12,
        additive=0.0,
        mask_error=torch.zeros(3, dtype=torch.float64),
        norm=Normalisation(batchnorm.weight, batchnorm.bias, batchnorm.eps, *gradients, *usual),
    )


def test_the_truth_fulfils_all_equations(plain):
    source = source_of(plain, "3", "4", "5")
    u = plain.inputs["3"]
    at = NormalisedAt.of(source, u)
    assert relative_errors(source.map.weights(u, at.delta)[None], source.gradient[None]).max() < 1e-9
    assert (source.known_values - at.values)[source.known].abs().max() < 1e-9
    scale = (source.above.delta * at.values).sum((0, 2, 3))
    assert torch.allclose(scale, source.norm.scale_gradient, atol=1e-9)


def test_residuals_change_as_their_derivative_says(plain):
    source, u = source_of(plain, "3", "4", "5"), plain.inputs["3"]
    step = torch.randn(u.shape, generator=generator(1), dtype=torch.float64)

    def flat(u):
        return torch.cat([part.flatten() for part in NormalisedAt.of(source, u).residuals()])

    told = torch.cat([part.flatten() for part in NormalisedAt.of(source, u).linearised().forward(step.float())])
    seen = (flat(u - 1e-5 * step) - flat(u + 1e-5 * step)) / 2e-5
    assert (told.double() - seen).norm() < 1e-4 * seen.norm()


def test_the_adjoint_is_the_derivative_transposed(plain):
    source, u = source_of(plain, "3", "4", "5"), plain.inputs["3"]
    linear = NormalisedAt.of(source, u).linearised()
    x = torch.randn(u.shape, generator=generator(2))
    image = linear.forward(x)
    y = [torch.randn(part.shape, generator=generator(3)) * part.norm() for part in image]
    one = sum(float((a * b).sum()) for a, b in zip(image, y, strict=True))
    other = float((x * linear.adjoint(y)).sum())
    assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("mode", ["train", "train_private"])
def test_a_plain_network_is_followed_below_batchnorm(mode):
    """Its common factor is told by the shared deviations, or by the gradient of BatchNorm's shift."""
    shared = Shared(drawn(Plain()), 3, mode)
    reading = read_layers(shared.update, shared.model, generator=generator())
    order = ordered(reading.recovered["6"], shared.inputs["6"])
    assert sorted(order.tolist()) == [0, 1, 2]
    assert reading.signals.labels.tolist() == shared.labels[order].tolist()
    for layer, most in (("6", 5e-5), ("3", 2e-4)):
        errors = relative_errors(reading.recovered[layer], shared.inputs[layer][order])
        told = next(row["uncertainty"] for row in reading.layers if row["layer"] == layer)
        assert errors.max() < min(most, 5 * told)


def test_residual_blocks_are_followed_down_to_the_pixels():
    shared = Shared(drawn(Blocks()), 3)
    reading = read_layers(shared.update, shared.model, generator=generator())
    assert reading.start == 0
    order = ordered(reading.inputs, shared.images.double())
    assert relative_errors(reading.inputs, shared.images.double()[order]).max() < 3e-4
    assert reading.signals.labels.tolist() == shared.labels[order].tolist()


def test_wrong_masks_show_in_the_gradient_of_the_shift(plain):
    """One, two or three wrong entries of a channel are found before anything is solved."""
    source = source_of(plain, "3", "4", "5")
    shift = source.norm.shift_gradient
    outputs = source.above
    assert not (balanced(outputs, shift).delta != outputs.delta).any()
    outputs = KnownOutputs(**vars(outputs) | {"margin": outputs.margin.clamp(-3, 9)})  # all of them in doubt
    flips = torch.zeros_like(outputs.known)
    for channel, entries in enumerate(((0,), (5, 40), (1, 17, 30))):
        for entry in entries:
            flips[entry % 3, channel].view(-1)[entry // 3] = True
    some = KnownOutputs(**vars(outputs) | {"margin": torch.where(flips, 6.0, outputs.margin + 50)}).flipped(flips)
    for loud in (1e-3, 1.0, 1e3):  # in whatever units the loss is
        both = {name: loud * getattr(some, name) for name in ("delta", "masked_delta")}
        found = balanced(KnownOutputs(**vars(some) | both), loud * shift)
        assert (found.delta == loud * outputs.delta).all()


def test_the_same_check_serves_eval_mode():
    shared = Shared(drawn(Plain()), 3, "eval", double=True)
    assert shift_before(shared.chain[:6]) == "4.bias"
    assert shift_before(shared.chain[:5]) is None
    leaf = run(shared.chain[:6], shared.images.double()).requires_grad_()
    loss = shared.update.training.loss.each(run(shared.chain[6:], leaf), shared.labels).sum()
    (delta,) = torch.autograd.grad(loss, leaf)
    sums = (delta * (leaf > 0)).sum((0, 2, 3))
    assert torch.allclose(sums, 3 * shared.update.gradients["4.bias"].double(), atol=1e-9)


def test_a_walk_without_gradients_of_batchnorm_says_so():
    shared = Shared(drawn(Plain()), 3)
    gradients = {name: g for name, g in shared.update.gradients.items() if name != "4.bias"}
    moments = {batchnorms(shared.model)[k]: both for k, both in shared.update.batch_moments(shared.model).items()}
    found = descend(
        shared.chain,
        (3, 8, 8),
        BatchGradients(gradients, 3, moments=moments),
        6,
        shared.inputs["6"],
        shared.labels,
        generator=generator(),
        budget=WorkBudget(),
    )
    assert found.deepest == 6
    assert found.records[-1].reason == "the update holds no gradients of 4"
