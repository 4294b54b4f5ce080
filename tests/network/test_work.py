import torch
from conftest import generator
from torch import nn

from network.work import multiplications
from network.zoo import build_model


def test_multiplications_are_weights_times_places():
    convolutions = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2, groups=2)]
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8 * 7 * 7, 10))
    by_hand = 4 * 3 * 9 * 16 * 16 + 8 * 2 * 9 * 7 * 7 + 10 * 8 * 7 * 7
    assert multiplications(model, (3, 16, 16)) == by_hand


def test_the_model_stays_as_it_is():
    model = build_model("resnet18_cifar", image_shape=(3, 16, 16), num_classes=5, generator=generator(1)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    assert multiplications(model, (3, 16, 16)) > 1e8
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
