"""What a search may spend: work, which decides what is found, and a clock, which only aborts.

Work is counted, so that one seed gives one result on a busy machine and on an idle one. The clock is the user's
`--max_seconds`. Once it has run out, every loop that asks it is left by an `OutOfTimeError`; whoever catches that error
says so.
"""

import math
import time
from collections.abc import Callable


class OutOfTimeError(Exception):
    """The clock has run out; what was being computed is abandoned."""


class WorkBudget:
    """How much work is left, and the clock.

    Args:
        work: that may be spent, in units of whoever spends it.
        deadline: of `time.perf_counter`, infinite without a clock.
        tick: called each time the clock is asked, to show that something goes on.
    """

    def __init__(
        self, work: float = math.inf, *, deadline: float = math.inf, tick: Callable[[], object] = lambda: None
    ) -> None:
        self.left, self.deadline, self.tick = work, deadline, tick

    @property
    def is_out_of_time(self) -> bool:
        """Whether the clock has run out."""
        return time.perf_counter() > self.deadline

    @property
    def is_spent(self) -> bool:
        """Whether no work is left."""
        return self.left <= 0

    def check(self) -> None:
        """Ask the clock.

        Raises:
            OutOfTimeError: it has run out.
        """
        self.tick()
        if self.is_out_of_time:
            raise OutOfTimeError

    def spend(self, work: float) -> None:
        """Take work off what is left."""
        self.left -= work

    def part(self, share: float) -> "WorkBudget":
        """A budget of its own with that share of what is left, under the same clock; its work is taken off this one.

        What the part leaves comes back by `returned`.
        """
        part = WorkBudget(share * self.left, deadline=self.deadline, tick=self.tick)
        if math.isfinite(self.left):
            self.left -= part.left
        return part

    def returned(self, part: "WorkBudget") -> None:
        """Take back what a part has left."""
        if math.isfinite(self.left):
            self.left += max(0.0, part.left)


def unlimited() -> WorkBudget:
    """Neither work nor time is bounded."""
    return WorkBudget()
