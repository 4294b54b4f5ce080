"""Measure what one update of two images gives away on the smallest network of each of torchvision's families.

    python -m bench.families
    python -m bench.families --rows swin
    make docs

It writes results/data/networks_families.csv, of which `make docs` makes the table of docs/networks.md. Each family is
explained first, as --explain does, and then attacked for five evaluations: what is told apart is known before the first
of them. How deep the run has read stands beside what was promised, and how many pictures are better than a guess by the
run's verdict. A row whose command fails stays as it is.
"""

import sys
from collections.abc import Sequence, Set
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from attack.read.forecast import explain
from bench.remeasure import device_of, measure, one_by_one, rounded, row_parser
from bench.results_page import Row, read_rows, write_rows
from judge.verdict import JUDGED
from network.chain import in_products
from network.embedding import patch_embedding
from network.tracing import stages, stages_if_walked, why_not_walked
from network.zoo import build_model

TABLE, CLASSES = "networks_families", 10
COMMAND = (
    "python main_MAGIA_sel.py --model torchvision:{network} --image_size {pixels} --num_classes {classes} "
    "--batch_size {batch_size} --max_evals 5"
)


class Family(NamedTuple):
    """A family, one of its networks, the pixels of a side that the network takes, and the images of a batch."""

    family: str
    network: str
    pixels: int = 64
    batch_size: int = 2


FAMILIES = (
    Family("AlexNet", "alexnet"),
    Family("ConvNeXt", "convnext_tiny"),
    Family("DenseNet", "densenet121"),
    Family("EfficientNet", "efficientnet_b0"),
    Family("EfficientNetV2", "efficientnet_v2_s"),
    Family("GoogLeNet", "googlenet"),
    Family("Inception", "inception_v3", 80),
    Family("MaxViT", "maxvit_t", 224),
    Family("MNASNet", "mnasnet0_5"),
    Family("MobileNetV2", "mobilenet_v2"),
    Family("MobileNetV3", "mobilenet_v3_small"),
    Family("RegNet", "regnet_y_400mf"),
    Family("ResNet", "resnet18"),
    Family("ResNeXt", "resnext50_32x4d"),
    Family("ShuffleNetV2", "shufflenet_v2_x0_5"),
    Family("SqueezeNet", "squeezenet1_1"),
    Family("Swin", "swin_t"),
    Family("SwinV2", "swin_v2_t"),
    Family("VGG", "vgg11"),
    Family("VisionTransformer", "vit_b_32", 224),
    Family("VisionTransformer", "vit_b_16", 224, 1),
    Family("WideResNet", "wide_resnet50_2"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 done, 1 some rows failed, 2 wrong input."""
    parser = row_parser("bench.families", __doc__)
    parser.add_argument("--rows", default="", metavar="TEXT", help="only networks whose name contains this")
    asked = parser.parse_args(argv)
    chosen = [each for each in FAMILIES if asked.rows in each.network]
    if not chosen:
        print(f"bench.families: error: no network's name contains {asked.rows!r}", file=sys.stderr)
        return 2

    def keep(each: Family, origin: Row) -> None:
        command = COMMAND.format(**each._asdict(), classes=CLASSES)
        print(command, flush=True)
        try:
            model = _model_of(each)
            rows = explained(each, model)
            row = forecast(each, model, rows) | measured(each, command, _image_layers(model, rows))
        except ValueError as error:
            raise ValueError(f"{each.network}: {error}") from None
        row |= {"note": "", "command": command, **origin, "device": asked.machine or device_of(command)}
        _replace(asked.folder, row)

    return one_by_one("bench.families", chosen, keep)


def _model_of(each: Family) -> nn.Module:
    """A family's network.

    Raises:
        ValueError: torchvision has no such network, or it takes no such images.
    """
    shape, seeded = (3, each.pixels, each.pixels), torch.Generator().manual_seed(0)
    return build_model(f"torchvision:{each.network}", image_shape=shape, num_classes=CLASSES, generator=seeded)


def explained(each: Family, model: nn.Module) -> list[dict]:
    """The rows of --explain; none of a network that has no chain."""
    if stages_if_walked(model) is None:
        return []
    shape = (3, each.pixels, each.pixels)
    return explain(stages(model), shape, each.batch_size, patch_embedding(model, shape))


def forecast(each: Family, model: nn.Module, rows: Sequence[dict]) -> Row:
    """What --explain says: the deepest layer whose inputs are to be expected, and what is only run, and why."""
    row = {name: str(value) for name, value in each._asdict().items()}
    deepest, why_not = next((layer["layer"] for layer in rows if layer["deepest"]), ""), why_not_walked(model)
    return row | {"deepest": deepest, "only_run": why_not if rows else f"all of it ({why_not})"}


def _image_layers(model: nn.Module, rows: Sequence[dict]) -> set[str]:
    """The layers whose inputs are whole images': not those that single tokens are told apart at, nor those of gates."""
    return {row["layer"] for row in rows} - in_products(stages_if_walked(model) or ())


def measured(each: Family, command: str, layers: Set[str]) -> Row:
    """What a run tells: images told apart, right labels, the deepest layer read, pictures better than a guess, seconds.

    The deepest layer is one of `layers`. Where the images were read exactly their PSNR is among it.

    Raises:
        ValueError: the run failed.
    """
    figures = measure(command, None, None)
    read = [row["layer"] for row in figures["layers"] if row["uncertainty"] is not None and row["layer"] in layers]
    better = sum(figures["levels"].get(level, 0) for level in JUDGED if level != "none")
    exact = figures["psnr_mean"] if figures["ended_by"] == "exact" else None
    return {
        "told_apart": str(figures["signals_found"]),
        "labels_right": rounded(figures["label_accuracy"], ".0f", times=each.batch_size),
        "reached": read[0] if read else "",
        "better": f"{better} of {each.batch_size}" if better else "none",
        "exact_psnr": rounded(exact, ".1f"),
        "seconds": rounded(figures["seconds"], ".0f"),
    }


def _replace(folder: Path, row: Row) -> None:
    """Put a row into the table, in the order of the families."""
    rows = {r["network"]: r for r in (read_rows(folder, TABLE) if (folder / f"{TABLE}.csv").is_file() else [])}
    rows[row["network"]] = row
    rows = {name: dict.fromkeys(row, "") | old for name, old in rows.items()}  # a column may be newer than a row
    write_rows(folder, TABLE, [rows[each.network] for each in FAMILIES if each.network in rows])


if __name__ == "__main__":
    sys.exit(main())
