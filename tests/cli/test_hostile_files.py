"""Files and models that claim or ask for more than there is: one line, before memory is taken."""

import io
import json
import math
import signal
import zipfile

import numpy as np
import pytest
import torch
from conftest import SMALL
from safetensors.torch import save_file

import main_MAGIA_sel as magia

MEMORY = 16 * 10**9  # bytes that are free, wherever the tests run
TERABYTES = 10**13 // 4  # entries of four bytes
MEGABYTES = 64  # that an array of zeros unpacks to; the model's tensors take two


@pytest.fixture(autouse=True)
def _memory(monkeypatch):
    monkeypatch.setattr("network.memory.free_bytes", lambda device=None: MEMORY)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """The arrays of a saved update."""
    folder = tmp_path_factory.mktemp("good")
    words = ["--save_update", str(folder / "u.npz"), "--save_dir", str(folder), "--run_name", "run", "--quiet"]
    assert magia.main([*SMALL, *words]) == 0
    with np.load(folder / "u.npz") as file:
        return dict(file)


def with_facts(arrays, **changes):
    """The arrays with changed facts; a mapping changes the entries of a mapping."""
    facts = json.loads(str(arrays["metadata/update"]))
    for name, value in changes.items():
        facts[name] = {**facts[name], **value} if isinstance(value, dict) else value
    return arrays | {"metadata/update": np.array(json.dumps(facts))}


def with_claim(path, arrays, name, entries, data=0):
    """An .npz whose array `name` has a header of so many float32 entries, and so many bytes of zeros."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (entries,)})
    np.savez(path, **{own: array for own, array in arrays.items() if own != name})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}.npy", header.getvalue() + bytes(data))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 1.9}, "batch_size 1.9 is not an integer"),
        ({"batch_size": math.inf}, "batch_size inf is not an integer"),
        ({"batch_size": True}, "batch_size True is not an integer"),
        ({"batch_size": "3"}, "batch_size '3' is not an integer"),
        ({"num_classes": 1}, "num_classes 1 is not an integer from 2"),
        ({"image_shape": [3, 16]}, "image_shape a list is not a list of 3"),
        ({"image_shape": [3, 16, math.nan]}, "image_shape nan"),
        ({"options": {"width": 10**9}}, "no option of lenet|width: 1000000000 is out of range"),
        ({"options": {"batch_size": 5}}, "'batch_size' is no option"),
        ({"options": {"mean": ["a"]}}, "mean: 'a' is not a number"),
        ({"model": "mlp", "options": {"width": 100_000}}, "--width 100000 with 10 classes needs at least"),
        ({"training": {"steps": 1.5}}, "training.steps 1.5"),
        ({"training": {"steps": 10**8, "rate": 0.1}}, "local_steps: 100000000 is out of range"),
        ({"training": {"pace": 1}}, "'pace', which is none of its facts"),
        ({"defence": ["clip:1"]}, "defence a list is not a text"),
    ],
)
def test_facts_of_an_update_are_checked_as_flags_are(cli, tmp_path, arrays, changes, words):
    np.savez(tmp_path / "bad.npz", **with_facts(arrays, **changes))
    message = cli.error("--update", tmp_path / "bad.npz")
    assert "bad.npz" in message or "memory" in message
    assert any(word in message for word in words.split("|"))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "nan", "", "9" * 9000])
def test_facts_that_are_no_facts_are_one_line(cli, tmp_path, arrays, text):
    np.savez(tmp_path / "bad.npz", **(arrays | {"metadata/update": np.array(text)}))
    assert "is not a shared update" in cli.error("--update", tmp_path / "bad.npz")


@pytest.mark.parametrize("name", ["gradient/head.bias", "weight/head.bias"])
def test_a_header_that_claims_what_is_not_there_is_refused(cli, tmp_path, arrays, name):
    with_claim(tmp_path / "bad.npz", arrays, name, TERABYTES)
    assert f"{name!r} claims {4 * TERABYTES} bytes" in cli.error("--update", tmp_path / "bad.npz")


def test_arrays_that_unpack_to_more_than_the_model_has_are_refused(cli, tmp_path, arrays):
    bytes_ = MEGABYTES * 10**6
    with_claim(tmp_path / "bad.npz", arrays, "gradient/head.bias", bytes_ // 4, bytes_)
    assert (tmp_path / "bad.npz").stat().st_size < bytes_ / 20
    assert "bad.npz unpacks to 64" in cli.error("--update", tmp_path / "bad.npz")
    own = {name.removeprefix("weight/"): array for name, array in arrays.items() if name.startswith("weight/")}
    with_claim(tmp_path / "weights.npz", own, "head.bias", bytes_ // 4, bytes_)
    assert "weights.npz unpacks to 64" in cli.error("--weights", tmp_path / "weights.npz")


def test_arrays_that_are_not_of_the_update_are_left_in_the_file(cli, tmp_path, arrays):
    bytes_ = MEGABYTES * 10**6
    with_claim(tmp_path / "more.npz", arrays, "notes", bytes_ // 4, bytes_)
    cli("--update", tmp_path / "more.npz")


def test_images_that_an_archive_only_claims_are_refused(cli, tmp_path):
    with_claim(tmp_path / "bad.npz", {"labels": np.arange(4)}, "images", TERABYTES)
    message = cli.error("--dataset", "npz", "--data_path", tmp_path / "bad.npz")
    assert "'images' claims" in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_types_that_nothing_can_be_computed_with_are_named(cli, tmp_path, arrays, dtype):
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if not name.startswith("metadata/")}
    tensors["gradient/head.bias"] = tensors["gradient/head.bias"].to(dtype)
    save_file(tensors, tmp_path / "u.safetensors", {"update": str(arrays["metadata/update"])})
    message = cli.error("--update", tmp_path / "u.safetensors")
    assert "gradient/head.bias" in message
    assert "float8" in message


def test_a_tensor_that_repeats_a_number_without_end_is_refused(cli, tmp_path):
    torch.save({"head.bias": torch.zeros(1).expand(TERABYTES)}, tmp_path / "w.pt")
    assert "w.pt unpacks to" in cli.error("--weights", tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model mlp --width 100000", "--width 100000 with 10 classes needs at least"),
        ("--model mlp --depth 1000 --width 20000", "needs at least"),
        ("--restarts 1000 --image_size 64 --history 10000", "--restarts 1000, --history 10000 needs at least"),
        (f"--indices {','.join(['0-99999'] * 1100)}", "at most 1000000 images"),
    ],
)
def test_flags_that_ask_for_more_memory_than_there_is_are_refused(cli, flags, words):
    assert words in cli.error(*flags.split())


def test_memory_that_runs_out_all_the_same_is_one_line(cli, monkeypatch):
    for error in (MemoryError("of the host"), torch.OutOfMemoryError("of the device")):
        monkeypatch.setattr(magia, "attack", lambda *_, error=error: (_ for _ in ()).throw(error))
        assert str(error) in cli.error("--quiet", "--overwrite")


# ---------------------------------------------------------------------------------------------------- models

NET = """
import torch
from torch import nn


class Net(nn.Module):
    most, pairs, error = 10**9, False, None

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2, 1)
        self.head = nn.Linear(6 * 64, 10)

    def forward(self, x):
        if self.error is not None:
            raise self.error
        if len(x) > self.most:
            raise RuntimeError("too many")
        x = x.view(2, 3, 16, 16) if self.pairs else x
        return self.head(torch.sigmoid(self.conv(x)).flatten(1))


class Own(BaseException):
    pass


def net(**changes):
    made = Net()
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def raises(error):
    raise error


pairs = lambda: net(pairs=True)
few = lambda: net(most=3)
meta = lambda: net().to("meta")
leaves = lambda: raises(SystemExit(3))
interrupts = lambda: raises(KeyboardInterrupt)
own = lambda: raises(Own("mine"))
forward_leaves = lambda: net(error=SystemExit(0))
forward_interrupts = lambda: net(error=KeyboardInterrupt("own"))
"""


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("pairs", "takes 2 images of 3x16x16 and not 3"),
        ("few", "takes 2 images of 3x16x16 and not 4: RuntimeError: too many"),
        ("meta", "weights on the meta device"),
        ("leaves", "raises SystemExit: 3"),
        ("interrupts", "raises KeyboardInterrupt"),
        ("own", "raises Own: mine"),
        ("forward_leaves", "if it takes others): SystemExit: 0"),
        ("forward_interrupts", "if it takes others): KeyboardInterrupt: own"),
    ],
)
def test_a_model_that_cannot_be_attacked_is_one_line(cli, tmp_path, factory, words):
    (tmp_path / "net.py").write_text(NET)
    assert words in cli.error("--model", f"{tmp_path / 'net.py'}:{factory}", "--batch_size", 4)


@pytest.fixture
def hears_ctrl_c():
    """A process that was started in the background may ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_while_a_model_is_made_is_no_word_of_the_model(cli, tmp_path):
    (tmp_path / "net.py").write_text("import signal\n\n\ndef net():\n    signal.raise_signal(signal.SIGINT)\n")
    with pytest.raises(KeyboardInterrupt):
        cli("--model", f"{tmp_path / 'net.py'}:net")
