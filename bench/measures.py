"""The measures of a benchmark's cell: an attack, a peer's attack, a guess, or one search for signals."""

import argparse
import io
import json
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import main_MAGIA_sel as magia
from attack.published.presets import PRESETS
from attack.read.reader import read_layers
from bench.cells import Cell, cell_name
from bench.guesses import GUESSES, MEAN, PRIOR, guess, of_noise
from bench.peers import breaching_attack
from cli.ahead import scaled_update
from cli.runtime import INTERRUPTED, enough_threads, place_named, stream
from cli.settings import CLIENT, resolve, words_of
from cli.victim import client_batch, victim
from data import Batch, open_source
from judge import metrics
from judge.layers import matched
from judge.perceptual import LEAST_SIDE, Lpips
from judge.pictures import read_images, save_images
from judge.report import read_facts
from judge.run_directory import RunDirectory
from network.head import features_of
from update.shared import SharedUpdate

CLOSE = 0.01  # features count as read when their relative error is below this
MANY_STEPS = 100_000  # steps of a run whose budget is seconds, so that seconds end the run
QUALITY = ("psnr_mean", "ssim_mean", "label_accuracy", "identification", "bit_exact", "certified")
FIGURES = (*QUALITY, "signals_found", "evaluations", "seconds")
LPIPS = "lpips_mean"  # a figure that `perceived` adds, of what a run has left
UNREAD = {"certified": 0.0, "signals_found": 0}  # figures of what reads no signals
READ = ("found", "labels_right", "within_1_percent", "worst_error", "signal_seconds", "note")  # figures of signals

# A run has diverged if its loss was not finite, or if the share of its pixels at the edges of [0, 1] exceeds the
# truth's share by this much. Plain L-BFGS leaves the box when it is lost, and noise that was never moved lies there as
# well.
SATURATED = 0.5
DIVERGED = "diverged"
PER_CELL = ("batch",)  # entries of a cell that are no flags
IN_UPDATE = (*CLIENT, "frozen", "hidden", "defence")  # settings that are in an update from a file already


def measure_signals(cell: Cell, flags: Sequence[str]) -> Cell:
    """How many images of one batch the gradient gives away, judged by the true labels and features."""
    update, model, truth, settings = victim_of(cell, flags)
    row = dict(zip(READ, (0, 0, 0, None, 0.0, ""), strict=True))
    try:
        with enough_threads(model, update.batch_size, update.image_shape):
            reading = read_layers(update, model, generator=stream(settings.seed, "signals"))
    except ValueError as error:
        return row | {"note": str(error)}
    signals = reading.signals
    row |= {"found": len(signals), "signal_seconds": round(reading.seconds, 2)}
    if len(signals):
        with torch.no_grad():
            features = features_of(model, truth.images.to(next(model.parameters()))).to(signals.values)
        found, true, error = matched(signals.values, features)
        row["labels_right"] = int((signals.labels.cpu()[found] == truth.labels[true]).sum())
        row["within_1_percent"] = int((error < CLOSE).sum())
        row["worst_error"] = float(error.max())
    return row


def victim_of(cell: Cell, flags: Sequence[str]) -> tuple[SharedUpdate, torch.nn.Module, Batch, argparse.Namespace]:
    """The update that a cell attacks, its scale restored, its model, the truth, and the settings behind them."""
    settings = settings_of(cell, flags)
    update, model, truth = victim(settings, place_named(settings))
    return scaled_update(update, model, settings)[0], model, truth, settings


def truth_of(cell: Cell, flags: Sequence[str]) -> Batch:
    """The images and labels that a cell attacks."""
    settings = settings_of(cell, flags)
    return client_batch(settings, settings.labels, settings.num_classes)


def settings_of(cell: Cell, flags: Sequence[str]) -> argparse.Namespace:
    """The settings from the flags of a cell, or of an attack on the same batch."""
    name, *own = shlex.split(str(cell.get("preset", "magia")))
    if name not in PRESETS:  # guesses and peers have the program's update
        cell = cell | {"preset": shlex.join(["magia", *(own if name == PRIOR else ())])}
    return resolve([*flags_of(cell), *flags], magia.FLAGS)[0]


def measure(cell: Cell, flags: Sequence[str], out: Path) -> Cell:
    """The figures of one attack, of a preset, a peer or a guess, on the cell's update, and how the attack ended.

    Raises:
        Exception: any error of the attack; the cell has then failed.
    """
    name = str(cell["preset"]).split()[0]
    shutil.rmtree(run_folder(cell, flags, out), ignore_errors=True)  # left by another program or a dead process
    if name in GUESSES:
        return measure_guess(cell, flags, out)
    if name == PRIOR:
        return measure_prior(cell, flags, out)
    return (measure_attack if name in PRESETS else measure_peer)(cell, flags, out)


def measure_attack(cell: Cell, flags: Sequence[str], out: Path) -> Cell:
    """One run of the command line, with the figures of its metrics.json.

    Raises:
        RuntimeError: the run ended with an error, which the message repeats.
        KeyboardInterrupt: the run was interrupted.
    """
    path = run_folder(cell, flags, out)
    figures = run_of([*flags_of(cell), *flags], path)
    lost = figures["ended_by"] == "non-finite" or is_saturated(pictures(path), truth_of(cell, flags).images)
    return {name: figures[name] for name in FIGURES} | {"status": DIVERGED if lost else figures["ended_by"]}


def run_of(words: Sequence[str], path: Path) -> Cell:
    """The content of the metrics.json that the command line of these words leaves in the run directory `path`.

    A run that broke down on numbers that are not finite is a result.

    Raises:
        RuntimeError: the run ended with an error, which the message repeats.
        KeyboardInterrupt: the run was interrupted.
    """
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        status = magia.main([*words, "--quiet", "--save_dir", str(path.parent), "--run_name", path.name])
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    figures = json.loads((path / "metrics.json").read_text()) if (path / "metrics.json").is_file() else None
    if figures is None or (status and figures["ended_by"] != "non-finite"):
        raise RuntimeError((said.getvalue().splitlines() or [f"exit status {status}"])[-1].split("error: ")[-1])
    return figures


def measure_peer(cell: Cell, flags: Sequence[str], out: Path) -> Cell:
    """One run of another package's attack on the presets' update, judged and pictured as the presets are.

    Raises:
        Exception: any error of the other package.
    """
    update, model, truth, settings = victim_of(cell, flags)
    attack = str(cell["preset"]).split()[1]
    order = update.training.shuffled(update.batch_size, stream(settings.seed, "defence"))  # as the client has drawn it
    update = replace(update, training=order)
    with enough_threads(model, update.batch_size, update.image_shape):
        result = breaching_attack(attack, update, model, truth.labels, max_evals=cell["max_evals"], seed=settings.seed)
    images = result.images
    figures = metrics.evaluate(truth.images, truth.labels, images, result.labels, truth.others)
    figures |= UNREAD | {"evaluations": result.evaluations, "seconds": round(result.seconds, 3)}
    lost = is_saturated(images, truth.images)
    return _recorded(cell, flags, out, images, figures | {"status": DIVERGED if lost else "max_evals"})


def measure_prior(cell: Cell, flags: Sequence[str], out: Path) -> Cell:
    """One attack of this program on an update of noise, judged and pictured as the attack on the client's update is.

    Raises:
        RuntimeError: the run ended with an error, which the message repeats.
        KeyboardInterrupt: the run was interrupted.
    """
    update, _, truth, settings = victim_of(cell, flags)
    attack = argparse.Namespace(**(vars(settings) | dict.fromkeys(IN_UPDATE)))
    with tempfile.TemporaryDirectory() as folder:
        file, run = Path(folder) / "noise.safetensors", Path(folder) / "run"
        of_noise(update, stream(settings.seed, "noise")).save(file)
        figures = run_of(["--update", str(file), *words_of(attack, magia.FLAGS)], run)
        images, labels = pictures(run), [image["label"] for image in read_facts(run)["images"]]
    found = metrics.evaluate(truth.images, truth.labels, images, torch.tensor(labels), truth.others)
    found |= UNREAD | {"evaluations": figures["evaluations"], "seconds": figures["seconds"]}
    return _recorded(cell, flags, out, images, found | {"status": figures["ended_by"]})


def measure_guess(cell: Cell, flags: Sequence[str], out: Path) -> Cell:
    """The figures of a guess on the batch of a cell; a guess names no labels."""
    images, figures = _guessed(str(cell["preset"]), cell, flags)
    figures |= UNREAD | {"label_accuracy": None, "evaluations": 0, "seconds": 0.0, "status": "guess"}
    return _recorded(cell, flags, out, images, figures)


def mean_image_scores(cell: Cell, flags: Sequence[str], distance: Lpips | None) -> Cell:
    """PSNR, SSIM and LPIPS of the mean image on a cell's batch: the figures of an attack that failed or diverged."""
    images, figures = _guessed(MEAN, cell, flags)
    scores = {name: figures[name] for name in ("psnr_mean", "ssim_mean")}
    return scores | ({LPIPS: mean_lpips(truth_of(cell, flags).images, images, distance)} if distance else {})


def perceived(cell: Cell, flags: Sequence[str], out: Path, distance: Lpips | None) -> Cell:
    """The mean LPIPS of the pictures that a cell's run has left, each beside its truth; None where it left none.

    Nothing without a distance.
    """
    if distance is None:
        return {}
    path = run_folder(cell, flags, out)
    if not (path / "metrics.json").is_file():
        return {LPIPS: None}
    order = json.loads((path / "metrics.json").read_text())["assignment"]
    return {LPIPS: mean_lpips(truth_of(cell, flags).images, pictures(path)[order], distance)}


def mean_lpips(truth: Tensor, images: Tensor, distance: Lpips) -> float | None:
    """The mean distance of images (B, C, H, W) in [0, 1], as pictures of 8 bits, from their truths.

    None where the distance is of larger images.
    """
    if min(truth.shape[2:]) < LEAST_SIDE:
        return None
    return float(distance(truth, (images * 255).round() / 255).mean())


def _guessed(name: str, cell: Cell, flags: Sequence[str]) -> tuple[Tensor, Cell]:
    """The images (B, C, H, W) of a guess, and how close they come to the batch of a cell."""
    settings, truth = settings_of(cell, flags), truth_of(cell, flags)
    images = guess(name, open_source(settings.dataset, settings.data_path), truth.images)
    return images, metrics.evaluate(truth.images, truth.labels, images, truth.labels, truth.others)


def _recorded(cell: Cell, flags: Sequence[str], out: Path, images: Tensor, figures: Cell) -> Cell:
    """Save pictures (B, C, H, W) and figures as a run of the program does; return the cell's figures."""
    path = run_folder(cell, flags, out)
    with RunDirectory(path) as run:
        (path / "images").mkdir(parents=True)
        save_images(run, images)
        run.write_json("metrics.json", figures)
    return {name: figures[name] for name in (*FIGURES, "status")}


def is_saturated(images: Tensor, truth: Tensor) -> bool:
    """Whether images (B, C, H, W) lie at the edges of [0, 1] where the truth does not."""
    shares = [float(((x <= 0) | (x >= 1)).double().mean()) for x in (images, truth)]
    return shares[0] - shares[1] > SATURATED


def pictures(path: Path) -> Tensor:
    """The images (B, C, H, W) that a run has left, in [0, 1]."""
    return read_images(sorted((path / "images").glob("rec_*.png")))


def run_folder(cell: Cell, flags: Sequence[str], out: Path) -> Path:
    """The run directory of a cell."""
    return out / "runs" / cell_name(cell, flags)


def flags_of(cell: Cell) -> list[str]:
    """The cell as flags of main_MAGIA_sel.py.

    A value may bring flags of its own, such as the model "convnet --weights FILE". A value that is a flag itself stays
    unchanged. The number of steps is as large as a budget of evaluations or seconds could need, so that the budget ends
    the run.
    """
    if "max_evals" in cell or "max_seconds" in cell:
        cell = {"n_iter": cell.get("max_evals", MANY_STEPS)} | cell
    words: list[str] = []
    for name, value in cell.items():
        if name not in PER_CELL:
            words += ([] if str(value).startswith("--") else [f"--{name}"]) + shlex.split(str(value))
    return words
