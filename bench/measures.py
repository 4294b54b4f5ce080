"""What is measured in a cell of a benchmark: one attack, one peer's attack, or one search for signals."""

import argparse
import io
import json
import shutil
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment

import main_MAGIA_sel as magia
from attack.signals import read_layers
from bench.cells import Cell, cell_name
from bench.figures import MEANS
from bench.peers import breaching_attack
from cli.runtime import choose_device, stream
from cli.settings import resolve
from cli.victim import victim
from data import Batch
from judge import metrics
from judge.pictures import save_images
from judge.run_directory import RunDirectory
from update.head import features_of
from update.shared import SharedUpdate

CLOSE = 0.01  # features count as read when their relative error is below this
MANY_STEPS = 100_000  # so that seconds end a run, where they are its budget
FIGURES = (*MEANS, "status")


def measure_signals(cell: Cell, flags: Sequence[str]) -> Cell:
    """How many images of one batch the gradient gives away, judged by the true labels and features."""
    update, model, truth, settings = victim_of(cell, flags)
    row = {"found": 0, "labels_right": 0, "within_1_percent": 0, "worst_error": None, "signal_seconds": 0.0, "note": ""}
    try:
        signals = read_layers(update, model, generator=stream(settings.seed, "signals")).signals
    except ValueError as error:
        return row | {"note": str(error)}
    row |= {"found": len(signals), "signal_seconds": round(signals.seconds, 2)}
    if len(signals):
        with torch.no_grad():
            features = features_of(model, truth.images.to(next(model.parameters()))).to(signals.features)
        distance = torch.cdist(signals.features, features) / features.norm(dim=1)
        found, true = (torch.from_numpy(i) for i in linear_sum_assignment(distance.cpu().numpy()))
        error = distance[found, true]
        row["labels_right"] = int((signals.labels.cpu()[found] == truth.labels[true]).sum())
        row["within_1_percent"] = int((error < CLOSE).sum())
        row["worst_error"] = float(error.max())
    return row


def victim_of(cell: Cell, flags: Sequence[str]) -> tuple[SharedUpdate, torch.nn.Module, Batch, argparse.Namespace]:
    """The update that a cell attacks, its model, the truth, and the settings behind them."""
    settings, _ = resolve([*flags_of(cell), *flags], magia.FLAGS)
    place = {"device": choose_device(settings.device), "dtype": getattr(torch, settings.dtype)}
    return *victim(settings, place), settings


def measure_attack(cell: Cell, flags: Sequence[str], out: Path) -> Cell:
    """One run of the command line, and what its metrics.json says."""
    path = run_folder(cell, flags, out)
    argv = [*flags_of(cell), *flags, "--quiet", "--save_dir", str(path.parent), "--run_name", path.name]
    shutil.rmtree(path, ignore_errors=True)  # what a process that died there has left
    with redirect_stdout(io.StringIO()):
        status = magia.main(argv)
    if status:
        return dict.fromkeys(FIGURES) | {"status": f"exit {status}"}
    figures = json.loads((path / "metrics.json").read_text())
    return {name: figures[name] for name in MEANS} | {"status": figures["ended_by"]}


def measure_peer(cell: Cell, flags: Sequence[str], out: Path) -> Cell:
    """One run of another package's attack on the update that the presets get, judged and pictured like theirs."""
    attack = str(cell["preset"]).split()[1]
    update, model, truth, settings = victim_of(cell | {"preset": "magia"}, flags)
    started = time.perf_counter()
    try:
        images, labels, evaluations = breaching_attack(
            attack, update, model, truth.labels, max_evals=cell["max_evals"], seed=settings.seed
        )
    except Exception as error:  # of another package: whatever it is, it costs this cell only
        return dict.fromkeys(FIGURES) | {"status": f"{type(error).__name__}: {error}".splitlines()[0]}
    seconds = time.perf_counter() - started
    figures = metrics.evaluate(truth.images, truth.labels, images.cpu(), labels.cpu())
    figures |= {"signals_found": 0, "evaluations": evaluations, "seconds": seconds, "status": "max_evals"}
    path = run_folder(cell, flags, out)
    shutil.rmtree(path, ignore_errors=True)
    with RunDirectory(path) as run:
        (path / "images").mkdir(parents=True)
        save_images(run, images.cpu())
        run.write_json("metrics.json", figures)
    return {name: figures[name] for name in FIGURES}


def run_folder(cell: Cell, flags: Sequence[str], out: Path) -> Path:
    """The run directory of a cell."""
    return out / "runs" / cell_name(cell, flags)


def flags_of(cell: Cell) -> list[str]:
    """The cell as flags of main_MAGIA_sel.py; a value that is a flag itself stands as it is.

    Steps are as many as a budget of evaluations or seconds could ever take, so that it is what ends the run.
    """
    if "max_evals" in cell or "max_seconds" in cell:
        cell = {"n_iter": cell.get("max_evals", MANY_STEPS)} | cell
    pairs = [([str(v)] if str(v).startswith("--") else [f"--{name}", str(v)]) for name, v in cell.items()]
    return [word for pair in pairs for word in pair]
