"""The examples as their first lines say, with a short attack."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from conftest import ROOT


def done(folder, command):
    """What a command prints that is run in a folder."""
    ended = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def pictures(folder, name):
    return len(list(folder.glob(f"results/{name}/update_B*/images/*.png")))


def kept_without_flower(folder, monkeypatch):
    """The update of one client of the Flower example, as its server would keep it; the example itself."""
    spec = importlib.util.spec_from_file_location("flower_audit", ROOT / "examples" / "flower_audit.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.chdir(folder)
    model = example.net()
    torch.manual_seed(7)
    example.train(model, 0)
    example.keep([array.numpy() for array in model.state_dict().values()])
    return example


def test_a_round_of_federated_averaging(tmp_path):
    out = done(tmp_path, [ROOT / "examples" / "fedavg_audit.py", "--max_evals", "4"])
    assert "4 of 4 images told apart" in out
    assert pictures(tmp_path, "fedavg") == 4


def test_a_flower_simulation(tmp_path):
    pytest.importorskip("flwr", reason="pip install -r requirements-examples.txt")
    out = done(tmp_path, [ROOT / "examples" / "flower_audit.py", "--max_evals", "4", "--signals", "off"])
    assert "4 steps of SGD, momentum 0.9 at rate 0.01, through 4 minibatches in turn" in out
    assert pictures(tmp_path, "flower") == 32


@pytest.mark.long
def test_the_update_of_a_flower_client_is_audited_as_four_steps(tmp_path, monkeypatch):
    example = kept_without_flower(tmp_path, monkeypatch)
    assert example.audit("--max_evals", "4", "--signals", "off", "--quiet") == 0
    assert pictures(tmp_path, "flower") == 32


@pytest.mark.long
def test_images_and_labels_of_a_flower_clients_minibatches_are_read(tmp_path, monkeypatch, capfd):
    example = kept_without_flower(tmp_path, monkeypatch)
    assert example.audit("--max_evals", "4") == 0
    out = capfd.readouterr().out
    assert "of 32 images told apart" in out
    assert "labels by trial" in out
