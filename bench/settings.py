"""Measure attacks on clients as they are: the rows of results/data/settings.csv.

    python -m bench.settings --data_path cifar10_test.npz --weights_dir checkpoints
    python -m bench.settings --rows "LeNet, all of these" --data_path cifar10_test.npz --weights_dir checkpoints
    python -m bench.docs

A row is a client, an attack on it, and the command that measures both. --rows takes parts of the rows' names, as --list
prints them. Each row is kept as soon as it is measured; the others stay as they are. `bench.docs` puts them into
docs/results.md.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.guesses import MEAN, PRIOR
from bench.local_training import CONVNET, MOMENTUM, RANDOM, TRUE, steps
from bench.planned import Planned, measure_planned

TABLE = "settings"
COLUMNS = (
    "runs", "psnr", "psnr_spread", "ssim", "lpips", "label_accuracy", "identification", "certified", "bit_exact",
    "diverged",
)  # fmt: skip
SPREAD, EXAMPLE = "--batches 0,1,2 --seeds 0,1,2", "--batches 0 --seeds 0"
SMALL_RESNET = "examples/small_resnet.py:resnet8"
SMOOTHED, COARSE, SHUFFLED = "--label_smoothing 0.1", "--local_precision bfloat16", "--local_shuffle"


@dataclass(frozen=True)
class Setting:
    """One client.

    Attributes:
        network: with the number of its classes.
        stage: of its training before this round.
        norms: mode of its BatchNorm layers.
        training: steps x batch x optimiser, and what else is not plain.
        flags: of main_MAGIA_sel.py.
        model: as --models takes it.
        evaluations: of every attack.
        runs: which batches and seeds.
        images: B.
        is_first: of the clients with this network and batch: guesses that know no update are the same for all of them.
    """

    network: str
    stage: str
    norms: str
    training: str
    flags: str
    model: str
    evaluations: int
    runs: str = EXAMPLE
    images: int = 4
    is_first: bool = False


@dataclass(frozen=True)
class Attack:
    """An attack: its name, what it knows beside network, batch size and the client's rules, and its words of a grid."""

    name: str
    knows: str
    words: str


UPDATE = "the update"
ATTACKS = (
    Attack("magia", UPDATE, "--presets magia"),
    Attack("magia --signals off", UPDATE, "--presets 'magia --signals off'"),
    Attack(
        "breaching invertinggradients",
        f"{UPDATE}, the labels of each step",
        f"--presets {MEAN} --peer breaching --peer_attacks invertinggradients",
    ),
    Attack(PRIOR, "no update: noise in its place", f"--presets {PRIOR}"),
    Attack(MEAN, "no update: other images of the set", f"--presets {MEAN}"),
)
LIVE = 3  # attacks that know the update


def _small(network: str, model: str, all_runs: str) -> Iterator[Setting]:
    """An untrained network without BatchNorm: nine runs of the plain client, `all_runs` of the one that has all."""
    pass_, moving = steps(1, 2, 0.1, SHUFFLED), steps(1, 2, 0.1, MOMENTUM, SHUFFLED)
    for training, flags, runs in (
        ("1 x 4 x SGD", "", SPREAD),
        ("1 x 4 x SGD, label smoothing 0.1", SMOOTHED, EXAMPLE),
        ("1 x 4 x SGD, activations in bfloat16", COARSE, EXAMPLE),
        ("2 x 2 x SGD, one shuffled epoch", pass_, EXAMPLE),
        ("2 x 2 x SGD, momentum 0.9, one shuffled epoch", moving, EXAMPLE),
        ("2 x 2 x SGD, all of these", f"{moving} {SMOOTHED} {COARSE}", all_runs),
    ):
        words, is_first = f"{RANDOM} {flags}".strip(), not flags
        yield Setting(network, "untrained", "none", training, words, model, 100, runs, is_first=is_first)


def _larger() -> Iterator[Setting]:
    """A trained network, and one with BatchNorm: one run each, an example."""
    convnet = CONVNET.removeprefix("--model ")
    passing = steps(1, 2, 0.01, MOMENTUM, SHUFFLED)
    for training, flags in (
        ("1 x 4 x SGD", ""),
        ("2 x 2 x SGD, momentum 0.9, label smoothing 0.1, one shuffled epoch", f"{passing} {SMOOTHED}"),
    ):
        words = f"{TRUE} {flags}".strip()
        yield Setting(
            "ConvNet, 10 classes", "trained to 58 %", "none", training, words, convnet, 150, is_first=not flags
        )
    for norms, flags in (
        ("eval", ""),
        ("train, statistics shared", "--bn train"),
        ("train, statistics kept", "--bn train_private"),
    ):
        words = f"{TRUE} {flags}".strip()
        yield Setting(
            "ResNet-8, 10 classes", "untrained", norms, "1 x 4 x SGD", words, SMALL_RESNET, 120, is_first=not flags
        )


SETTINGS = (
    *_small("MLP, ReLU, 100 classes", "mlp --activation relu", SPREAD),
    *_small("LeNet, 100 classes", "lenet", EXAMPLE),
    *_larger(),
)


def _planned() -> Iterator[Planned]:
    for setting in SETTINGS:
        for attack in ATTACKS if setting.is_first else ATTACKS[:LIVE]:
            names = {"network": setting.network, "training": setting.training, "norms": setting.norms}
            names |= {"attack": attack.name}
            says = {"stage": setting.stage, "knows": attack.knows, "batch_size": str(setting.images)}
            says["evaluations"] = str(setting.evaluations)
            yield Planned(TABLE, names, says, command(setting, attack))


def command(setting: Setting, attack: Attack) -> str:
    """That measures the row."""
    words = (
        f'python benchmark.py grid {attack.words} --models "{setting.model}" --batch_sizes {setting.images} '
        f"{setting.runs} --max_evals {setting.evaluations} {setting.flags} --lpips lpips.safetensors --out DIR"
    )
    return words.replace("'", '"')


PLANNED = list(_planned())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 done, 1 some rows failed, 2 wrong input."""
    return measure_planned("bench.settings", __doc__, PLANNED, COLUMNS, argv)


if __name__ == "__main__":
    sys.exit(main())
