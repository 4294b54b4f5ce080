"""Per-image signals in closed form: labels and features, one image at a time, from the head's averaged gradient.

With logits z = W h + b and mean cross-entropy, image i leaves its softmax error e_i = softmax(z_i) - onehot(y_i) and
its features h_i in the averaged gradients of the last layer:

    G = (1/B) sum_i e_i h_i^T   (K, d),        gamma = (1/B) sum_i e_i   (K,).

G = U Sigma R has rank B as long as B <= min(K - 1, d). Every h_i is R^T q_i for some q_i (r,), every e_i lies in the
span of U, and gamma fixes the scale: v^T q_i = 1 with v = Sigma^-1 U^T gamma. So each image alone solves

    P (softmax(W R^T q + b) - onehot(y)) = 0,    v^T q = 1,    P = I - U U^T,

K - r equations in r - 1 unknowns: determined while 2r - 1 <= K. A solution (e, h) is certified by
c = 1 / (h^T G^+ e), which must be 1/B, and then taken out: G <- G - e h^T / B, gamma <- gamma - e / B; the rank falls
by one, and those that are left are easier to find.

Relatives: Cocktail Party Attack (Kariyappa et al. 2022, arXiv 2209.05578) unmixes the same gradient by ICA, SPEAR
(Dimitrov et al. 2024, arXiv 2403.03945) by the sparsity of ReLU, iLRG (Ma et al., ICLR 2023) recovers label counts.
"""

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gradients import SharedUpdate

STARTS = 384  # random starts per round; all are solved at once
ROUNDS = 16  # rounds of finding and taking out, at most
ITERATIONS = 100  # Levenberg-Marquardt iterations per start
RESIDUAL = 1e-4  # largest residual of an accepted solution
CERTIFICATES = (1e-3, 1e-2, 5e-2, 0.2)  # largest |c B - 1|: the strictest first, relaxed when it finds no more
UNEXPLAINED = 0.03  # largest share of the head's gradient that a complete set of images may leave over
UNSURE = 0.05  # features whose expected relative error is larger are not used
RANGE = 0.02  # how far beyond the activation's range an accepted feature may lie
SAME = 0.03  # solutions with one label whose features differ by less, relative to their length, are one


@dataclass(frozen=True)
class Signals:
    """What the head's gradient says of N of the batch's images, surest first.

    Attributes:
        labels: (N,) class indices.
        features: (N, d), what the head saw.
        errors: (N, K) softmax errors.
        residuals: (N,) lengths of the equations' left sides; rounding leaves about 1e-7.
        certificates: (N,) c B, which is 1 for a true image.
        uncertainty: (N,) expected relative error of the features, from the update's own noise.
        rank: numerical rank of the head's gradient: the batch size, as long as that is below K.
        seconds: wall time of the search.
    """

    labels: Tensor
    features: Tensor
    errors: Tensor
    residuals: Tensor
    certificates: Tensor
    uncertainty: Tensor
    rank: int
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Span:
    """The head's gradient as far as it stands out of the noise: G = left diag(sigma) right, gamma = G right^T scale."""

    left: Tensor  # U (K, r)
    sigma: Tensor  # (r,)
    right: Tensor  # R (r, d)
    scale: Tensor  # v (r,)

    @classmethod
    def of(cls, gradient: Tensor, bias_gradient: Tensor, floor: float) -> "Span":
        """The span of G (K, d) and gamma (K,), singular values up to `floor` left out."""
        left, sigma, right = torch.linalg.svd(gradient, full_matrices=False)
        rank = int((sigma > floor).sum())
        left, sigma, right = left[:, :rank], sigma[:rank], right[:rank]
        return cls(left, sigma, right, left.T @ bias_gradient / sigma)


def recover_signals(update: SharedUpdate, model: nn.Module, *, generator: torch.Generator) -> Signals:
    """Find the images that the head's gradient gives away, in float64, from the update and the model alone.

    Starts are features of random smooth images, pushed through the attacker's own copy of the model, each with a
    label that the bias gradient makes likely.

    Raises:
        ValueError: the model's last layer is not linear with a bias, or the rank of its gradient exceeds (K + 1) / 2.
    """
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Linear) or head.bias is None:
        raise ValueError("the model's last layer is not linear with a bias")
    started = time.perf_counter()
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    raw = update.gradients["head.weight"]
    gradient, bias_gradient = raw.to(weight), update.gradients["head.bias"].to(weight)
    floor = noise_floor(gradient, raw.dtype)
    whole = Span.of(gradient, bias_gradient, floor)
    if 2 * len(whole.sigma) - 1 > len(bias):
        raise ValueError(
            f"the head's gradient has rank {len(whole.sigma)}: one image alone is underdetermined beyond "
            f"{(len(bias) + 1) // 2} with {len(bias)} classes"
        )
    found: list[tuple[Tensor, int]] = []
    strictness = 0
    for _ in range(ROUNDS):
        span = Span.of(gradient, bias_gradient, floor)
        if len(span.sigma) < 1:
            break
        starts = _random_features(model, update.image_shape, STARTS, generator).to(weight)
        absent = update.batch_size - len(found)
        expected = absent * (starts @ weight.T + bias).softmax(1).mean(0) - update.batch_size * bias_gradient
        likely = expected.clamp(min=0.02).cpu()  # how often each label is still in the batch, roughly
        labels = torch.multinomial(likely, STARTS, replacement=True, generator=generator).to(weight.device)
        q, residual = solve(span, weight, bias, starts @ span.right.T, labels)
        features = q @ span.right
        errors = softmax_error(features, labels, weight, bias)
        share = update.batch_size * certificate(span, features, errors)
        good = (residual < RESIDUAL) & ((share - 1).abs() < CERTIFICATES[strictness]) & _in_range(model, features)
        new: list[int] = []
        for i in residual.argsort().tolist():
            if good[i] and not any(_same(features, labels, i, j) for j in new):
                new.append(i)
        for i in new[:absent]:
            found.append((features[i], int(labels[i])))
            gradient = gradient - errors[i, :, None] * features[i] / update.batch_size
            bias_gradient = bias_gradient - errors[i] / update.batch_size
        strictness += not new
        if strictness == len(CERTIFICATES) or len(found) == update.batch_size:
            break
    features = torch.stack([h for h, _ in found]) if found else weight.new_zeros(0, weight.shape[1])
    labels = torch.tensor([y for _, y in found], dtype=torch.long, device=weight.device)
    features = _polish(whole, weight, bias, features, labels)
    signals = _certified(whole, weight, bias, features, labels, floor, update.batch_size)
    return replace(signals, seconds=time.perf_counter() - started)


def noise_floor(gradient: Tensor, dtype: torch.dtype) -> float:
    """Singular values of the head's gradient (K, d) up to this are noise.

    Rounding leaves about eps times the largest. Added noise shows in the smallest: softmax errors sum to zero, so the
    rank is at most K - 1, and the noise of a random matrix is spread over no more than a factor of three.
    """
    sigma = torch.linalg.svdvals(gradient)
    return float(max(0.5 * torch.finfo(dtype).eps * sigma[0], 3 * sigma[-1]))


def softmax_error(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """e = softmax(W h + b) - onehot(y), (N, K)."""
    return (features @ weight.T + bias).softmax(1) - nn.functional.one_hot(labels, len(bias))


def certificate(span: Span, features: Tensor, errors: Tensor) -> Tensor:
    """c = 1 / (h^T G^+ e), (N,): the weight with which e h^T is part of G; 1/B for a true image."""
    return 1 / ((features @ span.right.T / span.sigma) * (errors @ span.left)).sum(1)


def solve(span: Span, weight: Tensor, bias: Tensor, q: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Levenberg-Marquardt from all starts q (N, r) at once; returns solutions (N, r) and residuals (N,).

    Each start has a label (N,) and a damping of its own. The unknowns are the r - 1 coordinates on {q : v^T q = 1}.
    """
    v, left = span.scale, span.left
    frame = torch.cat([v[:, None], torch.eye(len(v)).to(v)], dim=1)
    basis = torch.linalg.qr(frame)[0][:, 1:]  # (r, r-1), orthogonal to v
    eye = torch.eye(len(v) - 1).to(v)
    logits_of_q = weight @ span.right.T  # (K, r)
    logits_of_t = logits_of_q @ basis  # (K, r-1)
    onehot = nn.functional.one_hot(labels, len(bias)).to(q)

    def residual(q: Tensor) -> tuple[Tensor, Tensor]:
        p = (q @ logits_of_q.T + bias).softmax(1)
        e = p - onehot
        return p, e - e @ left @ left.T

    q = q + (1 - q @ v)[:, None] * v / v.square().sum()
    damping = torch.full((len(q),), 1e-2).to(q)
    p, f = residual(q)
    cost = f.square().sum(1)
    for _ in range(ITERATIONS):
        jacobian = p[:, :, None] * (logits_of_t - (p @ logits_of_t)[:, None])  # (N, K, r-1)
        jacobian = jacobian - left @ (left.T @ jacobian)
        normal = jacobian.mT @ jacobian
        shift = damping * normal.diagonal(dim1=1, dim2=2).mean(1) + 1e-30
        # solve_ex: a start gone singular yields a step that is not finite, and is then refused like any bad one
        step = torch.linalg.solve_ex(normal + shift[:, None, None] * eye, jacobian.mT @ f[:, :, None])[0].squeeze(2)
        trial = q - step @ basis.T
        trial_p, trial_f = residual(trial)
        trial_cost = trial_f.square().sum(1)
        better = trial_cost < cost
        keep = better[:, None]
        q, p, f = torch.where(keep, trial, q), torch.where(keep, trial_p, p), torch.where(keep, trial_f, f)
        cost = torch.where(better, trial_cost, cost)
        damping = torch.where(better, damping * 0.2, damping * 5).clamp(1e-12, 1e6)
    return q, cost.sqrt()


def _polish(span: Span, weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Features (N, d) solved once more against the whole gradient, free of what taking others out has left behind."""
    if not len(features):
        return features
    q, _ = solve(span, weight, bias, features @ span.right.T, labels)
    polished = q @ span.right
    near = (polished - features).norm(dim=1) < 3 * SAME * features.norm(dim=1)
    return torch.where(near[:, None], polished, features)


def _certified(
    span: Span, weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor, floor: float, batch_size: int
) -> Signals:
    """The found images judged by the whole gradient, surest first."""
    errors = softmax_error(features, labels, weight, bias)
    residuals = (errors - errors @ span.left @ span.left.T).norm(dim=1)
    # Noise of the floor's size turns row j of R by floor / sigma_j, and the features with it by q_j times that.
    uncertainty = floor * (features @ span.right.T / span.sigma).norm(dim=1) / features.norm(dim=1)
    certificates = batch_size * certificate(span, features, errors)
    # All images of the batch together must give the gradient back; short of that only the strictest are believed.
    rest = span.left * span.sigma @ span.right - errors.T @ features / batch_size
    complete = len(features) == batch_size and torch.linalg.matrix_norm(rest, 2) < UNEXPLAINED * span.sigma[0]
    sure = (certificates - 1).abs() < (CERTIFICATES[-1] if complete else CERTIFICATES[1])
    order = uncertainty.argsort()
    order = order[(sure & (uncertainty < UNSURE))[order]]
    return Signals(
        labels=labels[order],
        features=features[order],
        errors=errors[order],
        residuals=residuals[order],
        certificates=certificates[order],
        uncertainty=uncertainty[order],
        rank=len(span.sigma),
    )


@torch.no_grad()
def _random_features(model: nn.Module, shape: tuple[int, int, int], count: int, generator: torch.Generator) -> Tensor:
    """Features (count, d) of random smooth images: noise on a 4x4 grid, enlarged, around a random colour."""
    channels, height, width = shape
    coarse = 1.5 * torch.randn(count, channels, 4, 4, generator=generator)
    colour = torch.randn(count, channels, 1, 1, generator=generator)
    images = torch.sigmoid(nn.functional.interpolate(coarse, size=(height, width), mode="bilinear") + colour)
    return model.features(images.to(next(model.parameters())))


def _in_range(model: nn.Module, features: Tensor) -> Tensor:
    least, most = model.feature_range
    return ((features > least - RANGE) & (features < most + RANGE)).all(1)


def _same(features: Tensor, labels: Tensor, i: int, j: int) -> bool:
    return bool(labels[i] == labels[j]) and bool((features[i] - features[j]).norm() < SAME * features[j].norm())
