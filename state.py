"""What moves during an attack: images, labels, optimiser, subsets, counters. Its dict is what a checkpoint holds."""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

LEARNING_RATES = {"lbfgs": 1.0, "adam": 0.05}
LINE_SEARCHES = ("strong_wolfe", "none")
LR_SCHEDULES = ("constant", "step", "cosine")
CERTAIN = 100.0  # a logit so far above the others that softmax is one-hot in float64 too
MAX_SETBACKS = 3  # times that a non-finite loss is answered by going back to the best iterate


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
        """The copy of least full-batch loss."""
        return int(self.full.argmin())


@dataclass
class AttackState:
    """The iterate of an attack.

    Args:
        z: free image variables (R B, C, H, W) of R copies of the batch, see `pixels.PixelMap`.
        label_variables: (R B, K); the label logits are `label_gain` times these.
        generator: what subsets are drawn from.
        make_optimizer: builds the optimiser of the two variables; called again after a setback.
        label_gain: a scaling, so that L-BFGS moves labels and pixels at comparable rates.
        known_labels: class indices (N,) of the leading N images of each copy, which are then not optimised.
        copies: R, starts that are attacked side by side. Each closure call then counts as R evaluations.
        seconds: wall time spent before the first step.

    `leader` is the copy that matches the gradient best, the one that is shown and judged.
    """

    z: Tensor
    label_variables: Tensor
    generator: torch.Generator
    make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]
    label_gain: float = 1.0
    known_labels: Tensor | None = None
    copies: int = 1
    seconds: float = 0.0
    step: int = 0
    evaluations: int = 0
    setbacks: int = 0
    leader: int = 0

    def __post_init__(self) -> None:
        self.variables = [self.z.requires_grad_(), self.label_variables.requires_grad_()]
        self.optimizer = self.make_optimizer(self.variables)
        self._whole_step = self.optimizer.param_groups[0].get("max_eval")  # None: not L-BFGS
        self.subset = torch.arange(self.batch_size, device=self.z.device)
        self._remember(math.inf)

    @property
    def batch_size(self) -> int:
        """B, images in a copy."""
        return len(self.z) // self.copies

    @property
    def label_logits(self) -> Tensor:
        """Label logits (R, B, K); those of known labels are certain."""
        logits = (self.label_gain * self.label_variables).unflatten(0, (self.copies, -1))
        if self.known_labels is None:
            return logits
        count, classes = len(self.known_labels), logits.shape[2]
        certain = CERTAIN * torch.nn.functional.one_hot(self.known_labels, classes).to(logits)
        # 0: all variables stay part of the graph
        return torch.cat([certain + 0 * logits[:, :count], logits[:, count:]], dim=1)

    def draw_subset(self, size: int) -> None:
        """Set `subset` to a uniform random subset of `size` images, the same in every copy."""
        order = torch.randperm(self.batch_size, generator=self.generator)  # on the CPU: the same on every device
        self.subset = order[:size].to(self.z.device)

    def ended(self, n_iter: int, max_evals: int | None = None, max_seconds: float | None = None) -> str | None:
        """What has ended the attack, or None: n_iter, max_evals, max_seconds, or non-finite after too many setbacks.

        `max_evals` ends it before a step that could exceed it, so that every step is whole and a resumed run goes on
        from the end of one. `max_seconds` ends it after the step that reached it.
        """
        if self.setbacks > MAX_SETBACKS:
            return "non-finite"
        if self.step >= n_iter:
            return "n_iter"
        if max_seconds is not None and self.seconds >= max_seconds:
            return "max_seconds"
        bound = self._step_bound(max_evals)
        # L-BFGS calls its closure at least twice, and its line search may call it once more than its bound; Adam once.
        most = 1 if bound is None else max(2, bound + 1)
        if max_evals is not None and self.evaluations + most * self.copies > max_evals:
            return "max_evals"
        return None

    def minimise(self, closure: Callable[[], Tensor], max_evals: int | None) -> None:
        """Take one optimiser step; the very first is cut to fit a `max_evals` that is smaller than a whole one.

        The line search of older torch releases heeds no bound; a step that would exceed `max_evals` is then undone.
        """
        if self._whole_step is not None:
            self.optimizer.param_groups[0]["max_eval"] = self._step_bound(max_evals)
        before = [variable.detach().clone() for variable in self.variables]

        def counted() -> Tensor:
            if max_evals is not None and self.evaluations + self.copies > max_evals:
                raise _BudgetSpentError
            self.evaluations += self.copies
            return closure()

        try:
            self.optimizer.step(counted)
        except _BudgetSpentError:
            self._restore(before)
        self.step += 1

    def set_learning_rate(self, rate: float) -> None:
        """Let the next step be of this size."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _step_bound(self, max_evals: int | None) -> int | None:
        """L-BFGS's bound on the closure calls of the next step; None for Adam."""
        if self._whole_step is None or max_evals is None or self.step > 0:
            return self._whole_step
        return min(self._whole_step, max_evals // self.copies - 1)

    def backward(self, loss: Tensor, *, signed: bool = False) -> None:
        """Put the gradient of `loss` where the optimiser looks for it; of the images' only the signs, if so asked."""
        for variable, gradient in zip(self.variables, torch.autograd.grad(loss, self.variables), strict=True):
            variable.grad = gradient.contiguous()
        if signed:
            self.z.grad.sign_()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the wall time of the block to `seconds`."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
    def accept(self, terms: Terms) -> bool:
        """Keep the iterate if its terms are finite; otherwise go back to the best one with a fresh optimiser.

        Best is the iterate of least full-batch loss: unlike the total, it means the same at every S and prior weight.
        """
        if not (terms.is_finite() and all(bool(v.isfinite().all()) for v in self.variables)):
            self.setbacks += 1
            self.restore_best()
            self.optimizer = self.make_optimizer(self.variables)
            return False
        self.leader = terms.leader
        least = float(terms.full[self.leader])
        if least <= self.best["full"]:
            self._remember(least)
        return True

    def restore_best(self) -> None:
        """Go back to the best iterate; the optimiser keeps what it knows."""
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
        """Tensors and numbers only, so that it can be read back without unpickling."""
        return {
            "variables": [variable.detach() for variable in self.variables],
            "generator": self.generator.get_state(),
            "optimizer": self.optimizer.state_dict(),
            "counters": [self.step, self.evaluations, self.seconds, self.setbacks, self.leader],
            "best": self.best,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned, on this state's own device."""
        self._restore(state["variables"])
        self.generator.set_state(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.evaluations, self.seconds, self.setbacks, self.leader = state["counters"]
        self.best = state["best"] | {"variables": [v.to(self.z) for v in state["best"]["variables"]]}


def make_optimizer(variables: list[Tensor], settings: argparse.Namespace) -> torch.optim.Optimizer:
    """L-BFGS or Adam on the variables, as the flags --optimizer, --lr, --inner_iter, --history, --line_search say.

    L-BFGS gets tolerances of 0: matching losses fall far below the library's absolute defaults long before the images
    are sharp. A step is ended by its iterations and evaluations alone.
    """
    lr = settings.lr or LEARNING_RATES[settings.optimizer]
    if settings.optimizer == "adam":
        return torch.optim.Adam(variables, lr=lr)
    return torch.optim.LBFGS(
        variables,
        lr=lr,
        max_iter=settings.inner_iter,
        max_eval=settings.inner_iter * 5 // 4,
        history_size=settings.history,
        line_search_fn=None if settings.line_search == "none" else settings.line_search,
        tolerance_grad=0,
        tolerance_change=0,
    )


def learning_rate(base: float, schedule: str, progress: float) -> float:
    """The step size after a share of the run, `progress` in [0, 1].

    constant  base
    step      a tenth of what it was after 3/8, 5/8 and 7/8 of the run (Geiping et al. 2020)
    cosine    half a cosine from base to zero (Yin et al. 2021)
    """
    if schedule == "constant":
        return base
    if schedule == "step":
        return base * 0.1 ** sum(progress >= share for share in (3 / 8, 5 / 8, 7 / 8))
    if schedule == "cosine":
        return base * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    raise ValueError(f"unknown lr_schedule {schedule!r}: choose one of {', '.join(LR_SCHEDULES)}")


def annealed_weight(weight: float, evaluations: float, *, final: float, horizon: int, least: float = 0.0) -> float:
    """The prior's weight after so many closure evaluations: from `weight` it falls geometrically to `final * weight`.

    A strong prior first gives a smooth image that L-BFGS can move as a whole; as the weight falls, the gradient is
    matched ever more exactly and the prior decides only what the gradient leaves open. The horizon is in evaluations
    of its own, not a share of the run: where a run is stopped does not change the way it took. It never falls below
    `least`, which is what noise asks for: a gradient that is matched more closely than it is known is matched to noise.
    """
    return max(least, weight * math.exp(math.log(final) * min(1.0, evaluations / horizon)))
