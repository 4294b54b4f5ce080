"""The equations of a single image at one layer: scale, column space, pairing; their solution, and its judgement.

Each of them holds for one image alone, whatever else is in the batch, and fails for mixtures, see `peel`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attack.read.signals import Signals, Tail
from attack.read.span import Span
from attack.solve.budget import WorkBudget
from attack.solve.least_squares import least_squares
from attack.solve.levenberg import DampingRule, levenberg
from update.loss import CROSS_ENTROPY, Loss

STEPS = 60  # of a polish, at most; from an arbitrary start 20 to 40 are usual
POLISHED = 5e6  # multiplications that take as long as the overhead of a polish
TOGETHER = 16  # coordinates by which deltas are differentiated at once: more cost memory and save nothing
POLISH = DampingRule(
    first=1e-2, least=1e-14, most=1e8, refused=4.0, accepted=0.3, refusals=None, patience=3, counts_refusals=True
)
AT_ONCE = 2e6  # entries of deltas, of candidates for every label, that are held at once
SCALES = torch.logspace(-2, 4, 37, dtype=torch.float64)  # |a| tried where no bias gradient gives the scale
FINER = 9  # scales tried within a step of SCALES around the best
ARITHMETIC = 30.0  # units of rounding by which the victim's forward and backward passes may err
TOLERANCE = 4.0  # standard deviations of noise that a true image's mismatch may reach
LIMIT = 0.1  # but never a larger one: images of one class come as close as this to being each other's mixtures
DISTINCT = 3.0  # times the noise of an input's zeros: what the likeliest other input has there must exceed it
WITNESSES = 3  # equations beyond the unknowns without which a polish proves nothing
CHANCE = 3e-7  # that a false candidate fits this well: tolerance to the power of the witnesses
TAIL_CHANCE = 1e-2  # the same where zeros, which a programme has sought, bear no witness
UNSURE = 0.05  # inputs whose expected relative error is larger are not used


def by_position(outputs: Tensor) -> Tensor:
    """(N, c_out, ...) -> (N, P, c_out)."""
    return outputs.flatten(2).transpose(1, 2) if outputs.dim() > 2 else outputs[:, None]


def along_ones(span: Span) -> Tensor | None:
    """patch_p(basis_j)^T w, (dim A, P): 1 at every position for the coordinates of a true image."""
    if span.ones is None:
        return None
    return span.geometry.patches(span.inputs(torch.eye(span.dimension).to(span.basis))) @ span.ones


def summed_gradient(span: Span) -> Tensor:
    """B times the weighted gradient, transposed and in R: (r, c_out)."""
    return span.batch_size * span.sigma[:, None] * span.left.T


class ImageEquations:
    """What a span asks of a single image, in coordinates of A: scale, column space, and pairing.

    Args:
        span: of the gradient, or of what is left of it.
        layer: inputs -> outputs.
        tail: the network behind the layer.
        loss: the client's, of each image.
        paired: whether the gradient is B times smaller than the sum of the images', so that a true image's certificate
            is 1. A clipped gradient is smaller by a factor that nobody tells; the certificates then are that factor.
    """

    def __init__(
        self,
        span: Span,
        layer: Callable[[Tensor], Tensor],
        tail: Tail,
        loss: Loss = CROSS_ENTROPY,
        *,
        paired: bool = True,
    ) -> None:
        self.span, self.layer, self.tail, self.loss, self.paired = span, layer, tail, loss, paired
        geometry = span.geometry
        units = span.inputs(torch.eye(span.dimension).to(span.basis))
        zero = layer(torch.zeros_like(units[:1])).detach()
        self.offset = zero[0]  # (*output_shape), the layer's bias
        self.outputs = (layer(units) - zero).detach().flatten(1)  # of each basis vector, (dim A, c_out P)
        self.rows = geometry.patches(units) @ span.right.T  # its patches in R, (dim A, P, r)
        self.along = along_ones(span)  # (dim A, P)

    @cached_property
    def classes(self) -> int:
        """K."""
        nothing = self.span.inputs(self.span.basis.new_zeros(1, self.span.dimension))
        return self.tail(nothing, self.offset[None]).shape[1]

    def of(self, span: Span) -> "ImageEquations":
        """The same for another span of the same layer."""
        if span is self.span:
            return self
        return ImageEquations(span, self.layer, self.tail, self.loss, paired=self.paired)

    def _outputs(self, c: Tensor) -> Tensor:
        return (c @ self.outputs).view(-1, *self.offset.shape) + self.offset

    def deltas(self, c: Tensor, labels: Tensor) -> Tensor:
        """Gradient of each candidate's loss by the layer's output, (N, *output_shape)."""
        inputs = self.span.inputs(c)
        return self.loss.delta(lambda outputs: self.tail(inputs, outputs), self._outputs(c), labels)

    def all_deltas(self, c: Tensor) -> Tensor:
        """The same for every label, (N, K, *output_shape)."""
        outputs = self._outputs(c).detach().requires_grad_()
        with torch.enable_grad():
            logits = self.tail(self.span.inputs(c), outputs)
            unlabelled = self.loss.unlabelled(logits.detach())
            free = torch.autograd.grad((unlabelled * logits).sum(), outputs, retain_graph=True)[0]
            each = [torch.autograd.grad(logit.sum(), outputs, retain_graph=True)[0] for logit in logits.T]
        return self.loss.all_deltas(free, torch.stack(each, 1)).detach()

    def weighted_deltas(self, c: Tensor) -> Tensor:
        """The same as rows of the span are weighted, (N, K, P, c_out)."""
        every = self.all_deltas(c)
        return (by_position(every.flatten(0, 1)) * self.span.rows).unflatten(0, every.shape[:2])

    def deltas_told(self, c: Tensor) -> Tensor:
        """The weighted deltas (N, P c_out) with which N inputs together give the gradient, whatever made them."""
        span = self.span
        patches = (span.geometry.patches(span.inputs(c)) @ span.right.T).flatten(0, 1)  # (N P, r)
        return least_squares(patches.T, summed_gradient(span)).reshape(len(c), -1)

    def mislabelled(self, c: Tensor, deltas: Tensor) -> Tensor:
        """How far each label's deltas are from these (N, P c_out), (N, K)."""
        return (self.weighted_deltas(c).flatten(2) - deltas[:, None]).norm(dim=2)

    def moved_deltas(self, c: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The deltas, and their derivatives by each coordinate, (N, dim A, *output_shape).

        A delta is the loss's derivative by the outputs. Its own by a coordinate is that of the loss by the coordinate,
        derived by the outputs: one backward pass for each of the few coordinates, not one for each output.
        """
        c = c.detach().requires_grad_()
        with torch.enable_grad():
            outputs = self._outputs(c)
            apart = torch.zeros_like(outputs, requires_grad=True)  # outputs that move while the coordinates rest
            loss = self.loss.each(self.tail(self.span.inputs(c), outputs + apart), labels).sum()
            slopes, deltas = torch.autograd.grad(loss, (c, apart), create_graph=True)
            directions = torch.eye(c.shape[1]).to(c)[:, None].expand(-1, len(c), -1)
            moved = [
                torch.autograd.grad(slopes, apart, some, is_grads_batched=True, retain_graph=True)[0]
                for some in directions.split(TOGETHER)
            ]
        return deltas.detach(), torch.cat(moved).transpose(0, 1)

    def linearised(self, c: Tensor, zeros: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The residual f (N, m) and its derivatives J by each coordinate, (N, dim A, m)."""
        span, (deltas, moved) = self.span, self.moved_deltas(c, labels)
        f = self.residual(c, zeros, deltas)
        d, moved = by_position(deltas) * span.rows, by_position(moved.flatten(0, 1)).unflatten(0, c.shape) * span.rows
        u, turned = d @ span.left, moved @ span.left
        length = d.flatten(1).norm(dim=1).clamp(min=1e-200)[:, None]
        longer = (moved * d[:, None]).flatten(2).sum(2) / length**2  # relative to the length
        outside = (moved - turned @ span.left.T).flatten(2) / length[:, None]
        parts = [outside - longer[:, :, None] * f[:, None, : outside.shape[2]]]
        parts.append(self._moved_certificate(c, u, turned, d)[:, :, None])
        if zeros.any():
            size = c.norm(dim=1)[:, None, None]
            held = (c @ span.basis) * zeros
            parts.append(span.basis * zeros[:, None] / size - c[:, :, None] * held[:, None] / size**3)
        if self.along is not None:
            parts.append((self.along / self.along.shape[1] ** 0.5).expand(len(c), -1, -1))
        return f, torch.cat(parts, 2)

    def residual(self, c: Tensor, zeros: Tensor, deltas: Tensor) -> Tensor:
        """What does not fit, (N, P c_out + 1 [+ n] [+ P]).

        It is delta outside U, 1 - 1/certificate, the input where it should be zero, and patches^T w - 1.
        """
        d = by_position(deltas) * self.span.rows
        u = d @ self.span.left
        length = d.flatten(1).norm(dim=1).clamp(min=1e-200)
        outside = (d - u @ self.span.left.T).flatten(1) / length[:, None]
        unpaired = 1 - 1 / self._certificate(c, u, d) if self.paired else torch.zeros_like(length)
        parts = [outside, unpaired[:, None]]
        if zeros.any():
            parts.append((c @ self.span.basis) * zeros / c.norm(dim=1, keepdim=True))
        if self.along is not None:
            parts.append((c @ self.along - 1) / self.along.shape[1] ** 0.5)
        return torch.cat(parts, 1)

    def _certificate(self, c: Tensor, u: Tensor, d: Tensor) -> Tensor:
        x = (c @ self.rows.flatten(1)).view(len(c), *self.rows.shape[1:])
        return (x * (u / self.span.sigma)).sum((1, 2)) / self._share(d)

    def _moved_certificate(self, c: Tensor, u: Tensor, turned: Tensor, d: Tensor) -> Tensor:
        """The derivatives (N, dim A) of 1 - 1/certificate; `turned` are those of u, (N, dim A, P, r)."""
        if not self.paired:
            return torch.zeros_like(c)
        x = (c @ self.rows.flatten(1)).view(len(c), 1, *self.rows.shape[1:])
        own = (self.rows * (u / self.span.sigma)[:, None] + x * (turned / self.span.sigma)).sum((2, 3))
        return own / (self._share(d) * self._certificate(c, u, d).square())[:, None]

    def _share(self, d: Tensor) -> Tensor:
        """B times the positions that have errors, (N,): those without leave no trace in the gradient."""
        return self.span.batch_size * (d.abs().amax(2) > 0).sum(1).clamp(min=1)

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
        many = max(1, int(AT_ONCE / (self.classes * self.offset.numel())))
        if len(c) > many:
            return torch.cat([self.mismatch(part) for part in c.split(many)])
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

    def believed(self, c: Tensor, zeros: Tensor, labels: Tensor, budget: WorkBudget) -> Signals:
        """Those candidates (N, dim A) that are, or a polish makes, indistinguishable from a true image."""
        if not len(c):
            return self.nobody()
        if self.spare < WITNESSES:  # what is left of the gradient may have spoken for another label
            labels = self.mismatch(c).argmin(1)
        witnesses = self.spare + self._silent_witnesses(zeros)
        errors = self._equations_errors(c, self._pinned_down(c, zeros))
        found, passed = self._judged(c, zeros, labels, witnesses, errors)
        rest = (~passed).nonzero()[:, 0]
        found = found.pick(passed)
        if len(rest) and self.spare >= WITNESSES:
            c, _, normal = self.solve(c[rest], zeros[rest], labels[rest], budget)
            witnesses = torch.full_like(c[:, 0], self.spare)
            polished, passed = self._judged(c, zeros[rest], labels[rest], witnesses, self._equations_errors(c, normal))
            found = found.joined(polished.pick(passed))
        return found

    @property
    def spare(self) -> int:
        """Equations of the tail and of the scale beyond the dim A unknowns: witnesses that a polish cannot bribe."""
        span = self.span
        outside = span.geometry.positions * (len(span.left) - span.rank) - 1  # softmax errors sum to zero
        return outside + self.paired + (0 if self.along is None else self.along.shape[1]) - span.dimension

    def _silent_witnesses(self, zeros: Tensor) -> Tensor:
        """How many zeros (N, n) say that an input is this one and no other, (N,); dim A of them at least.

        Zeros pin a direction down, the one of least energy there. The likeliest other is the next: all entries by which
        it differs are witnesses, unless they are what noise would make of it. Where A is too small for all images,
        directions within it are none of theirs, and zeros prove nothing.
        """
        span = self.span
        count = [float(span.dimension)] * len(zeros)
        if 1 < span.dimension == span.batch_size:
            count = [max(least, self._speaking(silent)) for silent, least in zip(zeros, count, strict=True)]
        return torch.tensor(count).to(span.basis)

    def by_zeros(self, c: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """What zeros (N, n) alone say of inputs c (N, dim A): how many of them no other has, (N,), and the error (N,).

        Neither the tail nor the labels are asked, so it holds for images whose tail is not known. The expected relative
        error is that within the span and of the span.
        """
        held = (c @ self.span.basis) * zeros / c.norm(dim=1, keepdim=True)
        energy = held.square().sum(1).clamp(min=self.span.precision**2)
        level = energy / zeros.sum(1).clamp(min=1)
        error, _ = self._expected_error(c, c @ self.rows.flatten(1), level, self._pinned_down(c, zeros))
        broken = [int((entries.abs() > DISTINCT * noise).sum()) for entries, noise in map(self._likeliest_other, zeros)]
        return torch.tensor(broken).to(error), error

    def pairing_noise(self, c: Tensor, deltas: Tensor) -> Tensor:
        """The error (N,) of the certificates of these inputs (N, dim A), and of a scale that is told by them."""
        span, d = self.span, by_position(deltas) * self.span.rows
        x, y = c @ self.rows.flatten(1), (d @ span.left).flatten(1)
        return span.noise * span.weak(x) * span.weak(y) / span.batch_size

    def described(self, c: Tensor, zeros: Tensor, labels: Tensor) -> Signals:
        """Candidates (N, dim A) as inputs of these labels, unjudged."""
        witnesses = torch.zeros(len(c)).to(c)
        return self._judged(c, zeros, labels, witnesses, self._equations_errors(c, self._pinned_down(c, zeros)))[0]

    def _speaking(self, silent: Tensor) -> float:
        """The number of zeros (n,) that the likeliest other direction of A breaks, 0 where it is noise that does."""
        broken, noise = self._likeliest_other(silent)
        return float(broken.square().sum().square() / broken.pow(4).sum()) if noise < math.inf else 0.0

    def _likeliest_other(self, silent: Tensor) -> tuple[Tensor, float]:
        """What the likeliest other direction of A has where a ray is silent (n,), and the noise of such an entry.

        The noise is infinite where noise may have made it.
        """
        entries = self.span.basis[:, silent].T
        energies, vectors = torch.linalg.eigh(entries.T @ entries)
        other = vectors[:, 1]
        blurred = self.span.turned(other @ self.rows.flatten(1)).square() * silent.double().mean()
        noise = max(float(energies[0]), float(blurred))
        is_told = float(energies[1]) > DISTINCT**2 * noise
        return entries @ other, (noise / max(1, len(entries))) ** 0.5 if is_told else math.inf

    def _pinned_down(self, c: Tensor, zeros: Tensor) -> Tensor:
        """J^T J (N, dim, dim) of the linear equations alone, zeros and scale."""
        held = zeros[:, :, None] * self.span.basis.T / c.norm(dim=1)[:, None, None]  # (N, n, dim)
        normal = held.transpose(1, 2) @ held
        return normal if self.along is None else normal + self.along @ self.along.T / self.along.shape[1]

    def as_they_are(self, c: Tensor, labels: Tensor, errors: Tensor) -> tuple[Signals, Tensor]:
        """Candidates (N, dim A) that no equation has shaped, of known relative errors (N,), and which to believe.

        All equations bear witness. The errors are those of inputs, so they show in the equations as well.
        """
        zeros = torch.zeros(1, 1, dtype=torch.bool, device=c.device)
        witnesses = torch.full_like(errors, self.spare + self.span.dimension)
        freedom = torch.full_like(errors, self.span.right.shape[1])
        return self._judged(c, zeros, labels, witnesses, lambda _: (errors, freedom), errors)

    def _judged(
        self,
        c: Tensor,
        zeros: Tensor,
        labels: Tensor,
        witnesses: Tensor,
        errors: Callable[[Tensor], tuple[Tensor, Tensor]],
        shown: Tensor | float = 0.0,
    ) -> tuple[Signals, Tensor]:
        """All candidates as inputs, and which of them to believe, where so many equations (N,) bear witness.

        `errors` gives relative errors and their freedom from the mean square residual of an equation, (N,) each, and
        `shown` is what the mismatch of a true image has of them.
        """
        deltas, span = self.deltas(c, labels), self.span
        d = by_position(deltas) * span.rows
        u, x = d @ span.left, c @ self.rows.flatten(1)
        expected, condition = self._noise(u, x)
        expected = expected + shown
        mismatch, pairing = self.residual(c, zeros, deltas), deltas[0].numel()  # the pairing's column of the residual
        outside = mismatch[:, :pairing].norm(dim=1)
        mismatch[:, pairing] /= 1 + condition
        cost = mismatch.square().sum(1)
        level = torch.maximum(cost, (expected + span.precision).square()) / (self.spare + zeros.sum(1)).clamp(min=1)
        uncertainty, freedom = errors(level)
        certificates = self._certificate(c, u, d)
        every = Signals(span.inputs(c), labels, deltas, outside, certificates, uncertainty, freedom, span.batch_size)
        tolerance = (TOLERANCE * expected + ARITHMETIC * span.precision).clamp(max=LIMIT)
        by_chance, by_the_tail = (
            tolerance ** count.clamp(0, 100) * (1 + condition)
            for count in (witnesses, torch.full_like(witnesses, self.spare + span.dimension))
        )
        likely = (cost.sqrt() < tolerance) & (uncertainty < UNSURE)
        return every, likely & (by_chance < CHANCE) & (by_the_tail < TAIL_CHANCE)

    def _equations_errors(self, c: Tensor, normal: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """What equations with this J^T J leave open, by the mean square residual of an equation, (N,)."""
        return lambda level: self._expected_error(c, c @ self.rows.flatten(1), level, normal)

    def _expected_error(self, c: Tensor, x: Tensor, level: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        """An image's expected relative error, and that error's degrees of freedom, (N,) each."""
        trace, own = _trace_of_inverse(normal)
        turned, within = self.span.turned(x), (trace * level).sqrt() / c.norm(dim=1)
        if self.along is not None:  # the scale is one equation, however many zeros there are
            noise = self.span.noise * self.span.weak(x) / self.along.shape[1]
            within = torch.hypot(within, noise * (1 + self.span.ones.square().sum()).sqrt())
        uncertainty = torch.hypot(turned, within)
        # a turned span moves all entries of an input alike; within it, what the equations leave open is moved
        shares_of_four = (turned / uncertainty) ** 4 / self.span.right.shape[1] + (within / uncertainty) ** 4 / own
        return uncertainty, 1 / shares_of_four

    def _noise(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """What noise makes of true images with x (N, P r) and y = U^T delta (N, P, r): two numbers each, (N,).

        They are the relative error of its mismatch, and the factor of such an error in the certificate. Noise N in the
        entries of the weighted gradient turns U y by N R^T S^-1 y and R^T x by N^T U S^-1 x. The certificate is
        x^T S^-1 y / B, and 1 for a true image: the less x is parallel to S^-1 y, or y to S^-1 x, the more an error
        shows. Images whose errors nearly cancel have such an x and y.
        """
        span, y = self.span, u.flatten(1)
        y_weak, x_weak, y_length, x_length = self.span.weak(y), self.span.weak(x), y.norm(dim=1), x.norm(dim=1)
        turned_out = span.noise * len(span.left) ** 0.5 * y_weak / y_length.clamp(min=1e-200)
        expected = turned_out + self.span.turned(x) + span.noise * x_weak * y_weak / span.batch_size
        return expected, torch.maximum(x_length * y_weak, y_length * x_weak) / span.batch_size

    def solve(self, c: Tensor, zeros: Tensor, labels: Tensor, budget: WorkBudget) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates (N, dim A), |residual|^2 (N,) and J^T J (N, dim, dim); each candidate has its own damping.

        Takes about as many multiplications off the budget's work.
        """
        if not len(c):
            return c, c.new_zeros(0), c.new_zeros(0, c.shape[1], c.shape[1])
        budget.spend(POLISHED + STEPS * c.numel() * self.outputs.shape[1])
        polish, enough = _Polish(self, zeros, labels), (0.1 * self.span.precision) ** 2
        found = levenberg(polish, c, POLISH, iterations=STEPS, budget=budget, enough=enough)
        return found.x, found.cost, found.normal

    def nobody(self) -> Signals:
        """No image at all, in the shapes of this layer."""
        return nobody(self.span)


@dataclass(frozen=True)
class _Polish:
    """Candidates (N, dim A) with their zeros (N, n) and labels (N,), as problems of `attack.solve.levenberg`."""

    equations: ImageEquations
    zeros: Tensor
    labels: Tensor

    def cost(self, x: Tensor, which: Tensor) -> Tensor:
        """|residual|^2, (n,)."""
        deltas = self.equations.deltas(x, self.labels[which])
        return self.equations.residual(x, self.zeros[which], deltas).square().sum(1)

    def linearised(self, x: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """|f|^2 (n,), J^T J (n, d, d), J^T f (n, d)."""
        f, j = self.equations.linearised(x, self.zeros[which], self.labels[which])  # (n, m), (n, d, m)
        return f.square().sum(1), j @ j.transpose(1, 2), (j @ f[:, :, None])[:, :, 0]


def nobody(span: Span) -> Signals:
    """No image at all, in the shapes of a span's layer."""
    geometry = span.geometry
    return Signals.none(span.basis, geometry.input_shape, geometry.output_shape, span.batch_size)


def _trace_of_inverse(normal: Tensor) -> tuple[Tensor, Tensor]:
    """tr C of C = (J^T J)^-1, (N,), infinite where it is singular; and (tr C)^2 / tr C^2."""
    inverse, failed = torch.linalg.inv_ex(normal)
    trace, squares = inverse.diagonal(dim1=1, dim2=2).sum(1), inverse.square().sum((1, 2))
    fine = (failed == 0) & trace.isfinite() & (trace > 0)
    return torch.where(fine, trace, math.inf), torch.where(fine, trace.square() / squares, 1.0)
