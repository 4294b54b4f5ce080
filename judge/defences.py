"""Which defences would stop the attack: a row of audit.json for each one tried, and a sentence on all of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from judge import metrics, verdict
from judge.pictures import read_images
from judge.report import STRIP, first_pictures, read_facts
from judge.run_directory import DEFENDED

FIGURES = (
    "psnr_mean",
    "ssim_mean",
    "label_accuracy",
    "identification",
    "signals_found",
)  # figures of a row, None where not known
WHY = {
    "interrupt": "interrupted: resume the audit",
    "abort": "interrupted: resume the audit",
    "non-finite": "the attack broke down on it",
}


def undefended_row(facts: Mapping) -> dict:
    """The row of the first run, from its facts."""
    return _row("none", facts, 0.0) | {"run": None, "pictures": first_pictures(facts["images"])}


def defended_row(defence: str, change: float, folder: Path, first: Path) -> dict:
    """The row of a run under a defence.

    Without the truth the run is judged by the images that it still tells apart, and by how alike its images are to
    those of the first run, one to one.

    Args:
        change: how far the defence moves the update, relative to the update's length.
        folder, first: the run's directory, and that of the first run, above it.

    Raises:
        ValueError, OSError: the run has left no facts.
    """
    facts, name = read_facts(folder), f"{DEFENDED}/{folder.name}"
    row = _row(defence, facts, change) | {"run": name}
    names = first_pictures(facts["images"])
    if not facts["truth_known"] and row["level"] != verdict.FAILED:
        figures, guesses = _likeness(first, folder, len(facts["images"]))
        level = verdict.similarity_level(figures, guesses, row["signals_found"])
        row |= {"likeness": float(np.mean(figures["ssim"])), "level": level}
        row |= {} if level else {"note": verdict.NOTHING_SHOWN}
        names = [facts["images"][index]["reconstruction"] for index in figures["assignment"][:STRIP]]
    return row | {"pictures": [f"{name}/{picture}" for picture in names]}


def refused_row(defence: str, reason: str) -> dict:
    """The row of a defence under which no attack could be made."""
    return {"defence": defence, "level": None, "note": f"not tried: {reason}", "run": None}


def conclusion(undefended: Mapping, rows: Sequence[Mapping]) -> str:
    """A sentence on which of the defences stopped the attack."""
    return verdict.stops(rows, undefended["level"])


def _row(defence: str, facts: Mapping, change: float) -> dict:
    figures = facts["figures"]
    return {
        "defence": defence,
        "level": facts["verdict"]["level"],
        "note": WHY.get(figures["ended_by"], ""),
        "change": change,
        "likeness": None,
        "images": facts["verdict"]["images"],
        **{name: figures.get(name) for name in FIGURES},
    }


def _likeness(first: Path, second: Path, count: int) -> tuple[dict, list[float]]:
    """How alike the images of two runs are: figures of `metrics.evaluate`, and a guess's PSNR of the first."""
    pictures = [read_images(path / f"images/rec_{i:03d}.png" for i in range(count)) for path in (first, second)]
    nothing = torch.zeros(count, dtype=torch.long)
    return metrics.evaluate(pictures[0], nothing, pictures[1], nothing), metrics.guess_psnr(pictures[0])
