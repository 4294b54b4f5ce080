"""Selection schedules: how many images, S(t), the random subset of step t holds.

The seven modes are those of the MAGIA paper's appendix (arXiv 2509.18170). Pure Python, without project imports.

    const1            S = 1
    constk            S = k
    linear_inc_l      S = ceil(B (t+1) / l)      while t < l, then B
    linear_inc_total  S = ceil(B (t+1) / n_iter)
    linear_dec_l      S = ceil(B (1 - t/l))      while t < l, then 1
    linear_dec_total  S = ceil(B (1 - t/n_iter))
    sigmoid           S = ceil(B sigmoid_decay(t; a, b))

with t the 0-based step. Every S is clamped to 1 <= S <= B.
"""

import math
from dataclasses import dataclass

RESAMPLES = ("step", "closure")
MODES = ("const1", "constk", "linear_inc_l", "linear_inc_total", "linear_dec_l", "linear_dec_total", "sigmoid")


def sigmoid_decay(step: float, a: float, b: float) -> float:
    """The logistic curve 1 / (1 + exp(-a (step - b))): falling for a < 0, rising for a > 0, one half at step b.

    The code takes exp of non-positive numbers only, so no a, b or step overflows.
    """
    z = a * (step - b)
    e = math.exp(-abs(z))
    return 1 / (1 + e) if z >= 0 else e / (1 + e)


def subset_size(mode: str, step: int, *, batch_size: int, n_iter: int, k: int, l_iter: int, a: float, b: float) -> int:
    """S(t), the number of images in the subset of 0-based step `step`, clamped to [1, batch_size].

    Args:
        mode: one of `MODES`.
        step: 0-based step.
        batch_size: B, the number of images that the shared gradient averages.
        n_iter: total number of steps, the horizon of the `_total` modes.
        k: subset size of `constk`; any integer, clamped to the batch.
        l_iter: length in steps of the `_l` modes' ramp; with 0 the ramp is already over.
        a, b: slope (per step) and midpoint (step) of `sigmoid`.

    Raises:
        ValueError: unknown mode, negative step, l_iter or n_iter, batch_size below 1, a or b not finite.

    Source: MAGIA, appendix on selection mechanisms.
    """
    if mode not in MODES:
        raise ValueError(f"unknown selection mode {mode!r}: choose one of {', '.join(MODES)}")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("step", step, 0),
        ("n_iter", n_iter, 0),
        ("l_iter", l_iter, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not (math.isfinite(a) and math.isfinite(b)):
        raise ValueError(f"the sigmoid's a and b must be finite, got a={a}, b={b}")

    def ramp(done: int, length: int) -> int:
        """ceil(B * done / length) in integers, exact at any size; past its end the ramp stands at B."""
        return -(-batch_size * done // length) if done < length else batch_size

    match mode:
        case "const1":
            size = 1
        case "constk":
            size = k
        case "linear_inc_l":
            size = ramp(step + 1, l_iter)
        case "linear_inc_total":
            size = ramp(step + 1, n_iter)
        case "linear_dec_l":
            size = ramp(l_iter - step, l_iter) if step < l_iter else 1
        case "linear_dec_total":
            size = ramp(n_iter - step, n_iter) if step < n_iter else 1
        case "sigmoid":
            size = math.ceil(batch_size * sigmoid_decay(step, a, b))
    return max(1, min(batch_size, size))


@dataclass(frozen=True)
class Schedule:
    """S(t) of a run, and when the subset is drawn: once a step, or (closure) in every evaluation, as published.

    Raises:
        ValueError: as in `subset_size`, at construction.
    """

    mode: str
    batch_size: int
    n_iter: int
    k: int
    l_iter: int
    a: float
    b: float
    resample: str = "step"

    def __post_init__(self) -> None:
        self.size(0)

    def size(self, step: int) -> int:
        """S of 0-based step `step`."""
        return subset_size(
            self.mode,
            step,
            batch_size=self.batch_size,
            n_iter=self.n_iter,
            k=self.k,
            l_iter=self.l_iter,
            a=self.a,
            b=self.b,
        )
