"""How far a client's arithmetic has taken its activations from the model's.

A client that computes in float32 leaves some units of rounding in the activations of each layer, more of them with
depth. Equations may tell these activations more exactly than that, so no error bar is smaller. What a layer's leave is
measured: the attacker runs the model in float32 and in float64, on random images.

Autocast computes in types of few bits. Under torch.autocast activations are rounded at every layer, forwards, before
any gradient. What such a client sends are exact gradients of rounded activations, nearly: singular values beyond the
gap and certificates, which show the rounding of deltas and gradients, do not show how far the activations themselves
are off. But the arithmetic is one and the same in both directions, and how coarse it was shows in a layer's gradient:
rounding to b bits leaves a share of ROUNDING 2^(1 - b) of it outside its rank. The attacker then lets the model run in
a coarse type itself, on random images. These errors hardly depend on the images: of four networks random ones foretell
those of real ones to 10 %.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from attack.read.random_images import random_images
from attack.read.signals import Signals
from attack.solve.rounding import precision_of
from network.chain import parametrised
from network.head import Head, measured_noise
from network.stage import Chain
from network.tracing import stages
from update.shared import SharedUpdate

COARSE = torch.bfloat16  # the type that the model is run in; errors of others are to its as their roundings are
ROUNDING = 0.2  # of a type's eps: what rounding to it leaves outside a gradient's rank, as a share (0.1 to 0.21)
FINE = 1e-5  # a smaller share is that of float32
EXACT = 1e-9  # gradients of a smaller relative rounding come from a client that computes in float64
SEED = 0  # of these images, which every update has alike
DIFFERENCES = 0.25  # of eps: the rounding of numbers to a type, root mean square and relative, 0.2 to 0.29
ADDED = 10.0  # units of rounding beyond which what the head's rows sum to is noise that was added
FEW = 4  # random images: the errors of one are those of another, nearly


@torch.no_grad()
def forward_errors(model: nn.Module, image_shape: Sequence[int], share: float, precision: float) -> list[float]:
    """The relative error that the client's forward pass leaves in the inputs of each stage of the model's chain.

    Args:
        model: that the server sent out.
        image_shape: (C, H, W).
        share: of a layer's gradient that lies outside its rank, and that nothing but rounding explains.
        precision: relative rounding error of the gradients.
    """
    images = random_images(tuple(image_shape), FEW, torch.Generator().manual_seed(SEED)).to(
        next(model.parameters()).device
    )
    rounded, exact = (stages(each) for each in (copy.deepcopy(model).float(), copy.deepcopy(model).double()))
    if share < FINE:
        return [0.0] * len(exact) if precision < EXACT else _errors(rounded, exact, images, torch.float32)
    part = min(1.0, share / (ROUNDING * torch.finfo(COARSE).eps))
    return [part * error for error in _errors(rounded, exact, images, COARSE)]


def _errors(chain: Chain, exact_chain: Chain, images: Tensor, dtype: torch.dtype) -> list[float]:
    """The largest relative error that this type leaves in the inputs of each stage."""
    rounded, exact, errors = images.to(dtype), images.double(), []
    for stage, exact_stage in zip(chain, exact_chain, strict=True):
        own = (rounded.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1).clamp(min=1e-30)
        errors.append(float(own.max()))
        try:
            with torch.autocast(exact.device.type, COARSE, enabled=dtype == COARSE):
                rounded = stage.module(rounded)
        except (RuntimeError, TypeError):  # an operation without a kernel for the type: its own rounding is left out
            rounded = stage.module(rounded.float())
        exact = exact_stage.module(exact)
    return errors


def rounding_of_weights(update: SharedUpdate, model: nn.Module, name: str) -> Tensor:
    """The error of each row (c_out,) of a layer's gradient that comes of weights rounded at each of several steps."""
    weight = model.get_parameter(f"{name}.weight").detach()
    each = DIFFERENCES * precision_of(weight) * weight.double().flatten(1).norm(dim=1)
    return each * math.sqrt(update.training.steps) / update.training.reach


def roundings_of_weights(update: SharedUpdate, model: nn.Module) -> dict[str, Tensor]:
    """The same (c_out,) of each entry of the rows, by the name of a layer that has a part in the update."""
    layers = [stage for stage in parametrised(stages(model)) if f"{stage.name}.weight" in update.gradients]
    return {
        layer.name: rounding_of_weights(update, model, layer.name) / math.sqrt(layer.module.weight[0].numel())
        for layer in layers
    }


def blurred(signals: Signals, error: float) -> Signals:
    """The signals with another, independent relative error in their values, of as many dimensions as these have."""
    if not error:
        return signals
    whole = torch.hypot(signals.uncertainty, torch.full_like(signals.uncertainty, error))
    own, other = (signals.uncertainty / whole) ** 4, (error / whole) ** 4
    return replace(signals, uncertainty=whole, freedom=1 / (own / signals.freedom + other / signals.values[0].numel()))


def additive_noise(update: SharedUpdate, model: nn.Module) -> float:
    """Noise that was added to the gradients; 0 where no more than rounding shows, or no sum of errors shows it."""
    if not update.training.loss.is_cross_entropy:
        return 0.0
    gradient, _ = Head.of(model).among(update.gradients)
    noise = measured_noise(update.gradients, model)
    if gradient is None or noise < ADDED * precision_of(gradient) * float(gradient.double().square().mean().sqrt()):
        return 0.0
    return noise
