"""Image files of every mode as plain pictures: grey or RGB with 8 bits, or grey with floating-point pixels in [0, 1].

A file is grey if its mode is, or if it has a palette of greys. Grey of 16 or 32 bits is divided by the largest value
that its file can hold. Transparent pictures are put on white, as most viewers show them. Of an animation the first
frame is taken. A picture's `info` says what was assumed: under `NOTES`, and the file's name under `FILE`.
"""

import numpy as np
from PIL import Image, ImageOps

NOTES, FILE = "magia notes", "magia file"  # keys of a picture's info
WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
GREY = ("1", "L", "LA", "La")
PALETTE = ("P", "PA")
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
WHITE_IS_ZERO = 0  # a PHOTOMETRIC
SIGNED = 2  # a SAMPLE_FORMAT
DARK = 4  # the largest value is less than one part in as many: the values may have fewer bits than the file
ROUNDING = 1e-6  # by which floating-point pixels may leave [0, 1]


class ModeError(ValueError):
    """Pixels that cannot be brought into [0, 1]; the message says why, and what to do."""


def plain(image: Image.Image, name: str) -> Image.Image:
    """A picture of mode L, RGB or F from the loaded image of a file.

    Raises:
        ModeError: floating-point pixels outside [0, 1], or integers that are negative or that all would be black.
        ValueError: a mode that has no way to RGB.
    """
    notes = []
    if getattr(image, "is_animated", False):
        notes.append("the first frame is taken")
    picture = ImageOps.exif_transpose(image)
    if picture.mode == "F":
        picture = _float(picture)
    elif picture.mode.startswith("I"):
        picture, said = _deep(picture, image)
        notes += said
    else:
        picture, said = _eight_bits(picture)
        notes += said
    picture.info = {NOTES: notes, FILE: name}
    return picture


def _float(picture: Image.Image) -> Image.Image:
    values = np.array(picture)
    least, most = values.min(), values.max()
    if not -ROUNDING <= least <= most <= 1 + ROUNDING:  # nor NaN
        raise ModeError(f"its floating-point pixels lie between {least:g} and {most:g}: scale them to [0, 1]")
    return Image.fromarray(values.clip(0, 1))


def _deep(picture: Image.Image, image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Grey of 16 or 32 bits as mode F; the file's `image` knows which range its values may have."""
    full, values = _largest_value(image), np.array(picture)
    if full == 2**32 - 1:
        values = values.view(np.uint32)  # Pillow keeps their bits in signed integers
    least, most = int(values.min()), int(values.max())
    if least < 0:
        raise ModeError(f"its pixels go down to {least}: shift and scale them to 0 to {full}")
    if full > 65535 and 0 < most * 255 < full:
        raise ModeError(
            f"its pixels end at {most} of {full}, the picture would be black: save it with 16 bits, or as "
            f"floating-point numbers in [0, 1]"
        )
    notes = [f"grey values are divided by {full}"]
    if 0 < most * DARK <= full:
        notes.append(
            f"the values do not reach a quarter of {full}: if they have fewer bits than the file, scale them up"
        )
    share = values.astype(np.float64) / full
    if isinstance(transparent := picture.info.get("transparency"), int):
        share[values == transparent] = 1.0
        notes.append(ON_WHITE)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        share = 1 - share
    return Image.fromarray(share.astype(np.float32)), notes


def _largest_value(image: Image.Image) -> int:
    """The largest value that a grey image of 16 or 32 bits can hold."""
    if image.mode == "I" and (tags := getattr(image, "tag_v2", None)) is not None:
        bits, form = (tags.get(tag, (default,))[0] for tag, default in ((BITS_PER_SAMPLE, 32), (SAMPLE_FORMAT, 1)))
        return 2 ** (bits - (form == SIGNED)) - 1
    return 2**16 - 1  # of PNG and PGM: Pillow scales values of other ranges to this one


ON_WHITE = "transparency is put on white"


def _eight_bits(picture: Image.Image) -> tuple[Image.Image, list[str]]:
    mode, notes = picture.mode, []
    if mode in WITH_ALPHA or "transparency" in picture.info:
        layered = picture.convert("LA").convert("RGBA") if mode == "La" else picture.convert("RGBA")
        if layered.getchannel("A").getextrema()[0] < 255:
            notes.append(ON_WHITE)
        picture = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered)
    if mode in ("1", "L") and picture.mode in ("1", "L"):
        return picture.convert("L"), notes
    if mode == "CMYK":
        notes.append("CMYK is turned into RGB without a colour profile")
    colour = picture.convert("RGB")
    if mode in GREY or (mode in PALETTE and _is_grey(colour)):
        return colour.getchannel(0), notes
    return colour, notes


def _is_grey(colour: Image.Image) -> bool:
    pixels = np.asarray(colour)
    return bool((pixels == pixels[..., :1]).all())
