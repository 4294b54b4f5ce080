"""The start of an attack by the settings: the map from variables to pixels, first images, first labels."""

import argparse
import math

import torch
from torch import nn

from attack.match.activations import GREY, spectral_power_for
from attack.match.common_scale import CommonScale
from attack.match.penalties import BatchNormLoss, FeatureLoss, Penalty
from attack.optimise.budget import Annealing
from attack.optimise.capture import cuda_graph
from attack.optimise.pixels import PixelMap
from attack.optimise.state import AttackState
from attack.prepare import Known, start_images
from cli.runtime import stream
from cli.settings import optimiser_of
from cli.victim import images_named
from network.memory import check_room
from network.tracing import stages
from network.zoo import place_of
from priors import contrast
from update.shared import SharedUpdate

PLAIN_PIXELS = {"box": "none", "spectral_power": 0.0, "chroma_gain": 1.0}  # for images that stay as they are


def pixel_map(update: SharedUpdate, model: nn.Module, known: Known, settings: argparse.Namespace) -> PixelMap:
    """The map from variables to pixels, as the settings say, or as known activations ask for."""
    power = settings.spectral_power
    if power is None:
        power = spectral_power_for(stages(model)[: known.start]) if known.is_followed else 1.0
    how = {"spectral_power": power, "box": settings.box, "chroma_gain": settings.chroma_gain}
    is_plain = known.is_exact or bool(_held(known, settings))
    return PixelMap(update.image_shape, **(PLAIN_PIXELS if is_plain else how), **place_of(model))


def _held(known: Known, settings: argparse.Namespace) -> tuple[int, ...]:
    """The likely images that stay as they are: of an attack that begins with them."""
    return known.held if settings.init == "grey" else ()


def first_state(update: SharedUpdate, known: Known, pixels: PixelMap, settings: argparse.Namespace) -> AttackState:
    """The first state: images and label logits, their optimiser, and the generator of subsets."""
    _check_room(update, known, pixels, settings)
    generator, copies, shape = stream(settings.seed, "attack"), settings.restarts, update.image_shape
    named = (settings.init, update.batch_size, shape[1:], stream(settings.seed, "init"))
    given = images_named(*named) if copies == 1 else None
    start = start_images(settings.init, (update.batch_size, *shape), copies, generator, given, noise=known.noise)
    if known.likely is not None and settings.init == "grey":
        likely = known.likely.cpu().to(start).repeat(copies, 1, 1, 1)
        start = start - GREY + likely
        held = [copy * update.batch_size + image for copy in range(copies) for image in known.held]
        start[held] = likely[held]  # without the noise of a start
    if known.pixels is not None and known.is_followed:
        start = start.to(known.pixels)
        start.unflatten(0, (copies, -1))[:, : len(known.pixels)] = known.pixels
    logits = settings.label_std * torch.randn(copies * update.batch_size, update.num_classes, generator=generator)
    return AttackState(
        z=pixels.encode(start.to(pixels.device, pixels.dtype)),
        label_variables=(logits / settings.label_gain).to(pixels.device, pixels.dtype),
        generator=generator,
        optimiser=optimiser_of(settings),
        label_gain=settings.label_gain,
        known_labels=known.labels,
        copies=copies,
        held=_held(known, settings),
        recorder=cuda_graph if settings.cuda_graphs == "auto" and torch.device(pixels.device).type == "cuda" else None,
    )


def annealing_of(settings: argparse.Namespace, known: Known, least: float, phases: int) -> Annealing:
    """The prior's weight over the run, never below `least`.

    Where a likely image is the start, the weight is the last one from the first step on: the full one would smooth away
    most of what that image shows.
    """
    weight, final = settings.tv_weight, settings.tv_final
    if known.likely is not None:
        weight, final = weight * final, 1.0
    return Annealing(weight, final, settings.tv_evals, least, phases)


def weighed_penalties(
    model: nn.Module, known: Known, settings: argparse.Namespace, distance: str, scale: CommonScale | None = None
) -> list[Penalty]:
    """The penalties that have a weight and something to weigh; features at `distance`, unless a flag says otherwise.

    Args:
        scale: of the images, where the update does not tell it.
    """
    features = FeatureLoss(model, known.features, settings.feature_distance or distance, known.errors)
    batchnorm = BatchNormLoss(model)
    penalties = (
        Penalty("features", settings.feature_weight if len(known.features) else 0.0, features),
        Penalty("contrast", settings.l2_weight, contrast),
        Penalty("batchnorm", settings.bn_weight if batchnorm.layers else 0.0, batchnorm),
        Penalty("scale", settings.scale_weight if scale else 0.0, scale),
    )
    return [penalty for penalty in penalties if penalty.weight]


def _check_room(update: SharedUpdate, known: Known, pixels: PixelMap, settings: argparse.Namespace) -> None:
    """Refuse an attack whose optimiser would not fit into memory. Images that are known exactly need none.

    Raises:
        ValueError: it would not; the message names the flags that decide it.
    """
    if known.is_exact:
        return
    images = settings.restarts * update.batch_size
    variables = images * (math.prod(update.image_shape) + update.num_classes)
    # a pair of L-BFGS is two vectors, Adam has two moments, and the checkpoint is a copy
    held = 4 * settings.history if settings.optimizer == "lbfgs" else 4
    need = variables * held * pixels.dtype.itemsize
    flags = [f"{images} images of {'x'.join(map(str, update.image_shape))}"]
    flags += [f"--restarts {settings.restarts}"] if settings.restarts > 1 else []
    flags += [f"--history {settings.history}"] if settings.optimizer == "lbfgs" else []
    training = update.training
    if not training.is_gradient and not known.is_followed:  # every step's weights and gradient are kept
        weights = sum(gradient.numel() for gradient in update.gradients.values())
        need += 2 * training.steps * weights * pixels.dtype.itemsize
        flags.append(f"{training.steps} local steps")
    check_room(need, f"an attack with {', '.join(flags)}", pixels.device)
