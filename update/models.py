"""Victim models, their initialisation from an explicit generator, and loading a checkpoint into them.

Every model maps images (B, C, H, W) to class logits (B, K): `features` (B, d), with values in `feature_range`, then
a final linear layer named `head`. It is used in eval mode: a gradient of the batch is then the mean of the gradients of
its images, which is what FL averages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from update.stages import Chain, Residual, Stage, run
from update.storage import StorageError, read_tensors
from update.vision import torchvision


class _Victim(nn.Module):
    """What all models share: a chain of stages, the head on the features, and how most layers are initialised."""

    def stages(self) -> list[Stage]:
        """The chain from images to logits, see `update.stages`."""
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """Features (B, d) that the head sees, of images (B, C, H, W)."""
        return run(self.stages()[:-1], images)

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

    def stages(self) -> list[Stage]:
        """Three convolutions, each with its sigmoid."""
        return [*_layers(self, ("conv1", "conv2", "conv3"), nn.Sigmoid()), *_flat_head(self)]

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

    @property
    def feature_range(self) -> tuple[float, float]:
        """That of the activation."""
        return ACTIVATIONS[self.activation].range

    def stages(self) -> list[Stage]:
        """The hidden layers, each with its activation."""
        names = [f"hidden{layer}" for layer in range(1, self.depth + 1)]
        hidden = _layers(self, names, ACTIVATIONS[self.activation].module())
        return [Stage("flatten", nn.Flatten()), *hidden, Stage("head", self.head)]

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

    feature_range = (-1.0, 1.0)

    def __init__(self, channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.hidden1 = nn.Linear(16 * side * side, 120)
        self.hidden2 = nn.Linear(120, 84)
        self.head = nn.Linear(84, num_classes)

    def stages(self) -> list[Stage]:
        """Convolution, tanh and pool twice, then two fully connected layers."""
        chain: list[Stage] = []
        for number, name in enumerate(("conv1", "conv2"), 1):
            chain += [*_layers(self, [name], nn.Tanh()), Stage(f"pool{number}", nn.AvgPool2d(2))]
        hidden = _layers(self, ("hidden1", "hidden2"), nn.Tanh())
        return [*chain, Stage("flatten", nn.Flatten()), *hidden, Stage("head", self.head)]

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Weights uniform in +-sqrt(3 / fan in), which keeps the signal's size, biases in +-1/sqrt(fan in)."""
        super().initialise(generator)
        for name in ("conv1", "conv2", "hidden1", "hidden2"):
            getattr(self, name).weight.mul_(ACTIVATIONS["tanh"].gain)


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

    def stages(self) -> list[Stage]:
        """Three convolutions, each with its ReLU."""
        return [*_layers(self, ("conv1", "conv2", "conv3"), nn.ReLU()), *_flat_head(self)]


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

    def stages(self) -> list[Stage]:
        """Stem, eight residual blocks with a ReLU behind each, and the mean over positions."""
        chain = _named(self, "body", ("conv1", "bn1", "relu", "maxpool"))
        for group in ("layer1", "layer2", "layer3", "layer4"):
            for number, block in enumerate(getattr(self.body, group)):
                chain += _basic_block(f"body.{group}.{number}", block)
        return [*chain, Stage("body.avgpool", self.body.avgpool), *_flat_head(self)]

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

    feature_range = (0.0, math.inf)

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

    def stages(self) -> list[Stage]:
        """Convolution, BatchNorm, ReLU, and a pool behind the first, second, fourth, sixth and eighth."""
        chain: list[Stage] = []
        for number in range(1, len(VGG11_WIDTHS) + 1):
            chain += [Stage(f"{kind}{number}", getattr(self, f"{kind}{number}")) for kind in ("conv", "bn")]
            chain.append(Stage(f"relu{number}", nn.ReLU()))
            if number in VGG11_POOLS:
                chain.append(Stage(f"pool{number}", nn.MaxPool2d(2, ceil_mode=True)))
        hidden = _layers(self, ("hidden1", "hidden2"), nn.ReLU())
        return [*chain, Stage("flatten", nn.Flatten()), *hidden, Stage("head", self.head)]

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
    """An activation of the MLP: its module, the range of its values, and the gain of weights in front of it."""

    module: type[nn.Module]
    range: tuple[float, float]
    gain: float


ACTIVATIONS = {
    "relu": Activation(nn.ReLU, (0.0, math.inf), math.sqrt(6)),
    "sigmoid": Activation(nn.Sigmoid, (0.0, 1.0), 1.0),
    "tanh": Activation(nn.Tanh, (-1.0, 1.0), math.sqrt(3)),
    "gelu": Activation(nn.GELU, (-0.17, math.inf), math.sqrt(6)),  # least value -0.16997
}


def _named(model: nn.Module, prefix: str, names: Sequence[str]) -> list[Stage]:
    """Submodules as stages, under the names that they have in the model; identities do nothing and are left out."""
    found = [Stage(f"{prefix}.{name}", model.get_submodule(f"{prefix}.{name}")) for name in names]
    return [stage for stage in found if not isinstance(stage.module, nn.Identity)]


def _layers(model: nn.Module, names: Sequence[str], activation: nn.Module) -> list[Stage]:
    """Layers, each with the activation behind it."""
    kind = type(activation).__name__.lower()
    return [s for name in names for s in (Stage(name, getattr(model, name)), Stage(f"{name}.{kind}", activation))]


def _flat_head(model: nn.Module) -> list[Stage]:
    return [Stage("flatten", nn.Flatten()), Stage("head", model.head)]


def _basic_block(name: str, block: nn.Module) -> list[Stage]:
    """torchvision's BasicBlock: two convolutions beside the identity or a strided 1x1 convolution, ReLU on the sum."""
    body = [Stage(f"{name}.{part}", getattr(block, part)) for part in ("conv1", "bn1", "relu", "conv2", "bn2")]
    shortcut: Chain = [] if block.downsample is None else _named(block, "downsample", ("0", "1"))
    shortcut = [Stage(f"{name}.{stage.name}", stage.module) for stage in shortcut]
    return [Stage(name, Residual(body, shortcut)), Stage(f"{name}.relu", block.relu)]


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
ALL_OPTIONS = tuple(name for names in OPTIONS.values() for name in names)


def build_model(
    name: str,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    generator: torch.Generator,
    **options: str | int,
) -> nn.Module:
    """A victim model in eval mode, float32 on the CPU, its weights drawn from `generator`.

    Args:
        name: one of `MODELS`.
        image_shape: (C, H, W).
        num_classes: K.
        generator: what the weights are drawn from.
        options: what the model can be told beside, see `OPTIONS`.

    Raises:
        ValueError: unknown name or option, an image that is not square or not of 16 to 64 pixels, fewer than two
            classes, or what the model says of its options.
    """
    channels, height, width = image_shape
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    if height != width or not 16 <= height <= 64:
        raise ValueError(f"models take square images of 16 to 64 pixels, got {height}x{width}: set --image_size")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    for option in options:
        if option not in OPTIONS.get(name, ()):
            raise ValueError(f"--{option} is no option of {name}: {_takers(option)}")
    with torch.device("meta"):  # nothing is drawn from the global generator
        model = MODELS[name](channels, height, num_classes, **options)
    model.to_empty(device="cpu")
    model.initialise(generator)
    return model.eval()


def place_of(model: nn.Module) -> dict[str, torch.dtype | torch.device]:
    """Dtype and device of the model, which are those of everything that is computed with it."""
    parameter = next(model.parameters())
    return {"dtype": parameter.dtype, "device": parameter.device}


def _takers(option: str) -> str:
    names = [name for name, options in OPTIONS.items() if option in options]
    return f"it is one of {', '.join(names)}" if names else "no model has it"


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
