"""Weights that are made of other parameters, and what an update tells of their gradients."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from network.head import Head
from network.parametrised import why_no_gradient, with_weights

MADE = {
    "by rows": lambda layer: parametrizations.weight_norm(layer),
    "by columns": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "as a whole": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "as before": lambda layer: torch.nn.utils.weight_norm(layer),
}


def layer_and_gradients(make, layer):
    """A layer in a model, the gradients of its parameters, and that of its weight."""
    torch.manual_seed(0)
    model = nn.Sequential(make(layer))
    x = torch.randn(3, *((4,) if isinstance(layer, nn.Linear) else (4, 5, 5)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
        model(x)
        weight = model[0].weight.detach().clone().requires_grad_()
    run = nn.functional.linear if isinstance(layer, nn.Linear) else nn.functional.conv2d
    run(x, weight, model[0].bias).sin().sum().backward()
    model(x).sin().sum().backward()
    return model, {name: parameter.grad for name, parameter in model.named_parameters()}, weight.grad


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv2d(4, 6, 3)], ids=["linear", "convolution"])
@pytest.mark.parametrize("how", MADE)
def test_the_gradient_of_a_normalised_weight_is_formed_of_those_of_length_and_direction(how, layer):
    model, gradients, expected = layer_and_gradients(MADE[how], type(layer)(**_arguments(layer)))
    assert "0.weight" not in gradients
    found = with_weights(gradients, model)
    assert torch.allclose(found["0.weight"], expected, atol=1e-5)
    assert {name: found[name] for name in gradients} == gradients
    assert not why_no_gradient(model[0])


def _arguments(layer):
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features}
    return {"in_channels": layer.in_channels, "out_channels": layer.out_channels, "kernel_size": layer.kernel_size}


@pytest.mark.parametrize("name", ["spectral_norm", "orthogonal"])
def test_a_parametrisation_that_hides_a_part_of_the_gradient_is_named(name):
    model, gradients, _ = layer_and_gradients(getattr(parametrizations, name), nn.Linear(4, 6))
    assert with_weights(gradients, model).keys() == gradients.keys()
    assert name.split("_")[0] in why_no_gradient(model[0]).lower()
    both = parametrizations.weight_norm(nn.Linear(4, 6))
    parametrize.register_parametrization(both, "weight", nn.Tanh())
    assert "WeightNorm and Tanh" in why_no_gradient(both)


def test_a_plain_layer_has_its_gradient_and_keeps_it():
    model, gradients, expected = layer_and_gradients(lambda layer: layer, nn.Linear(4, 6))
    assert torch.equal(with_weights(gradients, model)["0.weight"], expected)
    assert not why_no_gradient(model[0])
    assert not why_no_gradient(nn.ReLU())


def test_a_normalised_head_is_a_linear_head_wherever_it_was_registered():
    for body in (nn.Flatten(), nn.Softmax(dim=1)):  # walked, and a model that does not end in its head
        model = nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(12, 5)), body).eval()
        assert Head.of(model).weight == "1.weight"
