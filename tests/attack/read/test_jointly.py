"""All images of a layer at once, below BatchNorm in training mode."""

import pytest
import torch
from batchnorm import Blocks, Plain, Shared, drawn, ordered, relative_errors
from conftest import generator

from attack.read.jointly import Upwards, told_apart_jointly
from attack.read.layer_choice import candidate_layers
from attack.solve.budget import WorkBudget
from network.stage import run
from update.loss import CROSS_ENTROPY, Loss

WEIGHTED = Loss(weights=tuple(torch.linspace(0.2, 5, 10).tolist()))


@pytest.fixture(scope="module", params=[(Plain, CROSS_ENTROPY), (Blocks, CROSS_ENTROPY), (Plain, WEIGHTED)])
def shared(request):
    network, loss = request.param
    return Shared(drawn(network()), 3, loss=loss)


def candidate(shared, name):
    layers = candidate_layers(shared.chain, (3, 8, 8), shared.update.gradients)
    return next(layer for layer in layers if layer.name == name)


def told_apart(shared, name, *, shift="auto", gradient=None):
    layer = candidate(shared, name)
    span = layer.span(shared.update.gradients, 3, torch.zeros(1, dtype=torch.float64))

    def both(inputs):
        features = run(shared.chain[layer.index : -1], inputs)
        return features, shared.chain[-1].module(features)

    head = shared.chain[-1].name
    gradient = 3 * shared.update.gradients[f"{head}.weight"].double() if gradient is None else gradient
    below = {"6": "4.bias", "6.body.0": "5.body.4.bias"}[name]
    shift = 3 * shared.update.gradients[below].double() if shift == "auto" else shift
    upwards = Upwards(both, gradient, shared.update.training.loss, shift)
    return span, told_apart_jointly(span, upwards, generator=generator(), budget=WorkBudget(1e9))


def top_of(shared):
    return "6" if "6" in shared.inputs and "6.body.0" not in shared.inputs else "6.body.0"


def test_the_gradient_has_one_rank_less_and_all_inputs_lie_in_its_space(shared):
    span, _ = told_apart(shared, top_of(shared))
    assert span.rank == 3 * span.geometry.positions - 1
    assert span.dimension == 3
    truth = shared.inputs[top_of(shared)].flatten(1)
    assert relative_errors(truth @ span.basis.T @ span.basis, truth).max() < 1e-5
    alike = span.geometry.patches(shared.inputs[top_of(shared)]) @ span.ones
    assert alike.std() < 1e-4 * alike.mean().abs()


def test_all_images_are_told_apart_with_scale_and_labels(shared):
    _, found = told_apart(shared, top_of(shared))
    truth = shared.inputs[top_of(shared)]
    order = ordered(found.values, truth)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert found.labels.tolist() == shared.labels[order].tolist()
    errors = relative_errors(found.values, truth[order])
    assert errors.max() < 1e-5
    assert (errors < 5 * found.uncertainty).all()
    assert (found.certificates - 1).abs().max() < 1e-4


def test_a_factor_that_nothing_tells_is_not_certain():
    shared = Shared(drawn(Plain()), 3)
    _, found = told_apart(shared, "6", shift=None)
    assert found.confidence.max() < 0.999


def test_another_head_s_gradient_is_disagreed_with(shared):
    other = torch.randn((10, {"6": 56, "6.body.0": 48}[top_of(shared)]), generator=generator(3), dtype=torch.float64)
    with pytest.raises(ValueError, match="disagree with the head's gradient"):
        told_apart(shared, top_of(shared), gradient=other)


def test_layers_without_zeros_or_with_one_position_are_not_asked():
    shared = Shared(drawn(Plain()), 3)
    assert candidate(shared, "6").is_asked(3)
    assert not candidate(shared, "0").is_asked(3)  # pixels
    assert not candidate(shared, "6").is_asked(1)  # one image has no other to be mixed with
