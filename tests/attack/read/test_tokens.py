"""Single tokens of a transformer, from the gradients of two linear layers."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from attack.read.forecast import explain
from attack.read.tokens import PLACED, TOLD, UNPLACED, read_tokens
from attack.solve.budget import WorkBudget, unlimited
from client.victim import share_update
from data import load_batch, open_source
from network.head import features_of
from network.perceptrons import lowest, perceptrons
from network.tracing import stages
from network.zoo import build_model
from update.training import FEDSGD

FILE = Path(transformers.__file__)
SHAPE, FIRST = (3, 16, 16), "encoder.layers.0.linear1"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Client:
    """A transformer with room for the tokens of two images, and what a client sends."""

    def __init__(self, count=2, name="wide", **how):
        model = f"{FILE}:{name}"
        self.net = build_model(model, image_shape=SHAPE, num_classes=10, generator=generator(1))
        draw = {"num_classes": 10, "generator": generator(), "image_size": 16}
        self.batch = load_batch(open_source("sample", None), range(5, 5 + count), labels="dataset", **draw)
        pair = (self.batch.images, self.batch.labels)
        self.update = share_update(self.net, model, *pair, 10, training=FEDSGD, generator=generator(2), **how)

    def errors(self, tokens):
        """Relative, to the nearest true token; and which token that is."""
        place = perceptrons(self.net, SHAPE)[0]
        truth = place.inputs(self.net, self.batch.images).flatten(0, 1).double().detach()
        distances = torch.cdist(tokens, truth) / truth.norm(dim=1)
        return distances.min(1)


@pytest.mark.long
def test_two_images_are_put_together_of_their_tokens_in_the_order_of_their_features():
    client = Client(name="roomy")
    features = features_of(client.net, client.batch.images).detach()
    reading = read_tokens(client.update, client.net, unlimited(), generator(3), features)
    (row,) = reading.rows
    assert row["note"] == f"32 of 32 {TOLD}, {PLACED}; 2 of 2 are explained by them"
    assert reading.held == (0, 1)
    assert client.errors(reading.found[FIRST])[0].max() < 1e-2
    assert (reading.likely - client.batch.images).square().mean((1, 2, 3)).max() < 1e-4  # 40 dB


def read(update, net, **budget):
    return read_tokens(update, net, WorkBudget(**budget) if budget else unlimited(), generator(3))


def test_tokens_are_found_one_by_one_and_each_is_one_of_the_batch():
    client = Client()
    reading = read(client.update, client.net)
    errors, which = client.errors(reading.found[FIRST])
    assert len(which) == which.unique().numel() >= 24
    assert errors.max() < 1e-2
    (row,) = reading.rows
    assert errors.max() < 5 * row["uncertainty"]
    assert row["note"] == f"{len(which)} of 32 {TOLD}, {UNPLACED}"
    assert row["residual"] < 3


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("noise:0.001", "bfloat16", "sign")]


@pytest.mark.parametrize("defence", ["topk:0.1", *LONG])
def test_a_spoilt_update_gives_no_token_that_is_not_one(defence):
    client = Client(defence=defence)
    found = read(client.update, client.net).found
    assert FIRST not in found or client.errors(found[FIRST])[0].max() < 1e-2


@pytest.mark.long
def test_tokens_of_more_images_than_are_declared_are_not_believed():
    client = Client()
    found = read(replace(client.update, batch_size=1), client.net).found
    assert FIRST not in found or client.errors(found[FIRST])[0].max() < 1e-2


def test_where_tokens_fill_all_channels_nothing_is_asked():
    client = Client(count=3)
    assert read(client.update, client.net).rows == []


def test_a_clock_that_has_run_out_is_named():
    client = Client()
    reading = read(client.update, client.net, deadline=0.0)
    assert reading.is_aborted
    assert "--max_seconds" in reading.rows[0]["note"]


@pytest.mark.long
def test_the_command_line_says_what_was_told_apart_and_how_right_it_is(cli):
    flags = ["--model", f"{FILE}:wide", "--batch_size", 2, "--labels", "dataset", "--max_evals", 2]
    run = cli(*flags, "--signals", "auto")
    assert f" of 32 {TOLD}" in cli.out
    rows = {row["layer"]: row for row in csv.DictReader((run / "layers.csv").open())}
    assert 0 < float(rows[FIRST]["relative_error"]) < 1e-2


def test_the_forecast_promises_tokens_where_there_is_room():
    net = Client().net
    places = lowest(perceptrons(net, SHAPE))
    two, three = (explain(stages(net), SHAPE, count, None, places)[0] for count in (2, 3))
    assert (two["layer"], two["spanned"], two["known"]) == (FIRST, True, False)
    assert not three["spanned"]
    assert three["reason"] == "48 tokens fill all 48 channels"


@pytest.mark.long
def test_explain_promises_tokens(cli):
    cli("--model", f"{FILE}:wide", "--explain", "--batch_size", 2)
    assert f"single tokens are to be expected, of no image or position, at: {FIRST}" in cli.out
