"""The averaged gradient of a batch, as the client computes it and the attacker imitates it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def batch_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Per-image cross-entropy (B,) of logits (B, K), labels as class indices (B,) or as probabilities (B, K)."""
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def averaged_gradient(
    model: nn.Module, images: Tensor, labels: Tensor, *, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Gradient of the mean cross-entropy over the batch, one tensor per trainable parameter of `model`, in their order.

    Args:
        images: (B, C, H, W).
        labels: class indices (B,) or class probabilities (B, K).
        create_graph: keep the graph, so that the gradient can itself be differentiated by images and labels.
    """
    loss = batch_loss(model(images), labels).mean()
    return torch.autograd.grad(loss, tuple(trainable(model).values()), create_graph=create_graph)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Freeze the parameters of these names: no gradient of them is taken or shared.

    Raises:
        ValueError: nothing is left to train.
    """
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    if not trainable(model):
        raise ValueError(f"nothing is left to train with {', '.join(names)} frozen")


def named_by(model: nn.Module, prefixes: Sequence[str]) -> list[str]:
    """The names of the parameters that start with one of the prefixes.

    Raises:
        ValueError: a prefix fits no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"no parameter's name starts with {prefix!r}: the model has {', '.join(names)}")
    return [name for name in names if name.startswith(tuple(prefixes))]
