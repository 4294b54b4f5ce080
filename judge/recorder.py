"""The record of one run, kept while it runs and completed when it ends."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from attack.match.replay import Replay
from attack.optimise.state import AttackState, Terms
from attack.prepare import Known
from attack.read.signals import Signals
from data import Batch
from judge import metrics
from judge.gallery import write_gallery
from judge.layers import measured
from judge.pictures import Film, comparison, save_curves, save_images, save_png, save_truth
from judge.report import audit_facts, write_report
from judge.run_directory import RunDirectory, Trace
from judge.tables import write_csv
from judge.verdict import certified, is_certain
from update import checked
from update.evidence import Evidence, contradictions

NOTHING_RECORDED = {"film": None, "sizes": [], "rows": 0, "final_loss": None}


class Recorder:
    """Keeps the record of one run: a trace row and a frame per step, checkpoints, and at the end all other files.

    Args:
        run: the directory of the record.
        truth: the client's batch, or None where there is no truth.
        known: the signals and labels known before the first step; the checkpoint keeps them for a resumed run.
        log_every, checkpoint_every: steps between rows and between checkpoints (0: only at the end).
        checkpoint: the checkpoint from which a resumed run goes on, as `open_record` has checked it.
        digests: of what the run attacks, which a resumed run compares.
        evidence: what the update says of how it was made; a contradiction takes all certainty away.

    `show`, once set, is called with the row of every logged step.
    """

    show: Callable[[Mapping], None] | None = None

    def __init__(
        self,
        run: RunDirectory,
        truth: Batch | None,
        known: Known,
        *,
        log_every: int,
        checkpoint_every: int,
        checkpoint: Mapping | None = None,
        digests: Mapping[str, str],
        evidence: Sequence[Evidence] = (),
    ) -> None:
        self.evidence = evidence
        self.run, self.truth, self.known, self.signals = run, truth, known, known.signals
        self.digests = digests
        self.log_every, self.checkpoint_every = log_every, checkpoint_every
        self.film = Film(checkpoint["film"] if checkpoint else None)
        self.sizes: list[int] = list(checkpoint["sizes"]) if checkpoint else []
        self.trace = Trace(run, keep=checkpoint["rows"] if checkpoint else 0)
        self.final_loss: float | None = checkpoint["final_loss"] if checkpoint else None

    def start(self, images: Tensor) -> None:
        """Record the images (B, C, H, W) in [0, 1] that a new run starts from."""
        self.film.shoot(0, images)

    def __call__(self, state: AttackState, size: int, terms: Terms, images: Tensor) -> None:
        """Record the step that `state` has just ended, its subset size, terms and images (B, C, H, W) in [0, 1]."""
        step = state.step - 1  # counted from 0, as in the schedules
        self.final_loss = float(terms.loss)
        self.sizes.append(size)
        self.film.shoot(state.step, images)
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
            if self.show is not None:
                self.show(row)
        if self.checkpoint_every and state.step % self.checkpoint_every == 0:
            self.checkpoint(state)

    def checkpoint(self, state: AttackState) -> None:
        """Write the checkpoint for --resume."""
        self.run.write_checkpoint(
            resumable(state, self.known, self.digests)
            | {
                "film": self.film.state(),
                "sizes": self.sizes,
                "rows": len(self.trace.rows),
                "final_loss": self.final_loss,
            }
        )

    def finish(self, state: AttackState, images: Tensor, ended_by: str, config: Mapping, replay: Replay) -> dict:
        """Write the checkpoint, the pictures, config.json with the schedule as it was run, metrics.json and the report.

        `replay` is the client's training on these images: where it is needed as a certificate, nothing is certain
        without it.
        Returns the content of metrics.json.
        """
        run = self.run
        if ended_by != "abort":
            self.checkpoint(state)
        self.trace.close()
        self.known = self.known.drifted(replay.drift)
        self.signals = self.known.signals
        images = images.detach().clamp(0, 1).cpu()
        save_images(run, images)
        run.write("history.gif", lambda path: self.film.save(path, images))
        if self.trace.rows:
            run.write("curves.png", lambda path: save_curves(path, self.trace.rows))
        labels = state.label_logits[state.leader].argmax(1).cpu()
        is_defended = config["defence"] not in (None, "none") or bool(config["defended"])  # it is not replayed
        self.evidence = (*self.evidence, *([] if is_defended else replay.evidence))
        figures = self._judge(images, labels, state.label_logits.shape[2]) if self.truth else {}
        is_sure = replay.is_certificate and not contradictions(self.evidence)
        figures |= _signal_figures(self.known, is_sure=is_sure) | _training_figures(self.known)
        figures |= {
            "labels": labels.tolist(),
            "pixels_read": 0 if self.known.pixels is None else len(self.known.pixels),
            "layers": [{name: _in_json(value) for name, value in row.items()} for row in self.known.layers],
            "evidence": [asdict(piece) for piece in self.evidence],
            "unexplained": _in_json(replay.left),
            "noise_share": replay.noise,
            "replays": replay.makes_update if replay.is_needed else None,
            "explains_first_layer": replay.explains_first_layer,
            "evaluations": state.evaluations,
            "steps": state.step,
            "seconds": round(state.seconds, 3),
            "final_loss": self.final_loss,
            "ended_by": ended_by,
        }
        if state.recorder:
            figures |= {"replays_on_gpu": state.evaluation.replays, "not_replayed": state.evaluation.why_not}
        figures["certified"] = certified(figures)
        if self.known.layers:
            run.write("layers.csv", lambda path: write_csv(path, self.known.layers))
        run.write_json("config.json", {**config, "schedule": self.sizes})
        run.write_json("metrics.json", figures)
        write_report(run, audit_facts(config, figures, run.path.name))
        write_gallery(run.path.parent)
        return figures

    def _judge(self, images: Tensor, labels: Tensor, num_classes: int) -> dict:
        truth, signals = self.truth, self.signals
        guesses = metrics.guess_psnr(truth.images)
        figures = metrics.evaluate(truth.images, truth.labels, images, labels, truth.others or ()) | {
            "psnr_guess_mean": sum(guesses) / len(guesses),
            "psnr_guess": guesses,
            "label_accuracy_guess": metrics.guessed_label_accuracy(truth.labels, num_classes),
            "true_labels": truth.labels.tolist(),
        }
        save_truth(self.run, truth.images)
        captions = [[f"{psnr:.1f} dB"] for psnr in figures["psnr"]]
        if signals is not None:
            right = 0
            for i, j in enumerate(figures["assignment"]):
                if j < len(signals):
                    captions[i] += in_words(signals, j, is_contradicted=bool(contradictions(self.evidence)))
                    right += int(signals.labels[j]) == int(truth.labels[i])
            figures["signals_label_accuracy"] = right / len(truth.labels)
        note = "signal: features read from the gradient; ±: their expected relative error"
        matched = images[figures["assignment"]]
        sheet = comparison(truth.images, matched, captions, note if signals is not None and len(signals) else "")
        self.run.write("comparison.png", save_png(sheet))
        return figures


def open_record(
    run: RunDirectory,
    config: Mapping,
    state: AttackState,
    known: Known,
    model: nn.Module,
    truth: Batch | None,
    began: Mapping | None,
    digests: Mapping[str, str],
) -> Known:
    """Let the run take its directory, anew or from the checkpoint that the run `began` with.

    Returns `known`, judged layer by layer where the truth is known.

    Raises:
        ValueError: the directory cannot be written, or the checkpoint is damaged or of another run.
    """
    if began is None:
        known = measured(known, model, truth)
        run.begin({**config, "schedule": []}, resumable(state, known, digests), count=state.label_logits.shape[1])
        return known
    state.load_state_dict(began)
    _check_record(began, state)
    run.write_json("config.json", {**config, "schedule": list(began["sizes"])})
    return known


def _check_record(began: Mapping, state: AttackState) -> None:
    """Check the record of the steps so far in a checkpoint.

    Raises:
        ValueError: an entry is damaged, or of another run; the message names the entry.
    """
    for size in checked.sequence(began["sizes"], "sizes"):
        checked.whole(size, "sizes", 1, state.batch_size)
    checked.whole(began["rows"], "rows")
    if began["final_loss"] is not None:
        checked.real(began["final_loss"], "final_loss")
    for row in began["layers"]:
        checked.mapping(row, "a row of layers", ("relative_error",))
    if began["film"] is not None:
        film = checked.mapping(began["film"], "film", ("next", "frames"))
        checked.whole(film["next"], "film.next")
        for frame in checked.sequence(film["frames"], "film.frames"):
            checked.tensor(frame, "film.frames", (state.batch_size, *state.z.shape[1:]), torch.uint8)


def resumable(state: AttackState, known: Known, digests: Mapping[str, str]) -> dict:
    """The content of a checkpoint: the attack's state, and the signals, which say which slot is which image."""
    read = {
        "signals": None if known.signals is None else vars(known.signals),
        "signals_seconds": known.seconds,
        "is_aborted": known.is_aborted,
        "start": known.start,
        "inputs": known.inputs,
        "drift": known.drift,
        "in_steps": known.in_steps,
        "order": known.order,
        "uses": known.uses,
        "is_explained": known.is_explained,
        "likely": known.likely,
        "pixels": known.pixels,
        "held": known.held,
        "evidence": [asdict(piece) for piece in known.evidence],
        "local_labels": None if known.local_labels is None else vars(known.local_labels),
        "layers": [dict(row) for row in known.layers],
        "digests": dict(digests),
    }
    return state.state_dict() | read | NOTHING_RECORDED


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
        if figures["identification"] is not None:
            found = f"{sum(figures['identified'])}/{len(figures['psnr'])}"
            parts.append(f"identified {found} among {figures['identified_among']} others")
        parts.append(f"bit for bit {sum(figures['equal_bits'])}/{len(figures['psnr'])}")
    certain = round(figures["certified"] * len(figures["labels"]))
    parts.append(f"certified {certain}/{len(figures['labels'])}")
    if figures["final_loss"] is not None:
        parts.append(f"loss {figures['final_loss']:.3e}")
    parts += [
        f"{figures['evaluations']} evaluations",
        f"{figures['seconds']:.1f} s",
    ]
    return " | ".join(parts)


def in_words(signals: Signals, index: int, *, is_contradicted: bool = False) -> list[str]:
    """How sure one signal is, as lines of a picture's caption."""
    confidence, error = float(signals.confidence[index]), float(signals.error[index])
    sure = "certain" if is_certain(confidence) else f"{min(round(100 * confidence), 99)} % sure"
    sure = "contradicted" if is_contradicted else sure
    return [f"signal {sure}", f"±{error:.0e}".replace("e-0", "e-")]


def _in_json(value: object) -> object:
    """A value for JSON, which knows no infinity: an infinite gap or drift becomes None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _training_figures(known: Known) -> dict:
    """The keys of metrics.json for local training; empty for a single step."""
    if not (known.is_replayed or known.is_explained or known.local_labels is not None):
        return {}
    tried, figures = known.local_labels, {"exact_way": known.is_followed, "local_drift": _in_json(known.drift)}
    if tried is None:
        return figures | {"trial_distance": None}
    said = {"trial_aborted": True} if tried.is_aborted else {}
    return figures | {"trial_distance": _in_json(tried.distance)} | said


def _signal_figures(known: Known, *, is_sure: bool) -> dict:
    """The keys of metrics.json for the signals; entry j of the list is image rec_j.

    Where the update contradicts what was assumed, or a certificate is missing, every confidence is zero.
    """
    signals, said = known.signals, {"signals_aborted": True} if known.is_aborted else {}
    if signals is None:
        return {"signals_found": 0, "signals_rank": None, "signals_seconds": 0.0, "signals": []} | said
    confidence = signals.confidence * is_sure
    columns = (signals.labels, signals.certificates, confidence, signals.error, signals.residuals)
    columns = [column.tolist() for column in columns]
    names = ("label", "certificate", "confidence", "uncertainty", "residual")
    if known.in_steps:
        columns, names = [*columns, known.steps], (*names, "step")
    rows = zip(*columns, strict=True)
    return {
        "signals_found": len(signals),
        "signals_rank": len(signals),
        "signals_seconds": round(known.seconds, 3),
        "signals": [dict(zip(names, row, strict=True)) for row in rows],
    } | said
