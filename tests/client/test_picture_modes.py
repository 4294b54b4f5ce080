"""Image files of every mode that cameras, scanners and editors write."""

import struct

import numpy as np
import pytest
import torch
from conftest import SIGNALS, config_of, generator, metrics_of
from PIL import Image

from data import DataError, FolderImages, load_batch

RAMP = np.linspace(0, 1, 16 * 24).reshape(16, 24)
GREY = Image.fromarray((RAMP * 255).round().astype(np.uint8))
COLOUR = Image.merge("RGB", [GREY, GREY.transpose(0), Image.new("L", GREY.size, 40)])


def batch_of(folder, **how):
    source = FolderImages(folder)
    how = {"labels": "dataset", "num_classes": 5, "generator": generator(), **how}
    return load_batch(source, range(len(source)), **how)


def tiff(path, array, sample_format, photometric=1):
    """A plain TIFF of one strip, for types of numbers that Pillow does not write."""
    (height, width), data = array.shape, array.tobytes()
    bits = 8 * array.itemsize
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(data)), (339, sample_format)]
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags))
    path.write_bytes(head + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4))


def scaled(kind):
    return (RAMP * np.iinfo(kind).max).astype(kind)


DEEP = {
    "16-bit PNG": lambda p: Image.fromarray(scaled(np.uint16)).save(p / "a.png"),
    "16-bit TIFF": lambda p: Image.fromarray(scaled(np.uint16)).save(p / "a.tif"),
    "16-bit TIFF, big-endian": lambda p: Image.fromarray(scaled(np.uint16).astype(">u2")).save(p / "a.tiff"),
    "16-bit TIFF, signed": lambda p: tiff(p / "a.tif", scaled(np.int16), 2),
    "16-bit TIFF, white is 0": lambda p: tiff(p / "a.tif", scaled(np.uint16)[::-1, ::-1].copy(), 1, photometric=0),
    "32-bit TIFF": lambda p: tiff(p / "a.tif", scaled(np.uint32), 1),
    "32-bit TIFF, signed": lambda p: tiff(p / "a.tif", scaled(np.int32), 2),
    "float TIFF": lambda p: Image.fromarray(RAMP.astype(np.float32)).save(p / "a.tif"),
    "16-bit PGM": lambda p: (p / "a.pgm").write_bytes(b"P5 24 16 65535\n" + scaled(np.uint16).astype(">u2").tobytes()),
    "12-bit PGM": lambda p: (p / "a.pgm").write_bytes(b"P5 24 16 4095\n" + (RAMP * 4095).astype(">u2").tobytes()),
}


@pytest.mark.parametrize("mode", DEEP)
def test_deep_grey_is_one_channel_over_its_full_range(tmp_path, mode):
    DEEP[mode](tmp_path)
    batch = batch_of(tmp_path)
    assert batch.images.shape == (1, 1, 16, 24)
    assert (batch.images[0, 0] - torch.from_numpy(RAMP)).abs().max() < 1 / 4000
    assert bool(batch.notes) == (mode != "float TIFF")


def test_values_of_fewer_bits_than_the_file_are_said(tmp_path):
    Image.fromarray((RAMP * 4095).astype(np.uint16)).save(tmp_path / "a.png")
    batch = batch_of(tmp_path)
    assert batch.images.max() == pytest.approx(4095 / 65535)
    assert any("fewer bits" in note for note in batch.notes)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda p: Image.fromarray((255 * RAMP).astype(np.float32)).save(p), "between 0 and 255"),
        (lambda p: Image.fromarray(np.full((16, 24), np.nan, np.float32)).save(p), "nan"),
        (lambda p: tiff(p, (RAMP * 4095).astype(np.uint32), 1), "4095 of 4294967295, the picture would be black"),
        (lambda p: tiff(p, (RAMP * 9 - 3).astype(np.int16), 2), "go down to -3"),
    ],
)
def test_pixels_of_an_unknown_range_are_refused_by_name(tmp_path, write, words):
    write(tmp_path / "odd.tif")
    with pytest.raises(DataError, match=rf"odd\.tif: its .*{words}"):
        batch_of(tmp_path)


def with_alpha(picture, alpha):
    picture = picture.copy()
    picture.putalpha(alpha)
    return picture


HALF = Image.fromarray(np.where(RAMP < 0.5, 0, 255).astype(np.uint8))  # the upper half is transparent
GREYS = GREY.convert("P")
INDEXED = Image.fromarray(np.arange(16 * 24).reshape(16, 24).astype(np.uint8) % 7)
INDEXED.putpalette([value for index in range(256) for value in (index * 30 % 256, 10, 200)])

FILES = {  # picture, options of saving, channels, whether the upper half is transparent
    "RGBA": (with_alpha(COLOUR, HALF), {}, 3, True),
    "RGBA, opaque": (with_alpha(COLOUR, 255), {}, 3, False),
    "LA": (with_alpha(GREY, HALF), {}, 1, True),
    "LA, opaque": (with_alpha(GREY, 255), {}, 1, False),
    "P of greys": (GREYS, {}, 1, False),
    "P of colours": (INDEXED, {}, 3, False),
    "P, transparent": (INDEXED, {"transparency": 3}, 3, False),
    "1": (GREY.convert("1"), {}, 1, False),
    "L": (GREY, {}, 1, False),
    "RGB": (COLOUR, {}, 3, False),
}


@pytest.mark.parametrize("mode", FILES)
def test_channels_and_transparency_are_those_of_the_file(tmp_path, mode):
    picture, options, channels, is_transparent = FILES[mode]
    picture.save(tmp_path / "a.png", **options)
    batch = batch_of(tmp_path)
    assert batch.images.shape == (1, channels, 16, 24)
    assert bool(batch.notes) == (is_transparent or "transparency" in options)
    if is_transparent:
        assert bool((batch.images[0, :, :7] == 1).all())
        assert "transparency is put on white" in batch.notes[0]
    shown = picture.convert("L" if channels == 1 else "RGB")
    expected = torch.from_numpy(np.array(shown)).float() / 255
    expected = expected[None] if channels == 1 else expected.permute(2, 0, 1)
    if "transparency" in options:
        expected = torch.where(torch.from_numpy(np.array(INDEXED)) == 3, 1.0, expected)
    assert torch.equal(batch.images[0, :, 9:], expected[:, 9:])


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.tif", "a.webp"])
def test_of_an_animation_the_first_frame_is_taken_and_said(tmp_path, name):
    how = {"lossless": True} if name.endswith("webp") else {}
    COLOUR.save(tmp_path / name, save_all=True, append_images=[COLOUR.transpose(1)], **how)
    batch = batch_of(tmp_path)
    assert any("first frame" in note for note in batch.notes)
    assert (batch.images[0, 0] - torch.from_numpy(RAMP)).abs().max() < 0.05


def test_cmyk_is_colour_and_said(tmp_path):
    COLOUR.convert("CMYK").save(tmp_path / "a.tif")
    batch = batch_of(tmp_path)
    assert (batch.images[0, 0] - torch.from_numpy(RAMP)).abs().max() < 0.02
    assert "CMYK" in batch.notes[0]


def test_grey_among_colour_has_equal_channels_whatever_its_depth(tmp_path):
    Image.fromarray(scaled(np.uint16)).save(tmp_path / "a.png")
    COLOUR.save(tmp_path / "b.png")
    GREY.save(tmp_path / "c.png")
    batch = batch_of(tmp_path)
    assert batch.images.shape == (3, 3, 16, 24)
    for index, step in ((0, 1e-4), (2, 0.003)):
        assert (batch.images[index] - torch.from_numpy(RAMP)).abs().max() < step
    assert any("2 of 3 images are grey" in note for note in batch.notes)


def test_deep_grey_is_resized_within_its_range(tmp_path):
    Image.fromarray(np.where(RAMP < 0.5, 0, 65535).astype(np.uint16)).save(tmp_path / "a.png")
    images = batch_of(tmp_path, image_size=(8, 12)).images
    assert images.shape == (1, 1, 8, 12)
    assert images.min() == 0
    assert images.max() == 1


def test_a_run_on_deep_grey_is_judged_on_its_pixels_and_says_what_was_assumed(cli, tmp_path):
    for index in range(2):
        picture = Image.fromarray(scaled(np.uint16)).transpose(index).resize((16, 16))
        (tmp_path / "scans").mkdir(exist_ok=True)
        picture.save(tmp_path / "scans" / f"{index}.png")
    run = cli("--dataset", "folder", "--data_path", tmp_path / "scans", "--batch_size", 2)
    assert "note: 0.png and 1 more: grey values are divided by 65535" in cli.out
    assert config_of(run)["notes"] == ["0.png and 1 more: grey values are divided by 65535"]
    assert "divided by 65535" in (run / "report.html").read_text()
    cli("--dataset", "folder", "--data_path", tmp_path / "scans", "--batch_size", 2, "--quiet", name="quiet")
    assert "divided by 65535" in cli.err
    assert cli.out.count("\n") == 1


def test_a_blank_picture_is_no_better_than_a_guess(cli, tmp_path):
    (tmp_path / "blank").mkdir()
    for index in range(2):
        Image.new("L", (16, 16), 255).save(tmp_path / "blank" / f"{index}.png")
    flags = ["--dataset", "folder", "--data_path", tmp_path / "blank", "--batch_size", 2, "--model", "mlp"]
    run = cli(*flags, "--activation", "relu", *SIGNALS)
    assert metrics_of(run)["psnr_guess_mean"] == 100
    assert "verdict: no better than a guess" in cli.out
