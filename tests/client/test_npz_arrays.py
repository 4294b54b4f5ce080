"""Arrays of images and labels as data sets are published."""

import numpy as np
import pytest
import torch
from conftest import generator

from data import DataError, NpzImages, load_batch

IMAGES = np.arange(6 * 8 * 8, dtype=np.uint32).astype(np.uint8).reshape(6, 8, 8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def source(path, **arrays):
    np.savez(path / "a.npz", **arrays)
    return NpzImages(path / "a.npz")


def batch_of(taken, count=6, num_classes=5, labels="dataset"):
    return load_batch(taken, range(count), labels=labels, num_classes=num_classes, generator=generator())


PAIRS = ["images labels", "x y", "X y", "x_test y_test", "test_images test_labels", "data targets", "trainX trainY"]
PAIRS += ["train_images train_labels", "X_train y_train", "val_data val_labels", "arr_0 arr_1", "scans diagnoses"]


@pytest.mark.parametrize("pair", PAIRS)
def test_arrays_of_the_usual_names_are_found_and_said(tmp_path, pair):
    images, labels = pair.split()
    batch = batch_of(source(tmp_path, **{labels: LABELS, images: IMAGES}))
    assert batch.labels.tolist() == LABELS.tolist()
    assert torch.equal(batch.images[:, 0], torch.from_numpy(IMAGES) / 255)
    assert bool(batch.notes) == (pair != "images labels")
    assert all(repr(images) in note for note in batch.notes)


def test_of_both_parts_of_a_set_the_caller_says_which_and_the_others_are_named(tmp_path):
    arrays = {"train_images": IMAGES, "train_labels": LABELS, "test_images": IMAGES[:2], "test_labels": LABELS[:2]}
    assert len(source(tmp_path, **arrays)) == 2
    assert len(NpzImages(tmp_path / "a.npz", train=True)) == 6
    (note,) = batch_of(source(tmp_path, **arrays), 2).notes
    assert "'test_images' and 'test_labels' are taken; it also holds 'train_images', 'train_labels'" in note


def test_labels_may_stand_in_a_column(tmp_path):
    taken = source(tmp_path, images=IMAGES, labels=LABELS.astype(np.uint8)[:, None])
    assert batch_of(taken).labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"scans": IMAGES, "ages": LABELS, "sexes": LABELS}, "its arrays are 'scans', 'ages', 'sexes'"),
        ({"images": IMAGES}, "its arrays are 'images'"),
        ({}, "its arrays are none"),
        (
            {"images": IMAGES, "labels": np.eye(14, dtype=np.uint8)[:6]},
            r"several labels.*one class.*labels\.argmax\(1\)",
        ),
        ({"images": IMAGES / 255, "labels": LABELS}, r"float64.*255 \* images"),
        ({"images": IMAGES.astype(np.uint16), "labels": LABELS}, r"uint16.*257"),
        ({"images": np.zeros((6, 3, 8, 8), np.uint8), "labels": LABELS}, r"transpose by \(0, 2, 3, 1\)"),
    ],
)
def test_what_is_there_and_what_would_do_is_said(tmp_path, arrays, words):
    with pytest.raises(DataError, match=words):
        source(tmp_path, **arrays)


def test_labels_that_begin_at_1_are_said_whether_or_not_the_last_is_in_the_batch(tmp_path):
    taken = source(tmp_path, images=IMAGES, labels=LABELS + 1)
    with pytest.raises(DataError, match=r"label 3 has no class.*run from 1 to 3.*subtract 1.*--num_classes 4"):
        batch_of(taken, 3, num_classes=3)
    (note,) = batch_of(taken, 2, num_classes=3).notes
    assert "run from 1 to 3" in note
    assert "numbered from 0" in note
    assert "run from 1 to 3" in batch_of(taken, 2, num_classes=100).notes[0]
    assert batch_of(source(tmp_path, images=IMAGES, labels=LABELS * 3 + 1), 2, num_classes=9).notes == ()
    assert batch_of(taken, 3, num_classes=3, labels="random").notes == ()


def test_labels_from_0_ask_for_more_classes_as_ever(tmp_path):
    with pytest.raises(DataError, match=r"label 2 has no class: the head has 2; set --num_classes 3"):
        batch_of(source(tmp_path, images=IMAGES, labels=LABELS), num_classes=2)
    with pytest.raises(DataError, match=r"label -1 has no class: the set's labels begin at -1"):
        batch_of(source(tmp_path, images=IMAGES, labels=LABELS - 1), num_classes=5)
