"""What a person sees in the terminal: what is attacked and how, progress, and S(t) on request."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn
from tqdm import tqdm

from attack.again import SEEN
from attack.prepare import Known
from attack.read.forecast import explain
from attack.read.tokens import TOLD
from cli.model import model_options, server_model, two_classes
from cli.runtime import INTERRUPTED
from cli.settings import clients_of, privacy_of
from data import sides
from judge.pictures import save_leaks, save_schedule
from judge.recorder import summary
from judge.report import read_facts
from judge.run_directory import RunDirectory
from judge.tables import aligned, markdown, write_csv
from judge.verdict import NAMES, percent
from network.chain import first_layer
from network.embedding import patch_embedding
from network.head import Head
from network.parametrised import why_no_gradient
from network.perceptrons import lowest, perceptrons
from network.tracing import stages, why_not_walked
from schedules import Schedule
from update.batchnorm import use_batch_statistics
from update.declared import declared
from update.evidence import HIDDEN, POLISH, REPLAY, Evidence
from update.shared import SharedUpdate

SIDE = 32  # pixels of an image that nothing is known of
POINTS = 10_000  # of a plot, at most
STILL_ATTACKED = "such a model can still be attacked: the attack loop matches the gradient of all of it"


class Progress(tqdm):
    """A bar of optimiser steps with loss, S and, where truth is known, PSNR."""

    def __init__(self, n_iter: int, step: int, *, quiet: bool) -> None:
        super().__init__(total=n_iter, initial=step, disable=quiet, unit="step", dynamic_ncols=True)

    def __call__(self, row: Mapping) -> None:
        """Advance to the step of this row of the trace."""
        self.update(row["step"] + 1 - self.n)
        psnr = {} if row["psnr_mean"] is None else {"PSNR": f"{row['psnr_mean']:.2f}"}
        self.set_postfix({"loss": f"{row['loss']:.2e}", "S": row["S"]} | psnr)


class ReadingBar(tqdm):
    """A counter of the iterations that the search for signals and labels takes, shown where it exceeds a second."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__(desc="reading signals and labels", unit=" iterations", delay=1, leave=False, disable=quiet)


def introduction(
    update: SharedUpdate,
    settings: argparse.Namespace,
    objective: object,
    known: Known,
    model: nn.Module,
    path: Path,
) -> str:
    """The batch, the objective, what was read, how the client trained if not in one step, and where results go."""
    shape = "x".join(map(str, update.image_shape))
    source = settings.update or f"{settings.dataset}, labels {settings.labels}"
    found = f"signals: none used{_why_not_walked(model) or _why_not_read(known)}"
    if known.signals is not None:
        found = f"signals: {len(known.signals)} of {update.batch_size} images told apart"
        if known.inputs is not None:
            deepest = f"down to the inputs of {first_layer(stages(model)[known.start :])}"
            deepest += f", {known.apart} of them to their pixels" if known.apart else ""
            found += ", " + (deepest if known.start else "pixels and all")
        found += f", in {known.seconds:.1f} s"
        which = "pictures by these" if known.is_followed and not known.held else "the likely image"
        found += f"; the attack begins with {which}" if known.likely is not None else ""
    elif known.local_labels is not None and update.training.is_gradient:
        found += f"; labels counted by the last convolution's bias (they leave {known.local_labels.distance:.2g})"
    told = [row for row in known.layers if TOLD in row["note"] or SEEN in row["note"]]
    found += "".join(f"\n{row['layer']}: {row['note']}" for row in told)
    if known.is_aborted:
        found += ", until --max_seconds stopped the reading: on another machine it may read more, or less"
    found += _how_trained(update, known)
    selection = "" if known.is_followed else f" | {settings.sel_mode}"
    return (
        f"{source}: {update.batch_size} images {shape}{_defended(update, settings)}\n"
        f"{settings.model}, {settings.num_classes} classes{selection} | {objective}\n"
        f"{found}\n"
        f"{settings.optimizer}, {settings.dtype} | {path}"
    )


def show_remarks(evidence: Sequence[Evidence], idle: Sequence[str], notes: Sequence[str], quiet: bool) -> None:
    """Say what the update says of itself, which flags change nothing, and, even if quiet, what was assumed."""
    for piece in evidence if not quiet else ():
        print(f"{'contradiction' if piece.contradicts else 'the update says'}: {piece.said}")
    for line in idle if not quiet else ():
        print(line)
    for note in notes:
        print(f"note: {note}", file=sys.stderr if quiet else sys.stdout)


def _defended(update: SharedUpdate, settings: argparse.Namespace) -> str:
    """What the clients did to the update, and the privacy that it buys; empty where they did nothing."""
    if update.defence == "none":
        return ""
    text = f" | {update.defence}"
    if clients_of(settings) > 1:
        text += f", {clients_of(settings)} clients with {settings.batch_size} each"
    privacy, delta = privacy_of(update, settings), f"delta {settings.dp_delta:g}"
    if "epsilon" in privacy:
        bound = privacy["epsilon"]
        found = "not computed: pip install opacus" if bound is None else f"at most {bound:.3g}"
        text += f", epsilon {found} ({delta}, rate {settings.dp_rate:g}, {settings.dp_rounds} rounds)"
    if "release_epsilon" in privacy:
        text += f", epsilon of one release {privacy['release_epsilon']:.3g} ({privacy['release_level']}, {delta})"
    return text


def _how_trained(update: SharedUpdate, known: Known) -> str:
    """How local training is taken: for one gradient, or unrolled; empty for one step with BatchNorm in eval mode."""
    training, said = update.training, []
    if not training.is_gradient:
        said = [f"{training}, steps x rate {training.steps * training.rate:g}"]
        if known.in_steps:
            said.append("read step by step")
        elif known.is_explained:
            is_open = training.shuffle and training.batches > 1 and known.order is None
            said.append("read at the first layer" + (", whatever the order of the steps" if is_open else ""))
        elif known.is_followed:
            said.append("taken for one gradient" + (f", drift {known.drift:.1e}" if known.drift is not None else ""))
        else:
            said.append("unrolled")
        if known.local_labels is not None:
            use = "labels by trial" if known.local_labels.is_believed else "no labels by trial"
            ended = ", --max_seconds stopped their search" if known.local_labels.is_aborted else ""
            said.append(f"{use} (they leave {known.local_labels.distance:.2g}{ended})")
    if training.uses_batch_statistics:
        frozen = f" but for {', '.join(training.frozen_norms)}" if training.frozen_norms else ""
        said.append(f"BatchNorm in training mode{frozen}, statistics {'shared' if update.statistics else 'kept'}")
    return "".join(f"\n{line}" for line in [", ".join(said)] if said)


def show_end(ended_by: str, figures: Mapping, has_steps: bool, setbacks: int, run: RunDirectory, *, quiet: bool) -> int:
    """Say how an attack ended, what came of it and where the pictures are. Returns the exit status."""
    has_images = has_steps or ended_by == "exact"
    if ended_by == "non-finite":
        print(f"the loss was not finite {setbacks} times: stopped at the best iterate", file=sys.stderr)
    elif not has_images:
        print(f"no step succeeded before {ended_by} ended the attack: the images are its start", file=sys.stderr)
    if not quiet:
        for piece in figures["evidence"]:
            if piece["topic"] in (REPLAY, HIDDEN, POLISH):
                print(f"{'contradiction' if piece['contradicts'] else 'the update says'}: {piece['said']}")
        if why := figures.get("not_replayed"):
            show_note(f"evaluations were launched one by one on the GPU: {why}")
        print(f"verdict: {verdict_line(run.path)}")
        print(_replay_line(figures))
        print(f"report: {run.path}/report.html")
        print(f"pictures: {run.path}/" + ("comparison.png" if "psnr_mean" in figures else "reconstruction.png"))
    print(summary(figures))
    if ended_by in ("interrupt", "abort"):
        return INTERRUPTED
    return int(ended_by == "non-finite" or not has_images or bool(run.failures))


def _replay_line(figures: Mapping) -> str:
    """What the client's training, made again on the pictures, leaves of the update."""
    left = figures["unexplained"]
    said = "no finite number" if left is None else f"{percent(left)} of the update"
    noise = f"noise is {percent(figures['noise_share'])}"
    words = {True: "; the steps on what was read make it", False: "; so nothing is certain", None: ""}
    ending = words[figures["replays"]]
    if figures["replays"] and 0 < figures["signals_found"] < len(figures["labels"]):
        ending = "; images that were told apart make their own parts of it"
    if figures["explains_first_layer"] and not figures["replays"]:
        ending = "; the order of the steps is not known, but the images make all of the first layer's movement"
    return f"replay: the client's training on these pictures leaves {said}, {noise}{ending}"


def verdict_line(path: Path) -> str:
    """The verdict of the run in this directory, in a line."""
    try:
        said = read_facts(path)["verdict"]
    except (OSError, ValueError):
        return "not written"
    return f"{NAMES[said['level']].lower()}: {said['headline'][0].lower()}{said['headline'][1:]}"


def _beside(stem: Path, ending: str) -> Path:
    """The stem with an ending; a model's name may hold a dot of its own."""
    return stem.with_name(stem.name + ending)


def _why_not_walked(model: nn.Module) -> str:
    """What in the model keeps its layers from being asked one by one; empty where nothing does."""
    if reason := why_not_walked(model):
        return f", the model cannot be taken apart: {reason}"
    reason = why_no_gradient(Head.of(model).layer)
    return f", the head is not read: {reason}" if reason else ""


def _why_not_read(known: Known) -> str:
    """What came of the layers that were asked, where none told an image apart; empty where none was asked."""
    return f", {known.why_not}" if known.why_not else ""


UNFORESEEN = {"frozen": None, "hidden": None, "defence": "none", "defended": None}  # flags that change no forecast


def show_leaks(settings: argparse.Namespace) -> int:
    """Print which layers of the model give their inputs away at this batch size, and save it as table and picture.

    No data is touched: images are of --channels, and of --image_size or 32 pixels. Returns the exit status.
    """
    shape = (settings.channels, *sides(settings.image_size or SIDE))
    size = "x".join(map(str, shape[1:]))
    model = server_model(settings, settings.model, shape, settings.num_classes, model_options(settings), show_note)
    mode, ending = ("", "") if settings.bn == "eval" else (", BatchNorm in training mode", f"_bn_{settings.bn}")
    frozen = declared(vars(settings)).frozen_norms
    if frozen:
        mode, ending = f"{mode} but for {', '.join(frozen)}", f"{ending}_frozen_{len(frozen)}"
    title = f"{settings.model}, B={settings.batch_size}, {size}, {settings.num_classes} classes{mode}"
    model = two_classes(model, declared(vars(settings)), settings.model, shape).model
    if mode:
        use_batch_statistics(model, frozen)
    _show_client(settings)
    try:
        chain = stages(model)
    except ValueError as error:
        print(f"{title}: which layers give their inputs away, image by image?")
        print(f"the model cannot be taken apart: {error}")
        print(f"no layer's inputs are to be expected exactly, yet {STILL_ATTACKED}")
        return 0
    places = lowest(perceptrons(model, shape))
    rows = explain(chain, shape, settings.batch_size, patch_embedding(model, shape), places)
    name = Path(settings.model).name.replace(":", "_")
    stem = Path(settings.save_dir) / f"explain_{name}_B{settings.batch_size}_{settings.image_size or SIDE}{ending}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_csv(_beside(stem, ".csv"), rows)
    _beside(stem, ".md").write_text(markdown(rows), encoding="utf-8")
    save_leaks(_beside(stem, ".png"), rows, title)
    deepest = next((row["layer"] for row in rows if row["deepest"]), None)
    print(f"{title}: which layers give their inputs away, image by image?")
    print(aligned(rows))
    if deepest:
        print(f"the deepest inputs to be expected exactly: the inputs of {deepest}")
    else:
        print("no layer's inputs are to be expected exactly: only the attack loop is left")
    if told := [place.first for place in places if not place.why_not(settings.batch_size)]:
        print(f"single tokens are to be expected, of no image or position, at: {', '.join(told)}")
    if reason := why_not_walked(model):
        print(f"run as a whole: {reason}; {STILL_ATTACKED}")
    print(f"table and picture: {stem}.csv, .md, .png")
    return 0


def _show_client(settings: argparse.Namespace) -> None:
    """Print how the client trains, where the update is no plain gradient, and which flags the forecast leaves out.

    Raises:
        ValueError: settings that do not go together, or do not suit the batch.
    """
    training = declared(vars(settings))
    training.check(settings.batch_size)
    if not (training.is_gradient and training.optimiser.clip is None):
        print(f"the client: {training}; what follows holds for the images of one step at the server's weights")
    if left_out := [f"--{name}" for name, usual in UNFORESEEN.items() if getattr(settings, name) != usual]:
        print(f"no effect here: {', '.join(left_out)} (the forecast is of an update of all parameters, undefended)")


def show_note(note: str) -> None:
    """Print what was assumed when a file was read."""
    print(f"note: {note}")


def show_schedule(schedule: Schedule, folder: Path) -> int:
    """Print step and S(t), one line per step, and save a plot of it in the folder. Returns the exit status."""
    print("step S")
    for step in range(schedule.n_iter):
        print(step, schedule.size(step))
    steps = range(0, schedule.n_iter, -(-schedule.n_iter // POINTS))
    path = folder / f"schedule_{schedule.mode}_B{schedule.batch_size}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_schedule(path, steps, [schedule.size(step) for step in steps], f"{schedule.mode}, B={schedule.batch_size}")
    print(f"plot: {path}")
    return 0
