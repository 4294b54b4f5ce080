"""Between what the walk knows and a max-pool below it: read once more, from the attack loop's own pictures.

Below a max-pool the loop matches no gradients (`attack.match.activations`), so those of the layers between the pool and
the known activations are used by nobody where the walk ends above the pool. What pictures predict of these layers'
inputs and what the gradients say of them are put together, block by block (`attack.walk.again`); the next pictures
match what came of it. Whether it led the right way shows in what the walk knows: pictures that match lower inputs and
miss the walk's own by half more than the pictures before them are dropped, with these inputs.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from attack.match.entries import observed
from attack.opening import is_opened
from attack.prepare import Known
from attack.read.arithmetic import additive_noise
from attack.solve.budget import OutOfTimeError, WorkBudget
from attack.walk.again import Reread, is_reread, reread
from attack.walk.layer_source import BatchGradients
from attack.walk.noise import relative
from network.chain import mixes_images, modules, parametrised
from network.stage import Chain, run
from network.tracing import stages
from update.shared import SharedUpdate

# Times that pictures are made and blocks are read from them, at most. A further time pays where the last one has left
# less than WORTH of the expected error. A trained ResNet-18, 24 images: 24.3 dB without, 27.4 and 28.1 dB after one and
# two, errors of 4.8 and 4.4 %; 32 images: 21.2, 23.0 and 23.9 dB, 9.8 and 7.0 %.
ROUNDS = 4
WORTH = 0.85

# Times that pictures may miss the walk's activations by more than the pictures before. First pictures differ by a tenth
# from round to round while what is read gets better; where they were led away they missed by four times as much.
WORSE = 1.5

SEEN = "from pictures and gradients"  # of the note on what was read so


def is_read_again(update: SharedUpdate, model: nn.Module, known: Known) -> bool:
    """Whether what is known of all images ends at a residual block above a max-pool."""
    if not is_opened(model, known) or known.uses or known.in_steps or known.drift is not None:
        return False
    chain = stages(model)
    if not is_reread(chain[: known.start]) or mixes_images(modules(chain)):
        return False
    return update.training.is_plain and observed(update, model).is_whole


def known_between(
    update: SharedUpdate,
    model: nn.Module,
    known: Known,
    pictures: Callable[[Known], Tensor],
    generator: torch.Generator,
    clock: WorkBudget,
) -> Known:
    """With the inputs of a lower stage, as far as pictures and gradients tell them, and with the last pictures.

    Args:
        update: an averaged gradient.
        model: that it was computed on.
        known: what was read of it, of which `is_read_again` is true.
        pictures: images (B, C, H, W) by what is known.
        generator: what errors are drawn from, on the CPU.
        clock: when it has run out, what has been found by then is kept.
    """
    chain = stages(copy.deepcopy(model).requires_grad_(False).double())
    labels = known.labels[: len(known.inputs)]
    loss = update.training.loss.of_batch(labels)
    given = BatchGradients(update.gradients, update.batch_size, additive_noise(update, model), loss=loss)
    outputs = (chain, given, known.start, known.inputs.double(), _errors(known, chain), labels)
    best = shown = known
    error = missed = float("inf")
    for _ in range(ROUNDS):
        try:
            seen = pictures(best).double()
            last, missed = missed, _missed(chain[: known.start], seen, known.inputs)
            if missed > WORSE * last:
                return shown
            shown = replace(best, likely=seen)
            blocks = reread(*outputs, seen, known.recovered, generator=generator, budget=clock)
        except OutOfTimeError:
            break
        if not blocks:
            return shown
        before, error = error, float(blocks[-1].errors.median())
        is_lower = blocks[-1].index < best.start
        best = replace(_at(known, chain, blocks), likely=seen)
        if not (is_lower or error < WORTH * before):
            break
    return best


@torch.no_grad()
def _missed(below: Chain, images: Tensor, outputs: Tensor) -> float:
    """What the images leave of known outputs (B, ...) of this chain: the relative error of the median image."""
    return float(relative(run(below, images) - outputs, outputs).median())


def _errors(known: Known, chain: Chain) -> Tensor:
    """Relative errors (B,) of the known inputs: those of the reading, as large as the walk has made the largest."""
    errors = known.signals.uncertainty.to(known.inputs.device).double()
    largest = known.uncertainty_at(chain[known.start])
    return (errors * (largest / errors.max().clamp(min=1e-300))).clamp(min=torch.finfo(torch.float32).eps)


def _at(known: Known, chain: Chain, blocks: Sequence[Reread]) -> Known:
    """With the inputs of these blocks, their rows of layers.csv, and the lowest one's in the loop."""
    rows, recovered = {row["layer"]: row for row in known.layers}, dict(known.recovered)
    for block in blocks:
        stage, error = chain[block.index], float(block.errors.max())
        name = next(parametrised([stage])).name
        note = f"{SEEN}, to {float(block.errors.median()):.1e} of the median image"
        told = "; ".join(filter(None, [rows[name]["note"], note]))
        rows[name] = {**rows[name], "uncertainty": error, "note": told}
        recovered[stage.name] = block.inputs
    lowest = blocks[-1]
    return replace(known, start=lowest.index, inputs=lowest.inputs, layers=list(rows.values()), recovered=recovered)
