"""Labels of a client that trained for several steps, by trial: train on grey images with some labels, and compare.

After a few steps an update is no gradient, and its labels cannot be read as those of a gradient. But the head's
movement depends on the labels first and on the images second. Trained on grey images with the right labels in the right
minibatches, the model gives nearly the client's update; with one label wrong, a far larger distance is left. So labels
are tried, one change or swap at a time, until no change comes closer. The search begins with the labels that the update
shows most plainly.

The gradient of head bias k is p_k - [y_i = k], averaged over images i and steps. This average is negative for classes
in the batch alone. The same average, of the unexplained rest of the update, says which class is missing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attack.match.activations import GREY
from attack.solve.budget import OutOfTimeError, WorkBudget, unlimited
from network.head import Head, features_of
from network.parameters import trainable
from update import checked
from update.shared import SharedUpdate
from update.training import train_locally

TRIALS = 4000  # trainings on grey images, at most: a minute and a half on LeNet at four steps and B = 8
STARTS = 8  # sets of labels that the search begins from, at most
SHAKEN = 1 / 3  # share of the best labels drawn anew for another start; the order of all labels is drawn anew
NARROW = 4  # classes that a label may be changed to at first: the most missing ones
FITTING = 0.02  # relative squared distance that ends the search
# Relative squared distance up to which labels are used. Right labels leave 0.02 to 0.18 on an untrained LeNet at rate
# 0.1.
BELIEVED = 0.25


@dataclass(frozen=True)
class LocalLabels:
    """Labels (B,) in the order of the minibatches, and their relative squared distance from the head's update.

    `is_aborted` says whether the clock has ended the search: they are the best labels tried by then.
    """

    labels: Tensor
    distance: float
    is_aborted: bool = False

    @classmethod
    def restored(cls, state: object, batch_size: int, num_classes: int) -> "LocalLabels":
        """The labels from the mapping of their attributes in a checkpoint.

        Raises:
            ValueError: an entry is damaged, or of another batch; the message names the entry.
        """
        held = checked.mapping(state, "local_labels", ("labels", "distance", "is_aborted"))
        return cls(
            checked.indices(held["labels"], "local_labels.labels", batch_size, num_classes),
            checked.real(held["distance"], "local_labels.distance", 0, finite=False),
            checked.switch(held["is_aborted"], "local_labels.is_aborted"),
        )

    @property
    def is_believed(self) -> bool:
        """Whether the labels explain the update well enough to be used."""
        return self.distance < BELIEVED


def labels_by_trial(
    update: SharedUpdate,
    model: nn.Module,
    generator: torch.Generator,
    given: Tensor | None = None,
    *,
    budget: WorkBudget | None = None,
) -> LocalLabels:
    """The labels whose training on grey images comes closest to the update, in the head's parameters.

    Args:
        update: of a client that trained locally.
        model: the model that the server sent out.
        generator: the source of random starts (on the CPU).
        given: known labels (B,), whose order is not known.
        budget: its clock is asked before every training but the first; None: no clock.

    Raises:
        ValueError: the model's last layer is not linear, or the update holds no gradient of it.
    """
    search = _LabelSearch(update, model, _is_fixed=given is not None, _budget=budget or unlimited())
    first = search.shown() if given is None else given
    try:
        best = search.descended(first)
        for _ in range(STARTS - 1):
            if best.distance < FITTING or search.is_spent:
                break
            best = min(best, search.descended(search.shaken(best.labels, generator)), key=lambda found: found.distance)
    except OutOfTimeError:
        return search.best()
    return best


@dataclass
class _LabelSearch:
    """The distance of labels from the update, remembered, and the descent from labels to better ones."""

    update: SharedUpdate
    model: nn.Module
    _is_fixed: bool = False
    _budget: WorkBudget = field(default_factory=unlimited)
    _found: dict[tuple[int, ...], tuple[float, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        head, names = Head.of(self.model), list(trainable(self.model))
        if head.weight not in self.update.gradients:
            raise ValueError("the update holds no gradient of the model's last layer")
        self._own = [names.index(name) for name in (head.weight, head.bias) if name in self.update.gradients]
        targets = self.update.targets(self.model)
        self._goal = [targets[index] for index in self._own]
        weight = head.layer.weight
        self._grey = weight.new_full((self.update.batch_size, *self.update.image_shape), GREY)
        feature = features_of(self.model, self._grey)[0].detach()
        self._direction = feature / feature.norm()  # (d,)

    @property
    def is_spent(self) -> bool:
        """Whether TRIALS sets of labels have been tried."""
        return len(self._found) >= TRIALS

    def best(self) -> LocalLabels:
        """The best labels tried so far, of a search that the clock has ended."""
        key = min(self._found, key=lambda tried: self._found[tried][0])
        return LocalLabels(torch.tensor(key, device=self._direction.device), self._found[key][0], is_aborted=True)

    def shown(self) -> Tensor:
        """Labels (B,) to begin with: the classes of lowest evidence in the update."""
        order = self._evidence(self._goal).argsort()
        return order[torch.arange(self.update.batch_size, device=order.device) % len(order)]

    def shaken(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Another start: the labels in another order, and a random part of them drawn anew, unless they are given."""
        drawn = torch.randint(self.update.num_classes, labels.shape, generator=generator)
        is_new = (torch.rand(labels.shape, generator=generator) < SHAKEN) & (not self._is_fixed)
        order = torch.randperm(len(labels), generator=generator)
        return torch.where(is_new, drawn, labels.cpu()[order]).to(labels.device)

    def descended(self, labels: Tensor) -> LocalLabels:
        """Down from these labels, by the best change each time; where no change helps, among more classes."""
        width, (distance, missing) = NARROW, self._tried(labels)
        while not self.is_spent:
            best = min(
                self._neighbours(labels, missing.argsort()[:width]), key=lambda y: self._tried(y)[0], default=labels
            )
            if self._tried(best)[0] < distance:
                labels, (distance, missing) = best, self._tried(best)
            elif self._is_fixed or width >= len(missing):
                break
            else:
                width = len(missing)
        return LocalLabels(labels, distance)

    def _neighbours(self, labels: Tensor, classes: Tensor) -> Iterator[Tensor]:
        """The labels with one label changed to one of the classes, or with two of different minibatches swapped."""
        if not self._is_fixed:
            for slot in range(len(labels)):
                for label in classes[classes != labels[slot]]:
                    changed = labels.clone()
                    changed[slot] = label
                    yield changed
        size = self.update.training.size(len(labels))
        for i in range(len(labels)):
            for j in range(i // size * size):
                if labels[i] != labels[j]:
                    swapped = labels.clone()
                    swapped[i], swapped[j] = labels[j], labels[i]
                    yield swapped

    def _tried(self, labels: Tensor) -> tuple[float, Tensor]:
        """The relative squared distance that is left, and the evidence by class: the lowest class is missing most."""
        size = self.update.training.size(len(labels))
        key = tuple(label for part in labels.split(size) for label in sorted(part.tolist()))  # grey images are alike
        if key not in self._found:
            if self._found:  # without any there would be nothing to return
                self._budget.check()
            ordered = labels.new_tensor(key)
            average = train_locally(self.model, self._grey, ordered, self.update.training).average
            left = [goal - average[index] for goal, index in zip(self._goal, self._own, strict=True)]
            distance = float(sum(x.square().sum() for x in left) / sum(x.square().sum() for x in self._goal))
            self._found[key] = (distance if math.isfinite(distance) else math.inf, self._evidence(left))
        return self._found[key]

    def _evidence(self, head: list[Tensor]) -> Tensor:
        """By class (K,) the softmax error that head gradients show: along grey features, plus that of the bias."""
        return torch.nan_to_num(head[0] @ self._direction + sum(head[1:]), nan=math.inf)
