"""From a place where outputs are known to the layer whose input is sought: a way that can be gone once more.

The weights along a client's steps are found with the input itself, and with them what is known at the end of the way.
"""

from dataclasses import dataclass

from attack.walk.sources import Source
from network.known_outputs import KnownOutputs
from network.stage import Chain, Stage


@dataclass(frozen=True)
class Way:
    """From a place where outputs are known down to another, past stages that are not solved for.

    Attributes:
        top: what is known where it begins.
        passed: the stages, in the order of the walk, each with the shape of its input and the stages below it.
        outputs: what is known where it ends.
        norm: the BatchNorm in training mode that was passed last, which is a part of the equations of the layer below.
        held: a gate whose outputs are not known, and the stages below it that were passed, in the order in which they
            are applied: they too are a part of these equations, and `outputs` are the gate's.
    """

    top: KnownOutputs
    passed: tuple[tuple[Stage, tuple[int, ...], Chain], ...]
    outputs: KnownOutputs
    norm: Stage | None
    held: Chain = ()

    @classmethod
    def from_known(cls, top: KnownOutputs) -> "Way":
        """Where it begins."""
        return cls(top, (), top, None)


@dataclass(frozen=True)
class Given:
    """A source of equations for an input, and the way that it ends."""

    source: Source
    way: Way
    layer: Stage | None  # None: the input itself
    shape: tuple[int, ...]

    @property
    def stages(self) -> Chain:
        """From the input to the place where the way begins."""
        passed = [stage for stage, *_ in reversed(self.way.passed)]
        return passed if self.layer is None else [self.layer, *passed]
