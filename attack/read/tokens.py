"""Single tokens of a transformer, from the gradients of two linear layers with a smooth activation between them.

Of r = B N tokens x_t (D,), with r < D, the gradient of W1 is  G1 = sum_t delta_t x_t^T,  so its row space holds every
token, and that of W2 every phi(W1 x_t + b1). A mixture of tokens is in the first space too, and phi of it is not in the
second: an x in the first whose phi is in the second *is* a token. Such x = Q c are found by Levenberg-Marquardt from
random starts, nearly each of which ends at some token; the LayerNorm in front adds that x, without its scale and shift,
has mean 0 and mean square 1. Later starts keep away from the tokens found: the functional x^T G1^+ delta_t is 1 at
token t and 0 at all others.

A token is certified by itself. Its equations hold to within their noise. Its delta at W2's outputs is some U2 v, and
phi' W2^T U2 v is that at W1's and lies in U1: the one v for which it does. Both gradients then say with which weight
the token is in them, and these weights agree. And noise moves it by little: tokens of small delta drown.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attack.match.entries import told_by
from attack.read.from_tokens import TooFewTokensError, images_of_tokens
from attack.read.layer_rows import COLUMNS
from attack.read.reader import OUT_OF_TIME
from attack.read.token_equations import LOOSE, RULE, STARTS, TokenEquations
from attack.read.token_span import TokenSpan
from attack.solve.budget import OutOfTimeError, WorkBudget
from attack.solve.levenberg import LevenbergSolution, levenberg
from network.embedding import patch_embedding
from network.parametrised import with_weights
from network.perceptrons import Perceptron, lowest, perceptrons
from update.shared import SharedUpdate

ROUNDS, POLISH = 60, 12  # iterations from a start, and of the last equations
MISSES = 3  # rounds without a new token, after which starts are drawn from the whole space; after twice as many it ends
NEAR = 0.1  # |f|^2 beyond which a search beside the tokens found has ended at none
SAME = 0.02  # relative distance of two solutions that are one token
FITTING = 3.0  # root mean square of the equations at a token, in units of their noise, at most
AGREEING = 0.1  # by which the two weights of a token may differ, relative to either
SURE = 1e-2  # expected relative error of a token that is believed
TOLD = "tokens told apart"  # in a layer's note
UNPLACED, PLACED = "of no image or position", "each at its position; images are made of them"
ENTRIES = 5e7  # numbers that the expectations of all tokens take, at most
WORK = 4e11  # multiplications of all searches: a minute of a core, about
PLACING = 2e12  # the same of a search with positions and images


@dataclass(frozen=True)
class Tokens:
    """Tokens that were found at a perceptron's first layer and are believed.

    Attributes:
        values: (n, D) float64, in no order: neither image nor position is known.
        fits: (n,) root mean squares of their equations, in units of noise.
        uncertainty: (n,) expected relative errors.
        expected: r, how many there are.
    """

    values: Tensor
    fits: Tensor
    uncertainty: Tensor
    expected: int


class _Peel:
    """The search for the tokens of one perceptron."""

    def __init__(self, equations: TokenEquations, budget: WorkBudget, generator: torch.Generator) -> None:
        self.whole, self.budget, self.generator = equations, budget, generator
        self.last = TokenEquations(equations.place, equations.inner, equations.outer, squares=LOOSE)
        self.rank = equations.basis.shape[1]
        like = equations.basis
        self.found, self.costs = like.new_zeros(0, len(like)), []  # of c as tokens
        self.normals: list[Tensor] = []
        self.away = like.new_zeros(0, self.rank)

    def run(self) -> Tokens:
        """Until all are found, or starts find no more or none to be believed, or no work is left.

        Raises:
            ValueError: a round of starts takes more work than there is.
        """
        missed = rounds = 0
        if self.budget.left < STARTS * ROUNDS * self.whole.work:
            raise ValueError(f"to tell {self.rank} tokens apart takes more work than is left")
        while len(self.found) < self.rank and missed < 2 * MISSES and not self.budget.is_spent:
            solution = self._searched(is_beside=missed < MISSES)
            missed = 0 if solution is not None and self._kept(solution) else missed + 1
            rounds += 1
            if rounds == MISSES and not len(self._believed().values):
                break
        return self._believed()

    def _searched(self, *, is_beside: bool) -> LevenbergSolution | None:
        """Where starts end, beside the tokens found or anywhere; None where that is nowhere near a token."""
        beside = self.whole
        if is_beside and len(self.away):
            free = torch.linalg.svd(self.away, full_matrices=True)[2][len(self.away) :].T
            place, inner, outer = self.whole.place, self.whole.inner, self.whole.outer
            beside = TokenEquations(place, inner, outer, free)
        c = self._solved(beside, beside.starts(self.generator), ROUNDS)
        if beside is not self.whole:
            near = c.x[c.cost < NEAR] @ (beside.basis.T @ self.whole.basis)
            if not len(near):
                return None
            c = self._solved(self.whole, near, ROUNDS)
        return self._solved(self.last, c.x, POLISH)

    def _solved(self, equations: TokenEquations, c: Tensor, iterations: int) -> LevenbergSolution:
        self.budget.spend(len(c) * iterations * equations.work / 2)  # half of the iterations are made, about
        return levenberg(equations, c, RULE, iterations=iterations, budget=self.budget)

    def _kept(self, solution: LevenbergSolution) -> int:
        """Add the solutions that fit and are new; how many they are."""
        tokens = solution.x @ self.whole.basis.T
        fits = self._fits(tokens)
        new = 0
        for n in fits.argsort().tolist():
            if not fits[n] <= FITTING:
                break
            near = (self.found - tokens[n]).norm(dim=1) / tokens[n].norm()
            if len(near) and near.min() <= SAME:
                continue
            delta, _ = self.whole.certified(tokens[n])
            self.found = torch.cat([self.found, tokens[n][None]])
            self.normals.append(solution.normal[n])
            self.away = torch.cat([self.away, (self.whole.inner.functional(delta) @ self.whole.basis)[None]])
            new += 1
        return new

    def _fits(self, tokens: Tensor) -> Tensor:
        """The root mean square (n,) of what of phi lies outside its space, in units of noise."""
        values, outer = self.whole.activations(tokens), self.whole.outer
        spare = len(outer.columns) - len(outer.values)
        return outer.outside(values).norm(dim=1) / outer.error(values) / spare**0.5

    def _believed(self) -> Tokens:
        """The tokens whose certificate holds."""
        tokens, outer, inner = self.found, self.whole.outer, self.whole.inner
        noise = self.whole.unit * outer.error(self.whole.activations(tokens))
        spreads = [torch.linalg.inv(normal).diagonal().clamp(min=0).sum().sqrt() for normal in self.normals]
        within = noise * (torch.stack(spreads) if spreads else noise)
        beyond = inner.error(tokens) * float(inner.columns.norm())
        uncertainty = torch.hypot(within, beyond) / tokens.norm(dim=1)
        agree = tokens.new_tensor([abs(self.whole.certified(token)[1] - 1) for token in tokens])
        sure = (uncertainty <= SURE) & (agree <= AGREEING)
        return Tokens(tokens[sure], self._fits(tokens)[sure], uncertainty[sure], self.rank)


@dataclass(frozen=True)
class TokenReading:
    """What was read at the lowest perceptron of each stage of a model whose tokens leave room.

    Attributes:
        rows: of `layer_rows.COLUMNS`, one a perceptron.
        found: the tokens (n, D) float64 by the name of the first layer.
        likely: (B, C, H, W) images that the tokens make, in the order of their features; None where they make none.
        held: those of them nearly all of whose tokens are explained.
        seconds: wall time of the reading.
        is_aborted: whether the clock has ended it.
    """

    rows: list[dict]
    found: dict[str, Tensor]
    likely: Tensor | None = None
    held: tuple[int, ...] = ()
    seconds: float = 0.0
    is_aborted: bool = False


def read_tokens(
    update: SharedUpdate,
    model: nn.Module,
    budget: WorkBudget,
    generator: torch.Generator,
    features: Tensor | None = None,
    likely: Tensor | None = None,
) -> TokenReading:
    """Single tokens, from the update of one step and the model alone.

    Args:
        update: the client's.
        model: that it was computed on.
        budget: whose clock ends the reading; its work is not asked.
        generator: what starts are drawn from (on the CPU).
        features: (B, d) of all images, where they are known: tokens are then sought with their images and positions.
        likely: (B, C, H, W) images that are likely already: none are then made of tokens.
    """
    began = time.perf_counter()
    gradients = with_weights(update.gradients, model)
    if not told_by(tuple(update.gradients.values()), update).is_whole:  # entries that are gone leave no space as it was
        return TokenReading([], {}, likely)
    places = [each for each in lowest(perceptrons(model, update.image_shape)) if not each.why_not(update.batch_size)]
    places = [each for each in places if {f"{each.first}.weight", f"{each.second}.weight"} <= set(gradients)]
    if not places:
        return TokenReading([], {}, likely)
    exact = copy.deepcopy(model).double().requires_grad_(False)
    reader = _Reader(update, model, exact, gradients, generator, features, likely, budget)
    rows: list[dict] = []
    found: dict[str, Tensor] = {}
    for place in reversed(places):  # the highest have the fewest tokens
        since = time.perf_counter()
        row = _row(place, update.batch_size)
        try:
            values, facts = reader.read(place.within(exact), is_lowest=place is places[0])
            row |= facts
            if len(values):
                found[place.first] = values
        except OutOfTimeError:
            row["note"] = OUT_OF_TIME
        except (ValueError, RuntimeError, ArithmeticError) as error:  # no layer's failure ends a reading
            row["note"] = str(error).partition("\n")[0]
        rows.insert(0, row | {"seconds": time.perf_counter() - since})
    return TokenReading(rows, found, reader.likely, reader.held, time.perf_counter() - began, budget.is_out_of_time)


class _Reader:
    """Reads one perceptron after the other. `likely` are the images that tokens make, once there are any."""

    def __init__(
        self,
        update: SharedUpdate,
        model: nn.Module,
        exact: nn.Module,
        gradients: Mapping[str, Tensor],
        generator: torch.Generator,
        features: Tensor | None,
        likely: Tensor | None,
        budget: WorkBudget,
    ) -> None:
        self.update, self.model, self.exact, self.gradients = update, model, exact, gradients
        self.generator, self.budget = generator, budget
        self.features = features if features is not None and len(features) == update.batch_size else None
        self.work = WorkBudget(WORK, deadline=budget.deadline, tick=budget.tick)
        self.likely, self.held = likely, ()

    def read(self, place: Perceptron, *, is_lowest: bool) -> tuple[Tensor, dict]:
        """The tokens (n, D) of a perceptron, and what layers.csv says of them.

        Raises:
            ValueError: they are not told apart; the message says why.
        """
        if is_lowest and (placed := self._placed(place)) is not None:
            return placed
        told, spans = _told_apart(place, self.gradients, self.update.batch_size, self.work, self.generator)
        note = f"{len(told.values)} of {told.expected} {TOLD}, {UNPLACED}"
        note += ", then no work was left" if self.work.is_spent else ""
        return told.values, _facts(told, spans) | {"note": note}

    def _placed(self, place: Perceptron) -> tuple[Tensor, dict] | None:
        """The same with positions and images, which become `likely`; None where these are not found."""
        count = self.update.batch_size * place.tokens
        if self.features is None or self.likely is not None or count * place.width**2 > ENTRIES:
            return None
        embedding = patch_embedding(self.model, self.update.image_shape)
        if embedding is None:
            return None
        spans = _spans(place, self.gradients, count)
        work = WorkBudget(PLACING, deadline=self.budget.deadline, tick=self.budget.tick)
        known = (spans, embedding, self.update.image_shape, self.features)
        try:
            self.likely, tokens, fits, self.held = images_of_tokens(self.exact, place, *known, work, self.generator)
        except TooFewTokensError:
            return None
        facts = {"rank": count, "gap": spans[0].gap, "residual": float(fits.max().sqrt())}
        held = f"; {len(self.held)} of {self.update.batch_size} are explained by them" if self.held else ""
        return tokens, facts | {"note": f"{len(tokens)} of {count} {TOLD}, {PLACED}{held}"}


def _told_apart(
    place: Perceptron, gradients: Mapping[str, Tensor], batch_size: int, work: WorkBudget, generator: torch.Generator
) -> tuple[Tokens, list[TokenSpan]]:
    """The tokens of one perceptron, and the spans of its gradients."""
    spans = _spans(place, gradients, batch_size * place.tokens)
    return _Peel(TokenEquations(place, *spans), work, generator).run(), spans


def _spans(place: Perceptron, gradients: Mapping[str, Tensor], rank: int) -> list[TokenSpan]:
    return [TokenSpan.of(gradients[f"{name}.weight"], rank) for name in (place.first, place.second)]


def _facts(told: Tokens, spans: Sequence[TokenSpan]) -> dict:
    """What layers.csv says of tokens."""
    facts = {"rank": told.expected, "gap": spans[0].gap}
    if len(told.values):
        facts |= {"residual": float(told.fits.max()), "uncertainty": float(told.uncertainty.max())}
    return facts


def _row(place: Perceptron, batch_size: int) -> dict:
    count = batch_size * place.tokens
    known = {"layer": place.first, "positions": place.tokens, "rank_bound": count, "spanned": True}
    return dict.fromkeys(COLUMNS) | known
