"""How often each label is in the batch, from the head's gradient and what random images look like to the model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attack.read.head.gradient import HeadGradient
from update.loss import Loss

RIVALS = 12  # sets of labels tried, at most: a trial of each costs as much as the whole solution once they are known
PLAUSIBLE = 4.0  # squared standard deviations up to which another set of labels is as good as the likeliest
SLACK = 2e-3  # least variance of a count: what the sample's own covariance, of rank 384 at most, does not know of
EXCHANGES = 4  # for each image, at most: one or two are the rule, and numbers too large to compare would go on for ever
ROUNDED = 1e-9  # a share so close below a whole number is that number: sums of shares are rounded
UNLIKE = 0.3  # share of the variance that all images of a batch have in common: real images are not random ones


@dataclass(frozen=True)
class LabelCounts:
    """How often each label is in the batch: what to expect (K,), and the inverse covariance (K, K) of its errors."""

    expected: Tensor
    precision: Tensor
    batch_size: int

    @classmethod
    def of(cls, head: HeadGradient, sample: Tensor) -> "LabelCounts":
        """From features (N, d) of random images: counts = sum_i softmax(z_i) - B gamma.

        The batch's softmax differs from that of random images as these differ among each other, once for each image
        and once for all of them, since real images are not random ones. Without gamma, G times the mean feature takes
        its place.
        """
        p = (sample @ head.weight.T + head.bias).softmax(1)
        share, slack, mean = head.bias_gradient, SLACK, sample.mean(0)
        if share is None:
            share = head.gradient @ mean / mean.square().sum()
            slack = max(slack, float((sample @ mean / mean.square().sum()).var()))
        size = head.batch_size
        expected, scale = _expected(head.loss, size, p.mean(0), share)
        covariance = size * (1 + UNLIKE * size) * scale[:, None] * torch.cov(p.T) * scale
        return cls(expected, torch.linalg.inv(covariance + slack * torch.eye(len(share)).to(p)), size)

    def likeliest(self) -> Tensor:
        """Counts (K,) that sum to B and lie nearest to what is expected: rounded, then mended exchange by exchange."""
        counts = whole_counts(self.expected, self.batch_size)
        for _ in range(self.batch_size * EXCHANGES):
            price, exchange = self.exchanges(counts)[0]
            if price > -ROUNDED:
                break
            counts = exchange
        return counts

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


def _expected(loss: Loss, size: int, softmax: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Counts n (K,) of B labels, and by how much they differ for a difference of B softmax (K,).

    With a batch's loss divided by D, with class weights w and label smoothing eps,

        D gamma_k = m softmax_k - (1 - eps) w_k n_k - eps B w_k / K,     m = (1 - eps) w^T n + eps B mean(w).

    D is B, or w^T n = m where class weights are counted; then it is what lets n sum to B.
    """
    eps, classes = loss.smoothing, len(share)
    weights = loss.of_classes(share, classes)
    pulled = (1 - eps) * weights
    constant = eps * size * (softmax * weights.mean() - weights / classes) / pulled
    slope = ((1 - eps) * softmax - share) / pulled
    divisor = (size - constant.sum()) / slope.sum() if loss.is_open else softmax.new_tensor(float(size))
    return divisor * slope + constant, divisor / size / weights


def spelled_out(counts: Tensor) -> Tensor:
    """Class indices (B,) in ascending order, class k as often as whole counts (K,) say."""
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts.long())


def whole_counts(expected: Tensor, total: int) -> Tensor:
    """The non-negative whole numbers (K,) nearest to `expected` (K,) among those that sum to `total`.

    The projection on that simplex (Held, Wolfe, Crowder 1974), rounded by largest remainder: no search, so it ends
    whatever the numbers are.

    Raises:
        ValueError: they are not finite.
    """
    if not expected.isfinite().all():
        raise ValueError("label counts are expected to be finite")
    highest = expected - expected.max()  # the shift cancels below, and huge numbers must not
    ordered = highest.sort(descending=True).values
    excess = (ordered.cumsum(0) - total) / torch.arange(1, len(ordered) + 1).to(ordered)
    shift = excess[ordered >= excess][-1]
    share = (highest - shift).clamp(min=0)
    counts = (share + ROUNDED).floor()
    rest = total - int(counts.sum())
    counts[(share - counts).topk(rest).indices] += 1
    return counts
