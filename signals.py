"""Per-image signals: the label and features of every image, from the head's averaged gradient.

With logits z = W h + b and mean cross-entropy, image i leaves its softmax error e_i = softmax(W h_i + b) - onehot(y_i)
and its features h_i in the averaged gradients of the last layer:

    G = (1/B) sum_i e_i h_i^T   (K, d),        gamma = (1/B) sum_i e_i   (K,).

G = U diag(sigma) R has rank B as long as B <= min(K - 1, d), so every h_i is R^T q_i for some q_i (r,). The errors are
functions of the features, which leaves

    (1/B) sum_i e(R^T q_i, y_i) q_i^T = U diag(sigma),        (1/B) sum_i e(R^T q_i, y_i) = gamma:

K (r + 1) equations in B r unknowns, for all images at once. They are solved in five steps:

1. Labels. sum_i softmax(z_i) = B gamma + counts: the mean over random images stands in for the left side, and what it
   may be off by is known from their covariance.
2. Row scaling. Rounding is relative: the row of a class that hardly any image resembles is as exact as the strongest,
   however small. Each row is divided by its length, as far as it stands above additive noise. Images that share a label
   have nearly equal errors; in the raw matrix what tells them apart is 1e-6 as strong as the first singular direction
   and drowns, in the scaled one it is 1e-4.
3. Levenberg-Marquardt with geodesic acceleration, in float64, all images together, from features of random images: the
   path is a bent valley, which acceleration (Transtrum and Sethna 2012, arXiv 1201.5885) follows five times as fast.
4. Judgement. c = 1 / (h^T G^+ e) must come out as 1/B, P e as zero (P projects on the complement of U), and the inverse
   of the normal matrix says what the noise that is left makes of each image.
5. Whoever passes stays, the others start anew.

Relatives: Cocktail Party Attack (Kariyappa et al. 2022, arXiv 2209.05578) unmixes the same gradient by ICA, SPEAR
(Dimitrov et al. 2024, arXiv 2403.03945) by the sparsity of ReLU, iLRG (Ma et al., ICLR 2023) recovers label counts.
"""

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gradients import SharedUpdate
from labels import spelled_out, whole_counts

SAMPLE = 384  # random images that tell how features and softmax vary
SPREAD = 0.7  # starts lie this far from the mean feature, in units of the distance of random images
ITERATIONS = 150  # Levenberg-Marquardt iterations of an attempt, at most
ATTEMPTS = 8  # times that those who did not pass start anew, at most
WORK = 3e13  # and no more than this many multiplications in all, about: some minutes
TRIAL = 6  # iterations that each plausible set of labels is tried for, where there are several
RIVALS = 12  # sets of labels tried, at most
PLAUSIBLE = 4.0  # squared standard deviations up to which another set of labels is as good as the likeliest
FITTING = 2e-5  # a residual below this share of sigma_1 settles the choice of labels
UNKNOWNS = 10_000  # more (100 images, say) would take too much memory: the normal matrix has their square
EXPLAINED = 3.0  # a residual below this multiple of what noise leaves means that the gradient is explained
ARITHMETIC = 4.0  # units of rounding by which the victim's own sums and exponentials err
UNEVEN = 2.0  # noise is less even than the estimate of it takes it to be
RESIDUAL = 5e-5  # largest |P e| of an image believed on its own
CERTIFICATE = 1e-3  # largest |c B - 1| of an image believed on its own
WITNESS = 0.2  # and of one whose batch explains the whole gradient
UNSURE = 0.05  # features whose expected relative error is larger are not used
RANGE = 0.02  # how far beyond the activation's range an accepted feature may lie


@dataclass(frozen=True)
class Signals:
    """What the head's gradient says of N of the batch's B images, surest first; the other B - N were not found.

    Attributes:
        labels: (N,) class indices.
        features: (N, d), what the head saw.
        errors: (N, K) softmax errors.
        residuals: (N,) |P e|, what of an error lies outside the gradient's span; rounding leaves about 1e-7.
        certificates: (N,) c B, which is 1 for a true image.
        uncertainty: (N,) expected relative error of the features, from the noise that the solution leaves.
        rank: numerical rank of the head's gradient: the batch size, as long as that is below K and noise is low.
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

    @property
    def confidence(self) -> Tensor:
        """(N,) probability that the features are within 1 % of the truth, if the noise is Gaussian."""
        return torch.erf(0.01 / (math.sqrt(2) * self.uncertainty.clamp(min=1e-12)))


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


def solve(equations: Equations, q: Tensor, iterations: int, deadline: float = math.inf) -> Tensor:
    """Levenberg-Marquardt with geodesic acceleration from q (B, r).

    It ends after so many iterations, at the deadline (of `time.perf_counter`), when no step lowers the residual, or
    when six in a row lowered it by less than one in a thousand. Damping follows the gain ratio (Nielsen 1999).
    """
    at, damping, slow = equations.at(q), 1e-3, 0
    for _ in range(iterations):
        if time.perf_counter() > deadline:
            break
        gradient, matrix = equations.pull(at, at.f), equations.normal(at)
        diagonal = matrix.diagonal().clone()
        unit = diagonal.mean()
        for _ in range(12):
            matrix.diagonal().copy_(diagonal + damping * unit)
            trial, step = _step(equations, at, gradient, matrix)
            if trial is not None and trial.cost < at.cost:
                break
            damping *= 2
        else:
            break
        expected = float(damping * unit * step.square().sum() - (step * gradient).sum())
        damping *= min(3.0, max(0.2, 1 - (2 * (at.cost - trial.cost) / expected - 1) ** 3))
        damping = max(damping, 1e-15)
        slow = slow + 1 if trial.cost > 0.999 * at.cost else 0
        at = trial
        if slow == 6:
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
    if 2 * acceleration.norm() > 0.75 * step.norm():  # beyond this the path bends too much for a parabola
        return None, step
    return equations.at(at.q + step + acceleration / 2), step


def recover_signals(
    update: SharedUpdate, model: nn.Module, *, generator: torch.Generator, max_seconds: float = math.inf
) -> Signals:
    """Find the images that the head's gradient gives away, in float64, from the update and the model alone.

    An update without the bias's gradient is taken too. A column of equations is then missing, and the labels come from
    G and the mean feature, which is right as far as features resemble each other. What is not found within
    `max_seconds` of wall time, as long as an iteration takes more or less, is not found.

    Raises:
        ValueError: the model's last layer is not linear, its gradient is not in the update, or the batch is larger
            than K - 1 or than memory.
    """
    started = time.perf_counter()
    head = _Head.of(update, model)
    sample = random_features(model, update.image_shape, SAMPLE, generator).to(head.weight)
    mean = sample.mean(0)

    def fresh() -> Tensor:
        images = random_features(model, update.image_shape, update.batch_size, generator).to(mean)
        return (mean + SPREAD * (images - mean)) @ head.span.right.T

    if not len(head.span.sigma):
        return replace(_nothing(head), seconds=time.perf_counter() - started)
    deadline = started + max_seconds
    q, labels = _choose_labels(head, LabelCounts.of(head, sample), fresh(), deadline)
    best, least = None, math.inf
    attempts = min(ATTEMPTS, max(1, round(WORK / (ITERATIONS * q.numel() ** 3))))
    for _ in range(attempts):
        q = solve(head.equations(labels), q, ITERATIONS, deadline)
        signals, passed, cost = _judge(head, labels, q, model.feature_range)
        if best is None or (len(signals), -cost) > (len(best), -least):
            best, least = signals, cost
        if passed.all() or time.perf_counter() > deadline:
            break
        q = torch.where(passed[:, None], q, fresh())
    return replace(best, seconds=time.perf_counter() - started)


@dataclass(frozen=True)
class _Head:
    """The last layer and what the update says of it, in float64."""

    weight: Tensor  # W (K, d)
    bias: Tensor  # b (K,)
    gradient: Tensor  # G (K, d)
    bias_gradient: Tensor | None  # gamma (K,)
    batch_size: int
    rows: Tensor  # D (K,)
    span: Span  # of D G, its rank no higher than B
    rank: int  # numerical rank of D G
    noise: float  # per entry of D G
    arithmetic: float  # |error| of D G from rounding in the victim's computation

    @classmethod
    def of(cls, update: SharedUpdate, model: nn.Module) -> "_Head":
        head = getattr(model, "head", None)
        if not isinstance(head, nn.Linear):
            raise ValueError("the model's last layer is not linear")
        if "head.weight" not in update.gradients:
            raise ValueError("the update holds no gradient of the model's last layer")
        weight, raw = head.weight.detach().double(), update.gradients["head.weight"]
        gradient, bias_gradient = raw.to(weight), update.gradients.get("head.bias")
        most = min(weight.shape) - 1
        if update.batch_size > most:
            raise ValueError(
                f"batch_size is {update.batch_size}: the head's gradient tells at most {most} images apart"
            )
        if update.batch_size**2 > UNKNOWNS:
            raise ValueError(f"batch_size is {update.batch_size}: more than {UNKNOWNS} unknowns")
        eps = precision_of(raw)
        additive = additive_noise(gradient)
        rows = row_weights(gradient, additive, eps)
        scaled = rows[:, None] * gradient
        rank = int((torch.linalg.svdvals(scaled) > noise_floor(scaled, eps)).sum())
        span = Span.of(scaled, min(rank, update.batch_size))
        return cls(
            weight=weight,
            bias=weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach().double(),
            gradient=gradient,
            bias_gradient=None if bias_gradient is None else bias_gradient.to(weight),
            batch_size=update.batch_size,
            rows=rows,
            span=span,
            rank=rank,
            noise=noise_level(scaled, len(span.sigma), eps),
            arithmetic=ARITHMETIC * min(max(eps, 1e-14), torch.finfo(torch.float32).eps) * float(scaled.norm()),
        )

    def equations(self, labels: Tensor) -> Equations:
        return Equations(self.span, self.rows, self.weight, self.bias, self.bias_gradient, labels)


@dataclass(frozen=True)
class LabelCounts:
    """How often each label is in the batch: what to expect (K,), and the inverse covariance (K, K) of its errors."""

    expected: Tensor
    precision: Tensor
    batch_size: int

    @classmethod
    def of(cls, head: _Head, sample: Tensor) -> "LabelCounts":
        """From features (N, d) of random images: counts = sum_i softmax(z_i) - B gamma.

        The batch's softmax differs from that of random images as these differ among each other, once for each image
        and once for all of them, since real images are not random ones. Without gamma, G times the mean feature takes
        its place.
        """
        p = (sample @ head.weight.T + head.bias).softmax(1)
        share, slack, mean = head.bias_gradient, 2e-3, sample.mean(0)
        if share is None:
            share = head.gradient @ mean / mean.square().sum()
            slack = max(slack, float((sample @ mean / mean.square().sum()).var()))
        size = head.batch_size
        covariance = size * (1 + 0.3 * size) * torch.cov(p.T) + slack * torch.eye(len(share)).to(p)
        return cls(size * (p.mean(0) - share), torch.linalg.inv(covariance), size)

    def likeliest(self) -> Tensor:
        """Counts (K,) that sum to B and lie nearest to what is expected: rounded, then mended exchange by exchange."""
        counts = whole_counts(self.expected, self.batch_size)
        while True:
            price, exchange = self.exchanges(counts)[0]
            if price > -1e-9:
                return counts
            counts = exchange

    def exchanges(self, counts: Tensor) -> list[tuple[float, Tensor]]:
        """The nearest counts that differ by one image's label, each with what it adds to the squared distance."""
        slope, diagonal = self.precision @ (counts - self.expected), self.precision.diagonal()
        price = 2 * (slope[:, None] - slope) + diagonal[:, None] + diagonal - 2 * self.precision  # [more, less]
        price[:, counts == 0] = torch.inf
        price.fill_diagonal_(torch.inf)
        cheapest, places = price.flatten().sort()
        unit = torch.eye(len(counts)).to(counts)
        return [
            (float(cheapest[i]), counts + unit[place // len(counts)] - unit[place % len(counts)])
            for i, place in enumerate(places[:RIVALS].tolist())
        ]

    def plausible(self) -> list[Tensor]:
        """The likeliest counts and whatever is nearly as likely, by one or more exchanges, likeliest first."""
        first = self.likeliest()
        reached, queue = {tuple(first.tolist()): 0.0}, [(0.0, first)]
        while queue and len(reached) < 4 * RIVALS:
            distance, counts = queue.pop(0)
            for price, other in self.exchanges(counts):
                key, farther = tuple(other.tolist()), distance + max(0.0, price)  # below 0 by rounding: a tie
                if farther < PLAUSIBLE and key not in reached:
                    reached[key] = farther
                    queue.append((farther, other))
            queue.sort(key=lambda entry: entry[0])
        return [first.new_tensor(key) for key in sorted(reached, key=reached.get)[:RIVALS]]


def _choose_labels(head: _Head, counts: LabelCounts, q: Tensor, deadline: float = math.inf) -> tuple[Tensor, Tensor]:
    """Start (B, r) and labels (B,): of all plausible labels those that fit best after a trial, likeliest first.

    One wrong label keeps the residual a hundred times higher than labels that are right.
    """
    plausible = [spelled_out(rival) for rival in counts.plausible()]
    if len(plausible) == 1:
        return q, plausible[0]
    best, least = None, math.inf
    for labels in plausible:
        equations = head.equations(labels)
        tried = solve(equations, q, TRIAL, deadline)
        cost = equations.at(tried).cost
        if cost < least:
            best, least = (tried, labels), cost
        if cost < (FITTING * head.span.sigma[0]) ** 2:
            break
    return best


def _judge(head: _Head, labels: Tensor, q: Tensor, feature_range: tuple[float, float]) -> tuple[Signals, Tensor, float]:
    """The signals worth believing, surest first; which of the B passed; and the residual's square.

    An image passes on its own by the strict thresholds. If all together leave nothing but noise of the whole gradient,
    that is a stronger witness, and they are used as far as they are certain.
    """
    span, equations = head.span, head.equations(labels)
    at = equations.at(q)
    features = q @ span.right
    share, outside = head.batch_size * span.certificate(features, at.e), span.outside(at.e) / at.e.norm(dim=1)
    freedom = max(1, at.f.numel() - at.q.numel())
    noise = UNEVEN * max(head.noise, math.sqrt(at.cost / freedom))
    uncertainty = noise * _sensitivity(equations, at, features.shape[1]) / features.norm(dim=1)
    least, most = feature_range
    in_range = ((features > least - RANGE) & (features < most + RANGE)).all(1)
    certain = uncertainty < UNSURE
    passed = certain & in_range & ((share - 1).abs() < CERTIFICATE) & (outside < RESIDUAL)
    if equations.unexplained(at) < (EXPLAINED * head.noise) ** 2 * freedom + head.arithmetic**2:
        passed = certain & ((share - 1).abs() < WITNESS)
    order = uncertainty.argsort()
    order = order[passed[order]]
    signals = Signals(
        labels=labels[order],
        features=features[order],
        errors=(at.p - nn.functional.one_hot(labels, len(head.bias)))[order],
        residuals=outside[order],
        certificates=share[order],
        uncertainty=uncertainty[order],
        rank=head.rank,
    )
    return signals, passed, at.cost


def _sensitivity(equations: Equations, at: Point, width: int) -> Tensor:
    """Standard deviation (B,) of the features' lengths of error for unit noise in every entry of D G, to first order.

    Within the span it is the inverse of the normal matrix. Outside, where true features have nothing, the noise of the
    remaining `width` - r columns goes through the pseudo-inverse of the errors.
    """
    batch_size, rank = at.q.shape
    matrix, gram = equations.normal(at), at.e @ at.e.T / batch_size**2
    for m in (matrix, gram):
        m.diagonal().add_(1e-15 * m.diagonal().mean())  # what cannot be told apart is uncertain, not an error
    factor, failed = torch.linalg.cholesky_ex(matrix)
    gram_factor, gram_failed = torch.linalg.cholesky_ex(gram)
    if failed or gram_failed:
        return at.q.new_full((batch_size,), math.inf)
    within = torch.cholesky_inverse(factor).diagonal().view(batch_size, rank).sum(1)
    outside = (width - rank) * torch.cholesky_inverse(gram_factor).diagonal()
    return (within + outside).sqrt()


def _nothing(head: _Head) -> Signals:
    empty = head.weight.new_zeros(0)
    return Signals(
        labels=empty.long(),
        features=empty.view(0, head.weight.shape[1]),
        errors=empty.view(0, len(head.bias)),
        residuals=empty,
        certificates=empty,
        uncertainty=empty,
        rank=head.rank,
    )


def precision_of(gradient: Tensor) -> float:
    """Relative rounding error of the numbers as they are: a float32 tensor may hold values rounded to fewer bits."""
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    fitting = [kind for kind in kinds if torch.equal(gradient, gradient.to(kind).to(gradient))]
    return torch.finfo(fitting[0] if fitting else torch.float64).eps


def additive_noise(gradient: Tensor) -> float:
    """Noise in each entry of the head's gradient (K, d) that does not scale with the entry.

    It shows in the smallest singular value, which would be zero without, since softmax errors sum to zero. Pruning
    shows as zeros among the features that are in use: what was set to zero is smaller than anything that was not.
    """
    used = gradient[:, gradient.any(0)]
    pruned = float(used[used != 0].abs().min()) if (used == 0).any() and used.any() else 0.0
    return max(pruned, float(torch.linalg.svdvals(gradient)[-1]) / _noise_edges(gradient)[0])


def row_weights(gradient: Tensor, additive: float, eps: float) -> Tensor:
    """D (K,), one over the error of each row of the head's gradient (K, d), in units of rounding's: eps |row|."""
    error = torch.hypot(eps * gradient.norm(dim=1), gradient.new_tensor(additive * gradient.shape[1] ** 0.5))
    return torch.where(error > 0, eps / error, 0.0)


def noise_floor(gradient: Tensor, eps: float) -> float:
    """Singular values of the head's gradient (K, d), rows weighted or not, up to this are noise.

    The singular values of a noise matrix lie between sqrt(d) - sqrt(K) and sqrt(d) + sqrt(K) times the noise of one
    entry. The smallest of G is the lower end, see `additive_noise`. Rounding alone adds a few eps times the longest
    row, and the decomposition itself 1e-13.
    """
    narrow, wide = _noise_edges(gradient)
    return float(
        max((4 * eps + 1e-13) * gradient.norm(dim=1).max(), 1.2 * wide / narrow * torch.linalg.svdvals(gradient)[-1])
    )


def _noise_edges(matrix: Tensor) -> tuple[float, float]:
    rows, columns = matrix.shape
    return max(1.0, abs(columns**0.5 - rows**0.5)), columns**0.5 + rows**0.5


def noise_level(gradient: Tensor, rank: int, eps: float) -> float:
    """Standard deviation of the noise in the entries of a matrix (K, d), from the singular values beyond its rank."""
    rows, columns = gradient.shape
    least = torch.finfo(torch.float64).eps * float(gradient.abs().max())
    rest = torch.linalg.svdvals(gradient)[rank:-1]
    if not len(rest):
        return max(least, eps * float(gradient.norm(dim=1).max()) / columns**0.5)
    return max(least, float(rest.square().sum() / ((rows - 1 - rank) * (columns - rank))) ** 0.5)


@torch.no_grad()
def random_features(model: nn.Module, shape: tuple[int, int, int], count: int, generator: torch.Generator) -> Tensor:
    """Features (count, d) of random smooth images: noise on a 4x4 grid, enlarged, around a random colour."""
    channels, height, width = shape
    coarse = 1.5 * torch.randn(count, channels, 4, 4, generator=generator)
    colour = torch.randn(count, channels, 1, 1, generator=generator)
    images = torch.sigmoid(nn.functional.interpolate(coarse, size=(height, width), mode="bilinear") + colour)
    return model.features(images.to(next(model.parameters())))
