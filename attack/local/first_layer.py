"""All images of a client that trained for any number of steps, from a fully connected first layer.

The layer's movement has rank B and spans the images, whatever happened above (`columns`). Behind a ReLU, exact zeros of
the movement tell the images, without labels and without the order of the steps, which is sought afterwards. Behind any
other activation independent component analysis gives images that are off by some percent; from there images and order
are fitted to the whole training (`unrolled`).

A column d_i points roughly like the delta of its image at the mean of the layer's weights before and after training.
Of the deltas that all labels give, only that of the right one does.
"""

import contextlib
import copy
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attack.local.columns import ColumnSearch
from attack.local.levels import snapped
from attack.local.unrolled import Solution, Training, label_fits, solve_in_turn, solve_training
from attack.read.layer_choice import CandidateLayer, candidate_layers
from attack.read.layer_rows import COLUMNS
from attack.read.reading import Reading
from attack.read.signals import Signals
from attack.solve.budget import WorkBudget
from network.chain import input_shapes
from network.kinds import kind_of
from network.stage import Chain, Stage, run
from network.tracing import stages
from update.shared import SharedUpdate

ENOUGH = 1e-6  # share of the update that an order may leave; float32 weights leave 4e-6 at a rate of 0.01
REPLAYED = 1e-3  # and beyond which no order is believed: a wrong one leaves 1e-2 and more
TOLD = 1e-7  # relative error of images whose pixels are whole steps: that of float32 numbers
OPEN = 1.0  # relative error of an image that may hold a share of another


class NoSuchLayerError(ValueError):
    """The model does not begin with a fully connected layer, or the layer's movement is no sum over images."""


def read_first_layer(
    update: SharedUpdate, model: nn.Module, *, generator: torch.Generator, budget: WorkBudget
) -> Reading:
    """Tell all images of the batch apart at the first layer, in float64, from the update and the model alone.

    Raises:
        NoSuchLayerError: the model or the client's training is of another kind.
        ValueError: not all images were found; the message says how many.
        OutOfTimeError: the budget's clock has run out.
    """
    try:
        return _FirstLayer(update, model).read(generator, budget)
    except (RuntimeError, ArithmeticError) as error:  # a decomposition that fails, of images that are all alike, say
        raise ValueError(str(error).partition("\n")[0]) from None


class _FirstLayer:
    """The layer, what lies below and above it, and its movement."""

    def __init__(self, update: SharedUpdate, model: nn.Module) -> None:
        self.update, self.training, self.size = update, update.training, update.batch_size
        chain = stages(copy.deepcopy(model).double().requires_grad_(False))
        self.layer = _first_layer(chain, update)
        self.below, self.chain = chain[: self.layer.index], chain[self.layer.index :]
        self.shapes = input_shapes(chain, update.image_shape)[: self.layer.index]
        self.weights = self._before_and_after()

    def read(self, generator: torch.Generator, budget: WorkBudget) -> Reading:
        """All images, with labels and, where it was found, the order of the steps."""
        began = time.perf_counter()
        span = self.layer.span(self.update.gradients, self.size, self.layer.layer.weight)
        if span.rank < self.size:
            raise ValueError(f"{self.layer.name} has moved in {span.rank} directions for {self.size} images")
        search = ColumnSearch(span, self.layer.bias_gradient, self.weights, self.pixels)
        how = self._by_zeros if self.layer.behind.is_rectifier else self._by_training
        inputs, labels, order, uncertainty, certificates, left = how(search, generator, budget)
        pixels, is_whole = snapped(inputs, span.right, self.pixels, lambda images: run(self.below, images))
        inputs = run(self.below, pixels).flatten(1)
        uncertainty = torch.where(is_whole, TOLD, uncertainty)
        is_ordered = order is not None
        if is_ordered and not self.training.shuffle:  # the images of one minibatch after those of another
            first = torch.tensor([image for part in order[: self.training.batches] for image in part]).to(labels)
            told = (inputs, pixels, labels, uncertainty, certificates)
            inputs, pixels, labels, uncertainty, certificates = (part[first] for part in told)
            order = None
        seconds = time.perf_counter() - began
        signals = self._signals(inputs, labels, uncertainty, certificates, left)
        facts = {"rank": span.rank, "dimension": span.dimension, "gap": span.gap, "spanned": True, "determined": True}
        row = dict.fromkeys(COLUMNS) | facts | {
            "layer": self.layer.name, "positions": 1, "rank_bound": self.size, "residual": left,
            "uncertainty": float(uncertainty.max()), "seconds": seconds,
            "note": f"{self.size} of {self.size} images told apart, whatever their steps",
        }  # fmt: skip
        told = {"order": order, "is_explained": bool(is_whole.all()) or is_ordered}
        return Reading(signals, 0, pixels, [row], {self.layer.name: inputs}, seconds, **told)

    def pixels(self, inputs: Tensor) -> Tensor:
        """The images (N, C, H, W) whose inputs of the layer are these (N, n)."""
        for stage, shape in zip(reversed(self.below), reversed(self.shapes), strict=True):
            inputs = kind_of(stage.module).inverted(stage.module, inputs, shape)
            if inputs is None:
                raise NoSuchLayerError(f"{stage.name} in front of {self.layer.name} cannot be undone")
        return inputs.view(-1, *self.update.image_shape)

    # ------------------------------------------------------------------------------------------------
    # The two ways

    def _by_zeros(self, search: ColumnSearch, generator: torch.Generator, budget: WorkBudget) -> tuple:
        """Images from the zeros of their columns, then labels, then the order if the rest of the update tells it."""
        found = search.found(generator, budget)
        if len(found) < self.size:
            name = self.layer.name
            raise ValueError(f"{len(found)} of {self.size} images have zeros enough at {name} to be told apart")
        images = search.told_by_levels(search.images(found))
        uncertainty = torch.where(images.is_open, OPEN, search.errors(images, generator))
        labels = self._labels(images.inputs, images.columns)
        order, certificates = None, images.sums
        if self.training.batches > 1 and self._is_plain:
            basis = torch.linalg.qr(images.inputs.T)[0].T
            with contextlib.suppress(ValueError):  # too large a system: the order is left open
                told, solved = self._in_order(images.inputs @ basis.T, labels, images.columns, basis, budget)
                if solved.order is not None:
                    labels, order, certificates = told, solved.order, solved.certificates
        return images.inputs, labels, order, uncertainty, certificates, images.residual

    def _by_training(self, search: ColumnSearch, generator: torch.Generator, budget: WorkBudget) -> tuple:
        """Images and order together, from the images that independent component analysis gives."""
        if not self._is_plain:
            raise NoSuchLayerError("what follows the first layer is more than layers and activations")
        span = search.span
        guess = search.guesses(torch.eye(self.size).to(span.right), generator, 0.0)
        columns = (span.left * span.sigma) @ torch.linalg.inv(guess) / search.rows[:, None]
        labels = self._labels(guess @ span.right, columns)
        training = self._training(labels, span.right)
        solved = solve_training(training, guess, search.along, enough=ENOUGH, budget=budget)
        if solved.left > REPLAYED:
            raise ValueError(f"images fitted to the whole training leave {solved.left:.1e} of the update")
        mixed = (solved.variance / solved.inputs.square().sum(1)).sqrt()
        uncertainty = torch.hypot(mixed, span.turned(solved.inputs))
        return solved.inputs @ span.right, labels, solved.order, uncertainty, solved.certificates, solved.left

    def _labels(self, inputs: Tensor, columns: Tensor) -> Tensor:
        """The label (B,) of each image whose delta points most nearly along its column (m, B).

        What lies above the layer is taken at the server's weights.
        """
        (weight, bias), (last, last_bias) = self.weights
        outputs = (inputs @ ((weight + last) / 2).T + (bias + last_bias) / 2).requires_grad_()
        with torch.enable_grad():
            logits = self.layer.tail(inputs, outputs)
            return label_fits(self.training.loss, logits, outputs, columns).argmax(1)

    @property
    def _is_plain(self) -> bool:
        """Whether nothing but linear layers and activations follow."""
        return all(kind_of(s.module).is_activation or isinstance(s.module, nn.Linear) for s in self._layers)

    @property
    def _layers(self) -> Chain:
        return [stage for stage in self.chain if not kind_of(stage.module).is_reshape]

    def _in_order(
        self, inputs: Tensor, labels: Tensor, columns: Tensor, basis: Tensor, budget: WorkBudget
    ) -> tuple[Tensor, Solution]:
        """Labels and order of images with coordinates (B, r) in a basis (r, n), whose columns (m, B) are known.

        One pass tells both step by step. Of several passes a column is a sum, and only the whole training tells them.
        """
        training = self._training(labels, basis)
        if self.training.passes == 1:
            told, solved = solve_in_turn(training, inputs, columns)
            if solved.order is not None:
                return told, solved
        return labels, solve_training(training, inputs, None, enough=ENOUGH, budget=budget)

    def _training(self, labels: Tensor, basis: Tensor) -> Training:
        """The client's, on images as coordinates in a basis (r, n)."""
        module, names = self.layer.layer, [f"{stage.name}.bias" for stage in self._layers]
        first = nn.Linear(len(basis), module.out_features, module.bias is not None).to(basis).requires_grad_(False)
        first.weight.copy_(module.weight @ basis.T)
        first.bias.copy_(module.bias)
        names += [f"{self._layers[0].name}.weight", f"{self._layers[-1].name}.weight"]
        goal = {name: self.update.gradients[name].to(basis) for name in names if name in self.update.gradients}
        goal[f"{self.layer.name}.weight"] = goal[f"{self.layer.name}.weight"] @ basis.T
        return Training([Stage(self.layer.name, first), *self._layers[1:]], labels, self.training, goal)

    # ------------------------------------------------------------------------------------------------

    def _before_and_after(self) -> Sequence[tuple[Tensor, Tensor]]:
        """The layer's weight and bias before and after the training."""
        module, combination = self.layer.layer, self.training.combination()
        moved = [self.update.gradients[f"{self.layer.name}.{name}"].to(module.weight) for name in ("weight", "bias")]
        before = module.weight, module.bias
        if self.training.is_gradient:
            return before, before
        return before, tuple(combination.alpha * w - combination.total * g for w, g in zip(before, moved, strict=True))

    def _signals(
        self, inputs: Tensor, labels: Tensor, uncertainty: Tensor, certificates: Tensor, left: float
    ) -> Signals:
        """Features and softmax errors of the images at the server's weights."""
        features, ones = run(self.chain[:-1], inputs), torch.ones_like(uncertainty)
        errors = self.training.loss.errors(self.chain[-1].module(features), labels)
        return Signals(features, labels, errors, left * ones, certificates, uncertainty, ones, self.size)


def _first_layer(chain: Chain, update: SharedUpdate) -> CandidateLayer:
    """The fully connected layer with bias that a chain begins with.

    Raises:
        NoSuchLayerError: there is none, or its movement is no sum over images.
    """
    optimiser = update.training.optimiser
    if not optimiser.is_linear or optimiser.clip is not None or update.defence != "none":
        raise NoSuchLayerError("the first layer's movement is no sum over images")
    for layer in candidate_layers(chain, update.image_shape, update.gradients)[:1]:
        is_first = not any(kind_of(stage.module).is_affine for stage in chain[: layer.index])
        if is_first and isinstance(layer.layer, nn.Linear) and layer.bias_gradient is not None:
            return layer
    raise NoSuchLayerError("the model does not begin with a fully connected layer with bias")
