"""The evaluations of an attack as a CUDA graph: a thousand launches that are recorded once and replayed by one.

On a GPU an evaluation of a small network takes as long for 256 images as for 4: the host launches one kernel after the
other, and the device waits. A graph launches them all at once. Nothing in a graph may wait for the device or change its
size, and its numbers lie where they lay when it was recorded. So an objective has nothing in it that asks the device
for a number, and what changes from step to step is written in place: variables, subset and the prior's weight. What
changes the work itself is the recording's `key`; with another key the next recording is made.

Whether a network can be recorded shows only when it is tried. A recording is therefore compared with the evaluation
that it stands for, at the 1st, 2nd, 3rd, 5th, 9th, ... time. Where they differ, or where the recording fails, all
evaluations are made one by one, as they are on the CPU.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

CUDA_GRAPHS = ("auto", "off")

# Evaluations of one key before it is recorded: a recording costs a few, and a step of L-BFGS has at most 26.
FIRST = 30
WARM = 2  # evaluations on the stream that is recorded, in which libraries set themselves up

# Relative difference up to which losses, and gradients, are the same: kernels may add up in another order.
SAME = {torch.float32: 1e-3, torch.float64: 1e-9}

Work = Callable[[], Tensor]  # returns a loss, and leaves its gradient in the variables
Recorder = Callable[[Sequence[Tensor], Work], Work]  # of variables and a work: the same work on the same memory


class Evaluation:
    """Evaluates works of the same variables, by a recording where there is one.

    Args:
        variables: whose `grad` a work leaves.
        recorder: makes the recordings. None: works are done as they are.

    Attributes:
        replays: works that were done by a recording.
        why_not: why there are no more recordings, as a line; empty while there may be.
    """

    def __init__(self, variables: Sequence[Tensor], recorder: Recorder | None = None) -> None:
        self.variables, self.recorder = variables, recorder
        self.replays, self.why_not = 0, ""
        self._key: Hashable = None
        self._recording: Work | None = None
        self._done = 0

    def __call__(self, work: Work, key: Hashable) -> Tensor:
        """The work's loss, its gradient in the variables; works of one key do the same on the same memory."""
        if self.recorder is None or self.why_not:
            return work()
        if key != self._key:
            self._key, self._recording, self._done = key, None, 0
        self._done += 1
        if self._done <= FIRST:
            return work()
        try:
            self._recording = self._recording or self.recorder(self.variables, work)
            told = None if self._is_compared() else self._replayed()
        except RuntimeError as error:  # an operation that no graph holds, or no memory for it
            return self._given_up(work, f"it cannot be recorded: {' '.join(str(error).split())[:200]}")
        return self._compared(work) if told is None else told

    def _is_compared(self) -> bool:
        """Whether this replay's number, from 0, is 0 or a power of two."""
        number = self._done - FIRST - 1
        return number & (number - 1) == 0

    def _replayed(self) -> Tensor:
        self.replays += 1
        return self._recording()

    def _compared(self, work: Work) -> Tensor:
        """The work done both ways; the recording is kept if they agree."""
        by_recording = self._values(self._recording())
        try:
            loss = work()
        except RuntimeError:
            return self._given_up(work, "the evaluation itself has no room beside it")
        by_work = self._values(loss)
        if not all(_agree(a, b) for a, b in zip(by_recording, by_work, strict=True)):
            return self._given_up(lambda: loss, "the recording has other values than the evaluation itself")
        return loss

    def _values(self, loss: Tensor) -> list[Tensor]:
        return [value.detach().clone() for value in (loss, *(variable.grad for variable in self.variables))]

    def _given_up(self, work: Work, why: str) -> Tensor:
        self._recording, self.why_not = None, why
        return work()


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether a recorded value is that of the work; of a work that broke down nothing is asked."""
    if not b.isfinite().all():
        return True
    return bool((a - b).norm() <= SAME[b.dtype] * b.norm())


def cuda_graph(variables: Sequence[Tensor], work: Work) -> Work:
    """The work as a CUDA graph, on the device of the variables.

    Raises:
        RuntimeError: no graph can hold it.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(variables[0].device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            loss = work()
    gradients = [variable.grad for variable in variables]

    def replay() -> Tensor:
        graph.replay()
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.grad = gradient
        return loss

    return replay
