"""Models as people bring them, from the command line: what is read of each, and what is said of the rest."""

import pytest
import torch
from conftest import SIGNALS, generator, metrics_of
from torch import nn

import main_MAGIA_sel as magia
from network.zoo import build_model
from update.gradients import averaged_gradient

NETS = """
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

def small(act=nn.Sigmoid, k=10):
    layers = [nn.Conv2d(3, 12, 5, 2, 2), act(), nn.Conv2d(12, 12, 5, 1, 2), act(), nn.Flatten(), nn.Linear(768, k)]
    return nn.Sequential(*layers)

class Around(nn.Module):
    def __init__(self, act=nn.Sigmoid):
        super().__init__()
        self.net = small(act)

class LogSoft(Around):
    def forward(self, x):
        return functional.log_softmax(self.net(x), 1)

class Soft(Around):
    def forward(self, x):
        return functional.softmax(self.net(x), 1)

class Standardised(Around):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))

    def forward(self, x):
        return self.net((x - self.mean) / 0.25)

def hard():
    return small(nn.Hardsigmoid)

def normed():
    net = small()
    net[2], net[5] = weight_norm(net[2]), weight_norm(net[5])
    return net

def spectral():
    net = small()
    net[5] = spectral_norm(net[5])
    return net

def older():
    net = small()
    net[2] = torch.nn.utils.spectral_norm(net[2])
    return net

def convolutions():
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.last = nn.Conv2d(3, 12, 5, 2, 2), nn.Linear(12, 12), nn.Conv2d(12, 12, 5, 1, 2)
        self.head = nn.Linear(768, 10)

    def forward(self, x):
        x = self.stem(x).sigmoid()
        x = x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.head(self.last(x).sigmoid().flatten(1))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 10)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True)

    def forward(self, x):
        return self.head(self.block(self.patch(x).flatten(2).transpose(1, 2)).mean(1))

class Block(nn.Module):
    def __init__(self, act, last):
        super().__init__()
        self.body, self.last = nn.Sequential(*act), last

    def forward(self, x):
        return self.last(self.body(x) + x)

def nothing_inside():
    front = [nn.Conv2d(3, 8, 3, padding=1), Block([nn.BatchNorm2d(8), nn.ELU()], nn.Identity())]
    return nn.Sequential(*front, nn.Flatten(), nn.Linear(2048, 10))

def inverted():
    body = [nn.Conv2d(8, 16, 1), nn.ReLU6(), nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.SiLU(), nn.Conv2d(16, 8, 1)]
    front = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6(), Block(body, nn.Identity()), Block([nn.ELU()], nn.SiLU())]
    return nn.Sequential(*front, nn.Flatten(), nn.Linear(2048, 10))
"""


@pytest.fixture
def nets(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    return path


def explained(capsys, folder, *flags):
    words = ["--image_size", "16", "--batch_size", "2", "--num_classes", "10", *flags, "--save_dir", str(folder)]
    assert magia.main(["--explain", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["LogSoft", "Standardised", "hard", "normed"])
def test_what_changes_nothing_for_the_walk_leaves_the_pixels_exact(cli, nets, name):
    run = cli("--model", f"{nets}:{name}", *SIGNALS, "--labels", "unique")
    assert "pixels and all" in cli.out
    assert metrics_of(run)["psnr_mean"] > 80


def test_a_sequence_of_layers_is_normalised_in_client_attack_and_forecast(cli, nets, capsys):
    flags = ["--model", f"{nets}:small", "--mean", "0.5", "--std", "0.5,0.4,0.3"]
    assert metrics_of(cli(*flags, *SIGNALS, "--labels", "unique"))["psnr_mean"] > 80
    assert "the deepest inputs to be expected exactly: the inputs of 0" in explained(capsys, cli.folder, *flags)
    model = build_model(f"{nets}:small", image_shape=(3, 16, 16), num_classes=10, generator=generator())
    images, labels = torch.rand(2, 3, 16, 16, generator=generator()), torch.tensor([3, 7])
    scaled = (images - 0.5) / torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    gradients = averaged_gradient(model, scaled, labels)
    names = [name for name, _ in model.named_parameters()]
    torch.save(dict(zip(names, gradients, strict=True)), cli.folder / "g.pt")
    torch.save(model.state_dict(), cli.folder / "w.pt")
    received = ["--update", cli.folder / "g.pt", "--weights", cli.folder / "w.pt", "--image_size", "16"]
    cli(*received, *flags, *SIGNALS, "--batch_size", "2", name="received")
    assert "2 of 2 images told apart, pixels and all" in cli.out


def test_a_gate_is_walked_down_to_the_pixels(cli, nets, capsys):
    run = cli("--model", f"{nets}:Gated", *SIGNALS, "--labels", "unique")
    assert "3 of 3 images told apart, pixels and all" in cli.out
    assert metrics_of(run)["psnr_mean"] > 80
    out = explained(capsys, cli.folder, "--model", f"{nets}:Gated")
    assert "run as a whole" not in out
    assert "the deepest inputs to be expected exactly: the inputs of stem" in out


@pytest.mark.parametrize("flags", [(), ("--signals", "off"), ("--signals", "off", "--defence", "dpsgd:1:0.1")])
def test_attention_is_attacked_and_its_head_read(cli, nets, flags):
    run = cli("--model", f"{nets}:Tokens", *SIGNALS, "--labels", "unique", *flags)
    assert metrics_of(run)["steps"] == 4
    if not flags:
        assert metrics_of(run)["signals_found"] == 3


def test_a_model_that_ends_in_a_softmax_is_told_that_it_is_taken_twice(cli, nets, capsys):
    run = cli("--model", f"{nets}:Soft", *SIGNALS)
    assert "the softmax is taken twice" in cli.out
    assert metrics_of(run)["steps"] == 4
    out = explained(capsys, cli.folder, "--model", f"{nets}:Soft")
    assert "the softmax is taken twice" in out
    assert "such a model can still be attacked" in out


def test_a_head_whose_gradient_the_update_does_not_tell_is_not_read(cli, nets, capsys):
    cli("--model", f"{nets}:spectral", *SIGNALS)
    assert "the head is not read: its weight is made of other parameters (SpectralNorm)" in cli.out
    out = explained(capsys, cli.folder, "--model", f"{nets}:spectral")
    assert "no layer's inputs are to be expected exactly" in out


@pytest.mark.parametrize("name", ["older", "nothing_inside", "inverted"])
def test_models_that_are_not_walked_to_their_end_are_attacked(cli, nets, name):
    run = cli("--model", f"{nets}:{name}", *SIGNALS, "--labels", "unique", "--max_evals", "4")
    assert metrics_of(run)["signals_found"] == 3


def test_a_model_whose_batch_size_cannot_be_read_off_is_told_so(cli, nets):
    for name, words in (("convolutions", "set --batch_size"), ("normed", None)):
        model = build_model(f"{nets}:{name}", image_shape=(3, 16, 16), num_classes=10, generator=generator())
        images, labels = torch.rand(2, 3, 16, 16, generator=generator()), torch.tensor([3, 7])
        gradients = averaged_gradient(model, images, labels)
        names = [key for key, _ in model.named_parameters()]
        torch.save(dict(zip(names, gradients, strict=True)), cli.folder / f"{name}.pt")
        torch.save(model.state_dict(), cli.folder / f"{name}_w.pt")
        flags = ["--update", cli.folder / f"{name}.pt", "--weights", cli.folder / f"{name}_w.pt", "--image_size", 16]
        flags += ["--model", f"{nets}:{name}", "--num_classes", "10", "--n_iter", "1", "--run_name", name]
        words_of = [str(word) for word in [*flags, "--save_dir", cli.folder]]
        if words:
            assert magia.main(words_of) == 2
            assert f"the batch size cannot be read off this model: {words}" in cli._capsys.readouterr().err
        else:
            assert magia.main(words_of) == 0
            assert "2 of 2 images told apart" in cli._capsys.readouterr().out


@pytest.mark.parametrize("place", ["import torchvision\n", "from half import torchvision\n", ""])
def test_a_file_may_import_torchvision(cli, tmp_path, place, monkeypatch):
    (tmp_path / "half.py").write_text(
        "try:\n    import torchvision\nexcept RuntimeError as e:\n    raise ImportError('no') from e\n"
    )
    inside = "    import torchvision\n" if not place else ""
    text = f"{place}def net():\n{inside}    return torchvision.models.alexnet(num_classes=10)\n"
    (tmp_path / "tv.py").write_text(text)
    broken = _BrokenOnce()
    monkeypatch.setattr("builtins.__import__", broken.imported)
    model = build_model(f"{tmp_path / 'tv.py'}:net", image_shape=(3, 64, 64), num_classes=10, generator=generator())
    assert broken.has_failed
    assert isinstance(model, nn.Module)
    assert not any(getattr(layer, "inplace", False) for layer in model.modules())


class _BrokenOnce:
    """An import statement to which torchvision's operators are missing the first time."""

    def __init__(self):
        self.real, self.has_failed = __import__, False

    def imported(self, name, *args, **how):
        if name == "torchvision" and not self.has_failed:
            self.has_failed = True
            raise RuntimeError("operator torchvision::nms does not exist")
        return self.real(name, *args, **how)


def test_a_torchvision_family_that_is_not_walked_whole_is_read_at_its_head(cli, capsys):
    flags = ["--model", "torchvision:swin_t", "--image_size", "32"]
    out = explained(capsys, cli.folder, *flags)
    assert "run as a whole: all below" in out
    assert "such a model can still be attacked" in out
