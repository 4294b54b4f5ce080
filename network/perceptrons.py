"""Two linear layers on tokens with a smooth activation between them, behind a LayerNorm, as in blocks of transformers.

They are found by running the model: a linear layer whose input is an activation of another's output follows it. So
torchvision, timm, `nn.TransformerEncoderLayer`, ConvNeXt's blocks and blocks by hand make no difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from network.derivatives import twice_differentiable
from network.watched import inputs_until, watched

ACTIVATIONS = (nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Tanh(), nn.Sigmoid(), nn.Softplus())
SAME = 1e-4  # relative difference up to which two float32 tensors of one run are the same
SEED = 0  # of the images that the model is run on


@dataclass(frozen=True)
class Perceptron:
    """W2 phi(W1 x + b1) + b2 at each of N tokens x (D,).

    Attributes:
        first, second: the names of both layers.
        behind: the name of the LayerNorm whose outputs the first layer takes.
        inner, outer, norm: the layers and that LayerNorm.
        activation: phi.
        tokens: N, of one image.
    """

    first: str
    second: str
    behind: str
    inner: nn.Linear
    outer: nn.Linear
    norm: nn.LayerNorm
    activation: nn.Module
    tokens: int

    @property
    def width(self) -> int:
        """D."""
        return self.inner.in_features

    def why_not(self, batch_size: int) -> str:
        """Why the tokens of such a batch are not told apart; empty where they are."""
        count, room = batch_size * self.tokens, min(self.width, self.outer.out_features)
        return "" if count < room else f"{count} tokens fill all {room} channels"

    def within(self, model: nn.Module) -> "Perceptron":
        """The same of a copy of the model."""
        inner, outer, norm = (model.get_submodule(name) for name in (self.first, self.second, self.behind))
        return replace(self, inner=inner, outer=outer, norm=norm)

    def inputs(self, model: nn.Module, images: Tensor) -> Tensor:
        """The tokens (B, N, D) of images (B, C, H, W), in a model with these layers or a copy of it."""
        with twice_differentiable():
            (inputs,) = inputs_until([model.get_submodule(self.first)], lambda: model(images))
        return inputs.flatten(1, -2)

    def around_norm(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of the LayerNorm in front, and the tokens that it makes of them, both (B, N, D)."""
        layers = [model.get_submodule(name) for name in (self.behind, self.first)]
        with twice_differentiable():
            before, tokens = inputs_until(layers, lambda: model(images))
        return before.flatten(1, -2), tokens.flatten(1, -2)


def slope(activation: nn.Module, values: Tensor) -> Tensor:
    """phi' at these values."""
    with torch.enable_grad():
        leaf = values.detach().clone().requires_grad_()
        return torch.autograd.grad(activation(leaf).sum(), leaf)[0]


def perceptrons(model: nn.Module, image_shape: Sequence[int]) -> list[Perceptron]:
    """All of a model in eval mode, in the order in which they are run; none where the model runs no such thing."""
    try:
        with twice_differentiable(), torch.no_grad():
            return _perceptrons(model, image_shape)
    except (RuntimeError, ValueError, LookupError, TypeError):  # the model's own code runs here, on unusual images
        return []


def lowest(found: Sequence[Perceptron]) -> list[Perceptron]:
    """The first perceptron of each stage of a model: of those with as many tokens of as many channels."""
    return list({(each.tokens, each.width): each for each in reversed(found)}.values())[::-1]


def _perceptrons(model: nn.Module, image_shape: Sequence[int]) -> list[Perceptron]:
    names = {module: name for name, module in model.named_modules()}
    layers = [layer for layer in names if isinstance(layer, nn.LayerNorm | nn.Linear)]
    if not any(isinstance(layer, nn.LayerNorm) for layer in layers):
        return []
    images = torch.rand(1, *image_shape, generator=torch.Generator().manual_seed(SEED))
    with watched(layers, lambda _, inputs: inputs) as seen:
        model(images.to(next(model.parameters())))
    order, found = list(seen), []
    for index in range(2, len(order)):
        before, inner, outer = order[: index - 1], order[index - 1], order[index]
        if not (isinstance(inner, nn.Linear) and isinstance(outer, nn.Linear)) or seen[inner].dim() < 3:
            continue
        activation = _between(inner, seen[inner], seen[outer])
        norms = (layer for layer in reversed(before) if isinstance(layer, nn.LayerNorm))
        norm = next((layer for layer in norms if _makes(layer, seen[layer], seen[inner])), None)
        if activation is not None and norm is not None:
            count = seen[inner].shape[:-1].numel()
            known = (names[inner], names[outer], names[norm])
            found.append(Perceptron(*known, inner, outer, norm, activation, count))
    return found


def _between(inner: nn.Linear, inputs: Tensor, outputs: Tensor) -> nn.Module | None:
    """The activation that makes the next layer's inputs of this layer's outputs; None where none does."""
    if outputs.shape != (*inputs.shape[:-1], inner.out_features):
        return None
    values = inner(inputs)
    apart = [float((activation(values) - outputs).norm()) for activation in ACTIVATIONS]
    least = min(apart)
    return ACTIVATIONS[apart.index(least)] if least <= SAME * float(outputs.norm()) else None


def _makes(norm: nn.LayerNorm, inputs: Tensor, outputs: Tensor) -> bool:
    """Whether a LayerNorm over the last dimension makes these outputs of its inputs."""
    if len(norm.normalized_shape) != 1 or inputs.shape != outputs.shape:
        return False
    return bool((norm(inputs) - outputs).norm() <= SAME * outputs.norm())
