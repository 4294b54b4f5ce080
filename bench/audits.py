"""`benchmark.py audit`: one attack on each of many updates from outside, one table and one gallery of all of them."""

import argparse
import glob
import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import main_MAGIA_sel as magia
from bench.beforehand import mark
from bench.cells import Cell, run_cells
from bench.measures import run_folder, run_of
from bench.origin import loaded, origin
from cli.settings import resolve
from judge.gallery import PAGE, gallery_postponed, write_gallery
from judge.report import read_facts
from judge.verdict import NAMES, is_certain

FIGURES = (
    "verdict", "batch_size", "signals_found", "certain", "certified", "contradictions", "unexplained", "evaluations",
    "seconds", "status",
)  # fmt: skip
DIGITS = 30  # of numbers in files' names, by which these are ordered
FILES = ("weights", "init")  # flags that may name a file, on which all audits depend


def add_audit(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """The subcommand, without the flags of where its cells run."""
    command = commands.add_parser("audit", help="attack many updates that came from outside, one after the other")
    command.add_argument(
        "--updates", required=True, metavar="PATTERN", help="which files, in quotes: 'inbox/*.npz'; ** is any folder"
    )
    return command


def audits(asked: argparse.Namespace, flags: Sequence[str]) -> list[Cell]:
    """A row for each update that the pattern fits; it also writes the gallery of the runs.

    Raises:
        ValueError: no file fits, or the flags fit none of them.
    """
    paths = files_of(asked.updates)
    settings = resolve(["--update", str(paths[0]), *flags], magia.FLAGS)[0]
    named = (Path(str(getattr(settings, name))) for name in FILES)
    made_by = origin(path for path in named if path.is_file())
    cells = [
        {"name": path.stem, "update": str(path), "digest": hashlib.sha256(path.read_bytes()).hexdigest()[:12]}
        for path in paths
    ]
    how = {"figures": FIGURES, "jobs": asked.jobs, "threads": asked.threads, "scheduler": asked.scheduler}
    out = asked.out.resolve()
    mark(out, made_by)
    try:
        rows = run_cells(
            partial(measure_audit, flags=flags, out=out), cells, flags, out=out, origin=made_by, loaded=loaded, **how
        )
    finally:  # an audit that is interrupted shows what it has
        if (out / "runs").is_dir():
            write_gallery(out / "runs")
    print(f"gallery: {asked.out / 'runs' / PAGE}")
    counts = Counter(NAMES.get(row.get("verdict"), "failed").lower() for row in rows)
    print(f"{len(rows)} updates: {', '.join(f'{count} {name}' for name, count in counts.most_common())}")
    top = os.path.commonpath([path.parent for path in paths])
    return [{"update": os.path.relpath(row["update"], top)} | {name: row.get(name) for name in FIGURES} for row in rows]


def files_of(pattern: str) -> list[Path]:
    """The files that a pattern fits, each once, in order of their names: client2 before client10.

    Raises:
        ValueError: there is none.
    """
    found = {Path(name).resolve() for name in glob.glob(pattern, recursive=True) if Path(name).is_file()}
    if not found:
        raise ValueError(f"--updates {pattern}: no file fits")
    parts = {path: re.split(r"(\d+)", str(path)) for path in found}
    return sorted(found, key=lambda path: [part.zfill(DIGITS) if part.isdecimal() else part for part in parts[path]])


def measure_audit(cell: Cell, flags: Sequence[str], out: Path) -> Cell:
    """The figures of one run on the update of a cell, and how the run ended.

    Raises:
        RuntimeError: the run ended with an error, which the message repeats.
        KeyboardInterrupt: the run was interrupted.
    """
    path = run_folder(cell, flags, out)
    shutil.rmtree(path, ignore_errors=True)  # left by another program or a dead process
    with gallery_postponed(path.parent):
        figures = run_of(["--update", str(cell["update"]), *flags], path)
    facts = read_facts(path)
    found = figures | {
        "verdict": facts["verdict"]["level"],
        "batch_size": len(facts["images"]),
        "certain": sum(is_certain(image["confidence"]) for image in facts["images"]),
        "contradictions": sum(piece["contradicts"] for piece in facts["evidence"]),
        "status": figures["ended_by"],
    }
    return {name: found[name] for name in FIGURES}
