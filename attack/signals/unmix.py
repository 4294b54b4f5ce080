"""Single images' inputs of a layer, from the space that their mixtures span.

`span.py` finds the space A of a layer's inputs; every input a_i of the batch is Q^T c_i, Q an orthonormal basis of A.
Three facts tell the a_i from their mixtures, and each of them holds for one image alone:

1. Scale. With the gradient gamma of the layer's bias there is a vector w in R with patch_p(a_i)^T w = 1 for every image
   and position (G w = gamma), so a direction has one scale.
2. The other side. Run forward and backward from a_i with its label, the rest of the network must give errors delta_ip
   that lie in the column space U of G, and G^+ must pair them with their own patches:
   patch_p(a_i)^T G^+ delta_iq = B if p = q, else 0. A mixture of images fails by tens of percent.
3. After a ReLU inputs are non-negative and about half zero: extreme rays of the cone {c: Q^T c >= 0}.

Images are taken out one after the other. Inputs after a ReLU are proposed by linear programmes, re-weighted towards
sparse solutions; inputs after a smooth activation by Levenberg-Marquardt on (1) and (2) from starts anywhere, with
dim A unknowns each. Each proposal is given the label and the scale that fit best, polished on (1) and (2), and
believed if it fits as well as the noise of the update lets a true image fit. Then delta_i patch(a_i)^T / B is
subtracted: what is left has a gradient, a span, and a cone of its own, smaller by one image, in which the next are
easier to find. Labels may repeat, and B may be larger than the number of classes.

Where the cone has too many other rays (narrow layers, inputs that resemble each other), the layers above help: one
programme over the inputs of several layers has far more zeros per unknown, see `_linked_programme`.

A head whose classes are too few for (2) (K < 2 B, say) leaves the images only all at once; `joint.py` does that.

Relatives: SPEAR (Dimitrov et al. 2024, arXiv 2403.03945) samples the sparsity of the other side and is exponential in
B; re-weighting follows Candes, Wakin, Boyd 2008; Wedderburn's rank reduction is what makes the subtraction exact.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from attack.signals.span import Span

NON_NEGATIVE = ("relu",)  # activations whose outputs are non-negative and often exactly zero
BATCH = 16  # proposals judged and polished at a time
LINKED = 2  # rays of one linked programme: they are costly, right, and mostly the same until it is peeled
FRUITLESS = 6  # rounds in a row without a new image after which the rest is given up
REWEIGHTS = 5  # programmes per ray: measured, 3 to 5 settle
SOFT = 0.1  # of the mean entry: what an entry must exceed to count as large when a programme is re-weighted
PROGRAMME_ROWS = 40  # inequalities per unknown in a programme; more cost time and pin the ray down no better
FEASIBLE = 1e-9  # the solver's tolerances, below the slack that noise needs: 1e-6 for float32
LONGEST = 10.0  # seconds that a programme may take; usual ones take 0.005 to 0.3
SLACK = 3.0  # standard deviations of noise that an entry may be negative by: with none, true rays are infeasible
SLACKER = (1.0, 4.0, 0.25)  # and multiples of that, in turn
ZERO = 1e-4  # of the largest entry: below this an entry of a programme's solution is zero
UNUSED = 1e-6  # of the largest entry: a basis that is smaller at some place says nothing there, no image does
MARGIN = 2  # zeros beyond those that any extreme ray has, dim A - 1 of them, and without which one is taken for chance
TRIMS = 3  # times that the zeros of a ray are chosen by the noise they show
OUTLIER = 12.0  # times the median of the zeros' noise: beyond it an entry is no zero
SPREAD = (0.2, 0.8)  # starts lie this far from the point nearest the origin, relative to it: trained nets want less
STEPS = 60  # of a polish, at most; from an arbitrary start 20 to 40 are usual
HOPEFUL = 0.5  # a ray whose mismatch is larger is not polished: true ones lie below 0.05, random ones near 1
NEAR = 1e-2  # a mismatch below this is polished once more against the whole gradient, and judged
STALLED = 0.999  # a polish whose cost falls by less than this a step, three times in a row, is over
SCALES = torch.logspace(-2, 4, 37, dtype=torch.float64)  # |a| tried where no bias gradient gives the scale
FINER = 9  # scales tried within a step of SCALES around the best
ARITHMETIC = 30.0  # units of rounding by which the victim's forward and backward passes may err
TOLERANCE = 10.0  # standard deviations of noise that a true image's mismatch may reach
LIMIT = 0.1  # but never a larger one: images of one class come as close as this to being each other's mixtures
WITNESSES = 3  # equations beyond the unknowns without which a polish proves nothing
CHANCE = 1e-5  # that a false candidate fits this well: tolerance to the power of the witnesses
UNSURE = 0.05  # inputs whose expected relative error is larger are not used
SAME = 1e-2  # relative distance below which two proposals are one image


class Tail(Protocol):
    """The network behind a layer, differentiable twice, in float64."""

    def __call__(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Logits (N, K) of the layer's outputs (N, *output_shape) and, for a skip, its inputs (N, *input_shape)."""
        ...


@dataclass(frozen=True)
class Inputs:
    """What a layer's gradient says of N of the batch's B images; the other B - N were not told apart.

    Attributes:
        values: (N, *input_shape), the layer's inputs.
        labels: (N,) class indices.
        deltas: (N, *output_shape), the gradient of each image's own loss by the layer's output.
        residuals: (N,) share of delta that lies outside the gradient's column space, rows weighted.
        shares: (N,) the weight with which delta patch^T is part of B G, 1 for a true image.
        uncertainty: (N,) expected relative error of the values.
        batch_size: B.
        seconds: wall time of the search.
    """

    values: Tensor
    labels: Tensor
    deltas: Tensor
    residuals: Tensor
    shares: Tensor
    uncertainty: Tensor
    batch_size: int
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def complete(self) -> bool:
        """Whether every image of the batch was told apart."""
        return len(self) == self.batch_size

    def pick(self, index: Tensor) -> "Inputs":
        """Some of the images: an index or a mask."""
        names = ("values", "labels", "deltas", "residuals", "shares", "uncertainty")
        return replace(self, **{name: getattr(self, name)[index] for name in names})

    def joined(self, other: "Inputs") -> "Inputs":
        """These and others."""
        names = ("values", "labels", "deltas", "residuals", "shares", "uncertainty")
        return replace(self, **{name: torch.cat([getattr(self, name), getattr(other, name)]) for name in names})


@dataclass(frozen=True)
class Above:
    """A layer above: the span of its gradient, the layer itself, and the network behind it."""

    span: Span
    layer: Callable[[Tensor], Tensor]
    tail: Tail


def _linkable(above: Span, span: Span) -> bool:
    return above.determined and above.ones is not None and above.dimension == span.dimension


def unmix(
    span: Span,
    layer: Callable[[Tensor], Tensor],
    tail: Tail,
    *,
    activation: str,
    generator: torch.Generator,
    deadline: float = math.inf,
    above: Sequence[Above] = (),
) -> Inputs:
    """Tell the images of a determined layer apart, as many as possible, surest first.

    Args:
        span: of the layer's gradient, see `span_of`.
        layer: inputs (N, *input_shape) -> outputs (N, *output_shape), in float64.
        tail: the network behind the layer.
        activation: what the inputs went through last: `relu` calls for linear programmes, anything else does not.
        generator: what programmes and starts are drawn from (on the CPU).
        deadline: of `time.perf_counter`; what is not found by then is not found.
        above: the layers that follow, each taking relu of the outputs of the one before, as in a fully connected net:
            with them far more images are told apart, see `_linked_programme`. From the first on that is not determined,
            they are left out.

    Raises:
        ValueError: the layer does not determine its inputs.
    """
    if not span.determined:
        raise ValueError(
            f"the layer does not determine its inputs: rank {span.rank}, dim A {span.dimension}, gap {span.gap:.1f}"
        )
    started = time.perf_counter()
    stages = [Equations(span, layer, tail)]
    if activation in NON_NEGATIVE and span.ones is not None:
        useful = itertools.takewhile(lambda stage: _linkable(stage.span, span), above)
        stages += [Equations(stage.span, stage.layer, stage.tail) for stage in useful]
    search = _Search(stages, activation in NON_NEGATIVE, generator, deadline)
    found = search.run()
    order = found.uncertainty.argsort()
    return replace(found.pick(order), seconds=time.perf_counter() - started)


@dataclass
class _Search:
    """One search; `rest` is what the images found so far leave of the spans, of this layer and of those above."""

    stages: list["Equations"]
    non_negative: bool
    generator: torch.Generator
    deadline: float
    rests: list[Span] = field(init=False)
    linked: bool = False

    @property
    def whole(self) -> "Equations":
        return self.stages[0]

    @property
    def rest(self) -> Span:
        return self.rests[0]

    def run(self) -> Inputs:
        self.rests = [stage.span for stage in self.stages]
        found, fruitless = nothing(self.rest), 0
        while self.rest.dimension and fruitless < FRUITLESS and time.perf_counter() < self.deadline:
            new = _news(self._round(fruitless), found)
            fruitless = 0 if len(new) else fruitless + 1
            self.linked ^= fruitless > 0  # keep to the kind of programme that brings images
            if len(new):
                found = found.joined(new)
                self.rests = self._without(found)
        return found

    def _without(self, found: Inputs) -> list[Span]:
        """What the found images leave of each span: they are run forward to the layers above, and back."""
        rests = [without(self.whole.span, found.values, found.deltas)]
        values = found.values
        for below, stage in itertools.pairwise(self.stages):
            values = torch.relu(below.layer(values)).detach()
            deltas = stage.deltas(values.flatten(1) @ stage.span.basis.T, found.labels)
            rests.append(without(stage.span, values, deltas))
        return rests

    def _round(self, fruitless: int) -> Inputs:
        """The new images among one batch of proposals."""
        c, zeros = self._proposals(fruitless)
        guided = self.non_negative or self.rest.dimension == 1  # proposals are images already, not places to start
        equations = self.whole.of(self.rest)
        c, zeros, labels, mismatch = equations.scaled_and_labelled(c, zeros, self.generator, explore=not guided)
        if guided:
            hopeful = mismatch < HOPEFUL
            c, zeros, labels = c[hopeful], zeros[hopeful], labels[hopeful]
            mismatch = mismatch[hopeful]
        near = HOPEFUL
        if equations.spare >= WITNESSES:
            near, far = NEAR, mismatch > NEAR
            c[far], cost, _ = equations.solve(c[far], zeros[far], labels[far], self.deadline)
            mismatch[far] = cost.sqrt()
        values = c @ self.rest.basis
        best = _distinct(values, labels, mismatch, mismatch < near)
        if not len(best):
            return nothing(self.whole.span)
        return self.whole.believed(values[best] @ self.whole.span.basis.T, zeros[best], labels[best], self.deadline)

    def _proposals(self, fruitless: int) -> tuple[Tensor, Tensor]:
        """Coordinates (N, dim A) and which entries of the input are held at zero, (N, n)."""
        if self.rest.dimension == 1:
            c = _upright(self.rest)
            if self.non_negative:
                return c, torch.stack([_zeros(ray @ self.rest.basis) for ray in c])
        elif self.non_negative:
            linked = self.linked and len(self.stages) > 1
            rests = [stage.of(rest) for stage, rest in zip(self.stages, self.rests, strict=True)] if linked else []
            programme = _linked_programme(rests) if linked else _single_programme(self.rest)
            count = (LINKED if linked else min(BATCH, max(4, self.rest.dimension))) * (1 + fruitless)
            return extreme_rays(self.rest, programme, count, self.generator, self.deadline)
        else:
            c = starts(self.rest, BATCH, self.generator)
        return c, torch.zeros(len(c), self.rest.basis.shape[1], dtype=torch.bool, device=c.device)


def nothing(span: Span) -> Inputs:
    """No image at all, in the shapes of this layer."""
    empty = span.basis.new_zeros(0)
    return Inputs(
        values=empty.view(0, *span.geometry.input_shape),
        labels=empty.long(),
        deltas=empty.view(0, *span.geometry.output_shape),
        residuals=empty,
        shares=empty,
        uncertainty=empty,
        batch_size=span.batch_size,
    )


def _news(new: Inputs, found: Inputs) -> Inputs:
    """Each of the new images once, without those found before: a polish may lead several candidates to one image."""
    known, keep = list(zip(found.values.flatten(1), found.labels.tolist(), strict=True)), []
    for i, (value, label) in enumerate(zip(new.values.flatten(1), new.labels.tolist(), strict=True)):
        if all((value - other).norm() > SAME * other.norm() for other, its in known if its == label):
            known.append((value, label))
            keep.append(i)
    return new.pick(torch.tensor(keep, dtype=torch.long, device=new.labels.device))


def _distinct(values: Tensor, labels: Tensor, cost: Tensor, eligible: Tensor) -> Tensor:
    """Indices of the eligible candidates (N, n); of those nearly the same with the same label, the best only."""
    keep: list[int] = []
    for i in cost.argsort().tolist():
        same = [j for j in keep if labels[i] == labels[j]]
        if eligible[i] and all((values[i] - values[j]).norm() > SAME * values[j].norm() for j in same):
            keep.append(i)
    return torch.tensor(keep, dtype=torch.long, device=labels.device)


def without(span: Span, values: Tensor, deltas: Tensor) -> Span:
    """The span of what is left of the gradient without images with these inputs and deltas.

    Each takes its own rank along (Wedderburn), so what is left is cut off by count rather than by size.
    """
    patches, deltas = span.geometry.patches(values), _by_position(deltas) * span.rows
    core = torch.diag(span.sigma)
    core = core - torch.einsum("npr,nps->rs", deltas @ span.left, patches @ span.right.T) / span.batch_size
    left, sigma, right = torch.linalg.svd(core)
    live = int((deltas.flatten(0, 1).norm(dim=1) > 0).sum())
    rank = max(0, span.rank - live)
    left, sigma, right = span.left @ left[:, :rank], sigma[:rank], right[:rank] @ span.right
    basis = _consistent_within(span, right, max(0, span.dimension - len(values)))
    return replace(span, left=left, sigma=sigma, right=right, basis=basis)


def _consistent_within(span: Span, right: Tensor, dimension: int) -> Tensor:
    """The inputs in A all of whose patches lie in a smaller row space, (dimension, n)."""
    patches = span.geometry.patches(span.inputs(torch.eye(span.dimension).to(span.basis)))
    outside = (patches - patches @ right.T @ right).flatten(1)
    return torch.linalg.svd(outside, full_matrices=False)[0].T[span.dimension - dimension :] @ span.basis


def _by_position(outputs: Tensor) -> Tensor:
    """(N, c_out, ...) -> (N, P, c_out)."""
    return outputs.flatten(2).transpose(1, 2) if outputs.dim() > 2 else outputs[:, None]


def _along_ones(span: Span) -> Tensor | None:
    """patch_p(basis_j)^T w, (dim A, P): 1 at every position for the coordinates of a true image."""
    if span.ones is None:
        return None
    return span.geometry.patches(span.inputs(torch.eye(span.dimension).to(span.basis))) @ span.ones


def _upright(rest: Span) -> Tensor:
    """The one direction that is left, its sign such that it may be an input, (1 or 2, 1)."""
    one, along = torch.ones(1, 1).to(rest.basis), _along_ones(rest)
    return torch.cat([one, -one]) if along is None else one * along.mean().sign()


def starts(rest: Span, count: int, generator: torch.Generator) -> Tensor:
    """Arbitrary coordinates (count, dim A) around the shortest input that has patch_p^T w = 1."""
    noise = torch.randn(count, rest.dimension, generator=generator, dtype=torch.float64).to(rest.basis)
    along = _along_ones(rest)
    if along is None:
        return noise
    direction = along.mean(1)
    centre = direction / direction.square().sum()
    spread = torch.linspace(*SPREAD, count, dtype=torch.float64).to(noise)[:, None]
    c = centre + spread * centre.norm() * noise / rest.dimension**0.5
    return c - ((c @ direction - 1) / direction.square().sum())[:, None] * direction


@dataclass(frozen=True)
class _Programme:
    """Inputs as a polyhedron: constraints v >= bounds - slack and equalities v = 1; v begins with the coordinates c.

    Constraints are scaled such that their left sides are of the order of 1 for the batch's images.
    """

    constraints: np.ndarray  # (m, unknowns)
    bounds: np.ndarray  # (m,)
    equalities: np.ndarray  # (e, unknowns)
    slack: float

    def part(self, chosen: np.ndarray) -> "_Programme":
        """The same with some of the constraints."""
        return replace(self, constraints=self.constraints[chosen], bounds=self.bounds[chosen])

    def solve(self, objective: np.ndarray, slack: float, deadline: float) -> np.ndarray | None:
        """The v that minimises objective . v, or None where the solver says anything but that it succeeded."""
        solution = linprog(
            objective,
            A_ub=-self.constraints,
            b_ub=slack - self.bounds,
            A_eq=self.equalities,
            b_eq=np.ones(len(self.equalities)),
            bounds=(None, None),
            method="highs-ds",
            options={
                "primal_feasibility_tolerance": FEASIBLE,
                "dual_feasibility_tolerance": FEASIBLE,
                "time_limit": min(LONGEST, max(0.01, deadline - time.perf_counter())),
            },
        )
        return solution.x if solution.status == 0 else None


def _used(basis: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """An input's entries as functions of the coordinates, (n, dim), and the indices of those that any image uses."""
    rows = basis.T.cpu().numpy()
    scale = np.abs(rows).max(1)
    return rows, np.flatnonzero(scale > UNUSED * scale.max())


def _single_programme(rest: Span) -> _Programme:
    """Inputs are non-negative, with a mean of 1."""
    rows, used = _used(rest.basis)
    slack = SLACK * _entry_noise(rest) * len(used) ** 0.5
    return _Programme(rows[used], np.zeros(len(used)), rows[used].mean(0, keepdims=True), slack)


def _linked_programme(stages: list["Equations"]) -> _Programme:
    """Inputs of several layers, each relu of the outputs of the one below, as one programme.

    For z = W a + b, both relu(z) and relu(z) - z are non-negative, and of each pair one is zero. Both are linear in the
    coordinates of the two layers' inputs. Every layer adds B unknowns and as many zeros as it has units, twice as
    many as its inputs have by themselves.
    """
    size, blocks, bounds, equalities, slack = stages[0].span.dimension, [], [], [], 0.0
    for k, stage in enumerate(stages):
        along = stage.along.mean(1).cpu().numpy()
        centre = along / (along @ along)  # the shortest coordinates of the right scale
        rows, used = _used(stage.span.basis)
        unit = np.abs(rows[used] @ centre).mean()
        slack = max(slack, SLACK * _entry_noise(stage.span) * np.linalg.norm(centre) / unit)
        place = np.zeros((1, len(stages)))
        place[0, k] = 1
        blocks.append(np.kron(place, rows[used] / unit))
        bounds.append(np.zeros(len(used)))
        equalities.append(np.kron(place, along[None]))
        if k:
            below = stages[k - 1]
            link = np.kron(place, rows)
            link[:, (k - 1) * size : k * size] -= below.outputs.T.cpu().numpy()
            blocks.append(link / unit)
            bounds.append(below.offset.detach().cpu().numpy() / unit)
    return _Programme(np.concatenate(blocks), np.concatenate(bounds), np.concatenate(equalities), slack)


def extreme_rays(
    rest: Span, programme: _Programme, count: int, generator: torch.Generator, deadline: float
) -> tuple[Tensor, Tensor]:
    """Up to `count` different sparse non-negative inputs: coordinates (N, dim A), and where they are zero (N, n)."""
    rows, used = _used(rest.basis)
    unknowns, found = programme.constraints.shape[1], []
    for attempt in range(count):
        if time.perf_counter() > deadline:
            break
        chosen = torch.randperm(len(programme.bounds), generator=generator)[: PROGRAMME_ROWS * unknowns].numpy()
        slack = programme.slack * SLACKER[attempt % len(SLACKER)]
        solution = _sparse_solution(programme.part(chosen), slack, generator, deadline)
        if solution is None:
            continue
        ray, silent = _pinned(rows[used], solution[: rest.dimension])
        if unknowns == rest.dimension and silent.sum() < rest.dimension + MARGIN:
            continue
        zeros = np.zeros(len(rows), dtype=bool)
        zeros[used[silent]] = True
        if all(ray @ other < 1 - 1e-6 for other, _ in found):
            found.append((ray, zeros))
    rays = np.array([ray for ray, _ in found]).reshape(-1, rest.dimension)
    zeros = np.array([zeros for _, zeros in found], dtype=bool).reshape(-1, len(rows))
    return torch.from_numpy(rays).to(rest.basis), torch.from_numpy(zeros).to(rest.basis.device)


def _entry_noise(span: Span) -> float:
    """Standard deviation of the noise in an entry of the basis, in its worst direction."""
    rows = span.geometry.patches(span.inputs(torch.eye(span.dimension).to(span.basis))) @ span.right.T
    weak = (rows / span.sigma).flatten(1)
    return span.noise * float(torch.linalg.matrix_norm(weak, 2)) / span.geometry.positions**0.5


def _sparse_solution(
    programme: _Programme, slack: float, generator: torch.Generator, deadline: float
) -> np.ndarray | None:
    """A solution with many constraints at their bounds, or None if no programme has any."""
    three = torch.randint(len(programme.bounds), (3,), generator=generator).numpy()
    objective, best = -programme.constraints[three].mean(0), None
    for _ in range(REWEIGHTS):
        solution = programme.solve(objective, slack, deadline)
        if solution is None:
            break
        done = best is not None and np.allclose(solution, best, rtol=0, atol=1e-7 * np.abs(solution).max())
        best = solution
        if done:
            break
        excess = (programme.constraints @ best - programme.bounds).clip(min=0)
        objective = (1 / (excess + SOFT * excess.mean())) @ programme.constraints
    return best


def _pinned(rows: np.ndarray, ray: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The direction of unit length that is smallest where the ray is zero, and where that is, (n,).

    A programme's solution is exact in dim A entries and carries their noise; this one averages over all zeros. What is
    small and yet too large for the noise of the others is no zero and left out.
    """
    direction = ray / np.linalg.norm(ray)
    entries = rows @ direction
    zeros = entries < ZERO * entries.max()
    for _ in range(TRIMS):
        if zeros.sum() < len(ray) - 1:
            break
        least = np.linalg.eigh(rows[zeros].T @ rows[zeros])[1][:, 0]
        least *= np.sign(least @ direction)
        if least @ direction < 1 - SAME:
            break
        direction, entries = least, rows @ least
        zeros = np.abs(entries) < max(OUTLIER * np.median(np.abs(entries[zeros])), 1e-12 * entries.max())
    return direction, zeros


def _zeros(value: Tensor) -> Tensor:
    """Which entries (n,) of one input are zero but for noise, if a good part of them is."""
    noise = -value.min().clamp(max=0)  # nothing else makes an entry negative
    return value.abs() <= 3 * noise


class Equations:
    """What a span asks of a single image, in coordinates of A: scale, column space, and pairing.

    Args:
        span: of the gradient, or of what is left of it.
        layer: inputs -> outputs.
        tail: the network behind the layer.
    """

    def __init__(self, span: Span, layer: Callable[[Tensor], Tensor], tail: Tail) -> None:
        self.span, self.layer, self.tail, geometry = span, layer, tail, span.geometry
        units = span.inputs(torch.eye(span.dimension).to(span.basis))
        zero = layer(torch.zeros_like(units[:1])).detach()
        self.offset = zero[0]  # (*output_shape), the layer's bias
        self.outputs = (layer(units) - zero).detach().flatten(1)  # of each basis vector, (dim A, c_out P)
        self.rows = geometry.patches(units) @ span.right.T  # its patches in R, (dim A, P, r)
        self.along = _along_ones(span)  # (dim A, P)

    def of(self, span: Span) -> "Equations":
        """The same for another span of the same layer."""
        return self if span is self.span else Equations(span, self.layer, self.tail)

    def _outputs(self, c: Tensor) -> Tensor:
        return (c @ self.outputs).view(-1, *self.offset.shape) + self.offset

    def deltas(self, c: Tensor, labels: Tensor) -> Tensor:
        """Gradient of each candidate's loss by the layer's output, (N, *output_shape)."""
        values = self.span.inputs(c)

        def loss(outputs: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.tail(values, outputs), labels, reduction="sum")

        return grad(loss)(self._outputs(c))

    def all_deltas(self, c: Tensor) -> Tensor:
        """The same for every label, (N, K, *output_shape)."""
        outputs = self._outputs(c).detach().requires_grad_()
        with torch.enable_grad():
            logits = self.tail(self.span.inputs(c), outputs)
            mean = torch.autograd.grad(logits.logsumexp(1).sum(), outputs, retain_graph=True)[0]
            each = [torch.autograd.grad(logit.sum(), outputs, retain_graph=True)[0] for logit in logits.T]
        return (mean[:, None] - torch.stack(each, 1)).detach()

    def residual(self, c: Tensor, zeros: Tensor, deltas: Tensor) -> Tensor:
        """What does not fit, (N, P c_out + 1 [+ n] [+ P]).

        It is delta outside U, 1 - 1/share, the input where it should be zero, and patches^T w - 1.
        """
        d = _by_position(deltas) * self.span.rows
        u = d @ self.span.left
        length = d.flatten(1).norm(dim=1).clamp(min=1e-200)
        outside = (d - u @ self.span.left.T).flatten(1) / length[:, None]
        parts = [outside, (1 - 1 / self._share(c, u, d))[:, None]]
        if zeros.any():
            parts.append((c @ self.span.basis) * zeros / c.norm(dim=1, keepdim=True))
        if self.along is not None:
            parts.append((c @ self.along - 1) / self.along.shape[1] ** 0.5)
        return torch.cat(parts, 1)

    def _share(self, c: Tensor, u: Tensor, d: Tensor) -> Tensor:
        live = (d.detach().abs().amax(2) > 0).sum(1).clamp(min=1)  # a position without errors leaves no trace
        x = (c @ self.rows.flatten(1)).view(len(c), *self.rows.shape[1:])
        return (x * (u / self.span.sigma)).sum((1, 2)) / (self.span.batch_size * live)

    def scaled_and_labelled(
        self, c: Tensor, zeros: Tensor, generator: torch.Generator, *, explore: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Candidates with scale, zeros, labels (N,), and mismatch (N,): the best label, or one drawn near the best."""
        if self.along is not None:
            along = (c @ self.along).mean(1)
            c, zeros = c[along > 0] / along[along > 0, None], zeros[along > 0]
            mismatch = self.mismatch(c)
        else:
            c, mismatch = self._best_scales(c)
        if explore and len(c):
            chance = mismatch.clamp(min=1e-6) ** -4
            labels = torch.multinomial(chance.cpu(), 1, generator=generator)[:, 0].to(c.device)
        else:
            labels = mismatch.argmin(1)
        return c, zeros, labels, mismatch.gather(1, labels[:, None])[:, 0]

    def mismatch(self, c: Tensor) -> Tensor:
        """Length of the residual for each label, (N, K)."""
        every = self.all_deltas(c)
        count, classes = every.shape[:2]
        free = torch.zeros(1, 1, dtype=torch.bool, device=c.device)
        repeated = c.repeat_interleave(classes, 0)
        return self.residual(repeated, free, every.flatten(0, 1)).norm(dim=1).view(count, classes)

    def _best_scales(self, c: Tensor) -> tuple[Tensor, Tensor]:
        unit = c / c.norm(dim=1, keepdim=True)
        tried = torch.stack([self.mismatch(scale * unit) for scale in SCALES.tolist()])  # (scales, N, K)
        coarse = SCALES.to(c)[tried.amin(2).argmin(0), None]
        finer = torch.logspace(-0.5, 0.5, FINER, base=float(SCALES[1] / SCALES[0])).to(c)
        tried = torch.stack([self.mismatch(factor * coarse * unit) for factor in finer])
        best = tried.amin(2).argmin(0)
        return finer[best, None] * coarse * unit, tried[best, torch.arange(len(c), device=c.device)]

    def believed(self, c: Tensor, zeros: Tensor, labels: Tensor, deadline: float) -> Inputs:
        """Those candidates (N, dim A) that are, or a polish makes, indistinguishable from a true image."""
        cost = self._at(c, zeros, labels).square().sum(1)
        found, passed = self._judged(c, cost, self._pinned_down(c, zeros), labels, self.spare + self.span.dimension)
        rest = (~passed).nonzero()[:, 0]
        found = found.pick(passed)
        if len(rest) and self.spare >= WITNESSES:
            c, cost, normal = self.solve(c[rest], zeros[rest], labels[rest], deadline)
            polished, passed = self._judged(c, cost, normal, labels[rest], self.spare)
            found = found.joined(polished.pick(passed))
        return found

    @property
    def spare(self) -> int:
        """Equations of the tail and of the scale beyond the dim A unknowns: witnesses that a polish cannot bribe."""
        span = self.span
        outside = span.geometry.positions * (len(span.left) - span.rank) - 1  # softmax errors sum to zero
        return outside + 1 + (0 if self.along is None else self.along.shape[1]) - span.dimension

    def _pinned_down(self, c: Tensor, zeros: Tensor) -> Tensor:
        """J^T J (N, dim, dim) of the linear equations alone, zeros and scale."""
        held = zeros[:, :, None] * self.span.basis.T / c.norm(dim=1)[:, None, None]  # (N, n, dim)
        normal = held.transpose(1, 2) @ held
        return normal if self.along is None else normal + self.along @ self.along.T / self.along.shape[1]

    def _judged(self, c: Tensor, cost: Tensor, normal: Tensor, labels: Tensor, witnesses: int) -> tuple[Inputs, Tensor]:
        """All candidates as inputs, and which of them to believe, where so many equations bear witness."""
        deltas = self.deltas(c, labels)
        tolerance, uncertainty, residuals, shares = self._noise(c, deltas, cost, normal)
        every = Inputs(self.span.inputs(c), labels, deltas, residuals, shares, uncertainty, self.span.batch_size)
        by_chance = tolerance ** min(max(witnesses, 0), 100)
        return every, (cost.sqrt() < tolerance) & (uncertainty < UNSURE) & (by_chance < CHANCE)

    def _noise(self, c: Tensor, deltas: Tensor, cost: Tensor, normal: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mismatch up to which an image is believed, its expected relative error, |delta outside U|, and the share.

        Noise N in the entries of the weighted gradient turns U y by N R^T S^-1 y and R^T x by N^T U S^-1 x: an image's
        weak directions suffer most.
        """
        span = self.span
        d = _by_position(deltas) * span.rows
        u, x = d @ span.left, c @ self.rows.flatten(1)
        length = d.flatten(1).norm(dim=1).clamp(min=1e-200)
        y_weak = (u / span.sigma).flatten(1).norm(dim=1)
        x_weak = (x.view(len(c), -1, span.rank) / span.sigma).flatten(1).norm(dim=1)
        turned_out = span.noise * len(span.left) ** 0.5 * y_weak / length
        turned_in = span.noise * span.right.shape[1] ** 0.5 * x_weak / x.norm(dim=1)
        expected = turned_out + turned_in + span.noise * x_weak * y_weak / span.batch_size
        freedom = max(1, self.spare)
        level = torch.maximum(cost, (expected + span.precision).square()) / freedom
        uncertainty = turned_in + (_trace_of_inverse(normal) * level).sqrt() / c.norm(dim=1)
        outside = (d - u @ span.left.T).flatten(1).norm(dim=1) / length
        tolerance = (TOLERANCE * expected + ARITHMETIC * span.precision).clamp(max=LIMIT)
        return tolerance, uncertainty, outside, self._share(c, u, d)

    def solve(self, c: Tensor, zeros: Tensor, labels: Tensor, deadline: float) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates (N, dim A), |residual|^2 (N,) and J^T J (N, dim, dim); each candidate has its own damping."""
        if not len(c):
            return c, c.new_zeros(0), c.new_zeros(0, c.shape[1], c.shape[1])
        damping = c.new_full((len(c),), 1e-2)
        f, j = self._linearised(c, zeros, labels)
        cost, normal, pull = _normal_equations(f, j)
        stalled = torch.zeros_like(labels)
        for _ in range(STEPS):
            going = ((stalled < 3) & (cost > (0.1 * self.span.precision) ** 2)).nonzero()[:, 0]
            if not len(going) or time.perf_counter() > deadline:
                break
            step = _damped_step(normal[going], pull[going], damping[going])
            trial = c[going] + step
            f = self._at(trial, zeros[going], labels[going])
            better = f.square().sum(1) < cost[going]
            worse, going, trial = going[~better], going[better], trial[better]
            damping[worse] *= 4
            stalled[worse] += (damping[worse] > 1e8).long() * 3
            if not len(going):
                continue
            f, j = self._linearised(trial, zeros[going], labels[going])
            c[going] = trial
            before = cost[going]
            cost[going], normal[going], pull[going] = _normal_equations(f, j)
            damping[going] = (damping[going] * 0.3).clamp(min=1e-14)
            stalled[going] = torch.where(cost[going] > STALLED * before, stalled[going] + 1, 0)
        return c, cost, normal

    def _at(self, c: Tensor, zeros: Tensor, labels: Tensor) -> Tensor:
        return self.residual(c, zeros, self.deltas(c, labels))

    def _linearised(self, c: Tensor, zeros: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Residual (N, m) and its Jacobian (N, m, dim A): one tangent moves the same coordinate of all candidates."""
        directions = torch.eye(c.shape[1]).to(c)[:, None].expand(-1, len(c), -1)
        push = vmap(lambda v: jvp(lambda at: self._at(at, zeros, labels), (c,), (v,))[1], out_dims=2, chunk_size=16)
        return self._at(c, zeros, labels), push(directions)


def _normal_equations(f: Tensor, j: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """|f|^2 (N,), J^T J (N, d, d), J^T f (N, d)."""
    return f.square().sum(1), j.transpose(1, 2) @ j, (f[:, None] @ j)[:, 0]


def _damped_step(normal: Tensor, pull: Tensor, damping: Tensor) -> Tensor:
    """-(J^T J + damping mean diag)^-1 J^T f, (N, d); no step where that is singular."""
    diagonal = normal.diagonal(dim1=1, dim2=2).mean(1)
    eye = torch.eye(normal.shape[1]).to(normal)
    factor, failed = torch.linalg.cholesky_ex(normal + (damping * diagonal)[:, None, None] * eye)
    step = -torch.cholesky_solve(pull[..., None], factor)[..., 0]
    return torch.where((failed == 0)[:, None], step, 0.0).nan_to_num(0.0)


def _trace_of_inverse(normal: Tensor) -> Tensor:
    """tr (J^T J)^-1, (N,); inf where it is singular."""
    inverse, failed = torch.linalg.inv_ex(normal)
    trace = inverse.diagonal(dim1=1, dim2=2).sum(1)
    return torch.where((failed == 0) & trace.isfinite() & (trace > 0), trace, math.inf)
