"""What an attack starts from: what is known of the images beforehand, first images, first labels."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attack.local.local_labels import LocalLabels
from attack.read.signals import Signals
from network.chain import parametrised
from network.stage import Stage
from update.evidence import Evidence
from update.shared import SharedUpdate
from update.training import Order

# Expected relative error up to which activations are matched in the gradient's place. On LeNet, B = 8, they bring 30.5
# dB at 1e-3, 25.4 at 6e-3 and 23.7 at 1.3e-2, and as company of the gradient 28.1, 25.0 and 24.7; on a trained ConvNet,
# B = 4, 28.2 at 2e-2, and as its company 31.2.
FOLLOWED = 1e-2
START_NOISE = 0.02  # around the grey start: enough to tell images apart, too little to be seen in them

# The same where known activations tell them apart. A course below a max-pool begins with a heavy prior, to which usual
# noise is so rough that images turn black to be rid of it, where no slope reaches them: ResNet-18, 224 pixels, ends at
# 21.4 dB from 0.02 and at 43.8 from 1e-4.
FAINT = 1e-4

INITS = ("grey", "normal", "uniform", "randn", "standardised")

# Of CIFAR-10's colours. Attacks on models that normalise their images take them for public, and start in their units.
COLOUR_MEAN, COLOUR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Known:
    """What was read, or granted, of the batch before the first step. Images whose signals were read come first.

    Attributes:
        batch_size: B.
        signals: of the leading N images, or None.
        features: (M, d) of the leading M images, M = 0 if none are known.
        labels: class indices of the leading images, which then stay as they are, or None if all are to be optimised.
        start: the deepest stage, as an index of the model's chain, whose inputs are known of the N images; None if
            no signals were read.
        inputs: (N, ...), the inputs of that stage; of all their uses, (U, ...), in several passes.
        uses: the image of each of these inputs, where there were several passes; else empty.
        pixels: (M, C, H, W) the leading images themselves: all N where the known stage is the image itself, and
            those that lead further down than the others; None where there are none.
        likely: (N, C, H, W) in [0, 1], images to begin with in the place of grey ones; None where none are likelier.
        held: of the likely images, those that the attack leaves as they are.
        says_enough: whether the known inputs can take the gradient's place, see `attack.match.activations`.
        steps: the step of each of the N images, ascending, where each was read at its own step's weights; else empty.
        order: the images of each step, where it was found and is not that of minibatches in turn; else None.
        is_explained: whether the images make all of the first layer's movement, in whatever order the steps were made.
        drift: of several steps that were read as one gradient, see `attack.local.as_gradient`; else None.
        local_labels: labels that were found by training on grey images, or None.
        evidence: what the reading says against what was assumed, see `attack.read.evidence`.
        why_not: why nothing was read where that was tried, as a line; empty where something was.
        layers, recovered, seconds, is_aborted: of the reading, see `attack.read.reading.Reading`; a resumed run has no
            need of `recovered`.
    """

    batch_size: int
    signals: Signals | None
    features: Tensor
    labels: Tensor | None
    start: int | None = None
    inputs: Tensor | None = None
    uses: tuple[int, ...] = ()
    pixels: Tensor | None = None
    likely: Tensor | None = None
    held: tuple[int, ...] = ()
    says_enough: bool = True
    steps: Sequence[int] = ()
    order: Order | None = None
    is_explained: bool = False
    drift: float | None = None
    local_labels: LocalLabels | None = None
    evidence: tuple[Evidence, ...] = ()
    why_not: str = ""
    layers: Sequence[Mapping] = ()
    recovered: Mapping[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    is_aborted: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether the inputs of a stage are known of every image of the batch."""
        return self.inputs is not None and len(set(self.uses) or self.inputs) == self.batch_size

    @property
    def in_steps(self) -> bool:
        """Whether the images were read in the order of a client's steps."""
        return bool(self.steps)

    @property
    def is_replayed(self) -> bool:
        """Whether the client's steps, made again on what was read, were found to make the update."""
        return self.in_steps or self.drift is not None

    def drifted(self, drift: Tensor | None) -> "Known":
        """The same, signals no surer than a drift (N,) of their features; None: none."""
        return self if drift is None else replace(self, signals=self.signals.drifted(drift))

    def as_trained(self, update: SharedUpdate) -> SharedUpdate:
        """The update with the order of the client's images in its steps, where that was sought and is believed."""
        order, tried = self.order, self.local_labels
        if order is None and tried is not None and tried.is_believed:
            order = tried.order
        return update if order is None else replace(update, training=replace(update.training, order=order))

    @property
    def is_followed(self) -> bool:
        """Whether what is known of all images takes the place of the gradient, rather than standing beside it."""
        says_all = self.says_enough and self.uncertainty <= FOLLOWED
        return self.is_complete and (self.is_exact or says_all)

    @property
    def apart(self) -> int:
        """How many leading images an attack on known activations leaves out, since their pixels are known."""
        return 0 if self.pixels is None or self.is_exact else len(self.pixels)

    @property
    def noise(self) -> float:
        """Of the grey images to start from."""
        return FAINT if self.is_followed else START_NOISE

    @property
    def uncertainty(self) -> float:
        """The largest expected relative error of what was read; 0 of what is given without signals."""
        return float(self.signals.uncertainty.max()) if self.signals else 0.0

    def uncertainty_at(self, stage: Stage) -> float:
        """The largest expected relative error of a stage's inputs, larger where these were walked down to."""
        names = {layer.name for layer in parametrised([stage])}
        told = [row["uncertainty"] for row in self.layers if row["layer"] in names]  # the first takes the inputs
        return max(self.uncertainty, told[0] or 0.0) if told else self.uncertainty

    @property
    def errors(self) -> Tensor | None:
        """Expected relative errors (M,) of the features that signals gave; None of others."""
        return self.signals.uncertainty[: len(self.features)].to(self.features) if self.signals else None

    @property
    def is_exact(self) -> bool:
        """Whether every image of the batch is known already."""
        return self.pixels is not None and len(self.pixels) == self.batch_size


def all_labels(signals: Signals | None, others: Tensor | None, sizes: Sequence[int] = ()) -> Tensor | None:
    """Labels of the leading images: those of the signals, then whatever `others` (B,) has beyond them.

    `others` comes from another source and knows no order: its labels are matched to those of the signals one by one,
    and what is left belongs to the images that were not read. A label of the signals that it does not have takes the
    place of its last.

    Args:
        signals: that were read.
        others: labels from another source.
        sizes: images in each of a client's steps, where both are in their order: labels are matched step by step.
    """
    if signals is None or others is None:
        return others if signals is None else signals.labels
    found, first = [], 0
    for part in others.split(list(sizes) if sum(sizes) == len(others) else len(others)):
        own = signals.labels[first : first + len(part)]
        left = Counter(part.tolist())
        left.subtract(own.tolist())
        rest = [label for label in sorted(left) for _ in range(left[label])][: len(part) - len(own)]
        found += [own, own.new_tensor(rest)]
        first += len(part)
    return torch.cat(found)


def start_images(
    init: str,
    shape: tuple[int, ...],
    copies: int,
    generator: torch.Generator,
    given: Tensor | None = None,
    *,
    noise: float = START_NOISE,
) -> Tensor:
    """Images (R B, C, H, W) in [0, 1] that R copies of a batch of `shape` (B, C, H, W) start from.

    grey         0.5 and a little `noise`
    normal       clamped to [0, 1] (the published script of MAGIA)
    uniform
    randn        normal, as it falls (Zhu et al. 2019)
    standardised normal about the mean colour of CIFAR-10, with its standard deviation (Geiping et al. 2020)

    Anything else names the source of the images `given`.

    Raises:
        ValueError: the images given have another shape, or would start all copies alike.
    """
    drawn = (copies * shape[0], *shape[1:])
    if init == "grey":
        return 0.5 + noise * torch.randn(drawn, generator=generator)
    if init == "normal":
        return torch.randn(drawn, generator=generator).clamp(0, 1)
    if init == "uniform":
        return torch.rand(drawn, generator=generator)
    if init == "randn":
        return torch.randn(drawn, generator=generator)
    if init == "standardised":
        mean, std = colour_statistics(shape[1])
        return mean + std * torch.randn(drawn, generator=generator)
    if copies > 1:
        raise ValueError(f"--init {init}: {copies} restarts would all start from the same images")
    if given is None or given.shape != shape:
        found = "nothing" if given is None else f"images of shape {tuple(given.shape[1:])}"
        raise ValueError(f"--init {init}: it holds {found}, the update's images have {shape[1:]}")
    return given


def colour_statistics(channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C, 1, 1) of CIFAR-10's colours; of other than three channels their means."""
    values = (torch.tensor(v).view(-1, 1, 1) for v in (COLOUR_MEAN, COLOUR_STD))
    mean, std = (v if channels == len(v) else v.mean(0, keepdim=True).expand(channels, 1, 1) for v in values)
    return mean, std
