"""Updates and weights as other programs write them, from the command line."""

import json

import numpy as np
import pytest
import torch
from conftest import SIGNALS, config_of, generator, metrics_of
from PIL import Image
from torch import nn

import main_MAGIA_sel as magia
from data import load_batch, open_source
from judge.metrics import ssim

FACTORIES = """
import collections, dataclasses
import torch
from torch import nn

def conv():
    return nn.Sequential(nn.Conv2d(3, 12, 5, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(1152, 40), nn.Sigmoid(),
                         nn.Linear(40, 10))

def dense():
    return nn.Sequential(nn.Flatten(), nn.Linear(1152, 48), nn.Sigmoid(), nn.Linear(48, 48), nn.Sigmoid(),
                         nn.Linear(48, 10))

def norm():
    return nn.Sequential(nn.Conv2d(3, 12, 5, 2, 2), nn.BatchNorm2d(12), nn.Sigmoid(), nn.Flatten(),
                         nn.Linear(12 * 8 * 12, 10))

@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    loss: object = None

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = conv()

    def forward(self, x):
        return self.net(x)

class Objects(Wrapped):
    def forward(self, x):
        return Output(self.net(x))

class Dicts(Wrapped):
    def forward(self, x):
        return collections.OrderedDict(logits=self.net(x))

class Pairs(Wrapped):
    def forward(self, x):
        return self.net(x), x

class Cured(Objects):
    def forward(self, x): return super().forward(x).logits
"""
SIZE = (16, 24)


class Sender:
    """A client with two images of 16x24 pixels and a model from a file, and the flags that name the model."""

    def __init__(self, folder, factory):
        self.folder, path = folder, folder / "factories.py"
        path.write_text(FACTORIES)
        made = {}
        exec(FACTORIES, made)
        torch.manual_seed(1)
        self.model = made[factory]().eval()
        how = {"labels": "unique", "num_classes": 10, "generator": generator(), "image_size": SIZE}
        self.batch = load_batch(open_source("sample", None), range(2), **how)
        nn.functional.cross_entropy(self.model(self.batch.images), self.batch.labels).backward()
        self.gradients = {name: p.grad for name, p in self.model.named_parameters()}
        self.state = self.model.state_dict()
        self.flags = ["--model", f"{path}:{factory}", "--num_classes", 10, "--image_size", "16x24", "--batch_size", 2]

    def save(self, name, tensors):
        """A file of torch, or arrays without names where the ending is .npz."""
        if name.endswith(".npz"):
            np.savez(self.folder / name, *(t.detach().numpy() for t in tensors))
        else:
            torch.save(tensors, self.folder / name)
        return self.folder / name

    def read(self, cli, update, weights, *more):
        """Attack; returns the run directory, with every image's error against the truth in dB."""
        run = cli("--update", update, "--weights", weights, *self.flags, *SIGNALS, "--max_evals", 10, *more)
        files = sorted((run / "images").iterdir())
        pictures = torch.stack([torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) / 255 for f in files])
        error = (pictures[:, None] - self.batch.images).square().mean((2, 3, 4)).min(0).values
        return run, -10 * error.clamp(min=1e-6).log10()


def before(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def notes_of(run):
    facts = json.loads((run / "audit.json").read_text())
    assert facts["notes"] == config_of(run)["notes"]
    return "\n".join(facts["notes"])


def test_a_wrapped_client_is_read_like_a_bare_one_and_each_step_is_said(cli, tmp_path):
    sender = Sender(tmp_path, "conv")
    update = sender.save("round7.pth.tar", {"round": 7, "grads": before("_module.", sender.gradients)})
    content = {"epoch": 3, "state_dict": before("model._orig_mod.", sender.state), "hyper": {"lr": 0.1}}
    run, psnr = sender.read(cli, update, sender.save("last.ckpt", content))
    assert psnr.min() > 40
    said = notes_of(run)
    for words in ("entry 'grads'", "'_module.'", "entry 'state_dict'", "'model._orig_mod.'"):
        assert words in said
        assert words in cli.out
        assert words.replace("'", "&#39;") in (run / "report.html").read_text()


def test_a_bare_client_of_a_wrapped_model_is_read_too(cli, tmp_path):
    sender, wrapped = Sender(tmp_path, "conv"), Sender(tmp_path, "Wrapped")
    sender.flags = wrapped.flags
    run, psnr = sender.read(cli, sender.save("u.bin", sender.gradients), sender.save("w.pt", sender.state))
    assert psnr.min() > 40
    assert "the model's prefix 'net.'" in notes_of(run)


def keras(name, tensor, flattened=""):
    """A kernel as Keras keeps it."""
    tensor = tensor.detach()
    if name == flattened:
        before = (3, *SIZE) if name.startswith("1") else (12, 8, 12)
        return tensor.reshape(-1, *before).permute(2, 3, 1, 0).reshape(tensor.shape[1], -1)
    return tensor.permute(2, 3, 1, 0) if tensor.dim() == 4 else tensor.T if tensor.dim() == 2 else tensor


@pytest.mark.parametrize(("factory", "flattened"), [("conv", "3.weight"), ("dense", "1.weight")])
@pytest.mark.parametrize("kind", ["gradient", "difference"])
def test_keras_is_read_to_the_pixel(cli, tmp_path, factory, flattened, kind):
    sender = Sender(tmp_path, factory)
    sign = 1 if kind == "gradient" else -0.1
    update = sender.save("u.npz", [sign * keras(n, g, flattened) for n, g in sender.gradients.items()])
    weights = sender.save("w.npz", [keras(n, w, flattened) for n, w in sender.state.items()])
    rate = [] if kind == "gradient" else ["--local_lr", 0.1]
    run, psnr = sender.read(cli, update, weights, "--update_kind", kind, *rate)
    assert psnr.min() > 40
    said = notes_of(run)
    assert said.count("Keras's layout") == 2
    assert said.count(repr(flattened)) == 2


def test_a_kernel_of_another_layout_than_the_rest_says_how_to_turn_it(cli, tmp_path):
    sender = Sender(tmp_path, "conv")
    update = sender.save("u.npz", [keras(n, g) if g.dim() == 4 else g for n, g in sender.gradients.items()])
    weights = sender.save("w.pt", sender.state)
    message = cli.error("--update", update, "--weights", weights, *sender.flags)
    assert all(word in message for word in ("'0.weight'", "Keras's order", "transpose by (3, 2, 0, 1)"))


def without_counter(state):
    return [value for name, value in state.items() if "tracked" not in name]


def test_a_flower_client_may_leave_the_counter_out(cli, tmp_path):
    sender = Sender(tmp_path, "norm")
    new = {name: sender.state[name] - 0.1 * gradient for name, gradient in sender.gradients.items()}
    update = sender.save("u.npz", without_counter(sender.state | new))
    weights = sender.save("w.npz", without_counter(sender.state))
    run, psnr = sender.read(cli, update, weights, "--update_kind", "weights", "--local_lr", 0.1)
    assert psnr.min() > 25
    assert notes_of(run).count("without num_batches_tracked") == 2
    few = sender.save("few.npz", without_counter(sender.state)[:3])
    message = cli.error("--update", few, "--weights", weights, *sender.flags)
    assert "3 arrays" in message
    assert all(count in message for count in ("9 (the state dict)", "8 (the state dict without", "6 (the trainable"))


def test_weights_without_running_statistics_say_which_are_kept(cli, tmp_path):
    sender = Sender(tmp_path, "norm")
    weights = sender.save("w.pt", {name: sender.state[name] for name in sender.gradients})
    run, psnr = sender.read(cli, sender.save("u.pt", sender.gradients), weights)
    assert psnr.min() > 25
    assert "holds no running statistics of BatchNorm" in notes_of(run)


def test_negative_variances_are_refused_by_name(cli, tmp_path):
    sender = Sender(tmp_path, "norm")
    name = next(name for name in sender.state if name.endswith("running_var"))
    weights = sender.save("w.pt", sender.state | {name: -sender.state[name]})
    words = ["--update", sender.save("u.pt", sender.gradients), "--weights", weights, *sender.flags]
    assert f"{name!r} holds negative variances" in cli.error(*words)


# ----------------------------------------------------------------------------------------------------
# Images that are not square


def test_a_simulated_client_an_update_and_a_resumed_run_keep_height_and_width(cli, tmp_path, capsys):
    sender = Sender(tmp_path, "conv")
    run = cli(*sender.flags, *SIGNALS, "--save_update", tmp_path / "u.npz", "--max_evals", 5)
    assert config_of(run)["image_size"] == "16x24"
    assert metrics_of(run)["psnr_mean"] > 80
    picture = Image.open(run / "comparison.png")
    gap, tile = 4, (96, 64)
    assert picture.height >= 2 * (tile[1] + gap)
    at = [(22 + column * (tile[0] + gap), row * (tile[1] + gap)) for row in (0, 1) for column in (0, 1)]
    tiles = [np.asarray(picture.crop((x, y, x + tile[0], y + tile[1]))).astype(int) for x, y in at]
    assert all(np.abs(truth - result).max() <= 2 for truth, result in zip(tiles[:2], tiles[2:], strict=True))
    assert "16x24 pixels (height x width)" in (run / "report.html").read_text()
    received = cli("--update", tmp_path / "u.npz", *sender.flags, name="received")
    resumed = ["--resume", received, "--model", sender.flags[1], "--max_evals", 9]
    assert magia.main([str(word) for word in resumed]) == 0
    capsys.readouterr()
    assert config_of(received)["image_size"] == "16x24"
    wrong = cli.error("--update", tmp_path / "u.npz", *sender.flags, "--image_size", 24)
    assert "the update has 16x24" in wrong


def test_the_loop_alone_moves_images_that_are_not_square(cli, tmp_path):
    sender = Sender(tmp_path, "conv")
    how = ["--spectral_power", 1, "--init", "folder", "--max_evals", 30]
    (tmp_path / "folder").mkdir()
    for index in range(2):
        Image.new("RGB", (30, 20), (90, 100 + index, 110)).save(tmp_path / "folder" / f"{index}.png")
    how[3] = tmp_path / "folder"
    run = cli(*sender.flags, *how)
    assert metrics_of(run)["psnr_mean"] > 5


def test_explain_takes_height_and_width(cli, tmp_path, capsys):
    sender = Sender(tmp_path, "conv")
    words = ["--explain", *sender.flags, "--save_dir", tmp_path]
    assert magia.main([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    assert "B=2, 16x24" in said
    assert "(3, 16, 24)" in said
    assert (tmp_path / "explain_factories.py_conv_B2_16x24.csv").is_file()


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("16x", "'' is not an integer"),
        ("x24", "'' is not an integer"),
        ("16x24x3", "'24x3' is not an integer"),
        ("0x24", "0 is out of range"),
        ("16x2000", "at most 1024"),
        ("16x24", "lenet takes square images"),
    ],
)
def test_sizes_that_make_no_sense_are_one_line(cli, size, words):
    assert words in cli.error("--image_size", size)


@pytest.mark.parametrize(("text", "value"), [("16x24", "16x24"), ("24X24", 24), ("16,24", "16x24"), ("24", 24)])
def test_a_size_has_one_spelling(text, value):
    assert magia_size(text) == value


def magia_size(text):
    from cli.flags import image_size

    return image_size(text)


def test_images_narrower_than_the_window_of_ssim_are_measured():
    image = torch.rand(3, 5, 40, generator=generator())
    assert ssim(image, image) == pytest.approx(1)
    assert ssim(image, 1 - image) < 0.1


# ----------------------------------------------------------------------------------------------------
# Models that put out more than logits


@pytest.mark.parametrize(("factory", "part"), [("Objects", ".logits"), ("Dicts", "['logits']"), ("Pairs", "[0]")])
def test_a_model_that_puts_out_an_object_is_refused_with_the_way_to_wrap_it(cli, tmp_path, factory, part):
    (tmp_path / "factories.py").write_text(FACTORIES)
    message = cli.error("--model", f"{tmp_path / 'factories.py'}:{factory}", "--image_size", "16x24")
    assert f"return super().forward(x){part}" in message


def test_the_way_to_wrap_a_model_works(cli, tmp_path):
    (tmp_path / "factories.py").write_text(FACTORIES)
    run = cli("--model", f"{tmp_path / 'factories.py'}:Cured", "--image_size", "16x24", *SIGNALS, "--max_evals", 5)
    assert metrics_of(run)["signals_found"] == 3
