"""The update in the file of --update: this program's own, or tensors of any framework with the facts in flags."""

import argparse
from collections.abc import Collection
from dataclasses import replace

from torch import Tensor, nn

from attack.ahead import READS
from attack.read.batch_size import count_images, noise_of_weights
from attack.read.origin import explained
from cli.console import ReadingBar
from cli.flags import checked_value
from cli.model import model_options, parse_names, server_model, two_classes
from cli.runtime import stream
from cli.settings import facts_of
from client.defences import encrypted
from data import sides
from network.chain import below_norms
from network.head import Head
from network.one_logit import of_two_logits
from network.outside import is_file
from network.parameters import freeze, named_by, trainable
from network.tracing import stages_if_walked
from network.zoo import ALL_OPTIONS
from update.batchnorm import use_batch_statistics
from update.declared import declared
from update.evidence import Evidence
from update.examined import of_gradients
from update.norm_modes import of_orthogonality, of_statistics
from update.received import averaged_gradients, new_weights, recognised, statistics
from update.shared import FACTS, SharedUpdate, is_of_update
from update.storage import ENTERED, StorageError, read_tensors, read_text, room_for
from update.training import LocalTraining
from update.weights import load_weights

CHANGED = ("entries", "optimiser", "kind")  # topics of evidence that leaves ranks and suppositions without a meaning
UNRANKED = (*CHANGED, "decay")  # and of what leaves ranks without one: it was subtracted, but for rounding


def received_update(
    settings: argparse.Namespace, place: dict, given: Collection[str] = ()
) -> tuple[SharedUpdate, nn.Module]:
    """The update and the model behind it, at the `place` of the attack; `given` names the settings given by hand.

    What the update says of how it was made is compared with the settings, see `update.evidence`, and where no image
    fits the client as declared, others are supposed, see `attack.read.origin`.

    Raises:
        ValueError: the file cannot be read, or a tensor does not fit the model; the message names the first such
            tensor.
    """
    text = read_text(settings.update)
    is_own = FACTS in text
    update, model = _own(text, settings) if is_own else _foreign(settings, given)
    if update.training.uses_batch_statistics:
        use_batch_statistics(model, update.training.frozen_norms)
        update.batch_statistics(model)  # raises on statistics that do not fit
    model = model.to(**place)
    is_changed = any(piece.topic in CHANGED for piece in update.evidence)
    if not (is_own or is_changed or update.is_rescaled) and settings.signals in READS and update.training.is_plain:
        with ReadingBar(quiet=settings.quiet) as bar:
            how = {"nominal": settings.batch_size, "generator": stream(settings.seed, "origin"), "tick": bar.update}
            update = explained(update, model, **how)
    return update, model


def _examined(
    update: SharedUpdate, model: nn.Module, settings: argparse.Namespace, rounding: dict[str, Tensor] | None = None
) -> SharedUpdate:
    """The update as its own numbers say that it was made, with the evidence."""
    if not update.training.is_gradient:
        return update
    gradients, evidence = of_gradients(
        update.gradients,
        model,
        loss=update.training.loss,
        rate=None if settings.update_kind == "gradient" else settings.local_lr,
        rounding=rounding,
        is_defended=update.defence != "none",
    )
    pairs = below_norms(stages_if_walked(model) or [])
    evidence = evidence or of_orthogonality(gradients, pairs, model, update.training)
    return replace(update, gradients=gradients, evidence=(*update.evidence, *evidence))


def _own(text: dict[str, str], settings: argparse.Namespace) -> tuple:
    """A file of --save_update, which brings its facts; parameters without a gradient in the file are frozen."""
    update = SharedUpdate.stated(text, settings.update)
    update = _with_checked_facts(update, settings)
    if settings.defended:
        raise ValueError(f"--update {settings.update} says itself how it was defended: no --defended")
    if settings.frozen or settings.update_kind != "gradient":
        raise ValueError(f"--update {settings.update} says itself which gradients it holds: no --frozen, --update_kind")
    if is_file(update.model):
        if not is_file(settings.model):
            raise ValueError(
                f"the update is of {update.model}, which is run only if you name it: --model {update.model}"
            )
        update = replace(update, model=settings.model)
    notes: list[str] = []
    facts = (update.model, update.image_shape, update.num_classes, update.options)
    model = server_model(settings, *facts, notes.append)
    model, _, _ = two_classes(model, update.training, update.model, update.image_shape)
    tensors, _ = read_tensors(settings.update, wanted=is_of_update, most=room_for(model))
    update = update.holding(tensors, settings.update)
    if update.weights and not settings.weights:
        load_weights(model, update.weights, settings.update)
        notes.clear()  # on weights that were drawn
    freeze(model, [name for name, _ in model.named_parameters() if name not in update.gradients])
    update.targets(model)  # raises on an update that does not fit
    update = encrypted(update, model, parse_names(settings.hidden))
    in_order = {name: update.gradients[name] for name in trainable(model)}  # the client's order; files keep another
    update = replace(update, gradients=in_order, notes=tuple(notes))
    return _examined(update, model, settings), model


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
        read = {n: checked_value(n, value) for n, value in facts if value is not None and not isinstance(value, bool)}
        return replace(update, options={name: read[name] for name in update.options if name in read})
    except ValueError as error:
        raise StorageError(f"{settings.update}: {error}") from None


def _foreign(settings: argparse.Namespace, given: Collection[str]) -> tuple:
    """A file that holds tensors alone; flags give the facts."""
    source, notes = settings.update, []
    if settings.image_size is None:
        raise ValueError(
            f"{source} does not say how large its images are: set --image_size (24 or 16x24), and --channels if not 3"
        )
    if not settings.weights and not is_file(settings.model):
        raise ValueError(f"{source} does not hold the model's weights: set --weights to those that the server sent out")
    shape = (settings.channels, *sides(settings.image_size))
    training = _declared(settings)
    options = model_options(settings)
    model = server_model(settings, settings.model, shape, settings.num_classes, options, notes.append)
    unseen = parse_names(settings.hidden)
    frozen = named_by(model, parse_names(settings.frozen))
    training = training.hiding(name for name in named_by(model, unseen) if name not in frozen)
    freeze(model, [*frozen, *named_by(model, unseen)])
    tensors, text = read_tensors(source, most=room_for(model))
    notes += [text[ENTERED]] if ENTERED in text else []
    tensors, said = recognised(tensors, model, shape, source)
    combination = training.combination()
    gradients = averaged_gradients(tensors, model, settings.update_kind, combination, source)
    rounding = noise_of_weights(new_weights(tensors, model, settings.update_kind), combination.total)
    found, counted = statistics(tensors, model, settings.update_kind)
    if training.batchnorm == "train" and settings.update_kind == "gradient":
        raise ValueError("--bn train: gradients come without running statistics; --bn train_private if so")
    training, evidence = of_statistics(found, counted, model, training, given)
    model, training, as_two = two_classes(model, training, settings.model, shape)
    if as_two:
        gradients, rounding = (of_two_logits(each, Head.of(model)) for each in (gradients, rounding))
    update = SharedUpdate(
        gradients=gradients,
        weights={},
        model=settings.model,
        batch_size=settings.batch_size or 1,
        image_shape=shape,
        num_classes=settings.num_classes,
        options=options,
        training=training,
        statistics=found if training.batchnorm == "train" else {},
        defence=settings.defended or "none",
        evidence=(*evidence, *as_two),
        notes=(*notes, *said),
    )
    update.check(source)
    update = encrypted(update, model, unseen)
    update = _examined(update, model, settings, rounding)
    if settings.batch_size is None:
        if not training.is_plain:
            raise ValueError("the batch size is read off one step with BatchNorm in eval mode: set --batch_size")
        counted = count_images(update.gradients, model, shape, rounding)
        if not counted.is_exact:
            raise ValueError(f"the update is of {counted}, and noise may hide others: set --batch_size")
        update = replace(update, batch_size=counted.images)
    elif training.is_plain and not any(piece.topic in UNRANKED for piece in update.evidence):
        update = _counted(update, model, rounding, reads=settings.signals in READS)
    training.check(update.batch_size)
    return update, model


def _counted(update: SharedUpdate, model: nn.Module, rounding: dict[str, Tensor], *, reads: bool) -> SharedUpdate:
    """The update with the batch size that its ranks show, where that is smaller than the declared one.

    Raises:
        ValueError: the ranks are those of more images than were declared, and single images are to be read.
    """
    declared = update.batch_size
    try:
        counted = count_images(update.gradients, model, update.image_shape, rounding)
    except ValueError:  # the ranks do not tell a batch size
        return update
    said, images = f"its ranks are those of {counted}, --batch_size says {declared}", counted.images
    if images > declared and reads:
        raise ValueError(f"--batch_size {declared}: the update's ranks are those of {counted}")
    if images > declared:
        evidence = Evidence("batch size", said, images, contradicts=True)
        return replace(update, evidence=(*update.evidence, evidence))
    if images == declared or not counted.is_exact:
        return update
    evidence = Evidence("batch size", f"{said}: it is taken for {images}", images, overrules="batch_size")
    return replace(update, batch_size=images, evidence=(*update.evidence, evidence))


def _declared(settings: argparse.Namespace) -> LocalTraining:
    """How the client is said to have trained.

    Raises:
        ValueError: gradients are said to come of several steps, or weights of a rate that is not said.
    """
    training = declared(vars(settings))
    if settings.update_kind == "gradient":
        if training.rate is not None or not training.is_gradient:
            raise ValueError("--local_lr and --local_steps belong to --update_kind difference or weights")
    elif training.rate is None:
        raise ValueError(f"--update_kind {settings.update_kind} needs --local_lr, the client's learning rate")
    return training
