"""Single images' inputs of a layer, from the space that their mixtures span.

`span.py` finds the space A of a layer's inputs; every input a_i of the batch is Q^T c_i, Q an orthonormal basis of A.
Three facts tell the a_i from their mixtures, and each of them holds for one image alone:

1. Scale. With the gradient gamma of the layer's bias there is a vector w in R with patch_p(a_i)^T w = 1 for every image
   and position (G w = gamma), so a direction has one scale.
2. The other side. Run forward and backward from a_i with its label, the rest of the network must give errors delta_ip
   that lie in the column space U of G, and G^+ must pair them with their own patches:
   patch_p(a_i)^T G^+ delta_iq = B if p = q, else 0. A mixture of images fails by tens of percent.
3. After a ReLU inputs are non-negative and about half zero: extreme rays of the cone {c: Q^T c >= 0}.

Images are taken out one after the other. Signals after a ReLU are proposed by linear programmes, re-weighted towards
sparse solutions; inputs after a smooth activation by Levenberg-Marquardt on (1) and (2) from starts anywhere, with
dim A unknowns each. Where one image alone drives a unit behind which a ReLU stands, the unit's row holds that image's
input as it is (`lone_rows`): such inputs are judged first, and not polished. Each other proposal is given the label and
the scale that fit best, polished on (1) and (2), and believed if it fits as well as the noise of the update lets a true
image fit. Then delta_i patch(a_i)^T / B is subtracted: what is left has a gradient, a span, and a cone of its own,
smaller by one image, in which the next are easier to find. Labels may repeat, and B may be larger than the number of
classes.

Where the cone has too many other rays (narrow layers, inputs that resemble each other), the layers above help: one
programme over the inputs of several layers has far more zeros per unknown, see `linked_programme`.

The equations of (1) and (2) are in `candidates`, the programmes of (3) in `rays`. A head whose classes are too few for
(2) (K < 2 B, say) leaves the images only all at once; `attack.read.head.by_trial` does that.

Relatives: SPEAR (Dimitrov et al. 2024, arXiv 2403.03945) samples the sparsity of the other side and is exponential in
B; re-weighting follows Candes, Wakin, Boyd 2008; Wedderburn's rank reduction is what makes the subtraction exact.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from attack.read.candidates import WITNESSES, ImageEquations, along_ones, by_position, nobody
from attack.read.lone_rows import lone_rows, paired_rows, refitted
from attack.read.rays import extreme_rays, linked_programme, pinned, single_programme, zeros_of
from attack.read.signals import Signals, Tail
from attack.read.span import Span
from attack.read.whole_pixels import WholePixels
from attack.solve.budget import OutOfTimeError, WorkBudget
from update.loss import CROSS_ENTROPY, Loss

BATCH = 16  # proposals judged and polished at a time
LINKED = 2  # rays of one linked programme: they are costly, right, and mostly the same until it is peeled
FRUITLESS = 6  # rounds in a row without a new image after which the rest is given up
PASSES = 3  # from the start, while images are missing: what one order of peeling leaves over another may find
SPREAD = (0.2, 0.8)  # starts lie this far from the point nearest the origin, relative to it: trained nets want less
HOPEFUL = 0.5  # a ray whose mismatch is larger is not polished: true ones lie below 0.05, random ones near 1
NEAR = 1e-2  # a mismatch below this is polished once more against the whole gradient, and judged
JUDGED = 5e9  # multiplications for which rows are judged, in the order of their lengths, at least FEWEST
FEWEST = 64
REFITTED = 2  # times that images and their deltas are taken from each other
SAME = 1e-2  # relative distance below which two proposals are one image
BLURRED = 5.0  # or below so many times what is expected of their errors
NO_PIXELS = WholePixels()  # of a layer whose inputs do not tell the images


@dataclass(frozen=True)
class Above:
    """A layer above: the span of its gradient, the layer itself, and the network behind it.

    `slope` is s of the activation in front of it, which is z above zero and s z below.
    """

    span: Span
    layer: Callable[[Tensor], Tensor]
    tail: Tail
    slope: float = 0.0


def _linkable(above: Span, span: Span) -> bool:
    return above.determined and above.ones is not None and above.dimension == span.dimension


def unmix(
    span: Span,
    layer: Callable[[Tensor], Tensor],
    tail: Tail,
    *,
    is_sparse: bool,
    generator: torch.Generator,
    budget: WorkBudget,
    above: Sequence[Above] = (),
    loss: Loss = CROSS_ENTROPY,
    given: Signals | None = None,
    enough: Callable[[Signals], bool] = lambda found: False,
    is_gated: bool = False,
    pixels: WholePixels = NO_PIXELS,
) -> Signals:
    """Tell the images of a determined layer apart, as many as possible, surest first.

    Args:
        span: of the layer's gradient, see `span_of`.
        layer: inputs (N, *input_shape) -> outputs (N, *output_shape), in float64.
        tail: the network behind the layer.
        is_sparse: whether inputs are never negative and often exactly zero, as behind a ReLU: such inputs are sought by
            linear programmes.
        generator: what programmes and starts are drawn from (on the CPU).
        budget: images that are not found before its work or its time is spent are omitted.
        above: the layers that follow in a fully connected net, each behind an activation that is z above zero and s z
            below: with them far more images are told apart, see `linked_programme`. From the first on that is not
            determined, they are left out.
        loss: the client's, of each image.
        given: images that are known already, with the deltas that they have in the gradient; None: none. They are taken
            out beforehand, and are not among those found.
        enough: whether the images found so far end the search.
        is_gated: whether the layer's units are often off, as in front of a ReLU, and have no delta then.
        pixels: the images of the layer's inputs.

    Raises:
        ValueError: the layer does not determine its inputs.
    """
    if not span.determined:
        raise ValueError(
            f"the layer does not determine its inputs: rank {span.rank}, dim A {span.dimension}, gap {span.gap:.1f}"
        )
    layers, slopes = [ImageEquations(span, layer, tail, loss)], []
    if span.ones is not None:
        useful = list(itertools.takewhile(lambda each: _linkable(each.span, span), above))
        layers += [ImageEquations(each.span, each.layer, each.tail, loss) for each in useful]
        slopes = [each.slope for each in useful]
    given = nobody(span) if given is None else given
    how = {"slopes": slopes, "given": given, "enough": enough}
    how |= {"is_gated": is_gated, "pixels": pixels}
    search = _Peeling(layers, is_sparse, generator, budget, **how)
    with suppress(OutOfTimeError):  # images that are certain by then stay; the reader says that time ran out
        search.run()
    found = unlike(search.found.surest_first(), given)  # the surest of several, if they are one
    return found.pick(torch.arange(len(found), device=found.labels.device)[: span.batch_size - len(given)])


def first_images(
    span: Span,
    layer: Callable[[Tensor], Tensor],
    tail: Tail,
    *,
    is_sparse: bool,
    generator: torch.Generator,
    budget: WorkBudget,
    loss: Loss = CROSS_ENTROPY,
    enough: int = 1,
) -> Signals:
    """Some images of a determined layer, if any, where the gradient's scale is not known: their certificates tell it.

    None is taken out of the gradient before the next is sought, which would need the scale. `enough` images end the
    search; the other arguments are as in `unmix`.
    """
    whole = ImageEquations(span, layer, tail, loss, paired=False)
    search, found = _Peeling([whole], is_sparse, generator, budget, [span]), nobody(span)
    for attempt in range(FRUITLESS):
        found = found.joined(unlike(search.round(attempt), found))
        if len(found) >= enough or budget.is_spent:
            break
    return found


@dataclass
class _Peeling:
    """One search.

    `rests` is what the images found so far leave of the spans, of this layer and of the layers above, and `slopes` are
    those of the activations between these layers. `given` are the images known beforehand, `found` those of all passes,
    of which some may be `enough`.
    """

    layers: list[ImageEquations]
    is_sparse: bool
    generator: torch.Generator
    budget: WorkBudget
    rests: list[Span] = field(default_factory=list)
    slopes: Sequence[float] = ()
    linked: bool = False
    given: Signals | None = None
    enough: Callable[[Signals], bool] = lambda found: False
    is_gated: bool = False
    pixels: WholePixels = NO_PIXELS

    def __post_init__(self) -> None:
        self.found = self.whole.nobody()
        self.given = self.found if self.given is None else self.given

    @property
    def whole(self) -> ImageEquations:
        return self.layers[0]

    @property
    def is_guided(self) -> bool:
        """Whether programmes propose images, rather than places to start from."""
        return self.is_sparse or bool(self.slopes)

    @property
    def rest(self) -> Span:
        return self.rests[0]

    def run(self) -> None:
        """Find images by passes from the whole span: each takes the images out in another order."""
        for _ in range(PASSES):
            self._peel()
            is_complete = len(self.given) + len(self.found) == self.found.batch_size
            is_over = self.budget.is_spent or self.rows_alone or self.has_few_rays or self.enough(self.found)
            if is_complete or is_over or not len(self.found):
                break
        if self.takes_rows and self.found.complete:
            self._refit()

    @property
    def takes_rows(self) -> bool:
        """Whether a row of the gradient may hold one image's input alone."""
        return self.is_gated and self.whole.along is not None and self.rest.geometry.positions == 1

    @property
    def rows_alone(self) -> bool:
        """Whether rows are all that can propose images.

        A network of gates is linear in pieces. Within a piece delta depends on the input through the logits alone, so
        the equations leave inputs of more dimensions open, and starts anywhere lead nowhere.
        """
        return self.takes_rows and not self.is_guided and self.rest.dimension > self.whole.classes + 1

    @property
    def has_few_rays(self) -> bool:
        """Whether another pass would propose the same again.

        Inputs that are never negative have two extreme rays in two dimensions, and the second is what the first leaves.
        """
        return self.is_sparse and self.whole.span.dimension - len(self.given) <= 2

    def _refit(self) -> None:
        """The images from all rows together, where that makes them surer."""
        together = self.found
        for _ in range(REFITTED):
            c, errors = refitted(self.whole.span, together)
            c = c / (c @ self.whole.along)
            together, is_believed = self.whole.as_they_are(c, together.labels, errors)
        better = is_believed & (errors < self.found.uncertainty)
        self.found = together.pick(better).joined(self.found.pick(~better))

    def _peel(self) -> None:
        """Take images out one after the other, until nothing is left or no proposal is an image."""
        self.rests = self._without(self.given) if len(self.given) else [layer.span for layer in self.layers]
        before, own, fruitless = self.found, self.whole.nobody(), 0
        while self.rest.dimension and fruitless < FRUITLESS and not (self.budget.is_spent or self.enough(self.found)):
            if fruitless and (self.rows_alone or self.rest.dimension == 1):  # one direction: nothing else to propose
                break
            known = self.given.joined(own)
            new = self.whole.nobody() if fruitless else self._by_rows(known)
            if not len(new) and not self.rows_alone:
                new = unlike(self.round(fruitless), known)
            fruitless = 0 if len(new) else fruitless + 1
            self.linked ^= fruitless > 0  # keep to the kind of programme that brings images
            if len(new):
                own = own.joined(new)
                self.found = before.joined(unlike(own, before))
                self.rests = self._without(self.given.joined(own))

    def _without(self, found: Signals) -> list[Span]:
        """What the found images leave of each span: they are run forward to the layers above, and back."""
        rests = [without(self.whole.span, found.values, found.deltas)]
        values = found.values
        for (below, layer), slope in zip(itertools.pairwise(self.layers), self.slopes, strict=True):
            values = nn.functional.leaky_relu(below.layer(values), slope).detach()
            deltas = layer.deltas(values.flatten(1) @ layer.span.basis.T, found.labels)
            rests.append(without(layer.span, values, deltas))
        return rests

    def _by_rows(self, known: Signals) -> Signals:
        """The images that alone drive a unit, once the known ones are taken out; else those of pairs of units."""
        if not self.takes_rows:
            return self.whole.nobody()
        left = (self.rest, self.whole.span, known)
        new = unlike(self._judged_rows(*lone_rows(*left)), known)
        return new if len(new) else unlike(self._judged_rows(*paired_rows(*left, self.pixels)), known)

    def _judged_rows(self, c: Tensor, errors: Tensor) -> Signals:
        """The images among inputs (N, dim A) of the rest that rows propose, with relative errors (N,)."""
        if not len(c):
            return self.whole.nobody()
        equations = self.whole.of(self.rest)
        many = max(FEWEST, int(JUDGED / (equations.classes * self.rest.left.numel())))
        c, errors = c[:many], errors[:many]
        mismatch, labels = equations.mismatch(c).min(1)
        values = c @ self.rest.basis
        best = _distinct(values, labels, errors, mismatch < NEAR)
        if not len(best):
            return self.whole.nobody()
        c, errors = self._rounded(values[best], errors[best])
        found, is_believed = self.whole.as_they_are(c, labels[best], errors)
        return found.pick(is_believed)

    def _rounded(self, values: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of inputs (N, n) with relative errors (N,); of whole pixels, where these lie in A too."""
        span = self.whole.span
        whole, is_whole = self.pixels.rounded(values)
        c = whole @ span.basis.T
        turned = span.turned(c @ self.whole.rows.flatten(1))
        outside = (whole - c @ span.basis).norm(dim=1) / whole.norm(dim=1)
        is_whole = is_whole & (outside < BLURRED * (turned + span.precision))
        return torch.where(is_whole[:, None], c, values @ span.basis.T), torch.where(is_whole, turned, errors)

    def round(self, fruitless: int) -> Signals:
        """The new images among one batch of proposals."""
        c, zeros = self._proposals(fruitless)
        guided = self.is_guided or self.rest.dimension == 1  # proposals are images already, not places to start
        equations = self.whole.of(self.rest)
        c, zeros, labels, mismatch = equations.scaled_and_labelled(c, zeros, self.generator, explore=not guided)
        if guided:
            hopeful = mismatch < HOPEFUL
            c, zeros, labels = c[hopeful], zeros[hopeful], labels[hopeful]
            mismatch = mismatch[hopeful]
        near = HOPEFUL
        if equations.spare >= WITNESSES:
            near, far = NEAR, mismatch > NEAR
            c[far], cost, _ = equations.solve(c[far], zeros[far], labels[far], self.budget)
            mismatch[far] = cost.sqrt()
        values = c @ self.rest.basis
        best = _distinct(values, labels, mismatch, mismatch < near)
        if not len(best):
            return self.whole.nobody()
        c, zeros = values[best] @ self.whole.span.basis.T, zeros[best]
        if self.is_sparse:  # the errors of all that was taken out are in what is left, and not in the whole
            c, zeros = pinned(self.whole.span, self.whole.along, c)
        return self.whole.believed(c, zeros, labels[best], self.budget)

    def _proposals(self, fruitless: int) -> tuple[Tensor, Tensor]:
        """Coordinates (N, dim A) and which entries of the input are held at zero, (N, n)."""
        if self.rest.dimension == 1:
            c = _upright(self.rest)
            if self.is_sparse:
                return c, torch.stack([zeros_of(ray @ self.rest.basis) for ray in c])
        elif self.is_guided:
            linked = self.slopes and (self.linked or not self.is_sparse)
            rests = [layer.of(rest) for layer, rest in zip(self.layers, self.rests, strict=True)] if linked else []
            sparse = {"is_sparse": self.is_sparse}
            programme = linked_programme(rests, self.slopes, **sparse) if linked else single_programme(self.rest)
            count = (LINKED if linked else min(BATCH, max(4, self.rest.dimension))) * (1 + fruitless)
            return extreme_rays(self.rest, programme, count, self.generator, self.budget, **sparse)
        else:
            c = starts(self.rest, BATCH, self.generator)
        return c, torch.zeros(len(c), self.rest.basis.shape[1], dtype=torch.bool, device=c.device)


def unlike(new: Signals, found: Signals) -> Signals:
    """Each of the new images once, without those found before: a polish may lead several candidates to one image.

    Two whose expected errors explain how far they are apart are not told apart.
    """
    known, keep = list(_one_by_one(found)), []
    for i, (value, label, error) in enumerate(_one_by_one(new)):
        alike = (
            (value - other).norm() <= max(SAME, BLURRED * (error + others)) * other.norm()
            for other, its, others in known
            if its == label
        )
        if not any(alike):
            known.append((value, label, error))
            keep.append(i)
    return new.pick(torch.tensor(keep, dtype=torch.long, device=new.labels.device))


def _one_by_one(inputs: Signals) -> Iterator[tuple[Tensor, int, float]]:
    """Value (n,), label and expected relative error of each image."""
    return zip(inputs.values.flatten(1), inputs.labels.tolist(), inputs.uncertainty.tolist(), strict=True)


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
    patches, deltas = span.geometry.patches(values), by_position(deltas) * span.rows
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


def _upright(rest: Span) -> Tensor:
    """The one direction that is left, its sign such that it may be an input, (1 or 2, 1)."""
    one, along = torch.ones(1, 1).to(rest.basis), along_ones(rest)
    return torch.cat([one, -one]) if along is None else one * along.mean().sign()


def starts(rest: Span, count: int, generator: torch.Generator) -> Tensor:
    """Arbitrary coordinates (count, dim A) around the shortest input that has patch_p^T w = 1."""
    noise = torch.randn(count, rest.dimension, generator=generator, dtype=torch.float64).to(rest.basis)
    along = along_ones(rest)
    if along is None:
        return noise
    direction = along.mean(1)
    centre = direction / direction.square().sum()
    spread = torch.linspace(*SPREAD, count, dtype=torch.float64).to(noise)[:, None]
    c = centre + spread * centre.norm() * noise / rest.dimension**0.5
    return c - ((c @ direction - 1) / direction.square().sum())[:, None] * direction
