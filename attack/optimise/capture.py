"""The evaluations of an attack as a CUDA graph: a thousand launches that are recorded once and replayed by one.

On a GPU an evaluation of a small network takes as long for 256 images as for 4: the host launches one kernel after the
other, and the device waits. A graph launches them all at once. Nothing in a graph may wait for the device or change its
size, and its numbers lie where they lay when it was recorded. So an objective has nothing in it that asks the device
for a number, and what changes from step to step is written in place: variables, subset and the prior's weight. What
changes the work itself is the recording's `key`; with another key the next recording is made.

Whether a network can be recorded shows only when it is tried. A recording is therefore compared with the evaluation
that it stands for, at the 1st, 2nd, 5th, 17th, 65th, ... time. Where they differ, where the recording fails, or where
it saves little, since the device has enough to do, all evaluations are launched one by one, as they are on the CPU.
"""

import time
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

CUDA_GRAPHS = ("auto", "off")

# Evaluations of one key before it is recorded: what they compute once is no part of the recording. Where a key has not
# lasted for LASTING evaluations, the next one must last as long before it is recorded.
FIRST, LASTING = 5, 50
WARM = 2  # evaluations on the stream that is recorded, in which libraries set themselves up
WORTH = 0.8  # share of an evaluation's time that a replay may take

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
        self._done, self._first = 0, FIRST

    def __call__(self, work: Work, key: Hashable) -> Tensor:
        """The work's loss, its gradient in the variables; works of one key do the same on the same memory."""
        if self.recorder is None or self.why_not:
            return work()
        if key != self._key:
            self._first = LASTING if self._key is not None and self._done < LASTING else FIRST
            self._key, self._recording, self._done = key, None, 0
        self._done += 1
        if self._done <= self._first:
            return work()
        try:
            self._recording = self._recording or self.recorder(self.variables, work)
            told = None if self._is_compared() else self._replayed()
        except RuntimeError as error:  # an operation that no graph holds, or no memory for it
            return self._given_up(work, f"it is not recorded: {' '.join(str(error).split())[:200]}")
        return self._compared(work) if told is None else told

    def _is_compared(self) -> bool:
        """Whether this replay's number, from 0, is 0 or a power of four."""
        number = self._done - self._first - 1
        while number and number % 4 == 0:
            number //= 4
        return number <= 1

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
        RuntimeError: no graph can hold it, or it saves little time.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(variables[0].device):
        usual, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(usual)
        with torch.cuda.stream(stream):
            launched = [_seconds(work) for _ in range(WARM)][-1]
        usual.wait_stream(stream)
        try:  # other threads may use the device meanwhile, such as one that writes a checkpoint
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                loss = work()
        finally:  # a recording that fails leaves its own stream in place
            torch.cuda.set_stream(usual)
        replayed = [_seconds(graph.replay) for _ in range(WARM)][-1]
    if replayed > WORTH * launched:
        raise RuntimeError(f"a replay takes {1e3 * replayed:.1f} ms, launches one by one {1e3 * launched:.1f} ms")
    gradients = [variable.grad for variable in variables]

    def replay() -> Tensor:
        graph.replay()
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.grad = gradient
        return loss

    return replay


def _seconds(work: Callable[[], object]) -> float:
    """Of wall time, to the end of all work on the current device."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began
