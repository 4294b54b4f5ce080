"""Normalisation as a model's first layer: the model sees what it was trained on, everybody else pixels in [0, 1]."""

from collections.abc import Sequence

import torch
from torch import nn

NAME = "normalise"  # of the layer in the model; it has no parameters, and a state dict does not hold it


class Normalise(nn.BatchNorm2d):
    """(x - mean) / std for each channel: a BatchNorm whose statistics nothing moves, so it is walked through like one.

    Its eps is too small to change a variance. It is not 0, which several versions of torch refuse.

    Args:
        mean: one for each channel, in units of pixels in [0, 1].
        std: likewise.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(len(mean), eps=torch.finfo(torch.float32).tiny, affine=False, track_running_stats=False)
        for name, values in {"running_mean": mean, "running_var": [s * s for s in std]}.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "Normalise":
        """It stays what it is while others train."""
        return super().train(False)


def normalised(model: nn.Module, channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Module:
    """The model itself, with a normalisation in front of it if mean or std is given; its parameters keep their names.

    Args:
        model: that takes normalised images (B, C, H, W).
        channels: C.
        mean: one for each channel, or one for all; None: 0.
        std: likewise; None: 1.

    Raises:
        ValueError: numbers for another count of channels, or a model that has something of the layer's name.
    """
    if mean is None and std is None:
        return model
    if hasattr(model, NAME):
        raise ValueError(f"the model has a {NAME!r} of its own: leave --mean and --std out")
    layer = Normalise(_each("mean", mean or [0.0], channels), _each("std", std or [1.0], channels))
    vars(model)[NAME] = layer  # no module of the model: a container, nn.Sequential say, would call it once more, last
    model.register_forward_pre_hook(lambda module, inputs: (normalisation(module)(inputs[0]), *inputs[1:]))
    return model


def normalisation(model: nn.Module) -> Normalise | None:
    """The layer that `normalised` has put in front of the model, where the model is and in its dtype."""
    layer = vars(model).get(NAME)
    return layer.to(next(model.parameters())) if isinstance(layer, Normalise) else None


def _each(name: str, values: Sequence[float], channels: int) -> list[float]:
    if len(values) not in (1, channels):
        raise ValueError(f"--{name} has {len(values)} numbers: images have {channels} channels")
    return list(values) * (channels if len(values) == 1 else 1)
