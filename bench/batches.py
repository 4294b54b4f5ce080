"""The images that a benchmark shows, and the images on which it tunes settings: no image is in both.

The last quarter of a source's first 256 images is for tuning: images 192 to 255 of a large set, 96 to 127 of the
bundled sample. Tables show disjoint batches of all other images, from the first on.
"""

import itertools
from collections.abc import Iterator

FIRST = 256  # images of a source, of which a quarter is for tuning


def tuning_images(count: int) -> range:
    """Indices of the images that no table shows, in a source of `count` images."""
    size = min(count, FIRST)
    return range(size - size // 4, size)


def shown_images(count: int) -> Iterator[int]:
    """Indices of the images that tables show, in order."""
    tuning = tuning_images(count)
    return (index for index in range(count) if index not in tuning)


def batch_indices(batch: int, batch_size: int, count: int, *, tuning: bool = False) -> str:
    """The value of --indices for number `batch` of the disjoint batches of this size, in a source of `count` images.

    Raises:
        ValueError: the source has too few images to show, or too few for tuning.
    """
    images = iter(tuning_images(count)) if tuning else shown_images(count)
    chosen = list(itertools.islice(images, batch * batch_size, (batch + 1) * batch_size))
    if len(chosen) < batch_size:
        most = len(tuning_images(count))
        there = f"{most} are there for tuning" if tuning else f"{count - most} are shown"
        raise ValueError(f"batch {batch} of {batch_size} images: of the source's {count}, {there}")
    return as_ranges(chosen)


def as_ranges(indices: list[int]) -> str:
    """Ascending indices as text, such as "80-95,128-143"."""
    runs = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
