"""Products of two branches, above all gates: each channel of an image times a number that the channel means decide.

A gate (squeeze-and-excitation) makes y = x s of x, with s = g(mean of x) for each image and channel. Then
mean(y) = mean(x) s, so the channel means m of x solve m g(m) = mean(y): as many equations as unknowns, of each image by
itself. They are solved by Newton's method from where the gate stands without any input. Other solutions are possible,
and then the gradients of the gate's own layers, which the walk compares, contradict this one.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from network.kinds.affine import Affine
from network.kinds.kind import Kind, Shape
from network.kinds.norm import MIXES, Norm
from network.kinds.pool import AveragePool
from network.known_outputs import KnownOutputs, UndeterminedError
from network.stage import Branched, Chain, Gate, Product, delta_before, run

SOLVED = 1e4  # roundings of the means: Newton's method stops there
STEPS, HALVINGS = 50, 20  # of Newton's method, and of one of its steps, at most
STARTS = (1.0, 2.0, 5.0)  # times the means of the outputs, beside what the gate makes of nothing
CLOSED = 1e-9  # a gate this far down hides a channel
TWO_TENSORS = "two tensors are multiplied, and their product tells neither"
OTHER_GATE = "a gate that is not decided by the mean of each channel"
CUT_OFF = "a gate's inputs are told by all of its outputs alone"


class ProductKind(Kind):
    """body(x) shortcut(x)."""

    modules = (Product,)

    def why_not(self, module: Product, inputs: Shape, outputs: Shape) -> str:
        """Always: any number is a product of others."""
        return TWO_TENSORS


class GateKind(Kind):
    """body(x) x: known outputs tell x where the body takes channel means alone."""

    modules = (Gate,)
    keeps_sign = True
    needs_all = CUT_OFF

    def keeps_zeros(self, module: Gate, inputs: Shape, outputs: Shape) -> bool:
        """Zero times anything is zero."""
        return True

    def why_not(self, module: Gate, inputs: Shape, outputs: Shape) -> str:
        """Where it is no gate of channel means, or BatchNorm in training mode is in the gate."""
        if not _is_mean(module.body[0].module, inputs) or any(isinstance(s.module, Branched) for s in module.body):
            return OTHER_GATE
        if any(isinstance(s.module, Norm.modules) and Norm().mixes_images(s.module) for s in module.body):
            return MIXES
        like = next((s.module.weight for s in module.body if isinstance(s.module, Affine.modules)), torch.zeros(()))
        gate = module.body[1:]
        shape = tuple(run(gate, like.new_zeros(1, inputs[0], *(1,) * (len(inputs) - 1))).shape[1:])
        return "" if shape[:1] == tuple(inputs[:1]) and torch.Size(shape).numel() == inputs[0] else OTHER_GATE

    def pulled(self, module: Gate, outputs: KnownOutputs, shape: Shape) -> KnownOutputs:
        """x = y / s; its noise is that of y and of s; delta passes both ways.

        Raises:
            UndeterminedError: not all outputs are known, a channel is closed, or no means of x are found.
        """
        if not outputs.known.all():
            raise UndeterminedError(CUT_OFF)
        y, gate = outputs.values, module.body[1:]
        noise = outputs.noise.expand_as(y)
        both = zip(y.flatten(2).mean(2), _mean_errors(noise), strict=True)
        found = [_GateOfMeans(gate, means).solved(errors) for means, errors in both]
        s, s_error = (torch.stack(each).view(*y.shape[:2], *(1,) * (y.dim() - 2)) for each in zip(*found, strict=True))
        x = y / s
        return replace(
            outputs,
            values=x,
            delta=delta_before(module, x, outputs.delta),
            masked_delta=delta_before(module, x, outputs.masked_delta),
            noise=noise.hypot(x * s_error) / s.abs(),
        )


def _is_mean(module: object, inputs: Shape) -> bool:
    """Whether a module takes the mean of each channel of inputs of that shape."""
    if not isinstance(module, AveragePool.modules) or len(inputs) < 2:
        return False
    ones = torch.ones(1, *inputs)
    means = module(ones)
    return means.numel() == inputs[0] and bool((means == 1).all())


def _mean_errors(noise: Tensor) -> Tensor:
    """Of each channel's mean, (B, C), where entries have errors of that standard deviation, each by itself."""
    count = noise[0, 0].numel()
    return noise.flatten(2).square().mean(2).sqrt() / count**0.5


@dataclass(frozen=True)
class _GateOfMeans:
    """What a gate makes of one image's channel means m: the means m s of its outputs, with s = g(m).

    Attributes:
        gate: g, from the channel means of its inputs to s.
        means: (C,) of its outputs.
    """

    gate: Chain
    means: Tensor

    def opened(self, m: Tensor) -> Tensor:
        """s (N, C) of means m (N, C)."""
        return run(self.gate, m.view(*m.shape, 1, 1)).reshape(m.shape)

    def missed(self, m: Tensor) -> Tensor:
        """By how much means m (C,) miss those of the outputs, (C,)."""
        return m * self.opened(m[None])[0] - self.means

    def slopes(self, m: Tensor) -> tuple[Tensor, Tensor]:
        """The derivatives (C, C) of s, and of what is missed, by means m (C,)."""
        with torch.enable_grad():
            each = m.detach().repeat(len(m), 1).requires_grad_()  # a copy for every channel of s
            opened = self.opened(each).diagonal()
            of_s = torch.autograd.grad(opened.sum(), each)[0]
        return of_s, torch.diag(opened.detach()) + m[:, None] * of_s

    def solved(self, errors: Tensor) -> tuple[Tensor, Tensor]:
        """s (C,), and the standard deviation of its errors, from that of the errors of the outputs' means, (C,).

        Raises:
            UndeterminedError: no means make those of the outputs, or a channel is closed.
        """
        nothing = self.opened(torch.zeros_like(self.means)[None])[0]
        starts = [self.means / torch.where(nothing.abs() > CLOSED, nothing, 1.0), *(k * self.means for k in STARTS)]
        tried = map(self._newton, starts)
        m, is_found = next((end for end in tried if end[1]), (starts[0], False))
        s = self.opened(m[None])[0]
        if closed := int((s.abs() < CLOSED).sum()):
            raise UndeterminedError(f"a gate has closed {closed} of {len(s)} channels of an image, which hides them")
        if not is_found:
            raise UndeterminedError("no channel means are found that a gate makes into those of its outputs")
        of_s, of_missed = self.slopes(m)
        return s, (of_s @ torch.linalg.solve(of_missed, torch.diag(errors))).norm(dim=1)

    def _newton(self, start: Tensor) -> tuple[Tensor, bool]:
        """Where Newton's method ends, its steps halved where they lead away, and whether that is a solution."""
        m, off = start, self.missed(start)
        for _ in range(STEPS):
            if off.norm() <= SOLVED * torch.finfo(off.dtype).eps * self.means.norm():
                return m, True
            step, failed = torch.linalg.solve_ex(self.slopes(m)[1], off)
            if failed:
                break
            tried = (m - step / 2**halved for halved in range(HALVINGS))
            m = next((nearer for nearer in tried if self.missed(nearer).norm() < off.norm()), None)
            if m is None:
                return start, False
            off = self.missed(m)
        return m, False
