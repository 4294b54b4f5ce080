"""Tokens of known images and positions: each is sought where random images let it be expected.

A slot is a position of an image. Before any token is found, random images say where its token lies: a Gaussian for the
inputs y of the LayerNorm in front, whose outputs x are the tokens. Levenberg-Marquardt minimises the Mahalanobis
distance of y = s (x - beta) / gamma and what of phi(W1 x + b1) lies outside the row space of G2, in units of noise, for
x = Q c in the row space of G1 and for the scale s that the LayerNorm took away. The noise begins at a few percent of
the activations, where the Gaussian decides, and falls to what it is.

A search from a wrong start often ends at the token of another slot, and hardly ever at a vector that is no token but
fits. So the tokens found are kept, whichever start they came from, and dealt to the slots together: no token in two
slots, and the least sum of distances (Hungarian method).

Once most tokens are found, the others are sought beside them: the functional x^T G1^+ delta_t is 1 at token t and 0 at
all others, which leaves a few dimensions. There nearly every random start ends at a token, of whichever slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from attack.read.token_equations import LOOSE, TokenEquations
from attack.read.token_equations import RULE as PLAIN
from attack.read.token_span import TokenSpan
from attack.solve.budget import WorkBudget
from attack.solve.levenberg import DampingRule, levenberg
from network.perceptrons import Perceptron, slope

RULE = DampingRule(1e-3, most=1e4, refused=6.0, accepted=0.2, refusals=None, patience=1, counts_refusals=True,
                   is_scaled=True)  # fmt: skip
NORMALISED = 1e-3  # standard deviation of a token's mean and mean square about 0 and 1
FITTING = 1.6  # mean square of the equations at a token, in units of noise, at most
LOOSELY, NEAR = 2.4, 0.8  # the same where the token is that near to what is expected at its slot
SAME = 0.04  # relative distance of two solutions that are one token
EXPECTED = 1.5  # mean square Mahalanobis distance of a token from its slot, at most
OTHERS = 1.5, 0.1  # factor and margin by which another slot may be nearer
ROOM = 6, 16  # dimensions in which tokens are sought beside those found: more than are missing by that, and at least
BESIDE = 5  # rounds of starts there, at most
ENDED, POLISH = 40, 12  # iterations of such a search, and of the last equations
BLURRED = 0.1  # noise of a token's activations, relative to their size, at which nearly any vector would fit
OFF = 0.4  # |f|^2 beyond which it has ended at no token


@dataclass(frozen=True)
class Expectation:
    """A Gaussian for the centred inputs (D,) of the LayerNorm at each of M slots.

    Attributes:
        mean: (M, D).
        whitening: (M, D, D); of W (y - mean) every entry has variance 1.
    """

    mean: Tensor
    whitening: Tensor

    @classmethod
    def of(cls, mean: Tensor, covariances: Tensor) -> "Expectation":
        """That of covariances (M, D, D) or (D, D)."""
        whitening = torch.linalg.inv(torch.linalg.cholesky(covariances))
        return cls(mean, whitening.expand(len(mean), -1, -1))


class TokenSpace:
    """The tokens Q c that a perceptron's first gradient allows, and what is expected of them.

    Args:
        place: both layers, in float64.
        inner, outer: the spans of their gradients.
    """

    def __init__(self, place: Perceptron, inner: TokenSpan, outer: TokenSpan) -> None:
        self.place, self.inner, self.outer = place, inner, outer
        self.basis = torch.linalg.qr(inner.columns[:, None] * inner.right)[0]  # Q (D, r)
        self.weight = place.inner.weight @ self.basis
        self.rough, self.rough_right = self.weight.float(), outer.right.float()
        like = self.basis[:, 0]
        self.gamma = torch.ones_like(like) if place.norm.weight is None else place.norm.weight
        self.beta = torch.zeros_like(like) if place.norm.bias is None else place.norm.bias
        self.bare, self.offset = self.basis / self.gamma[:, None], self.beta / self.gamma
        self.spare = outer.spare
        self._reach = ((place.inner.weight * inner.columns).square().sum(1) / outer.columns.square())[:, None]

    @property
    def rank(self) -> int:
        """r."""
        return self.basis.shape[1]

    def expect(self, expectation: Expectation) -> None:
        """Compare tokens with this from now on."""
        self.expectation = expectation
        self.allowed = expectation.whitening @ self.bare  # (M, D, r)
        self.shift = expectation.whitening @ self.offset
        self.goal = torch.einsum("mij,mj->mi", expectation.whitening, expectation.mean)

    def coefficients(self, before: Tensor) -> Tensor:
        """c and log s (n, r + 1) of the LayerNorm's centred inputs (n, D)."""
        scale = before.square().mean(1, keepdim=True).sqrt()
        return torch.cat([self.of_origin(before) @ self.basis, scale.log()], 1)

    def of_origin(self, before: Tensor) -> Tensor:
        """The tokens (n, D) that the LayerNorm makes of centred inputs (n, D)."""
        return before / before.square().mean(1, keepdim=True).sqrt() * self.gamma + self.beta

    def tokens(self, c: Tensor) -> Tensor:
        """x (n, D) of c (n, r)."""
        return c @ self.basis.T

    def before(self, c: Tensor, scale: Tensor) -> Tensor:
        """The LayerNorm's centred inputs (n, D) of tokens c (n, r) and scales (n,)."""
        y = scale[:, None] * (c @ self.bare.T - self.offset)
        return y - y.mean(1, keepdim=True)

    def activations(self, z: Tensor) -> Tensor:
        """phi(z)."""
        return self.place.activation(z)

    def noise(self, c: Tensor, z: Tensor, values: Tensor) -> Tensor:
        """Of an entry outside the second space (n,): the space's own noise, and that of the token in the first."""
        passed = (slope(self.place.activation, z).square() @ self._reach)[:, 0] / len(self._reach)
        return torch.hypot(self.outer.error(values), self.inner.error(self.tokens(c)) * passed.sqrt())

    def blur(self, tokens: Tensor) -> Tensor:
        """The noise (n,) of the activations of tokens (n, D) outside the second space, relative to their size."""
        values = self.activations(self.place.inner(tokens))
        return self.outer.error(values) * len(self.outer.columns) ** 0.5 / (values / self.outer.columns).norm(dim=1)

    def fits(self, c: Tensor) -> Tensor:
        """Mean squares (n,) of what of the activations of c (n, r) lies outside the second space, in units of noise."""
        z = c @ self.weight.T + self.place.inner.bias
        values = self.activations(z)
        return (self.outer.outside(values) / self.noise(c, z, values)[:, None]).square().sum(1) / self.spare

    def compared(self, c: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squares (n,) of c (n, r) about what slots (n,) expect, and the scales (n,) that make them least."""
        seen = torch.einsum("ndr,nr->nd", self.allowed[slots], c) - self.shift[slots]
        goal = self.goal[slots]
        scale = ((seen * goal).sum(1) / seen.square().sum(1)).clamp(min=0)
        return (scale[:, None] * seen - goal).square().mean(1), scale


class _Equations:
    """The residual at c and log s (n, r + 1), each for its own slot.

    Args:
        space: of the tokens.
        slots: (n,).
        bluntness: least noise, relative to the activations.
    """

    def __init__(self, space: TokenSpace, slots: Tensor, bluntness: float) -> None:
        self.space, self.slots, self.bluntness = space, slots, bluntness

    def parts(self, x: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        """z, the weighted rest outside the second space, its units, and the expected and LayerNorm's parts."""
        space, outer = self.space, self.space.outer
        c, scale = x[:, :-1], x[:, -1:].exp()
        z = c @ space.weight.T + space.place.inner.bias
        values = space.activations(z)
        size = (values / outer.columns).norm(dim=1) / len(outer.columns) ** 0.5
        unit = torch.maximum(space.noise(c, z, values), self.bluntness * size)[:, None]
        bare = c @ space.bare.T - space.offset
        norm = torch.stack([bare.mean(1), bare.square().mean(1) - 1], 1) / NORMALISED
        seen = scale * (torch.einsum("ndr,nr->nd", space.allowed[slots], c) - space.shift[slots])
        return z, outer.outside(values) / unit, unit, bare, norm, seen, scale

    def cost(self, x: Tensor, which: Tensor) -> Tensor:
        """|f|^2 (n,)."""
        slots = self.slots[which]
        _, rest, _, _, norm, seen, _ = self.parts(x, slots)
        return sum(part.square().sum(1) for part in (rest, norm, seen - self.space.goal[slots]))

    def linearised(self, x: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """|f|^2 (n,), J^T J (n, r + 1, r + 1) and J^T f (n, r + 1); the second space's part is summed in float32."""
        space, slots = self.space, self.slots[which]
        z, rest, unit, bare, norm, seen, scale = self.parts(x, slots)
        off = seen - space.goal[slots]
        slopes = slope(space.place.activation, z) / space.outer.columns / unit
        jacobian = slopes.float()[:, :, None] * space.rough
        inside = space.rough_right.T @ jacobian
        own = torch.cat([scale[:, :, None] * space.allowed[slots], seen[:, :, None]], 2)
        mean = space.bare.mean(0).expand(len(x), -1)
        square = 2 * torch.einsum("nd,dr->nr", bare, space.bare) / bare.shape[1]
        rows = torch.stack([mean, square], 1) / NORMALISED
        normal = own.mT @ own
        gradient = (own.mT @ off[:, :, None])[:, :, 0]
        normal[:, :-1, :-1] += (jacobian.mT @ jacobian - inside.mT @ inside).to(x) + rows.mT @ rows
        gradient[:, :-1] += (jacobian.mT @ rest.float()[:, :, None])[:, :, 0].to(x)
        gradient[:, :-1] += (rows.mT @ norm[:, :, None])[:, :, 0]
        return sum(part.square().sum(1) for part in (rest, norm, off)), normal, gradient

    def fits(self, x: Tensor) -> Tensor:
        """Mean squares (n,) of the rest outside the second space, in units of noise."""
        return self.space.fits(x[:, :-1])


class SlottedTokens:
    """The tokens found so far, and the slots that they are dealt to.

    Attributes:
        values: (n, r) the tokens' c.
        fits: (n,) mean squares of their equations.
        slots: (M,) the token of each slot; -1: none yet.
    """

    def __init__(self, space: TokenSpace, count: int, budget: WorkBudget) -> None:
        self.space, self.budget = space, budget
        self.values, self.fits = space.basis.new_zeros(0, space.rank), space.basis.new_zeros(0)
        self.slots = torch.full((count,), -1, device=space.basis.device)

    @property
    def filled(self) -> Tensor:
        """(M,) whether a slot has a token."""
        return self.slots >= 0

    @property
    def empty(self) -> Tensor:
        """The slots that have none."""
        return (self.slots < 0).nonzero()[:, 0]

    def tokens(self, slots: Tensor) -> Tensor:
        """The tokens (n, D) of filled slots."""
        return self.space.tokens(self.values[self.slots[slots]])

    def before(self, slots: Tensor) -> Tensor:
        """The LayerNorm's centred inputs (n, D) at filled slots, scaled to what is expected there."""
        c = self.values[self.slots[slots]]
        return self.space.before(c, self.space.compared(c, slots)[1])

    def search(self, before: Tensor, slots: Tensor, course: Sequence[tuple[float, int]], *, near: bool = False) -> int:
        """Add the tokens at which searches end, and how many starts that took.

        Args:
            before: (n, D) centred inputs of the LayerNorm to start from.
            slots: (n,) whose expectation each search has.
            course: bluntness and iterations of each of its parts.
            near: whether a looser fit is enough near to what is expected.
        """
        x = self.space.coefficients(before)
        for bluntness, iterations in course:
            self.budget.spend(len(x) * iterations * 2 * len(self.space.weight) * self.space.rank**2)
            equations = _Equations(self.space, slots, bluntness)
            x = levenberg(equations, x, RULE, iterations=iterations, budget=self.budget).x
        fits, c = equations.fits(x), x[:, :-1]
        limits = torch.full_like(fits, FITTING)
        if near:
            limits[self.space.compared(c, slots)[0] <= NEAR] = LOOSELY
        for n in fits.argsort().tolist():
            if fits[n] <= limits[n]:
                self._add(c[n], fits[n])
        return len(x)

    def search_beside(self, generator: torch.Generator) -> None:
        """Add tokens that searches from random starts end at, where no functional of a token that was found sees them.

        Args:
            generator: of the starts (on the CPU).
        """
        space = self.space
        whole = TokenEquations(space.place, space.inner, space.outer)
        last = TokenEquations(space.place, space.inner, space.outer, squares=LOOSE)
        seen = self._functionals(whole, self.values)
        for _ in range(BESIDE):
            width = max(space.rank - len(seen) + ROOM[0], ROOM[1])
            if not len(seen) or width >= space.rank or self.budget.is_spent:
                return
            free = torch.linalg.svd(seen, full_matrices=True)[2][space.rank - width :].T
            beside = TokenEquations(space.place, space.inner, space.outer, free)
            starts = torch.cat([beside.starts(generator) for _ in range(2)])
            self.budget.spend(len(starts) * (ENDED * beside.work + POLISH * whole.work))
            ends = levenberg(beside, starts, PLAIN, iterations=ENDED, budget=self.budget)
            near = ends.x[ends.cost < OFF]
            if not len(near):
                continue
            turned = near @ (beside.basis.T @ space.basis)
            c, count = levenberg(last, turned, PLAIN, iterations=POLISH, budget=self.budget).x, len(self.values)
            fits = space.fits(c)
            for n in fits.argsort().tolist():
                if fits[n] <= FITTING and space.blur(space.tokens(c[n : n + 1]))[0] <= BLURRED:
                    self._add(c[n], fits[n])
            if len(self.values) == count:
                return
            seen = torch.cat([seen, self._functionals(whole, self.values[count:])])

    def _functionals(self, whole: TokenEquations, c: Tensor) -> Tensor:
        """The functionals (n, r) of tokens c (n, r), each of length 1."""
        deltas = [whole.certified(token)[0] for token in self.space.tokens(c)]
        seen = torch.stack([self.space.inner.functional(delta) for delta in deltas]) @ self.space.basis
        return seen / seen.norm(dim=1, keepdim=True)

    def put(self, slots: Tensor, c: Tensor, fits: Tensor) -> None:
        """Fill slots (n,) with tokens c (n, r). Another slot that has one of these loses it: no token is in two slots.

        Tokens that are of no slot any more, and like these, are forgotten.
        """
        apart = torch.cdist(self.values, c) / self.values.norm(dim=1, keepdim=True)
        least = apart.min(1).values
        others = self.filled.nonzero()[:, 0]
        self.slots[others[least[self.slots[others]] < SAME]] = -1
        self.slots[slots] = len(self.values) + torch.arange(len(c), device=slots.device)
        kept = torch.cat([least >= 2 * SAME, torch.ones_like(fits, dtype=torch.bool)])
        kept[self.slots[self.filled]] = True
        self.values, self.fits = torch.cat([self.values, c])[kept], torch.cat([self.fits, fits])[kept]
        number = kept.cumsum(0) - 1
        self.slots[self.filled] = number[self.slots[self.filled]]

    def _add(self, c: Tensor, fit: Tensor) -> None:
        found = self.space.tokens(c[None])
        apart = (self.space.tokens(self.values) - found).norm(dim=1) / found.norm()
        if len(apart) and apart.min() < SAME:
            at = int(apart.argmin())
            if fit < self.fits[at]:
                self.values[at], self.fits[at] = c, fit
        else:
            self.values, self.fits = torch.cat([self.values, c[None]]), torch.cat([self.fits, fit[None]])

    def deal(self, *, anew: bool) -> None:
        """Deal tokens to slots: all of them, or those that have none to slots that have none."""
        if anew:
            self.slots[:] = -1
        used = set(self.slots.tolist())
        free = torch.tensor([n for n in range(len(self.values)) if n not in used], device=self.slots.device)
        empty = self.empty
        if not len(free) or not len(empty):
            return
        every = torch.arange(len(self.slots), device=self.slots.device)
        costs = torch.stack([self.space.compared(c.expand(len(every), -1), every)[0] for c in self.values[free]])
        least = costs.min(1).values
        own = costs[:, empty]
        rows, columns = linear_sum_assignment(own.clamp(max=EXPECTED**2).cpu().numpy())
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            if own[row, column] < min(EXPECTED, float(OTHERS[0] * least[row] + OTHERS[1])):
                self.slots[empty[column]] = free[row]
