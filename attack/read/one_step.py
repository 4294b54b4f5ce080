"""Whether the images of a layer make its gradient in one step: its certificate, where some were not told apart.

Behind a ReLU zeros alone tell images apart, at whatever weights each was used (`by_zeros`). The layer's gradient then
gives the delta of each, whatever made it. Of one step at the server's weights these are the tail's deltas, with some
label. An image that was used later, at other weights, has another delta, and another input: no certificate of its own
shows that, since its equations may hold by chance or for the most part.
"""

import torch
from torch import Tensor

from attack.read.by_zeros import told_by_zeros
from attack.read.candidates import ImageEquations, by_position
from attack.read.layer_choice import CandidateLayer
from attack.read.signals import Signals
from attack.read.span import Span
from attack.solve.budget import OutOfTimeError, WorkBudget
from update.evidence import Evidence
from update.loss import Loss

PAIRED = 100.0  # expected errors by which a certificate may be off: of true images up to 13 were seen, of others 190
LEFT = 1e-3  # share of a layer's gradient that one step on its images may leave
NOISY = 30.0  # or so many times what noise is of it


def against_one_step(
    found: Signals, layer: CandidateLayer, span: Span, loss: Loss, generator: torch.Generator, budget: WorkBudget
) -> tuple[Evidence, ...]:
    """A word on images that one step at the server's weights does not explain.

    Args:
        found: those that were told apart under that assumption.
        layer: at which they were.
        span: of that layer.
        loss: of each image.
        generator: what programmes are drawn from (on the CPU).
        budget: for the search of all images by their zeros.
    """
    if layer.mixes or not layer.inputs.is_sparse:
        return ()
    equations = ImageEquations(span, layer.layer, layer.tail, loss)
    off = (found.certificates - 1).abs() / found.uncertainty.clamp(min=span.precision)
    if float(off.max()) > PAIRED:
        said = (
            f"an image that was told apart counts {float(found.certificates[off.argmax()]):.3g} times in the update, "
            "where a mean has 1"
        )
        return (_of_other_steps(said, float(off.max())),)
    if found.complete or not 1 < span.dimension == found.batch_size:
        return ()
    try:
        left = left_of_one_step(equations, generator, budget)
    except OutOfTimeError:
        return ()
    if left is None or left <= max(LEFT, NOISY * span.noise_share):
        return ()
    said = f"one step on the images that zeros tell apart leaves {left:.2g} of the part of {layer.name}"
    return (_of_other_steps(said, left),)


def left_of_one_step(equations: ImageEquations, generator: torch.Generator, budget: WorkBudget) -> float | None:
    """The share of the layer's weighted gradient that one step on its images leaves, with their best labels.

    None where zeros do not tell all images apart.

    Raises:
        OutOfTimeError: the budget's clock has run out.
    """
    span = equations.span
    c, _ = told_by_zeros(equations, generator, budget)
    if len(c) < span.batch_size:
        return None
    patches = (span.geometry.patches(span.inputs(c)) @ span.right.T).flatten(0, 1)  # (B P, r)
    goal = span.batch_size * span.sigma[:, None] * span.left.T  # (r, c_out)
    deltas = torch.linalg.lstsq(patches.T, goal).solution.view(len(c), 1, -1)
    every = equations.all_deltas(c)
    own = (by_position(every.flatten(0, 1)) * span.rows).view(*every.shape[:2], -1)  # (B, K, P c_out)
    best = own[torch.arange(len(c)), (own - deltas).norm(dim=2).argmin(1)]
    return _share(patches.T @ best.view(len(patches), -1) - goal, goal)


def _share(left: Tensor, whole: Tensor) -> float:
    return float(left.norm() / whole.norm())


def _of_other_steps(said: str, figure: float) -> Evidence:
    return Evidence("training", f"{said}: the client made other steps than the declared one", figure, contradicts=True)
