"""Residual stages: two chains side by side, whose outputs add up."""

from network.kinds.kind import Kind, Shape
from network.stage import Residual


class ResidualKind(Kind):
    """body(x) + shortcut(x). The walk solves such a stage as a whole, and asks the kinds of the layers in it."""

    modules = (Residual,)

    def why_not(self, module: Residual, inputs: Shape, outputs: Shape) -> str:
        """A sum alone does not tell its parts."""
        return "a sum does not tell what was added up"
