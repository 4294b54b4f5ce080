"""The arrays of images and labels in an .npz file, by the names that such arrays usually have.

A name may say of which part of the set the array is: `images`, `test_images`, `x_train`, `trainX`. Where the names say
nothing, two arrays are told apart by their shapes.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

IMAGES = ("images", "image", "imgs", "img", "x", "data", "pixels", "inputs", "features")
LABELS = ("labels", "label", "targets", "target", "y", "classes")
PART = re.compile(r"(train|test|val)(?:ing|idation|id)?")
PARTS = {True: ("", "train", "val", "test"), False: ("", "test", "train", "val")}  # in the order of choice; "": no part


class ArraysError(ValueError):
    """An .npz file without usable arrays; the message lists the arrays that are there."""


def images_and_labels(
    file: Mapping[str, np.ndarray], path: Path, *, train: bool = False
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images uint8 (N, H, W, C) or (N, H, W), labels (N,), and notes on the choice among several arrays.

    Args:
        file: the arrays by name, loaded when they are asked for.
        path: of the file, for messages.
        train: whether training arrays come before test arrays.

    Raises:
        ArraysError: there are no such arrays, or they have other shapes or types.
    """
    names = list(file)
    found = _by_name(names, train=train) or _by_shape(file, names)
    if found is None:
        there = ", ".join(map(repr, names)) or "none"
        raise ArraysError(f"{path}: it must hold the arrays 'images' and 'labels'; its arrays are {there}")
    images, labels = found
    notes = []
    others = [name for name in names if name not in found and _meaning(name) is not None]
    if others or set(found) != {"images", "labels"}:
        notes.append(f"{path}: the arrays {images!r} and {labels!r} are taken")
        notes[0] += f"; it also holds {', '.join(map(repr, others))}" if others else ""
    pixels = _checked_images(file[images], images, path)
    return pixels, _checked_labels(file[labels], labels, len(pixels), path), notes


def _meaning(name: str) -> tuple[str, str] | None:
    """The part of the set and the usual name of an array, of its own name; None where the name says nothing."""
    bare = name.lower()
    part = PART.match(bare) or re.search(PART.pattern + "$", bare)
    base = (bare[: part.start()] + bare[part.end() :] if part else bare).strip("_-./ ")
    return (part[1] if part else "", base) if base in IMAGES + LABELS else None


def _by_name(names: Sequence[str], *, train: bool) -> tuple[str, str] | None:
    """The names of images and labels of one part of the set, the first part that has both."""
    by_meaning = {meaning: name for name in reversed(names) if (meaning := _meaning(name)) is not None}
    for part in PARTS[train]:
        each = [
            next((by_meaning[part, base] for base in usual if (part, base) in by_meaning), None)
            for usual in (IMAGES, LABELS)
        ]
        if None not in each:
            return tuple(each)
    return None


def _by_shape(file: Mapping[str, np.ndarray], names: Sequence[str]) -> tuple[str, str] | None:
    """The two arrays of a file, the one of images first, if their dimensions tell which it is."""
    if len(names) != 2:
        return None
    labels, images = sorted(names, key=lambda name: file[name].ndim)
    is_clear = file[labels].ndim in (1, 2) and file[images].ndim > 2 and len(file[labels]) == len(file[images])
    return (images, labels) if is_clear else None


def _checked_images(images: np.ndarray, name: str, path: Path) -> np.ndarray:
    shape, kind = images.shape, images.dtype
    if kind == np.uint8 and (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))):
        return images
    way = ""
    if kind == np.uint8 and len(shape) == 4 and shape[1] in (1, 3):
        way = ": channels stand first, transpose by (0, 2, 3, 1)"
    elif np.issubdtype(kind, np.floating):
        way = ": of pixels in [0, 1], save (255 * images).round().astype('uint8')"
    elif kind == np.uint16:
        way = ": of 16 bits, save (images / 257).round().astype('uint8')"
    raise ArraysError(f"{path}: {name} must be uint8 (N, H, W, 3), (N, H, W, 1) or (N, H, W), got {kind} {shape}{way}")


def _checked_labels(labels: np.ndarray, name: str, count: int, path: Path) -> np.ndarray:
    shape = labels.shape
    if len(shape) == 2 and shape[0] == count and shape[1] > 1:
        raise ArraysError(
            f"{path}: {name} {shape} hold {shape[1]} numbers for each image, as several labels do; an image has one "
            f"class here, since the client's loss is the cross-entropy with one class. If each row has a single 1, "
            f"save {name}.argmax(1)"
        )
    labels = labels[:, 0] if len(shape) == 2 and shape[1] == 1 else labels
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ArraysError(f"{path}: {name} must be {count} integers, got {labels.dtype} {shape}")
    return labels
