"""A resumed run reads files that others may have changed: it goes on, or says in one line what is wrong with them."""

import copy
import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import SIGNALS, config_of, metrics_of

import main_MAGIA_sel as magia

KINDS = {
    "plain": [],
    "adam": ["--optimizer", "adam", "--restarts", "2"],
    "signals": ["--labels", "unique", "--model", "lenet5", *SIGNALS],
    "local": ["--local_steps", "2", "--local_lr", "0.1", "--max_evals", "12", *SIGNALS],
}
TRIED = 12  # changes of each file that are tried
DELETED = object()
ODD = (
    DELETED, None, "x", -1, 10**12, 2**70, 1.5, math.nan, math.inf, True, [], {}, [[1]], "\udcff", 10**400,
    torch.tensor(math.nan), torch.zeros(2, 3), torch.zeros(1).expand(10**12),
)  # fmt: skip
IN_JSON = (DELETED, None, "", "x", -1, 0, 2, 10**12, 2**70, 1.5, math.nan, math.inf, True, [], {}, [1, 2], "\udcff")


def nested(depth=300):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def odd_of(value):
    """Values in the place of one that is right: of another type, range, shape, or nested."""
    tensors = []
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        tensors = [value * math.nan, -value, value.half(), value.flatten()[None], value.to("meta"), value + 0j]
    return [*ODD, nested(), *tensors]


def places(value, path=()):
    """The paths to all entries of nested mappings and lists, at most two of a list."""
    yield path
    if isinstance(value, dict):
        for name in value:
            yield from places(value[name], (*path, name))
    if isinstance(value, list):
        for index in range(min(len(value), 2)):
            yield from places(value[index], (*path, index))


def at(value, path):
    for name in path:
        value = value[name]
    return value


def changed(content, path, value):
    content = copy.deepcopy(content)
    if not path:
        return {} if value is DELETED else value
    *above, last = path
    if value is DELETED:
        del at(content, above)[last]
    else:
        at(content, above)[last] = value
    return content


@pytest.fixture(params=KINDS)
def run(request, cli):
    return cli(*KINDS[request.param], "--quiet")


def ends_well(cli, capsys, run, words=()):
    """Resume the run: whether it goes on; otherwise one line has said why not."""
    try:
        status = magia.main(["--resume", str(run), "--n_iter", "5", "--quiet", *words])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status in (0, 2), err
    assert err.count("\n") == (status == 2), err
    assert (out == "") == (status == 2)
    return status == 0


def test_any_entry_of_a_checkpoint_is_checked(cli, capsys, run):
    whole, draw = torch.load(run / "checkpoint.pt", weights_only=True), random.Random(1)
    tries = [(path, value) for path in places(whole) for value in odd_of(at(whole, path))]
    for path, value in draw.sample(tries, TRIED):
        shutil.rmtree(run.with_name("other"), ignore_errors=True)
        other = shutil.copytree(run, run.with_name("other"))
        torch.save(changed(whole, path, value), other / "checkpoint.pt")
        ends_well(cli, capsys, other)


def test_any_setting_in_a_file_is_checked_as_its_flag(cli, capsys):
    run = cli("--quiet")
    whole, draw = config_of(run), random.Random(1)
    tries = [(path, value) for path in places(whole) for value in (*IN_JSON, nested())]
    for path, value in draw.sample(tries, 2 * TRIED):
        shutil.rmtree(run.with_name("other"), ignore_errors=True)
        other = shutil.copytree(run, run.with_name("other"))
        (other / "config.json").write_text(json.dumps(changed(whole, path, value)))
        ends_well(cli, capsys, other)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("n_iter", 4.0, "n_iter: '4.0' is not an integer"),
        ("alpha", 1.5, "alpha: 1.5 is out of range"),
        ("quiet", "no", "quiet 'no' is not true or false"),
        ("box", "round", "box: 'round' is none of"),
        ("labels", None, "labels is null"),
        ("seed", [1], "seed is a list"),
        ("data_path", 3, "data_path is 3, not a text"),
    ],
)
def test_a_setting_that_its_flag_does_not_take_is_named(cli, name, value, words):
    run = cli("--quiet")
    (run / "config.json").write_text(json.dumps(config_of(run) | {name: value}))
    message = cli.error("--resume", run)
    assert "config.json" in message
    assert words in message


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"n_iter": ' + "9" * 10_000 + "}"])
def test_json_without_end_is_one_line(cli, text):
    run = cli("--quiet")
    (run / "config.json").write_text(text)
    assert "no run to resume" in cli.error("--resume", run)


@pytest.mark.parametrize("row", ["one,2,3,4,5,6,7,8,9", "0,2,1.0", "0,2,x,1,1,1,1,1,"])
def test_rows_of_a_trace_that_are_no_numbers_are_refused(cli, row):
    run = cli("--quiet")
    lines = (run / "trace.csv").read_text().splitlines()
    (run / "trace.csv").write_text("\n".join([lines[0], row, *lines[2:]]) + "\n")
    assert "trace.csv: row 1 is not one of numbers" in cli.error("--resume", run)


# ---------------------------------------------------------------------------------------------------- what has changed


def images(folder, value):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3)).astype(np.uint8)
    pixels[0, 0, 0] = value
    np.savez(folder / "images.npz", images=pixels, labels=np.arange(4))
    return ["--dataset", "npz", "--data_path", folder / "images.npz"]


def test_images_that_changed_are_noticed(cli, tmp_path):
    run = cli(*images(tmp_path, 1))
    images(tmp_path, 2)
    assert "the images changed since the run began" in cli.error("--resume", run, "--n_iter", 6)
    images(tmp_path, 1)
    cli("--resume", run, "--n_iter", 6)


def test_weights_and_updates_that_changed_are_noticed(cli, tmp_path):
    update, weights = tmp_path / "u.npz", tmp_path / "w.npz"
    cli("--save_update", update, name="first")
    with np.load(update) as file:
        arrays = dict(file)
    given = {name.removeprefix("weight/"): array for name, array in arrays.items() if name.startswith("weight/")}
    np.savez(weights, **given)
    run = cli("--update", update, "--weights", weights, name="second")
    np.savez(weights, **(given | {"head.bias": given["head.bias"] + 1}))
    assert "the weights changed" in cli.error("--resume", run, "--n_iter", 6)
    np.savez(weights, **given)
    bias = "gradient/head.bias"
    np.savez(update, **(arrays | {bias: 1.001 * arrays[bias]}))
    assert "the update changed" in cli.error("--resume", run, "--n_iter", 6)
    np.savez(update, **arrays)
    cli("--resume", run, "--n_iter", 6, name="second")
    assert metrics_of(run)["steps"] == 6


def test_a_run_that_was_moved_is_resumed_where_it_is(cli, tmp_path):
    run = cli()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(run, moved / "run")
    assert magia.main(["--resume", "--save_dir", str(moved), "--run_name", "run", "--n_iter", "6", "--quiet"]) == 0
    assert metrics_of(moved / "run")["steps"] == 6
