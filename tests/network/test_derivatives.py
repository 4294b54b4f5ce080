"""Functions whose second derivatives torch does not have by itself."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional

from network.derivatives import make_twice_differentiable, twice_differentiable


class Attention(nn.Module):
    """Attention over four tokens of eight entries."""

    def forward(self, x):
        return functional.scaled_dot_product_attention(x, x, x)


ONCE = {
    "hard sigmoid": lambda: nn.Hardsigmoid(),
    "attention": Attention,
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
}


@pytest.mark.parametrize("name", ONCE)
def test_a_model_is_differentiated_twice_and_image_by_image(name):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), ONCE[name](), nn.Flatten(), nn.Linear(32, 3)).eval()
    model = copy.deepcopy(plain)
    make_twice_differentiable(model)
    model = copy.deepcopy(model)  # a copy does so too
    x = torch.randn(2, 4, 8, requires_grad=True)
    assert torch.allclose(model(x), plain(x), atol=1e-6)
    first = torch.autograd.grad(model(x).square().sum(), [*model.parameters()], create_graph=True)
    assert torch.autograd.grad(sum(g.square().sum() for g in first), x)[0].any()

    def loss(weights, image):
        return functional_call(model, weights, (image[None],)).square().sum()

    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    each = vmap(grad(loss), in_dims=(None, 0))(weights, x.detach())
    for whole, one in zip(first, each.values(), strict=True):
        assert torch.allclose(one.sum(0), whole, atol=1e-5)


def test_a_frozen_encoder_layer_is_differentiated_forward_too():
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True).eval().requires_grad_(False)
    make_twice_differentiable(layer)
    x, step = torch.randn(2, 2, 4, 8)
    _, slope = jvp(layer, (x,), (step,))
    assert torch.allclose(slope, (layer(x + 1e-3 * step) - layer(x - 1e-3 * step)) / 2e-3, atol=1e-2)


class Leaves(nn.Module):
    """A model that ends the program."""

    def forward(self, x):
        raise SystemExit(3)


@pytest.mark.parametrize(("model", "error"), [(nn.Linear(8, 3), RuntimeError), (Leaves(), SystemExit)])
def test_torch_is_as_it_was_afterwards_whatever_the_model_raises(model, error):
    make_twice_differentiable(model)
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(error):
        model(torch.zeros(2, 5))
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()) == before
    assert torch.backends.mha.get_fastpath_enabled()
    x = torch.zeros(3, requires_grad=True)
    with twice_differentiable():
        y = functional.hardsigmoid(x, inplace=False)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert first.requires_grad
    assert torch.autograd.grad(first.sum(), x)[0].any()
