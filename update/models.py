"""Victim models, their initialisation from an explicit generator, and loading a checkpoint into them.

Every model maps images (B, C, H, W) to class logits (B, K): `features` (B, d), with values in `feature_range`, then
a final linear layer named `head`. It is used in eval mode: a gradient of the batch is then the mean of the gradients of
its images, which is what FL averages.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from update.storage import StorageError, read_tensors
from update.vision import torchvision


class _Victim(nn.Module):
    """What all models share: the head on the features, and the initialisation of torch's own layers."""

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, K)."""
        return self.head(self.features(images))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights and biases anew, uniform in +-1/sqrt(fan in)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                bound = 1 / math.sqrt(module.weight[0].numel())
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.uniform_(-bound, bound, generator=generator)


class LeNet(_Victim):
    """The LeNet of Deep Leakage from Gradients: three 5x5 sigmoid convolutions of 12 channels, one linear layer.

    Strides 2, 2, 1; any square input of 16 to 64 pixels. Weights and biases uniform in +-0.5.

    Source: Zhu, Liu, Han 2019 (arXiv 1906.08935).
    """

    feature_range = (0.0, 1.0)

    def __init__(self, channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        side = math.ceil(math.ceil(image_size / 2) / 2)
        self.conv1 = nn.Conv2d(channels, 12, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(12, 12, 5, stride=2, padding=2)
        self.conv3 = nn.Conv2d(12, 12, 5, stride=1, padding=2)
        self.head = nn.Linear(12 * side * side, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Features (B, d) that the head sees, of images (B, C, H, W)."""
        for conv in (self.conv1, self.conv2, self.conv3):
            images = torch.sigmoid(conv(images))
        return images.flatten(1)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights and biases anew, uniform in +-0.5."""
        for parameter in self.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)


class MLP(_Victim):
    """Two hidden sigmoid layers of 256 units, any input."""

    feature_range = (0.0, 1.0)

    def __init__(self, channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(channels * image_size * image_size, 256)
        self.hidden2 = nn.Linear(256, 256)
        self.head = nn.Linear(256, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Features (B, d) that the head sees, of images (B, C, H, W)."""
        return torch.sigmoid(self.hidden2(torch.sigmoid(self.hidden1(images.flatten(1)))))


class ConvNet(_Victim):
    """A small ReLU ConvNet: 3x3 convolutions of 32, 64 and 64 channels, strides 1, 2, 2, one linear layer."""

    feature_range = (0.0, math.inf)

    def __init__(self, channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        side = math.ceil(math.ceil(image_size / 2) / 2)
        self.conv1 = nn.Conv2d(channels, 32, 3, stride=1, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, stride=2, padding=1)
        self.head = nn.Linear(64 * side * side, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Features (B, d) that the head sees, of images (B, C, H, W)."""
        for conv in (self.conv1, self.conv2, self.conv3):
            images = torch.relu(conv(images))
        return images.flatten(1)


class ResNet18(_Victim):
    """torchvision's ResNet-18, its last layer apart. BatchNorm uses running statistics, as a server can in eval mode.

    Source: He et al. 2016 (arXiv 1512.03385); initialised as torchvision does.
    """

    feature_range = (0.0, math.inf)

    def __init__(self, channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        self.body = torchvision().models.resnet18()
        width = self.body.fc.in_features
        if channels != 3:
            self.body.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        self.body.fc = nn.Identity()
        for module in self.body.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # what a layer gave out stays as it was for whoever keeps it
        self.head = nn.Linear(width, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Features (B, 512) that the head sees, of images (B, C, H, W)."""
        return self.body(images)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Convolutions from a normal distribution (He et al. 2015, fan out), BatchNorm as the identity."""
        for module in self.body.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[:, 0].numel()
                module.weight.normal_(0, math.sqrt(2 / fan_out), generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        bound = 1 / math.sqrt(self.head.in_features)
        for parameter in self.head.parameters():
            parameter.uniform_(-bound, bound, generator=generator)


MODELS = {"lenet": LeNet, "mlp": MLP, "convnet": ConvNet, "resnet18": ResNet18}


def build_model(
    name: str, *, image_shape: tuple[int, int, int], num_classes: int, generator: torch.Generator
) -> nn.Module:
    """A victim model in eval mode, float32 on the CPU, its weights drawn from `generator`.

    Raises:
        ValueError: unknown name, an image that is not square or not of 16 to 64 pixels, fewer than two classes.
    """
    channels, height, width = image_shape
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    if height != width or not 16 <= height <= 64:
        raise ValueError(f"models take square images of 16 to 64 pixels, got {height}x{width}: set --image_size")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    with torch.device("meta"):  # nothing is drawn from the global generator
        model = MODELS[name](channels, height, num_classes)
    model.to_empty(device="cpu")
    model.initialise(generator)
    return model.eval()


def place_of(model: nn.Module) -> dict[str, torch.dtype | torch.device]:
    """Dtype and device of the model, which are those of everything that is computed with it."""
    parameter = next(model.parameters())
    return {"dtype": parameter.dtype, "device": parameter.device}


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Copy named weights into `model`.

    Raises:
        ValueError: a name is missing, unknown or of another shape; `source` says where they came from.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights:
            raise ValueError(f"{source}: weight {name!r} is missing")
        if name not in own:
            raise ValueError(f"{source}: weight {name!r} is not in the model (it has {', '.join(own)})")
        if own[name].shape != weights[name].shape:
            raise ValueError(
                f"{source}: weight {name!r} has shape {tuple(weights[name].shape)}, "
                f"the model needs {tuple(own[name].shape)}"
            )
        if own[name].is_floating_point() != weights[name].is_floating_point() or weights[name].is_complex():
            raise ValueError(
                f"{source}: weight {name!r} holds {weights[name].dtype}, the model needs {own[name].dtype}"
            )
    model.load_state_dict(weights)


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a state dict from `.safetensors`, `.npz`, or a torch file (read with `weights_only=True`).

    Raises:
        ValueError: the file is missing, damaged, or does not fit the model.
    """
    path = Path(path)
    if path.suffix not in (".pt", ".pth"):
        return load_weights(model, read_tensors(path)[0], path)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise StorageError(f"no such file: {path}") from None
    except Exception as error:  # torch raises many kinds on a damaged file
        raise StorageError(f"{path} is not a state dict that can be loaded safely: {error}") from None
    load_weights(model, weights, path)
