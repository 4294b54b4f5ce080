import copy
import csv
import itertools

import pytest
import torch
from conftest import CPU, SIGNALS, metrics_of, resolved

from attack.prepare import Known
from attack.read.reader import read_layers
from cli.runtime import stream
from cli.victim import victim
from judge.layers import matched, measured, relative_errors

MLP = "--model mlp --activation relu --width 32 --labels dataset".split()  # noqa: SIM905
LENET = "--model lenet --labels dataset --batch_size 2".split()  # noqa: SIM905
LENET5 = "--model lenet5 --labels dataset".split()  # noqa: SIM905
SMALL = "--batch_size 3 --image_size 16 --num_classes 10".split()  # noqa: SIM905


def layers_of(run):
    with (run / "layers.csv").open(newline="") as file:
        return {row["layer"]: row for row in csv.DictReader(file)}


def true_inputs(model, images):
    """By layer, its inputs (B, n) in float64, as hooks on the model itself see them."""
    model, taken = copy.deepcopy(model).double(), {}
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.register_forward_pre_hook(lambda _, inputs, name=name: taken.update({name: inputs[0].flatten(1)}))
    with torch.no_grad():
        model(images.double())
    return taken


def worst_error(found, truth):
    """Over all ways to match them one to one, the largest relative error of the best."""
    orders = itertools.permutations(range(len(truth)), len(found))
    return min(max(((f - truth[i]).norm() / truth[i].norm()).item() for f, i in zip(found, order, strict=True))
               for order in orders)  # fmt: skip


@pytest.mark.parametrize("flags", [MLP, LENET], ids=["mlp", "lenet"])
def test_each_layer_that_was_read_says_how_far_it_is_from_the_truth(cli, flags):
    run = cli(*flags, *SIGNALS)
    rows = layers_of(run)
    settings = resolved(*SMALL, *flags)
    update, model, batch = victim(settings, CPU)
    reading = read_layers(update, model, generator=stream(settings.seed, "signals"))
    truth = true_inputs(model, batch.images)
    assert set(reading.recovered) == {name for name, row in rows.items() if row["relative_error"]}
    assert len(reading.recovered) >= 1
    for name, found in reading.recovered.items():
        expected = worst_error(found.flatten(1), truth[name])
        assert float(rows[name]["relative_error"]) == pytest.approx(expected, rel=0.05)  # one run or another's rounding
        assert float(rows[name]["seconds"]) > 0
    figures = {row["layer"]: row for row in metrics_of(run)["layers"]}
    for name, row in rows.items():
        for column in ("dimension", "residual", "relative_error", "seconds"):
            assert row[column] == ("" if figures[name][column] is None else str(figures[name][column]))


def test_without_the_truth_the_column_is_blank(cli, tmp_path):
    saved = tmp_path / "update.safetensors"
    known = layers_of(cli(*MLP, *SIGNALS, "--save_update", saved, name="known"))
    unknown = layers_of(cli("--update", saved, *SIGNALS, name="unknown"))
    assert any(row["relative_error"] for row in known.values())
    assert not any(row["relative_error"] for row in unknown.values())
    for name, row in known.items():
        assert unknown[name]["residual"] == row["residual"]


def test_a_resumed_run_keeps_the_column(cli):
    run = cli(*LENET5, *SIGNALS)
    before = layers_of(run)
    cli("--resume", run, "--n_iter", 6, *LENET5, *SIGNALS)
    assert any(row["relative_error"] for row in before.values())
    assert layers_of(run) == before


@pytest.mark.parametrize("name", ["body.layer1.0", "body.layer1.0.conv2"])
def test_an_error_is_found_whatever_the_order_and_only_where_something_was_recovered(name):
    settings = resolved(*SMALL, "--model", "resnet18_cifar", "--labels", "dataset")
    _, model, batch = victim(settings, CPU)
    layer = "body.layer1.0.conv1" if name == "body.layer1.0" else name  # a block's inputs are those of its first layer
    truth = true_inputs(model, batch.images)[layer]
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise *= (torch.tensor([1e-5, 3e-4, 1e-6])[:, None] * truth.norm(dim=1, keepdim=True)) / noise.norm(dim=1)[:, None]
    found = (truth + noise)[[2, 1]]  # two of three, in another order
    assert relative_errors({name: found}, model, batch.images) == {layer: pytest.approx(3e-4, rel=1e-6)}
    rows = [{"layer": each, "uncertainty": None, "note": ""} for each in (layer, "head")]
    known = Known(3, None, torch.empty(0), None, layers=rows, recovered={name: found})
    judged = measured(known, model, batch)
    assert [row["relative_error"] for row in judged.layers] == [pytest.approx(3e-4, rel=1e-6), None]
    assert list(judged.layers[0]) == ["layer", "uncertainty", "relative_error", "note"]
    assert not judged.recovered


def test_an_input_that_is_cut_off_entirely_is_right_where_it_is_found_so():
    truth = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert matched(truth.flip(0), truth)[2].tolist() == [0, 0]
