"""The state of an attack: images, labels, optimiser, subsets, counters. A checkpoint holds its `state_dict`."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attack.optimise.budget import Budget, Optimiser
from attack.optimise.capture import Evaluation, Recorder
from update import checked

CERTAIN_LOGIT = 100.0  # the logit of a known label, so far above the others that softmax is one-hot in float64 too
NOT_TWICE = ("is not implemented", "differentiate twice")  # torch's words where a function has no second derivative
LOOK_BACK = 100  # closure evaluations over which the loss's decrease is judged: four steps of L-BFGS
MAX_SETBACKS = 3  # number of times that the attack returns to the best iterate after a non-finite loss


class _BudgetSpentError(Exception):
    """Ends an optimiser step whose next evaluation would be one too many."""


@dataclass(frozen=True)
class Terms:
    """The objective's value, a scalar tensor, and its unweighted parts (R,), one for each of R copies."""

    loss: Tensor
    full: Tensor
    subset: Tensor
    prior: Tensor

    def is_finite(self) -> bool:
        """Whether every term is a finite number."""
        return all(bool(term.isfinite().all()) for term in (self.loss, self.full, self.subset, self.prior))

    @property
    def leader(self) -> int:
        """The index of the copy with the least full-batch loss."""
        return int(self.full.argmin())


@dataclass
class AttackState:
    """The iterate of an attack.

    Args:
        z: free image variables (R B, C, H, W) of R copies of the batch, see `attack.optimise.pixels.PixelMap`.
        label_variables: (R B, K); the label logits are `label_gain` times these.
        generator: the source of random subsets.
        optimiser: the optimiser of both variables; built anew after a setback.
        label_gain: a scaling, so that L-BFGS moves labels and pixels at comparable rates.
        known_labels: class indices (N,) of the leading N images of each copy, which are then not optimised.
        copies: R, the number of starts that are attacked side by side. Each closure call counts as R evaluations.
        held: the images of each copy that stay as they are.
        seconds: wall time spent before the first step.
        recorder: of evaluations as CUDA graphs, given the variables; None: all are made one by one.

    `leader` is the copy that matches the gradient best; pictures and figures are of the leader. `anchor` is the value
    of z at the start of the present phase. `trail` has the evaluations and the loss after the last steps of this phase.
    Variables, `subset` and `prior_weight` are changed in place, since recorded evaluations read them where they lie.
    """

    z: Tensor
    label_variables: Tensor
    generator: torch.Generator
    optimiser: Optimiser
    label_gain: float = 1.0
    known_labels: Tensor | None = None
    copies: int = 1
    held: tuple[int, ...] = ()
    seconds: float = 0.0
    step: int = 0
    evaluations: int = 0
    setbacks: int = 0
    leader: int = 0
    phase: int = 0
    recorder: Recorder | None = None

    def __post_init__(self) -> None:
        self.variables = [self.z.requires_grad_(), self.label_variables.requires_grad_()]
        self.evaluation = Evaluation(self.variables, self.recorder)
        self.prior_weight = self.z.new_zeros(())
        self.optimizer = self.optimiser.build(self.variables)
        self._whole_step = self.optimizer.param_groups[0].get("max_eval")  # None: not L-BFGS
        self.subset = torch.arange(self.batch_size, device=self.z.device)
        self.anchor = self.z.detach().clone()
        self._moves = torch.ones_like(self.z)  # 0 at the images that are held
        self._moves.unflatten(0, (self.copies, -1))[:, list(self.held)] = 0
        self.trail: list[tuple[int, float]] = []
        self._remember(math.inf)

    @property
    def batch_size(self) -> int:
        """B, images in a copy."""
        return len(self.z) // self.copies

    @property
    def label_logits(self) -> Tensor:
        """Label logits (R, B, K); a known label has the logit CERTAIN_LOGIT."""
        logits = (self.label_gain * self.label_variables).unflatten(0, (self.copies, -1))
        if self.known_labels is None:
            return logits
        certain = self._certain_logits
        return torch.cat([certain.expand(self.copies, -1, -1), logits[:, len(certain) :]], dim=1)

    @cached_property
    def _certain_logits(self) -> Tensor:
        """Of the known labels (N, K)."""
        known = torch.nn.functional.one_hot(self.known_labels, self.label_variables.shape[1])
        return CERTAIN_LOGIT * known.to(self.z)

    def enter(self, phase: int) -> None:
        """Begin a phase of the objective, unless it has begun; best iterate and curvature start anew."""
        if phase != self.phase:
            self.phase, self.anchor, self.trail = phase, self.z.detach().clone(), []
            self.optimizer = self.optimiser.build(self.variables)
            self._remember(math.inf)

    @property
    def spent(self) -> int:
        """Evaluations of each start."""
        return self.evaluations // self.copies

    @property
    def gain(self) -> float:
        """The relative decrease of the loss over LOOK_BACK evaluations; infinite where this phase has had fewer."""
        before = [loss for evaluations, loss in self.trail if evaluations <= self.evaluations - LOOK_BACK * self.copies]
        if not before:
            return math.inf
        return (before[-1] - self.trail[-1][1]) / before[-1] if before[-1] else 0.0

    def draw_subset(self, size: int) -> None:
        """Set `subset` to a uniform random subset of `size` images, the same in every copy."""
        order = torch.randperm(self.batch_size, generator=self.generator)  # on the CPU: the same on every device
        if size != len(self.subset):
            self.subset = self.subset.new_empty(size)
        self.subset.copy_(order[:size])

    def weigh(self, prior_weight: float) -> Tensor:
        """Set `prior_weight`, a scalar tensor, and return it; a number beyond its dtype becomes infinite."""
        return self.prior_weight.copy_(torch.tensor(prior_weight, dtype=torch.float64))

    def ended(self, budget: Budget) -> str | None:
        """The reason why the attack ends, or None: n_iter, max_evals, max_seconds, non-finite after many setbacks.

        It is `held` where no image of a copy may move.

        The bound `max_evals` ends the attack before a step that could exceed it. So every step is whole, and a resumed
        run goes on from the end of a step. The bound `max_seconds` ends the attack after the step that reached it.
        """
        if self.setbacks > MAX_SETBACKS:
            return "non-finite"
        if self.step and len(self.held) == self.batch_size:
            return "held"
        if self.step >= budget.n_iter:
            return "n_iter"
        if budget.max_seconds is not None and self.seconds >= budget.max_seconds:
            return "max_seconds"
        bound = self._step_bound(budget.max_evals)
        # L-BFGS calls its closure at least twice, and its line search may exceed the bound by one call; Adam calls it
        # once.
        most = 1 if bound is None else max(2, bound + 1)
        if budget.max_evals is not None and self.evaluations + most * self.copies > budget.max_evals:
            return "max_evals"
        return None

    def minimise(self, loss: Callable[[], Tensor], budget: Budget, redrawn: int | None = None) -> None:
        """Take one optimiser step down `loss`, with the step size for the share of the budget spent so far.

        With a size `redrawn`, each evaluation has a new subset of so many images.

        Where `max_evals` is smaller than a whole step, the first step is cut to fit.

        The line search of older torch releases heeds no bound; a step that would exceed `max_evals` is then undone.
        """
        max_evals, (group,) = budget.max_evals, self.optimizer.param_groups
        group["lr"] = self.optimiser.rate(budget.share(self.step, self.evaluations, self.seconds))
        if self._whole_step is not None:
            group["max_eval"] = self._step_bound(max_evals)
        before = [variable.detach().clone() for variable in self.variables]

        def closure() -> Tensor:
            if max_evals is not None and self.evaluations + self.copies > max_evals:
                raise _BudgetSpentError
            self.evaluations += self.copies
            if redrawn is not None:
                self.draw_subset(redrawn)
            return self.evaluate(loss)

        try:
            self.optimizer.step(closure)
        except _BudgetSpentError:
            self._restore(before)
        self.step += 1

    def _step_bound(self, max_evals: int | None) -> int | None:
        """L-BFGS's bound on the closure calls of the next step; None for Adam."""
        if self._whole_step is None or max_evals is None or self.step > 0:
            return self._whole_step
        return min(self._whole_step, max_evals // self.copies - 1)

    def evaluate(self, loss: Callable[[], Tensor]) -> Tensor:
        """The value of `loss`, a scalar, its gradient in the variables' `grad`.

        Raises:
            ValueError: as in `backward`.
        """

        def work() -> Tensor:
            value = loss()
            self.backward(value)
            return value.detach()

        return self.evaluation(work, (self.phase, len(self.subset)))

    def backward(self, loss: Tensor) -> None:
        """Put the gradient of `loss` into the variables' `grad`; a signed optimiser gets the images' signs alone.

        Raises:
            ValueError: the model holds a function that has no second derivative.
        """
        try:  # zeros for known images and labels
            gradients = torch.autograd.grad(loss, self.variables, materialize_grads=True)
        except RuntimeError as error:
            if not any(words in str(error) for words in NOT_TWICE):
                raise
            raise ValueError(f"the model cannot be differentiated twice, as the attack needs: {error}") from None
        for variable, gradient in zip(self.variables, gradients, strict=True):
            variable.grad = gradient.contiguous()
        if self.held:
            self.z.grad *= self._moves
        if self.optimiser.signed:
            self.z.grad.sign_()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the wall time of the block to `seconds`, the work that it gave to a GPU included."""
        started = time.perf_counter()
        yield
        if self.z.is_cuda:
            torch.cuda.synchronize(self.z.device)
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
    def accept(self, terms: Terms) -> bool:
        """Keep the iterate if its terms are finite; otherwise return to the best iterate with a fresh optimiser.

        The best iterate has the least full-batch loss, which means the same at every S and prior weight, unlike the
        total.
        """
        if not (terms.is_finite() and all(bool(v.isfinite().all()) for v in self.variables)):
            self.setbacks += 1
            self.restore_best()
            self.optimizer = self.optimiser.build(self.variables)
            self.trail = []
            return False
        self._note(float(terms.loss))
        self.leader = terms.leader
        least = float(terms.full[self.leader])
        if least <= self.best["full"]:
            self._remember(least)
        return True

    def _note(self, loss: float) -> None:
        """Put the loss on the trail, and drop what `gain` looks back at no more."""
        self.trail.append((self.evaluations, loss))
        while len(self.trail) > 1 and self.trail[1][0] <= self.evaluations - LOOK_BACK * self.copies:
            del self.trail[0]

    def restore_best(self) -> None:
        """Return to the best iterate; the optimiser keeps its curvature."""
        self.leader = self.best["leader"]
        self._restore(self.best["variables"])

    @torch.no_grad()
    def _restore(self, values: list[Tensor]) -> None:
        for variable, value in zip(self.variables, values, strict=True):
            variable.copy_(value)

    def _remember(self, full: float) -> None:
        variables = [variable.detach().clone() for variable in self.variables]
        self.best = {"full": full, "leader": self.leader, "variables": variables}

    def state_dict(self) -> dict:
        """Tensors and numbers only, so that a file of them can be read without unpickling."""
        return {
            "variables": [variable.detach() for variable in self.variables],
            "generator": self.generator.get_state(),
            "optimizer": self.optimizer.state_dict(),
            "counters": [self.step, self.evaluations, self.seconds, self.setbacks, self.leader, self.phase],
            "anchor": self.anchor,
            "best": self.best,
            "trail": [list(pair) for pair in self.trail],
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping) -> None:
        """Go on from a dict of `state_dict`, on this state's own device. Every entry is checked first.

        Raises:
            ValueError: an entry is damaged, or of a run with other settings; the message names the entry.
        """
        names = ("variables", "generator", "optimizer", "counters", "anchor", "best", "trail")
        checked.mapping(state, "the state", names)
        best = checked.mapping(state["best"], "best", ("full", "leader", "variables"))
        generator = self.generator.get_state()
        generator = checked.tensor(state["generator"], "generator", generator.shape, generator.dtype)
        variables = self._alike(state["variables"], "variables")
        (anchor,) = self._alike([state["anchor"]], "anchor", [self.z])
        counters = checked.sequence(state["counters"], "counters", 6)
        step, evaluations, setbacks, phase = (checked.whole(counters[i], "a counter") for i in (0, 1, 3, 5))
        seconds = checked.real(counters[2], "the counter of seconds", 0)
        leader = checked.whole(counters[4], "leader", most=self.copies - 1)
        kept = {
            "full": checked.real(best["full"], "best.full", finite=False),
            "leader": checked.whole(best["leader"], "best.leader", most=self.copies - 1),
            "variables": [v.to(self.z) for v in self._alike(best["variables"], "best.variables")],
        }
        trail = [_pair(pair) for pair in checked.sequence(state["trail"], "trail")]
        optimizer = self.optimiser.resumed(self.variables, state["optimizer"])
        try:
            self.generator.set_state(generator)
        except RuntimeError as error:
            raise checked.DamagedError(f"generator: {error}") from None
        self._restore(variables)
        self.step, self.evaluations, self.seconds = step, evaluations, seconds
        self.setbacks, self.leader, self.phase = setbacks, leader, phase
        self.anchor, self.best, self.optimizer, self.trail = anchor.to(self.z), kept, optimizer, trail

    def _alike(self, values: object, name: str, likes: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Tensors from a file in the shapes and types of the variables, or of `likes`."""
        likes = self.variables if likes is None else likes
        pairs = zip(checked.sequence(values, name, len(likes)), likes, strict=True)
        return [checked.tensor(value, name, like.shape, like.dtype) for value, like in pairs]


def _pair(held: object) -> tuple[int, float]:
    """An entry of the trail, from a file."""
    evaluations, loss = checked.sequence(held, "trail", 2)
    return checked.whole(evaluations, "trail"), checked.real(loss, "trail")
