"""Inputs that a row of the gradient holds by itself, since one image alone drives its unit.

Row k of a fully connected layer's gradient is (1/B) sum_i delta_ik a_i, and entry k of its bias's gradient the same sum
without the inputs. Behind a ReLU delta_ik is exactly zero where unit k is off for image i. Where the unit is on for one
image only, the row divided by the bias's entry is that image's input. Images found are subtracted, and then further
rows hold one image alone: rows of two images of which one is known are the next. Of 1,000 units as torch draws them one
image alone drives enough to peel 64 and 128 images of CIFAR-10 completely.

Every live row proposes an input. A mixture of images fails as mixtures do, see `attack.read.peel`.

Relatives: Fowl et al. 2022 (arXiv 2110.13057) and Boenisch et al. 2023 (arXiv 2112.02918) plant weights that make such
rows; here the weights are as they are.
"""

import torch
from torch import Tensor

from attack.read.signals import Signals
from attack.read.span import Span

LIVE = 10.0  # a row, and its part of the bias's gradient, must be so many times as long as their error
DELTAS = 2.0  # units of rounding by which the client's deltas err


def lone_rows(rest: Span, whole: Span, found: Signals) -> tuple[Tensor, Tensor]:
    """Coordinates (N, dim A) of the input that each live row holds if it is one image's, shortest rows first.

    Args:
        rest: what is left of the gradient of a layer with one position and a bias.
        whole: the span of all of it.
        found: the images that were taken out of it.

    Returns:
        The coordinates, and the expected relative error of each, (N,).
    """
    basis = rest.geometry.patches(rest.inputs(torch.eye(rest.dimension).to(rest.basis)))[:, 0]  # (dim A, n)
    rows = (rest.left * rest.sigma) @ (rest.right @ basis.T)  # (c_out, dim A)
    sums = (rest.left * rest.sigma) @ (rest.right @ rest.ones)  # the bias's part of each row
    lengths, (row_error, sum_error) = rows.norm(dim=1), _errors(rest, whole, found, _within(whole, found))
    live = ((lengths > LIVE * row_error) & (sums.abs() > LIVE * sum_error)).nonzero()[:, 0]
    live = live[lengths[live].argsort()]
    within = torch.hypot(row_error[live] / lengths[live], sum_error[live] / sums[live].abs())
    inputs = rows[live] / sums[live, None]
    return inputs, torch.hypot(within, whole.turned(inputs @ basis @ whole.right.T))


def _within(whole: Span, found: Signals) -> Tensor:
    """Relative errors (N,) of inputs within A. Noise that has turned A as a whole adds nothing to their differences."""
    turned = whole.turned(found.values.flatten(1) @ whole.right.T)
    return (found.uncertainty.square() - turned.square()).clamp(min=0).sqrt()


def _errors(rest: Span, whole: Span, found: Signals, within: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of what is left of each row within A, and of its part of the bias's gradient, (c_out,) each.

    They are the gradient's noise, the rounding of the client's deltas, and these errors (N,) of what was subtracted.
    """
    within = torch.hypot(within, torch.full_like(within, DELTAS * whole.precision))
    taken = found.deltas.flatten(1) * rest.rows / rest.batch_size  # (N, c_out)
    rows = (taken * (within * found.values.flatten(1).norm(dim=1))[:, None]).square().sum(0)
    sums = (taken * within[:, None]).square().sum(0)
    noise = rest.noise * rest.rank**0.5
    rounding = whole.precision * (whole.left * whole.sigma) @ (whole.right @ whole.ones)
    return (noise**2 + rows).sqrt(), (rest.noise**2 + rounding.square() + sums).sqrt()


def refitted(whole: Span, found: Signals) -> tuple[Tensor, Tensor]:
    """All images of the gradient at once: the inputs in A, (B, dim A), that their deltas give, and errors as above.

    Rows that one image alone drove are few, and the last were left by many others. All rows are better. Deltas hardly
    depend on small errors of the inputs, and not at all once the inputs are taken from the deltas a second time.
    """
    deltas = found.deltas.flatten(1) * whole.rows  # (B, c_out)
    back = torch.linalg.pinv(deltas.T)
    q = whole.batch_size * back @ (whole.left * whole.sigma)  # (B, r)
    rows, _ = _errors(whole, whole, found, torch.zeros_like(found.uncertainty))
    within = whole.batch_size * (back * rows).norm(dim=1) / q.norm(dim=1)
    return q @ whole.right @ whole.basis.T, torch.hypot(within, whole.turned(q))
