"""index.html: the runs in a folder, newest first, with their first pictures and links to their reports.

Other programs and people write in the folder too. A run whose facts or pictures are damaged, huge or no regular files
has no card, and costs neither the other cards nor the run that writes the page.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from urllib.parse import quote

from judge.locks import lock_in
from judge.replacing import is_own_picture, is_page
from judge.report import GENERATOR, PLAIN, TEMPLATES, first_pictures, read_facts
from judge.verdict import NAMES
from update.storage import replace_atomically

PAGE = "index.html"
LOCK_SECONDS = 10.0  # seconds to wait for another run that is writing the page
PICTURES = 8  # of a run, at most
FACTS = 1 << 23  # bytes of an audit.json: twice those of a run of 10,000 images
LARGEST = 4096  # pixels a side of a picture: far larger ones, though small as files, stop a browser
WORDS = 300  # characters of a text on a card
_POSTPONED: ContextVar[Path | None] = ContextVar("postponed", default=None)
SIGNATURE = b"\x89PNG\r\n\x1a\n"


@contextmanager
def gallery_postponed(folder: Path) -> Iterator[None]:
    """Within, the folder's gallery is not written: each of many runs would read the facts of all others."""
    token = _POSTPONED.set(folder)
    try:
        yield
    finally:
        _POSTPONED.reset(token)


def write_gallery(folder: Path) -> None:
    """Write index.html of the runs in the folder, unless another program has made a page of that name.

    Runs that end at the same time take turns. Each run has written its own facts before it looks for those of all runs,
    so the last run lists them all. A page that cannot be written, for whatever reason, costs a run nothing.
    """
    if folder == _POSTPONED.get():
        return
    page = folder / PAGE
    with suppress(Exception), lock_in(folder, PAGE, timeout=LOCK_SECONDS):
        if not os.path.lexists(page) or is_page(page):
            text = gallery_page(folder).encode("utf-8", errors="replace")
            replace_atomically(page, lambda temporary: temporary.write_bytes(text))


def gallery_page(folder: Path) -> str:
    """The page, with relative links, of all folders in the folder that hold the facts and the report of a run."""
    cards = [card for path in folder.iterdir() if not path.name.startswith(".") and (card := _card(path))]
    cards.sort(key=lambda card: card["finished"], reverse=True)
    return TEMPLATES.get_template("gallery.html").render(
        folder=folder.resolve().name, cards=cards, names=NAMES, generator=GENERATOR
    )


def _card(path: Path) -> Mapping | None:
    """The gallery's entry of a run; None for a folder that holds no run, or a damaged one."""
    try:
        facts = read_facts(path, FACTS)
        if facts["verdict"]["level"] not in NAMES or not (path / "report.html").is_file():
            return None
        names = [name for name in first_pictures(facts["images"], PICTURES) if is_own_picture(name)]
        pictures = [name for name in names if (path / name).is_file()]
        subject, sides = facts["subject"], [_side(path / name) for name in pictures]
        folder = quote(os.fsencode(path.name))
        return {
            "name": _text(path.name),
            "href": f"{folder}/report.html",
            "pictures": [f"{folder}/{quote(name)}" for name in pictures],
            "finished": _text(facts["finished"]),
            "level": facts["verdict"]["level"],
            "headline": _text(facts["verdict"]["headline"]),
            "subject": _text(f"{subject['model']}, {subject['num_classes']} classes, B = {subject['batch_size']}"),
            "defence": _text(facts["defence"] or ""),
            "is_small": max(sides, default=0) <= PLAIN,
        }
    except Exception:  # whatever is wrong with one run, the others have their cards
        return None


def _text(value: object) -> str:
    """A fact as text that UTF-8 can hold."""
    return str(value)[:WORDS].encode("utf-8", errors="replace").decode("utf-8")


def _side(path: Path) -> int:
    """The longer side in pixels of a PNG, from its first bytes.

    Raises:
        ValueError: the file is no PNG, or too large to be shown.
    """
    with path.open("rb") as file:
        head = file.read(24)
    if len(head) < 24 or not head.startswith(SIGNATURE):
        raise ValueError(f"{path} is no PNG")
    side = max(struct.unpack(">II", head[16:]))
    if side > LARGEST:
        raise ValueError(f"{path} has {side} pixels a side: too large")
    return side
