"""index.html: the runs in a folder, newest first, with their first pictures and links to their reports."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock, Timeout
from PIL import Image

from judge.report import GENERATOR, PLAIN, TEMPLATES, first_pictures, read_facts
from judge.verdict import NAMES
from update.storage import replace_atomically

PAGE = "index.html"
LOCK_SECONDS = 10.0  # seconds to wait for another run that is writing the page
PICTURES = 8  # of a run, at most
MARK = f'<meta name="generator" content="{GENERATOR}">'


def write_gallery(folder: Path) -> None:
    """Write index.html of the runs in the folder, unless another program has made a page of that name.

    Runs that end at the same time take turns. Each run has written its own facts before it looks for those of all runs,
    so the last run lists them all. A page that cannot be written costs a run nothing.
    """
    page = folder / PAGE
    with suppress(OSError, Timeout), FileLock(folder / ".locks" / PAGE, timeout=LOCK_SECONDS):
        if not page.exists() or MARK in page.read_text(encoding="utf-8", errors="replace"):
            text = gallery_page(folder)
            written = text.encode("utf-8", "backslashreplace")  # as in a report
            replace_atomically(page, lambda temporary: temporary.write_bytes(written))


def gallery_page(folder: Path) -> str:
    """The page, with relative links, of all folders in the folder that hold the facts and the report of a run."""
    cards = [card for path in folder.iterdir() if (card := _card(path))]
    cards.sort(key=lambda card: card["finished"], reverse=True)
    return TEMPLATES.get_template("gallery.html").render(
        folder=folder.resolve().name, cards=cards, names=NAMES, generator=GENERATOR
    )


def _card(path: Path) -> Mapping | None:
    """The gallery's entry of a run; None for a folder that holds no run, or a damaged one."""
    try:
        facts = read_facts(path)
        if facts["verdict"]["level"] not in NAMES or not (path / "report.html").is_file():
            return None
        pictures = [name for name in first_pictures(facts["images"], PICTURES) if (path / name).is_file()]
        subject, sides = facts["subject"], [_side(path / name) for name in pictures]
        return {
            "name": path.name,
            "href": f"{quote(os.fsencode(path.name))}/report.html",
            "pictures": [f"{quote(os.fsencode(path.name))}/{quote(os.fsencode(name))}" for name in pictures],
            "finished": str(facts["finished"]),
            "level": facts["verdict"]["level"],
            "headline": str(facts["verdict"]["headline"]),
            "subject": f"{subject['model']}, {subject['num_classes']} classes, B = {subject['batch_size']}",
            "defence": facts["defence"],
            "is_small": max(sides, default=0) <= PLAIN,
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _side(path: Path) -> int:
    with Image.open(path) as picture:
        return max(picture.size)
