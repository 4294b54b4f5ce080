"""Labels of a client that trained for several steps, by trial: train on grey images with some labels, and compare.

After a few steps an update is no gradient, and its labels cannot be read as those of a gradient. But the head's
movement depends on the labels first and on the images second. Trained on grey images with the right labels in the right
minibatches, the model gives nearly the client's update; with one label wrong, a far larger distance is left. So labels
are tried, a few changes and swaps at a time, until none comes closer. The search begins with the labels that the update
shows most plainly.

All images of a trial are alike, so a minibatch is one grey image with the mean of its labels as target: a trial costs
one image a step. Where the work permits one trial for each class and step, the distance is a quadratic function of the
targets, nearly, and its least values over labels are sought without further trials (`label_shares`); the best of them
are tried, and the function is taken anew there. Elsewhere, and at the end, the derivative of the distance by the
targets, through all steps, foretells what each change and each swap is worth, beside the square of what it moves
itself. So only the most promising are tried.

The gradient of head bias k is p_k - [y_i = k], averaged over images i and steps. This average is negative for classes
in the batch alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from attack.local.label_shares import Change, Quadratic, Trial
from attack.match.activations import GREY
from attack.solve.budget import OutOfTimeError, WorkBudget, unlimited
from network.head import Head, features_of
from network.parameters import trainable
from network.work import multiplications
from update import checked
from update.shared import SharedUpdate
from update.training import LocalTraining, Order, train_locally

WORK = 4e11  # multiplications that the search may take: two minutes of a core, about
OVERHEAD = 1e7  # multiplications that a step costs beside those of its image
BACKWARD = 3.0  # times what its forward pass costs, that a step does
SLOPES = 3.0  # times what a trial costs, that its derivative does
STARTS = 8  # sets of labels that the search begins from, at most
SHAKEN = 1 / 3  # share of the best labels drawn anew for another start; the order of all labels is drawn anew
TRIED = 96  # of the most promising changes and swaps, each by itself, before a start is at its end
FEW = 8  # images up to which the best of these is taken, and not the first that comes closer
OPTIMA = 8  # least values of the quadratic function that are tried
AFFORDED = 0.25  # share of the work left that its derivative may cost
HELD = 3e7  # numbers that its moves may take
IDLE = 2  # starts in a row that find nothing better, and end the search
TOGETHER = (8, 4, 2)  # so many of the most promising at once, of different images
FITTING = 0.02  # relative squared distance of so few images at which no other start is tried
# Relative squared distance up to which labels are used. Right labels leave 0.02 to 0.18 on an untrained LeNet at rate
# 0.1.
BELIEVED = 0.25


@dataclass(frozen=True)
class LocalLabels:
    """Labels (B,) in the order of the minibatches, and their relative squared distance from the head's update.

    `order` are the images of each step, where the client shuffles and goes through them several times: those of the
    first pass in turn; else None. `is_aborted` says whether the clock has ended the search: they are the best labels
    tried by then.
    """

    labels: Tensor
    distance: float
    is_aborted: bool = False
    order: Order | None = None

    @classmethod
    def restored(cls, state: object, batch_size: int, num_classes: int) -> "LocalLabels":
        """The labels from the mapping of their attributes in a checkpoint.

        Raises:
            ValueError: an entry is damaged, or of another batch; the message names the entry.
        """
        held = checked.mapping(state, "local_labels", ("labels", "distance", "order", "is_aborted"))
        order = held["order"]
        return cls(
            checked.indices(held["labels"], "local_labels.labels", batch_size, num_classes),
            checked.real(held["distance"], "local_labels.distance", 0, finite=False),
            checked.switch(held["is_aborted"], "local_labels.is_aborted"),
            order if order is None else checked.order(order, "local_labels.order", batch_size),
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
    work: float = WORK,
    say: Callable[[str], object] = str,
) -> LocalLabels:
    """The labels whose training on grey images comes closest to the update, in the head's parameters.

    Args:
        update: of a client that trained locally.
        model: the model that the server sent out.
        generator: the source of random starts (on the CPU).
        given: known labels (B,), whose order is not known.
        budget: its clock is asked before every training but the first; None: no clock.
        work: multiplications that the search may take; it ends with the best labels tried by then.
        say: called with what the search is at, in a line.

    Raises:
        ValueError: the model's last layer is not linear, or the update holds no gradient of it.
    """
    search = _LabelSearch(update, model, given is not None, budget or unlimited(), work, say)
    labels = search.shown() if given is None else given
    trial = Trial(labels, search.in_turn)
    least, idle = math.inf, 0
    try:
        for start in range(STARTS):
            search.descend(trial, f"start {start + 1} of {STARTS} at most", generator)
            best = search.best()
            least, idle = (best.distance, 0) if best.distance < least else (least, idle + 1)
            is_enough = best.distance < FITTING and len(best.labels) <= FEW
            if is_enough or search.is_spent or idle == IDLE:
                break
            trial = Trial(search.shaken(best.labels, generator), search.in_turn)
    except OutOfTimeError:
        return replace(search.best(), is_aborted=True)
    return search.best()


@dataclass
class _LabelSearch:
    """The distance of labels from the update, remembered, and the descent from labels to better ones."""

    update: SharedUpdate
    model: nn.Module
    is_fixed: bool
    budget: WorkBudget
    left: float
    say: Callable[[str], object]
    _found: dict[tuple, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        head, names = Head.of(self.model), list(trainable(self.model))
        if head.weight not in self.update.gradients:
            raise ValueError("the update holds no gradient of the model's last layer")
        self._own = [names.index(name) for name in (head.weight, head.bias) if name in self.update.gradients]
        targets, count = self.update.targets(self.model), self.update.batch_size
        self._goal = [targets[index] for index in self._own]
        self._size = sum(float(each.square().sum()) for each in self._goal)
        weight, training = head.layer.weight, self.update.training
        self.in_turn: Order = tuple(tuple(part.tolist()) for part in training.schedule(count))
        is_open = training.shuffle and training.order is None and training.batches > 1
        self._open_passes = range(1, training.passes) if is_open else range(0)
        # one grey image a step, with the mean of the step's labels; two, where BatchNorm asks for a variance
        self._copies, steps = 1 + training.uses_batch_statistics, training.steps
        self._training: LocalTraining = replace(
            training, batches=steps, sizes=(self._copies,) * steps, order=None, shuffle=False
        )
        self._grey = weight.new_full((self._copies * steps, *self.update.image_shape), GREY)
        feature = features_of(self.model, self._grey[:2])[0].detach()
        self._direction = feature / feature.norm()  # (d,)
        combination = training.combination()
        # what a step's target moves by itself, at the server's weights: a multiple of the grey feature
        pull = training.loss.pull(self.update.num_classes)
        self._reach = (pull * combination.shares / combination.shares.sum()).to(weight)  # (N,)
        self._moved = float(feature.square().sum() + sum(1 for each in self._goal if each.dim() == 1)) / self._size
        self._cost = training.steps * (OVERHEAD + BACKWARD * multiplications(self.model, self.update.image_shape))

    @property
    def is_spent(self) -> bool:
        """Whether no work is left."""
        return self.left <= 0

    def best(self) -> LocalLabels:
        """The best labels tried so far."""
        key = min(self._found, key=self._found.__getitem__)
        order = key[1] if self._open_passes else None
        return LocalLabels(torch.tensor(key[0], device=self._grey.device), self._found[key], order=order)

    def shown(self) -> Tensor:
        """Labels (B,) to begin with: the classes of lowest evidence, each as often as the evidence bears."""
        count = self.update.batch_size
        evidence = self._goal[0] @ self._direction + sum(each for each in self._goal if each.dim() == 1)
        unit = self._direction.norm() * (self._moved * self._size) ** 0.5 / count  # about what one image moves
        labels = []
        for _ in range(count):
            labels.append(int(evidence.argmin()))
            evidence[labels[-1]] += unit
        return torch.tensor(labels, device=evidence.device)

    def shaken(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Another start: the labels in another order, and a random part of them drawn anew, unless they are given."""
        drawn = torch.randint(self.update.num_classes, labels.shape, generator=generator)
        is_new = (torch.rand(labels.shape, generator=generator) < SHAKEN) & (not self.is_fixed)
        order = torch.randperm(len(labels), generator=generator)
        return torch.where(is_new, drawn, labels.cpu()[order]).to(labels.device)

    def descend(self, trial: Trial, where: str, generator: torch.Generator) -> None:
        """Down from these labels, by the changes that derivatives foretell to be best, while any comes closer."""
        distance = self._tried(trial)
        while not self.is_spent:
            self.say(f"labels by trial, {where}: the best leave {self.best().distance:.3f}")
            closer = self._leapt(trial, distance, generator) or self._closer(trial, distance)
            if closer is None:
                break
            trial, distance = closer, self._tried(closer)

    def _leapt(self, trial: Trial, distance: float, generator: torch.Generator) -> Trial | None:
        """A trial that comes closer, by the quadratic function near this one.

        None: there is none, or it costs too much, or images are so few that all promising changes are tried anyway.
        """
        steps, classes, count = self.update.training.steps, self.update.num_classes, len(trial.labels)
        moves = count * (classes + count * (1 + len(self._open_passes)))
        is_dear = steps * classes * self._cost > AFFORDED * self.left or moves * steps**2 > HELD
        if count <= FEW or is_dear:
            return None
        batches = self.update.training.batches
        passes = [range(which * batches, (which + 1) * batches) for which in self._open_passes]
        how = {"is_fixed": self.is_fixed, "passes": passes, "spend": self._spend}
        optima = Quadratic(trial, self._left, classes, self._grey, **how).optima(generator)
        best = min(optima[:OPTIMA], key=self._tried)
        return best if self._tried(best) < distance else None

    def _spend(self, work: float) -> None:
        self.budget.check()
        self.left -= work

    def _closer(self, trial: Trial, distance: float) -> Trial | None:
        """A trial that comes closer by several changes or by one, None where the most promising ones do not."""
        changes = self._promising(trial)
        if len(trial.labels) <= FEW:  # all promising ones can be tried, and the best of them taken
            best = trial
            for change in changes:
                if self.is_spent:
                    break
                best = min(best, change.applied(trial), key=self._tried)
            return best if self._tried(best) < distance else None
        for count in TOGETHER:
            several = trial
            for change in _apart(changes, count):
                several = change.applied(several)
            if len(changes) > 1 and not self.is_spent and self._tried(several) < distance:
                return several
        for change in changes:
            if self.is_spent:
                break
            if self._tried(changed := change.applied(trial)) < distance:
                return changed
        return None

    def _promising(self, trial: Trial) -> list[Change]:
        """The changes of one label and the swaps of two that the derivative and their own square say most of."""
        labels, share, slopes = trial.labels, trial.shares(self._grey), self._slopes(trial)
        count, by_image = len(labels), share.T @ slopes  # (B, K)
        reach = (share * self._reach[:, None]).sum(0)  # (B,)
        worth = by_image - by_image.gather(1, labels[:, None])  # of another label
        changes = worth + 2 * self._moved * reach.square()[:, None] + (math.inf if self.is_fixed else 0.0)
        changes[torch.arange(count), labels] = math.inf
        between = worth[:, labels]  # (i, j): image i with the label of j
        swaps = between + between.T + 2 * self._moved * (reach[:, None] - reach).square()
        alike = (share.T[:, None] == share.T).all(2) | (labels[:, None] == labels)
        swaps[alike | torch.ones_like(alike).tril()] = math.inf
        found = [(float(changes[i, k]), Change((i,), (k,))) for i, k in _least(changes, TRIED)]
        for i, j in _least(swaps, TRIED):
            found.append((float(swaps[i, j]), Change((i, j), (int(labels[j]), int(labels[i])))))
        for which in self._open_passes:
            found += self._of_pass(trial, slopes, which)
        return [change for _, change in sorted(found, key=lambda each: each[0])[:TRIED]]

    def _of_pass(self, trial: Trial, slopes: Tensor, which: int) -> list[tuple[float, Change]]:
        """Swaps of two images between the steps of one pass, and what the derivative says that they are worth."""
        batches, labels, found = self.update.training.batches, trial.labels.tolist(), []
        place = {image: s for s in range(which * batches, (which + 1) * batches) for image in trial.order[s]}
        own = slopes[:, trial.labels].tolist()  # (N, B)
        for i, first in place.items():
            for j, second in place.items():
                if first < second and labels[i] != labels[j]:
                    worth = (own[first][j] - own[first][i]) / len(trial.order[first])
                    worth += (own[second][i] - own[second][j]) / len(trial.order[second])
                    found.append((worth, Change((i, j), (), (first, second))))
        return found

    def _slopes(self, trial: Trial) -> Tensor:
        """The derivative (N, K) of the distance by the target of each step."""
        self._spend(SLOPES * self._cost)
        targets = trial.targets(self.update.num_classes, self._grey).requires_grad_()
        with torch.enable_grad():
            distance = self._residual(targets, create_graph=True).square().sum()
            (slopes,) = torch.autograd.grad(distance, targets)
        return torch.nan_to_num(slopes)

    def _residual(self, targets: Tensor, *, create_graph: bool) -> Tensor:
        """What training on grey images with these targets (N, K) leaves of the head's update (m,), in its lengths."""
        targets = targets.repeat_interleave(self._copies, 0)
        average = train_locally(self.model, self._grey, targets, self._training, create_graph=create_graph).average
        left = [(goal - average[index]).flatten() for goal, index in zip(self._goal, self._own, strict=True)]
        return torch.cat(left) / self._size**0.5

    def _left(self, targets: Tensor) -> Tensor:
        """The same, of one more training."""
        self._spend(self._cost)
        return self._residual(targets, create_graph=False)

    def _tried(self, trial: Trial) -> float:
        """The distance that these labels leave."""
        if trial.key not in self._found:
            if self._found:  # without any there would be nothing to return
                self.budget.check()
            self.left -= self._cost
            targets = trial.targets(self.update.num_classes, self._grey)
            distance = float(self._residual(targets, create_graph=False).square().sum())
            self._found[trial.key] = distance if math.isfinite(distance) else math.inf
        return self._found[trial.key]


def _least(worth: Tensor, count: int) -> list[tuple[int, int]]:
    """The places of the least finite entries (n, m)."""
    flat = worth.flatten()
    return [divmod(i, worth.shape[1]) for i in flat.argsort()[:count].tolist() if flat[i] < math.inf]


def _apart(changes: list[Change], count: int) -> list[Change]:
    """The first so many of the changes that touch no image twice."""
    kept: list[Change] = []
    touched: set[int] = set()
    for change in changes:
        if len(kept) < count and touched.isdisjoint(change.images):
            kept.append(change)
            touched.update(change.images)
    return kept
