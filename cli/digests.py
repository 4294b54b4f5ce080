"""Digests of what a run attacks: a resumed run goes on only with the images, weights and update that it began with."""

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor, nn

from data import Batch
from update import checked
from update.shared import SharedUpdate


def digests_of(
    settings: argparse.Namespace, update: SharedUpdate, model: nn.Module, truth: Batch | None
) -> dict[str, str]:
    """The digests of images, weights and update, as far as they come from outside the program.

    The update of a simulated client has none: it follows from images and weights, and another device rounds it
    otherwise.
    """
    found = {"weights": _digest(model.state_dict())}
    if truth is not None:
        found["images"] = _digest({"images": truth.images, "labels": truth.labels})
    if settings.update:
        facts = (update.batch_size, update.image_shape, update.num_classes, update.defence, asdict(update.training))
        sections = {f"{kind}/{n}": t for kind in ("gradients", "statistics") for n, t in getattr(update, kind).items()}
        found["update"] = _digest(sections, str(facts))
    return found


def compare(began: object, now: Mapping[str, str]) -> None:
    """Refuse to go on where something has changed since the run began.

    Raises:
        ValueError: a digest differs; the message says of what.
    """
    for name, digest in now.items():
        if checked.mapping(began, "digests").get(name) != digest:
            raise ValueError(f"--resume: the {name} changed since the run began: give back the old, or start a new run")


def _digest(tensors: Mapping[str, Tensor], facts: str = "") -> str:
    """A digest of names, shapes, types and numbers; 32 hexadecimal digits."""
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
