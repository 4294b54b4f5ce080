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
        for past, delta in self._past():
            out = out - (inputs @ past.T + float(self.trains_bias)) @ delta
        return out

    def pulled(self, deltas: Tensor) -> Tensor:
        """The gradient (B, n) by the inputs, of that by the outputs (B, m)."""
        out = self._alpha * deltas @ self.weight
        for past, delta in self._past():
            out = out - (deltas @ delta.T) @ past
        return out

    def step(self, inputs: Tensor, deltas: Tensor) -> None:
        """The step that these inputs (B, n) and deltas (B, m) make, a mean's weights in the deltas."""
        self._inputs.append(inputs)
        self._deltas.append(deltas)

    def movement(self) -> tuple[Tensor, Tensor]:
        """The layer's part of the update, of its weight (m, n) and its bias (m,), after all steps."""
        shares = self.table.shares.tolist()
        deltas = torch.cat([share * each for share, each in zip(shares, self._deltas, strict=True)])
        return deltas.T @ torch.cat(self._inputs), deltas.sum(0)

    @property
    def _alpha(self) -> float:
        return float(self.table.alpha[len(self._inputs)])

    def _past(self) -> list[tuple[Tensor, Tensor]]:
        """Inputs of all earlier steps and their deltas times beta; one pair, or none before the first step."""
        if not self._inputs:
            return []
        factors = self.table.beta[len(self._inputs)].tolist()
        deltas = [factor * delta for factor, delta in zip(factors, self._deltas, strict=False)]
        return [(torch.cat(self._inputs), torch.cat(deltas))]
