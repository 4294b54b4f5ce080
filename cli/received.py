"""The update in the file of --update: this program's own, or tensors of any framework with the facts in flags."""

import argparse
from dataclasses import replace

from torch import nn

from attack.read.batch_size import count_images
from cli.flags import checked_value
from cli.model import local_training, model_options, parse_names, server_model
from cli.settings import facts_of
from network.outside import is_file
from network.parameters import freeze, named_by, trainable
from network.zoo import ALL_OPTIONS
from update.received import averaged_gradients, statistics
from update.shared import FACTS, SharedUpdate, is_of_update
from update.storage import StorageError, read_tensors, read_text, room_for
from update.training import use_batch_statistics
from update.weights import load_weights


def received_update(settings: argparse.Namespace, place: dict) -> tuple[SharedUpdate, nn.Module]:
    """The update and the model behind it, at the `place` of the attack.

    Raises:
        ValueError: the file cannot be read, or a tensor does not fit the model; the message names the first such
            tensor.
    """
    text = read_text(settings.update)
    update, model = _own(text, settings) if FACTS in text else _foreign(settings)
    if update.training.uses_batch_statistics:
        use_batch_statistics(model)
        update.batch_statistics(model)  # raises on statistics that do not fit
    return update, model.to(**place)


def _own(text: dict[str, str], settings: argparse.Namespace) -> tuple:
    """A file of --save_update, which brings its facts; parameters without a gradient in the file are frozen."""
    update = SharedUpdate.stated(text, settings.update)
    update = _with_checked_facts(update, settings)
    if settings.frozen or settings.update_kind != "gradient":
        raise ValueError(f"--update {settings.update} says itself which gradients it holds: no --frozen, --update_kind")
    if is_file(update.model):
        if not is_file(settings.model):
            raise ValueError(
                f"the update is of {update.model}, which is run only if you name it: --model {update.model}"
            )
        update = replace(update, model=settings.model)
    model = server_model(settings, update.model, update.image_shape, update.num_classes, update.options)
    tensors, _ = read_tensors(settings.update, wanted=is_of_update, most=room_for(model))
    update = update.holding(tensors, settings.update)
    if update.weights and not settings.weights:
        load_weights(model, update.weights, settings.update)
    freeze(model, [name for name, _ in model.named_parameters() if name not in update.gradients])
    update.targets(model)  # raises on an update that does not fit
    in_order = {name: update.gradients[name] for name in trainable(model)}  # the client's order; files keep another
    return replace(update, gradients=in_order), model


def _with_checked_facts(update: SharedUpdate, settings: argparse.Namespace) -> SharedUpdate:
    """The update, the facts that it brings checked as the flags of their names are, its options as these are read.

    Raises:
        StorageError: a fact is none that its flag takes.
    """
    try:
        unknown = [name for name in update.options if name not in ALL_OPTIONS]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no option of a model")
        facts = facts_of(update, settings).items()
        read = {name: checked_value(name, value) for name, value in facts if value is not None}
        return replace(update, options={name: read[name] for name in update.options if name in read})
    except ValueError as error:
        raise StorageError(f"{settings.update}: {error}") from None


def _foreign(settings: argparse.Namespace) -> tuple:
    """A file that holds tensors alone; flags give the facts."""
    source = settings.update
    if settings.image_size is None:
        raise ValueError(f"{source} does not say how large its images are: set --image_size, and --channels if not 3")
    if not settings.weights and not is_file(settings.model):
        raise ValueError(f"{source} does not hold the model's weights: set --weights to those that the server sent out")
    shape = (settings.channels, settings.image_size, settings.image_size)
    rate, training = _rate(settings), local_training(settings)
    options = model_options(settings)
    model = server_model(settings, settings.model, shape, settings.num_classes, options)
    freeze(model, named_by(model, parse_names(settings.frozen)))
    tensors, _ = read_tensors(source, most=room_for(model))
    update = SharedUpdate(
        gradients=averaged_gradients(tensors, model, settings.update_kind, rate, source),
        weights={},
        model=settings.model,
        batch_size=settings.batch_size or 1,
        image_shape=shape,
        num_classes=settings.num_classes,
        options=options,
        training=training,
        statistics=statistics(tensors, model, settings.update_kind) if training.batchnorm == "train" else {},
    )
    update.check(source)
    if settings.batch_size is None:
        if not training.is_plain:
            raise ValueError("the batch size is read off one step with BatchNorm in eval mode: set --batch_size")
        update = replace(update, batch_size=count_images(update.gradients, model, shape))
    elif training.is_plain:
        _check_count(update, model)
    training.check(update.batch_size)
    return update, model


def _check_count(update: SharedUpdate, model: nn.Module) -> None:
    """Refuse a batch size below the ranks of the update. Ranks may be lower: some images leave no gradient."""
    try:
        counted = count_images(update.gradients, model, update.image_shape)
    except ValueError:  # the ranks do not tell a batch size
        return
    if counted > update.batch_size:
        raise ValueError(f"--batch_size {update.batch_size}: the update's ranks are those of {counted} images")


def _rate(settings: argparse.Namespace) -> float:
    """The learning rate times the local steps; 1 for gradients, which have no learning rate."""
    if settings.update_kind == "gradient":
        if settings.local_lr is not None or settings.local_steps > 1:
            raise ValueError("--local_lr and --local_steps belong to --update_kind difference or weights")
        return 1.0
    if settings.local_lr is None:
        raise ValueError(f"--update_kind {settings.update_kind} needs --local_lr, the client's learning rate")
    return local_training(settings).rate * settings.local_steps
