"""Pixels of images whose tokens are known: Gauss-Newton through the network's first block.

Each equation of a token says what of it, or of its activation, lies outside a gradient's row space, in units of noise;
or how far it is from a token that was found. Pixels are smooth where no equation holds them.

In the end no token need have been found: every token of an image lies in both spaces, and with nearly all of the image
right that decides the rest. A token that is far outside has little weight until the others have moved it, and patches
are the unknowns, each scaled by what its own token tells of it: conjugate gradients then have only attention to solve.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attack.match.activations import GREY
from attack.read.token_span import TokenSpan
from attack.solve.budget import WorkBudget
from attack.solve.gauss_newton import Flat, NonlinearEquations, gauss_newton
from network.embedding import PatchEmbedding
from network.perceptrons import Perceptron, slope

Function = Callable[[nn.Module, Tensor], tuple[Tensor, ...]]

WITHIN = 0.02  # standard deviation of a found token's entry
SMOOTH = 2.0, 1.0  # weight of the differences of neighbouring pixels beside found tokens, and beside spaces
INNER, LAST = 30, 60  # iterations of a Gauss-Newton step, at first and in the end
STEPS = 4
BESIDE = 60  # iterations of a Gauss-Newton step on scaled patches
STAY = 1.0  # weight of a pixel's distance from where it began, beside both spaces
TOGETHER = 64  # images in a forward pass
PAINTED = 80  # rounds in which unknown patches take their neighbours' colours


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

        return self._solved(function, images, torch.full_like(images, GREY), INNER, LAST).clamp(0, 1)

    def by_spaces(self, images: Tensor, known: Tensor, bluntness: float) -> Tensor:
        """Pixels whose known tokens (B, T) lie in both spaces, to within noise and a share of their size."""
        weights = [known[..., None] / unit for unit in self._units(images, bluntness)]

        def function(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
            parts = zip(weights, self.spans, self._both(model, x), strict=True)
            return (*(w.to(x) * span.outside(each) for w, span, each in parts), *_rough(x, SMOOTH[1]))

        return self._solved(function, images, torch.full_like(images, GREY), INNER, LAST).clamp(0, 1)

    def by_all(self, images: Tensor, bluntness: float) -> Tensor:
        """Pixels whose tokens lie in both spaces, each image by itself; a token far outside both has little weight."""
        return torch.cat([self._by_all(image, bluntness) for image in images.split(1)])

    @torch.no_grad()
    def fits(self, images: Tensor, bluntness: float = 0.0) -> Tensor:
        """The larger mean square (B, T) of a token's equations in either space, in units of noise and bluntness."""
        return torch.maximum(*self._fits(self._both(self.model, images), self._units(images, bluntness)))

    def _fits(self, both: Sequence[Tensor], units: Sequence[Tensor]) -> list[Tensor]:
        parts = zip(self.spans, both, units, strict=True)
        return [(span.outside(x) / unit).square().sum(-1) / span.spare for span, x, unit in parts]

    def _by_all(self, image: Tensor, bluntness: float) -> Tensor:
        units = self._units(image, bluntness)
        with torch.no_grad():
            fits = self._fits(self._both(self.model, image), units)
        parts = zip(fits, units, strict=True)
        weights = [(1 / (1 + fit))[..., None] / unit for fit, unit in parts]
        patches, scale = self.embedding.patches(image[0]), self._scale(image, weights)

        def pixels(u: Tensor) -> Tensor:
            return self.images((patches.to(u) + torch.einsum("pij,pj->pi", scale.to(u), u))[None])

        def function(model: nn.Module, u: Tensor) -> tuple[Tensor, ...]:
            x = pixels(u)
            parts = zip(weights, self.spans, self._both(model, x), strict=True)
            rest = (w.to(x) * span.outside(each) for w, span, each in parts)
            return (*rest, *_rough(x, SMOOTH[1]), STAY * (x - image.to(x)))

        zero = torch.zeros_like(patches)
        return pixels(self._solved(function, zero, zero, BESIDE)).clamp(0, 1)

    @torch.no_grad()
    def _scale(self, image: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """By which (P, n, n) the unknowns of each patch are multiplied: what its own token tells has variance 1."""
        rows = self.embedding.rows.to(image.device)
        before, tokens = (each[0, rows] for each in self.place.around_norm(self.model, image))
        norm = self.place.norm
        size = (before.var(1, unbiased=False) + norm.eps).sqrt()[:, None, None]
        bare = (before - before.mean(1, keepdim=True)) / size[:, 0]
        projected = self.embedding.layer.weight.to(before).flatten(1)  # (D, n)
        moved = (projected - projected.mean(0)).T.expand(len(rows), -1, -1)  # (P, n, D)
        moved = (moved - (moved @ bare[:, :, None]) * bare[:, None] / bare.shape[1]) / size
        moved = moved if norm.weight is None else moved * norm.weight
        inner = self.place.within(self.model).inner
        slopes = slope(self.place.activation, inner(tokens))[:, None]
        both = (moved, slopes * (moved @ inner.weight.T))
        parts = zip(self.spans, both, weights, strict=True)
        seen = torch.cat([span.outside(each) * w[0, rows, None] for span, each, w in parts], 2)  # (P, n, D + H)
        pixel = self.embedding.pixels.scale.to(image).square().mean()
        prior = torch.eye(projected.shape[1]).to(image) * (4 * SMOOTH[1] ** 2 + STAY**2) / pixel
        return torch.linalg.inv(torch.linalg.cholesky(seen @ seen.mT + prior)).mT

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

    def _solved(self, function: Function, start: Tensor, origin: Tensor, inner: int, last: int | None = None) -> Tensor:
        """Where Gauss-Newton ends; a residual is relative to that at the origin."""
        first = tuple(each.detach() for each in function(self.model, origin))
        rows = [Flat(each.shape) for each in first]

        def moved(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(value - begin.to(x) for value, begin in zip(function(model, x), first, strict=True))

        equations = NonlinearEquations(
            lambda x: moved(self.model, x),
            lambda x: moved(self.rough, x),
            rows,
            rows,
            [-each.flatten() for each in first],
            torch.ones((), dtype=start.dtype, device=start.device),
            is_positive=False,
        )
        how = {"budget": self.budget, "inner": inner, "last": last or inner, "steps": STEPS}
        return gauss_newton(equations, start, **how).x.detach()


def _rough(images: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    return weight * images.diff(dim=-1), weight * images.diff(dim=-2)
