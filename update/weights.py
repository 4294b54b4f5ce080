"""Weights from a file, loaded into a model."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from update.layouts import hint, in_torch_layout
from update.names import VARIANCE, by_names_of, statistics_in, without_counters
from update.storage import ENTERED, read_tensors, room_for


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Copy named weights into `model`.

    Raises:
        ValueError: a weight is missing, unknown, of another shape or not finite, or a variance is negative; `source`
            names their file.
    """
    own = model.state_dict()
    for name in [*own, *(name for name in weights if name not in own)]:
        if name not in weights:
            raise ValueError(f"{source}: weight {name!r} is missing")
        if name not in own:
            raise ValueError(f"{source}: weight {name!r} is not in the model, which begins with {next(iter(own))!r}")
        if own[name].shape != weights[name].shape:
            found, needed = tuple(weights[name].shape), tuple(own[name].shape)
            raise ValueError(
                f"{source}: weight {name!r} has shape {found}, the model needs {needed}{hint(found, needed)}"
            )
        if not torch.isfinite(weights[name]).all():
            raise ValueError(f"{source}: weight {name!r} is not finite")
        if own[name].is_floating_point() != weights[name].is_floating_point() or weights[name].is_complex():
            raise ValueError(
                f"{source}: weight {name!r} holds {weights[name].dtype}, the model needs {own[name].dtype}"
            )
        if name.endswith(VARIANCE) and bool((weights[name] < 0).any()):
            raise ValueError(f"{source}: {name!r} holds negative variances")
    model.load_state_dict(weights)


def load_checkpoint(model: nn.Module, path: str | Path, image_shape: Sequence[int] | None = None) -> list[str]:
    """Load the state dict in a file of `storage`, and return a note on each thing that had to change.

    The file may name the tensors with a wrapper's prefix, or hold arrays without names; it may be in Keras's layout,
    and may lack BatchNorm's counters. Where it lacks all running statistics, the model keeps its own, with a note.

    Args:
        model: the weights go here.
        path: the file.
        image_shape: (C, H, W), without which Keras's layout is refused.

    Raises:
        ValueError: the file is missing, damaged, or does not fit the model.
    """
    source, own = str(path), model.state_dict()
    tensors, text = read_tensors(path, most=room_for(model))
    statistics = statistics_in(own)
    needed = [name for name in without_counters(own) if name not in statistics]
    weights, notes = by_names_of(model, tensors, needed, source)
    weights, turned = in_torch_layout(weights, model, image_shape, source)
    notes = [*([text[ENTERED]] if ENTERED in text else []), *notes, *turned]
    if statistics and not any(name in weights for name in statistics):
        weights |= {name: own[name] for name in statistics}
        fresh = all((own[name] == name.endswith("var")).all() for name in statistics)
        kept = "mean 0 and variance 1, those of a new model," if fresh else "the model's own"
        notes.append(f"{source} holds no running statistics of BatchNorm: {kept} are kept")
    for name in own.keys() - set(without_counters(own)):
        weights[name] = _counter(weights.get(name, own[name]), own[name])
    load_weights(model, weights, source)
    return notes


def _counter(found: Tensor, own: Tensor) -> Tensor:
    """BatchNorm's counter of batches: one number, which some frameworks average, and send as an array of one."""
    is_number = found.numel() == 1 and not found.is_complex() and bool(torch.isfinite(found).all())
    return found.reshape(own.shape).to(own.dtype) if is_number else found
