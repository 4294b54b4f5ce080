"""The surroundings of a run: the seed's streams, the device, Ctrl-C."""

import argparse
import hashlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from network.zoo import place_of

INTERRUPTED = 130  # exit status
PAIR = 2  # images in the pass that counts work: BatchNorm in training mode refuses a single image
FLOPS_PER_THREAD = 2e8  # least share of a batch's forward pass (measured): with less, threads mostly wait


def stream(seed: int, name: str) -> torch.Generator:
    """A generator of its own for each use of the seed, so that more draws in one use leave the others unchanged."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))  # torch heeds no more than 32 bits


def choose_device(name: str) -> torch.device:
    """The device of --device, set to exact and repeatable arithmetic.

    Raises:
        ValueError: the device is not available.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.zeros(1, device=device).item()  # the meta device holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"--device {name}: not available here; use auto, cpu or cuda") from None
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # ten bits of mantissa would drown the small residuals that matter
    return torch.device(device)


def place_named(settings: argparse.Namespace) -> dict[str, torch.dtype | torch.device]:
    """Dtype and device that --dtype and --device name.

    Raises:
        ValueError: as in `choose_device`.
    """
    return {"device": choose_device(settings.device), "dtype": getattr(torch, settings.dtype)}


@contextmanager
def enough_threads(model: nn.Module, batch_size: int, image_shape: tuple[int, ...]) -> Iterator[None]:
    """As many threads as batches of images (C, H, W) keep busy on the CPU, never more than before.

    Two threads for a small net gain nothing on idle cores. Beside another program, each of the net's thousand short
    operations waits until both threads have had their turn. The work decides and not a clock: rounding depends on the
    number of threads, and a seed has to repeat a run.
    """
    before = torch.get_num_threads()
    if before > 1 and place_of(model)["device"].type == "cpu":
        work = batch_size / PAIR * _work(model, torch.zeros(PAIR, *image_shape, **place_of(model)))
        torch.set_num_threads(min(before, max(1, int(work / FLOPS_PER_THREAD))))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _work(model: nn.Module, images: torch.Tensor) -> int:
    """Operations of a forward pass in the layers that have a matrix; the others take little beside them.

    torch's own counter would load the compiler, which takes longer than many a run's first steps.
    """
    counts = []

    def count(layer: nn.Module, _: object, outputs: torch.Tensor) -> None:
        counts.append(2 * outputs.numel() * layer.weight[0].numel())

    layers = [layer for layer in model.modules() if isinstance(getattr(layer, "weight", None), torch.Tensor)]
    hooks = [layer.register_forward_hook(count) for layer in layers if layer.weight.dim() > 1]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(counts)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C (or SIGTERM) has come. A second Ctrl-C stops at once.

    Only the main thread gets such signals. In another thread, such as a cluster's worker, none ever comes.
    """
    asked = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def ask(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print("\nstopping after this step (again: at once)", file=sys.stderr)

    before = {sign: signal.signal(sign, ask) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
