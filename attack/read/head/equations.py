"""The equations that all images of a batch obey together in the head's gradient, and the solver for them.

    (1/B) sum_i D e(q_i) [q_i^T, 1] = [U diag(sigma), D gamma],      e(q) = softmax(W R^T q + b) - onehot(y)

with D G = U diag(sigma) R the span of the row-scaled gradient, see `attack.read.head.by_random_images`.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FIRST_DAMPING = 1e-3  # in units of the normal matrix's mean diagonal: a Gauss-Newton step, hardly shortened
LEAST_DAMPING = 1e-15  # float64's last digits: below it the matrix is its own again
REFUSALS = 12  # of a step in a row, damping doubled each time, before the solver takes the residual to be least
BENT = 0.75  # largest |2 acceleration| / |step|: beyond it the path bends too much for a parabola (Transtrum, Sethna)
SLOW = 0.999  # a step that leaves more of the residual than this was slow
PATIENCE = 6  # slow steps in a row that end it


@dataclass(frozen=True)
class Span:
    """The head's gradient as far as it stands out of the noise, G = left diag(sigma) right."""

    left: Tensor  # U (K, r)
    sigma: Tensor  # (r,)
    right: Tensor  # R (r, d)

    @classmethod
    def of(cls, gradient: Tensor, rank: int) -> "Span":
        """The leading `rank` singular values of G (K, d) and their vectors."""
        left, sigma, right = torch.linalg.svd(gradient, full_matrices=False)
        return cls(left[:, :rank], sigma[:rank], right[:rank])

    def certificate(self, features: Tensor, errors: Tensor) -> Tensor:
        """c = 1 / (h^T G^+ e), (N,): the weight with which e h^T is part of G; 1/B for a true image."""
        return 1 / ((features @ self.right.T / self.sigma) * (errors @ self.left)).sum(1)

    def outside(self, errors: Tensor) -> Tensor:
        """|P e|, (N,)."""
        return (errors - errors @ self.left @ self.left.T).norm(dim=1)


class Equations:
    """(1/B) sum_i D e(q_i) [q_i^T, 1] = [U diag(sigma), D gamma] with the rows' weights D.

    Args:
        span: of D G.
        rows: diagonal of D (K,).
        weight: W (K, d).
        bias: b (K,).
        bias_gradient: gamma (K,); None where the update has none, and the last column is left out.
        labels: (B,).
    """

    def __init__(
        self,
        span: Span,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor,
        bias_gradient: Tensor | None,
        labels: Tensor,
    ) -> None:
        self.rows = rows
        self.bias, self.onehot, self.batch_size = bias, nn.functional.one_hot(labels, len(bias)).to(weight), len(labels)
        self.logits = weight @ span.right.T  # of q, without the bias: (K, r)
        self.target = span.left * span.sigma
        self.has_bias = bias_gradient is not None
        if self.has_bias:
            self.target = torch.cat([self.target, (rows * bias_gradient)[:, None]], dim=1)

    def at(self, q: Tensor) -> "Point":
        """Softmax, errors and residual at q."""
        p = (q @ self.logits.T + self.bias).softmax(1)
        e = self.rows * (p - self.onehot)
        x = torch.cat([q, torch.ones_like(q[:, :1])], dim=1) if self.has_bias else q
        return Point(q, p, e, x, e.T @ x / self.batch_size - self.target)

    def unexplained(self, at: "Point") -> float:
        """|f|^2 without the part of each row along that row of the target.

        An exponential that the victim rounded scales its whole row; the error that this leaves is no witness.
        """
        along = (at.f * nn.functional.normalize(self.target, dim=1)).sum(1)
        return at.cost - float(along.square().sum())

    def pull(self, at: "Point", f: Tensor) -> Tensor:
        """J^T f, (B, r)."""
        t = at.x @ f.T  # (B, K)
        soft = self.rows * t
        soft = at.p * (soft - (at.p * soft).sum(1, keepdim=True))
        return (soft @ self.logits + at.e @ f[:, : at.q.shape[1]]) / self.batch_size

    def push(self, at: "Point", z: Tensor) -> Tensor:
        """Derivative of the residual along logits z (B, K), of the residual's shape."""
        first = at.p * (z - (at.p * z).sum(1, keepdim=True))
        return (self.rows * first).T @ at.x / self.batch_size

    def bend(self, at: "Point", v: Tensor) -> Tensor:
        """Second derivative of the residual along v, of the residual's shape."""
        z = v @ self.logits.T
        z = z - (at.p * z).sum(1, keepdim=True)
        first = at.p * z
        second = first * z - at.p * (first * z).sum(1, keepdim=True)
        bent = (self.rows * second).T @ at.x
        bent[:, : v.shape[1]] += 2 * (self.rows * first).T @ v
        return bent / self.batch_size

    def normal(self, at: "Point") -> Tensor:
        """J^T J, (B r, B r). Column i of J is J_i dq [q_i, 1]^T + e_i dq^T, J_i (K, r) the softmax's."""
        batch_size, rank = at.q.shape
        j = (self.rows * at.p)[:, None, :] * (self.logits.T - (at.p @ self.logits)[:, :, None])  # (B, r, K)
        j = j.reshape(batch_size * rank, -1)
        h = (j @ j.T).view(batch_size, rank, batch_size, rank).mul_((at.x @ at.x.T)[:, None, :, None])
        cross = (j @ at.e.T).view(batch_size, rank, batch_size, 1)
        h.addcmul_(cross, at.q[:, None, None, :])
        h.permute(2, 3, 0, 1).addcmul_(cross, at.q[:, None, None, :])
        h.diagonal(dim1=1, dim2=3).add_((at.e @ at.e.T)[:, :, None])
        return h.view(batch_size * rank, batch_size * rank) / self.batch_size**2


@dataclass(frozen=True)
class Point:
    """Where a solution stands: q (B, r), softmax p, weighted errors e (B, K), x = [q, 1], residual f (K, r + 1)."""

    q: Tensor
    p: Tensor
    e: Tensor
    x: Tensor
    f: Tensor

    @property
    def cost(self) -> float:
        """|f|^2."""
        return float(self.f.square().sum())


def solve(
    equations: Equations,
    q: Tensor,
    iterations: int,
    deadline: float = math.inf,
    tick: Callable[[], object] = lambda: None,
) -> Tensor:
    """Levenberg-Marquardt with geodesic acceleration from q (B, r).

    It ends after so many iterations, at the deadline (of `time.perf_counter`), when no step lowers the residual, or
    when six in a row lowered it by less than one in a thousand. `tick` is called at each iteration. Damping follows the
    gain ratio (Nielsen 1999).
    """
    at, damping, slow = equations.at(q), FIRST_DAMPING, 0
    for _ in range(iterations):
        if time.perf_counter() > deadline:
            break
        tick()
        gradient, matrix = equations.pull(at, at.f), equations.normal(at)
        diagonal = matrix.diagonal().clone()
        unit = diagonal.mean()
        for _ in range(REFUSALS):
            matrix.diagonal().copy_(diagonal + damping * unit)
            trial, step = _step(equations, at, gradient, matrix)
            if trial is not None and trial.cost < at.cost:
                break
            damping *= 2
        else:
            break
        expected = float(damping * unit * step.square().sum() - (step * gradient).sum())
        damping *= min(3.0, max(0.2, 1 - (2 * (at.cost - trial.cost) / expected - 1) ** 3))
        damping = max(damping, LEAST_DAMPING)
        slow = slow + 1 if trial.cost > SLOW * at.cost else 0
        at = trial
        if slow == PATIENCE:
            break
    return at.q


def _step(equations: Equations, at: Point, gradient: Tensor, matrix: Tensor) -> tuple[Point | None, Tensor]:
    """The point that step and acceleration lead to, and the step; no point where the step is not to be trusted."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return None, gradient
    step = -torch.cholesky_solve(gradient.reshape(-1, 1), factor).view_as(gradient)
    force = equations.pull(at, equations.bend(at, step))
    acceleration = -torch.cholesky_solve(force.reshape(-1, 1), factor).view_as(gradient)
    if 2 * acceleration.norm() > BENT * step.norm():
        return None, step
    return equations.at(at.q + step + acceleration / 2), step
