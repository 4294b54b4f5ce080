"""Labels of a batch from steps of Adam: columns of the head's gradient that a single image has made, and signs.

Behind a ReLU many features are on for one image only. Such a column of the head's gradient is that image's error
e = softmax(z) - onehot(y), times a feature: all these columns are parallel. Adam's division leaves the value of their
small entries (`attack.solve.quotients`). So the direction that most columns share is an image's error, and its one
large negative entry the label; the next image's is the direction that most of the other columns share.

Of several steps signs are left. The gradient of head bias k is the mean of p_k - [y_i = k] over the images i, which is
negative for no class that is absent, at no step; and so are Adam's quotients, which have their signs, and their mean.
"""

import torch
from torch import Tensor, nn

from attack.solve.quotients import WIDE, bounds_of
from network.head import Head, feature_range
from update.shared import SharedUpdate

CANDIDATES = 100  # columns that are tried as directions, those with the most known entries first
FIT = 2.0  # mean squared deviation, in units of an entry's own, up to which two columns count as parallel
WITNESSES = 16  # columns, at least, that share an image's direction
BEYOND = 0.7  # share of an entry's lower bound that a parallel column's must reach
LEAST_KNOWN = 6  # entries, at least, of two columns that are compared
REFITS = 3  # of a direction to the columns that share it
BALANCED = 0.1  # of an error's entries, which sum to zero: |sum| over sum of magnitudes, at most
NEGATIVE = -1e-3  # a mean quotient below it is no rounding of sent weights, which leaves 1e-5
ALONE = 0.2  # of the label's entry, that another's may be below zero: mixtures of two images have two labels


def labels_of_quotients(update: SharedUpdate, model: nn.Module) -> Tensor | None:
    """The labels (B,) of the update of one step of Adam, in no order; None where the head does not show all of them.

    Raises:
        ValueError: the model's last layer is not linear.
    """
    head, rule = Head.of(model), update.training.optimiser
    sent, _ = head.among(update.gradients)
    if sent is None or not update.training.loss.is_cross_entropy or feature_range(model)[0] < 0:
        return None
    weight = head.layer.weight.detach()
    sent = sent.to(weight)
    least, most = bounds_of(sent, weight, update.training.rate, rule.eps)
    pull = (rule.decay if rule.name == "adam" else 0.0) * weight.double()
    used = (sent != 0).any(0)
    columns = _Columns.of(*(each[:, used] for each in (sent.double().sign(), least, most, pull)))
    labels = []
    for _ in range(update.batch_size):
        found = columns.next_error()
        if found is None:
            return None
        labels.append(int(found.argmin()))
    return torch.tensor(labels, device=weight.device)


def classes_of_signs(update: SharedUpdate, model: nn.Module) -> Tensor | None:
    """The classes (M,) that are in the batch by the signs of the head's bias, each once; None where signs tell none.

    Args:
        update: of steps of Adam, each on the whole batch.
        model: that the server sent out.

    Raises:
        ValueError: the model's last layer is not linear.
    """
    training, (_, sent) = update.training, Head.of(model).among(update.gradients)
    rule, loss = training.optimiser, training.loss
    pulls = rule.prox or (rule.name == "adam" and rule.decay)  # which have signs of their own
    tells = loss.is_cross_entropy and not loss.smoothing and update.defence == "none" and training.batches == 1
    if sent is None or rule.name == "sgd" or pulls or not tells:
        return None
    found = (sent < NEGATIVE).nonzero()[:, 0]
    return found.to(next(model.parameters()).device) if 0 < len(found) <= update.batch_size else None


class _Columns:
    """The head's gradient (K, n), of which an entry is known with an error, or has a lower bound.

    Args:
        values, errors: of known entries; errors are infinite for others.
        bounds: signed; 0 where there is none.
    """

    def __init__(self, values: Tensor, errors: Tensor, bounds: Tensor) -> None:
        self.values, self.errors, self.bounds = values, errors, bounds
        self.known = errors < torch.inf
        self.free = torch.ones_like(self.known[0])

    @classmethod
    def of(cls, sign: Tensor, least: Tensor, most: Tensor, pull: Tensor) -> "_Columns":
        """From the bounds of |g + pull|."""
        is_known = (most < 3 * least) | (most == 0)
        values = torch.where(is_known, sign * (least + most.clamp(max=1e300)) / 2, sign * least) - pull
        own = (most - least) / (2 * WIDE)
        tiny = torch.finfo(torch.float32).tiny
        return cls(values, torch.where(is_known, own.clamp(min=tiny) + 1e-4 * values.abs(), torch.inf), values)

    def next_error(self) -> Tensor | None:
        """The direction (K,) that most of the free columns share, which then are free no more; None: none is one."""
        tried = torch.where(self.known.all(0) & self.free)[0]
        precise = (self.errors / self.values.abs().clamp(min=1e-300))[:, tried].square().mean(0)
        tried = tried[precise.argsort()[:CANDIDATES]]
        if not len(tried):
            return None
        shared = [int((self._parallel(self.values[:, c], self.errors[:, c]) & self.free).sum()) for c in tried]
        best = int(tried[max(range(len(tried)), key=shared.__getitem__)])
        direction, error = self.values[:, best], self.errors[:, best]
        for _ in range(REFITS):
            direction, error = self._refitted(self._parallel(direction, error) & self.free, direction, error)
        own = self._parallel(direction, error) & self.free
        self.free = self.free & ~own
        first, second = direction.topk(2, largest=False).values.tolist()
        is_error = abs(float(direction.sum())) < BALANCED * float(direction.abs().sum()) and second > ALONE * first
        return direction if is_error and int(own.sum()) >= WITNESSES else None

    def _parallel(self, direction: Tensor, error: Tensor) -> Tensor:
        """Which columns (n,) are a positive multiple of a direction (K,), within both errors."""
        both = self.known & (error < torch.inf)[:, None]
        scale = self._scales(direction, torch.where(both, self.errors.square().reciprocal(), 0.0))
        spread = self.errors.square() + (scale * torch.where(error < torch.inf, error, 0.0)[:, None]).square()
        weight = torch.where(both, spread.reciprocal(), 0.0)
        scale, count = self._scales(direction, weight), both.sum(0)
        predicted = scale * direction[:, None]
        left = (weight * (self.values - predicted).square()).sum(0) / (count - 1).clamp(min=1)
        short = ~self.known & (predicted * self.bounds.sign() < BEYOND * self.bounds.abs())
        short = (short & (error < torch.inf)[:, None]).any(0)
        return (left < FIT) & (count >= LEAST_KNOWN) & (scale > 0) & ~short

    def _scales(self, direction: Tensor, weight: Tensor) -> Tensor:
        """By which the direction comes nearest to each column (n,)."""
        along = direction[:, None]
        return (weight * along * self.values).sum(0) / (weight * along.square()).sum(0).clamp(min=1e-300)

    def _refitted(self, which: Tensor, direction: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """The direction and its error from the columns that share it; as they were where hardly any do."""
        if int(which.sum()) < 2:
            return direction, error
        weight = torch.where(self.known, self.errors.square().reciprocal(), 0.0)[:, which]
        values, along = self.values[:, which], direction
        for _ in range(20):
            scale = (weight * along[:, None] * values).sum(0) / (weight * along.square()[:, None]).sum(0)
            sure = (weight * scale.square()).sum(1).clamp(min=1e-300)
            along = (weight * scale * values).sum(1) / sure
        return along / along.norm(), sure.rsqrt() / along.norm()
