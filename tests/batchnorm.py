"""Small networks with BatchNorm, and updates of them in training mode, for tests."""

import copy

import torch
from conftest import generator
from torch import nn

from client.victim import share_update
from network.chain import inputs_along
from network.tracing import stages
from update.loss import CROSS_ENTROPY, Loss
from update.training import LocalTraining


def conv(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)]


class Plain(nn.Sequential):
    """Three convolutions, each with BatchNorm and a ReLU; 8-pixel images."""

    def __init__(self, channels=(24, 40, 56)):
        first, second, third = channels
        layers = [*conv(3, first), nn.ReLU(), *conv(first, second, 2), nn.ReLU(), *conv(second, third), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(third, 10))


class Block(nn.Module):
    """Two convolutions beside a projection, or beside nothing."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv(inputs, outputs, stride), nn.ReLU(), *conv(outputs, outputs))
        project = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Sequential(*project) if stride > 1 else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.body(x) + self.shortcut(x))


class Blocks(nn.Sequential):
    """A stem and four blocks; 8-pixel images."""

    def __init__(self):
        blocks = [Block(16, 32, 2), Block(32, 32, 1), Block(32, 48, 2), Block(48, 48, 1)]
        super().__init__(*conv(3, 16), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with weights that keep the signal's size, and the running statistics of random images."""
    draw = generator(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=draw)
            if parameter.dim() > 1:
                parameter.copy_(values * (2 / parameter[0].numel()) ** 0.5)
            else:
                parameter.copy_(name.endswith("weight") + 0.2 * values)
        model.train()
        for _ in range(30):
            model(smooth(16, draw))
    return model.eval()


def smooth(count: int, draw: torch.Generator, side: int = 8) -> torch.Tensor:
    """Images (count, 3, side, side) of 8 bits in [0, 1]."""
    coarse = torch.rand(count, 3, side // 2, side // 2, generator=draw)
    fine = 0.3 * torch.rand(count, 3, side, side, generator=draw)
    images = (0.7 * nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear") + fine).clamp(0, 1)
    return (images * 255).round() / 255


class Shared:
    """An update of a small network in training mode, with the truth: images, labels, inputs of the layers by name."""

    def __init__(
        self,
        model: nn.Module,
        count: int = 3,
        mode: str = "train",
        *,
        double: bool = False,
        loss: Loss = CROSS_ENTROPY,
        frozen: tuple[str, ...] = (),
    ) -> None:
        self.images, self.labels = smooth(count, generator(7)), torch.tensor([3, 8, 8, 1, 0, 5])[:count]
        dtype = torch.float64 if double else torch.float32
        self.model, self.images = model.to(dtype), self.images.to(dtype)
        training = LocalTraining(batchnorm=mode, loss=loss, frozen_norms=frozen)
        self.update = share_update(self.model, "net", self.images, self.labels, 10, training=training)
        self.chain = stages(copy.deepcopy(self.model).double().requires_grad_(False))
        self.inputs = {stage.name: x for stage, x in inputs_along(self.chain, self.images.double())}


def ordered(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """For each image found the index of the true one that is nearest to it."""
    return torch.cdist(found.flatten(1), truth.flatten(1)).argmin(1)


def relative_errors(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return (found - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
