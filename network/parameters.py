"""A model's parameters by name: which of them are trained, and freezing the others."""

from collections.abc import Sequence

from torch import nn


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


def names_within(holder: nn.Module, model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The names of the model's parameters `names` in a module that holds the model."""
    own = {parameter: name for name, parameter in holder.named_parameters()}
    return tuple(own[model.get_parameter(name)] for name in names)


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
