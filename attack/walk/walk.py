"""Down, layer by layer: from the exact inputs of one layer to those of the layers below it, by linear algebra.

Once inputs and labels are known at one place, one backward pass of the known tail gives every image's own delta there,
and the layer below obeys equations that are linear in its own input, see `rows`. Their solution is the next known
place. Between the layers:

- Activations. Sigmoid and tanh are inverted everywhere. Behind a ReLU an entry is active or not; recovered with noise,
  inactive entries are not quite zero. What is below zero measures each image's noise, what is near it is doubtful:
  output channels that hold something doubtful are left out at first. Then the residual of just these channels decides,
  since one wrong mask adds or lacks one delta times one patch. Then all are solved again. Last, a faint image's wrong
  mask leaves no more than noise may leave, but in one channel and one direction: an entry that explains a notable share
  of what is left is changed, as long as there is one.
- Residual blocks. The body's layers but the lowest are solved by their gradient alone; what the body puts out is then
  known, and out - body is what the shortcut put out, wherever the ReLU behind the sum is active.
- Layers of a body whose gradient has too few rows. Their input h is no free tensor: it is what the body makes of the
  block's input u, which the block makes its output of. Both together determine u, nonlinearly, see `together`.
- BatchNorm in eval mode is a scale and a shift for each channel, a pool of one position nothing at all. In training
  mode it ends the walk: an image's delta below it depends on all others.

Quiet images. An image that the network is sure of hardly moves the gradient, and its inputs come out accordingly: in a
trained network's batch of 32 the loudest may be 5,000 times as loud as the quietest. The walk goes on without a few
of them: below, their inputs are only the best that there are, and gradients are trusted no further than their share in
them. Pixels are not to be improved on any more, so they are found of all images or of none.

Every layer leaves a `Record`. Two figures decide whether it is believed: the residual of its equations, which must be
noise, and a rehearsal, in which a known random input is put through the same equations with as much noise and must
come back. The walk ends at the first layer that is not believed, and says why.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from attack.read.head.noise import precision_of
from attack.solve.cgls import Solution
from attack.walk.block import NOISE, Together, beside, size_of
from attack.walk.equations import ForwardRows, GradientRows, KnownRows, LinearMap, Rows
from attack.walk.layer_solve import FLOOR, Alone, Way, Whole, Within, rows_of
from network.chain import Chain, Residual, Stage, input_shapes, parametrised, run, unmixed_from

ZERO = 6.0  # standard deviations of an image's noise up to which an entry behind a ReLU is taken for zero
DOUBT = 20.0  # and up to which it may be wrong to be so, or not
RANGE = 40.0  # and up to which a mask may be changed by a residual that asks for it
GAIN = 0.2  # share of a channel's squared residual that changing one entry of a mask must take away
STANDS_OUT = 10.0  # a channel whose residual is so many times the median has a wrong mask
EXPLAINED = 0.5  # share of a channel's squared residual that one entry must explain to be changed by itself
NOTABLE = 0.03  # share of all the squared residual that it must explain where noise might have left as much
SUSPECTS = 16  # times that such entries are changed
COARSER = (4.0, 16.0, 64.0, 0.4)  # times the noise that masks are tried for where the residual contradicts them
ROUNDS = 4  # of deciding masks and solving again
DETERMINED = 1e-2  # relative error of the rehearsal up to which a layer counts as determined
CLEARLY = 0.1  # of that: so far below it, a few changed masks need no rehearsal of their own
BEHIND = 0.1  # share of the images that may fall behind: their pictures suffer, those of all others gain
WORTH = 1.1  # equations for each unknown from which a block is tried as a whole: on a small net 1.11 do, 1.03 do not
TRUSTED = 1e-3  # relative residual beyond which equations are wrong, unless noise explains it
CONTRADICTED = 3.0  # units of the gradient's own noise beyond which it does not
CANCELLED = 1e-3  # of the strongest row: by cancellation no row is more exact than that one would be
FEW = 0.1  # share of an image's entries that is taken for zeros without a look: of all layers tried, 0.3 and more are
WITHIN = 0.4  # standard deviations within which a third of the zeros lie: that tenth, where 0.3 are zeros
GATHERED = 1e-2  # of the median: zeros stand apart at least so far
SAMPLE = 8  # negative entries that are enough to measure noise by


class UndeterminedError(ValueError):
    """The walk cannot go below this stage; the message says why."""


@dataclass(frozen=True)
class Record:
    """What became of one layer's inputs.

    Attributes:
        name: of the layer, or of the residual stage.
        determined: whether its inputs are believed.
        reason: why not; empty if they are.
        equations, unknowns: how many, over the batch.
        residual: |A u - b| / |b|, rows weighted by one over their noise.
        rehearsal: largest relative error with which a known input came back.
        noise: (B,) each image's relative error as far as it shows; of those behind it says little.
        flips: entries of masks that the residual decided otherwise.
        behind: images that are not believed here, quiet as they are.
        iterations: of the last solve.
        seconds: wall time.
    """

    name: str
    determined: bool
    reason: str = ""
    equations: int = 0
    unknowns: int = 0
    residual: float = math.nan
    rehearsal: float = math.nan
    noise: Tensor = field(default_factory=lambda: torch.zeros(0))
    flips: int = 0
    behind: int = 0
    iterations: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Descent:
    """Where the walk ended.

    Attributes:
        inputs: exact inputs (B, ...) by the index of the stage that takes them, the start's among them.
        inner: those of layers within residual stages, by name.
        noise: standard deviation of the errors of both, by name of stage or layer, broadcasts to them.
        records: one for each layer tried, in the order of the walk.
    """

    inputs: dict[int, Tensor]
    inner: dict[str, Tensor]
    noise: dict[str, Tensor]
    records: list[Record]

    @property
    def deepest(self) -> int:
        """The lowest stage whose inputs are known."""
        return min(self.inputs)


@dataclass(frozen=True)
class Point:
    """What is known between two stages, of every image.

    Attributes:
        values: (B, ...).
        known: where `values` are right.
        delta: (B, ...) derivative of each image's loss.
        asleep: what `delta` would be where a ReLU has set it to zero.
        noise: standard deviation of the error of `values`, broadcasts to them.
        margin: how far above zero an entry was behind the last ReLU, in units of its noise; infinite without a ReLU.
        is_told: whether `values` mean anything at all.
        rounding: units of rounding that a sigmoid or tanh which came after has left in delta: its slope y (1 - y) is
            rounded by as much at y = 1 - 1e-5 as at 1/2. None: one everywhere.
    """

    values: Tensor
    known: Tensor
    delta: Tensor
    asleep: Tensor
    noise: Tensor
    margin: Tensor
    is_told: bool = True
    rounding: Tensor | None = None

    @property
    def sure(self) -> Tensor:
        """Where `values` are right beyond doubt: an entry that only seems to be active is in truth far below zero."""
        return self.known & (self.margin > RANGE)

    def untold(self) -> "Point":
        """The same without the values."""
        return replace(self, known=torch.zeros_like(self.known), is_told=False)

    def coarser(self, factor: float) -> "Point":
        """As if the noise had been so many times what it was taken for."""
        flips = (self.margin > ZERO * factor) ^ (self.margin > ZERO)
        return replace(self.flipped(flips), margin=self.margin / factor)

    def flipped(self, flips: Tensor) -> "Point":
        """The same with ReLU masks changed where `flips` says so."""
        return replace(
            self,
            known=self.known ^ flips if self.is_told else self.known,
            delta=torch.where(flips, self.asleep, self.delta),
            asleep=torch.where(flips, self.delta, self.asleep),
        )

    def scaled(self, values: Tensor, slope: Tensor, known: Tensor | None = None) -> "Point":
        """Below an elementwise stage of that slope (broadcasts), which made these values into the present ones."""
        known = self.known if known is None else self.known & known
        return replace(
            self,
            values=values,
            known=known,
            delta=self.delta * slope,
            asleep=self.asleep * slope,
            noise=self.noise / slope.abs(),
        )

    def reshaped(self, shape: tuple[int, ...]) -> "Point":
        """Each image's activations in another shape."""
        tensors = {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **{n: t.expand_as(self.values).reshape(len(t), *shape) for n, t in tensors.items()})


# ----------------------------------------------------------------------------------------------------
# Through the stages that have no weights to match


def below(module: nn.Module, point: Point, shape: tuple[int, ...]) -> Point:
    """What is known in front of an activation, BatchNorm, flattening or trivial pool, whose input has that shape.

    Raises:
        UndeterminedError: a stage that does not tell its input.
    """
    if isinstance(module, (nn.Flatten, nn.Identity, nn.Dropout)):
        return point.reshaped(shape)
    if isinstance(module, (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d)):
        if math.prod(shape) != point.values[0].numel():
            raise UndeterminedError("a pool puts out less than it takes in")
        return point.reshaped(shape)
    if isinstance(module, nn.BatchNorm2d):
        return _below_batch_norm(module, point)
    if isinstance(module, (nn.Sigmoid, nn.Tanh)):
        return _below_saturating(module, point)
    if isinstance(module, nn.ReLU):
        return _below_relu(point)
    raise UndeterminedError(f"{type(module).__name__} cannot be inverted")


def _below_batch_norm(module: nn.BatchNorm2d, point: Point) -> Point:
    scale = (module.running_var + module.eps).rsqrt()
    shift = -module.running_mean * scale
    if module.affine:
        scale, shift = scale * module.weight, shift * module.weight + module.bias
    scale, shift = scale.detach()[:, None, None], shift.detach()[:, None, None]
    alive = scale.abs() > FLOOR  # a channel that BatchNorm has closed says nothing of its input
    values = (point.values - shift) / torch.where(alive, scale, 1.0)
    passed = point.scaled(values, torch.where(alive, scale, FLOOR), alive.expand_as(values))
    return replace(passed, delta=point.delta * scale, asleep=point.asleep * scale)


def _below_saturating(module: nn.Sigmoid | nn.Tanh, point: Point) -> Point:
    """Where the activation is so close to its limits that noise might have taken it there, its input is not known."""
    values = point.values if isinstance(module, nn.Sigmoid) else (point.values + 1) / 2
    slope = values * (1 - values)
    inside = (values > 0) & (values < 1) & (slope > ZERO * point.noise)
    values = torch.where(inside, values, 0.5)
    scale = 1.0 if isinstance(module, nn.Sigmoid) else 0.5  # tanh(x) = 2 sigmoid(2x) - 1
    passed = point.scaled(scale * values.logit(), torch.where(inside, slope, 1.0) / scale**2, inside)
    exact = slope.clamp(min=0) / scale**2
    close = 2 * (1 - values) if isinstance(module, nn.Sigmoid) else 4 * values * (1 - values)
    rounding = torch.where(inside, 1 / close, 1 / FLOOR).clamp(min=1.0)
    return replace(passed, delta=point.delta * exact, asleep=point.asleep * exact, rounding=rounding)


def _below_relu(point: Point) -> Point:
    active = point.known & (point.values > ZERO * point.noise)
    return replace(
        point,
        known=active,
        delta=torch.where(active, point.delta, 0.0),
        asleep=torch.where(active, 0.0, point.delta),
        margin=point.values / point.noise,
    )


def noise_of(values: Tensor, spread: Tensor, is_after_relu: bool) -> Tensor:
    """Standard deviation of the errors of values (B, C, ...), from what it should be, (B, 1, ...).

    Out of a ReLU nothing is negative: what is, shows the lower half of the errors. Each image's is measured by it, and
    then each channel's, where the channel is worse than the others.
    """
    spread = spread.maximum(FLOOR * _size(values)).expand_as(values)
    if not is_after_relu:
        return spread
    spread = spread * _cluster(values / spread).clamp(min=1.0)
    for dims in (tuple(range(1, values.dim())), (0, *range(2, values.dim()))):
        lower = (values / spread).clamp(max=0)
        count = (lower < 0).sum(dims, keepdim=True)
        measured = (lower.square().sum(dims, keepdim=True) / count.clamp(min=1)).sqrt()
        spread = spread * torch.where(count >= SAMPLE, measured, 1.0).clamp(min=1.0)
    return spread


def _cluster(values: Tensor) -> Tensor:
    """The size (B, 1, ...) of what gathers around zero, in each image's values; 0 where nothing does.

    The images whose loss is all but zero take up some of the others' inputs, which are positive. That shows below zero
    as little as it does in the residual, but it keeps zeros from being zeros.
    """
    sizes = values.abs().flatten(1)
    low, middle = sizes.quantile(FEW, dim=1), sizes.median(dim=1).values
    gathered = torch.where(low < GATHERED * middle, low / WITHIN, 0.0)
    return gathered.view(-1, *(1,) * (values.dim() - 1))


def _size(values: Tensor) -> Tensor:
    """Root mean square of each image's values, (B, 1, ...)."""
    return beside(size_of(values), values)


# ----------------------------------------------------------------------------------------------------
# What says something of a layer's input


@dataclass(frozen=True)
class LayerSource:
    """A linear or convolutional layer on the input that is sought.

    Attributes:
        name: of the layer.
        map: its linear part.
        bias: (c_out,), zeros where it has none.
        above: what is known of its output.
        gradient: B G, the sum of the images' gradients; None where the update has none.
        precision: relative error of each entry of G.
        additive: and absolute, of B G.
        left_out: (c_out,) channels whose gradient rows are not used.
        doubt: (B,) relative error of each image's delta, for the images that have fallen behind; zero for all others.
    """

    name: str
    map: LinearMap
    bias: Tensor
    above: Point
    gradient: Tensor | None
    precision: float
    additive: float
    left_out: Tensor
    doubt: Tensor

    @property
    def _columns(self) -> tuple[int, ...]:
        """What makes a vector over channels broadcast to the output."""
        return (-1, *(1,) * (self.above.values.dim() - 2))

    def rows(self) -> list[Rows]:
        """Its gradient rows and forward rows."""
        found = []
        if self.gradient is not None:
            operator = GradientRows(self.map, self.above.delta)
            found.append(Rows(operator, self.gradient, self._gradient_weights()))
        known = self.above.sure
        if known.any():
            target = torch.where(known, self.above.values - self.bias.view(self._columns), 0.0)
            found.append(Rows(ForwardRows(self.map, known), target, torch.where(known, 1 / self.above.noise, 0.0)))
        return found

    def _gradient_weights(self) -> Tensor:
        """One over the noise of each output channel's row."""
        length = self.gradient.flatten(1).square().mean(1).sqrt()  # (c_out,)
        noise = (self.precision * length).maximum(length.new_tensor(self.additive))
        noise = (noise * self._rounding()).clamp(min=self.precision * CANCELLED * float(length.max()))
        if self.doubt.any():
            noise = noise.hypot(self._in_doubt(length))
        weights = torch.where(self.left_out | (length == 0), 0.0, 1 / noise)
        return weights.view(-1, *(1,) * (self.gradient.dim() - 1))

    def _in_doubt(self, length: Tensor) -> Tensor:
        """(c_out,) what may be wrong in gradient rows of that length for the images that have fallen behind."""
        both = self.above.delta.abs(), self.above.asleep.abs()
        loud, asleep = (t.flatten(2).sum(2) if t.dim() > 2 else t for t in both)  # (B, c_out)
        unit = (length / loud.sum(0).clamp(min=1e-300)).median()
        return unit * (self.doubt @ (loud + asleep))

    def _rounding(self) -> Tensor:
        """(c_out,) units of rounding that each channel's delta has, its strong entries above all."""
        if self.above.rounding is None:
            return torch.ones_like(self.bias)
        squares = _channels(self.above.delta.square())
        errors = squares * _channels(self.above.rounding.square())
        return (errors.sum(1) / squares.sum(1).clamp(min=1e-300)).sqrt().clamp(min=1.0)

    def delta(self) -> Tensor:
        """delta at the input."""
        return self.map.inputs(self.above.delta)

    @property
    def noise(self) -> float:
        """What noise leaves of the gradient rows, weighted, relative to them: rounding alone its precision."""
        if self.gradient is None:
            return 0.0
        weights = self._gradient_weights()
        size = float((weights * self.gradient).norm())
        return self.gradient[weights.flatten() > 0].numel() ** 0.5 / size if size else 0.0

    def doubtful(self) -> Tensor:
        """(c_out,) channels with an entry that may be on the wrong side of zero."""
        margin = self.above.margin
        return _channels((margin > ZERO / 2) & (margin < DOUBT)).any(1)

    def cautious(self) -> "LayerSource":
        """Without the channels that hold something doubtful, as long as they are fewer than half."""
        doubtful = self.doubtful()
        return self if 2 * int(doubtful.sum()) > len(doubtful) else replace(self, left_out=doubtful)

    def without_outliers(self, u: Tensor) -> "LayerSource":
        """Without the channels whose gradient stands out at u, as long as they are fewer than half."""
        if self.gradient is None:
            return self
        outliers = _stand_out((self.gradient - self.map.weights(u, self.above.delta)).flatten(1).square().sum(1))
        return self if 2 * int(outliers.sum()) > len(outliers) else replace(self, left_out=outliers)

    def coarser(self, factor: float) -> "LayerSource":
        """With masks for so many times the noise."""
        return replace(self, above=self.above.coarser(factor))

    def decided(self, u: Tensor) -> "LayerSource":
        """With the masks that the residual at u asks for."""
        return replace(self, above=self.above.flipped(self.flips(u)))

    def flips(self, u: Tensor) -> Tensor:
        """Where the gradient's residual at u asks for another mask: (B, ...), at most `ROUNDS` entries a channel.

        With S = <patch, r> and |patch|^2 at every place, a flip of delta d lowers |r|^2 by 2 d S - d^2 |patch|^2.
        """
        source, flips = self, torch.zeros_like(self.above.known)
        near = self.above.margin.abs() < RANGE
        if self.gradient is None or not near.any():
            return flips
        patches = self._patches(u)
        for _ in range(ROUNDS):
            rest = self.gradient - source.map.weights(u, source.above.delta)
            squares = rest.flatten(1).square().sum(1)  # (c_out,)
            stands_out = _stand_out(squares)
            change = source.above.asleep - source.above.delta
            gain = 2 * change * replace(self.map, weight=rest).outputs(u) - change.square() * patches
            gain = torch.where(near & stands_out.view(self._columns), gain, -torch.inf)
            best = _channels(gain).max(1).values  # (c_out,)
            worth = torch.where(best > GAIN * squares, best, torch.inf)
            chosen = gain == worth.view(self._columns)
            if not chosen.any():
                break
            source, flips = replace(source, above=source.above.flipped(chosen)), flips ^ chosen
        return flips

    def suspicion(self, u: Tensor) -> Tensor:
        """How much of the weighted squared residual each entry's flip explains at its best strength, (B, ...).

        A solution takes up most of what a wrong mask leaves, and with it the strength; the direction still shows. Zero
        for an entry that is far from doubtful or does not explain most of its channel's residual.
        """
        near = self.above.margin.abs() < RANGE
        if self.gradient is None or not near.any():
            return torch.zeros_like(self.above.delta)
        rest = self.gradient - self.map.weights(u, self.above.delta)
        squares = rest.flatten(1).square().sum(1)  # (c_out,)
        towards = replace(self.map, weight=rest).outputs(u) * (self.above.asleep - self.above.delta).sign()
        share = towards.clamp(min=0).square() / (self._patches(u) * squares.view(self._columns)).clamp(min=1e-300)
        heard = squares * self._gradient_weights().flatten().square()
        return torch.where(near & (share > EXPLAINED), share * heard.view(self._columns), 0.0)

    def _patches(self, u: Tensor) -> Tensor:
        """|patch|^2 at every place of the output, (B, 1, ...)."""
        return replace(self.map, weight=torch.ones_like(self.map.weight[:1])).outputs(u.square())


@dataclass(frozen=True)
class IdentitySource:
    """The input itself, known in places."""

    above: Point

    def rows(self) -> list[Rows]:
        """Its known rows."""
        known = self.above.sure
        target = torch.where(known, self.above.values, 0.0)
        return [Rows(KnownRows(known), target, torch.where(known, 1 / self.above.noise, 0.0))] if known.any() else []

    def delta(self) -> Tensor:
        """delta at the input."""
        return self.above.delta

    @property
    def noise(self) -> float:
        """None: there are no gradient rows."""
        return 0.0

    def cautious(self) -> "IdentitySource":
        """The same: there is no channel to leave out."""
        return self

    def without_outliers(self, u: Tensor) -> "IdentitySource":
        """The same."""
        return self

    def coarser(self, factor: float) -> "IdentitySource":
        """With masks for so many times the noise."""
        return replace(self, above=self.above.coarser(factor))

    def suspicion(self, u: Tensor) -> Tensor:
        """None: it has no gradient rows that could tell."""
        return torch.zeros_like(u)

    def decided(self, u: Tensor) -> "IdentitySource":
        """The same."""
        return self


Source = LayerSource | IdentitySource


def _stand_out(squares: Tensor) -> Tensor:
    """Which channels' squared residuals (c,) are far above the others'."""
    return squares > STANDS_OUT**2 * squares.median()


def _channels(t: Tensor) -> Tensor:
    """(B, c, ...) as (c, B * positions)."""
    return t.transpose(0, 1).flatten(1)


# ----------------------------------------------------------------------------------------------------
# The walk


@dataclass(frozen=True)
class Update:
    """What the walk takes from the shared update.

    Attributes:
        gradients: by parameter name.
        batch_size: B.
        additive: standard deviation of noise that was added to them, beside rounding.
    """

    gradients: Mapping[str, Tensor]
    batch_size: int
    additive: float = 0.0

    def precision(self, name: str) -> float:
        """Relative rounding error of a layer's gradient."""
        gradient = self.gradients.get(f"{name}.weight")
        return FLOOR if gradient is None else max(FLOOR, precision_of(gradient))

    def of(self, name: str, like: Tensor) -> Tensor | None:
        """B G of a layer's weight, in the dtype and place of `like`; None where the update has none."""
        gradient = self.gradients.get(f"{name}.weight")
        return None if gradient is None else self.batch_size * gradient.to(like)


@torch.no_grad()
def descend(
    chain: Chain,
    image_shape: Sequence[int],
    update: Update,
    start: int,
    inputs: Tensor,
    labels: Tensor,
    *,
    generator: torch.Generator,
    uncertainty: Tensor | None = None,
    deadline: float = math.inf,
) -> Descent:
    """Walk down from the inputs (B, ...) of stage `start`, with labels (B,), as far as the equations determine.

    Args:
        chain: of the model that the update was computed on, in float64.
        image_shape: (C, H, W).
        update: the gradients.
        start: index of the stage whose inputs are known.
        inputs: float64, exact but for noise.
        labels: class indices.
        generator: what rehearsals are drawn from, on the CPU.
        uncertainty: (B,) relative error of each image's inputs, where it is known; rounding's otherwise.
        deadline: of `time.perf_counter`, after which no layer is begun.
    """
    walk = _Walk(update, generator, deadline)
    shapes, lowest = input_shapes(chain, image_shape), unmixed_from(chain)
    point = _first_point(chain, start, inputs, labels, uncertainty)
    known, walk.noises[chain[start].name] = {start: inputs}, point.noise
    for index in reversed(range(start)):
        stage = chain[index]
        began = time.perf_counter()
        try:
            if index < lowest:
                raise UndeterminedError("BatchNorm in training mode mixes the images of the batch")
            if _is_elementwise(stage.module):
                point = below(stage.module, point, shapes[index])
                continue
            walk.needs_all = not any(parametrised(chain[:index]))
            if walk.needs_all and walk.behind.any():
                raise UndeterminedError(f"pixels come of all images or of none: {int(walk.behind.sum())} are behind")
            is_after_relu = after_relu(chain[:index])
            sources, way = walk.sources(stage, point, shapes[index], is_after_relu)
            u, sources = walk.solve(stage.name, sources, way, is_after_relu)
        except UndeterminedError as stop:
            if not walk.records or walk.records[-1].determined:
                seconds = time.perf_counter() - began
                walk.records.append(Record(stage.name, False, str(stop), seconds=seconds))
            break
        known[index] = u
        if index:
            point = _point(u, sum(source.delta() for source in sources), walk.noise)
    return Descent(known, walk.inner, walk.noises, walk.records)


def after_relu(chain: Chain) -> bool:
    """Whether what comes out of the chain is out of a ReLU, perhaps pooled or flattened, so not negative."""
    for stage in reversed(chain):
        if not isinstance(stage.module, (nn.Flatten, nn.Identity, nn.Dropout, nn.MaxPool2d, nn.AvgPool2d)):
            return isinstance(stage.module, nn.ReLU)
    return False


def without_noise(values: Tensor, noise: Tensor) -> Tensor:
    """What came out of a ReLU, with zeros where it was zero but for noise (broadcasts to the values)."""
    return torch.where(values > ZERO * noise, values, 0.0)


def _is_elementwise(module: object) -> bool:
    return not isinstance(module, (Residual, nn.Linear, nn.Conv2d))


def _first_point(chain: Chain, start: int, inputs: Tensor, labels: Tensor, uncertainty: Tensor | None) -> Point:
    leaf = inputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = nn.functional.cross_entropy(run(chain[start:], leaf), labels, reduction="sum")
        (delta,) = torch.autograd.grad(loss, leaf)
    size = _size(inputs)
    shows = after_relu(chain[:start])  # what is below zero measures the noise better
    spread = torch.zeros_like(size) if shows or uncertainty is None else uncertainty.view(size.shape) * size
    return _point(inputs, delta, noise_of(inputs, spread, shows))


def _point(u: Tensor, delta: Tensor, noise: Tensor) -> Point:
    """All known, and no ReLU behind it yet."""
    return Point(
        u, torch.ones_like(u, dtype=torch.bool), delta, torch.zeros_like(u), noise, torch.full_like(u, math.inf)
    )


class _Walk:
    """What the walk carries along: the update, the records, and the activations found inside residual stages."""

    def __init__(self, update: Update, generator: torch.Generator, deadline: float) -> None:
        self.update, self.generator, self.deadline = update, generator, deadline
        self.records: list[Record] = []
        self.inner: dict[str, Tensor] = {}
        self.inner_errors = torch.zeros(update.batch_size)  # relative, of what the last body's highest layer took in
        self.noises: dict[str, Tensor] = {}
        self.behind, self.needs_all = torch.zeros(update.batch_size, dtype=torch.bool), False
        self.noise = torch.zeros(0)  # of the last layer solved, of its input's shape

    def sources(
        self, stage: Stage, point: Point, shape: tuple[int, ...], is_after_relu: bool
    ) -> tuple[list[Source], Way]:
        """Whatever says something of the input, of that shape, of a layer or residual stage, and how to find it."""
        alone = Alone((len(point.values), *shape), self.generator, self.deadline)
        if not isinstance(stage.module, Residual):
            return [self._layer(stage, point, shape)], alone
        block = _Block(stage.module, point, shape, is_after_relu)
        body, output, flips, way = self._branch(stage.module.body, point.untold(), shape, block)
        point = point.flipped(flips)
        rest = point.untold() if output is None else self._without(output, point)
        shortcut, _, _, _ = self._branch(stage.module.shortcut, rest, shape, block)
        return [*body, *shortcut], way or alone

    def _without(self, output: Tensor, point: Point) -> Point:
        """What the shortcut has put out, as exactly as what the body has is known."""
        errors = beside(self.inner_errors.to(output), output) * _size(output)
        return replace(point, values=point.values - output, noise=point.noise.hypot(errors))

    def _layer(self, stage: Stage, point: Point, shape: tuple[int, ...]) -> LayerSource:
        module = stage.module
        try:
            linear = LinearMap.of(module, shape)
        except ValueError as error:
            raise UndeterminedError(str(error)) from None
        width = len(module.weight)
        return LayerSource(
            name=stage.name,
            map=linear,
            bias=module.weight.new_zeros(width) if module.bias is None else module.bias.detach(),
            above=point,
            gradient=self.update.of(stage.name, point.values),
            precision=self.update.precision(stage.name),
            additive=self.update.additive * self.update.batch_size,
            left_out=torch.zeros(width, dtype=torch.bool, device=point.values.device),
            doubt=self.doubt.to(point.values),
        )

    def _branch(
        self, chain: Chain, point: Point, shape: tuple[int, ...], block: "_Block"
    ) -> tuple[list[Source], Tensor | None, Tensor, Way | None]:
        """What a branch says of its input.

        Also its output, once a layer in it is solved, flips of the point's mask, and how to find the block's input
        where a layer was only found together with it.
        """
        output, flips, same_mask, onward = None, torch.zeros_like(point.known), True, None
        shapes = input_shapes(chain, shape) if chain else []
        for index in reversed(range(len(chain))):
            stage = chain[index]
            if _is_elementwise(stage.module):
                point = below(stage.module, point, shapes[index])
                same_mask = same_mask and isinstance(stage.module, nn.BatchNorm2d)
                continue
            is_after_relu = after_relu(chain[:index]) if index else block.is_after_relu
            sources, way = self.sources(stage, point, shapes[index], is_after_relu)
            if index == 0:
                return sources, output, flips, onward
            if chain is block.module.body and 0 < way.count(sources) < way.unknowns:
                within = Within(self._together(block, index, point.delta))
                way = within if within.count(sources) >= WORTH * within.unknowns else way
            u, solved = self.solve(stage.name, sources, way, is_after_relu)
            if isinstance(way, Within):
                onward = Whole(way.together, rows_of(solved))
            if output is None:
                output, self.inner_errors = run(chain[index:], u), self.records[-1].noise
                if same_mask:  # the ReLU behind the block is the one that these equations have judged
                    flips = (solved[0].above.delta != sources[0].above.delta).view_as(flips)
            self.inner[stage.name] = u
            point = _point(u, sum(source.delta() for source in solved), self.noise)
        return [IdentitySource(point)], output, flips, onward

    def _together(self, block: "_Block", index: int, delta: Tensor) -> Together:
        """All that is known of a block, around a layer of its body, with delta at that layer's output."""
        return Together(
            block.module,
            index,
            (len(delta), *block.shape),
            IdentitySource(block.above).rows(),
            delta,
            is_positive=block.is_after_relu,
            generator=self.generator,
            deadline=self.deadline,
        )

    def solve(self, name: str, sources: list[Source], way: Way, is_after_relu: bool) -> tuple[Tensor, list[Source]]:
        """The input that all sources agree on, and the sources with their masks as decided.

        Raises:
            UndeterminedError: the equations leave it open, or contradict each other.
        """
        began = time.perf_counter()
        if began > self.deadline:
            raise UndeterminedError("no time is left")
        equations, unknowns = way.count(sources), way.unknowns
        if equations < unknowns:
            self._record(name, f"{equations} equations for {unknowns} unknowns", equations, unknowns, began=began)
        taken, noise = sources, way.noise(sources)
        error = way.rehearsed(sources, noise) if way.is_linear else None
        if error is not None and not self._is_determined(error):
            self._record(name, _comes_back(error), equations, unknowns, math.nan, float(error.max()), began=began)
        u, solution, sources = self._settle(taken, way, NOISE * noise)
        if not solution.residual < NOISE * noise:
            other = self._coarser(taken, way)
            if other is not None and other[1].residual < solution.residual:
                u, solution, sources = self._settle(other[2], way, NOISE * noise)
        flips = sum(_changes(old, new) for old, new in zip(taken, sources, strict=True))
        if error is not None:
            error = error * max(1.0, solution.residual / noise)  # the equations are linear, and so are errors in noise
        if error is None or (flips and not self._worst(error) < DETERMINED * CLEARLY):
            error = way.rehearsed(sources, max(noise, solution.residual))
        self.noise = noise_of(u, way.spread(sources, u, solution, error), is_after_relu)
        self.noises[name] = self.noise
        errors = (_size(self.noise) / _size(u)).flatten().cpu()
        reason = ""
        if solution.stopped == "deadline":
            reason = "no time was left"
        elif not self._is_determined(error):
            reason = _comes_back(error)
        elif not solution.residual < (max(TRUSTED, CONTRADICTED * noise) if way.is_linear else NOISE * noise):
            reason = f"its equations contradict each other by {solution.residual:.1e}"
        elif not self._is_determined(errors):
            reason = f"it came out with an error of {float(errors.max()):.1e} of its size"
        self._record(
            name, reason, equations, unknowns, solution.residual, float(error.max()), errors, flips,
            int(self.behind.sum()), solution.iterations, began=began,
        )  # fmt: skip
        return u, sources

    @property
    def doubt(self) -> Tensor:
        """(B,) of the images that have fallen behind: with errors e, so is a share e of their masks, about."""
        if not self.behind.any():
            return torch.zeros(len(self.behind))
        return torch.where(self.behind, self.records[-1].noise.clamp(max=1).sqrt(), 0.0)

    def _is_determined(self, error: Tensor) -> bool:
        """Whether relative errors (B,) are small, but for a few images that fall behind; these are noted."""
        behind = self.behind | ~(error < DETERMINED).cpu()
        if int(behind.sum()) > (0 if self.needs_all else BEHIND * len(behind)):
            return False
        self.behind = behind
        return True

    def _worst(self, error: Tensor) -> float:
        """The largest of those that have not fallen behind."""
        return float(error.cpu()[~self.behind].max())

    def _settle(self, sources: list[Source], way: Way, enough: float) -> tuple[Tensor, Solution, list[Source]]:
        """Solve; if the residual is more than enough, let it decide the doubtful masks, and solve again."""
        u, solution = way.solve(sources)
        if solution.residual < enough or time.perf_counter() > self.deadline:
            return self._without_suspects(u, solution, sources, way, enough)
        best = u, solution, sources
        trial = way.solve([source.cautious() for source in sources])[0] if way.is_linear else u
        for _ in range(ROUNDS):
            decided = [source.decided(trial) for source in sources]
            if not any(_changes(old, new) for old, new in zip(sources, decided, strict=True)):
                break
            sources = decided
            u, solution = way.solve(sources)
            if solution.residual < best[1].residual:
                best = u, solution, sources
            if solution.residual < enough or time.perf_counter() > self.deadline:
                break
            trial, _ = way.solve([source.without_outliers(u) for source in sources])
        return self._without_suspects(*best, way, enough)

    def _without_suspects(
        self, u: Tensor, solution: Solution, sources: list[Source], way: Way, enough: float
    ) -> tuple[Tensor, Solution, list[Source]]:
        """Change the most suspicious entries of the masks and solve again, as long as that helps.

        A single wrong mask of a quiet image leaves no more than noise might have left, ten times what rounding has. But
        it leaves it in one channel and one direction, so it is found all the same.
        """
        for _ in range(SUSPECTS):
            if time.perf_counter() > self.deadline or (solution.residual < enough and not way.is_linear):
                break
            least = NOTABLE * _squared_residual(sources, u) if solution.residual < enough else 0.0
            suspicions = [source.suspicion(u) for source in sources]
            worst = max(float(each.max()) for each in suspicions)
            if not worst > least:
                break
            trials = [_strongest(each, least) for each in suspicions], [each == worst for each in suspicions]
            for chosen in trials[:1] if all(map(torch.equal, *trials)) else trials:
                pairs = zip(sources, chosen, strict=True)
                tried = [replace(source, above=source.above.flipped(flips)) for source, flips in pairs]
                other = way.solve(tried)
                if other[1].residual < solution.residual:
                    break
            else:
                break
            (u, solution), sources = other, tried
        return u, solution, sources

    def _coarser(self, sources: list[Source], way: Way) -> tuple[Tensor, Solution, list[Source]] | None:
        """The masks for other noise than was measured that leave the least residual; None if there are no others."""
        best = None
        for factor in COARSER:
            tried = [source.coarser(factor) for source in sources]
            if time.perf_counter() > self.deadline:
                break
            if any(_changes(old, new) for old, new in zip(sources, tried, strict=True)):
                u, solution = way.solve(tried)
                best = min(best or (u, solution, tried), (u, solution, tried), key=lambda found: found[1].residual)
        return best

    def _record(self, name: str, reason: str, *facts: object, began: float) -> None:
        self.records.append(Record(name, not reason, reason, *facts, seconds=time.perf_counter() - began))
        if reason:
            raise UndeterminedError(reason)


@dataclass(frozen=True)
class _Block:
    """A residual stage on the walk.

    Attributes:
        module: it.
        above: what is known of its output.
        shape: of its input, one image's.
        is_after_relu: whether that input is not negative.
    """

    module: Residual
    above: Point
    shape: tuple[int, ...]
    is_after_relu: bool


def _comes_back(error: Tensor) -> str:
    return f"a known input comes back with a relative error of {float(error.max()):.1e} only"


def _strongest(suspicion: Tensor, least: float) -> Tensor:
    """The most suspicious entry of each channel, where it is more so than `least`: a mask (B, c, ...)."""
    most = suspicion.amax((0, *range(2, suspicion.dim())), keepdim=True)
    return (suspicion > least) & (suspicion == most)


def _squared_residual(sources: Sequence[Source], u: Tensor) -> float:
    """Of all equations at u, weighted."""
    return sum(float(rows.residual(u).square().sum()) for rows in rows_of(sources))


def _changes(before: Source, after: Source) -> int:
    """Entries of the mask that differ."""
    return int((before.above.delta != after.above.delta).sum())
