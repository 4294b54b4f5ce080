"""Models from outside: torchvision's by name, and a user's own from a Python file that the user names.

`torchvision:NAME` takes a classifier of torchvision. `FILE.py:FACTORY` runs the file and calls FACTORY in it, without
arguments; what comes back is the model. Nothing but a file that was named in this way is ever executed.
"""

import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from network.derivatives import make_twice_differentiable
from network.parametrised import make_copyable
from network.tracing import verify
from network.vision import torchvision, with_torchvision

TORCHVISION = "torchvision:"
OUTSIDE = "torchvision:NAME, FILE.py:FACTORY"  # as they are spelt
FILE = re.compile(r"(.+\.py):(\w+)")
PROBES = 2  # images that a model is tried on: one alone would not show whether it keeps images apart


def is_outside(name: str) -> bool:
    """Whether a model's name is one of a model from outside."""
    return name.startswith(TORCHVISION) or is_file(name)


def is_file(name: str) -> bool:
    """Whether a model's name is that of a Python file and something in it."""
    return FILE.fullmatch(name) is not None


def resolved(name: str) -> str:
    """The name of a model, the way to its file spelt in the one way that is the same for all."""
    file = FILE.fullmatch(name)
    return f"{Path(file[1]).resolve()}:{file[2]}" if file else name


def outside_model(name: str, *, num_classes: int, generator: torch.Generator) -> nn.Module:
    """A model from outside in eval mode, float32 on the CPU.

    Args:
        name: `torchvision:NAME` or `FILE.py:FACTORY`.
        num_classes: K, for torchvision's; a file's model has its own.
        generator: what weights that are drawn on the way are drawn from.

    Raises:
        ValueError: torchvision has no such classifier, or the file is missing, raises, or makes something else.
    """
    make = _from_torchvision(name, num_classes) if name.startswith(TORCHVISION) else _from_file(name)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of coming versions: what a library says to those who call it
        torch.default_generator.manual_seed(seed)
        model = _called(make, name)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returns {_kind(model)}, not a torch.nn.Module")
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # what a layer gave out stays as it was for whoever keeps it
    make_copyable(model)
    make_twice_differentiable(model)
    return model.to("cpu", torch.float32).eval()


def try_out(model: nn.Module, name: str, image_shape: Sequence[int], num_classes: int, seeded: torch.Generator) -> None:
    """See whether a model takes images (C, H, W) to K logits each; parameters that it does not use are frozen.

    Raises:
        ValueError: it does not.
    """
    images = torch.rand(PROBES, *image_shape, generator=seeded)
    shape = "x".join(map(str, image_shape))
    try:
        logits, again = model(images), model(images)
    except Exception as error:  # the model's own code runs here
        raise ValueError(f"{name} does not take images of {shape}: {_first_line(error)}") from None
    if isinstance(logits, Tensor) and not torch.equal(torch.nan_to_num(again), torch.nan_to_num(logits)):
        raise ValueError(f"{name} gives other logits for the same images in eval mode: it draws random numbers")
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != PROBES:
        raise ValueError(f"{name} puts out {_kind(logits)} for {PROBES} images of {shape}, not logits (B, K)")
    if logits.shape[1] != num_classes:
        raise ValueError(
            f"{name} has {logits.shape[1]} classes, not {num_classes}: set --num_classes {logits.shape[1]}"
        )
    for own, values in model.state_dict().items():
        if not torch.isfinite(values).all():
            raise ValueError(f"{name}: weight {own!r} is not finite")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not logits.requires_grad:
        raise ValueError(f"{name} has no parameter that is trained")
    try:
        gradients = torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
    except RuntimeError as error:
        raise ValueError(f"{name} cannot be differentiated: {_first_line(error)}") from None
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    verify(model, images)


def _from_torchvision(name: str, num_classes: int) -> Callable[[], nn.Module]:
    models, wanted = torchvision().models, name.removeprefix(TORCHVISION)
    known = models.list_models(module=models)  # classifiers alone: detectors would fetch the weights of their bodies
    if wanted not in known:
        raise ValueError(f"--model {name}: torchvision has no classifier {wanted!r}; it has {', '.join(known)}")
    return lambda: models.get_model(wanted, weights=None, num_classes=num_classes)


def _from_file(name: str) -> Callable[[], object]:
    path, factory = FILE.fullmatch(name).groups()
    if not Path(path).is_file():
        raise ValueError(f"--model {name}: no such file: {path}")
    beside = _importing_from(Path(path).resolve().parent)
    executed = beside(lambda: with_torchvision(lambda: _executed(Path(path))))
    found = getattr(_called(executed, name), factory, None)
    if not callable(found):
        raise ValueError(f"--model {name}: {path} has no function {factory!r}")
    return beside(lambda: with_torchvision(found))


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """A file's neighbours may be imported while it is run and while its model is made; behind all that is installed."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _executed(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"model_from_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def _called(function: Callable[[], object], name: str) -> object:
    """What a user's code returns; whatever it raises is the user's to read, in a line."""
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise ValueError(f"--model {name} raises {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _kind(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"
