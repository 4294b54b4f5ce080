"""What is checked before the first cell: the folder of the results, and flags with which no cell could run."""

import argparse
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import main_MAGIA_sel as magia
from attack.prepare import INITS
from bench.networks import own_flags
from cli.model import model_options, parse_names, server_model
from cli.runtime import choose_device, stream
from cli.settings import resolve
from data import load_batch, open_source, sides
from network.parameters import named_by

ORIGIN = "origin.json"
ORIGIN_KEYS = {"sources", "versions"}  # a file with these keys is of a benchmark
# All that a benchmark writes beside cells and runs.
WRITTEN = (
    "table.*", "summary.*", "overview.md", "weakest.*", "psnr_vs_*.png", "ssim_vs_*.png", "signals.png", "leakage*.png",
    "wall*.png", "speed.*", "limits.*", "courses.*", "stages.*", ORIGIN,
)  # fmt: skip

# flags that each cell sets itself
OWN = (
    "resume", "overwrite", "run_name", "save_dir", "update", "save_update", "save_batch", "show_schedule", "explain",
    "quiet", "preset", "model", "batch_size", "indices", "seed",
)  # fmt: skip
# Flags of OWN that go to a command whose cells differ in other things, or which has no cells.
TAKEN = {"speed": ("model", "seed"), "audit": ("preset", "model", "batch_size", "seed")}
# Flags that change the attacked update: the groups of the script's flags that stand before those of the attack.
VICTIMS = ("data (the client's batch)", "model and update (what the server has)")
OF_VICTIM = (*(flag.name for flag in magia.FLAGS if flag.group in VICTIMS), "dtype")


def mark(out: Path, made_by: object) -> None:
    """Write the origin of the results into their folder, which is from then on a benchmark's."""
    out.mkdir(parents=True, exist_ok=True)
    (out / ORIGIN).write_text(json.dumps(made_by, indent=2) + "\n", encoding="utf-8")


def refuse_foreign(out: Path) -> None:
    """Refuse a folder with files that a benchmark would overwrite, unless a benchmark has written them.

    Raises:
        ValueError: there is such a file, or the path is no folder.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: it is no folder")
    if _is_marked(out):
        return
    for name in WRITTEN:
        for file in sorted(out.glob(name)):
            raise ValueError(f"{file} is not of a benchmark: it will not be overwritten, give another --out")


def refuse_own(flags: Sequence[str], command: str = "") -> None:
    """Refuse further flags that a cell of this command sets itself or cannot have.

    Raises:
        ValueError: there is such a flag.
    """
    for flag in flags:
        name = flag.split("=")[0].removeprefix("--")
        if name in OWN and name not in TAKEN.get(command, ()):
            raise ValueError(
                f"{flag.split('=')[0]}: not in a benchmark, whose cells have runs and updates of their own"
            )


def refuse_unknown(asked: argparse.Namespace, flags: Sequence[str]) -> None:
    """Refuse at once, as the attack's own command line does, flags with which no cell could run.

    Raises:
        ValueError: a flag that cells set themselves, or an attack's flag that would change the update.
    """
    for text in getattr(asked, "presets", ()):
        for name in own_flags(text):
            if name in OF_VICTIM:
                raise ValueError(f"--presets {text}: --{name} is the victim's, the same for all attacks: give it alone")
    for words in flags_behind(asked):
        refuse_own([word for word in words if word.startswith("--")])
        resolve([*words, *flags], magia.FLAGS)


def flags_behind(asked: argparse.Namespace) -> Iterator[list[str]]:
    """The flags that each network, attack and defence brings."""
    for text in (*getattr(asked, "models", ()), *getattr(asked, "presets", ())):
        yield shlex.split(text)[1:]
    for text in getattr(asked, "defences", ()):
        yield [text] if text.startswith("--") else ["--defence", text]


def refuse_unfit(cells: Sequence[argparse.Namespace], networks: int, classes: Sequence[int | None]) -> None:
    """Refuse settings with which no cell could run: a device, first images, a network or a checkpoint.

    Args:
        cells: settings of each network, attack and defence, the networks first.
        networks: number of networks.
        classes: numbers of classes that are asked for, None for the settings' own. One that fits is enough.

    Raises:
        ValueError: as the cells themselves would.
    """
    for settings in cells:
        choose_device(settings.device)
        if settings.init not in INITS and not Path(settings.init).exists():
            raise ValueError(f"--init {settings.init}: no such file or folder")
    for settings in cells[:networks]:
        _build(settings, classes)


def _build(settings: argparse.Namespace, classes: Sequence[int | None]) -> None:
    """Build the network of some settings, for the first of the classes that it can be built for."""
    draw = {"labels": "random", "num_classes": 2, "generator": stream(settings.seed, "labels")}
    source = open_source(settings.dataset, settings.data_path)
    size = sides(settings.image_size) if settings.image_size else None
    shape = tuple(load_batch(source, [0], image_size=size, **draw).images.shape[1:])
    errors = []
    for number in classes:
        try:
            count = number or settings.num_classes
            model = server_model(settings, settings.model, shape, count, model_options(settings))
            named_by(model, parse_names(settings.frozen))
            return
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _is_marked(out: Path) -> bool:
    try:
        made_by = json.loads((out / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(made_by, dict) and made_by.keys() >= ORIGIN_KEYS
