"""Several passes, read as one: each use of an image is told apart as if it were an image of its own.

The network above a layer is a closed system on the layer's inputs, whatever images they come of. So a client that goes
E times through its B images in M minibatches makes the update of one pass through E B inputs in E M minibatches. An
image is used with other weights each time, and has other inputs. If all are told apart, those of one image are found by
their labels and by their likeness, within the minibatch that the pass repeats, or within the pass where it is drawn
anew.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from attack.local.closed_system import is_one_pass
from attack.read.reading import Reading
from update.shared import SharedUpdate

OTHER = 10.0  # what another label adds to the unlikeness of two uses, which is 2 at most


def as_one_pass(update: SharedUpdate) -> SharedUpdate:
    """The update as that of one pass, in which each use of an image is another image, in the order of the steps.

    Raises:
        ValueError: the client's steps are no sum over uses, or leave images out of a pass.
    """
    training = update.training
    sizes = training.sizes_of(update.batch_size)
    if sum(sizes) != update.batch_size:
        raise ValueError("each pass leaves out some images")
    factors = training.optimiser.factors(training.steps, training.passes)
    schedule = "constant" if len(set(factors)) == 1 else ",".join(map(repr, factors))
    whole = replace(
        training,
        batches=training.steps,
        sizes=tuple(sizes) * training.passes,
        order=None,
        shuffle=False,
        optimiser=replace(training.optimiser, schedule=schedule),
    )
    if not is_one_pass(whole):
        raise ValueError("its steps are no sum over the images")
    return replace(update, batch_size=update.batch_size * training.passes, training=whole)


def read_in_passes(
    update: SharedUpdate, model: nn.Module, read: Callable[[SharedUpdate, nn.Module], Reading]
) -> Reading:
    """The images of several passes, those of the first pass first, from a reading of all their uses.

    Args:
        update: of several passes.
        model: that the server sent out.
        read: reads the update of one pass, step by step.

    Raises:
        ValueError: not all uses are told apart, or they are not those of the same images in each pass.
    """
    reading, count = read(as_one_pass(update), model), update.batch_size
    if not reading.signals.complete:
        raise ValueError(f"{len(reading)} of {reading.signals.batch_size} uses of the images were told apart")
    uses = _images_of(update, reading)
    signals = replace(reading.signals.pick(torch.arange(count, device=reading.inputs.device)), batch_size=count)
    order, inputs = None, reading.inputs
    if update.training.shuffle:
        sizes = update.training.sizes_of(count) * update.training.passes
        order = tuple(tuple(part.tolist()) for part in uses.split(sizes))
    if not reading.start:  # pixels need no further pass
        inputs, uses = inputs[:count], uses[:0]
    return replace(reading, signals=signals, inputs=inputs, uses=tuple(uses.tolist()), order=order)


def _images_of(update: SharedUpdate, reading: Reading) -> torch.Tensor:
    """Which image of the first pass each use (U,) is of.

    Raises:
        ValueError: the labels of a minibatch, or of a pass, are not those of the first.
    """
    count, sizes = update.batch_size, update.training.sizes_of(update.batch_size)
    groups = [count] if update.training.shuffle else sizes
    values, labels = nn.functional.normalize(reading.signals.values, dim=1), reading.signals.labels
    uses = torch.arange(count)
    for _ in range(1, update.training.passes):
        first, found = len(uses), []
        for group in torch.arange(count).split(groups):
            own = group + first
            unlike = 1 - values[own] @ values[group].T + OTHER * (labels[own][:, None] != labels[group])
            _, which = linear_sum_assignment(unlike.cpu().numpy())
            if not torch.equal(labels[own], labels[group][which]):
                raise ValueError("the labels of a later pass are not those of the first")
            found.append(group[which])
        uses = torch.cat([uses, *found])
    return uses
