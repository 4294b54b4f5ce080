"""How a transformer makes tokens of an image is seen when it runs, whatever its code looks like."""

import pytest
import torch
import transformers
from torch import nn

from network.embedding import patch_embedding
from network.normalise import normalised
from network.zoo import build_model

SHAPE = (3, 16, 16)
PLACED = ("with_class_token", "with_mean", "with_spare_places", "cut", "gridded")


def image():
    return torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PLACED)
def test_the_gradient_of_positions_is_that_of_the_projection(name):
    model = getattr(transformers, name)().eval()
    embedding = patch_embedding(model, SHAPE)
    assert (embedding.name, embedding.positions, embedding.width) == ("project", 16, 32)
    assert embedding.position.startswith("places")
    seen = []
    model.project.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    loss = nn.functional.cross_entropy(model(image()), torch.tensor([3]))
    (outputs,) = seen
    parameter = model.get_parameter(embedding.position)
    gradient, delta = torch.autograd.grad(loss, [parameter, outputs])
    expected = delta[0] if delta.dim() == 3 else delta[0].flatten(1).T
    assert torch.allclose(embedding.deltas(gradient), expected, atol=1e-6)


@pytest.mark.parametrize("name", PLACED)
@pytest.mark.parametrize("is_normalised", [False, True])
def test_patches_make_the_image(name, is_normalised):
    model = getattr(transformers, name)().eval()
    if is_normalised:
        model = normalised(model, 3, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    embedding, seen = patch_embedding(model, SHAPE), []
    model.project.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    model(image())
    patches = seen[0][0]
    if patches.dim() == 3:
        patches = nn.functional.unfold(patches[None], 4, stride=4)[0].T
    assert torch.allclose(embedding.image(patches, SHAPE), image()[0], atol=1e-5)


def test_a_model_without_learnable_positions_has_no_embedding():
    assert patch_embedding(transformers.unplaced().eval(), SHAPE) is None
    for name in ("lenet", "mlp"):
        model = build_model(name, image_shape=SHAPE, num_classes=10, generator=torch.Generator().manual_seed(0))
        assert patch_embedding(model, SHAPE) is None


def test_looking_leaves_the_model_as_it_is():
    model = transformers.with_class_token().eval()
    before = model(image())
    patch_embedding(model, SHAPE)
    assert torch.equal(model(image()), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
