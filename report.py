"""The run directory: PNG, GIF, CSV, JSON. Beside `metrics` the only place where truth and reconstruction meet."""

import csv
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import metrics
from data import Batch
from signals import Signals
from state import AttackState, Terms
from storage import replace_atomically
from vision import torchvision

TRACE = ("step", "S", "loss", "loss_full", "loss_subset", "prior", "evaluations", "seconds", "psnr_mean")
COLUMNS = 8  # images per row of a grid
TILE = 96  # least side in screen pixels of an image in a grid: small images are enlarged by a whole factor
GIF_FRAMES = 60


class RunDirectory:
    """`save_dir/run_name` and the files in it.

    Args:
        path: the directory.
        resume: it must exist, and is gone on with.
        overwrite: what it holds is removed first.

    Raises:
        ValueError: the directory exists and neither was asked for, is no run directory, or cannot be written.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = path
        self.check(path, resume=resume, overwrite=overwrite)
        if path.exists() and not resume and any(path.iterdir()):
            shutil.rmtree(path)
        try:
            (path / "images").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write the run directory {path}: {error.strerror or error}") from None
        if not os.access(path, os.W_OK):
            raise ValueError(f"cannot write the run directory {path}: permission denied")

    @staticmethod
    def check(path: Path, *, resume: bool, overwrite: bool) -> None:
        """Refuse, before anything has been computed, what the constructor would refuse; changes nothing."""
        if resume and not (path / "checkpoint.pt").is_file():
            raise ValueError(f"{path} has no checkpoint.pt to resume from")
        if path.exists() and not resume and (not path.is_dir() or any(path.iterdir())):
            if not overwrite:
                raise ValueError(f"{path} exists: give another --run_name, or --resume or --overwrite")
            if not (path / "config.json").is_file():
                raise ValueError(f"{path} is not a run directory (no config.json): it will not be overwritten")

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write_json(self, name: str, content: Mapping) -> None:
        """Write `content` as strict JSON; NaN and infinity are refused."""
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        replace_atomically(self / name, lambda temporary: temporary.write_text(text))

    def write_checkpoint(self, state: dict) -> None:
        """Replace checkpoint.pt; a crash in the middle leaves the one before."""
        replace_atomically(self / "checkpoint.pt", lambda temporary: torch.save(state, temporary))

    def read_checkpoint(self, state: AttackState) -> dict:
        """Load checkpoint.pt into `state` and return it; tensors and numbers only, nothing else is unpickled.

        Raises:
            ValueError: the file is damaged, or not one of this run.
        """
        path = self / "checkpoint.pt"
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            state.load_state_dict(checkpoint)
            Film(checkpoint["film"])
        except Exception as error:  # torch raises many kinds on a damaged file
            raise ValueError(f"{path} is damaged or of another run: {error}") from None
        return checkpoint


class Trace:
    """trace.csv, one row per logged step, flushed as it grows; a resumed run keeps the rows up to its checkpoint."""

    def __init__(self, path: Path, *, keep: int = 0) -> None:
        self.rows: list[dict[str, str]] = []
        if keep and path.is_file():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))[:keep]
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, TRACE)
        self._writer.writeheader()
        self._writer.writerows(self.rows)

    def append(self, row: Mapping[str, object]) -> None:
        """Write one row; None becomes an empty cell."""
        text = {name: "" if row[name] is None else str(row[name]) for name in TRACE}
        self.rows.append(text)
        self._writer.writerow(text)
        self._file.flush()

    def close(self) -> None:
        """Close the file; `rows` stays."""
        self._file.close()


class Film:
    """The frames of history.gif: at most GIF_FRAMES, every n-th step, n doubling as the run grows longer."""

    def __init__(self, state: Mapping | None = None) -> None:
        self.every: int = state["every"] if state else 1
        self.frames: list[Tensor] = list(state["frames"]) if state else []  # uint8 (B, C, H, W)

    def shoot(self, step: int, images: Tensor) -> None:
        """Keep a frame of images (B, C, H, W) in [0, 1], if the film's pace asks for one at this step."""
        if step % self.every:
            return
        self.frames.append((images.detach().clamp(0, 1) * 255).round().byte().cpu())
        if len(self.frames) > GIF_FRAMES:
            self.frames = self.frames[::2]
            self.every *= 2

    def state(self) -> dict:
        """What a checkpoint keeps of the film."""
        return {"every": self.every, "frames": self.frames}

    def save(self, path: Path, last: Tensor) -> None:
        """Write the GIF; it ends on the images `last`, which stand longest."""
        final = (last * 255).round().byte()
        frames = self.frames if self.frames and torch.equal(self.frames[-1], final) else [*self.frames, final]
        pictures = [grid(frame / 255) for frame in frames]
        durations = [80] * (len(frames) - 1) + [1500]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


class Recorder:
    """Keeps the record of one run: a trace row and a frame per step, checkpoints, and at the end everything else.

    Args:
        run: where it goes.
        truth: the victim's batch, or None when there is none to compare with.
        log_every, checkpoint_every: steps between rows and between checkpoints (0: only at the end).
        checkpoint: what a resumed run goes on from.
        show: called with the row of every logged step; None in a quiet run.
    """

    def __init__(
        self,
        run: RunDirectory,
        truth: Batch | None,
        *,
        log_every: int,
        checkpoint_every: int,
        checkpoint: Mapping | None = None,
        show: Callable[[Mapping], None] | None = None,
    ) -> None:
        self.run, self.truth, self.show = run, truth, show
        self.log_every, self.checkpoint_every = log_every, checkpoint_every
        self.film = Film(checkpoint["film"] if checkpoint else None)
        self.trace = Trace(run / "trace.csv", keep=checkpoint["rows"] if checkpoint else 0)
        self.final_loss: float | None = checkpoint["final_loss"] if checkpoint else None

    def __call__(self, state: AttackState, size: int, terms: Terms, images: Tensor) -> None:
        """Record the step that `state` has just ended, its subset size, terms and images (B, C, H, W) in [0, 1]."""
        step = state.step - 1  # 0-based, as the schedules count
        self.final_loss = float(terms.loss)
        self.film.shoot(step, images)
        if step % self.log_every == 0:
            row = {
                "step": step,
                "S": size,
                "loss": float(terms.loss),
                "loss_full": float(terms.full[state.leader]),
                "loss_subset": float(terms.subset[state.leader]),
                "prior": float(terms.prior[state.leader]),
                "evaluations": state.evaluations,
                "seconds": round(state.seconds, 3),
                "psnr_mean": metrics.mean_psnr(self.truth.images, images) if self.truth else None,
            }
            self.trace.append(row)
            if self.show:
                self.show(row)
        if self.checkpoint_every and state.step % self.checkpoint_every == 0:
            self.checkpoint(state)

    def checkpoint(self, state: AttackState) -> None:
        """Write all that --resume needs."""
        own = {"film": self.film.state(), "rows": len(self.trace.rows), "final_loss": self.final_loss}
        self.run.write_checkpoint(state.state_dict() | own)

    def finish(self, state: AttackState, images: Tensor, ended_by: str, signals: Signals | None = None) -> dict:
        """Write the checkpoint, the pictures and metrics.json; returns what the last holds."""
        if ended_by != "abort":
            self.checkpoint(state)
        self.trace.close()
        images = images.detach().clamp(0, 1).cpu()
        save_images(self.run, images)
        self.film.save(self.run / "history.gif", images)
        if self.trace.rows:
            save_curves(self.run / "curves.png", self.trace.rows)
        figures = self._judge(images, state.label_logits[state.leader].argmax(1).cpu(), signals) if self.truth else {}
        figures |= _signal_figures(signals)
        figures |= {
            "evaluations": state.evaluations,
            "steps": state.step,
            "seconds": round(state.seconds, 3),
            "final_loss": self.final_loss,
            "ended_by": ended_by,
        }
        self.run.write_json("metrics.json", figures)
        return figures

    def _judge(self, images: Tensor, labels: Tensor, signals: Signals | None) -> dict:
        truth = self.truth
        figures = metrics.evaluate(truth.images, truth.labels, images, labels)
        grid(truth.images).save(self.run / "original.png")
        captions = [f"{psnr:.1f} dB" for psnr in figures["psnr"]]
        if signals is not None:
            right = 0
            for i, j in enumerate(figures["assignment"]):
                if j < len(signals):
                    captions[i] += f"  c={float(signals.certificates[j]):.2f}"
                    right += int(signals.labels[j]) == int(truth.labels[i])
            figures["signals_label_accuracy"] = right / len(truth.labels)
        sheet = comparison(truth.images, images[figures["assignment"]], captions)
        sheet.save(self.run / "comparison.png")
        return figures


def save_images(run: RunDirectory, images: Tensor) -> None:
    """reconstruction.png and images/rec_000.png ... of images (B, C, H, W) in [0, 1]."""
    grid(images).save(run / "reconstruction.png")
    for i, image in enumerate(images):
        _picture(image).save(run / "images" / f"rec_{i:03d}.png")


def grid(images: Tensor) -> Image.Image:
    """A picture of images (B, C, H, W) in [0, 1], COLUMNS to a row, enlarged without smoothing."""
    tiles = [_tile(image) for image in images]
    pixels = torch.stack([torch.from_numpy(np.array(tile)) for tile in tiles]).permute(0, 3, 1, 2)
    sheet = torchvision().utils.make_grid(pixels, nrow=COLUMNS, padding=4, pad_value=255)
    return Image.fromarray(sheet.permute(1, 2, 0).numpy())


def comparison(truth: Tensor, reconstruction: Tensor, captions: Sequence[str]) -> Image.Image:
    """Every truth above its reconstruction, a caption beneath; all in the order of the truth."""
    originals, tiles = [_tile(image) for image in truth], [_tile(image) for image in reconstruction]
    side, gap, text = tiles[0].width, 4, 20
    columns = min(COLUMNS, len(tiles))
    cell_width, cell_height = side + gap, 2 * (side + gap) + text + gap
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, (original, tile, caption) in enumerate(zip(originals, tiles, captions, strict=True)):
        x, y = gap + i % columns * cell_width, gap + i // columns * cell_height
        sheet.paste(original, (x, y))
        sheet.paste(tile, (x, y + side + gap))
        draw.text((x + side / 2, y + 2 * (side + gap)), caption, fill="black", font=font, anchor="ma")
    return sheet


def save_curves(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Losses, subset size and, where truth is known, PSNR against closure evaluations."""
    x = [int(row["evaluations"]) for row in rows]
    known = [row["psnr_mean"] != "" for row in rows]
    figure = Figure(figsize=(7, 7.5 if any(known) else 5.5), layout="constrained")
    axes = figure.subplots(3 if any(known) else 2, sharex=True)
    for name in ("loss", "loss_full", "loss_subset", "prior"):
        y = np.array([float(row[name]) for row in rows])
        axes[0].plot(x, np.where(y > 0, y, np.nan), label=name)
    axes[0].set(yscale="log", ylabel="loss")
    axes[0].legend()
    axes[1].step(x, [int(row["S"]) for row in rows], where="post")
    axes[1].set(ylabel="subset size S")
    if any(known):
        axes[2].plot(x, [float(row["psnr_mean"]) if k else np.nan for row, k in zip(rows, known, strict=True)])
        axes[2].set(ylabel="mean PSNR (dB)")
    axes[-1].set(xlabel="closure evaluations")
    figure.savefig(path, dpi=110)


def save_schedule(path: Path, sizes: Sequence[int], title: str) -> None:
    """A plot of S(t) over the 0-based steps."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.step(range(len(sizes)), sizes, where="post")
    axis.set(xlabel="step t", ylabel="subset size S(t)", title=title, ylim=(0, None))
    figure.savefig(path, dpi=110)


def summary(figures: Mapping) -> str:
    """The one line that ends a run's stdout."""
    parts = []
    if "psnr_mean" in figures:
        right = round(figures["label_accuracy"] * len(figures["psnr"]))
        parts = [
            f"PSNR {figures['psnr_mean']:.2f} dB",
            f"SSIM {figures['ssim_mean']:.2f}",
            f"labels {right}/{len(figures['psnr'])}",
        ]
    if figures["final_loss"] is not None:
        parts.append(f"loss {figures['final_loss']:.3e}")
    parts += [
        f"{figures['evaluations']} evaluations",
        f"{figures['seconds']:.1f} s",
    ]
    return " | ".join(parts)


def _signal_figures(signals: Signals | None) -> dict:
    """What metrics.json says of the signals; image j of the list is rec_j."""
    if signals is None:
        return {"signals_found": 0, "signals_rank": None, "signals_seconds": 0.0, "signals": []}
    columns = (signals.labels, signals.certificates, signals.confidence, signals.uncertainty, signals.residuals)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    names = ("label", "certificate", "confidence", "uncertainty", "residual")
    return {
        "signals_found": len(signals),
        "signals_rank": signals.rank,
        "signals_seconds": round(signals.seconds, 3),
        "signals": [dict(zip(names, row, strict=True)) for row in rows],
    }


def _picture(image: Tensor) -> Image.Image:
    """One image (C, H, W) in [0, 1] as an 8-bit picture of its own size, grey or RGB."""
    pixels = (image * 255).round().byte().numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0).copy())


def _tile(image: Tensor) -> Image.Image:
    picture = _picture(image).convert("RGB")
    factor = max(1, -(-TILE // picture.width))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
