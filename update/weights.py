"""Weights from a file, loaded into a model."""

from pathlib import Path

import torch
from torch import Tensor, nn

from update.received import named
from update.storage import read_tensors, room_for


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Copy named weights into `model`.

    Raises:
        ValueError: a weight is missing, unknown, of another shape or not finite; `source` names their file.
    """
    own = model.state_dict()
    for name in [*own, *(name for name in weights if name not in own)]:
        if name not in weights:
            raise ValueError(f"{source}: weight {name!r} is missing")
        if name not in own:
            raise ValueError(f"{source}: weight {name!r} is not in the model, which begins with {next(iter(own))!r}")
        if own[name].shape != weights[name].shape:
            raise ValueError(
                f"{source}: weight {name!r} has shape {tuple(weights[name].shape)}, "
                f"the model needs {tuple(own[name].shape)}"
            )
        if not torch.isfinite(weights[name]).all():
            raise ValueError(f"{source}: weight {name!r} is not finite")
        if own[name].is_floating_point() != weights[name].is_floating_point() or weights[name].is_complex():
            raise ValueError(
                f"{source}: weight {name!r} holds {weights[name].dtype}, the model needs {own[name].dtype}"
            )
    model.load_state_dict(weights)


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a state dict from a file of `storage.FORMATS`; arrays without names are in the state dict's order.

    Raises:
        ValueError: the file is missing, damaged, or does not fit the model.
    """
    load_weights(model, named(read_tensors(path, most=room_for(model))[0], list(model.state_dict()), str(path)), path)
