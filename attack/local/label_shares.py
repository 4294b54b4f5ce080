"""The distance as a quadratic function of each step's label shares, and labels that make it small, without trainings.

Trained on grey images (`attack.local.local_labels`), the head moves as a smooth function of the targets T (N, K), the
shares of the labels in each of N steps. One training for each entry of T gives the derivative J of what is left, r:

    |r + J (T - T_0)|^2 = |r|^2 + 2 g (T - T_0) + (T - T_0) H (T - T_0),    g = J^T r,  H = J^T J

Another label of an image, or two images in each other's place, change T by a (e_k - e_l) with shares a (N,). What that
is worth is told by g and H in a few multiplications, where a training takes millions. With H = R R^T two moves together
are worth what each is, and twice the product of their R^T a (e_k - e_l). So labels go down to where no move and no two
moves are worth anything, again and again from random moves away from the best.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from update.training import Order

KICKS = 24  # random departures from the best labels
STRAY = 4  # moves of such a departure, at most
PAIRED = 512  # of the best moves, of which any two are made together
STEP = 2e6  # multiplications that a move costs beside its own
LEAST = 1e-9  # share of the update that a move must be worth: less is rounding


@dataclass(frozen=True)
class Trial:
    """Labels (B,), and the images of each step."""

    labels: Tensor
    order: Order

    @property
    def key(self) -> tuple:
        """The same for comparison."""
        return tuple(self.labels.tolist()), self.order

    def in_one_order(self) -> "Trial":
        """The same with the labels of images that are always together in ascending order."""
        labels, together = self.labels.clone(), {}
        for image in range(len(labels)):
            together.setdefault(tuple(image in images for images in self.order), []).append(image)
        for images in together.values():
            labels[images] = labels[images].sort().values
        return replace(self, labels=labels)

    def shares(self, like: Tensor) -> Tensor:
        """The share (N, B) of each image in the target of each step, beside a tensor."""
        shares = like.new_zeros(len(self.order), len(self.labels))
        for step, images in enumerate(self.order):
            shares[step, list(images)] = 1 / len(images)
        return shares

    def targets(self, classes: int, like: Tensor) -> Tensor:
        """The mean label (N, K) of each step."""
        return self.shares(like) @ nn.functional.one_hot(self.labels, classes).to(like)


@dataclass(frozen=True)
class Change:
    """Labels of one image, or of two that are swapped, that take the place of others; or two images of one pass."""

    images: tuple[int, ...]
    labels: tuple[int, ...]
    steps: tuple[int, ...] = ()  # of a pass, in which the two images are swapped

    def applied(self, trial: Trial) -> Trial:
        """The labels and the order with this change."""
        if self.steps:
            other = dict(zip(self.images, self.images[::-1], strict=True))
            order = list(trial.order)
            for step in self.steps:
                order[step] = tuple(other.get(image, image) for image in order[step])
            return replace(trial, order=tuple(order))
        changed = trial.labels.clone()
        changed[list(self.images)] = changed.new_tensor(self.labels)
        return replace(trial, labels=changed)


@dataclass(frozen=True)
class Moves:
    """M moves from a trial, of which each adds a (e_k - e_l) to the targets.

    Attributes:
        shares: a, (M, N).
        gained, lost: k and l, (M,).
        images: (M, 2); where a single image changes its label the second is -1.
        steps: (M, 2), of a pass in which the images are swapped; -1 where they are swapped in all.
    """

    shares: Tensor
    gained: Tensor
    lost: Tensor
    images: Tensor
    steps: Tensor

    @classmethod
    def of(cls, trial: Trial, shares: Tensor, classes: int, *, is_fixed: bool, passes: Sequence[range]) -> "Moves":
        """Those from a trial.

        Args:
            trial: whose labels are moved.
            shares: its own, (N, B).
            classes: K.
            is_fixed: whether labels are known, so that images may only be swapped.
            passes: the steps of each pass whose images may be swapped by themselves.
        """
        labels, each = trial.labels, torch.arange(len(trial.labels), device=trial.labels.device)
        first, second = each[torch.triu_indices(len(each), len(each), 1, device=each.device)]
        found = [cls._swaps(labels, (shares[:, first] - shares[:, second]).T, first, second)]
        if not is_fixed:
            image, label = torch.cartesian_prod(each, torch.arange(classes, device=each.device)).T
            none = torch.full_like(torch.stack([image, image], 1), -1)
            alone = torch.stack([image, none[:, 0]], 1)
            found.append(cls(shares[:, image].T, label, labels[image], alone, none))
        for steps in passes:
            found += cls._of_pass(trial, shares, steps)
        fields = ("shares", "gained", "lost", "images", "steps")
        every = cls(*(torch.cat([getattr(some, name) for some in found]) for name in fields))
        says = (every.gained != every.lost) & every.shares.any(1)
        return cls(*(getattr(every, name)[says] for name in fields))

    @classmethod
    def _swaps(cls, labels: Tensor, shares: Tensor, first: Tensor, second: Tensor) -> "Moves":
        images = torch.stack([first, second], 1)
        return cls(shares, labels[second], labels[first], images, torch.full_like(images, -1))

    @classmethod
    def _of_pass(cls, trial: Trial, shares: Tensor, steps: range) -> list["Moves"]:
        """Swaps of two images between two steps of one pass."""
        found, labels = [], trial.labels
        for own in steps:
            for other in range(own + 1, steps.stop):
                pairs = (torch.tensor(trial.order[step], device=labels.device) for step in (own, other))
                first, second = torch.cartesian_prod(*pairs).T
                moved = shares.new_zeros(len(first), len(shares))
                moved[:, own], moved[:, other] = 1 / len(trial.order[own]), -1 / len(trial.order[other])
                swaps = cls._swaps(labels, moved, first, second)
                found.append(replace(swaps, steps=torch.tensor([own, other]).to(labels).expand(len(first), 2)))
        return found

    def __len__(self) -> int:
        return len(self.gained)

    def change(self, at: int, trial: Trial) -> Change:
        """One of them, from its trial."""
        first, second = self.images[at].tolist()
        if second < 0:
            return Change((first,), (int(self.gained[at]),))
        if self.steps[at, 0] >= 0:
            return Change((first, second), (), tuple(self.steps[at].tolist()))
        return Change((first, second), (int(trial.labels[second]), int(trial.labels[first])))


@dataclass(frozen=True)
class Place:
    """A trial, g there, (N, K), and what the distance is more than at the trial of the derivative."""

    trial: Trial
    slopes: Tensor
    worth: float


class Quadratic:
    """The distance near a trial.

    Args:
        trial: at which it is derived.
        left: what the training leaves (m,) of the update with targets (N, K), in units of the update's length.
        classes: K.
        like: a tensor, of the type and place of the targets.
        is_fixed, passes: as in `Moves.of`.
        spend: called with the multiplications of each move; raises where no time is left.
    """

    def __init__(
        self,
        trial: Trial,
        left: Callable[[Tensor], Tensor],
        classes: int,
        like: Tensor,
        *,
        is_fixed: bool,
        passes: Sequence[range],
        spend: Callable[[float], object],
    ) -> None:
        self.spend, self.classes, self.is_fixed, self.passes = spend, classes, is_fixed, passes
        targets = trial.targets(classes, like)
        first, columns = left(targets), []
        for step, images in enumerate(trial.order):
            for label in range(classes):  # sums of targets stay 1, and the step is that of one image
                moved = targets.clone()
                moved[step] *= 1 - 1 / len(images)
                moved[step, label] += 1 / len(images)
                columns.append((left(moved) - first) * len(images))
        slopes, shape = torch.stack(columns).double(), targets.shape
        self.curvature = (slopes @ slopes.T).view(*shape, *shape)  # H
        size, turn = torch.linalg.eigh(self.curvature.reshape(targets.numel(), -1))
        self.root = (turn * size.clamp(min=0).sqrt()).view(*shape, -1)  # R
        between = self.curvature.permute(1, 3, 0, 2)  # (K, K, N, N)
        own = between.diagonal().permute(2, 0, 1)  # (K, N, N)
        self.of_pair = own[:, None] + own - between - between.transpose(0, 1)  # (K, K, N, N), of e_k - e_l
        self._start = Place(trial, (slopes @ first.double()).view(shape), 0.0)

    def optima(self, generator: torch.Generator) -> list[Trial]:
        """Trials that no move and no two moves improve, by this form, the best first.

        Args:
            generator: of random moves (on the CPU).
        """
        best = self._down(self._start)
        found = {best.trial.key: best}
        for _ in range(KICKS):
            place = best
            for _ in range(int(torch.randint(2, STRAY + 1, (), generator=generator))):
                moves = self._moves(place)
                if len(moves):
                    place = self._moved(place, moves, int(torch.randint(len(moves), (), generator=generator)))
            place = self._down(place)
            found[place.trial.key] = place
            best = min(best, place, key=lambda each: each.worth)
        return [place.trial for place in sorted(found.values(), key=lambda each: each.worth)]

    def _moves(self, place: Place) -> Moves:
        how = {"is_fixed": self.is_fixed, "passes": self.passes}
        moves = Moves.of(place.trial, place.trial.shares(place.slopes), self.classes, **how)
        self.spend(STEP + moves.shares.numel() * moves.shares.shape[1])
        return moves

    def _worth(self, place: Place, moves: Moves) -> Tensor:
        """What each move adds to the distance, (M,)."""
        a, slopes = moves.shares, (place.slopes[:, moves.gained] - place.slopes[:, moves.lost]).T
        return 2 * (a * slopes).sum(1) + torch.einsum("mn,mnp,mp->m", a, self.of_pair[moves.gained, moves.lost], a)

    def _moved(self, place: Place, moves: Moves, at: int) -> Place:
        one = Moves(*(getattr(moves, name)[at : at + 1] for name in vars(moves)))
        turned = self.curvature[..., one.gained[0]] - self.curvature[..., one.lost[0]]
        trial = moves.change(at, place.trial).applied(place.trial)
        return Place(trial, place.slopes + turned @ one.shares[0], place.worth + float(self._worth(place, one)))

    def _down(self, place: Place) -> Place:
        """To where no move, and no two moves, are worth anything."""
        while len(moves := self._moves(place)):
            worth = self._worth(place, moves)
            at = [int(worth.argmin())]
            if float(worth.min()) > -LEAST:
                at = self._pair(moves, worth)
            if not at:
                break
            for one in at:
                place = self._moved(place, moves, one)
        return Place(place.trial.in_one_order(), place.slopes, place.worth)

    def _pair(self, moves: Moves, worth: Tensor) -> list[int]:
        """The two moves, of different images, that are worth most together; none where that is nothing."""
        kept = worth.topk(min(PAIRED, len(moves)), largest=False).indices
        a, root = moves.shares[kept], self.root[:, moves.gained[kept]] - self.root[:, moves.lost[kept]]
        turned = torch.einsum("mn,nmr->mr", a, root)
        self.spend(float(turned.numel()) * len(kept))
        both = worth[kept] + worth[kept][:, None] + 2 * turned @ turned.T
        images = moves.images[kept]
        shared = images[:, None, :, None] == images[None, :, None, :]
        both[(shared & (images >= 0)[:, None, :, None]).any(3).any(2)] = 0.0
        first, second = divmod(int(both.argmin()), len(kept))
        return kept[[first, second]].tolist() if float(both.min()) < -LEAST else []
