"""Measure what updates of several local steps give away: the rows of results/data/local_*.csv.

    python -m bench.local_training --data_path cifar10_test.npz --weights_dir checkpoints
    python -m bench.local_training --rows "ConvNet" "LeNet, 8" --data_path cifar10_test.npz --weights_dir checkpoints
    python -m bench.docs

A row is a client and the command that attacks its update. --rows takes parts of the rows' names, as --list prints them.
Each row is kept as soon as it is measured; the others stay as they are. `bench.docs` puts them into
docs/local-training.md.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.planned import Planned, measure_planned

TRUE = "--dataset npz --data_path cifar10_test.npz --num_classes 10 --labels dataset"  # images with their own labels
RANDOM = "--dataset npz --data_path cifar10_test.npz"  # 100 classes
CONVNET, RESNET = "--model convnet --weights convnet.safetensors", "--model resnet18 --weights resnet18.safetensors"
MLP = "--model mlp --activation relu --depth"
MOMENTUM = "--local_momentum 0.9"
SMALL_BUDGET = "--max_evals 300 --tv_evals 300"

# What is measured of a row, by its column; `bench.remeasure.MEASURED` says how.
COLUMNS = ("told_apart", "labels_right", "psnr", "psnr_least", "exact", "error", "certain", "unexplained")


@dataclass(frozen=True)
class Client:
    """One row.

    Attributes:
        name: how the client trains, in words; no two of a table with as many images have the same.
        images: that it trains on, B.
        flags: of the attack on it.
        program: main_MAGIA_sel.py, or benchmark.py with a peer's attack.
    """

    name: str
    images: int
    flags: str
    program: str = "main_MAGIA_sel.py"

    @property
    def command(self) -> str:
        """That measures the row."""
        size = "batch_size" if self.program == "main_MAGIA_sel.py" else "batch_sizes"
        return f"python {self.program} {self.flags} --{size} {self.images}"


def steps(passes: int, batches: int, rate: float, *rules: str) -> str:
    """The flags of a client that goes through its minibatches so many times."""
    words = [f"--local_steps {passes * batches} --local_lr {rate:g}", *rules]
    return " ".join([*words, f"--local_batches {batches}"] if batches > 1 else words)


def _first_layer() -> Iterator[Client]:
    shuffled = "--local_shuffle"
    for passes in (1, 5, 20):
        flags = f"{TRUE} {MLP} 3 --width 200 {steps(passes, 4, 0.01, shuffled)}"
        yield Client(f"ReLU, 3 layers of 200, minibatches of 4, rate 0.01, passes: {passes}", 16, flags)
    rules = f"{MOMENTUM} --local_weight_decay 5e-4 {shuffled}"
    flags = f"{TRUE} {MLP} 3 --width 400 {steps(5, 4, 0.01, rules)}"
    yield Client("ReLU, 3 layers of 400, minibatches of 8, 5 passes, momentum 0.9, decay 5e-4", 32, flags)
    flags = f"{TRUE} {MLP} 3 --width 400 {steps(5, 8, 0.01, shuffled)}"
    yield Client("ReLU, 3 layers of 400, minibatches of 8, 5 passes", 64, flags)
    trained = f"{TRUE} --model mlp --weights mlp.safetensors"
    yield Client(
        "sigmoid, trained, minibatches of 4, 5 passes in one order, momentum 0.9",
        8,
        f"{trained} {steps(5, 2, 0.01, MOMENTUM)}",
    )
    yield Client(
        "sigmoid, trained, minibatches of 4, 5 passes, momentum 0.9",
        8,
        f"{trained} {steps(5, 2, 0.01, MOMENTUM, shuffled)}",
    )


def _one_pass() -> Iterator[Client]:
    for images, batches, rules, said in (
        (4, 2, (), ""),
        (4, 2, (MOMENTUM,), ", momentum 0.9"),
        (8, 2, (), ""),
        (8, 4, (), ""),
    ):
        name = f"ConvNet, trained, {batches} minibatches at rate 0.01{said}"
        yield Client(name, images, f"{TRUE} {CONVNET} {steps(1, batches, 0.01, *rules)}")
    name = "LeNet, 100 classes, 2 minibatches at rate 0.1, momentum 0.9"
    yield Client(name, 8, f"{RANDOM} {steps(1, 2, 0.1, MOMENTUM)}")


def _several_passes() -> Iterator[Client]:
    name, trained = "ResNet-18, trained, 4 steps of 2 images at rate 1e-3", f"{TRUE} {RESNET} {steps(2, 2, 1e-3)}"
    yield Client(name, 4, trained)
    grid = "--presets mean_image --peer breaching --peer_attacks invertinggradients --batches 0 --seeds 0 --out DIR"
    peer = f'--models "{RESNET.removeprefix("--model ")}" {TRUE} {steps(2, 2, 1e-3)} --max_evals 300 {grid}'
    yield Client(f"{name}: breaching, labels granted", 4, peer, "benchmark.py grid")
    yield Client(f"{name}, BatchNorm in training mode", 4, f"{trained} --bn train --max_evals 300")
    for batches in (1, 2, 4):
        name = f"LeNet, 100 classes, {batches} minibatch{'es' if batches > 1 else ''}, 4 steps at rate 0.1"
        yield Client(name, 4, f"{RANDOM} {steps(4 // batches, batches, 0.1)} {SMALL_BUDGET}")


def _products() -> Iterator[Client]:
    for rate in (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.3):
        yield Client(f"{4 * rate:g}", 4, f"{RANDOM} {steps(4, 1, rate)} {SMALL_BUDGET}")


def _adam() -> Iterator[Client]:
    for count, rate, bound in ((1, 1e-3, 600), (1, 1e-2, 600), (5, 1e-3, 200)):
        budget = f"--max_evals {bound} --tv_evals {bound}"
        flags = f"{TRUE} {CONVNET} {steps(count, 1, rate, '--local_optimizer adam')} {budget}"
        yield Client(f"ConvNet, trained, {count} step{'s' if count > 1 else ''} at rate {rate:g}", 4, flags)


TABLES: dict[str, tuple[Client, ...]] = {
    "local_first_layer": tuple(_first_layer()),
    "local_one_pass": tuple(_one_pass()),
    "local_several_passes": tuple(_several_passes()),
    "local_products": tuple(_products()),
    "local_adam": tuple(_adam()),
}


PLANNED = [
    Planned(table, {"client": client.name, "batch_size": str(client.images)}, {}, client.command)
    for table, clients in TABLES.items()
    for client in clients
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 done, 1 some rows failed, 2 wrong input."""
    return measure_planned("bench.local_training", __doc__, PLANNED, COLUMNS, argv)


if __name__ == "__main__":
    sys.exit(main())
