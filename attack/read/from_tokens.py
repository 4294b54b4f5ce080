"""Likely images of a transformer, from the gradients of the two linear layers behind its first attention.

The images' features are known from the head. Random images say how the tokens at each position depend on the features
and vary beside them, so each token is sought at its own slot, a position of one of the images (`token_slots.py`). From
the tokens found come patches, and from these a picture of each image (`token_images.py`), which says what attention
adds. Random patches in the unknown places of that picture then say far more narrowly where the missing tokens lie. So
pictures and tokens complete each other, round by round; a position whose tokens were dealt to the wrong images is
exchanged where that explains all tokens better.

A picture that is nearly right needs no tokens that were found: all of its pixels follow from this alone, that each
token lies in both spaces, since attention shows every patch to every token. It is believed where nearly all its tokens
then do lie there, to within noise; and its tokens are those of the image.

The images are likely, and never certain: patches of missing tokens are made of their neighbours. An attack begins
there, and leaves those images alone nearly all of whose tokens are explained.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attack.read.random_images import textured_images
from attack.read.token_images import TokenImages
from attack.read.token_slots import Expectation, SlottedTokens, TokenSpace
from attack.read.token_span import TokenSpan
from attack.solve.budget import WorkBudget
from network.embedding import PatchEmbedding
from network.head import features_of
from network.perceptrons import Perceptron

SAMPLE = 400  # random images
RIDGE = 1e-3  # of the regression on features, relative to their mean variance
WIDER = 1.3, 1.2  # factor of covariances, before and after pictures are known
SPREAD = 0.017, 0.05  # least standard deviation of a token's entry, relative to its size, before and after
PATCHED = 1e-4  # ridge of the regression of patches on tokens, relative to the mean variance
ALIKE = 20  # principal components by which random images are compared with tokens that were found
FEATURES = 0.2  # weight of the features in that comparison
WIDELY = 4  # rounds before pictures are known
WIDE = ((0.05, 6), (0.015, 4), (0.005, 4), (0.0, 8))  # bluntness and iterations of a search then
NARROW = ((0.1, 5), (0.04, 5), (0.015, 4), (0.005, 4), (0.0, 8))  # and later
CLEAR = 0.03  # noise of a random image's activations, relative to their size, up to which tokens are sought
ENOUGH = 0.4  # share of the slots with tokens from which pictures are made
TURNS = 6  # rounds with pictures, at most
IDLE = 2  # rounds without a new token, after which no more are made
REPLACED = 0.05  # share of known patches that are replaced by random ones
OWN = 0.6  # weight of a slot's own covariance, the rest is that of all slots of the image
STARTS = 6  # of a slot: the random patches that fit best
FILLED = 0.01, 0.003, 0.001  # bluntness of the equations of known tokens, in turn
WHOLE = 0.01, 0.003, 0.001, 0.0  # and of all tokens in the end
CLOSE = 0.6  # share of an image's slots with tokens from which pixels are sought by both spaces alone
COURSE = (0.03, 0.0), (0.03, 0.6), (0.01, 0.7), (0.003, 0.75)  # bluntness in turn, and share that is explained before
LAST = 0.001, 0.0  # and of those of a picture that is believed, in the end
EXPLAINED = 2.0  # mean square of a token's equations, at the last bluntness of the course, at most
BELIEVED = 0.8  # share of an image's tokens that are explained, from which it is believed
OFF = 5.0, 0.1  # times the median, and relative distance, beyond which a picture contradicts a token
UNIT = 0.01  # distance of tokens, relative, that counts in an exchange
GAIN = 5.0  # by which an exchange has to lower the sum over tokens of log(1 + (distance / UNIT)^2)
EXCHANGES = 12  # tried one after the other in a round


class TooFewTokensError(ValueError):
    """Tokens are too few, or in an order that is not known, so that no images are made of them."""


class _Search:
    """Tokens and pictures of B images. See `images_of_tokens` for the arguments."""

    def __init__(
        self,
        space: TokenSpace,
        pictures: TokenImages,
        features: Tensor,
        generator: torch.Generator,
        budget: WorkBudget,
    ) -> None:
        self.space, self.pictures, self.budget, self.generator = space, pictures, budget, generator
        self.count, self.features = len(features), features
        sample = textured_images(pictures.shape, SAMPLE, generator).to(features)
        self.sample = pictures.patches(sample)
        self.before, self.sampled_tokens = pictures.seen(sample)
        self.rows = pictures.embedding.rows.to(features.device)  # the token of each patch
        with torch.no_grad():
            parts = [features_of(pictures.rough, each) for each in sample.float().split(len(self.rows))]
        self.sampled_features = torch.cat(parts).to(features)
        self.size = float(self.before.square().mean().sqrt())
        self.tokens = SlottedTokens(space, self.count * space.place.tokens, budget)
        self.known = torch.zeros(self.count, len(self.rows), dtype=torch.bool, device=features.device)
        self.explained = torch.zeros(self.count, space.place.tokens, dtype=torch.bool, device=features.device)

    def blur(self) -> float:
        """The noise of activations in the second space, relative to their size: the median over random images."""
        return float(self.space.blur(self.sampled_tokens[:, self.rows].flatten(0, 1)).median())

    # ------------------------------------------------------------------------------------------------
    # Before pictures are known

    def widely(self) -> None:
        """Seek tokens where the features let them be expected."""
        mean, centre = self.before.mean(0), self.sampled_features.mean(0)
        off, beside = self.before - mean, self.sampled_features - centre
        rule = torch.linalg.solve(_ridged(beside.T @ beside / SAMPLE, RIDGE), beside.T @ off.mean(1) / SAMPLE)
        rest = (off - (beside @ rule)[:, None]).flatten(0, 1)
        covariance = WIDER[0] * rest.T @ rest / len(rest) + self._floor(0)
        expected = (mean + ((self.features - centre) @ rule)[:, None]).flatten(0, 1)
        self.space.expect(Expectation.of(expected, covariance))
        values, axes = torch.linalg.eigh(rest.T @ rest / len(rest))
        self.axes = axes[:, -ALIKE:] / values[-ALIKE:].sqrt()
        for turn in range(WIDELY):
            slots = self.tokens.empty
            if not len(slots) or self.budget.is_spent:
                return
            starts = expected[slots] if turn == 0 else torch.cat([self._alike(2 * turn + k - 2) for k in range(2)])
            self.tokens.search(starts, slots.repeat(len(starts) // len(slots)), WIDE)
            self.tokens.deal(anew=True)

    def _alike(self, rank: int) -> Tensor:
        """The tokens' origins (n, D) at empty slots, of the random image that is that much like each slot's image."""
        order, slots = self._order(), self.tokens.empty
        return torch.stack([self.before[order[at // self.width][rank], at % self.width] for at in slots.tolist()])

    def _order(self) -> list[Tensor]:
        """Indices of random images, those first that are most like each image in features and tokens."""
        spread = self.sampled_features.std(0).mean()
        orders = []
        for image, feature in enumerate(self.features):
            apart = ((self.sampled_features - feature) / spread).square().mean(1)
            slots = self._filled(image)
            if len(slots):
                off = self.before[:, slots % self.width] - self.tokens.before(slots)
                apart = FEATURES * apart + (off @ self.axes).square().mean((1, 2))
            orders.append(apart.argsort())
        return orders

    @property
    def width(self) -> int:
        """Tokens of an image."""
        return self.space.place.tokens

    def _filled(self, image: int) -> Tensor:
        own = self.tokens.filled.view(self.count, -1)[image].nonzero()[:, 0]
        return image * self.width + own

    def _floor(self, stage: int) -> Tensor:
        width = self.before.shape[2]
        return torch.eye(width).to(self.before) * (SPREAD[stage] * self.size) ** 2

    def _patch_slots(self) -> Tensor:
        """The slot (B, P) of each patch."""
        images = torch.arange(self.count, device=self.rows.device)[:, None]
        return images * self.width + self.rows

    def first(self) -> Tensor:
        """Images (B, C, H, W) of the tokens found, by regression."""
        mean, middle = self.before[:, self.rows].mean(0), self.sample.mean(0)
        off, patches = (self.before[:, self.rows] - mean).flatten(0, 1), (self.sample - middle).flatten(0, 1)
        rule = torch.linalg.solve(_ridged(off.T @ off / len(off), PATCHED), off.T @ patches / len(off))
        slots = self._patch_slots()
        self.known = self.tokens.filled[slots]
        found = middle.expand(self.count, -1, -1).clone()
        position = self.known.nonzero()[:, 1]
        found[self.known] = middle[position] + (self.tokens.before(slots[self.known]) - mean[position]) @ rule
        return self.pictures.painted(self.pictures.images(found).clamp(0, 1), self.known)

    # ------------------------------------------------------------------------------------------------
    # Pictures and tokens in turn

    def in_turn(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) once rounds find no more tokens."""
        idle = 0
        for _ in range(TURNS):
            images = self._exchanged(self._by_tokens(images))
            for bluntness in FILLED:
                images = self._by_spaces(images, self._marks(), bluntness)
            images = self._by_all(self._without_contradicted(images))
            if self.explained.all():
                break
            count, before = int(self.tokens.filled.sum()), self.tokens.slots.clone()
            if len(self.tokens.empty):
                self.tokens.search_beside(self.generator)
                self._narrowly(images)
                images = self._completed(images, before)
            idle = 0 if int(self.tokens.filled.sum()) > count else idle + 1
            if idle == IDLE or self.budget.is_spent:
                break
        images = self._exchanged(self._by_tokens(images))
        for bluntness in WHOLE:
            images = self._by_spaces(images, torch.ones_like(self._marks()), bluntness)
        for bluntness in LAST:
            done = self.believed
            images[done] = self.pictures.by_all(images[done], bluntness)
        return images

    @property
    def believed(self) -> Tensor:
        """(B,) whether nearly all tokens of a picture are explained by it alone."""
        return self.explained.double().mean(1) >= BELIEVED

    def _marks(self) -> Tensor:
        return self.tokens.filled.view(self.count, -1).to(self.before)

    def _by_tokens(self, images: Tensor) -> Tensor:
        slots, others = self.tokens.filled.nonzero()[:, 0], ~self.believed
        goal = self.before.new_zeros(self.count * self.width, self.before.shape[2])
        goal[slots] = self.tokens.tokens(slots)
        goal, images = goal.view(self.count, self.width, -1), images.clone()
        if others.any():
            images[others] = self.pictures.by_tokens(images[others], goal[others], self._marks()[others])
        return images

    def _by_spaces(self, images: Tensor, marks: Tensor, bluntness: float) -> Tensor:
        others, images = ~self.believed, images.clone()
        if others.any():
            images[others] = self.pictures.by_spaces(images[others], marks[others], bluntness)
        return images

    def _by_all(self, images: Tensor) -> Tensor:
        """With pictures that both spaces alone explain, in the place of those whose tokens were nearly all found."""
        images, filled = images.clone(), self.tokens.filled.view(self.count, -1)
        for n in range(self.count):
            if self.budget.is_spent or self.explained[n].all() or filled[n].double().mean() < CLOSE:
                continue
            trial, share = images[n : n + 1], 0.0
            for bluntness, least in COURSE:
                if share >= least:
                    trial = self.pictures.by_all(trial, bluntness)
                    fits = self.pictures.fits(trial, COURSE[-1][0])[0]
                    explained = fits <= EXPLAINED
                    share = float(explained.double().mean())
            if share < max(BELIEVED, float(self.explained[n].double().mean())):
                continue
            images[n], self.explained[n] = trial[0], explained
            own, tokens = explained.nonzero()[:, 0], self.pictures.seen(trial)[1][0]
            self.tokens.slots[n * self.width : (n + 1) * self.width] = -1
            self.tokens.put(n * self.width + own, tokens[own] @ self.space.basis, fits[own])
        self.known = self.tokens.filled[self._patch_slots()]
        return self.pictures.painted(images, self.known)

    def _distances(self, images: Tensor, slots: Tensor) -> Tensor:
        """Relative distances (n, M) of the tokens of n batches (n, B, C, H, W) from those at slots (n, M); 0: none."""
        seen = self.pictures.seen(images.flatten(0, 1))[1].view(len(images), -1, self.before.shape[2])
        goal = self.space.tokens(self.tokens.values)
        apart = (seen - goal[slots.clamp(min=0)]).norm(dim=2) / self.before.shape[2] ** 0.5
        return apart * (slots >= 0)

    def _exchanged(self, images: Tensor) -> Tensor:
        """With patches and tokens of a position exchanged between two images where that explains all tokens better."""
        pairs = list(itertools.combinations(range(self.count), 2))
        patches, slots = self.pictures.patches(images), self.tokens.slots.view(self.count, -1)
        filled = self.known.any(0).nonzero()[:, 0].tolist()
        trials = [(p, pair) for p in filled for pair in pairs]

        def swapped(p: int, pair: tuple[int, int]) -> tuple[Tensor, Tensor]:
            new, dealt = patches.clone(), slots.clone()
            new[list(pair), p] = patches[list(pair[::-1]), p]
            dealt[list(pair), self.rows[p]] = slots[list(pair[::-1]), self.rows[p]]
            return new, dealt

        def costs(patches: Tensor, slots: Tensor) -> Tensor:
            apart = self._distances(self.pictures.images(patches), slots.flatten(1))
            return torch.log1p((apart / UNIT).square()).sum(1)

        while trials:
            least, count = float(costs(patches[None], slots[None])), 0
            each = [torch.stack(parts) for parts in zip(*(swapped(*trial) for trial in trials), strict=True)]
            order = costs(*each)
            for n in order.argsort()[:EXCHANGES].tolist():
                if order[n] >= least:
                    break
                new, dealt = swapped(*trials[n])
                cost = float(costs(new[None], dealt[None]))
                if cost < least - GAIN:
                    patches, slots, least, count = new, dealt, cost, count + 1
            if not count:
                break
        self.tokens.slots = slots.flatten().clone()
        self.known = self.tokens.filled[self._patch_slots()]
        return self.pictures.images(patches)

    def _without_contradicted(self, images: Tensor) -> Tensor:
        """With the tokens taken back that these images contradict, and their patches painted over."""
        apart = self._distances(images[None], self.tokens.slots[None])[0]
        filled = self.tokens.filled
        bound = max(OFF[0] * float(apart[filled].median()), OFF[1]) if filled.any() else 0.0
        self.tokens.slots[filled & (apart > bound)] = -1
        self.known = self.tokens.filled[self._patch_slots()]
        return self.pictures.painted(images, self.known)

    def _narrowly(self, images: Tensor) -> None:
        """Seek the missing tokens where these images let them be expected."""
        self._expect(images)
        self.tokens.deal(anew=False)
        slots, starts = self.tokens.empty, []
        if not len(slots):
            return
        for at in slots.tolist():
            before = self.around[at // self.width][:, at % self.width]
            starts.append(before[self._misfit(before).argsort()[:STARTS]])
        self.tokens.search(torch.cat(starts), slots.repeat_interleave(STARTS), NARROW, near=True)
        self.tokens.deal(anew=False)

    def _misfit(self, before: Tensor) -> Tensor:
        """How much (n,) of the activations, and half of that of the tokens, lies outside their spaces; a logarithm."""
        tokens = self.space.of_origin(before)
        values = self.space.activations(self.space.place.inner(tokens))
        return _share(self.space.outer, values).log() + _share(self.space.inner, tokens).log() / 2

    def _expect(self, images: Tensor) -> None:
        """Expect tokens as they are with random patches in the unknown places of images, and a few of the known."""
        width, means, covariances = self.before.shape[2], [], []
        self.around, self.middles, self.rules = [], [], []
        for image, order in enumerate(self._order()):
            own = self.pictures.patches(images)[image]
            chance = torch.rand(SAMPLE, len(self.rows), generator=self.generator).to(own)
            random = ~self.known[image] | (chance < REPLACED)
            patches = torch.where(random[..., None], self._random_patches(order), own)
            before, _ = self.pictures.seen(self.pictures.images(patches))
            self.around.append(before)
            replaced = torch.ones(SAMPLE, self.width, dtype=torch.bool, device=own.device)
            replaced[:, self.rows] = random
            weight = replaced.to(before) / replaced.sum(0).clamp(min=1)  # (S, N)
            mean = torch.einsum("sn,snd->nd", weight, before)
            off = before - mean
            every = torch.stack([off[:, n].T @ (weight[:, n, None] * off[:, n]) for n in range(self.width)])
            pool = every[self.rows].mean(0)
            blend = every.clone()
            blend[self.rows] = OWN * every[self.rows] + (1 - OWN) * pool
            means.append(mean)
            covariances.append(WIDER[1] * blend + self._floor(1))
            self._keep_rule(patches, off[:, self.rows], weight[:, self.rows])
        self.space.expect(Expectation.of(torch.cat(means), torch.cat(covariances).view(-1, width, width)))

    def _random_patches(self, order: Tensor) -> Tensor:
        """Patches (S, P, n) of random images, of every other one mixed anew: rounds are not to begin alike."""
        count, places = len(order), len(self.rows)
        index = order[:, None].repeat(1, places)
        drawn = torch.randint(0, count // 2, (count // 2, places), generator=self.generator).to(order.device)
        index[1::2] = order[drawn]
        return self.sample[index, torch.arange(places, device=order.device)]

    def _keep_rule(self, patches: Tensor, off: Tensor, weight: Tensor) -> None:
        """Remember how patches (S, P, n) go with tokens' origins (S, P, D) about their means."""
        middle = torch.einsum("sp,spn->pn", weight, patches)
        with_tokens = torch.einsum("sp,spn,spd->pnd", weight, patches - middle, off)
        self.middles.append(middle)
        self.rules.append(OWN * with_tokens + (1 - OWN) * with_tokens.mean(0))

    def _completed(self, images: Tensor, before: Tensor) -> Tensor:
        """With the patches of tokens that are new at their slots, and what is still unknown painted."""
        patches, slots = self.pictures.patches(images), self._patch_slots()
        self.known = self.tokens.filled[slots]
        fresh = self.known & (self.tokens.slots != before)[slots]
        at = slots[fresh]
        off = self.tokens.before(at) - self.space.expectation.mean[at]
        whitening = self.space.expectation.whitening[at]
        solved = torch.einsum("nji,njk,nk->ni", whitening, whitening, off)
        image, patch = fresh.nonzero().T
        rules, middles = torch.stack(self.rules)[image, patch], torch.stack(self.middles)[image, patch]
        patches[fresh] = middles + WIDER[1] * torch.einsum("nkd,nd->nk", rules, solved)
        return self.pictures.painted(self.pictures.images(patches).clamp(0, 1), self.known)


def _share(span: TokenSpan, values: Tensor) -> Tensor:
    """The share (n,) of values (n, m) outside a row space."""
    return span.outside(values).norm(dim=1) / (values / span.columns).norm(dim=1)


def _ridged(matrix: Tensor, share: float) -> Tensor:
    return matrix + share * matrix.diagonal().mean() * torch.eye(len(matrix)).to(matrix)


def images_of_tokens(
    model: nn.Module,
    place: Perceptron,
    spans: Sequence[TokenSpan],
    embedding: PatchEmbedding,
    image_shape: Sequence[int],
    features: Tensor,
    budget: WorkBudget,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Likely images (B, C, H, W) in float64, in the order of their features, the tokens (n, D) and fits (n,).

    The last are the images nearly all of whose tokens lie in both spaces.

    Args:
        model: in float64, in eval mode.
        place, spans: the perceptron behind the first attention, and the spans of its two layers' gradients.
        embedding: of the model's patches.
        image_shape: (C, H, W).
        features: (B, d) of all images.
        budget: of all searches, in multiplications.
        generator: what random images are drawn from (on the CPU).

    Raises:
        TooFewTokensError: too few tokens were told apart, or they are in an order that is not known.
    """
    if int(embedding.rows.max()) >= place.tokens:
        raise TooFewTokensError("tokens are in another order than their positions")
    pictures = TokenImages(model, place, spans, embedding, image_shape, budget)
    search = _Search(TokenSpace(place, *spans), pictures, features.double(), generator, budget)
    if not (blur := search.blur()) <= CLEAR:
        raise TooFewTokensError(f"tokens are told within {blur:.1e} of their size only")
    search.widely()
    tokens = search.tokens
    if tokens.filled.sum() < ENOUGH * len(tokens.slots):
        raise TooFewTokensError(f"{int(tokens.filled.sum())} of {len(tokens.slots)} tokens were told apart")
    images = search.in_turn(search.first())
    slots = tokens.filled.nonzero()[:, 0]
    whole = tuple(search.believed.nonzero()[:, 0].tolist())
    return images, tokens.tokens(slots), tokens.fits[tokens.slots[slots]], whole
