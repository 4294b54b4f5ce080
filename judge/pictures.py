"""Pictures of a run: grids, truth beside reconstruction, the film of the reconstructions, curves.

Plots import matplotlib where they draw: what is refused or only asked about does not wait for it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from judge.run_directory import RunDirectory

COLUMNS = 8  # images per row of a grid
FONT, LINE = 12, 16  # size of captions and height of their lines, in pixels
TILE = 96  # least width in screen pixels of an image in a grid: small images are enlarged by a whole factor
GAP = 4  # pixels between images, and around several
TICKS = 5  # of a curve's axis, at most
STEPS = (1, 2, 5, 10)  # between them, times a power of ten
PALETTE = Image.Quantize.MEDIANCUT  # how a frame's colours are chosen
PACE = 12  # 50 frames of 300 steps, 100 of 25,000


class Film:
    """The frames of history.gif: the start, then every step, ever fewer as the run goes on.

    Most changes come early: after `PACE` steps, each next frame comes 1/PACE of the steps so far later.
    """

    def __init__(self, state: Mapping | None = None) -> None:
        self.next: int = state["next"] if state else 0
        self.frames: list[Tensor] = list(state["frames"]) if state else []  # uint8 (B, C, H, W)

    def shoot(self, taken: int, images: Tensor) -> None:
        """Keep a frame of images (B, C, H, W) in [0, 1] after `taken` steps, if the film's pace asks for a frame."""
        if taken < self.next:
            return
        self.frames.append((images.detach().clamp(0, 1) * 255).round().byte().cpu())
        self.next = taken + 1 + taken // PACE

    def state(self) -> dict:
        """The film as a checkpoint keeps it."""
        return {"next": self.next, "frames": self.frames}

    def save(self, path: Path, last: Tensor) -> None:
        """Write the GIF, whose last and longest frame is the images `last`."""
        final = (last * 255).round().byte()
        frames = self.frames if self.frames and torch.equal(self.frames[-1], final) else [*self.frames, final]
        pictures = [_indexed(frame) for frame in frames]
        durations = [80] * (len(frames) - 1) + [1500]
        pictures[0].save(path, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def save_images(run: RunDirectory, images: Tensor) -> None:
    """reconstruction.png and images/rec_000.png ... of images (B, C, H, W) in [0, 1]."""
    run.write("reconstruction.png", save_png(grid(images)))
    for i, image in enumerate(images):
        run.write(f"images/rec_{i:03d}.png", save_png(_picture(image)))


def save_truth(run: RunDirectory, images: Tensor) -> None:
    """original.png and truth/true_000.png ... of the true images (B, C, H, W) in [0, 1]."""
    run.write("original.png", save_png(grid(images)))
    for i, image in enumerate(images):
        run.write(f"truth/true_{i:03d}.png", save_png(_picture(image)))


def read_images(files: Iterable[Path]) -> Tensor:
    """Image files of one shape as images (B, C, H, W) in [0, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).float() / 255
    return pixels.permute(0, 3, 1, 2) if pixels.dim() == 4 else pixels[:, None]


def save_png(picture: Image.Image) -> Callable[[Path], None]:
    """A function that writes the picture to a path of any name."""
    return lambda path: picture.save(path, format="PNG")


def grid(images: Tensor) -> Image.Image:
    """A picture of images (B, C, H, W) in [0, 1], COLUMNS to a row, enlarged without smoothing."""
    return Image.fromarray(_laid_out(np.stack([np.asarray(_picture(image).convert("RGB")) for image in images]), 255))


def _laid_out(pictures: np.ndarray, white: int) -> np.ndarray:
    """Pictures (B, H, W, ...) as one, (height, width, ...): COLUMNS to a row, enlarged, between lines of `white`."""
    count, _, wide = pictures.shape[:3]
    factor, columns = _enlarged_by(wide), min(COLUMNS, count)
    tiles = pictures.repeat(factor, 1).repeat(factor, 2)
    gap = GAP if count > 1 else 0
    high, wide = tiles.shape[1] + gap, tiles.shape[2] + gap
    sheet = np.full((-(-count // columns) * high + gap, columns * wide + gap, *tiles.shape[3:]), white, tiles.dtype)
    for i, tile in enumerate(tiles):
        top, left = gap + i // columns * high, gap + i % columns * wide
        sheet[top : top + high - gap, left : left + wide - gap] = tile
    return sheet


def _indexed(frame: Tensor) -> Image.Image:
    """A grid of images (B, C, H, W), uint8, in 255 colours of its own and white.

    Colours are chosen before the images are enlarged, which makes them no other ones and takes several times as long.
    """
    count, channels, high, wide = frame.shape
    pixels = frame.permute(0, 2, 3, 1).reshape(count * high, wide, channels).expand(-1, -1, 3).contiguous()
    chosen = Image.fromarray(pixels.numpy()).quantize(255, PALETTE, dither=Image.Dither.NONE)
    picture = Image.fromarray(_laid_out(np.asarray(chosen).reshape(count, high, wide), 255), mode="P")
    palette = chosen.getpalette() or []
    picture.putpalette(palette + [0] * (3 * 255 - len(palette)) + [255] * 3)
    return picture


def comparison(truth: Tensor, reconstruction: Tensor, captions: Sequence[Sequence[str]], note: str = "") -> Image.Image:
    """Every truth above its reconstruction, lines of caption beneath; all in the order of the truth.

    The rows are named at the left, `note` explains the captions below.
    """
    originals, tiles = [_tile(image) for image in truth], [_tile(image) for image in reconstruction]
    (wide, high), gap, margin = tiles[0].size, 4, 22
    text = LINE * max(map(len, captions)) + gap
    columns = min(COLUMNS, len(tiles))
    cell_width, cell_height = wide + gap, 2 * (high + gap) + text + gap
    rows = -(-len(tiles) // columns)
    font = ImageFont.load_default(FONT)
    width = max(margin + columns * cell_width + gap, int(font.getlength(note)) + 2 * gap)
    sheet = Image.new("RGB", (width, rows * cell_height + gap + LINE * bool(note)), "white")
    draw = ImageDraw.Draw(sheet)
    for row in range(rows):
        for line, name in enumerate(("truth", "result")):
            _write_upwards(sheet, name, gap, gap + row * cell_height + line * (high + gap) + high // 2)
    for i, (original, tile, lines) in enumerate(zip(originals, tiles, captions, strict=True)):
        x, y = margin + i % columns * cell_width, gap + i // columns * cell_height
        sheet.paste(original, (x, y))
        sheet.paste(tile, (x, y + high + gap))
        for number, line in enumerate(lines):
            at = (x + wide / 2, y + 2 * (high + gap) + number * LINE)
            draw.text(at, line, fill="black", font=font, anchor="ma")
    draw.text((gap, rows * cell_height + gap), note, fill="black", font=font)
    return sheet


def _write_upwards(sheet: Image.Image, text: str, left: int, middle: int) -> None:
    font = ImageFont.load_default(FONT)
    strip = Image.new("RGB", (int(font.getlength(text)) + 2, LINE), "white")
    ImageDraw.Draw(strip).text((0, 0), text, fill="black", font=font)
    turned = strip.rotate(90, expand=True)
    sheet.paste(turned, (left, middle - turned.height // 2))


def save_curves(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Losses, subset size and, where truth is known, PSNR against closure evaluations.

    Every run ends with this picture. Margins are fixed, losses drawn by their logarithms and ticks few, because layout
    engines, logarithmic axes and ticks take longer than a small attack.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    x = [int(row["evaluations"]) for row in rows]
    known = [row["psnr_mean"] != "" for row in rows]
    height = 7.5 if any(known) else 5.5  # inches
    figure = Figure(figsize=(7, height))
    margins = {"left": 0.12, "right": 0.98, "top": 1 - 0.12 / height, "bottom": 0.5 / height, "hspace": 0.06}
    axes = figure.subplots(3 if any(known) else 2, sharex=True, gridspec_kw=margins)
    for name in ("loss", "loss_full", "loss_subset", "prior"):
        y = np.array([float(row[name]) for row in rows])
        axes[0].plot(x, np.log10(np.where(y > 0, y, np.nan)), label=name)
    axes[0].set(ylabel="loss")
    axes[0].yaxis.set_major_formatter(lambda exponent, _: f"{10 ** min(exponent, 308):.2g}")  # no float is larger
    axes[0].legend()
    axes[1].step(x, [int(row["S"]) for row in rows], where="post")
    axes[1].set(ylabel="subset size S", ylim=(0, 1.1 * max(int(row["S"]) for row in rows)))
    if any(known):
        axes[2].plot(x, [float(row["psnr_mean"]) if k else np.nan for row, k in zip(rows, known, strict=True)])
        axes[2].set(ylabel="mean PSNR (dB)")
    for axis in axes:
        axis.yaxis.set_major_locator(MaxNLocator(TICKS, steps=STEPS, integer=axis is axes[1]))
        axis.xaxis.set_visible(axis is axes[-1])
    axes[-1].xaxis.set_major_locator(MaxNLocator(TICKS, steps=STEPS))
    axes[-1].set(xlabel="closure evaluations")
    figure.savefig(path, dpi=110, format="png")


def save_leaks(path: Path, rows: Sequence[Mapping], title: str) -> None:
    """For each layer the batch's rank over the rank that the layer's gradient has room for."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(7, 1.2 + 0.24 * len(rows)), layout="constrained")
    axis = figure.subplots()
    places = range(len(rows))
    colours = ["tab:red" if row["known"] else "0.6" for row in rows]
    axis.barh(places, [row["rank_bound"] / row["rank_room"] for row in rows], color=colours)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(places, [row["layer"] for row in rows], fontsize=7)
    axis.set(xscale="log", title=title)
    axis.set_xlabel("B P / min(c_out, c_in k²): up to 1 the gradient can span the layer's inputs")
    axis.set_xlim(left=min(0.01, *(0.5 * row["rank_bound"] / row["rank_room"] for row in rows)))
    axis.legend(handles=[Patch(color=c, label=t) for c, t in (("tab:red", "inputs known exactly"), ("0.6", "not"))])
    figure.savefig(path, dpi=110, format="png")


def save_schedule(path: Path, steps: Sequence[int], sizes: Sequence[int], title: str) -> None:
    """A plot of S(t) over 0-based steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.step(steps, sizes, where="post")
    axis.set(xlabel="step t", ylabel="subset size S(t)", title=title, ylim=(0, None))
    figure.savefig(path, dpi=110, format="png")


def _picture(image: Tensor) -> Image.Image:
    """One image (C, H, W) in [0, 1] as an 8-bit picture of its own size, grey or RGB."""
    pixels = (image * 255).round().byte().numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0).copy())


def _tile(image: Tensor) -> Image.Image:
    picture = _picture(image).convert("RGB")
    factor = _enlarged_by(picture.width)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _enlarged_by(wide: int) -> int:
    return max(1, -(-TILE // wide))
