"""The optimiser, its step sizes, the prior's annealing, and the budget that ends an attack."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attack.optimise.lbfgs import LBFGS
from update import checked

LEARNING_RATES = {"lbfgs": 1.0, "adam": 0.05}
LINE_SEARCHES = ("strong_wolfe", "none")
LR_SCHEDULES = ("constant", "step", "cosine")


@dataclass(frozen=True)
class Budget:
    """The bounds of an attack: optimiser steps, closure evaluations, seconds of wall time; None: without bound."""

    n_iter: int
    max_evals: int | None = None
    max_seconds: float | None = None

    def share(self, step: int, evaluations: int, seconds: float) -> float:
        """The share of the budget that is spent, in [0, 1] or a little more, by the bound that is nearest."""
        spent = ((step, self.n_iter), (evaluations, self.max_evals), (seconds, self.max_seconds))
        return max(done / bound for done, bound in spent if bound)


@dataclass(frozen=True)
class Optimiser:
    """L-BFGS or Adam, and the step size.

    Args:
        name: lbfgs or adam.
        lr: step size; None: 1 for lbfgs, 0.05 for adam.
        lr_schedule: one of `LR_SCHEDULES`, see `learning_rate`.
        signed: move the images by the signs of their gradient (Geiping et al. 2020).
        inner_iter, history, line_search: for L-BFGS: iterations in a step, curvature pairs, strong_wolfe or none.
    """

    name: str
    lr: float | None
    lr_schedule: str
    signed: bool
    inner_iter: int
    history: int
    line_search: str

    @property
    def base(self) -> float:
        """The step size before its schedule."""
        return self.lr or LEARNING_RATES[self.name]

    def rate(self, progress: float) -> float:
        """The step size after this share of the budget."""
        return learning_rate(self.base, self.lr_schedule, progress)

    def build(self, variables: list[Tensor]) -> torch.optim.Adam | LBFGS:
        """A fresh optimiser of the variables."""
        if self.name == "adam":
            return torch.optim.Adam(variables, lr=self.base)
        return LBFGS(
            variables,
            lr=self.base,
            max_iter=self.inner_iter,
            max_eval=self.inner_iter * 5 // 4,
            history=self.history,
            line_search=self.line_search,
        )

    def resumed(self, variables: list[Tensor], state: object) -> torch.optim.Adam | LBFGS:
        """The optimiser of the variables that goes on from a `state_dict` of one of its kind.

        Raises:
            ValueError: the state is damaged, or of another optimiser or other variables.
        """
        optimizer = self.build(variables)
        if self.name == "lbfgs":
            optimizer.load_state_dict(checked.mapping(state, "optimizer", ("count",)))
            return optimizer
        moments = checked.mapping(checked.mapping(state, "optimizer", ("state",))["state"], "optimizer.state")
        if moments:
            held = {index: _moments(moments, index, variable) for index, variable in enumerate(variables)}
            optimizer.load_state_dict(optimizer.state_dict() | {"state": held})
        return optimizer


def _moments(moments: Mapping, index: int, variable: Tensor) -> dict[str, Tensor]:
    """Adam's state of one variable, from a file."""
    name = f"optimizer.state[{index}]"
    if index not in moments:
        raise checked.DamagedError(f"{name} is missing")
    held = checked.mapping(moments[index], name, ("step", "exp_avg", "exp_avg_sq"))
    found = {"step": checked.tensor(held["step"], f"{name}.step", (), torch.float32)}
    for moment in ("exp_avg", "exp_avg_sq"):
        found[moment] = checked.tensor(held[moment], f"{name}.{moment}", variable.shape, variable.dtype)
    if found["step"] < 1 or (found["exp_avg_sq"] < 0).any():
        raise checked.DamagedError(f"{name} is not what Adam leaves: a step below 1, or a negative square")
    return found


def learning_rate(base: float, schedule: str, progress: float) -> float:
    """The step size after a share of the run, `progress` in [0, 1].

    constant  base
    step      divided by ten after 3/8, 5/8 and 7/8 of the run (Geiping et al. 2020)
    cosine    half a cosine from base to zero (Yin et al. 2021)
    """
    if schedule == "constant":
        return base
    if schedule == "step":
        return base * 0.1 ** sum(progress >= share for share in (3 / 8, 5 / 8, 7 / 8))
    if schedule == "cosine":
        return base * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    raise ValueError(f"unknown lr_schedule {schedule!r}: choose one of {', '.join(LR_SCHEDULES)}")


@dataclass(frozen=True)
class Annealing:
    """The prior's weight over the run: from `weight` it falls geometrically to `final * weight`, never below `least`.

    At first a strong prior gives a smooth image that L-BFGS can move as a whole. As the weight falls, the gradient is
    matched ever more exactly, and the prior decides only what the gradient leaves open. The horizon is a number of
    evaluations, not a share of the run: a run that is stopped earlier takes the same way. `least` is set by noise: a
    gradient that is matched more closely than it is known is matched to noise. `phases` are equal parts of the horizon;
    the matching loss changes from phase to phase, see `attack.match.softening`.
    """

    weight: float
    final: float = 1.0
    horizon: int = 1
    least: float = 0.0
    phases: int = 1

    def phase(self, evaluations: float) -> int:
        """The index of the phase after so many evaluations; the last one stays."""
        return min(int(self.phases * evaluations / self.horizon), self.phases - 1)

    def ended(self, evaluations: float, gain: float) -> None:
        """None: an annealing never ends an attack."""

    def at(self, evaluations: float) -> float:
        """The weight after so many closure evaluations."""
        return max(self.least, self.weight * math.exp(math.log(self.final) * min(1.0, evaluations / self.horizon)))
