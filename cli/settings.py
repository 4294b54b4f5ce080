"""From a command line to settings: flags by hand beat the preset, which beats the defaults; contradictions raise."""

import argparse
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from attack.optimise.budget import Optimiser
from attack.published.presets import PRESETS
from cli.flags import Flag, build_parser, value_in_file
from client.privacy import Release, epsilon
from data import parse_indices
from judge.reading import read_json
from judge.run_directory import recover
from network.outside import is_file, resolved
from schedules import Schedule
from update import checked
from update.declared import flags_of
from update.defences import Defences
from update.shared import SharedUpdate

# Settings of the client, which are not known for an update from a file.
CLIENT = ("dataset", "data_path", "indices", "labels", "save_update", "save_batch")

ONE_LOGIT = {"num_classes": 2}  # one logit z is the two [0, z], see `network.one_logit`

# Settings that only an update from a file has.
RECEIVED = ("update_kind", "defended")

# Settings that a resumed run may change; all others stay as the run began.
RESUMABLE = (
    "n_iter", "max_evals", "max_seconds", "device", "save_dir", "run_name", "resume", "overwrite", "quiet", "log_every",
    "checkpoint_every", "show_schedule", "save_update", "audit",
)  # fmt: skip


# Settings that make a run write elsewhere than in its run directory.
WRITING = ("save_update", "save_batch", "show_schedule", "explain")


def resolve(
    argv: Sequence[str] | None, flags: Sequence[Flag], description: str = ""
) -> tuple[argparse.Namespace, dict[str, object]]:
    """All settings, and the settings given by hand.

    A resumed run takes the settings that it began with in place of preset and defaults.

    Raises:
        ValueError: flags that contradict each other or the run that is resumed.
    """
    given = vars(build_parser(flags, description).parse_args(argv))
    given |= ONE_LOGIT if given.get("num_classes") == 1 else {}
    defaults = {flag.name: flag.default for flag in flags}
    preset = PRESETS[given.get("preset", defaults["preset"])]
    settings = argparse.Namespace(**(defaults | preset | given))
    name = settings.run_name or "run"
    if name.startswith(".") or Path(name).name != name:
        raise ValueError(
            f"--run_name {name}: a name without separators, which does not begin with a dot; "
            "--save_dir says where it goes"
        )
    if isinstance(settings.resume, str) and given.get("run_name") not in (None, Path(settings.resume).name):
        raise ValueError(f"--run_name {settings.run_name}: the run to resume is {settings.resume}")
    if settings.resume:
        settings = _resumed(settings, given, flags)
    if is_file(settings.model) and settings.model not in (given.get("model"), defaults["model"]):
        raise ValueError(f"the run began with --model {settings.model}, a file that is run only if you name it again")
    for name in ("update", "weights"):
        if getattr(settings, name) == "":
            raise ValueError(f"--{name} is empty: a file is needed")
    if settings.update and given.get("save_update"):
        raise ValueError("--save_update writes what a simulated client sends: with --update there is none")
    if settings.update:
        if not settings.resume:
            settings.defence = given.get("defence")
        vars(settings).update(dict.fromkeys(CLIENT), batch_size=given.get("batch_size"))
    for name in RECEIVED:
        if name in given and not settings.update:
            raise ValueError(f"--{name} tells of an update from outside: it goes with --update")
    if settings.indices:
        adopt(settings, given, {"batch_size": len(parse_indices(settings.indices))}, f"--indices {settings.indices}")
    return settings, given


def words_of(settings: argparse.Namespace, flags: Sequence[Flag]) -> list[str]:
    """The command line of a new run with these settings: every setting that differs from preset and defaults."""
    usual = {flag.name: flag.default for flag in flags} | PRESETS[settings.preset]
    usual["preset"] = None
    words = []
    for name, value in vars(settings).items():
        if value is None or value == usual[name] or name in ("resume", "overwrite"):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return words


def _resumed(settings: argparse.Namespace, given: Mapping, flags: Sequence[Flag]) -> argparse.Namespace:
    """The settings that the run in the run directory began with, and the changes that a resumed run may make.

    Raises:
        ValueError: there is no run, a setting of it is none that a flag takes, or a change is none that it may make.
    """
    path = run_path(settings)
    recover(path)
    began = settings_in(path, flags)
    for name, value in given.items():
        spelt = resolved if name == "model" else lambda each: each
        if name not in RESUMABLE and spelt(value) != spelt(began[name]):
            raise ValueError(f"--{name} {value}: the run to resume began with {began[name]}")
    # Where a run writes is never taken from a file, which may come from somebody else.
    defaults = {flag.name: flag.default for flag in flags}
    places = {name: defaults[name] for name in WRITING} | {"save_dir": str(path.parent)}
    return argparse.Namespace(**(began | places | given))


def settings_in(path: Path, flags: Sequence[Flag]) -> dict[str, object]:
    """The settings in the config.json of a run directory, each checked as its flag is on a command line.

    Raises:
        ValueError: the file is missing or damaged, or a flag does not take its setting.
    """
    file, config = path / "config.json", read_config(path)
    missing = [flag.name for flag in flags if flag.name not in config]
    if missing:
        raise ValueError(f"{file} is not of a run of this program: it has no {missing[0]!r}")
    unknown = {*CLIENT, "defence"} if config["update"] is not None else ()
    try:
        return {
            flag.name: None
            if config[flag.name] is None and flag.name in unknown
            else value_in_file(flag, config[flag.name])
            for flag in flags
        }
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def adopt(settings: argparse.Namespace, given: Mapping, facts: Mapping, source: str) -> None:
    """Set the facts that `source` settles.

    Raises:
        ValueError: a flag given by hand contradicts a fact.
    """
    for name, value in facts.items():
        if given.get(name, value) != value:
            raise ValueError(f"--{name} {given[name]}: {source} has {value}")
        setattr(settings, name, value)


def clients_of(settings: argparse.Namespace) -> int:
    """The number of clients with batches of --batch_size in the update; 1 for an update from a file."""
    return 1 if settings.update else Defences.parse(settings.defence).clients


def facts_of(update: SharedUpdate, settings: argparse.Namespace) -> dict[str, object]:
    """The facts of an update, by the names of their flags."""
    channels, height, width = update.image_shape
    facts = {
        "batch_size": update.batch_size // clients_of(settings),
        "model": update.model,
        "num_classes": update.num_classes,
    }
    facts["image_size"] = width if height == width else f"{height}x{width}"
    if update.training.hidden:
        facts["hidden"] = settings.hidden or ",".join(update.training.hidden)
    return facts | flags_of(update.training) | {"channels": channels} | update.options


def schedule_of(settings: argparse.Namespace) -> Schedule:
    """S(t) under the flags --sel_mode, --sel_k, --sel_l_iter, --sig_a, --sig_b and --resample."""
    return Schedule(
        settings.sel_mode,
        batch_size=clients_of(settings) * settings.batch_size,
        n_iter=settings.n_iter,
        k=settings.sel_k,
        l_iter=settings.sel_l_iter,
        a=settings.sig_a,
        b=settings.sig_b,
        resample=settings.resample,
    )


def optimiser_of(settings: argparse.Namespace) -> Optimiser:
    """The optimiser under --optimizer, --lr, --lr_schedule, --signed and the flags of L-BFGS."""
    return Optimiser(
        settings.optimizer,
        lr=settings.lr,
        lr_schedule=settings.lr_schedule,
        signed=settings.signed,
        inner_iter=settings.inner_iter,
        history=settings.history,
        line_search=settings.line_search,
    )


def privacy_of(update: SharedUpdate, settings: argparse.Namespace) -> dict[str, float | str | None]:
    """The privacy that the client's defences buy; empty where they buy none.

    Returns:
        Of DP-SGD `epsilon`, the bound under --dp_delta, --dp_rate and --dp_rounds, None where Opacus is not installed.
        Of a Gaussian mechanism `release_epsilon` and `release_level`, see `client.privacy.Release`; not where running
        statistics are shared beside it, which no defence covers.
    """
    defences, found = Defences.parse(update.defence), {}
    if defences.private is not None:
        how = {"rate": settings.dp_rate, "rounds": settings.dp_rounds, "delta": settings.dp_delta}
        try:
            found["epsilon"] = epsilon(defences.private[1], **how)
        except ModuleNotFoundError:
            found["epsilon"] = None
    release = None if update.statistics else Release.of(defences)
    if release:
        found |= {"release_epsilon": release.epsilon(settings.dp_delta), "release_level": release.level}
    return found


def run_path(settings: argparse.Namespace) -> Path:
    """The run directory that the flags name."""
    if isinstance(settings.resume, str):
        path = Path(settings.resume)
        return path if path.name not in ("", "..") else path.resolve()
    if settings.resume and not settings.run_name:
        raise ValueError("--resume needs the run's directory, or --run_name")
    source = "update" if settings.update else settings.dataset
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{source}_B{settings.batch_size}_{settings.sel_mode}_seed{settings.seed}_{stamp}"
    path, number = Path(settings.save_dir) / (settings.run_name or name), 1
    while not settings.run_name and os.path.lexists(path):  # the clock was set back, or two runs begin in one second
        number += 1
        path = path.with_name(f"{name}-{number}")
    return path


def read_config(path: Path) -> dict:
    """The config.json of a run directory.

    Raises:
        ValueError: the file is missing or damaged.
    """
    file = path / "config.json"
    try:
        return checked.mapping(read_json(file), "config.json")
    except checked.DamagedError as error:
        raise ValueError(f"no run to resume in {path}: config.json holds no settings: {error}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"no run to resume in {path}: {error}") from None
