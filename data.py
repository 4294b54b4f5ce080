"""The client's image batches: bundled samples, torchvision sets, a folder of images, an .npz of arrays.

Every source follows torchvision's dataset protocol, `len(source)` and `source[i] -> (PIL image, class index)`;
`load_batch` turns chosen entries of one into a tensor batch. The pictures of a source are grey or RGB with 8 bits, or
grey with floating-point pixels in [0, 1] (modes L, RGB and F); `client/picture_modes.py` makes them of files of every
mode. A batch is grey where all its pictures are, and RGB otherwise.
"""

import math
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from client.npz_arrays import ArraysError, images_and_labels
from client.picture_modes import FILE, NOTES, ModeError, plain
from network.memory import check_room
from network.vision import torchvision
from update.npz import check_arrays

SAMPLE = Path(__file__).parent / "samples" / "cifar10_sample128.npz"
TORCHVISION_SETS = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "mnist": ("MNIST", {"train": True}, {"train": False}),
    "fashionmnist": ("FashionMNIST", {"train": True}, {"train": False}),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}),
}
DATASETS = ("sample", *TORCHVISION_SETS, "folder", "npz")
LABEL_MODES = ("dataset", "random", "unique")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


MOST_TEXT, MOST_INDICES = 100_000, 10**6  # characters and images of --indices: beyond, the text is a mistake
CHANNELS, FLOAT = 3, 4  # of an image in a batch, and bytes of each of its numbers
MOST_OTHERS = 1000  # other images of the source that a reconstruction is compared with
PORTION = 64  # of these, read at a time
MOST_PIXELS = 5 * 10**7  # pixels of an image file, checked before the file is decoded


class DataError(ValueError):
    """A source, an index or a label cannot be used; the message names it and says which value would be right."""


class ImageSource(Protocol):
    """torchvision's dataset protocol."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True)
class Others:
    """Other images of a batch's source, in the batch's size and channels, read anew each time they are asked for.

    Attributes:
        source: of the batch.
        indices: positions in the source.
        shape: (C, H, W) of the batch's images.
    """

    source: ImageSource
    indices: Sequence[int]
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, source: ImageSource, taken: Sequence[int], shape: tuple[int, int, int]) -> "Others":
        """Up to MOST_OTHERS images beside those that are `taken`, evenly spread over the source."""
        own = set(taken)
        rest = [index for index in range(len(source)) if index not in own]
        count = min(MOST_OTHERS, len(rest))
        return cls(source, [rest[len(rest) * number // count] for number in range(count)], shape)

    def __iter__(self) -> Iterator[Tensor]:
        """Portions (N, C, H, W) of the images; one that cannot be read is left out."""
        channels, *size = self.shape
        for first in range(0, len(self.indices), PORTION):
            pictures = []
            for index in self.indices[first : first + PORTION]:
                with suppress(DataError):
                    picture = self.source[index][0]
                    pictures.append(picture.convert("L") if channels == 1 and picture.mode == "RGB" else picture)
            if pictures:
                yield torch.stack([_pixels(picture, channels) for picture in _of_size(pictures, tuple(size))])


@dataclass(frozen=True)
class Batch:
    """Images (B, C, H, W) float32 in [0, 1] and their class indices (B,) int64.

    Attributes:
        images, labels: as above.
        notes: what was assumed when files were read, in sentences.
        others: images of the same source that are not in the batch; None where no source is known.
    """

    images: Tensor
    labels: Tensor
    notes: tuple[str, ...] = ()
    others: Others | None = None


class NpzImages:
    """The arrays of images uint8 (N, H, W, 3) or (N, H, W) and of labels, integers (N,) or (N, 1), of an .npz file.

    Arrays of the usual names are found, see `client/npz_arrays.py`. Of a file with both, `train` says whether the
    training arrays are taken, or the test arrays.
    """

    def __init__(self, path: str | Path, *, train: bool = False) -> None:
        path = Path(path)
        if not path.is_file():
            raise DataError(f"no such file: {path}")
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path} is damaged or not an .npz file")
        try:
            check_arrays(path, lambda name: True)
            with np.load(path, allow_pickle=False) as file:
                self._images, self._labels, self.notes = images_and_labels(file, path, train=train)
        except ArraysError as error:
            raise DataError(str(error)) from None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is damaged or not an .npz file: {error}") from None

    @property
    def label_values(self) -> list[int]:
        """The labels that occur in the whole set, in ascending order."""
        return np.unique(self._labels).tolist()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels = self._images[index]
        return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels), int(self._labels[index])


class FolderImages:
    """The image files of a folder in sorted order; if it has class folders, their images, class by class.

    Class indices number the class folders in sorted order; images directly in the folder all have class 0, and its
    class folders are then left out. `notes` says what was left out, in sentences.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_dir():
            raise DataError(f"no such folder: {path}")
        classes = [c for c in sorted(path.iterdir()) if c.is_dir() and _image_files(c)]
        own = [(file, 0) for file in _image_files(path)]
        self._labelled = own or [(file, label) for label, folder in enumerate(classes) for file in _image_files(folder)]
        if not self._labelled:
            raise DataError(f"{path} holds no images ({', '.join(IMAGE_ENDINGS)}), nor do its folders")
        self.notes = _left_out([path] if own else classes)
        if own and classes:
            names = _shortened([c.name for c in classes])
            self.notes.append(f"folders beside images are left out: {names} in {path}")

    @property
    def files(self) -> list[Path]:
        """The image files, in their order."""
        return [file for file, _ in self._labelled]

    @property
    def label_values(self) -> list[int]:
        """The labels that occur in the whole folder, in ascending order."""
        return sorted({label for _, label in self._labelled})

    def __len__(self) -> int:
        return len(self._labelled)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label = self._labelled[index]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large images are refused below
                image = Image.open(file)
            with image:
                if image.width * image.height > MOST_PIXELS:
                    raise DataError(f"{file} has {image.width}x{image.height} pixels: at most {MOST_PIXELS} are read")
                image.load()
                return plain(image, file.name), label
        except ModeError as error:
            raise DataError(f"{file}: {error}") from None
        except DataError:
            raise
        except (
            UnidentifiedImageError,
            Image.DecompressionBombError,
            OSError,
            SyntaxError,
            EOFError,
            ValueError,
        ) as error:
            raise DataError(f"{file} is not an image that can be read: {error}") from None


def open_source(dataset: str, data_path: str | Path | None, *, train: bool = False) -> ImageSource:
    """The images behind `--dataset` and `--data_path`; of a set with both the test images, or the training images.

    Raises:
        DataError: unknown dataset, missing path, or a set that has no copy here and cannot be downloaded.
    """
    if dataset not in DATASETS:
        raise DataError(f"unknown dataset {dataset!r}: choose one of {', '.join(DATASETS)}")
    if dataset == "sample":
        return NpzImages(SAMPLE)
    if dataset in ("folder", "npz"):
        if data_path is None:
            raise DataError(f"--dataset {dataset} needs --data_path, the {dataset} to read")
        return FolderImages(data_path) if dataset == "folder" else NpzImages(data_path, train=train)
    name, *splits = TORCHVISION_SETS[dataset]
    root = Path(data_path or "data")
    try:
        return getattr(torchvision().datasets, name)(root=root, download=True, **splits[0 if train else 1])
    except (OSError, RuntimeError) as error:  # urllib's URLError is an OSError
        raise DataError(
            f"{dataset}: no complete copy in {root} and none could be downloaded ({error}); "
            f"connect once, or point --data_path at a copy, or use --dataset sample"
        ) from None


def parse_indices(text: str) -> list[int]:
    """Indices from text such as "0,3,8-11" (ranges include both ends).

    Raises:
        DataError: the text has another form.
    """
    indices: list[int] = []
    if len(text) > MOST_TEXT:
        raise DataError(f"indices {text[:20]}...: at most {MOST_TEXT} characters")
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise DataError(f"indices must look like 0,3,8-11; cannot read {part.strip()!r}")
        if int(last or first) - int(first) >= MOST_INDICES:
            raise DataError(f"indices {part.strip()!r}: at most {MOST_INDICES} images")
        if len(indices) + int(last or first) - int(first) >= MOST_INDICES:
            raise DataError(f"indices {text[:20]}...: at most {MOST_INDICES} images")
        indices.extend(range(int(first), int(last or first) + 1))
    return indices


def load_batch(
    source: ImageSource,
    indices: Sequence[int],
    *,
    labels: str,
    num_classes: int | None,
    generator: torch.Generator,
    image_size: int | tuple[int, int] | None = None,
) -> Batch:
    """The images at `indices` with their labels.

    Args:
        source: the source of the images, see `open_source`.
        indices: 0-based positions in the source.
        labels: `dataset`: the images' own; `random`: drawn uniformly from the classes; `unique`: without repetition.
        num_classes: K, the classes of the model's head; None, for `dataset` alone, takes any label.
        generator: the source of random labels.
        image_size: side, or height and width, in pixels to crop and resize to; None keeps the images' sizes, which
            must then all agree.

    Raises:
        DataError: an index out of range, sizes that differ, a label that the head has no class for.
    """
    count = len(source)
    if image_size is not None:
        pixels = math.prod(sides(image_size))
        check_room(len(indices) * CHANNELS * pixels * FLOAT, f"a batch of {len(indices)} images of that size")
    if len(indices) > count:
        why = "".join(f"; {note}" for note in getattr(source, "notes", ()))
        raise DataError(f"a batch of {len(indices)} images is larger than the set, which has {count}{why}")
    for index in indices:
        if not 0 <= index < count:
            raise DataError(f"index {index} is out of range: the set has images 0 to {count - 1}")
    entries = [source[index] for index in indices]
    pictures, own = [picture for picture, _ in entries], [label for _, label in entries]
    notes, values = [*getattr(source, "notes", ()), *_notes_on(pictures)], getattr(source, "label_values", [])
    if labels == "dataset" and num_classes is not None and _begin_at_1(values, num_classes):
        notes.append(
            f"the set's labels run from 1 to {values[-1]}, and classes are numbered from 0: if the labels are numbered "
            f"from 1, subtract 1 from each, or it stands for the class above its own"
        )
    if labels == "dataset" and values == [0] and count > 1:
        notes.append("every label of the set is 0; those of a folder are the numbers of its class folders")
    chosen = _labels(labels, own, num_classes, generator, values)
    images = _to_tensor(pictures, image_size)
    return Batch(images, chosen, tuple(notes), Others.of(source, indices, tuple(images.shape[1:])))


def _begin_at_1(values: Sequence[int], num_classes: int) -> bool:
    """Whether the labels that occur in a set look as if classes were numbered from 1."""
    return bool(values) and values[0] == 1 and values[-1] > 1 and values[-1] in (num_classes, len(values))


def _labels(
    mode: str, own: list[int], num_classes: int | None, generator: torch.Generator, values: Sequence[int]
) -> Tensor:
    batch_size = len(own)
    if mode == "random":
        return torch.randint(num_classes, (batch_size,), generator=generator)
    if mode == "unique":
        if batch_size > num_classes:
            raise DataError(f"{batch_size} unique labels need at least {batch_size} classes, got {num_classes}")
        return torch.randperm(num_classes, generator=generator)[:batch_size]
    if mode != "dataset":
        raise DataError(f"unknown labels {mode!r}: choose one of {', '.join(LABEL_MODES)}")
    for label in own if num_classes is not None else ():
        if not 0 <= label < num_classes:
            raise DataError(f"label {label} has no class: {_why_no_class(max(own), num_classes, values)}")
    return torch.tensor(own)


def _why_no_class(most: int, num_classes: int, values: Sequence[int]) -> str:
    """The reason and the way on for a label outside the classes 0 to K - 1; `values` occur in the whole set, if known.

    Labels of which none is 0 and the largest is K may be numbered from 1.
    """
    if values and values[0] < 0:
        return f"the set's labels begin at {values[0]}, and classes are numbered from 0"
    if values and values[0] > 0 and values[-1] == num_classes:
        return (
            f"the head has {num_classes}, numbered from 0, and the set's labels run from {values[0]} to {values[-1]}: "
            f"if these are numbered from 1, subtract 1 from each; if not, set --num_classes {num_classes + 1}"
        )
    return f"the head has {num_classes}; set --num_classes {most + 1}"


def _notes_on(pictures: Sequence[Image.Image]) -> list[str]:
    """What was assumed when the files of these pictures were read: a sentence for each assumption."""
    files: dict[str, list[str]] = {}
    for picture in pictures:
        for note in picture.info.get(NOTES, ()):
            files.setdefault(note, []).append(picture.info[FILE])
    notes = [f"{_shortened(names, 1)}: {note}" for note, names in files.items()]
    if 0 < (grey := sum(picture.mode != "RGB" for picture in pictures)) < len(pictures):
        notes.append(f"{grey} of {len(pictures)} images are grey among images in colour: their channels are equal")
    return notes


def sides(size: int | str | tuple[int, int]) -> tuple[int, int]:
    """Height and width of images of a size: both, one for both, or the value of --image_size."""
    if isinstance(size, tuple):
        return size
    height, _, width = str(size).lower().replace(",", "x").partition("x")
    return int(height), int(width or height)


def _to_tensor(images: list[Image.Image], image_size: int | tuple[int, int] | None) -> Tensor:
    """One (B, C, H, W) tensor: grey if every image is grey, RGB otherwise."""
    images = images if image_size is None else _of_size(images, sides(image_size))
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise DataError(f"images differ in size ({', '.join(f'{w}x{h}' for w, h in sizes[:3])}, ...): set --image_size")
    channels = 1 if all(image.mode in ("L", "F") for image in images) else 3
    return torch.stack([_pixels(image, channels) for image in images])


def _of_size(images: list[Image.Image], size: tuple[int, int]) -> list[Image.Image]:
    """The images cropped and resized to (height, width)."""
    size = size[::-1]
    return [i if i.size == size else ImageOps.fit(i, size, Image.Resampling.LANCZOS) for i in images]


def _pixels(image: Image.Image, channels: int) -> Tensor:
    """The pixels (C, H, W) of an image of mode L, RGB or F, grey ones as often as there are channels."""
    pixels = torch.from_numpy(np.array(image))
    pixels = pixels.clamp(0, 1) if image.mode == "F" else pixels.float() / 255  # resizing goes beyond [0, 1] in F
    return pixels.permute(2, 0, 1).contiguous() if pixels.dim() == 3 else pixels.repeat(channels, 1, 1)


def _left_out(folders: Sequence[Path]) -> list[str]:
    """A sentence on the visible files of folders whose endings are not those of images that are read, if any are."""
    files = sorted(file for folder in folders for file in folder.iterdir() if file.is_file() and file.name[0] != ".")
    names = [file.name for file in files if file.suffix.lower() not in IMAGE_ENDINGS]
    return [f"files of other kinds than {', '.join(IMAGE_ENDINGS)} are left out: {_shortened(names)}"] if names else []


def _shortened(names: Sequence[str], most: int = 3) -> str:
    """The first names, and the number of the others."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_ENDINGS and file.is_file())
