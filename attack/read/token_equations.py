"""The equations of a token in the row space of one gradient whose activation lies in that of the next.

They hold at every token of the batch, and hardly anywhere else: nearly every search from a random start ends at one.
"""

import torch
from torch import Tensor

from attack.read.token_span import TokenSpan
from attack.solve.levenberg import DampingRule
from network.perceptrons import Perceptron, slope

LAYERNORM = 0.3  # weight of the LayerNorm's two equations, times sqrt(D)
LOOSE = 0.01  # the mean square's weight in the end, where the spaces alone are to decide
RULE = DampingRule(
    1e-2, least=1e-10, most=1e6, refused=4.0, accepted=0.3, refusals=None, patience=4, counts_refusals=True
)
STARTS = 16  # side by side


class TokenEquations:
    """phi(W1 Q c + b1) outside the row space of G2, and the LayerNorm's equations: zero at tokens, for each c (n, r).

    Args:
        place: both layers, in float64.
        inner, outer: the spans of their gradients.
        free: (r, k) the directions in which c may move, c = free c'; None: all.
        squares: weight of the mean square's equation.
    """

    def __init__(
        self,
        place: Perceptron,
        inner: TokenSpan,
        outer: TokenSpan,
        free: Tensor | None = None,
        squares: float = 1.0,
    ) -> None:
        self.place, self.inner, self.outer, self.squares = place, inner, outer, squares
        basis = torch.linalg.qr(inner.columns[:, None] * inner.right)[0]
        self.basis = basis if free is None else basis @ free  # Q (D, k)
        self.weight = place.inner.weight @ self.basis
        self.unit = float(outer.columns.mean())
        like = self.basis[:, 0]
        gamma = torch.ones_like(like) if place.norm.weight is None else place.norm.weight
        shift = torch.zeros_like(like) if place.norm.bias is None else place.norm.bias
        self.bare, self.offset = self.basis / gamma[:, None], shift / gamma
        self.strength = LAYERNORM * place.width**0.5

    def activations(self, tokens: Tensor) -> Tensor:
        """phi(W1 x + b1) (n, H) of tokens (n, D)."""
        return self.place.activation(self.place.inner(tokens))

    def starts(self, generator: torch.Generator) -> Tensor:
        """Random c, of the size of tokens."""
        c = torch.randn(STARTS, self.basis.shape[1], generator=generator, dtype=torch.float64).to(self.basis)
        return c * (self.place.width**0.5 / (c @ self.bare.T).norm(dim=1, keepdim=True))

    def _residual(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z = self.place.inner(c @ self.basis.T)
        bare = c @ self.bare.T - self.offset
        norm = torch.stack([bare.mean(1), self.squares * (bare.square().mean(1) - 1)], 1) * self.strength
        return z, self.unit * self.outer.outside(self.place.activation(z)), bare, norm

    def cost(self, c: Tensor, which: Tensor) -> Tensor:
        """|f|^2 (n,)."""
        _, f, _, norm = self._residual(c)
        return f.square().sum(1) + norm.square().sum(1)

    def linearised(self, c: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """|f|^2 (n,), J^T J (n, k, k) and J^T f (n, k)."""
        z, f, bare, norm = self._residual(c)
        slopes = slope(self.place.activation, z) * (self.unit / self.outer.columns)
        normal, gradient = [], []
        for n in range(len(c)):
            jacobian = slopes[n][:, None] * self.weight
            inside = self.outer.right.T @ jacobian
            square = 2 * self.squares * (bare[n][:, None] * self.bare).mean(0)
            rows = torch.stack([self.bare.mean(0), square]) * self.strength
            normal.append(jacobian.T @ jacobian - inside.T @ inside + rows.T @ rows)
            gradient.append(jacobian.T @ f[n] + rows.T @ norm[n])
        return f.square().sum(1) + norm.square().sum(1), torch.stack(normal), torch.stack(gradient)

    @property
    def work(self) -> float:
        """Multiplications of one iteration of one start, about."""
        return 2 * len(self.weight) * self.weight.shape[1] ** 2

    def certified(self, token: Tensor) -> tuple[Tensor, float]:
        """delta (H,) at W1's outputs of a token (D,), and the ratio of the two weights that certify it."""
        z = self.place.inner(token)
        rows = torch.where(self.outer.rows.isfinite(), self.outer.rows, 0.0)
        second = rows[:, None] * self.outer.left
        first = slope(self.place.activation, z)[:, None] * (self.place.outer.weight.T @ second)
        seen = first / self.inner.rows[:, None]
        outside = seen - self.inner.left @ (self.inner.left.T @ seen)
        v = torch.linalg.eigh(outside.T @ outside)[1][:, 0]
        own = self.inner.functional(first @ v) @ token
        other = self.outer.functional(second @ v) @ self.place.activation(z)
        return first @ v / own, float(own / other)
