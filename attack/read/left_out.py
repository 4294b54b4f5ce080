"""How far what a client's defence left out of the gradient has taken what is read from it.

Pruning takes the small entries of every row at the same inputs, rounding to a coarse grid sets them to zero, truncation
shortens the large ones. Such errors follow the entries' sizes. So they do not average out over the rows as noise does,
and they show less beyond a layer's rank than they cost. A defence is public, and its amounts bound what is missing.
"""

import math

from attack.match.entries import told_by
from network.stage import Chain
from update.shared import SharedUpdate

WIDER = 4.0  # errors of what was read, relative to the share of a gradient that is missing: 0.1 to 3 (measured)


def left_out(update: SharedUpdate, chain: Chain, at: int) -> list[float]:
    """The relative error, at most 1, that missing entries leave in the inputs of each stage of a chain.

    Args:
        update: the client's.
        chain: of the model.
        at: the stage that images are read at. The errors of its gradient, and of those of the layers on the way down,
            go on to the stages below.
    """
    missing = dict(zip(update.gradients, told_by(tuple(update.gradients.values()), update).missing, strict=True))
    errors, total = [0.0] * len(chain), 0.0
    for index in range(at, -1, -1):
        own = (share for name, share in missing.items() if name.startswith(f"{chain[index].name}."))
        total = math.hypot(total, max(own, default=0.0))
        errors[index] = min(1.0, WIDER * total)
    return errors
