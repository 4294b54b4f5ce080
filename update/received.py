"""The tensors that a client of any framework sent, and the averaged gradient that they stand for.

gradient     the averaged gradient itself
difference   new weights - old weights, which most servers average
weights      the new weights, which a Flower client returns

A difference is -rate times the averaged gradient, with rate the learning rate times the local steps. After several
steps the averaged gradient is the mean along the way, see `update.training`.
"""

import re
from collections.abc import Sequence

from torch import Tensor, nn

from network.parameters import trainable
from update.storage import UNNAMED, StorageError
from update.training import statistic_names

KINDS = ("gradient", "difference", "weights")


def named(tensors: dict[str, Tensor], names: Sequence[str], source: str) -> dict[str, Tensor]:
    """The tensors by name; numbered tensors take these names in turn.

    Raises:
        StorageError: a number is missing, or there are more or fewer numbers than names.
    """
    numbers = [re.fullmatch(rf"{UNNAMED}(\d+)", name) for name in tensors]
    if not tensors or not all(numbers):
        return tensors
    missing = next((n for n in range(len(tensors)) if f"{UNNAMED}{n}" not in tensors), None)
    if missing is not None:
        raise StorageError(f"{source}: {UNNAMED}{missing} is missing")
    if len(tensors) != len(names):
        raise StorageError(f"{source}: it holds {len(tensors)} arrays without names, the model needs {len(names)}")
    return {name: tensors[f"{UNNAMED}{number}"] for number, name in enumerate(names)}


def averaged_gradients(
    tensors: dict[str, Tensor], model: nn.Module, kind: str, rate: float, source: str
) -> dict[str, Tensor]:
    """The averaged gradient of every trainable parameter, by name and in the model's order.

    Args:
        tensors: by the model's names, or numbered, in the order of its state dict or of its trainable parameters.
            Buffers and frozen parameters may be among the tensors, and are ignored.
        model: the model with the weights that the server sent out.
        kind: one of `KINDS`.
        rate: learning rate times local steps; without meaning for gradients.
        source: the file's name in messages.

    Raises:
        StorageError: the tensors are not the model's; the message names the first parameter that does not fit.
    """
    parameters, state = trainable(model), model.state_dict()
    tensors = named(tensors, [*(state if len(tensors) == len(state) else parameters)], source)
    if not tensors.keys() & state.keys():
        begins, first = f"begins with {next(iter(tensors))!r}" if tensors else "holds nothing", next(iter(state))
        raise StorageError(f"{source}: it has none of the model's parameters: it {begins}, the model with {first!r}")
    for name, parameter in parameters.items():
        if name not in tensors:
            raise StorageError(f"{source}: {name!r} is missing; name it with --frozen if the client does not train it")
        _check_fit(name, tensors[name], parameter, source)
    for name in tensors:
        if name not in state:
            raise StorageError(f"{source}: {name!r} is not in the model, which begins with {next(iter(state))!r}")
    return {name: _gradient(tensors[name], parameter, kind, rate) for name, parameter in parameters.items()}


def statistics(tensors: dict[str, Tensor], model: nn.Module, kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """BatchNorm's running statistics after training, and its counts of batches, by buffer name.

    A file of weights or of their difference may hold them; beside gradients there are no buffers, and none are found.

    Args:
        tensors, model, kind: as in `averaged_gradients`.
    """
    if kind == "gradient":
        return {}, {}
    state = model.state_dict()
    tensors = named(tensors, [*state] if len(tensors) == len(state) else [*trainable(model)], "the update")
    counts = [name for name in state if name.endswith(".num_batches_tracked")]
    found, counted = ({n: tensors[n] for n in names if n in tensors} for names in (statistic_names(model), counts))
    if kind == "difference":
        found, counted = ({n: state[n] + moved for n, moved in each.items()} for each in (found, counted))
    return found, counted


def _check_fit(name: str, tensor: Tensor, parameter: Tensor, source: str) -> None:
    found, needed = tuple(tensor.shape), tuple(parameter.shape)
    if found != needed:
        hint = ": it is transposed" if found == needed[::-1] else ""
        raise StorageError(f"{source}: {name!r} has shape {found}, the model needs {needed}{hint}")
    if not tensor.is_floating_point():
        raise StorageError(f"{source}: {name!r} must hold floating-point numbers, not {tensor.dtype}")


def _gradient(tensor: Tensor, parameter: Tensor, kind: str, rate: float) -> Tensor:
    """In the tensor's own type: from its rounding the attack tells how exact the numbers are."""
    if kind == "gradient":
        return tensor
    moved = tensor.double() if kind == "difference" else tensor.double() - parameter.detach().cpu().double()
    return (moved / -rate).to(tensor.dtype)
