"""What a reading has found, whichever way it went."""

from dataclasses import dataclass

from torch import Tensor

from attack.read.signals import Signals
from update.evidence import Evidence
from update.training import Order


class ReadingAbortedError(ValueError):
    """The clock has ended a reading before any image was told apart; the message says which layers were asked."""


@dataclass(frozen=True)
class Reading:
    """What a network's gradient says of N of the batch's B images.

    Attributes:
        signals: of the N images at the head, surest first, or step by step.
        start: index in the chain of the deepest stage whose inputs are known for all N images.
        inputs: (N, ...) float64, the inputs of that stage, in the same order; images themselves where `start` is 0.
        layers: a row for each layer, from the images up, see `layer_rows`; None where nothing was measured.
        recovered: inputs (n, ...) of every layer and residual stage that were believed, by its name; n may be less than
            N, and the order another, where a layer was asked and no walk led from it.
        seconds: wall time of the reading.
        is_aborted: whether the clock has ended it: what was certain by then is all there is.
        in_steps: whether the images are in the order of a client's steps, all of them at each step's own weights.
        order: the images of each step, where there are several and their order was found; None: in turn, or not known.
        uses: the image of each of the `inputs`, where images were used in several passes; else empty.
        is_explained: whether the images make all of the first layer's movement, in whatever order the steps were made.
        likely: (N, C, H, W) in [0, 1], images that are likely and not sure, to begin an attack with; None: none are.
        pixels: (M, C, H, W) of the leading images, where not all of the N lead down to theirs; else None.
        doubts: what says that images were not used in one step. drift: from one, see `attack.local.as_gradient`.
    """

    signals: Signals
    start: int
    inputs: Tensor
    layers: list[dict]
    recovered: dict[str, Tensor]
    seconds: float
    is_aborted: bool = False
    in_steps: bool = False
    order: Order | None = None
    uses: tuple[int, ...] = ()
    is_explained: bool = False
    likely: Tensor | None = None
    pixels: Tensor | None = None
    doubts: tuple[Evidence, ...] = ()
    drift: float | None = None

    def __len__(self) -> int:
        return len(self.signals)
