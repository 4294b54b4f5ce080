"""Pixels of images whose tokens are known: Gauss-Newton through the network's first block.

Each equation of a token says what of it, or of its activation, lies outside a gradient's row space, in units of noise;
or how far it is from a token that was found. Pixels are smooth where no equation holds them.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attack.match.activations import GREY
from attack.read.token_span import TokenSpan
from attack.solve.budget import WorkBudget
from attack.solve.gauss_newton import NonlinearEquations, gauss_newton
from network.embedding import PatchEmbedding
from network.perceptrons import Perceptron

Function = Callable[[nn.Module, Tensor], tuple[Tensor, ...]]

WITHIN = 0.02  # standard deviation of a found token's entry
SMOOTH = 2.0, 1.0  # weight of the differences of neighbouring pixels beside found tokens, and beside spaces
INNER, LAST = 30, 60  # iterations of a Gauss-Newton step, at first and in the end
STEPS = 4
TOGETHER = 64  # images in a forward pass
PAINTED = 80  # rounds in which unknown patches take their neighbours' colours


@dataclass(frozen=True)
class _Flat:
    """The operator that flattens tensors of a shape."""

    shape: torch.Size

    def forward(self, x: Tensor) -> Tensor:
        """In a row."""
        return x.flatten()

    def adjoint(self, y: Tensor) -> Tensor:
        """In its shape."""
        return y.view(self.shape)


class TokenImages:
    """A network's first block, from pixels to tokens and back.

    Args:
        model: in float64, in eval mode.
        place, spans: the perceptron, and the spans of its two layers' gradients.
        embedding: of the model's patches.
        image_shape: (C, H, W).
    """

    def __init__(
        self,
        model: nn.Module,
        place: Perceptron,
        spans: Sequence[TokenSpan],
        embedding: PatchEmbedding,
        image_shape: Sequence[int],
        budget: WorkBudget,
    ) -> None:
        self.model, self.rough = model, copy.deepcopy(model).float()
        self.place, self.spans, self.embedding, self.shape = place, spans, embedding, tuple(image_shape)
        self.budget = budget

    # ------------------------------------------------------------------------------------------------
    # Patches and tokens

    def patches(self, images: Tensor) -> Tensor:
        """Patches (..., P, n) of images (..., C, H, W)."""
        flat = torch.stack([self.embedding.patches(image) for image in images.flatten(0, -4)])
        return flat.unflatten(0, images.shape[:-3])

    def images(self, patches: Tensor) -> Tensor:
        """Images (..., C, H, W) of patches (..., P, n)."""
        flat = torch.stack([self.embedding.image(each, self.shape) for each in patches.flatten(0, -3)])
        return flat.unflatten(0, patches.shape[:-2])

    @torch.no_grad()
    def seen(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The LayerNorm's centred inputs and the tokens, both (N, T, D) float64, of images (N, C, H, W), in float32."""
        parts = [self.place.around_norm(self.rough, each) for each in images.float().split(TOGETHER)]
        before, tokens = (torch.cat(each).double() for each in zip(*parts, strict=True))
        return before - before.mean(2, keepdim=True), tokens

    def painted(self, images: Tensor, known: Tensor) -> Tensor:
        """With the patches that are not known (B, P) made of their neighbours."""
        scale, shift = (each.to(images).mean() for each in (self.embedding.pixels.scale, self.embedding.pixels.shift))
        marks = known[..., None].to(images).expand(*known.shape, self.embedding.patch)
        inside = self.images(marks * scale + shift) > GREY  # (B, C, H, W) of pixels that stay
        mean = (images * inside).sum((2, 3), keepdim=True) / inside.sum((2, 3), keepdim=True).clamp(min=1)
        filled = torch.where(inside, images, mean)
        kernel = images.new_tensor([[1.0, 4, 1], [4, 0, 4], [1, 4, 1]]) / 20
        kernel = kernel.expand(images.shape[1], 1, 3, 3)
        for _ in range(PAINTED):
            padded = nn.functional.pad(filled, (1, 1, 1, 1), mode="replicate")
            filled = torch.where(inside, images, nn.functional.conv2d(padded, kernel, groups=images.shape[1]))
        return filled

    # ------------------------------------------------------------------------------------------------
    # Pixels

    def by_tokens(self, images: Tensor, tokens: Tensor, known: Tensor) -> Tensor:
        """Pixels that make the tokens (B, T, D) that are known (B, T)."""
        weight = known[..., None].to(images) / WITHIN

        def function(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
            return (weight.to(x) * (self.place.inputs(model, x) - tokens.to(x)), *_rough(x, SMOOTH[0]))

        return self._solved(function, images)

    def by_spaces(self, images: Tensor, known: Tensor, bluntness: float) -> Tensor:
        """Pixels whose known tokens (B, T) lie in both spaces, to within noise and a share of their size."""
        weights = [known[..., None] / unit for unit in self._units(images, bluntness)]

        def function(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
            parts = zip(weights, self.spans, self._both(model, x), strict=True)
            return (*(w.to(x) * span.outside(each) for w, span, each in parts), *_rough(x, SMOOTH[1]))

        return self._solved(function, images)

    @torch.no_grad()
    def fits(self, images: Tensor) -> Tensor:
        """Root mean squares (B, T) of the tokens' equations in the second space, in units of noise."""
        span, values = self.spans[1], self._both(self.model, images)[1]
        return span.outside(values).norm(dim=-1) / span.error(values) / (len(span.columns) - len(span.values)) ** 0.5

    def _both(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        inputs = self.place.inputs(model, images)
        return inputs, self.place.activation(model.get_submodule(self.place.first)(inputs))

    @torch.no_grad()
    def _units(self, images: Tensor, bluntness: float) -> list[Tensor]:
        units = []
        for span, each in zip(self.spans, self._both(self.model, images), strict=True):
            size = (each / span.columns).norm(dim=-1) / len(span.columns) ** 0.5
            units.append(torch.maximum(span.error(each), bluntness * size)[..., None])
        return units

    def _solved(self, function: Function, images: Tensor) -> Tensor:
        grey = tuple(each.detach() for each in function(self.model, torch.full_like(images, GREY)))
        rows = [_Flat(each.shape) for each in grey]

        def moved(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(value - start.to(x) for value, start in zip(function(model, x), grey, strict=True))

        equations = NonlinearEquations(
            lambda x: moved(self.model, x),
            lambda x: moved(self.rough, x),
            rows,
            rows,
            [-each.flatten() for each in grey],
            torch.ones((), dtype=images.dtype, device=images.device),
            is_positive=False,
        )
        how = {"budget": self.budget, "inner": INNER, "last": LAST, "steps": STEPS}
        return gauss_newton(equations, images, **how).x.detach().clamp(0, 1)


def _rough(images: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    return weight * images.diff(dim=-1), weight * images.diff(dim=-2)
