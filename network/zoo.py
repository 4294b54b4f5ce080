"""Victim models, and their initialisation from an explicit generator.

Every model maps images (B, C, H, W) to class logits (B, K). It is used in eval mode: a gradient of the batch is then
the mean of the gradients of its images, which is what FL averages. Those stated here end in a linear layer named
`head`; others come from `outside`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from network.memory import check_room
from network.normalise import normalised
from network.outside import OUTSIDE, is_outside, outside_model, try_out
from network.vision import torchvision

COPIES = 4  # tensors of the weights' size that an attack holds: weights, update, the dummies' gradient, its derivative


class _Victim(nn.Module):
    """What all models share: how most layers are initialised."""

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

    def __init__(self, channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        side = math.ceil(math.ceil(image_size / 2) / 2)
        self.conv1 = nn.Conv2d(channels, 12, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(12, 12, 5, stride=2, padding=2)
        self.conv3 = nn.Conv2d(12, 12, 5, stride=1, padding=2)
        self.head = nn.Linear(12 * side * side, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, C, H, W)."""
        for convolution in (self.conv1, self.conv2, self.conv3):
            x = convolution(x).sigmoid()
        return self.head(x.flatten(1))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights and biases anew, uniform in +-0.5."""
        for parameter in self.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)


class MLP(_Victim):
    """Fully connected, any input: `depth` hidden layers of `width` units, by default two sigmoid ones of 256.

    Sigmoid layers are drawn as torch draws them, uniform in +-1/sqrt(fan in). The others are drawn wider, by the factor
    that keeps the signal's size from layer to layer: sqrt(6) after ReLU (He et al. 2015) and GELU, which is nearly
    linear half the time as well, sqrt(3) after tanh, whose slope at zero is 1.

    Raises:
        ValueError: unknown activation, depth or width below 1.
    """

    def __init__(
        self,
        channels: int,
        image_size: int,
        num_classes: int,
        *,
        activation: str = "sigmoid",
        depth: int = 2,
        width: int = 256,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if depth < 1 or width < 1:
            raise ValueError(f"an mlp has at least one hidden layer of one unit, got depth {depth} and width {width}")
        self.activation, self.depth = activation, depth
        inputs = channels * image_size * image_size
        for layer in range(1, depth + 1):
            self.add_module(f"hidden{layer}", nn.Linear(inputs if layer == 1 else width, width))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, C, H, W)."""
        x = x.flatten(1)
        for layer in range(1, self.depth + 1):
            x = ACTIVATIONS[self.activation].function(getattr(self, f"hidden{layer}")(x))
        return self.head(x)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights and biases anew: hidden weights by the activation's gain, all else +-1/sqrt(fan in)."""
        super().initialise(generator)
        for layer in range(1, self.depth + 1):
            getattr(self, f"hidden{layer}").weight.mul_(ACTIVATIONS[self.activation].gain)


class LeNet5(_Victim):
    """LeNet-5 with plain average pooling: 5x5 tanh convolutions of 6 and 16 channels, tanh layers of 120 and 84.

    Source: LeCun et al. 1998; all of the second convolution's connections are there, and the head is linear.
    """

    def __init__(self, channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.hidden1 = nn.Linear(16 * side * side, 120)
        self.hidden2 = nn.Linear(120, 84)
        self.head = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, C, H, W)."""
        for convolution in (self.conv1, self.conv2):
            x = functional.avg_pool2d(convolution(x).tanh(), 2)
        x = x.flatten(1)
        for layer in (self.hidden1, self.hidden2):
            x = layer(x).tanh()
        return self.head(x)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Weights uniform in +-sqrt(3 / fan in), which keeps the signal's size, biases in +-1/sqrt(fan in)."""
        super().initialise(generator)
        for name in ("conv1", "conv2", "hidden1", "hidden2"):
            getattr(self, name).weight.mul_(ACTIVATIONS["tanh"].gain)


class ConvNet(_Victim):
    """A small ReLU ConvNet: 3x3 convolutions of 32, 64 and 64 channels, strides 1, 2, 2, one linear layer."""

    def __init__(self, channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        side = math.ceil(math.ceil(image_size / 2) / 2)
        self.conv1 = nn.Conv2d(channels, 32, 3, stride=1, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, stride=2, padding=1)
        self.head = nn.Linear(64 * side * side, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, C, H, W)."""
        for convolution in (self.conv1, self.conv2, self.conv3):
            x = convolution(x).relu()
        return self.head(x.flatten(1))


class ResNet18(_Victim):
    """torchvision's ResNet-18, its last layer apart. BatchNorm uses running statistics, as a server can in eval mode.

    Source: He et al. 2016 (arXiv 1512.03385); initialised as torchvision does.
    """

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

    def forward(self, x: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, C, H, W)."""
        return self.head(self.body(x))

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


class ResNet18Cifar(ResNet18):
    """ResNet-18 as it is used on images of 32 pixels: a 3x3 stem of stride 1, and no max-pool behind it."""

    def __init__(self, channels: int, image_size: int, num_classes: int) -> None:
        super().__init__(channels, image_size, num_classes)
        self.body.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
        self.body.maxpool = nn.Identity()


class VGG11(_Victim):
    """VGG-11 with BatchNorm for small images: eight 3x3 convolutions, five max-pools, two hidden layers of 512.

    An odd last row or column is pooled as it is, so that images of 16 pixels have something left after five pools.

    Source: Simonyan, Zisserman 2015 (arXiv 1409.1556), configuration A.
    """

    def __init__(self, channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        for number, width in enumerate(VGG11_WIDTHS, 1):
            self.add_module(f"conv{number}", nn.Conv2d(channels, width, 3, padding=1, bias=False))
            self.add_module(f"bn{number}", nn.BatchNorm2d(width))
            channels = width
        side = math.ceil(image_size / 2 ** len(VGG11_POOLS))
        self.hidden1 = nn.Linear(channels * side * side, 512)
        self.hidden2 = nn.Linear(512, 512)
        self.head = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, C, H, W)."""
        for number in range(1, len(VGG11_WIDTHS) + 1):
            x = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(x)).relu()
            if number in VGG11_POOLS:
                x = functional.max_pool2d(x, 2, ceil_mode=True)
        x = x.flatten(1)
        for layer in (self.hidden1, self.hidden2):
            x = layer(x).relu()
        return self.head(x)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Weights normal of variance 2 / fan in (He et al. 2015), BatchNorm as the identity, biases zero."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight.normal_(0, math.sqrt(2 / module.weight[0].numel()), generator=generator)
                if module.bias is not None:
                    module.bias.zero_()


VGG11_WIDTHS = (64, 128, 256, 256, 512, 512, 512, 512)
VGG11_POOLS = (1, 2, 4, 6, 8)  # convolutions with a max-pool behind them


@dataclass(frozen=True)
class Activation:
    """An activation of the MLP, and the gain of weights in front of it."""

    function: Callable[[Tensor], Tensor]
    gain: float


ACTIVATIONS = {
    "relu": Activation(torch.relu, math.sqrt(6)),
    "sigmoid": Activation(torch.sigmoid, 1.0),
    "tanh": Activation(torch.tanh, math.sqrt(3)),
    "gelu": Activation(functional.gelu, math.sqrt(6)),
}


MODELS = {
    "lenet": LeNet,
    "mlp": MLP,
    "convnet": ConvNet,
    "resnet18": ResNet18,
    "resnet18_cifar": ResNet18Cifar,
    "vgg11": VGG11,
    "lenet5": LeNet5,
}
OPTIONS = {"mlp": ("activation", "depth", "width")}  # what `build_model` may be told beside the shapes
FRONT = ("mean", "std")  # and of any model, see `normalise`
ALL_OPTIONS = (*(name for names in OPTIONS.values() for name in names), *FRONT)


def build_model(
    name: str,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    generator: torch.Generator,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **options: str | int,
) -> nn.Module:
    """A victim model in eval mode, float32 on the CPU, its weights drawn from `generator`.

    Args:
        name: one of `MODELS`, or of a model from outside, see `outside`.
        image_shape: (C, H, W).
        num_classes: K.
        generator: what the weights are drawn from.
        mean: of the pixels that the model takes, one for each channel or one for all.
        std: their standard deviation, likewise; with either, normalisation is the model's first layer.
        options: what the model can be told beside, see `OPTIONS`.

    Raises:
        ValueError: unknown name or option, images that the model does not take (those of `MODELS` take square ones of
            16 to 64 pixels), fewer than two classes, or what the model says of its options.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    for option in options:
        if option not in OPTIONS.get(name, ()):
            raise ValueError(f"--{option} is no option of {name}: {_takers(option)}")
    if not is_outside(name):
        model = _stated_here(name, image_shape, num_classes, generator, options)
        return normalised(model, image_shape[0], mean, std)
    model = outside_model(name, num_classes=num_classes, generator=generator)
    model = normalised(model, image_shape[0], mean, std)
    try_out(model, name, image_shape, num_classes, generator)
    return model


def _stated_here(
    name: str, image_shape: tuple[int, int, int], num_classes: int, generator: torch.Generator, options: dict
) -> nn.Module:
    channels, height, width = image_shape
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}, {OUTSIDE}")
    if height != width or not 16 <= height <= 64:
        raise ValueError(f"{name} takes square images of 16 to 64 pixels, got {height}x{width}: set --image_size")
    with torch.device("meta"):  # nothing is drawn from the global generator
        model = MODELS[name](channels, height, num_classes, **options)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    told = "".join(f" --{option} {value}" for option, value in options.items())
    check_room(COPIES * weights, f"an attack on {name}{told} with {num_classes} classes")
    model.load_state_dict({k: torch.empty(v.shape, dtype=v.dtype) for k, v in model.state_dict().items()}, assign=True)
    model.initialise(generator)
    return model.eval()


def place_of(model: nn.Module) -> dict[str, torch.dtype | torch.device]:
    """Dtype and device of the model, which are those of everything that is computed with it."""
    parameter = next(model.parameters())
    return {"dtype": parameter.dtype, "device": parameter.device}


def _takers(option: str) -> str:
    names = [name for name, options in OPTIONS.items() if option in options]
    return f"it is one of {', '.join(names)}" if names else "no model has it"
