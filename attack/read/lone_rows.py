"""Inputs that a row of the gradient holds by itself, since one image alone drives its unit.

Row k of a fully connected layer's gradient is (1/B) sum_i delta_ik a_i, and entry k of its bias's gradient the same sum
without the inputs. Behind a ReLU delta_ik is exactly zero where unit k is off for image i. Where the unit is on for one
image only, the row divided by the bias's entry is that image's input. Images found are subtracted, and then further
rows hold one image alone: rows of two images of which one is known are the next. Of 1,000 units as torch draws them one
image alone drives enough to peel 64 and 128 images of CIFAR-10 completely.

Where no row holds one image alone, two rows may hold the same two images. Both divided rows then lie on the line
through these images. Pixels of 8-bit images are whole steps of 1/255, so one pixel leaves 256 places on a line where an
image may be, and hardly any place but an image has all its pixels whole. Of 256 images of CIFAR-10 and 1,000 units,
rows of one image give 124 images away, and such pairs of rows eleven more.

Every live row proposes an input. A mixture of images fails as mixtures do, see `attack.read.peel`.

Relatives: Fowl et al. 2022 (arXiv 2110.13057) and Boenisch et al. 2023 (arXiv 2112.02918) plant weights that make such
rows; here the weights are as they are.
"""

import torch
from torch import Tensor

from attack.local.levels import ALIKE, LEVELS, UNLIKE, off_levels
from attack.read.signals import Signals
from attack.read.span import Span
from attack.read.whole_pixels import WholePixels

LIVE = 10.0  # a row, and its part of the bias's gradient, must be so many times as long as their error
DELTAS = 2.0  # units of rounding by which the client's deltas err
SUREST = 900  # rows, at most, of which every two are tried as rows of the same two images
SEEN = (3, 12, 64)  # pixels by which places on a line are judged, in turn, before all pixels are
OFF = 0.1  # steps of 1/255, root mean square, by which whole pixels may be off: 0.289 by chance
OUTSIDE = 0.02  # by which pixels may lie outside [0, 1]
LINES = 512  # judged at a time


def lone_rows(rest: Span, whole: Span, found: Signals) -> tuple[Tensor, Tensor]:
    """Coordinates (N, dim A) of the input that each live row holds if it is one image's, shortest rows first.

    Args:
        rest: what is left of the gradient of a layer with one position and a bias.
        whole: the span of all of it.
        found: the images that were taken out of it.

    Returns:
        The coordinates, and the expected relative error of each, (N,).
    """
    inputs, within, basis = _divided(rest, whole, found)
    return inputs, torch.hypot(within, whole.turned(inputs @ basis @ whole.right.T))


def paired_rows(rest: Span, whole: Span, found: Signals, pixels: WholePixels) -> tuple[Tensor, Tensor]:
    """The same of images that two rows hold together, and no others: places on the line through both with whole pixels.

    Args:
        rest: as in `lone_rows`.
        whole: likewise.
        found: likewise.
        pixels: the images of the layer's inputs.
    """
    inputs, within, basis = _divided(rest, whole, found)
    surest = within.argsort()[:SUREST]
    inputs, within = inputs[surest], within[surest]
    images = pixels.images(rest.inputs(inputs)) if len(inputs) > 1 else None
    if images is None:
        return inputs[:0], within[:0]
    images = _unlike(images.flatten(1))
    if images.shape[1] < UNLIKE:
        return inputs[:0], within[:0]
    first, second = torch.triu_indices(len(inputs), len(inputs), 1, device=inputs.device)
    at, t = _whole_places(images, first, second)
    first, second = first[at], second[at]
    c = torch.lerp(inputs[first], inputs[second], t[:, None])
    sizes = within * inputs.norm(dim=1)
    errors = torch.hypot((1 - t) * sizes[first], t * sizes[second]) / c.norm(dim=1)
    return c, torch.hypot(errors, whole.turned(c @ basis @ whole.right.T))


def _whole_places(images: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The lines, by index, through two of the images (N, n) on which pixels are whole, and the places t, (M,) each."""
    levels, found = torch.arange(LEVELS + 1).to(images) / LEVELS, []
    for lines in torch.arange(len(first), device=first.device).split(LINES):
        start = images[first[lines], : SEEN[-1]]
        way = images[second[lines], : SEEN[-1]] - start
        widest = way.abs().argmax(1, keepdim=True)  # tells the place best
        t = (levels - start.gather(1, widest)) / way.gather(1, widest)  # (lines, 256)
        which = torch.arange(len(lines), device=lines.device)[:, None].expand_as(t)[t.isfinite()]
        t = t[t.isfinite()]
        for count in SEEN:
            fits = _are_whole(torch.addcmul(start[which, :count], t[:, None], way[which, :count]))
            which, t = which[fits], t[fits]
        fits = _are_whole(torch.lerp(images[first[lines[which]]], images[second[lines[which]]], t[:, None]))
        which, t = which[fits], t[fits]
        found.append((lines[which], t))
    return torch.cat([lines for lines, _ in found]), torch.cat([t for _, t in found])


def _unlike(images: Tensor) -> Tensor:
    """Pixels (N, m) of images (N, n), each of the pixels that are alike in all images once, those that vary most first.

    Pixels that are the same in all images are the same all along a line, and say nothing of a place on it.
    """
    _, which = torch.unique((images / ALIKE).round(), dim=1, return_inverse=True)
    last = which.new_empty(int(which.max()) + 1).scatter_(0, which, torch.arange(len(which), device=which.device))
    spread = images[:, last].std(0)
    order = spread.argsort(descending=True)
    return images[:, last[order[spread[order] > ALIKE]]].contiguous()


def _are_whole(values: Tensor) -> Tensor:
    """Which rows of pixels (N, n) are whole steps in [0, 1], (N,)."""
    inside = (values > -OUTSIDE).all(1) & (values < 1 + OUTSIDE).all(1)
    return inside & (off_levels(values) < OFF)


def _divided(rest: Span, whole: Span, found: Signals) -> tuple[Tensor, Tensor, Tensor]:
    """Live rows over their part of the bias's gradient, shortest rows first.

    These are coordinates (N, dim A), with relative errors within A (N,), and the basis (dim A, n) of the coordinates.
    """
    basis = _patches(rest, rest.inputs(torch.eye(rest.dimension).to(rest.basis)))  # (dim A, n)
    rows = (rest.left * rest.sigma) @ (rest.right @ basis.T)  # (c_out, dim A)
    sums = (rest.left * rest.sigma) @ (rest.right @ rest.ones)  # the bias's part of each row
    lengths, (row_error, sum_error) = rows.norm(dim=1), _errors(rest, whole, found, _within(whole, found))
    live = ((lengths > LIVE * row_error) & (sums.abs() > LIVE * sum_error)).nonzero()[:, 0]
    live = live[lengths[live].argsort()]
    within = torch.hypot(row_error[live] / lengths[live], sum_error[live] / sums[live].abs())
    return rows[live] / sums[live, None], within, basis


def _patches(whole: Span, inputs: Tensor) -> Tensor:
    """What the layer's one position sees of inputs (N, ...), (N, c_in k^2): of a padded convolution, zeros beside."""
    return whole.geometry.patches(inputs.view(-1, *whole.geometry.input_shape))[:, 0]


def _within(whole: Span, found: Signals) -> Tensor:
    """Relative errors (N,) of inputs within A. Noise that has turned A as a whole adds nothing to their differences."""
    turned = whole.turned(_patches(whole, found.values) @ whole.right.T)
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
    return q @ whole.right @ _patches(whole, whole.basis).T, torch.hypot(within, whole.turned(q))
