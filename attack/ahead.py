"""What the server knows before the first step: read from the update, unmixed, inferred, or granted."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from attack.local.as_gradient import judged
from attack.local.closed_system import is_one_pass
from attack.local.first_layer import NoSuchLayerError, read_first_layer
from attack.local.local_labels import LocalLabels, labels_by_trial
from attack.local.passes import read_in_passes
from attack.match.activations import says_enough
from attack.match.followed import known_activations
from attack.match.unbounded import unbounded_pixels
from attack.prepare import FOLLOWED, Known, all_labels
from attack.published.ica import unmixed_features
from attack.published.labels import infer_labels
from attack.read.by_positions import NoEmbeddingError, VagueImageError, read_by_positions
from attack.read.clip_factor import unscaled, weighed
from attack.read.evidence import of_features, of_fitted_pixels, of_moments, of_pixels
from attack.read.last_convolution import labels_of_last_convolution
from attack.read.layer_rows import restored_rows
from attack.read.quotient_labels import classes_of_signs, labels_of_quotients
from attack.read.reader import OUT_OF_TIME, READING_WORK, read_layers
from attack.read.reading import Reading, ReadingAbortedError
from attack.read.signals import Signals
from attack.read.tokens import read_tokens
from attack.solve.budget import OutOfTimeError, WorkBudget
from network.chain import input_shapes, is_walked, mixes_images, modules
from network.head import Head
from network.tracing import stages
from network.zoo import place_of
from update import checked
from update.evidence import Evidence, contradictions
from update.shared import SharedUpdate
from update.training import Order

READS = ("auto", "on")  # values of --signals with which single images are sought

# Share of the update that a trial of labels leaves, beyond which the declared training is doubted: five steps of plain
# SGD leave 4e-4 on a small network, five with momentum 0.57, five of Adam 0.85.
FOREIGN = 0.5

ATTEMPT = 0.1  # of a reading's work, with which several steps are tried as one gradient

# Entries of a checkpoint that say what was known before the first step.
KEPT = (
    "signals", "signals_seconds", "is_aborted", "start", "inputs", "drift", "in_steps", "order",
    "uses", "is_explained", "likely", "pixels", "held", "local_labels", "layers", "evidence",
)  # fmt: skip


@dataclass(frozen=True)
class Means:
    """How the server goes about it.

    Attributes:
        signals: as --signals: auto, on, off or ica.
        label_strategy: as --label_strategy.
        max_seconds: after which a reading, or a search for labels, is aborted.
        tick: called now and then while either goes on.
        granted: the true labels (B,), where --label_strategy known grants them.
        say: called with a line on what goes on, where that has one.
    """

    signals: str
    label_strategy: str
    max_seconds: float
    tick: Callable[[], object]
    granted: Tensor | None = None
    say: Callable[[str], object] = str

    @property
    def reads(self) -> bool:
        """Whether single images are sought in the update."""
        return self.signals in READS


def with_scale(
    update: SharedUpdate, model: nn.Module, generator: torch.Generator, *, reads: bool
) -> tuple[SharedUpdate, float | None]:
    """The update as long as it was before its clients shortened it, and the factor that undoes that.

    The factor is None where they did not, or where nothing tells it. Class weights are taken relative to the batch's
    where single images are read.
    """
    if reads and update.training.is_plain:
        update = weighed(update, model, generator=generator)
    if not update.is_rescaled:
        return update, None
    try:
        return unscaled(update, model, generator=generator)
    except (ValueError, RuntimeError, ArithmeticError):  # a singular system, say: the attack goes on
        return update, None


def read_ahead(update: SharedUpdate, model: nn.Module, means: Means, generator: torch.Generator) -> Known:
    """Signals, features, labels and single tokens that are known before the first step.

    Raises:
        ValueError: --signals on or ica, or a --label_strategy, and model or update do not permit it.
    """
    clock = WorkBudget(deadline=time.perf_counter() + means.max_seconds, tick=means.tick)
    known = _read_ahead(update, model, means, generator, clock)
    if not means.reads or not update.training.is_gradient or known.pixels is not None:
        return known
    tokens = read_tokens(update, model, clock, generator, known.features, known.likely)
    told = {row["layer"] for row in tokens.rows}
    layers = [*tokens.rows, *(row for row in known.layers if row["layer"] not in told)]
    facts = {"seconds": known.seconds + tokens.seconds, "is_aborted": known.is_aborted or tokens.is_aborted}
    facts |= {"likely": tokens.likely, "held": tokens.held}
    return replace(known, layers=layers, recovered={**known.recovered, **tokens.found}, **facts)


def _read_ahead(
    update: SharedUpdate, model: nn.Module, means: Means, generator: torch.Generator, clock: WorkBudget
) -> Known:
    reading, failure, features = None, None, torch.empty(0)
    if means.reads:
        try:
            reading = _read(update, model, means, generator, clock)
        except ValueError as error:
            failure = error
    elif means.signals == "ica":
        try:
            features = unmixed_features(update, model, generator=generator)
        except ValueError as error:
            raise ValueError(f"--signals ica: {error}") from None
    labels = infer_labels(means.label_strategy, update, model, means.granted)
    if labels is None and means.reads and update.training.is_quotient:
        labels = labels_of_quotients(update, model)
    is_in_part = reading is not None and reading.in_steps and len(reading) < update.batch_size
    seeks_labels = reading is None or is_in_part
    local_labels = _local_labels(update, model, means, generator, labels, clock) if seeks_labels else None
    if labels is None and means.reads and reading is None and not (local_labels and local_labels.is_believed):
        labels = _classes(update, model)
    reading = reading or _by_labels(update, model, means, generator, local_labels, clock)
    if reading is None and failure is not None and means.signals == "on":
        raise ValueError(f"--signals on: {failure}")
    is_aborted, signals = isinstance(failure, ReadingAbortedError), None if reading is None else reading.signals
    steps = _steps(update, len(reading)) if reading and reading.in_steps else ()
    known = _known(update, model, signals, features, labels, local_labels, steps)
    if reading is None:
        why_not = "" if failure is None else str(failure)
        return replace(known, is_aborted=is_aborted, why_not=why_not, evidence=tuple(_of_trial(local_labels)))
    names = ("layers", "recovered", "seconds", "is_aborted", "drift", "order", "uses", "is_explained", "likely")
    facts = {name: getattr(reading, name) for name in (*names, "pixels")}
    known = _at_stage(replace(known, **facts), update, model, reading.start, reading.inputs)
    evidence = [*_evidence(update, model, reading, generator), *_of_trial(local_labels)]
    if not contradictions((*update.evidence, *evidence)):  # a client that is another anyway puts pixels anywhere
        evidence += _of_unread_pixels(update, model, known, clock)
    return replace(known, evidence=tuple(evidence))


def _classes(update: SharedUpdate, model: nn.Module) -> Tensor | None:
    """Labels of some of the images, in no order, where nothing tells all of them; None where nothing tells any."""
    try:
        return classes_of_signs(update, model)
    except ValueError:  # the model ends in another layer than a linear one
        return None


def _of_trial(found: LocalLabels | None) -> Iterator[Evidence]:
    """A word on a declared training that no labels fit."""
    if found is not None and found.distance > FOREIGN:
        said = (
            f"the declared training, tried on grey images, leaves {found.distance:.2g} of the update with the best "
            "labels: the client's optimiser, its rate, its steps or its minibatches may be others"
        )
        yield Evidence("training", said, found.distance)


def _evidence(
    update: SharedUpdate, model: nn.Module, reading: Reading, generator: torch.Generator
) -> Iterator[Evidence]:
    """What was read, against what was assumed."""
    yield from reading.doubts
    yield from of_moments(update, model, reading.start, reading.inputs)
    out_of_range = [] if reading.start else of_pixels(reading.inputs.reshape(-1, *update.image_shape))
    yield from out_of_range or of_features(reading.signals.values, model, update.image_shape, generator)


def _of_unread_pixels(update: SharedUpdate, model: nn.Module, known: Known, clock: WorkBudget) -> list[Evidence]:
    """A word on pixels that no equations give, from the images' activations, where these are certain."""
    says = known.says_enough and known.uncertainty <= FOLLOWED and update.training.is_plain
    if known.start == 0 or not says:
        return []
    try:
        return of_fitted_pixels(*unbounded_pixels(known_activations(update, model, known), clock.check))
    except OutOfTimeError:
        return []


def known_again(
    update: SharedUpdate, model: nn.Module, means: Means, generator: torch.Generator, began: Mapping
) -> Known:
    """What a resumed run knew when it began, from the checkpoint that it `began` with. Every entry is checked first.

    Raises:
        ValueError: as `read_ahead`, or an entry of the checkpoint is damaged or of another run.
    """
    checked.mapping(began, "the checkpoint", KEPT)
    drift = began["drift"] if began["drift"] is None else checked.real(began["drift"], "drift", 0, finite=False)
    facts = {
        "layers": restored_rows(began["layers"]),
        "seconds": checked.real(began["signals_seconds"], "signals_seconds", 0),
        "is_aborted": checked.switch(began["is_aborted"], "is_aborted"),
        "order": _order(began["order"], update),
        "is_explained": checked.switch(began["is_explained"], "is_explained"),
        "likely": began["likely"],
    }
    lists = {name: checked.sequence(began[name], name) for name in ("uses", "held")}
    facts |= {name: tuple(checked.whole(u, name, 0, update.batch_size - 1) for u in of) for name, of in lists.items()}
    if facts["likely"] is not None:
        checked.tensor(facts["likely"], "likely", (update.batch_size, *update.image_shape), torch.float64)
    signals = local_labels = None
    if began["signals"] is not None:
        signals = Signals.restored(began["signals"], Head.of(model).layer, update.batch_size)
    if began["local_labels"] is not None:
        local_labels = LocalLabels.restored(began["local_labels"], update.batch_size, update.num_classes)
    features = torch.empty(0)
    if signals is None and means.signals == "ica":
        features = unmixed_features(update, model, generator=generator)
    labels = infer_labels(means.label_strategy, update, model, means.granted)
    in_steps = checked.switch(began["in_steps"], "in_steps") and signals is not None
    steps = _steps(update, len(signals)) if in_steps else ()
    known = _known(update, model, signals, features, labels, local_labels, steps)
    if signals is not None:
        chain = stages(model)
        start = checked.whole(began["start"], "start", most=len(chain) - 1)
        shape = (len(facts["uses"] or signals), *input_shapes(chain, update.image_shape)[start])
        known = replace(known, pixels=_pixels(began["pixels"], len(signals), update, place_of(model)["dtype"]))
        known = _at_stage(known, update, model, start, checked.tensor(began["inputs"], "inputs", shape, torch.float64))
    evidence = tuple(_piece(piece) for piece in checked.sequence(began["evidence"], "evidence"))
    return replace(known, drift=drift, evidence=evidence, **facts)


def _pixels(held: object, most: int, update: SharedUpdate, dtype: torch.dtype) -> Tensor | None:
    """The images that were known, at `most` so many, from a checkpoint."""
    if held is None:
        return None
    count = min(len(held), most) if isinstance(held, Tensor) and held.dim() else most
    return checked.tensor(held, "pixels", (count, *update.image_shape), dtype)


def _order(held: object, update: SharedUpdate) -> Order | None:
    """The images of each step from a checkpoint."""
    if held is None:
        return None
    order = checked.order(held, "order", update.batch_size)
    if len(order) != update.training.steps:
        raise checked.DamagedError(f"order has {len(order)} steps, the training {update.training.steps}")
    return order


def _piece(held: object) -> Evidence:
    """A piece of evidence from a checkpoint."""
    held = checked.mapping(held, "a piece of evidence", tuple(vars(Evidence("", ""))))
    for name in ("topic", "said", "overrules"):
        checked.word(held[name], f"evidence.{name}")
    if held["figure"] is not None:
        checked.real(held["figure"], "evidence.figure", finite=False)
    return Evidence(**{**held, "contradicts": checked.switch(held["contradicts"], "evidence.contradicts")})


def _known(
    update: SharedUpdate,
    model: nn.Module,
    signals: Signals | None,
    features: Tensor,
    labels: Tensor | None,
    local_labels: LocalLabels | None,
    steps: Sequence[int],
) -> Known:
    """Signals, features at the server's weights, and labels, where the model is."""
    place = place_of(model)
    if signals is not None:
        signals = signals.to(place["device"])
        of_all = not (steps and mixes_images(model.modules()))  # else each step's images are a batch of their own
        features = signals.values[: (steps.count(0) if steps else None) if of_all else 0]
    if local_labels and local_labels.is_believed:
        labels = local_labels.labels.to(place["device"])
    labels = all_labels(signals, labels, update.training.sizes_of(update.batch_size) if steps else ())
    return Known(update.batch_size, signals, features.to(**place), labels, local_labels=local_labels, steps=steps)


def _steps(update: SharedUpdate, count: int) -> list[int]:
    """The steps of so many images, in the order of the steps."""
    return [step for step, size in enumerate(update.training.sizes_of(update.batch_size)) for _ in range(size)][:count]


def _at_stage(known: Known, update: SharedUpdate, model: nn.Module, start: int, inputs: Tensor) -> Known:
    """With the inputs (N, ...) of the deepest stage that are known of the images whose signals were read."""
    place, below = place_of(model), stages(model)[:start]
    inputs = inputs.to(place["device"])
    pixels = known.pixels if start else inputs.reshape(-1, *update.image_shape)
    pixels = None if pixels is None else pixels.clamp(0, 1).to(**place)
    each = is_walked(below) and not mixes_images(modules(below))  # else followed at the server's weights, all at once
    enough = says_enough(below, update.image_shape, inputs) and (each or not known.in_steps)
    return replace(known, start=start, inputs=inputs, pixels=pixels, says_enough=enough)


def _read(
    update: SharedUpdate,
    model: nn.Module,
    means: Means,
    generator: torch.Generator,
    clock: WorkBudget,
) -> Reading:
    """A reading of the update: by a transformer's position embedding, or layer by layer.

    Raises:
        ValueError: nothing can be read; the message says why.
    """
    try:
        return read_by_positions(update, model)
    except NoEmbeddingError:
        return _read_layers(update, model, means, generator, clock)
    except ValueError as error:
        try:
            found = _read_layers(update, model, means, generator, clock)
            return replace(found, likely=error.image) if isinstance(error, VagueImageError) else found
        except ValueError as other:
            raise type(other)(f"{error}; {other}") from None


def _read_layers(
    update: SharedUpdate, model: nn.Module, means: Means, generator: torch.Generator, clock: WorkBudget
) -> Reading:
    """A reading of the layers: of several steps at a fully connected first layer, else along the way.

    Raises:
        ValueError: nothing can be read; the message says why.
    """
    if update.training.is_gradient:
        return read_layers(update, model, **_limits(means, generator, clock))
    try:
        return read_first_layer(update, model, generator=generator, budget=clock)
    except NoSuchLayerError:
        return _along_the_way(update, model, means, generator, clock)
    except OutOfTimeError:
        raise ReadingAbortedError(OUT_OF_TIME) from None
    except ValueError as error:
        try:
            return _along_the_way(update, model, means, generator, clock)
        except ValueError as other:
            raise type(other)(f"{error}; {other}") from None


def _limits(means: Means, generator: torch.Generator, clock: WorkBudget) -> dict[str, object]:
    left = max(0.0, clock.deadline - time.perf_counter())
    return {"generator": generator, "max_seconds": left, "tick": means.tick}


def _along_the_way(
    update: SharedUpdate, model: nn.Module, means: Means, generator: torch.Generator, clock: WorkBudget
) -> Reading:
    """A reading of several steps: of one pass or several step by step, of other trainings as a gradient.

    Raises:
        ValueError: nothing can be read, or the training does not replay on what was.
    """
    how = _limits(means, generator, clock)
    if hidden := update.training.hidden:
        raise ValueError(f"several steps moved what is hidden ({', '.join(hidden)}), and with it all else")
    if is_one_pass(update.training):
        try:
            return read_layers(update, model, in_steps=True, **how)
        except ValueError as error:
            if isinstance(error, ReadingAbortedError):
                raise
    elif update.training.passes > 1:
        read = partial(read_layers, in_steps=True, work=ATTEMPT * READING_WORK, **how)
        with contextlib.suppress(ValueError):
            return read_in_passes(update, model, read)
    return _as_gradient(update, model, **how)


def _by_labels(
    update: SharedUpdate,
    model: nn.Module,
    means: Means,
    generator: torch.Generator,
    found: LocalLabels | None,
    clock: WorkBudget,
) -> Reading | None:
    """A reading of the head in one pass from labels and minibatches that were found by trial; None where it fails."""
    if found is None or not (means.reads and found.is_believed and is_one_pass(update.training)):
        return None
    how = _limits(means, generator, clock)
    try:
        return read_layers(update, model, in_steps=True, labels=found.labels, **how)
    except ValueError:
        return None


def _as_gradient(update: SharedUpdate, model: nn.Module, **how: object) -> Reading:
    """A reading of an update that may have drifted a little: of all images or none, and no surer than the drift.

    Raises:
        ValueError: nothing can be read, or the training does not replay on what was.
    """
    reading = read_layers(update, model, work=ATTEMPT * READING_WORK, **how)
    if len(reading) < update.batch_size:
        raise ValueError(f"{len(reading)} of {update.batch_size} images told apart after local training, not all")
    found = judged(update, model, reading.start, reading.inputs, reading.signals.labels)
    if found.is_one_step:
        said = (
            f"the declared training, replayed above the images that were told apart, leaves {found.left:.2g} of the "
            f"update, and one step {found.left_by_one:.2g}: the client made one step"
        )
        return replace(reading, doubts=(Evidence("training", said, found.left, contradicts=True),))
    if not found.is_certified:
        raise ValueError(f"replayed on the images of a gradient, the training leaves {found.left:.2g} of the update")
    return replace(reading, signals=found.drifted(reading.signals), drift=found.drift, doubts=())


def _local_labels(
    update: SharedUpdate,
    model: nn.Module,
    means: Means,
    generator: torch.Generator,
    labels: Tensor | None,
    clock: WorkBudget,
) -> LocalLabels | None:
    """Labels by trial after several steps, or the order of those that are known; None where there is no use for one.

    Of one step, the labels that a last convolution tells, where the model has no linear head to be read.
    """
    training = update.training
    if training.is_gradient and means.reads and labels is None:
        return labels_of_last_convolution(update, model, generator)
    needed = training.batches > 1 if labels is not None else means.reads
    if training.is_gradient or not needed:
        return None
    try:
        return labels_by_trial(update, model, generator, labels, budget=clock, say=means.say)
    except ValueError:
        return None
