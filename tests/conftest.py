import csv
import json
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: the nets are small, more threads cost more

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import main_MAGIA_sel as magia  # noqa: E402
from cli.settings import resolve  # noqa: E402

settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")  # a busy machine is no bug
torch.set_num_threads(1)  # the nets are small: more threads cost more than they bring
torch.manual_seed(0)  # for layers that test files make when they are imported

# A case that takes a second: few small images, a small head, short steps, and the loop alone. With signals it would be
# over before the first step: the images of so small a net are exact.
SMALL = "--batch_size 3 --image_size 16 --num_classes 10 --n_iter 4 --inner_iter 2 --signals off".split()  # noqa: SIM905
SIGNALS = ["--signals", "auto"]


class Cli:
    """Runs the command line in this process, run directories below a folder of the test's own."""

    def __init__(self, folder: Path, capsys) -> None:
        self.folder, self._capsys = folder, capsys

    def __call__(self, *flags, name="run", expect=0):
        """Run with SMALL and the given flags; returns the run directory."""
        status = magia.main([*SMALL, "--save_dir", str(self.folder), "--run_name", name, *map(str, flags)])
        self.out, self.err = self._capsys.readouterr()
        assert status == expect, self.err
        return self.folder / name

    def error(self, *flags) -> str:
        """The one line on stderr that a run with these flags is refused with."""
        words = list(map(str, flags))
        named = [] if "--resume" in words[:-1] else ["--run_name", "bad"]
        try:
            status = magia.main([*SMALL, "--save_dir", str(self.folder), *named, *words])
        except SystemExit as stop:
            status = stop.code
        out, err = self._capsys.readouterr()
        assert status == 2
        assert out == ""
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err


@pytest.fixture(autouse=True)
def _same_in_every_process():
    """Benchmarks set the threads of their process; two test processes with two threads each starve each other.

    torch seeds itself anew in each process, and layers that a test makes without a generator draw from it.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _draw_a_dot(path, rows):
    Image.new("L", (1, 1)).save(path, format="PNG")


@pytest.fixture
def quick_pictures(request, monkeypatch):
    """A run's curves, a third of the time of a small one, are a dot unless the test asks for `curves` as well.

    The colours of its film's frames are chosen in a thirtieth of the time, and less well.
    """
    monkeypatch.setattr("judge.pictures.PALETTE", Image.Quantize.FASTOCTREE)
    if "curves" not in request.fixturenames:
        monkeypatch.setattr("judge.recorder.save_curves", _draw_a_dot)


@pytest.fixture
def cli(quick_pictures, tmp_path, capsys):
    return Cli(tmp_path, capsys)


@pytest.fixture
def curves():
    """The runs of the test draw their true curves.png."""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def resolved(*words):
    """The settings of a command line."""
    return resolve([str(word) for word in words], magia.FLAGS)[0]


CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def metrics_of(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def config_of(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


def trace_of(run):
    with (run / "trace.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def pictures_of(run):
    return [np.asarray(Image.open(file)) for file in sorted((run / "images").iterdir())]


def without_times(run):
    """All that a run leaves behind and must repeat, wall times apart."""
    metrics = {k: v for k, v in metrics_of(run).items() if not k.endswith("seconds")}
    metrics["layers"] = [{k: v for k, v in row.items() if k != "seconds"} for row in metrics["layers"]]
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in trace_of(run)]
    return metrics, rows, [picture.tolist() for picture in pictures_of(run)]
