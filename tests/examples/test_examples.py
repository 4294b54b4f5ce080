"""The examples as their first lines say, with a short attack."""

import subprocess
import sys

import pytest
from conftest import ROOT


def told_apart(folder, name):
    """What the audit says that it has read of the four images."""
    command = [sys.executable, ROOT / "examples" / f"{name}_audit.py", "--max_evals", "4"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(folder.glob(f"results/{name}/update_B4_*/images/*.png"))) == 4
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("signals: ")]
    return line


def test_a_round_of_federated_averaging(tmp_path):
    assert "4 of 4 images told apart" in told_apart(tmp_path, "fedavg")


def test_a_flower_simulation(tmp_path):
    pytest.importorskip("flwr", reason="pip install -r requirements-examples.txt")
    assert "4 of 4 images told apart" in told_apart(tmp_path, "flower")
