"""How a transformer makes tokens of an image: a patch projection, and behind it a learnable position embedding.

The position embedding E is added to the projection's outputs, so the gradient of one row of E is the derivative of the
loss by the output at that position, summed over the batch. Both are found by running the model once: no word of the
model's own code is asked, and a class token, a transposition or a dropout in eval mode between them changes nothing.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from network.kinds.affine import AFFINE, Geometry

SAME = 1e-4  # relative difference up to which two float32 tensors of one run are the same
DIGIT = 1024  # base in which a pixel's number is written into pixels: float32 holds such a digit however it is scaled
SEED = 0  # of the probe, which has nothing to do with any run's seed


@dataclass(frozen=True)
class Pixels:
    """A layer's input (n,) of one image: entry i is scale_i x + shift_i of the pixel x with the index order_i."""

    order: Tensor
    scale: Tensor
    shift: Tensor

    def inputs(self, image: Tensor) -> Tensor:
        """The layer's input (n,) of an image (C, H, W)."""
        return image.flatten()[self.order] * self.scale.to(image) + self.shift.to(image)

    def image(self, inputs: Tensor, image_shape: Sequence[int]) -> Tensor:
        """The image (C, H, W) of such an input; a pixel that is in it several times is their mean."""
        pixels = (inputs.flatten() - self.shift.to(inputs)) / self.scale.to(inputs)
        total, count = (pixels.new_zeros(math.prod(image_shape)) for _ in range(2))
        total.index_add_(0, self.order, pixels)
        count.index_add_(0, self.order, torch.ones_like(pixels))
        return (total / count).view(*image_shape)


@dataclass(frozen=True)
class PatchEmbedding:
    """A layer that looks at an image patch by patch, and the parameter that is added to its outputs.

    Attributes:
        name, layer: of the projection: a convolution, or a linear layer that is applied to patches.
        position: the name of the parameter, the position embedding.
        channels: the dimension of that parameter that has a token's channels.
        rows: (P,) the index of its row that belongs to each of the projection's positions.
        input_shape: of the projection's input of one image.
        pixels: what that input is made of.
    """

    name: str
    layer: nn.Conv2d | nn.Linear
    position: str
    channels: int
    rows: Tensor
    input_shape: tuple[int, ...]
    pixels: Pixels

    @property
    def positions(self) -> int:
        """P."""
        return len(self.rows)

    @property
    def width(self) -> int:
        """D, the channels of a token."""
        return self.layer.weight.shape[0]

    @property
    def patch(self) -> int:
        """n, the entries of a patch."""
        return self.layer.weight[0].numel()

    def why_not(self, batch_size: int) -> str:
        """Why the gradients of both do not tell the patches of such a batch; empty where they do."""
        if batch_size > 1:
            return f"the gradient of {self.position} is a sum over the images of the batch"
        if self.positions >= self.width:
            return f"{self.positions} patches are not told by tokens of {self.width} channels"
        return ""

    def deltas(self, gradient: Tensor) -> Tensor:
        """The derivatives (P, D) by the projection's outputs, from the gradient of the position embedding."""
        return as_rows(gradient, self.channels)[self.rows]

    def patches(self, image: Tensor) -> Tensor:
        """The patches (P, n) of an image (C, H, W)."""
        inputs = self.pixels.inputs(image)
        if isinstance(self.layer, nn.Linear):
            return inputs.view(self.positions, self.patch)
        return Geometry.of(self.layer, self.input_shape).patches(inputs.view(1, *self.input_shape))[0]

    def image(self, patches: Tensor, image_shape: Sequence[int]) -> Tensor:
        """The image (C, H, W) of its patches (P, n)."""
        if isinstance(self.layer, nn.Linear):
            return self.pixels.image(patches, image_shape)
        geometry = Geometry.of(self.layer, self.input_shape)
        inputs = geometry.assemble(patches[None])[0] / geometry.coverage(patches).clamp(min=1)
        return self.pixels.image(inputs, image_shape)


def patch_embedding(model: nn.Module, image_shape: Sequence[int]) -> PatchEmbedding | None:
    """The patch projection and the position embedding of a model in eval mode; None where it has no such things.

    The model is run with its gradient once, and none of its tensors is changed.

    Args:
        model: takes images (B, C, H, W) to logits (B, K).
        image_shape: (C, H, W).
    """
    try:
        return _found(model, image_shape)
    except (RuntimeError, ValueError, LookupError, TypeError):  # the model's own code runs here, on unusual images
        return None


def _found(model: nn.Module, image_shape: Sequence[int]) -> PatchEmbedding | None:
    layers = {layer: name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    like = next(model.parameters()).detach()
    images = torch.rand(1, *image_shape, generator=torch.Generator().manual_seed(SEED)).to(like)
    first = _first_called(model, layers, images)
    if first is None:
        return None
    layer, inputs = first
    pixels = _pixels_below(lambda images: _first_called(model, layers, images)[1], image_shape, like)
    if pixels is None or not _cuts_patches(layer, inputs):
        return None
    others = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(parameter is own for own in layer.parameters())
    }
    deltas, gradients = _gradients(model, layer, list(others.values()), images)
    for name, gradient in zip(others, gradients, strict=True):
        found = None if gradient is None else _rows_of(deltas, gradient)
        if found is not None and len(deltas) > 1:
            return PatchEmbedding(layers[layer], layer, name, *found, tuple(inputs.shape[1:]), pixels)
    return None


def _cuts_patches(layer: nn.Module, inputs: Tensor) -> bool:
    """Whether a layer is applied to the patches of an image, of which its input (1, ...) has all pixels."""
    if isinstance(layer, nn.Linear):
        return inputs.dim() > 2
    if AFFINE.why_not(layer) or layer.groups != 1:
        return False
    return bool(Geometry.of(layer, inputs.shape[1:]).coverage(inputs).all())


class _Seen(Exception):  # noqa: N818 - it ends a forward pass whose rest is not asked for
    """Carries the first layer that was called, and its input."""


@torch.no_grad()
def _first_called(model: nn.Module, layers: Collection[nn.Module], images: Tensor) -> tuple[nn.Module, Tensor] | None:
    """The first of these layers that the model calls, and the layer's input; nothing behind it is run."""

    def end(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _Seen(layer, inputs[0])

    hooks = [layer.register_forward_pre_hook(end) for layer in layers]
    try:
        model(images)
    except _Seen as seen:
        return seen.args
    finally:
        for hook in hooks:
            hook.remove()
    return None


def _pixels_below(see: Callable[[Tensor], Tensor], image_shape: Sequence[int], like: Tensor) -> Pixels | None:
    """Which pixel each entry of a layer's input is, scaled and shifted; None where the input is anything else.

    Args:
        see: takes images (1, C, H, W) to the layer's input (1, ...).
        image_shape: (C, H, W).
        like: a tensor in the model's dtype and place.
    """
    count = math.prod(image_shape)
    numbers = torch.arange(count, device=like.device)

    def seen(values: Tensor) -> Tensor:
        return see(values.to(like).view(1, *image_shape))[0].flatten()

    shift = seen(torch.zeros_like(numbers))
    scale = seen(torch.ones_like(numbers)) - shift
    if not (scale.abs() > SAME).all():
        return None
    digits = [seen(digit / DIGIT) for digit in (numbers // DIGIT, numbers % DIGIT)]  # of the pixel's number
    high, low = (((digit - shift) / scale * DIGIT).round().long() for digit in digits)
    order = (high * DIGIT + low).clamp(0, count - 1)
    values = torch.rand(count, generator=torch.Generator().manual_seed(SEED)).to(like)
    told = values[order] * scale + shift
    if not torch.allclose(seen(values), told, rtol=SAME, atol=SAME) or order.unique().numel() < count:
        return None
    return Pixels(order, scale, shift)


def _gradients(
    model: nn.Module, layer: nn.Module, parameters: Sequence[nn.Parameter], images: Tensor
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """The derivatives (P, D) of a random loss of one image by a layer's outputs, and by parameters."""
    outputs: list[Tensor] = []
    hook = layer.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    try:
        with torch.enable_grad():
            logits = model(images)
    finally:
        hook.remove()
    weights = torch.rand(logits.shape[1], generator=torch.Generator().manual_seed(SEED)).to(logits)
    (output,) = outputs  # a layer that is called twice has no one input
    delta, *gradients = torch.autograd.grad((logits @ weights).sum(), [output, *parameters], allow_unused=True)
    return (delta.flatten(2)[0].T if isinstance(layer, nn.Conv2d) else delta.flatten(0, -2)), gradients


def _rows_of(deltas: Tensor, gradient: Tensor) -> tuple[int, Tensor] | None:
    """The dimension of channels, and the rows of a gradient that are these (P, D); None where it has no such rows."""
    positions, width = deltas.shape
    sizes = deltas.norm(dim=1)
    for channels in (dim for dim, size in enumerate(gradient.shape) if size == width):
        rows = as_rows(gradient, channels)
        if len(rows) < positions:
            continue
        distances = torch.cdist(deltas, rows, compute_mode="donot_use_mm_for_euclid_dist")
        least, index = distances.min(1)
        if (least < SAME * sizes).all() and index.unique().numel() == positions:
            return channels, index
    return None


def as_rows(gradient: Tensor, channels: int) -> Tensor:
    """A parameter's gradient with a row (D,) for each token."""
    return gradient.movedim(channels, -1).flatten(0, -2)
