"""One door to torchvision, which is imported only where it is needed.

Beside a torch build of another kind (a CPU-only torch with the package index's torchvision wheel, say), torchvision
cannot load its compiled operators, and `import torchvision` dies while registering shapes for operators that do not
exist (pytorch/vision #9085). Nothing here needs those operators, so they are declared, without a body, when and only
when that import has failed.
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch

_MISSING = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
T = TypeVar("T")
_declared: list[torch.library.Library] = []  # a declaration lives as long as its Library


def torchvision() -> ModuleType:
    """The torchvision package with its `datasets`, `models` and `utils`."""
    try:
        return _import()
    except RuntimeError as error:
        if not _is_of_operators(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _MISSING:
        library.define(schema)
    _declared.append(library)
    return _import()


def with_torchvision(function: Callable[[], T]) -> T:
    """What a function returns that may import torchvision, or a library such as timm that does, by itself."""
    try:
        return function()
    except Exception as error:
        if not _is_of_operators(error):
            raise
    torchvision()
    return function()


def _is_of_operators(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is of torchvision's operators."""
    while error is not None:
        if isinstance(error, RuntimeError) and "torchvision::" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _import() -> ModuleType:
    for name in ("torchvision.datasets", "torchvision.models", "torchvision.utils"):
        importlib.import_module(name)
    return sys.modules["torchvision"]
