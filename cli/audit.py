"""--audit: the attack on the undefended update, then under each of the nearest defences, and which would stop it."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from attack.match.entries import squared_distance
from cli.flags import Flag
from cli.runtime import INTERRUPTED, place_named, stream
from cli.settings import run_path, words_of
from cli.victim import victim
from client.defences import defend_received
from judge.defences import conclusion, defended_row, refused_row, undefended_row
from judge.gallery import write_gallery
from judge.locks import LOCKS
from judge.report import read_facts, write_report
from judge.run_directory import DEFENDED, RunDirectory
from judge.tables import aligned
from update.shared import SharedUpdate

# Defences of any update that leave the client's training unchanged, each kind from weak to strong.
NEAREST = ("float16", "quantise:8", "noise:1e-3", "noise:1e-2", "noise:1e-1", "topk:0.1", "topk:0.01", "sign")

SHOWN = ("defence", "level", "psnr_mean", "ssim_mean", "identification", "likeness", "signals_found", "change", "note")

RunOne = Callable[[argparse.Namespace, Mapping, Sequence[str]], int]


def audit(
    run_one: RunOne, settings: argparse.Namespace, given: Mapping, words: Sequence[str], flags: Sequence[Flag]
) -> int:
    """Run the undefended attack, then the attack under each defence in a run of its own below the first directory.

    The page is written again after each run, so an interrupted audit shows the defences tried so far. A resumed audit
    goes on, in the first run and in each of the others. A defence that cannot be applied has the reason in its row.

    Args:
        run_one: runs an attack from settings, flags given by hand, and the words of the command line; returns an exit
            status.

    Returns the exit status: the first run's, or that of an interruption. An attack that breaks down on a defended
        update is a result, not a failure.

    Raises:
        ValueError: the settings hold a defence already, or the first run is refused.
    """
    if settings.defence not in (None, "none"):
        raise ValueError(f"--audit tries defences itself: it goes without --defence {settings.defence}")
    path = run_path(settings)
    if not settings.resume:
        settings.run_name = path.name  # the default name holds the time
    status = run_one(settings, given, words)
    if status == INTERRUPTED:
        return status
    with RunDirectory(path, resume=True) as run:
        run.without_links(f"{DEFENDED}/{LOCKS}")
        facts, plain, rows = read_facts(path), victim(settings, place_named(settings), given)[0], []
        for defence in NEAREST:
            run.without_links(f"{DEFENDED}/{run_name(defence)}")  # a link would lead into another run
            own = under(defence, settings, path)
            if not settings.quiet:
                print(f"\nunder the defence {defence}")
            try:
                defended = defend_received(plain, defence, generator=stream(settings.seed, "defence"))
                change = relative_change(plain, defended)
                ended = run_one(own, given, words_of(own, flags))
                rows.append(defended_row(defence, change, run_path(own), path))
            except (ValueError, OSError) as error:
                ended = None
                rows.append(refused_row(defence, " ".join(str(error).split())))
            first = undefended_row(facts)
            table = {"undefended": first, "rows": rows, "conclusion": conclusion(first, rows)}
            write_report(run, facts | {"defences": table})
            if ended == INTERRUPTED:
                status = INTERRUPTED
                break
        status = max(status, int(bool(run.failures)))
        write_gallery(path.parent)
    if not settings.quiet:
        shown = [{name: row[name] for name in SHOWN if row.get(name) not in (None, "")} for row in [first, *rows]]
        print(f"\n{aligned(shown)}\nreport: {path / 'report.html'}")
    print(table["conclusion"])
    return status


def under(defence: str, settings: argparse.Namespace, path: Path) -> argparse.Namespace:
    """The settings of the run under a defence, whose directory lies below that of the first run, `path`."""
    folder, name = path / DEFENDED, run_name(defence)
    own = {
        "defence": defence,
        "audit": False,
        "save_update": None,
        "save_dir": str(folder),
        "run_name": name,
        "resume": (bool(settings.resume) and (folder / name / "checkpoint.pt").is_file()) or None,
    }
    return argparse.Namespace(**(vars(settings) | own))


def run_name(defence: str) -> str:
    """The name of the run under a defence."""
    return defence.replace(":", "_").replace(",", "+")


def relative_change(plain: SharedUpdate, defended: SharedUpdate) -> float:
    """|g' - g| / |g|: how far the defence moves the update, relative to the update's length."""
    before, after = ([u.gradients[name].double() for name in plain.gradients] for u in (plain, defended))
    return float((squared_distance(after, before) / sum(g.square().sum() for g in before)).sqrt())
