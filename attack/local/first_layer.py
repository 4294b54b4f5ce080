"""All images of a client that trained for any number of steps, from a fully connected first layer with a ReLU.

Its columns give the images (`columns`). Each column d_i points roughly like the delta of its image under the mean of
the weights before and after training, which only the right label gives. Which image was in which step is then sought in
the rest of the update (`order`).
"""

import copy
import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from attack.local.columns import ColumnSearch, Images, off_levels
from attack.local.order import Training, found_order
from attack.read.layer_choice import CandidateLayer, candidate_layers
from attack.read.reader import COLUMNS, Reading
from attack.read.signals import Signals
from attack.solve.budget import WorkBudget
from network.chain import input_shapes
from network.kinds import kind_of
from network.kinds.affine import Affine
from network.stage import Chain, Stage, run
from network.tracing import stages
from update.shared import SharedUpdate

ROUNDED = 0.08  # steps of 1/255, rms, from whole ones within which every pixel is rounded to the right one
ENOUGH = 1e-6  # share of the update that an order may leave; float32 weights leave 4e-6 at a rate of 0.01
REPLAYED = 1e-3  # and beyond which no order is believed: a wrong one leaves 1e-2 and more
TOLD = 1e-7  # relative error of images whose pixels are whole steps: that of float32 numbers
OPEN = 1.0  # relative error of an image that may hold a share of another


class NoSuchLayerError(ValueError):
    """The model does not begin with a fully connected layer and a ReLU, or its movement is no sum over images."""


def read_first_layer(
    update: SharedUpdate, model: nn.Module, *, generator: torch.Generator, budget: WorkBudget
) -> Reading:
    """Tell all images of the batch apart at the first layer, in float64, from the update and the model alone.

    Raises:
        NoSuchLayerError: the model or the client's training is of another kind.
        ValueError: not all images were found; the message says how many.
        OutOfTimeError: the budget's clock has run out.
    """
    began = time.perf_counter()
    chain = stages(copy.deepcopy(model).double().requires_grad_(False))
    layer = _first_layer(chain, update)
    below, shapes = chain[: layer.index], input_shapes(chain, update.image_shape)

    def pixels(inputs: Tensor) -> Tensor:
        for stage, shape in zip(reversed(below), reversed(shapes[: layer.index]), strict=True):
            inputs = kind_of(stage.module).inverted(stage.module, inputs, shape)
        return inputs.view(-1, *update.image_shape)

    span = layer.span(update.gradients, update.batch_size, layer.layer.weight)
    if span.rank < update.batch_size:
        raise ValueError(f"{layer.name} has moved in {span.rank} directions for {update.batch_size} images")
    search = ColumnSearch(span, layer.bias_gradient, _before_and_after(layer, update), pixels)
    found = search.found(generator, budget)
    if len(found) < update.batch_size:
        raise ValueError(f"{len(found)} of {update.batch_size} images have enough zeros at {layer.name} to be found")
    images = search.told_by_levels(search.images(found))
    uncertainty = search.errors(images, generator)
    uncertainty = torch.where(images.is_open, OPEN, uncertainty)
    shown = pixels(images.inputs)
    if bool((off_levels(shown) < ROUNDED).all()):
        shown = (shown * 255).round() / 255
        images = replace(images, inputs=run(below, shown).flatten(1))
        uncertainty = torch.full_like(uncertainty, TOLD)
    labels = _labels(layer, images, update)
    order = _order(chain[layer.index :], layer, images.inputs, labels, update, budget)
    if order is not None and not update.training.shuffle:  # in the order of their steps, as minibatches in turn
        first = torch.tensor([image for part in order[: update.training.batches] for image in part]).to(labels)
        images, labels, uncertainty, order = images.pick(first), labels[first], uncertainty[first], None
        shown = shown[first]
    signals = _signals(chain, layer, images, labels, uncertainty, update)
    seconds = time.perf_counter() - began
    facts = {"rank": span.rank, "dimension": span.dimension, "gap": span.gap, "spanned": True, "determined": True}
    row = dict.fromkeys(COLUMNS) | facts | {
        "layer": layer.name, "positions": 1, "rank_bound": update.batch_size, "residual": images.residual,
        "uncertainty": float(uncertainty.max()), "seconds": seconds,
        "note": f"{update.batch_size} of {update.batch_size} images told apart by their zeros",
    }  # fmt: skip
    return Reading(signals, 0, shown, [row], {layer.name: images.inputs}, seconds, order=order)


def _first_layer(chain: Chain, update: SharedUpdate) -> CandidateLayer:
    """The fully connected layer that a chain begins with, if a ReLU follows and its inputs give the images.

    Raises:
        NoSuchLayerError: there is none.
    """
    optimiser = update.training.optimiser
    if not optimiser.is_linear or optimiser.clip is not None or update.defence != "none":
        raise NoSuchLayerError("the first layer's movement is no sum over images")
    for layer in candidate_layers(chain, update.image_shape, update.gradients)[:1]:
        is_first = not any(isinstance(kind_of(stage.module), Affine) for stage in chain[: layer.index])
        is_plain = is_first and all(kind_of(stage.module).is_reshape for stage in chain[: layer.index])
        if isinstance(layer.layer, nn.Linear) and is_plain and layer.behind.is_gate and layer.bias_gradient is not None:
            return layer
    raise NoSuchLayerError("the model does not begin with a fully connected layer with bias and a ReLU")


def _before_and_after(layer: CandidateLayer, update: SharedUpdate) -> list[tuple[Tensor, Tensor]]:
    """The layer's weight and bias before and after the training."""
    module, combination = layer.layer, update.training.combination()
    moved = [update.gradients[f"{layer.name}.{name}"].to(module.weight) for name in ("weight", "bias")]
    before = module.weight, module.bias
    total = 0.0 if update.training.is_gradient else combination.total
    return [before, tuple(combination.alpha * w - total * g for w, g in zip(before, moved, strict=True))]


def _labels(layer: CandidateLayer, images: Images, update: SharedUpdate) -> Tensor:
    """The label (B,) of each image whose delta points most nearly along its column, at the mean weights of the layer.

    What lies above the layer is taken at the server's weights.
    """
    (weight, bias), (last, last_bias) = _before_and_after(layer, update)
    outputs = images.inputs @ ((weight + last) / 2).T + (bias + last_bias) / 2
    outputs.requires_grad_()
    with torch.enable_grad():
        logits, fits = layer.tail(images.inputs, outputs), []
        for label in range(logits.shape[1]):
            labels = torch.full((len(outputs),), label, device=outputs.device)
            (delta,) = torch.autograd.grad(update.training.loss.each(logits, labels).sum(), outputs, retain_graph=True)
            fits.append(nn.functional.cosine_similarity(delta, images.columns.T))
    return torch.stack(fits, 1).argmax(1)


def _order(
    chain: Chain, layer: CandidateLayer, inputs: Tensor, labels: Tensor, update: SharedUpdate, budget: WorkBudget
) -> tuple[tuple[int, ...], ...] | None:
    """The images of each step; None where a search is not possible or leaves more of the update than noise."""
    if update.training.batches == 1:
        return None
    plain = [stage for stage in chain if not kind_of(stage.module).is_reshape]
    if not all(kind_of(stage.module).is_activation or isinstance(stage.module, nn.Linear) for stage in plain):
        return None
    basis = torch.linalg.qr(inputs.T)[0]  # (n, B): the images are in it, so the first layer acts on B numbers
    first = nn.Linear(basis.shape[1], layer.geometry.output_shape[0]).to(basis).requires_grad_(False)
    first.weight.copy_(layer.layer.weight @ basis)
    first.bias.copy_(layer.layer.bias)
    names = [f"{layer.name}.weight", *(f"{stage.name}.bias" for stage in plain), f"{plain[-1].name}.weight"]
    goal = {name: update.gradients[name].to(basis) for name in names if name in update.gradients}
    goal[names[0]] = goal[names[0]] @ basis
    training = Training([Stage(layer.name, first), *plain[1:]], inputs @ basis, labels, update.training, goal)
    try:
        found = found_order(training, enough=ENOUGH, budget=budget)
    except ValueError:
        return None
    return found.order if found.left < REPLAYED else None


def _signals(
    chain: Chain, layer: CandidateLayer, images: Images, labels: Tensor, uncertainty: Tensor, update: SharedUpdate
) -> Signals:
    """Features and softmax errors of the images at the server's weights."""
    features = run(chain[layer.index : -1], images.inputs)
    errors = update.training.loss.errors(chain[-1].module(features), labels)
    return Signals(
        features,
        labels,
        errors,
        torch.full_like(uncertainty, images.residual),
        images.sums,
        uncertainty,
        torch.ones_like(uncertainty),
        update.batch_size,
    )
