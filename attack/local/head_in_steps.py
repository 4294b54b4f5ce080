"""All features of a head that a client trained in one pass, at once: the head trains itself on them.

Each feature h_i is used at one step, as it is at that step, however far the layers below have drifted. With labels and
minibatches known (`attack.local.local_labels` finds them by trial), the head's part of the update is a function of the
features alone:

    E_t = e(H_t W_t^T + b_t) / b,    G = sum_t share_t E_t^T H_t

All features lie in the row space R of G, so H = Q R with B x B unknowns. The weights of later steps act on features
through H_t R^T R H_s^T = Q_t Q_s^T alone: no weight is ever formed (`attack.local.kernel_form`). Levenberg-Marquardt
finds Q from features of random images, or from anywhere; with the right labels it ends at the noise after ten steps or
so, with wrong ones far above.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from attack.local.kernel_form import LayerInSteps
from attack.read.candidates import ARITHMETIC, UNSURE
from attack.read.head.error_bars import EXPLAINED, NEARLY_SINGULAR, NOISES
from attack.read.random_images import random_features
from attack.read.signals import Signals
from attack.read.span import Span
from attack.solve.budget import WorkBudget
from attack.solve.levenberg import DampingRule, Differentiated, levenberg
from network.head import Head
from update.shared import SharedUpdate

STARTS = 8  # from which the features are sought; the first is mostly enough
ITERATIONS = 60  # of each, at most; those that converge take 9 to 20


def features_in_steps(
    update: SharedUpdate,
    model: nn.Module,
    span: Span,
    labels: Tensor,
    generator: torch.Generator,
    budget: WorkBudget,
) -> Signals:
    """The features of all images, in the order of their steps; none where nothing explains the head's gradient.

    Args:
        update: of a client that made one pass.
        model: that the server sent out.
        span: of the head's part of the update.
        labels: (B,), in the order of the steps.
        generator: what starts and noise are drawn from (on the CPU).
        budget: of work, about multiplications, and of time.

    Raises:
        ValueError: the head's gradient does not span all images.
        OutOfTimeError: the budget's clock has run out.
    """
    if not span.determined or span.rank < span.batch_size:
        raise ValueError(f"the head's gradient does not determine {span.batch_size} images: rank {span.rank}")
    equations, weight = _HeadInSteps.of(update, model, span, labels), Head.of(model).layer.weight.detach()
    for _ in range(STARTS):
        if budget.is_spent:
            break
        budget.spend(ITERATIONS * (span.batch_size * span.rank) ** 2)
        start = random_features(model, update.image_shape, span.batch_size, generator).to(span.right)
        rule = {"iterations": ITERATIONS, "budget": budget}
        solution = levenberg(equations.problem, (start @ span.right.T).reshape(1, -1), DampingRule(), **rule)
        if equations.explains(float(solution.cost)):
            q = solution.x.view(span.batch_size, -1)
            return equations.signals(q, solution.normal[0], float(solution.cost), weight.to(q), generator)
    return Signals.none(span.basis, span.geometry.input_shape, span.geometry.output_shape, span.batch_size)


@dataclass(frozen=True)
class _HeadInSteps:
    """f(Q) = D [G(Q) R^T, gamma(Q)] - D [G R^T, gamma].

    Attributes:
        span: of the head's part of the update, D its rows.
        logits: W_0 R^T (K, r).
        bias: b_0 (K,).
        target: (K, r + 1), or (K, r) where the update has no gradient of the bias, which then stays as it is.
        labels: (B,), in the order of the steps.
        training: the client's.
    """

    span: Span
    logits: Tensor
    bias: Tensor
    target: Tensor
    labels: Tensor
    update: SharedUpdate

    @classmethod
    def of(cls, update: SharedUpdate, model: nn.Module, span: Span, labels: Tensor) -> "_HeadInSteps":
        """The equations of the model's head."""
        head = Head.of(model)
        weight, bias = head.layer.weight.detach().to(span.right), head.layer.bias
        _, gamma = head.among(update.gradients)
        target = span.left * span.sigma
        if gamma is not None:
            target = torch.cat([target, (span.rows * gamma.to(target))[:, None]], 1)
        bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().to(weight)
        return cls(span, weight @ span.right.T, bias, target, labels.to(weight.device), update)

    @property
    def has_bias(self) -> bool:
        """Whether the bias is trained."""
        return self.target.shape[1] > self.span.rank

    def trained(self, q: Tensor, missing: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The residual f (K, r + 1), and each image's own error e (B, K) at its own step.

        Args:
            q: (B, r).
            missing: (B, K), what the logits have beyond q's.
        """
        training, errors = self.update.training, []
        head = LayerInSteps(training.coefficients(), self.logits, self.bias, self.has_bias)
        for part in training.schedule(len(self.labels)):
            part = part.to(q.device)
            z = head.outputs(q[part], None if missing is None else missing[part])
            errors.append(training.loss.errors(z, self.labels[part]))
            head.step(q[part], errors[-1] / len(part))
        weight, bias = head.movement()
        own = torch.cat([weight, bias[:, None]], 1) if self.has_bias else weight
        return self.span.rows[:, None] * own - self.target, torch.cat(errors)

    def explains(self, cost: float) -> bool:
        """Whether |f|^2 is what noise leaves."""
        span = self.span
        freedom = max(1, self.target.numel() - len(self.labels) * span.rank)
        allowance = (EXPLAINED * span.noise) ** 2 * freedom
        return cost <= allowance + (ARITHMETIC * span.precision * float(span.sigma.norm())) ** 2

    @property
    def problem(self) -> Differentiated:
        """For `attack.solve.levenberg`, its unknowns q as a vector (B r,)."""
        return Differentiated(lambda x: self.trained(x.view(len(self.labels), -1))[0].flatten())

    # What was found

    def signals(self, q: Tensor, normal: Tensor, cost: float, weight: Tensor, generator: torch.Generator) -> Signals:
        """The solution, and what noise makes of each image; those that it leaves unsure are not among them.

        Images are in the order of their steps, so none of the later ones is given where one of the first is unsure.
        """
        span, errors = self.span, self.trained(q)[1]
        weighted = errors * span.rows
        length, freedom = self._error(q, normal, cost, weighted, weight, generator)
        uncertainty = length / q.norm(dim=1)
        found = Signals(
            values=(q @ span.right).view(-1, *span.geometry.input_shape),
            labels=self.labels,
            deltas=errors,
            residuals=(weighted - weighted @ span.left @ span.left.T).norm(dim=1) / weighted.norm(dim=1),
            certificates=self._counts(q) * (q / span.sigma * (weighted @ span.left)).sum(1) / span.batch_size,
            uncertainty=uncertainty,
            freedom=freedom,
            batch_size=span.batch_size,
        )
        return (
            found if bool((uncertainty < UNSURE).all()) else found.pick(torch.zeros_like(self.labels, dtype=torch.bool))
        )

    def _counts(self, q: Tensor) -> Tensor:
        """How much each image counts in the update, (B,): 1 in a mean."""
        training, count = self.update.training, len(self.labels)
        return q.new_tensor(training.counts(count)).repeat_interleave(q.new_tensor(training.sizes_of(count)).long())

    def _error(
        self, q: Tensor, normal: Tensor, cost: float, weighted: Tensor, weight: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Root mean square error (B,) of each image, and its degrees of freedom, see `attack.read.head.error_bars`."""
        span, size = self.span, len(q)
        counted = weighted * self._counts(q)[:, None]
        gram = counted @ counted.T
        matrix = normal.clone()
        for each in (matrix, gram):
            each.diagonal().add_(NEARLY_SINGULAR * each.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(matrix)
        gram_factor, gram_failed = torch.linalg.cholesky_ex(gram)
        if failed or gram_failed:
            return q.new_full((size,), math.inf), q.new_ones(size)
        transposed = self.problem.slopes(q.flatten())
        # What noise is in the span, (K, r) each, and how it turns features out of it, (B, d) each.
        inside, turned = [], []
        for _ in range(NOISES):
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(q)
            inside.append(noise @ span.right.T)
            turned.append(size * torch.cholesky_solve(counted @ (noise - inside[-1] @ span.right), gram_factor))
        column = torch.randn(NOISES, len(weight), 1, generator=generator, dtype=torch.float64).to(q)
        seen = torch.cat([torch.stack(inside), column], 2)[:, :, : self.target.shape[1]]
        off, lengths = (torch.stack([t @ weight.T for t in turned]), torch.stack([t.square().sum(1) for t in turned]))
        still = torch.zeros_like(weighted)
        pulled = vmap(lambda z: jvp(lambda missing: self.trained(q, missing)[0], (still,), (z,))[1])(off)
        f = (pulled - seen).flatten(1)  # (draws, K (r + 1))
        moved = -torch.cholesky_solve(transposed @ f.T, factor).T  # (draws, B r)
        variance, mean = torch.var_mean(moved.view(len(f), size, -1).square().sum(2) + lengths, 0)
        left = float((f + moved @ transposed).square().sum(1).mean())
        shown = math.sqrt(cost / left)
        noise = span.noise if shown < EXPLAINED * span.noise else shown
        return mean.sqrt() * noise, (2 * mean.square() / variance).clamp(1, weight.shape[1])
