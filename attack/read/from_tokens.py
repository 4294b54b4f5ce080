"""Two likely images of a transformer from the single tokens that were told apart in its first block.

A token is of no position or image at first. Random images say how tokens vary at each position: about a mean of their
own, and alike at all. So each token has a likeliest position, two tokens each (Hungarian assignment of Mahalanobis
distances). Attention adds the same to all tokens of an image, nearly, and what a token foretells of the mean over its
image's tokens, by regression over random images, divides those of a position between both images.

Patches by regression begin a Gauss-Newton search for the pixels of both images, first by the tokens that were found,
with the image's smoothness for the others, then by the spaces that the tokens of all positions lie in: those of the
gradients of the block's linear layers, in units of noise. A position that does not fit is exchanged between the images
or drawn anew from its neighbours. The best images of several rounds are likely, and never certain: an attack begins
there.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from attack.match.activations import GREY
from attack.read.random_images import random_images
from attack.read.token_span import TokenSpan
from attack.solve.budget import WorkBudget
from attack.solve.gauss_newton import NonlinearEquations, gauss_newton
from network.embedding import PatchEmbedding
from network.perceptrons import Perceptron

IMAGES = 2  # of a batch whose tokens are divided
SAMPLE = 200  # random images that say how tokens vary
RIDGE = 1e-3, 1e-4  # of the covariance of tokens, and of regressions on them, relative to the mean variance
SMOOTH = 0.02  # weight of the differences of neighbouring pixels beside tokens
ENOUGH = 0.5  # share of all tokens, fewer of which begin no images
ROUNDS = 10  # of exchanges and new patches
UNFIT = 3.0  # root mean square of a position's equations, in units of noise, beyond which it does not fit
OUTLYING = 3, 5  # times the median of its image, in turn, up to which a position is left alone anyway
LIKELY = 1.5  # mean logarithm of all positions' fits up to which images are likely: 1.0 at 30 dB, 2 and more below 15


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


Function = Callable[[nn.Module, Tensor], tuple[Tensor, ...]]


class _Search:
    """The pixels of both images from the tokens of one perceptron.

    Args:
        model: in float64, in eval mode.
        place, spans: the perceptron, and the spans of its two layers' gradients.
        embedding: of the model's patches.
        image_shape: (C, H, W).
        tokens, errors: (n, D) and (n,), those that were told apart, and their expected relative errors.
    """

    def __init__(
        self,
        model: nn.Module,
        place: Perceptron,
        spans: Sequence[TokenSpan],
        embedding: PatchEmbedding,
        image_shape: Sequence[int],
        tokens: Tensor,
        errors: Tensor,
        budget: WorkBudget,
    ) -> None:
        self.model, self.rough = model, copy.deepcopy(model).float()
        self.place, self.spans, self.embedding, self.shape = place, spans, embedding, tuple(image_shape)
        self.tokens, self.errors, self.budget = tokens, errors, budget
        self.spare = sum(len(span.columns) - len(span.values) for span in spans)

    # ------------------------------------------------------------------------------------------------
    # Positions and images of tokens

    @torch.no_grad()
    def begun(self, generator: torch.Generator) -> Tensor:
        """The first images (2, C, H, W), and `self.slots`, the image and patch of each token and its index.

        Raises:
            ValueError: the tokens of patches are not told apart.
        """
        random = random_images(self.shape, SAMPLE, generator).to(self.tokens)
        seen = self.place.inputs(self.model, random)  # (S, N, D)
        self.rows = self._rows(random)
        mean = seen.mean(0)
        off = (seen - mean)[:, self.rows]
        flat = off.flatten(0, 1)
        covariance = flat.T @ flat / len(flat)
        like = torch.eye(len(covariance)).to(covariance) * covariance.diagonal().mean()
        factor = torch.linalg.cholesky(covariance + RIDGE[0] * like)
        whitened = [torch.linalg.solve_triangular(factor, each.T, upper=False).T for each in (self.tokens, mean)]
        distances = torch.cdist(*whitened).square().repeat(1, IMAGES)
        _, column = linear_sum_assignment(distances.cpu().numpy())
        position = torch.from_numpy(column).to(self.rows.device) % len(mean)
        patches = torch.stack([self.embedding.patches(image) for image in random])
        goals = torch.cat([patches - patches.mean(0), off.mean(1, keepdim=True).expand_as(off)], 2).flatten(0, 1)
        rule = torch.linalg.solve(covariance + RIDGE[1] * like, flat.T @ goals / len(flat))
        told = (self.tokens - mean[position]) @ rule
        own, common = told.split([patches.shape[2], mean.shape[1]], 1)
        image = self._divided(position, common)
        found = patches.mean(0).expand(IMAGES, *patches.shape[1:]).clone()
        known = torch.zeros(found.shape[:2], dtype=torch.bool, device=found.device)
        self.slots = []
        for patch, row in enumerate(self.rows.tolist()):
            for token in (position == row).nonzero()[:, 0].tolist():
                found[image[token], patch] += own[token]
                known[image[token], patch] = True
                self.slots.append((int(image[token]), patch, token))
        return self._filled(self._images(found).clamp(0, 1), ~known)

    def _rows(self, random: Tensor) -> Tensor:
        """The token (P,) that each patch changes most.

        Raises:
            ValueError: two patches change the same one most.
        """
        patches, others = (self.embedding.patches(image) for image in random[:2])
        changed = patches.repeat(len(patches), 1, 1)
        index = torch.arange(len(patches), device=patches.device)
        changed[index, index] = others
        moved = self.place.inputs(self.model, self._images(changed)) - self.place.inputs(self.model, random[:1])
        rows = moved.norm(dim=2).argmax(1)
        if rows.unique().numel() < len(rows):
            raise ValueError("tokens belong to no single patch")
        return rows

    @staticmethod
    def _divided(position: Tensor, common: Tensor) -> Tensor:
        """The image (n,) of each token: by the leading axis of what tokens foretell of their image's mean."""
        centred = common - common.mean(0)
        along = centred @ torch.linalg.svd(centred, full_matrices=False)[2][0]
        image = (along > along.median()).long()
        for each in position.unique():
            both = (position == each).nonzero()[:, 0]
            if len(both) == IMAGES:
                image[both[along[both].argsort()]] = torch.arange(IMAGES, device=image.device)
        return image

    def _images(self, patches: Tensor) -> Tensor:
        """Images (..., C, H, W) of patches (..., P, n)."""
        flat = [self.embedding.image(each, self.shape) for each in patches.flatten(0, -3)]
        return torch.stack(flat).unflatten(0, patches.shape[:-2])

    def _patches(self, images: Tensor) -> Tensor:
        """Patches (B, P, n) of images (B, C, H, W)."""
        return torch.stack([self.embedding.patches(image) for image in images])

    # ------------------------------------------------------------------------------------------------
    # Pixels

    def by_tokens(self, images: Tensor) -> Tensor:
        """Pixels that make the tokens found, at their slots, and are smooth elsewhere."""
        image, patch, token = (torch.tensor(each, device=images.device) for each in zip(*self.slots, strict=True))
        goal = self.tokens[token]
        weight = (1 / self.errors[token].clamp(min=RIDGE[0]) / goal.norm(dim=1)).sqrt()[:, None]
        weight = weight / weight.mean()
        stiff = SMOOTH * float((weight * goal).norm()) / len(goal) ** 0.5

        def function(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
            found = self.place.inputs(model, x)[image, self.rows[patch]]
            rough = torch.cat([x.diff(dim=-1).flatten(), x.diff(dim=-2).flatten()])
            return weight.to(x) * (found - goal.to(x)), stiff * rough

        return self._solved(function, images, inner=100, steps=8)

    def by_spaces(self, images: Tensor) -> Tensor:
        """Pixels whose tokens lie in the spaces of both gradients, to within their noise."""
        weights = self._weights(images)
        return self._solved(lambda model, x: self._outside(model, x, weights), images, inner=80, steps=12)

    def _solved(self, function: Function, images: Tensor, *, inner: int, steps: int) -> Tensor:
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
        how = {"budget": self.budget, "enough": 0.0, "inner": inner, "last": 2 * inner, "steps": steps}
        return gauss_newton(equations, images, **how).x.detach().clamp(0, 1)

    def _tokens(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        inputs = self.place.inputs(model, images)
        return inputs, self.place.activation(model.get_submodule(self.place.first)(inputs))

    @torch.no_grad()
    def _weights(self, images: Tensor) -> list[Tensor]:
        tokens = self._tokens(self.model, images)
        return [1 / span.error(each)[..., None] for span, each in zip(self.spans, tokens, strict=True)]

    def _outside(self, model: nn.Module, images: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        parts = zip(self.spans, self._tokens(model, images.flatten(0, -4)), weights, strict=True)
        return tuple(w.to(x) * span.outside(x).unflatten(0, images.shape[:-3]) for span, x, w in parts)

    # ------------------------------------------------------------------------------------------------
    # Positions that do not fit

    @torch.no_grad()
    def fits(self, images: Tensor) -> Tensor:
        """The root mean square (2, P) of each patch's token's equations, in units of noise."""
        parts = self._outside(self.model, images, self._weights(images))
        return (sum(part.square().sum(-1) for part in parts) / self.spare).sqrt()[:, self.rows]

    @torch.no_grad()
    def exchanged(self, images: Tensor) -> tuple[Tensor, int]:
        """With the patches of positions exchanged that fit better so, one after the other, and how many those are."""
        weights, patches, count = self._weights(images), self._patches(images), 0

        def costs(images: Tensor) -> Tensor:
            return sum(part.square().flatten(-3).sum(-1) for part in self._outside(self.model, images, weights))

        index = torch.arange(patches.shape[1], device=patches.device)
        each = patches.repeat(len(index), 1, 1, 1)
        each[index, :, index] = patches.flip(0).transpose(0, 1)
        least, trials = float(costs(images)), costs(self._images(each))
        for p in trials.argsort().tolist():
            if not trials[p] < least:
                break
            other = patches.clone()
            other[:, p] = patches[:, p].flip(0)
            cost = float(costs(self._images(other)))
            if cost < least:
                least, patches, count = cost, other, count + 1
        return self._images(patches), count

    def _filled(self, images: Tensor, unfit: Tensor) -> Tensor:
        """With the pixels of some patches (2, P) drawn anew from their neighbours."""
        marks = unfit[..., None].to(images).expand(*unfit.shape, self.embedding.patch)
        scale = self.embedding.pixels.scale.to(images).mean()
        shift = self.embedding.pixels.shift.to(images).mean()
        inside = self._images(marks * scale + shift) < GREY  # (2, C, H, W) of pixels that stay
        filled = torch.where(inside, images, images.mean((2, 3), keepdim=True))
        kernel = images.new_tensor([[1.0, 4, 1], [4, 0, 4], [1, 4, 1]]) / 20
        kernel = kernel.expand(images.shape[1], 1, 3, 3)
        for _ in range(2 * max(self.shape[1:])):
            padded = nn.functional.pad(filled, (1, 1, 1, 1), mode="replicate")
            filled = torch.where(inside, images, nn.functional.conv2d(padded, kernel, groups=images.shape[1]))
        return filled


def images_of_tokens(
    model: nn.Module,
    place: Perceptron,
    spans: Sequence[TokenSpan],
    embedding: PatchEmbedding,
    image_shape: Sequence[int],
    tokens: Tensor,
    errors: Tensor,
    budget: WorkBudget,
    generator: torch.Generator,
) -> Tensor:
    """Likely images (2, C, H, W) in float64, in no order. See `_Search` for the arguments.

    Raises:
        ValueError: too few tokens were told apart, or no images make them.
    """
    if len(tokens) < ENOUGH * IMAGES * place.tokens:
        raise ValueError(f"{len(tokens)} of {IMAGES * place.tokens} tokens are too few to begin images with")
    search = _Search(model, place, spans, embedding, image_shape, tokens, errors, budget)
    images, _ = search.exchanged(search.by_tokens(search.begun(generator)))
    best, least = images, float("inf")
    for turn in range(ROUNDS):
        images = search.by_spaces(images)
        fits = search.fits(images)
        cost = float(fits.clamp(min=1).log().mean())
        best, least = (images, cost) if cost < least else (best, least)
        outlying = OUTLYING[turn % len(OUTLYING)] * fits.median(1, keepdim=True).values
        unfit = fits > outlying.clamp(min=UNFIT)
        images, count = search.exchanged(images)
        if not (count or unfit.any()):
            break
        images = images if count else search._filled(images, unfit)
    if not least <= LIKELY:
        raise ValueError("no two images make the tokens")
    return best
