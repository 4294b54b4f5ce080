"""Two linear layers with an activation between them, found by running a model."""

import pytest
import torch
import transformers
from torch import nn

from network.perceptrons import lowest, perceptrons

SHAPE = (3, 16, 16)


class Block(nn.Module):
    """Tokens of patches, a LayerNorm, and a perceptron by hand."""

    def __init__(self, activation, width=8):
        super().__init__()
        self.project, self.norm = nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width)
        self.up, self.down, self.head = nn.Linear(width, 16), nn.Linear(16, width), nn.Linear(width, 10)
        self.activation = activation

    def forward(self, x):
        x = self.project(x).flatten(2).mT
        x = x + self.down(self.activation(self.up(self.norm(x))))
        return self.head(x.mean(1))


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.SiLU()])
def test_a_perceptron_by_hand_is_found_with_its_activation(activation):
    model = Block(activation).eval()
    (found,) = perceptrons(model, SHAPE)
    assert (found.first, found.second, found.behind, found.tokens, found.width) == ("up", "down", "norm", 16, 8)
    assert str(found.activation) == str(activation)


def test_an_activation_with_a_kink_has_no_equations_to_follow():
    assert perceptrons(Block(nn.ReLU()).eval(), SHAPE) == []


def test_a_convolutional_network_has_none():
    assert perceptrons(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(784, 10)), SHAPE) == []


def test_blocks_of_the_encoder_of_torch_are_found_whether_parameters_are_trained_or_not():
    model = transformers.with_class_token().eval()
    names = [place.first for place in perceptrons(model, SHAPE)]
    assert names == ["encoder.layers.0.linear1", "encoder.layers.1.linear1"]
    frozen = perceptrons(model.requires_grad_(False), SHAPE)
    assert [place.first for place in frozen] == names
    assert [place.first for place in lowest(frozen)] == names[:1]


def test_the_tokens_are_the_inputs_of_the_first_layer():
    model, images = Block(nn.GELU()).eval(), torch.rand(2, *SHAPE)
    (place,) = perceptrons(model, SHAPE)
    expected = model.norm(model.project(images).flatten(2).mT)
    assert torch.allclose(place.inputs(model, images), expected, atol=1e-6)
