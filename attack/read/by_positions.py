"""A single image from a transformer's position embedding (APRIL, Lu et al. 2021, arXiv 2112.14087).

A token is a patch, projected, plus its row of the position embedding. So the gradient of the embedding is the
derivative delta of the loss by each token, and the projection's is  G = sum_p delta_p x_p^T  over the patches x_p. Of
one image delta (P, D) is known, and G (D, n) is a linear equation for all its patches (P, n): D rows for P unknowns,
the same for every entry of a patch. Of several images only the sums of their deltas are known.

Several steps of one image add up to the same equation with the sum of the steps' deltas, as long as both gradients are
summed with the same weights.

The image is believed where the D - P rows that are left over agree. Dropout behind the sum, which is in these gradients
as it was drawn, changes nothing, though no gradient further up is then the image's own.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from attack.match.activations import GREY
from attack.read.layer_rows import LayerRows
from attack.read.reading import Reading
from attack.read.signals import Signals
from network.embedding import PatchEmbedding, patch_embedding
from network.head import Head, features_of
from network.known_outputs import FLOOR
from network.parametrised import with_weights
from network.tracing import stages
from update.shared import SharedUpdate

BELIEVED = 1e-2  # expected relative error of the pixels up to which an image is believed
SPREAD = 0.1  # standard deviation of pixels about grey, for an image that is only likely
# Expected error of a likely image's pixels up to which an attack begins there. From an update in float16 or bfloat16 it
# is 0.03 or 0.06 on a small trained network: 29 and 24 dB, where 180 evaluations from grey reach 17.
GUIDING = 0.07


class NoEmbeddingError(ValueError):
    """The model has no position embedding that tells the batch, or the client's steps do not add up."""


class VagueImageError(ValueError):
    """The equations do not tell the image well enough; `image` (1, C, H, W) is the likely one, or None."""

    def __init__(self, message: str, image: Tensor | None = None) -> None:
        super().__init__(message)
        self.image = image


class _Equations:
    """The patches of one image, from the gradients of the projection and of the position embedding.

    Args:
        embedding: both of them.
        gradients: by parameter name.

    Raises:
        NoEmbeddingError: one of the two has no gradient, or is too small to tell anything.
        ValueError: there are more patches than equations.
    """

    def __init__(self, embedding: PatchEmbedding, gradients: Mapping[str, Tensor]) -> None:
        names = (f"{embedding.name}.weight", embedding.position)
        for name in names:
            if name not in gradients:
                raise NoEmbeddingError(f"the update holds no gradient of {name}")
        if reason := embedding.why_not(1):
            raise ValueError(reason)
        weight, position = (gradients[name].double() for name in names)
        goal, deltas = weight.flatten(1), embedding.deltas(position)
        rows = goal.norm(dim=1) > 0  # rows of different sizes are rounded alike, relative to their sizes
        scale = goal[rows].norm(dim=1, keepdim=True)
        left, values, right = torch.linalg.svd(deltas.T[rows] / scale, full_matrices=False)
        self.spare = int(rows.sum()) - len(deltas)
        if self.spare < 1 or not values[-1] > FLOOR * values[0]:
            raise ValueError(f"the gradient of {embedding.position} does not tell its {len(deltas)} tokens apart")
        goal = goal[rows] / scale
        inner = left.T @ goal
        rest = (goal - left @ inner).norm()
        self.patches = right.T @ (inner / values[:, None])  # (P, n)
        self._inner, self._values, self._right = inner, values, right
        self.residual = float(rest / goal.norm())
        least = FLOOR * float(goal.norm()) / goal.numel() ** 0.5
        self.noise = noise = max(float(rest) / (self.spare * goal.shape[1]) ** 0.5, least)
        variances = (noise / values).square()  # of the errors of one entry over the patches, by principal axis
        self.variance = float(variances.mean())
        self.freedom = goal.shape[1] * float(variances.sum().square() / variances.square().sum())

    def likely(self, centre: Tensor, spread: float) -> tuple[Tensor, float]:
        """The likeliest patches (P, n) about some others, in their standard deviation, and the error to be expected."""
        own = self._values.square() + (self.noise / spread) ** 2
        step = self._inner - self._values[:, None] * (self._right @ centre)
        error = self.noise * float((1 / own).mean()) ** 0.5
        return centre + self._right.T @ ((self._values / own)[:, None] * step), error


def read_by_positions(update: SharedUpdate, model: nn.Module) -> Reading:
    """The image of a batch of one, in float64, from the update and the model alone.

    Raises:
        NoEmbeddingError: the model, the batch or the client's training is of another kind.
        VagueImageError: the image is not told well enough to be believed.
        ValueError: the equations do not tell the image at all; the message says why.
    """
    began = time.perf_counter()
    is_summed = update.training.is_gradient or update.training.optimiser.is_linear
    if update.batch_size > 1 or not is_summed:
        raise NoEmbeddingError("the gradient of a position embedding is a sum over images")
    embedding = patch_embedding(model, update.image_shape)
    if embedding is None:
        raise NoEmbeddingError("the model adds no learnable position embedding to projected patches")
    update = replace(update, gradients=with_weights(update.gradients, model))
    equations = _Equations(embedding, update.gradients)
    image = embedding.image(equations.patches, update.image_shape)
    error = (equations.variance * float(embedding.pixels.scale.double().pow(-2).mean())) ** 0.5
    uncertainty = error / float(image.square().mean()) ** 0.5
    if not uncertainty <= BELIEVED:
        said = f"the position embedding tells the pixels within {uncertainty:.1e} of their size only"
        raise VagueImageError(said, _likely_image(equations, embedding, update.image_shape))
    told = _signals(update, copy.deepcopy(model).double().requires_grad_(False), image[None])
    names = ("residuals", "uncertainty", "freedom")
    facts = (equations.residual, uncertainty, equations.freedom)
    signals = replace(told, **{n: image.new_tensor([fact]) for n, fact in zip(names, facts, strict=True)})
    rows = LayerRows(stages(model), update.image_shape, 1, embedding)
    facts = {"determined": True, "residual": equations.residual, "uncertainty": uncertainty}
    seconds = time.perf_counter() - began
    rows.note(embedding.name, f"the image is told by {embedding.position}", **facts, seconds=seconds)
    is_explained = not update.training.is_gradient
    return Reading(signals, 0, image[None], list(rows), {}, seconds, is_explained=is_explained)


def _likely_image(equations: _Equations, embedding: PatchEmbedding, image_shape: Sequence[int]) -> Tensor | None:
    """The likeliest image (1, C, H, W) about grey; None where it is hardly likelier than grey."""
    scale = float(embedding.pixels.scale.double().abs().mean())
    grey = embedding.patches(torch.full(tuple(image_shape), GREY).to(equations.patches))
    patches, error = equations.likely(grey, SPREAD * scale)
    return embedding.image(patches, image_shape)[None].clamp(0, 1) if error <= GUIDING * scale else None


def _signals(update: SharedUpdate, model: nn.Module, image: Tensor) -> Signals:
    """The image's features, and the label whose errors the head's gradient has; how far off they may be is left open.

    Args:
        update: the client's.
        model: in float64.
        image: (1, C, H, W).

    Raises:
        ValueError: the head's gradient is missing.
    """
    gradient, _ = Head.of(model).among(update.gradients)
    if gradient is None:
        raise ValueError("the update holds no gradient of the model's last layer")
    gradient = gradient.to(image)
    with torch.no_grad():
        features = features_of(model, image)
        logits = Head.of(model).layer(features)
    every = torch.arange(logits.shape[1], device=image.device)
    loss, seen = update.training.loss, gradient @ features[0]
    fits = nn.functional.cosine_similarity(loss.errors(logits.expand(len(every), -1), every), seen[None])
    label = fits.argmax()[None]
    delta = loss.of_batch(label).errors(logits, label)
    product = delta.T @ features
    certificate = (gradient * product).sum() / product.square().sum()
    ones = image.new_ones(1)
    return Signals(features, label, delta, ones, certificate * ones, ones, ones, 1)
