"""The start of an attack by the settings: the map from variables to pixels, first images, first labels."""

import argparse

import torch
from torch import nn

from attack.match.activations import spectral_power_for
from attack.optimise.pixels import PixelMap
from attack.optimise.state import AttackState
from attack.prepare import Known, start_images
from cli.runtime import stream
from cli.settings import optimiser_of
from cli.victim import images_named
from network.tracing import stages
from network.zoo import place_of
from update.shared import SharedUpdate

PLAIN_PIXELS = {"box": "none", "spectral_power": 0.0, "chroma_gain": 1.0}  # for images that are known exactly


def pixel_map(update: SharedUpdate, model: nn.Module, known: Known, settings: argparse.Namespace) -> PixelMap:
    """The map from variables to pixels, as the settings say, or as known activations ask for."""
    power = settings.spectral_power
    if power is None:
        power = spectral_power_for(stages(model)[: known.start]) if known.is_followed else 1.0
    how = {"spectral_power": power, "box": settings.box, "chroma_gain": settings.chroma_gain}
    return PixelMap(update.image_shape, **(PLAIN_PIXELS if known.is_exact else how), **place_of(model))


def first_state(update: SharedUpdate, known: Known, pixels: PixelMap, settings: argparse.Namespace) -> AttackState:
    """The first state: images and label logits, their optimiser, and the generator of subsets."""
    generator, copies, shape = stream(settings.seed, "attack"), settings.restarts, update.image_shape
    named = (settings.init, update.batch_size, shape[1:], stream(settings.seed, "init"))
    given = images_named(*named) if copies == 1 else None
    start = start_images(settings.init, (update.batch_size, *shape), copies, generator, given, noise=known.noise)
    if known.is_exact:
        start = known.pixels.repeat(copies, 1, 1, 1)
    logits = settings.label_std * torch.randn(copies * update.batch_size, update.num_classes, generator=generator)
    return AttackState(
        z=pixels.encode(start.to(pixels.device, pixels.dtype)),
        label_variables=(logits / settings.label_gain).to(pixels.device, pixels.dtype),
        generator=generator,
        optimiser=optimiser_of(settings),
        label_gain=settings.label_gain,
        known_labels=known.labels,
        copies=copies,
    )
