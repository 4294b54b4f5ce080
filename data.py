"""The client's image batches: bundled samples, torchvision sets, a folder of images, an .npz of arrays.

Every source follows torchvision's dataset protocol, `len(source)` and `source[i] -> (PIL image, class index)`;
`load_batch` turns chosen entries of one into a tensor batch.
"""

import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

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
MOST_PIXELS = 5 * 10**7  # pixels of an image file, checked before the file is decoded


class DataError(ValueError):
    """A source, an index or a label cannot be used; the message names it and says which value would be right."""


class ImageSource(Protocol):
    """torchvision's dataset protocol."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True)
class Batch:
    """Images (B, C, H, W) float32 in [0, 1] and their class indices (B,) int64."""

    images: Tensor
    labels: Tensor


class NpzImages:
    """The arrays `images` uint8 (N, H, W, 3) or (N, H, W) and `labels` integer (N,) of an .npz file."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise DataError(f"no such file: {path}")
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path} is damaged or not an .npz file")
        try:
            check_arrays(path, lambda name: name in ("images", "labels"))
            with np.load(path, allow_pickle=False) as file:
                self._images, self._labels = file["images"], file["labels"]
        except KeyError as error:
            raise DataError(f"{path}: {error.args[0]}; it must hold the arrays 'images' and 'labels'") from None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is damaged or not an .npz file: {error}") from None
        shape, kind = self._images.shape, self._images.dtype
        if kind != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))):
            raise DataError(f"{path}: images must be uint8 (N, H, W, 3), (N, H, W, 1) or (N, H, W), got {kind} {shape}")
        if self._labels.shape != shape[:1] or not np.issubdtype(self._labels.dtype, np.integer):
            raise DataError(
                f"{path}: labels must be {shape[0]} integers, got {self._labels.dtype} {self._labels.shape}"
            )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels = self._images[index]
        return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels), int(self._labels[index])


class FolderImages:
    """The image files of a folder in sorted order; if it has class folders, their images, class by class.

    Class indices number the class folders in sorted order; images directly in the folder all have class 0.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_dir():
            raise DataError(f"no such folder: {path}")
        classes = [c for c in sorted(path.iterdir()) if c.is_dir() and _image_files(c)]
        self._labelled = [(file, 0) for file in _image_files(path)] or [
            (file, label) for label, folder in enumerate(classes) for file in _image_files(folder)
        ]
        if not self._labelled:
            raise DataError(f"{path} holds no images ({', '.join(IMAGE_ENDINGS)}), nor do its folders")

    @property
    def files(self) -> list[Path]:
        """The image files, in their order."""
        return [file for file, _ in self._labelled]

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
                return ImageOps.exif_transpose(image), label
        except DataError:
            raise
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{file} is not an image that can be read: {error}") from None


def open_source(dataset: str, data_path: str | Path | None, *, train: bool = False) -> ImageSource:
    """The images behind `--dataset` and `--data_path`; of torchvision's sets the test images, or the training images.

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
        return FolderImages(data_path) if dataset == "folder" else NpzImages(data_path)
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
    image_size: int | None = None,
) -> Batch:
    """The images at `indices` with their labels.

    Args:
        source: the source of the images, see `open_source`.
        indices: 0-based positions in the source.
        labels: `dataset`: the images' own; `random`: drawn uniformly from the classes; `unique`: without repetition.
        num_classes: K, the classes of the model's head; None, for `dataset` alone, takes any label.
        generator: the source of random labels.
        image_size: side in pixels to crop and resize to; None keeps the images' sizes, which must then all agree.

    Raises:
        DataError: an index out of range, sizes that differ, a label that the head has no class for.
    """
    count = len(source)
    if image_size is not None:
        check_room(len(indices) * CHANNELS * image_size**2 * FLOAT, f"a batch of {len(indices)} images of that size")
    if len(indices) > count:
        raise DataError(f"a batch of {len(indices)} images is larger than the set, which has {count}")
    for index in indices:
        if not 0 <= index < count:
            raise DataError(f"index {index} is out of range: the set has images 0 to {count - 1}")
    entries = [source[index] for index in indices]
    images = _to_tensor([image for image, _ in entries], image_size)
    return Batch(images, _labels(labels, [label for _, label in entries], num_classes, generator))


def _labels(mode: str, own: list[int], num_classes: int | None, generator: torch.Generator) -> Tensor:
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
            raise DataError(f"label {label} has no class: the head has {num_classes}; set --num_classes {max(own) + 1}")
    return torch.tensor(own)


def _to_tensor(images: list[Image.Image], image_size: int | None) -> Tensor:
    """One (B, C, H, W) tensor: grey if every image is grey, RGB otherwise."""
    mode = "L" if all(image.mode in ("1", "L") for image in images) else "RGB"
    images = [image.convert(mode) for image in images]
    if image_size is not None:
        side = (image_size, image_size)
        images = [i if i.size == side else ImageOps.fit(i, side, Image.Resampling.LANCZOS) for i in images]
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise DataError(f"images differ in size ({', '.join(f'{w}x{h}' for w, h in sizes[:3])}, ...): set --image_size")
    pixels = np.stack([np.asarray(image) for image in images])  # (B, H, W) or (B, H, W, 3)
    tensor = torch.from_numpy(pixels).float() / 255
    return tensor.unsqueeze(1) if mode == "L" else tensor.permute(0, 3, 1, 2).contiguous()


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_ENDINGS and file.is_file())
