"""The client's batch, the model that the server sent out, and the shared update, all as the flags name them."""

import argparse
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from attack.prepare import INITS
from cli.model import model_options, parse_names, server_model, two_classes
from cli.received import received_update
from cli.runtime import stream
from client.defences import defend_received
from client.victim import share_update
from data import Batch, DataError, load_batch, open_source, parse_indices, sides
from network.outside import is_outside, try_batch
from update.declared import declared
from update.defences import Defences
from update.shared import SharedUpdate
from update.storage import replace_atomically
from update.training import LocalTraining


def victim(
    settings: argparse.Namespace, place: dict, given: Collection[str] = ()
) -> tuple[SharedUpdate, nn.Module, Batch | None]:
    """The shared update, the model behind it, and the truth (None with --update).

    `place` is the device and dtype of the model, and with it of the whole attack; `given` are the names of the settings
    that were given by hand.

    Raises:
        ValueError: data, model or update cannot be used as the flags say; the message names the value.
    """
    if settings.update:
        update, model = received_update(settings, place, given)
        if is_outside(update.model) and update.training.is_plain:
            try_batch(model, update.model, update.image_shape, update.batch_size, update.num_classes)
        defence, generator = settings.defence or "none", stream(settings.seed, "defence")
        return defend_received(update, defence, generator=generator), model, None
    batch = client_batch(settings, settings.labels, settings.num_classes)
    options = model_options(settings)
    shape = tuple(batch.images.shape[1:])
    notes: list[str] = []
    model = server_model(settings, settings.model, shape, settings.num_classes, options, notes.append)
    model, training, evidence = two_classes(model, _training(settings), settings.model, shape)
    if is_outside(settings.model):
        try_batch(model, settings.model, shape, len(batch.images), settings.num_classes)
    model = model.to(**place)
    update = share_update(
        model,
        settings.model,
        batch.images.to(**place),
        batch.labels.to(place["device"]),
        settings.num_classes,
        options=options,
        frozen=parse_names(settings.frozen),
        training=training,
        defence=settings.defence,
        hidden=parse_names(settings.hidden),
        generator=stream(settings.seed, "defence"),
    )
    return replace(update, notes=tuple(notes), evidence=evidence), model, batch


def _training(settings: argparse.Namespace) -> LocalTraining:
    """How the simulated client trains.

    Raises:
        ValueError: settings that do not go together.
    """
    training = declared(vars(settings))
    if training.precision != "float32" and settings.dtype != "float32":
        raise ValueError(f"--local_precision {training.precision}: autocast leaves float64 as it is: --dtype float32")
    return training


def save_batch(settings: argparse.Namespace) -> int:
    """Write the batch's images and their own labels to the .npz of --save_batch. Returns the exit status.

    Raises:
        ValueError: data cannot be used as the flags say, or the file cannot be written.
    """
    path = Path(settings.save_batch)
    if path.suffix != ".npz":
        raise ValueError(f"--save_batch {path}: the name must end in .npz")
    batch = client_batch(settings, labels="dataset", num_classes=None)
    pixels = (batch.images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(path, lambda temporary: _save_npz(temporary, images=pixels, labels=batch.labels.numpy()))
    for note in batch.notes:
        print(f"note: {note}")
    print(f"{len(pixels)} images: {path}")
    return 0


def _save_npz(path: Path, **arrays: np.ndarray) -> None:
    with path.open("wb") as file:  # savez itself would add .npz to the name
        np.savez_compressed(file, **arrays)


def client_batch(settings: argparse.Namespace, labels: str, num_classes: int | None) -> Batch:
    """The images that the flags name, with labels as in `data.load_batch`.

    Where --defence sums over several clients, the batch holds the images of all clients, the first client's first.
    """
    source = open_source(settings.dataset, settings.data_path)
    indices = parse_indices(settings.indices) if settings.indices else range(settings.batch_size)
    return load_batch(
        source,
        [*indices, *_of_other_clients(indices, Defences.parse(settings.defence), len(source))],
        labels=labels,
        num_classes=num_classes,
        generator=stream(settings.seed, "labels"),
        image_size=sides(settings.image_size) if settings.image_size else None,
    )


def _of_other_clients(indices: Sequence[int], defences: Defences, count: int) -> range:
    """The images of the other clients of a sum: the next images behind the first client's, as many for each client.

    Raises:
        DataError: the source's `count` images are too few.
    """
    first = max(indices) + 1
    others = range(first, first + (defences.clients - 1) * len(indices))
    if others and others[-1] >= count:
        raise DataError(
            f"--defence {defences}: {defences.clients} clients with {len(indices)} images each "
            f"need images up to {others[-1]}, the set has images 0 to {count - 1}"
        )
    return others


def images_named(init: str, batch_size: int, size: tuple[int, int], generator: torch.Generator) -> Tensor | None:
    """The first images (B, C, H, W) of the folder or .npz that --init names; None where it names no files.

    `size` is (H, W).
    """
    if init in INITS:
        return None
    source = open_source("npz" if init.endswith(".npz") else "folder", init)
    how = {"labels": "random", "num_classes": 2, "generator": generator, "image_size": size}
    return load_batch(source, range(batch_size), **how).images
