"""The equations that all images of a batch obey together in the head's gradient.

    (1/B) sum_i D e(q_i) [q_i^T, 1] = [U diag(sigma), D gamma],      e(q) = m softmax(W R^T q + b) - t(y)

with D G = U diag(sigma) R the span of the row-scaled gradient, see `attack.read.head.by_random_images`, and m = 1, but
for class weights, see `update.loss`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attack.solve.budget import WorkBudget
from attack.solve.levenberg import DampingRule, levenberg
from update.loss import CROSS_ENTROPY, Loss


@dataclass(frozen=True)
class HeadSpan:
    """The head's gradient as far as it stands out of the noise, G = left diag(sigma) right."""

    left: Tensor  # U (K, r)
    sigma: Tensor  # (r,)
    right: Tensor  # R (r, d)

    @classmethod
    def of(cls, gradient: Tensor, rank: int) -> "HeadSpan":
        """The leading `rank` singular values of G (K, d) and their vectors."""
        left, sigma, right = torch.linalg.svd(gradient, full_matrices=False)
        return cls(left[:, :rank], sigma[:rank], right[:rank])

    def certificate(self, features: Tensor, errors: Tensor) -> Tensor:
        """c = 1 / (h^T G^+ e), (N,): the weight with which e h^T is part of G; 1/B for a true image."""
        return 1 / ((features @ self.right.T / self.sigma) * (errors @ self.left)).sum(1)

    def outside(self, errors: Tensor) -> Tensor:
        """|P e|, (N,)."""
        return (errors - errors @ self.left @ self.left.T).norm(dim=1)


class HeadEquations:
    """(1/B) sum_i D e(q_i) [q_i^T, 1] = [U diag(sigma), D gamma] with the rows' weights D.

    Args:
        span: of D G.
        rows: diagonal of D (K,).
        weight: W (K, d).
        bias: b (K,).
        bias_gradient: gamma (K,); None where the update has none, and the last column is left out.
        labels: (B,).
        loss: the client's, a cross-entropy.
    """

    def __init__(
        self,
        span: HeadSpan,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor,
        bias_gradient: Tensor | None,
        labels: Tensor,
        loss: Loss = CROSS_ENTROPY,
    ) -> None:
        self.rows = rows
        loss = loss.of_batch(labels)
        self.bias, self.targets, self.batch_size = bias, loss.targets(labels, weight.T), len(labels)
        self.masses = loss.masses(labels, weight.T)  # (B, 1)
        self.logits = weight @ span.right.T  # of q, without the bias: (K, r)
        self.target = span.left * span.sigma
        self.has_bias = bias_gradient is not None
        if self.has_bias:
            self.target = torch.cat([self.target, (rows * bias_gradient)[:, None]], dim=1)

    def at(self, q: Tensor) -> "HeadPoint":
        """Softmax, errors and residual at q."""
        p = (q @ self.logits.T + self.bias).softmax(1)
        errors = self.masses * p - self.targets
        e = self.rows * errors
        x = torch.cat([q, torch.ones_like(q[:, :1])], dim=1) if self.has_bias else q
        return HeadPoint(q, p, errors, e, x, e.T @ x / self.batch_size - self.target)

    def unexplained(self, at: "HeadPoint") -> float:
        """|f|^2 without the part of each row along that row of the target.

        An exponential that the victim rounded scales its whole row; the error that this leaves is no witness.
        """
        along = (at.f * nn.functional.normalize(self.target, dim=1)).sum(1)
        return at.cost - float(along.square().sum())

    def vjp(self, at: "HeadPoint", f: Tensor) -> Tensor:
        """J^T f, (B, r)."""
        t = at.x @ f.T  # (B, K)
        soft = self.rows * t
        soft = self.masses * at.p * (soft - (at.p * soft).sum(1, keepdim=True))
        return (soft @ self.logits + at.e @ f[:, : at.q.shape[1]]) / self.batch_size

    def jvp(self, at: "HeadPoint", z: Tensor) -> Tensor:
        """Derivative of the residual along logits z (B, K), of the residual's shape."""
        first = self.masses * at.p * (z - (at.p * z).sum(1, keepdim=True))
        return (self.rows * first).T @ at.x / self.batch_size

    def hvp(self, at: "HeadPoint", v: Tensor) -> Tensor:
        """Second derivative of the residual along v, of the residual's shape."""
        z = v @ self.logits.T
        z = z - (at.p * z).sum(1, keepdim=True)
        first = self.masses * at.p * z
        second = first * z - at.p * (first * z).sum(1, keepdim=True)
        bent = (self.rows * second).T @ at.x
        bent[:, : v.shape[1]] += 2 * (self.rows * first).T @ v
        return bent / self.batch_size

    def normal(self, at: "HeadPoint") -> Tensor:
        """J^T J, (B r, B r). Column i of J is J_i dq [q_i, 1]^T + e_i dq^T, J_i (K, r) the softmax's."""
        batch_size, rank = at.q.shape
        slopes = self.masses * self.rows * at.p
        j = slopes[:, None, :] * (self.logits.T - (at.p @ self.logits)[:, :, None])  # (B, r, K)
        j = j.reshape(batch_size * rank, -1)
        h = (j @ j.T).view(batch_size, rank, batch_size, rank).mul_((at.x @ at.x.T)[:, None, :, None])
        cross = (j @ at.e.T).view(batch_size, rank, batch_size, 1)
        h.addcmul_(cross, at.q[:, None, None, :])
        h.permute(2, 3, 0, 1).addcmul_(cross, at.q[:, None, None, :])
        h.diagonal(dim1=1, dim2=3).add_((at.e @ at.e.T)[:, :, None])
        return h.view(batch_size * rank, batch_size * rank) / self.batch_size**2

    # The same as one problem of `attack.solve.levenberg`, its unknowns q as a vector (1, B r).

    def _point(self, x: Tensor) -> "HeadPoint":
        return self.at(x.view(self.batch_size, -1))

    def cost(self, x: Tensor, which: Tensor) -> Tensor:
        """|f|^2, (1,)."""
        return x.new_tensor([self._point(x).cost])

    def linearised(self, x: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """|f|^2 (1,), J^T J (1, B r, B r), J^T f (1, B r)."""
        at = self._point(x)
        return x.new_tensor([at.cost]), self.normal(at)[None], self.vjp(at, at.f).view(1, -1)

    def bend(self, x: Tensor, step: Tensor, which: Tensor) -> Tensor:
        """J^T times the second derivative along a step, (1, B r)."""
        at = self._point(x)
        return self.vjp(at, self.hvp(at, step.view_as(at.q))).view(1, -1)


@dataclass(frozen=True)
class HeadPoint:
    """Where a solution stands.

    Attributes:
        q: (B, r).
        p: softmax (B, K).
        errors: (B, K).
        e: the same, weighted by row.
        x: [q, 1], or q without the bias's gradient.
        f: residual (K, r + 1).
    """

    q: Tensor
    p: Tensor
    errors: Tensor
    e: Tensor
    x: Tensor
    f: Tensor

    @property
    def cost(self) -> float:
        """|f|^2."""
        return float(self.f.square().sum())


def solve(equations: HeadEquations, q: Tensor, iterations: int, budget: WorkBudget) -> Tensor:
    """Features' coordinates (B, r) that leave the least residual, from q (B, r), by at most so many iterations.

    Raises:
        OutOfTimeError: the budget's clock has run out.
    """
    start = q.reshape(1, -1)
    return levenberg(equations, start, DampingRule(), iterations=iterations, budget=budget, accelerated=True).x.view_as(
        q
    )
