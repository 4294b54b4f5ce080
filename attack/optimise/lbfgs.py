"""L-BFGS with a strong Wolfe line search: the method of torch.optim.LBFGS, its curvature pairs kept in one matrix.

The two-loop recursion takes 4 m calls on vectors for m pairs, one after the other, and on a GPU the host waits for half
of the calls. The compact form (Byrd, Nocedal, Schnabel 1994, eq. 3.1) of the same matrix

    H = gamma I + [S; gamma Y]^T M [S; gamma Y],      s = x' - x,  y = g' - g,  gamma = s.y / y.y of the newest pair

takes one product with S and Y and one with their transposes; M comes from S Y^T and Y Y^T, m x m and in float64. The
line search is that of Nocedal and Wright, algorithms 3.5 and 3.6, with torch's safeguards.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from update import checked

CURVED = 1e-10  # y.s up to which a pair is dropped
DECREASE, CURVATURE = 1e-4, 0.9  # constants of the Wolfe conditions: c1, c2
NARROW = 1e-9  # a bracket below this, times the largest entry of the direction, is searched no further
NEAR = 0.1  # share of the bracket that a trial keeps from its ends, if the last trial was near an end
FARTHER = 0.01, 10.0  # before a bracket is found: least further step over the last step, and most over all so far


PRODUCTS = ("sy", "yy", "seen")


class Pairs:
    """The newest m curvature pairs of n variables, and the products among them that the compact form needs.

    S and Y are by far the largest matrices in an attack, and a direction costs as much as reading them. So S y and Y y
    of a new pair are taken as differences of products with gradients, which are needed anyway. These differences round
    no worse than the two-loop recursion's own products with vectors of the gradient's length.
    """

    def __init__(self, most: int, like: Tensor) -> None:
        self.count, self.rows = 0, like.new_zeros(most, 2, len(like))  # a ring of pairs, s and y
        self.sy = torch.zeros(most, most, dtype=torch.float64, device=like.device)  # s_i.y_j, right where i is no newer
        self.yy = torch.zeros_like(self.sy)
        self.seen = torch.zeros(most, 2, dtype=torch.float64, device=like.device)  # S g and Y g of the last gradient

    @property
    def held(self) -> int:
        """The number of pairs."""
        return min(self.count, len(self.rows))

    def direction(self, g: Tensor, s: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """-H g, once the pair of s and y = g - (the gradient before) is stored; it replaces the oldest of m pairs."""
        at = self.count % len(self.rows)
        if s is not None:
            self.rows[at, 0], self.rows[at, 1] = s, y
            self.count += 1
        if not self.count:
            return -g
        held, before = self.held, self.seen
        self.seen = torch.zeros_like(before)
        pairs = self.rows[:held].flatten(0, 1)  # (2 held, n), a view
        self.seen[:held] = (pairs @ g).double().view(held, 2)
        if s is not None:
            self.sy[:, at], self.yy[:, at] = (self.seen - before).T
            self.sy[at, at], self.yy[at, at] = y.dot(s), y.dot(y)
            self.yy[at] = self.yy[:, at]
        order = torch.arange(self.count - held, self.count, device=g.device) % held  # oldest first
        a, b = self.seen[order].T[..., None]
        upper, yy = self.sy[order][:, order].triu(), self.yy[order][:, order]
        gamma = upper[-1, -1] / yy[-1, -1]
        p = torch.linalg.solve_triangular(upper, a, upper=True)
        inner = upper.diagonal()[:, None] * p + gamma * (yy @ p - b)
        u = torch.linalg.solve_triangular(upper.T, inner, upper=False)
        weights = torch.zeros(held, 2, dtype=torch.float64, device=g.device)
        weights[order] = torch.cat([-u, gamma * p], 1)
        return weights.flatten().to(g) @ pairs - gamma.to(g) * g


@dataclass(frozen=True)
class Probe:
    """A point of a line search: its distance along the direction, its loss, its slope there, and its gradient (n,)."""

    t: float
    f: float
    slope: float
    g: Tensor


class LBFGS:
    """Moves variables down a closure's loss, in steps of `max_iter` iterations; a drop-in for torch.optim.LBFGS.

    Args:
        variables: tensors; all their entries together are x.
        lr: first step size tried; without a line search, the only one.
        max_iter, max_eval: iterations in a step, and closure calls after which the step and its line search end.
        history: m.
        line_search: strong_wolfe or none.
    """

    def __init__(
        self, variables: Sequence[Tensor], *, lr: float, max_iter: int, max_eval: int, history: int, line_search: str
    ) -> None:
        self.variables, self.line_search, self.history = list(variables), line_search, history
        self.param_groups = [{"lr": lr, "max_iter": max_iter, "max_eval": max_eval}]
        self._pairs: Pairs | None = None
        self._last: tuple[Tensor, Tensor] | None = None  # step s and gradient g of the iteration before

    def step(self, closure: Callable[[], Tensor]) -> None:
        """Take the iterations of one step. `closure` returns the loss and leaves its gradient in the variables."""
        (group,) = self.param_groups
        now, calls = self._evaluate(closure), 1
        for iteration in range(1, group["max_iter"] + 1):
            first = self._last is None
            d = self._direction(now.g)
            slope, reach, norm = torch.stack([now.g.dot(d), d.abs().max(), now.g.abs().sum()]).tolist()
            if not slope < 0:
                break
            x = torch.cat([v.detach().flatten() for v in self.variables])
            lr = min(group["lr"] * (min(1.0, 1 / norm) if first else 1.0), torch.finfo(x.dtype).max)

            def along(t: float, x: Tensor = x, d: Tensor = d) -> Probe:
                t = min(t, torch.finfo(x.dtype).max)  # a search that finds no end would exceed it
                self._place(torch.add(x, d, alpha=t))
                return self._evaluate(closure, t, d)

            before, is_last = now.g, iteration == group["max_iter"]
            if self.line_search == "none":
                self._place(torch.add(x, d, alpha=lr))
                now, more = (Probe(lr, now.f, slope, now.g), 0) if is_last else (along(lr), 1)
            else:
                now, more = strong_wolfe(along, Probe(0.0, now.f, slope, now.g), lr, reach, group["max_eval"] - calls)
                self._place(torch.add(x, d, alpha=now.t))
            self._last, calls = (d * now.t, before), calls + more
            if calls >= group["max_eval"]:
                break

    def _direction(self, g: Tensor) -> Tensor:
        """Downwards from gradient g, with the curvature pair of the last iteration."""
        if self._pairs is None:
            self._pairs = Pairs(self.history, g)
        if self._last is not None:
            s, before = self._last
            y = g - before
            if y.dot(s) > CURVED:
                return self._pairs.direction(g, s, y)
        return self._pairs.direction(g)

    def _evaluate(self, closure: Callable[[], Tensor], t: float = 0.0, d: Tensor | None = None) -> Probe:
        with torch.enable_grad():
            loss = closure().detach()
        g = torch.cat([v.grad.flatten() for v in self.variables])
        f, slope = torch.stack([loss, loss.new_zeros(()) if d is None else g.dot(d)]).tolist()  # one wait for both
        return Probe(t, f, slope, g)

    @torch.no_grad()
    def _place(self, x: Tensor) -> None:
        parts = x.split([v.numel() for v in self.variables])
        for variable, part in zip(self.variables, parts, strict=True):
            variable.copy_(part.view_as(variable))

    def state_dict(self) -> dict:
        """Tensors and numbers only."""
        if self._last is None:
            return {"count": 0}
        pairs = self._pairs
        held = {"rows": pairs.rows[: pairs.held], "count": pairs.count}
        held |= {name: getattr(pairs, name) for name in PRODUCTS}
        return held | {"last": list(self._last)}

    def load_state_dict(self, state: Mapping) -> None:
        """Go on from a dict of `state_dict`, on the variables' own device.

        Raises:
            ValueError: an entry is missing, damaged, or of other variables.
        """
        count = checked.whole(state["count"], "optimizer.count")
        if "last" not in state:
            self._pairs = self._last = None
            return
        like, m = torch.cat([v.detach().flatten() for v in self.variables]), self.history
        pairs = Pairs(m, like)
        pairs.count = count
        shapes = {"rows": (pairs.held, 2, len(like)), "sy": (m, m), "yy": (m, m), "seen": (m, 2)}
        checked.mapping(state, "optimizer", shapes)
        if isinstance(state["rows"], Tensor) and state["rows"].shape != shapes["rows"]:
            raise checked.DamagedError("optimizer.rows: curvature pairs of other variables, or another number of them")
        dtypes = {"rows": like.dtype}  # the products are in float64
        held = {
            name: checked.tensor(state[name], f"optimizer.{name}", shape, dtypes.get(name, torch.float64))
            for name, shape in shapes.items()
        }
        last = [
            checked.tensor(value, "optimizer.last", like.shape, like.dtype).to(like)
            for value in checked.sequence(state["last"], "optimizer.last", 2)
        ]
        for name in PRODUCTS:
            setattr(pairs, name, held[name].to(like.device))
        pairs.rows[: pairs.held] = held["rows"].to(like)
        self._pairs, self._last = pairs, tuple(last)


def strong_wolfe(at: Callable[[float], Probe], start: Probe, t: float, reach: float, most: int) -> tuple[Probe, int]:
    """A point that lowers the loss and flattens its slope, or the lowest point found; and the number of calls of `at`.

    Args:
        at: evaluates at a step size.
        start: where the search begins, at 0, with a negative slope.
        t: step size tried first.
        reach: the largest entry of the direction.
        most: trials beyond the first, at most.
    """

    def is_too_high(trial: Probe) -> bool:
        return trial.f > start.f + DECREASE * trial.t * start.slope

    def is_flat(trial: Probe) -> bool:
        return abs(trial.slope) <= -CURVATURE * start.slope

    previous, trial, tried = start, at(t), 0
    while tried < most and not (is_too_high(trial) or (tried > 1 and trial.f >= previous.f)):
        if is_flat(trial):
            return trial, tried + 1
        if trial.slope >= 0:
            break
        least, farthest = FARTHER
        bounds = trial.t + least * (trial.t - previous.t), farthest * trial.t
        previous, trial, tried = trial, at(cubic_minimum(previous, trial, bounds)), tried + 1
    if tried >= most:
        previous = start
    low, high = (previous, trial) if previous.f <= trial.f else (trial, previous)
    was_near = False
    while tried < most:
        left, right = min(low.t, high.t), max(low.t, high.t)
        if (right - left) * reach < NARROW:
            break
        t, margin = cubic_minimum(low, high, (left, right)), NEAR * (right - left)
        is_near = min(right - t, t - left) < margin
        if is_near and (was_near or not left < t < right):
            t, is_near = (right - margin if right - t < t - left else left + margin), False
        was_near = is_near
        trial, tried = at(t), tried + 1
        if is_too_high(trial) or trial.f >= low.f:
            low, high = (low, trial) if low.f <= trial.f else (trial, low)
            continue
        if is_flat(trial):
            return trial, tried + 1
        low, high = trial, low if trial.slope * (high.t - low.t) >= 0 else high
    return low, tried + 1


def cubic_minimum(one: Probe, other: Probe, bounds: tuple[float, float]) -> float:
    """The minimum, within bounds, of the cubic with both points' losses and slopes; the bounds' middle without one."""
    a, b = (one, other) if one.t <= other.t else (other, one)
    least, most = bounds
    d1 = a.slope + b.slope - 3 * (a.f - b.f) / (a.t - b.t) if a.t != b.t else math.nan
    square = d1 * d1 - a.slope * b.slope
    if not square >= 0:
        return (least + most) / 2
    d2 = math.sqrt(square)
    slope = b.slope - a.slope + 2 * d2
    if slope == 0:
        return (least + most) / 2
    return min(max(b.t - (b.t - a.t) * ((b.slope + d2 - d1) / slope), least), most)
