"""A linear layer along a client's steps, whose weights are never formed.

Before step t they are W_t = alpha_t W_0 - sum_{s<t} beta_t,s D_s^T H_s, with the layer's inputs H_s and its deltas D_s
at earlier steps. They act on few inputs and deltas by inner products alone, so the layer's width does not count.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from update.training import Coefficients


@dataclass
class LayerInSteps:
    """One linear layer at the step that comes next.

    Attributes:
        table: the client's coefficients.
        weight: W_0 (m, n).
        bias: (m,); None: zero.
        trains_bias: whether the bias moves with the weight; else it stays as it is.
    """

    table: Coefficients
    weight: Tensor
    bias: Tensor | None
    trains_bias: bool
    _inputs: list[Tensor] = field(default_factory=list)
    _deltas: list[Tensor] = field(default_factory=list)

    def outputs(self, inputs: Tensor, missing: Tensor | None = None) -> Tensor:
        """Outputs (B, m) of inputs (B, n).

        Args:
            missing: (B, m), what the server's layer makes of a part of the inputs that is not among them.
        """
        first = inputs @ self.weight.T
        out = self._alpha * (first if missing is None else first + missing)
        if self.bias is not None:
            out = out + (self._alpha if self.trains_bias else 1.0) * self.bias
        if (moved := self._moved) is None:
            return out
        past, deltas = moved
        return out - (inputs @ past.T + float(self.trains_bias)) @ deltas

    def pulled(self, deltas: Tensor) -> Tensor:
        """The gradient (B, n) by the inputs, of that by the outputs (B, m)."""
        out = self._alpha * deltas @ self.weight
        if (moved := self._moved) is None:
            return out
        past, earlier = moved
        return out - (deltas @ earlier.T) @ past

    def step(self, inputs: Tensor, deltas: Tensor) -> None:
        """The step that these inputs (B, n) and deltas (B, m) make, a mean's weights in the deltas."""
        self._inputs.append(inputs)
        self._deltas.append(deltas)

    def movement(self) -> tuple[Tensor, Tensor]:
        """The layer's part of the update, of its weight (m, n) and its bias (m,), after all steps."""
        inputs, deltas = self._past(self.table.shares)
        return deltas.T @ inputs, deltas.sum(0)

    def columns(self) -> Tensor:
        """(B, m), each image's deltas summed over the steps, where every step takes all images in one order."""
        _, deltas = self._past(self.table.shares)
        return deltas.view(len(self._deltas), -1, deltas.shape[1]).sum(0)

    @property
    def _alpha(self) -> float:
        return float(self.table.alpha[len(self._inputs)])

    @property
    def _moved(self) -> tuple[Tensor, Tensor] | None:
        """Inputs of all earlier steps and their deltas times beta; None before the first."""
        return self._past(self.table.beta[len(self._inputs)]) if self._inputs else None

    def _past(self, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of all steps so far, and their deltas times each step's factor."""
        deltas = torch.cat(self._deltas)
        counts = torch.tensor([len(each) for each in self._deltas])
        each = factors[: len(counts)].repeat_interleave(counts).to(deltas)
        return torch.cat(self._inputs), each[:, None] * deltas
