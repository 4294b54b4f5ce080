"""The model that the flags name, and how the client trains it."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from cli.runtime import stream
from network.one_logit import has_one_logit, with_two_logits
from network.outside import notes_of
from network.zoo import ALL_OPTIONS, build_model
from update.evidence import Evidence
from update.loss import CROSS_ENTROPY
from update.training import LocalTraining
from update.weights import load_checkpoint


def model_options(settings: argparse.Namespace) -> dict[str, object]:
    """The model's settings that flags give, beside its shapes; the model decides on all others."""
    return {name: getattr(settings, name) for name in ALL_OPTIONS if getattr(settings, name) is not None}


def server_model(
    settings: argparse.Namespace,
    name: str,
    image_shape: tuple,
    num_classes: int,
    options: dict,
    tell: Callable[[str], object] = str,
) -> nn.Module:
    """The model that the server sent out, with weights from --weights or drawn from the seed.

    `tell` is called with a note on each thing that had to be assumed of the weights.

    Raises:
        ValueError: there is no such model, its weights do not fit, or it puts out numbers that are not finite.
    """
    generator = stream(settings.seed, "model")
    model = build_model(name, image_shape=image_shape, num_classes=num_classes, generator=generator, **options)
    notes = load_checkpoint(model, settings.weights, image_shape) if settings.weights else notes_of(model)
    for note in notes:
        tell(note)
    _check_outputs(model, name, image_shape)
    return model


@torch.no_grad()
def _check_outputs(model: nn.Module, name: str, image_shape: tuple) -> None:
    """Finite weights may overflow, and a model from outside may divide by zero: nothing can be said of its updates."""
    if not torch.isfinite(model(torch.full((2, *image_shape), 0.5))).all():
        raise ValueError(f"{name} puts out numbers that are not finite for grey images: check its weights")


AS_TWO_CLASSES = Evidence(
    "logits",
    "the model has one logit z: it is attacked as one of two classes with the logits 0 and z",
    overrules="loss",
)


class TwoClasses(NamedTuple):
    """A model with a logit for each class, its training, and a word on it where it had one logit for two classes."""

    model: nn.Module
    training: LocalTraining
    evidence: tuple[Evidence, ...]


def two_classes(model: nn.Module, training: LocalTraining, name: str, image_shape: tuple) -> TwoClasses:
    """The model as it is, or one logit as two, whose cross-entropy is the binary cross-entropy of the one.

    Raises:
        ValueError: a loss of one logit that is not that; the message calls the model `name`.
    """
    if not has_one_logit(model, image_shape):
        return TwoClasses(model, training, ())
    if training.loss.name == "mse":
        raise ValueError(f"--loss mse: {name} has one logit, and its loss is taken for binary cross-entropy")
    training = replace(training, loss=replace(training.loss, name=CROSS_ENTROPY.name))
    return TwoClasses(with_two_logits(model), training, (AS_TWO_CLASSES,))


def parse_names(text: str | None) -> list[str]:
    """The names in a list such as head.bias,conv1, as flags of several names are read; none in None."""
    return [] if text is None else text.split(",")
