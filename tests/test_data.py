import gzip
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data
from data import DataError, FolderImages, NpzImages, load_batch, open_source, parse_indices


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def load(source, indices, labels="dataset", num_classes=10, image_size=None, seed=0):
    return load_batch(
        source, indices, labels=labels, num_classes=num_classes, generator=generator(seed), image_size=image_size
    )


def write_npz(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {"images": rng.integers(0, 256, (6, 20, 20, 3), np.uint8), "labels": np.arange(6)} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, side in (("cat/b.png", 20), ("cat/a.jpg", 20), ("dog/c.png", 20), ("dog/odd.png", 24)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    return tmp_path


def test_the_bundled_sample_is_class_balanced():
    source = open_source("sample", None)
    assert len(source) == 128
    labels = [source[i][1] for i in range(128)]
    assert set(np.bincount(labels)) == {12, 13}
    batch = load(source, range(8))
    assert batch.images.shape == (8, 3, 32, 32)
    assert batch.images.dtype == torch.float32
    assert 0 <= batch.images.min() < batch.images.max() <= 1
    assert batch.labels.tolist() == labels[:8]


def test_npz_pixels_are_exact(tmp_path):
    path = write_npz(tmp_path / "a.npz")
    batch = load(NpzImages(path), [5, 0])
    with np.load(path) as arrays:
        expected = torch.from_numpy(arrays["images"][[5, 0]]).permute(0, 3, 1, 2) / 255
    assert torch.equal(batch.images, expected)
    assert batch.labels.tolist() == [5, 0]


@pytest.mark.parametrize("shape", [(6, 20, 20), (6, 20, 20, 1)])
def test_grey_npz_gives_one_channel(tmp_path, shape):
    path = write_npz(tmp_path / "a.npz", images=np.full(shape, 51, np.uint8))
    assert torch.equal(load(NpzImages(path), [0, 1]).images, torch.full((2, 1, 20, 20), 0.2))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"labels": None}, "labels"),
        ({"images": np.zeros((6, 20, 20, 3))}, "float64"),
        ({"images": np.zeros((6, 20, 20, 4), np.uint8)}, "4"),
        ({"labels": np.zeros(5, int)}, "6 integers"),
        ({"labels": np.zeros(6)}, "float64"),
    ],
)
def test_wrong_npz_arrays_are_named(tmp_path, changes, word):
    with pytest.raises(DataError, match=word):
        NpzImages(write_npz(tmp_path / "a.npz", **changes))


def test_damaged_npz_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros((2, 4, 4, 3), np.uint8))  # an .npy by another name
    for content in (b"PK not a zip", b"", path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.npz is damaged or not an \.npz file$"):
            NpzImages(path)
    with pytest.raises(DataError, match="no such file"):
        NpzImages(tmp_path / "none.npz")


def test_class_folders_are_read_in_order(folder):
    batch = load(FolderImages(folder), range(3))
    assert batch.labels.tolist() == [0, 0, 1]
    assert batch.images.shape == (3, 3, 20, 20)


def test_a_flat_folder_has_one_class(folder):
    assert load(FolderImages(folder / "cat"), range(2)).labels.tolist() == [0, 0]


def test_differing_sizes_need_image_size(folder):
    with pytest.raises(DataError, match=r"20x20, 24x24.*--image_size"):
        load(FolderImages(folder), range(4))
    assert load(FolderImages(folder), range(4), image_size=16).images.shape == (4, 3, 16, 16)


def test_a_file_that_is_no_image_is_named(folder):
    (folder / "cat" / "broken.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"broken\.png"):
        load(FolderImages(folder), range(4))


def test_what_a_folder_leaves_out_is_said(folder):
    classes = FolderImages(folder)
    assert [note for note in classes.notes if note.endswith("are left out: notes.txt")]
    assert not load(classes, [0]).notes[1:]
    Image.new("RGB", (20, 20)).save(folder / "preview.png")
    (folder / "photo.HEIC").touch()
    (folder / ".DS_Store").touch()
    beside = FolderImages(folder)
    assert "photo.HEIC" in beside.notes[0]
    assert ".DS_Store" not in beside.notes[0]
    assert beside.notes[1].startswith("folders beside images are left out: cat, dog")
    with pytest.raises(DataError, match=r"larger than the set, which has 1; .*photo\.HEIC.*cat, dog"):
        load(beside, [0, 1])


def test_labels_of_a_folder_without_classes_are_said_to_be_none(folder):
    said = "every label of the set is 0"
    assert any(said in note for note in load(FolderImages(folder / "cat"), [0]).notes)
    assert not any(said in note for note in load(FolderImages(folder / "cat"), [0], labels="random").notes)
    assert not any(said in note for note in load(FolderImages(folder), [0]).notes)


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no images"):
        FolderImages(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        FolderImages(tmp_path / "none")


def test_grey_and_colour_together_become_rgb(tmp_path):
    Image.new("L", (16, 16), 51).save(tmp_path / "a.png")
    assert load(FolderImages(tmp_path), [0]).images.shape == (1, 1, 16, 16)
    Image.new("RGBA", (16, 16), "red").save(tmp_path / "b.png")
    assert load(FolderImages(tmp_path), [0, 1]).images.shape == (2, 3, 16, 16)


@given(st.integers(1, 10), st.integers(0, 99))
def test_unique_labels_do_not_repeat_and_random_ones_are_in_range(batch_size, seed):
    source = open_source("sample", None)
    unique = load(source, range(batch_size), "unique", 10, seed=seed).labels.tolist()
    assert len(set(unique)) == batch_size
    assert set(unique) <= set(range(10))
    random = load(source, range(batch_size), "random", 3, seed=seed).labels.tolist()
    assert set(random) <= {0, 1, 2}


def test_labels_follow_the_generator():
    source = open_source("sample", None)
    assert torch.equal(
        load(source, range(9), "random", 100, seed=5).labels, load(source, range(9), "random", 100, seed=5).labels
    )
    assert not torch.equal(
        load(source, range(9), "random", 100, seed=5).labels, load(source, range(9), "random", 100, seed=6).labels
    )


def test_label_errors():
    source = open_source("sample", None)
    with pytest.raises(DataError, match=r"11 unique labels.*got 10"):
        load(source, range(11), "unique", 10)
    with pytest.raises(DataError, match=r"label 5 has no class.*--num_classes"):
        load(source, range(6), "dataset", 5)
    with pytest.raises(DataError, match="shuffled"):
        load(source, range(2), "shuffled")


def test_index_errors():
    source = open_source("sample", None)
    with pytest.raises(DataError, match=r"index 128 is out of range.*0 to 127"):
        load(source, [0, 128])
    with pytest.raises(DataError, match="129 images is larger than the set, which has 128"):
        load(source, range(129))


@given(st.lists(st.integers(0, 999), min_size=1, max_size=9))
def test_indices_round_trip(indices):
    assert parse_indices(",".join(map(str, indices))) == indices


def test_index_ranges_include_both_ends():
    assert parse_indices("3, 8-11,0-0") == [3, 8, 9, 10, 11, 0]
    for wrong in ("", "a", "1,", "-1", "5-3", "1.5", "1-2-3"):
        with pytest.raises(DataError, match="indices must look like"):
            parse_indices(wrong)


def test_a_range_has_at_most_a_million_indices():
    assert len(parse_indices("5-1000004")) == 10**6
    with pytest.raises(DataError, match=r"'5-1000005': at most 1000000 images"):
        parse_indices("0,5-1000005")


def test_torchvision_sets_read_a_local_copy(tmp_path):
    """Two real IDX files, as MNIST is published, so that the whole path through torchvision is run."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(3 * 28 * 28, dtype=np.uint32).astype(np.uint8)
    for part in ("train", "t10k"):
        for name, content in (
            (f"{part}-images-idx3-ubyte", struct.pack(">IIII", 2051, 3, 28, 28) + pixels.tobytes()),
            (f"{part}-labels-idx1-ubyte", struct.pack(">II", 2049, 3) + bytes([7, 2, 1])),
        ):
            (raw / name).write_bytes(content)
            (raw / f"{name}.gz").write_bytes(gzip.compress(content))
    batch = load(open_source("mnist", tmp_path), range(3))
    assert batch.images.shape == (3, 1, 28, 28)
    assert batch.labels.tolist() == [7, 2, 1]
    assert torch.equal((batch.images.flatten() * 255).round().byte(), torch.from_numpy(pixels))


@pytest.mark.parametrize("dataset", data.TORCHVISION_SETS)
def test_no_network_and_no_copy_is_said_plainly(tmp_path, monkeypatch, dataset):
    def refuse(*_args, **_kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(DataError, match=f"{dataset}: no complete copy in .*--dataset sample"):
        open_source(dataset, tmp_path)


def test_source_errors():
    with pytest.raises(DataError, match="imagenet"):
        open_source("imagenet", None)
    for dataset in ("folder", "npz"):
        with pytest.raises(DataError, match="--data_path"):
            open_source(dataset, None)


@pytest.mark.parametrize("side", [12_000, 30_000])
def test_a_picture_too_large_to_be_meant_is_refused_before_it_is_decoded(tmp_path, side):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    chunk = b"IDAT" + zlib.compress(b"\0")
    png += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "huge.png").write_bytes(png + struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=r"huge\.png"):
            load(FolderImages(tmp_path), [0], image_size=16)


def test_the_other_images_of_a_source_are_those_outside_the_batch_at_its_size(folder):
    batch = load(open_source("sample", None), [3, 5], image_size=16)
    others = torch.cat(list(batch.others))
    whole = load(open_source("sample", None), range(128), image_size=16).images
    assert torch.equal(others, whole[[i for i in range(128) if i not in (3, 5)]])
    assert torch.equal(torch.cat(list(batch.others)), others)
    (folder / "dog" / "torn.png").write_bytes(b"no image")
    few = load(FolderImages(folder), [0, 1])  # the others are of another size, or damaged
    assert torch.cat(list(few.others)).shape == (2, 3, 20, 20)
    everything = load(open_source("sample", None), range(128))
    assert list(everything.others) == []


def test_of_many_other_images_a_thousand_are_spread_over_the_source(tmp_path):
    count = 3500
    pixels = np.arange(count, dtype=np.uint32).view(np.uint8).reshape(count, 2, 2, 1)[..., 0]
    source = NpzImages(write_npz(tmp_path / "many.npz", images=pixels, labels=np.zeros(count, np.int64)))
    others = (torch.cat(list(load(source, [0, 1]).others)) * 255).round().flatten(1).long()
    numbers = others[:, 0] + 256 * others[:, 1]
    assert len(set(numbers.tolist())) == data.MOST_OTHERS == 1000
    assert (numbers.diff() <= 4).all()
    assert numbers[0] == 2
    assert numbers[-1] > count - 5
