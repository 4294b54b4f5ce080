"""The tensors that a client of any framework sent, and the averaged gradient that they stand for.

gradient     the averaged gradient itself
difference   new weights - old weights, which most servers average
weights      the new weights, which a Flower client returns

A difference is -rate times the averaged gradient, with rate the learning rate times the local steps. After several
steps the averaged gradient is a mean along the way; momentum, weight decay and the like decide on its weights, see
`update.training.Combination`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from network.parameters import trainable
from update.batchnorm import statistic_names
from update.layouts import hint, in_torch_layout
from update.names import by_names_of
from update.storage import StorageError
from update.training import Combination

KINDS = ("gradient", "difference", "weights")


def recognised(
    tensors: Mapping[str, Tensor], model: nn.Module, image_shape: Sequence[int], source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """A file's tensors by the model's names and in torch's layout, and a note on each thing that had to change.

    Args:
        tensors: by name, with or without a wrapper's prefix, or numbered; in torch's layout or in Keras's.
        model: with the parameters that the client does not train frozen.
        image_shape: (C, H, W).
        source: the file's name in messages.

    Raises:
        StorageError: the tensors can be taken for none of the model's lists, or for more than one.
    """
    by_name, notes = by_names_of(model, tensors, list(trainable(model)), source)
    turned, more = in_torch_layout(by_name, model, image_shape, source)
    return turned, notes + more


def averaged_gradients(
    tensors: dict[str, Tensor], model: nn.Module, kind: str, combination: Combination, source: str
) -> dict[str, Tensor]:
    """The averaged gradient of every trainable parameter, by name and in the model's order.

    Args:
        tensors: by the model's names, see `recognised`. Buffers and frozen parameters may be among the tensors, and
            are ignored.
        model: the model with the weights that the server sent out.
        kind: one of `KINDS`.
        combination: of which the new weights are, by the client's training; without meaning for gradients.
        source: the file's name in messages.

    Raises:
        StorageError: the tensors are not the model's; the message names the first parameter that does not fit.
    """
    parameters, state = trainable(model), model.state_dict()
    if not tensors.keys() & state.keys():
        begins, first = f"begins with {next(iter(tensors))!r}" if tensors else "holds nothing", next(iter(state))
        raise StorageError(f"{source}: it has none of the model's parameters: it {begins}, the model with {first!r}")
    for name, parameter in parameters.items():
        if name not in tensors:
            raise StorageError(
                f"{source}: {name!r} is missing; name it with --frozen if the client does not train it, with --hidden "
                "if it is encrypted"
            )
        _check_fit(name, tensors[name], parameter, source)
    for name in tensors:
        if name not in state:
            raise StorageError(f"{source}: {name!r} is not in the model, which begins with {next(iter(state))!r}")
    return {name: _gradient(tensors[name], parameter, kind, combination) for name, parameter in parameters.items()}


def new_weights(tensors: dict[str, Tensor], model: nn.Module, kind: str) -> dict[str, Tensor]:
    """The client's new weights in float64, by name; none where gradients were sent.

    A difference that was formed of rounded weights gives these back, but for its own rounding, which is undone.

    Args:
        tensors, model, kind: as in `averaged_gradients`.
    """
    if kind == "gradient":
        return {}
    if kind == "weights":
        return {name: tensors[name].double() for name in trainable(model)}
    return {name: _moved(parameter.detach().cpu(), tensors[name]) for name, parameter in trainable(model).items()}


def _moved(old: Tensor, difference: Tensor) -> Tensor:
    """Weights after a step, rounded as the old ones are where the difference is one of so rounded weights."""
    new = old.double() + difference.double()
    rounded = new.to(old.dtype).double()
    own = torch.finfo(difference.dtype).eps * difference.double().abs()
    return rounded if bool(((rounded - new).abs() <= own).all()) else new


def statistics(tensors: dict[str, Tensor], model: nn.Module, kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """BatchNorm's running statistics after training, and its counts of batches, by buffer name.

    A file of weights or of their difference may hold them; beside gradients there are no buffers, and none are found.

    Args:
        tensors, model, kind: as in `averaged_gradients`.
    """
    if kind == "gradient":
        return {}, {}
    state = model.state_dict()
    counts = [name for name in state if name.endswith(".num_batches_tracked")]
    found, counted = ({n: tensors[n] for n in names if n in tensors} for names in (statistic_names(model), counts))
    if kind == "difference":
        found, counted = ({n: state[n] + moved for n, moved in each.items()} for each in (found, counted))
    return found, counted


def _check_fit(name: str, tensor: Tensor, parameter: Tensor, source: str) -> None:
    found, needed = tuple(tensor.shape), tuple(parameter.shape)
    if found != needed:
        raise StorageError(f"{source}: {name!r} has shape {found}, the model needs {needed}{hint(found, needed)}")
    if not tensor.is_floating_point():
        raise StorageError(f"{source}: {name!r} must hold floating-point numbers, not {tensor.dtype}")


def _gradient(tensor: Tensor, parameter: Tensor, kind: str, combination: Combination) -> Tensor:
    """In the tensor's own type: from its rounding the attack tells how exact the numbers are."""
    if kind == "gradient":
        return tensor
    old = parameter.detach().cpu().double()
    moved = tensor.double() if kind == "difference" else tensor.double() - old
    return combination.of_move(old, moved).to(tensor.dtype)
