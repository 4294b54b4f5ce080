"""Tensors of other programs: wrappers' prefixes, checkpoints that nest them, arrays without names."""

import argparse

import numpy as np
import pytest
import torch
from conftest import generator
from torch import nn

from update.received import recognised
from update.storage import ENTERED, StorageError, read_tensors
from update.weights import load_checkpoint

SHAPE = (3, 8, 8)


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x)


def gradients(model=None):
    """Random tensors by the names of a model's parameters."""
    draw = generator(1)
    return {name: torch.randn(p.shape, generator=draw) for name, p in (model or net()).named_parameters()}


def put_before(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


PREFIXES = [
    "module.",
    "_orig_mod.",
    "_module.",
    "model.",
    "_orig_mod.module.",
    "model._orig_mod.",
    "backbone.x.",
    "a/b/",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_before_all_names_is_stripped_and_said(prefix):
    found, (note,) = recognised(put_before(prefix, gradients()), net(), SHAPE, "u.pt")
    assert all(torch.equal(found[name], tensor) for name, tensor in gradients().items())
    assert found.keys() == gradients().keys()
    assert note == f"u.pt: the prefix {prefix!r} of its names is stripped"


def test_parts_of_wrappers_inside_names_are_dropped():
    tensors = {name.replace(".", "._orig_mod.module."): tensor for name, tensor in gradients().items()}
    found, (note,) = recognised(put_before("net.", tensors), net(), SHAPE, "u.pt")
    assert found.keys() == gradients().keys()
    assert "parts of wrappers in its names are dropped, the prefix 'net.'" in note


@pytest.mark.parametrize(
    ("prefix", "said"), [("", "the model's prefix 'net.'"), ("module.", "taken for the model's 'net.'")]
)
def test_a_prefix_that_only_the_model_has_is_put_in_front(prefix, said):
    found, (note,) = recognised(put_before(prefix, gradients()), Wrapped(), SHAPE, "u.pt")
    assert found.keys() == gradients(Wrapped()).keys()
    assert said in note


def test_names_that_fit_are_left_alone():
    tensors = gradients(Wrapped())
    assert recognised(tensors, Wrapped(), SHAPE, "u.pt") == (tensors, [])


def test_others_beside_the_prefix_are_left_out_and_said():
    found, notes = recognised(put_before("model.", gradients()) | {"loss.weight": torch.ones(5)}, net(), SHAPE, "u.pt")
    assert found.keys() == gradients().keys()
    assert "'loss.weight'" in notes[1]


def test_two_models_in_a_file_are_refused():
    both = put_before("student.", gradients()) | put_before("teacher.", gradients())
    with pytest.raises(StorageError, match=r"two sets of tensors: 'student\.' and 'teacher\.'"):
        recognised(both, net(), SHAPE, "u.pt")


def test_a_prefix_that_leaves_a_name_out_is_not_taken_for_all():
    tensors = put_before("module.", gradients())
    del tensors["module.4.bias"]
    found, _ = recognised(tensors, net(), SHAPE, "u.pt")
    assert "4.bias" not in found  # averaged_gradients names it
    assert "4.weight" in found


NESTS = {
    "state_dict": lambda t: {"epoch": 3, "state_dict": t, "optimizer": {"state": {0: {"m": torch.ones(2)}}}},
    "model": lambda t: {"model": t, "best": 0.7, "ema": t},
    "model_state_dict": lambda t: {"model_state_dict": t, "optimizer_state_dict": {"state": {}, "param_groups": []}},
    "the one entry": lambda t: {"round": 1, "what_the_client_sent": t},
    "nested twice": lambda t: {"checkpoint": {"model": t, "epoch": 3}, "loss": torch.tensor(0.3)},
    "a list": lambda t: {"gradients": list(t.values()), "round": 1},
    "beside numbers": lambda t: {**t, "epoch": 3},
}


@pytest.mark.parametrize("ending", [".pt", ".ckpt", ".bin", ".pth.tar"])
@pytest.mark.parametrize("nest", NESTS)
def test_the_tensors_of_a_checkpoint_are_found_and_said(tmp_path, nest, ending):
    torch.save(NESTS[nest](gradients()), tmp_path / f"c{ending}")
    tensors, text = read_tensors(tmp_path / f"c{ending}")
    found, _ = recognised(tensors, net(), SHAPE, "c")
    assert all(torch.equal(found[name], tensor) for name, tensor in gradients().items())
    assert text[ENTERED]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": {"x": torch.ones(2)}, "b": {"x": torch.ones(2)}}, "holds tensors in 'a', 'b'"),
        ({"epoch": 3, "lr": 0.1}, "'epoch' is a int"),
        ([torch.ones(2), 3], "arr_1"),
        ({"state_dict": {"w": torch.ones(2)}, "hparams": argparse.Namespace()}, "object of argparse.Namespace"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_says_what_to_save(tmp_path, content, words):
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(StorageError, match=words):
        read_tensors(tmp_path / "c.pt")


def numbered(names, model):
    state = model.state_dict()
    return {f"arr_{index}": state[name] for index, name in enumerate(names)}


def test_every_list_of_the_model_is_found_by_its_length():
    model = net()
    model[1].bias.requires_grad_(False)
    state = list(model.state_dict())
    lists = {
        "state": state,
        "no counter": [name for name in state if "tracked" not in name],
        "all": [name for name, _ in model.named_parameters()],
        "trained": [name for name, p in model.named_parameters() if p.requires_grad],
    }
    for what, names in lists.items():
        found, notes = recognised(numbered(names, model), model, SHAPE, "u.npz")
        assert list(found) == names
        assert bool(notes) == (what in ("no counter", "all"))
    with pytest.raises(StorageError, match=r"4 arrays .* needs 9 \(.*\), 8 \(.*\), 6 \(.*\) or 5 \(the trainable"):
        recognised(numbered(state[:4], model), model, SHAPE, "u.npz")


WITHOUT = {
    "counter": (lambda name: "tracked" in name, []),
    "buffers": (lambda name: "tracked" in name or "running" in name, ["mean 0 and variance 1"]),
}


@pytest.mark.parametrize("form", ["named", "numbered", "wrapped"])
@pytest.mark.parametrize("what", WITHOUT)
def test_weights_may_lack_buffers_that_a_model_has_itself(tmp_path, what, form):
    server, model = net(), net()
    lacks, words = WITHOUT[what]
    arrays = {name: value.numpy() for name, value in server.state_dict().items() if not lacks(name)}
    if form == "numbered":
        np.savez(tmp_path / "w.npz", *arrays.values())
    else:
        np.savez(tmp_path / "w.npz", **put_before("module." if form == "wrapped" else "", arrays))
    notes = load_checkpoint(model, tmp_path / "w.npz")
    assert all(torch.equal(value, server.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(any(word in note for note in notes) for word in words)
    assert any("running" in note for note in notes) == bool(words)


@pytest.mark.parametrize("counter", [np.ones(1, np.int64) * 7, np.float32(7.0), np.ones((1, 1)) * 7])
def test_a_counter_of_batches_is_one_number_however_it_is_kept(tmp_path, counter):
    model = net()
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    np.savez(tmp_path / "w.npz", **(state | {"1.num_batches_tracked": counter}))
    load_checkpoint(model, tmp_path / "w.npz")
    assert model[1].num_batches_tracked == 7


def test_one_missing_statistic_among_others_is_refused(tmp_path):
    state = {name: value.numpy() for name, value in net().state_dict().items() if name != "1.running_var"}
    np.savez(tmp_path / "w.npz", **state)
    with pytest.raises(ValueError, match=r"'1\.running_var' is missing"):
        load_checkpoint(net(), tmp_path / "w.npz")
