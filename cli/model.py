"""The model that the flags name, and how the client trains it."""

import argparse
from collections.abc import Callable

from torch import nn

from cli.runtime import stream
from network.one_logit import has_one_logit, with_two_logits
from network.zoo import ALL_OPTIONS, build_model
from update.evidence import Evidence
from update.loss import Loss
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

    `tell` is called with a note on each thing that had to be assumed of the file of weights.
    """
    generator = stream(settings.seed, "model")
    model = build_model(name, image_shape=image_shape, num_classes=num_classes, generator=generator, **options)
    if settings.weights:
        for note in load_checkpoint(model, settings.weights, image_shape):
            tell(note)
    return model


def of_two_classes(model: nn.Module, settings: argparse.Namespace, image_shape: tuple) -> nn.Module:
    """The model; with two logits, if it has one, whose binary cross-entropy is the cross-entropy of two classes.

    Raises:
        ValueError: a loss of one logit that is not that.
    """
    if not has_one_logit(model, image_shape):
        return model
    if settings.loss == "mse":
        raise ValueError(f"--loss mse: {settings.model} has one logit, and its loss is taken for binary cross-entropy")
    settings.loss = "cross_entropy"
    return with_two_logits(model)


AS_TWO_CLASSES = Evidence(
    "logits",
    "the model has one logit z: it is attacked as one of two classes with the logits 0 and z",
    overrules="loss",
)


def local_training(settings: argparse.Namespace) -> LocalTraining:
    """How the client trains: one step of FedSGD, unless the flags say otherwise."""
    loss = Loss(settings.loss, settings.label_smoothing)
    steps = (settings.local_steps, settings.local_batches, settings.local_lr)
    return LocalTraining(*steps, settings.bn, loss, tuple(parse_names(settings.bn_frozen)))


def parse_names(text: str | None) -> list[str]:
    """The names in a list such as head.bias,conv1, as flags of several names are read; none in None."""
    return [] if text is None else text.split(",")
