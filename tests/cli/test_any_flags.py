"""Whatever the flags and files: a complete run directory and status 0 or 1, or one line on stderr and status 2."""

import contextlib
import io
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main_MAGIA_sel as magia
from cli.flags import TYPES
from judge.run_directory import FILES

EXAMPLES = int(os.environ.get("MAGIA_EXAMPLES", "12"))

# Flags that would only make a run long (they stay small), or that other tests look after one by one.
LEFT_OUT = {"run_name", "save_dir", "resume", "overwrite", "quiet", "device", "show_schedule", "save_batch", "update"}
LEFT_OUT |= {"explain", "audit"}
BASE = [*SMALL, "--max_evals", "12", "--quiet"]

numbers = st.one_of(
    st.integers(-2, 6).map(str),
    st.floats(-2, 4).map(str),
    st.sampled_from(["0", "1e-30", "1e30", "-1e308", "nan", "inf", "", "9" * 400, "0x10", "1_0", "²", "two"]),
)
words = st.sampled_from(
    ["none", "head", "head.bias", "a,b", ",", "..", "noise:1e-3", "topk:0.5", "noise:", "1-2,0", "0-9"]
)


@st.composite
def flag(draw):
    """One flag with a value that fits, or nearly fits, or does not."""
    chosen = draw(st.sampled_from([f for f in magia.FLAGS if f.name not in LEFT_OUT]))
    if isinstance(chosen.default, bool):
        return [f"--{chosen.name}"]
    choices = getattr(TYPES.get(chosen.name), "choices", ())
    values = st.sampled_from(choices) if choices else numbers if chosen.name in TYPES else words
    return [f"--{chosen.name}", draw(st.one_of(values, values, values, numbers, words))]


def end_of(argv):
    """Status, stdout and stderr of a command line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = magia.main(argv)
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def check_end(folder, argv):
    status, out, err = end_of([*argv, "--save_dir", str(folder), "--run_name", "run"])
    run = folder / "run"
    if status == 2:
        assert out == ""
        assert err.count("\n") == 1
        assert len(err) < 1000
        assert not (run / "metrics.json").exists()
    else:
        assert status in (0, 1)
        assert err == "" if status == 0 else err
        for name in ("config.json", "metrics.json", "trace.csv", "checkpoint.pt", "reconstruction.png", "history.gif"):
            assert (run / name).stat().st_size
        figures = json.loads((run / "metrics.json").read_text())
        assert figures["evaluations"] <= 12
        assert len(list((run / "images").iterdir())) == json.loads((run / "config.json").read_text())["batch_size"]
        known = {file for pattern in FILES for file in run.glob(pattern)}
        assert {file for file in run.rglob("*") if file.is_file()} == known
    return status


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(st.lists(flag(), min_size=1, max_size=4))
def test_any_flags_end_well(tmp_path_factory, flags):
    folder = tmp_path_factory.mktemp("any")
    try:
        check_end(folder, [*BASE, *(word for pair in flags for word in pair)])
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a run and the update that it attacked, in both formats."""
    folder = tmp_path_factory.mktemp("whole")
    for ending in (".npz", ".safetensors"):
        words = ["--save_update", str(folder / f"u{ending}"), "--run_name", "first", "--overwrite"]
        assert magia.main([*BASE, "--save_dir", str(folder), *words]) == 0
    return folder


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_damage_to_an_update_or_checkpoint_ends_well(whole, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    path = folder / f"u{data.draw(st.sampled_from(['.npz', '.safetensors']))}"
    target = data.draw(st.sampled_from([path, folder / "first" / "checkpoint.pt", folder / "first" / "config.json"]))
    content = bytearray(target.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "flip", "fill"]))
    at = int(data.draw(st.floats(0, 1, exclude_max=True)) * len(content))
    if kind == "cut":
        content = content[:at]
    elif kind == "flip":
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        content[at : at + 64] = bytes(64)
    target.write_bytes(content)
    try:
        if target == path:
            check_end(folder, [*BASE, "--update", str(path)])
        else:
            status, _, err = end_of(
                ["--resume", str(folder / "first"), "--n_iter", "5", "--max_evals", "12", "--quiet"]
            )
            assert status in (0, 1, 2)
            assert err.count("\n") == (status == 2) or status == 1
    finally:
        shutil.rmtree(folder)


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([np.uint8, np.int16, np.float32, np.complex64, np.str_]),
    st.lists(st.integers(0, 40), min_size=0, max_size=5).filter(lambda shape: math.prod(shape) < 1e6),
    st.lists(st.integers(-2, 12), min_size=0, max_size=5),
)
def test_any_arrays_as_data_end_well(tmp_path_factory, dtype, shape, labels):
    folder = tmp_path_factory.mktemp("data")
    np.savez(folder / "d.npz", images=np.zeros(shape).astype(dtype), labels=np.array(labels, int))
    try:
        torch.manual_seed(0)
        check_end(folder, [*BASE, "--dataset", "npz", "--data_path", str(folder / "d.npz"), "--batch_size", "2"])
    finally:
        shutil.rmtree(folder)
