"""The opaque stage, a part of the model that is run as a whole: nothing is told of its inputs."""

from network.kinds.kind import Kind, Shape
from network.unwalked import Unwalked


class UnwalkedKind(Kind):
    """The part of a model below the stages that can be walked."""

    modules = (Unwalked,)

    def why_not(self, module: Unwalked, inputs: Shape, outputs: Shape) -> str:
        """What in the part cannot be walked."""
        return f"the rest of the model is run as a whole: {module.reason}"
