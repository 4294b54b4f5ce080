"""Models from outside: torchvision's by name, and a user's own from a Python file that the user names.

`torchvision:NAME` takes a classifier of torchvision. `FILE.py:FACTORY` runs the file and calls FACTORY in it, without
arguments; what comes back is the model. Nothing but a file that was named in this way is ever executed.
"""

import importlib.util
import inspect
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType

import torch
from torch import Tensor, nn

from network.derivatives import make_twice_differentiable
from network.parametrised import make_copyable
from network.tracing import verify
from network.vision import torchvision, with_torchvision

TORCHVISION = "torchvision:"
OUTSIDE = "torchvision:NAME, FILE.py:FACTORY"  # as they are spelt
FILE = re.compile(r"(.+\.py):(\w+)")
LOGITS = ("logits", "out", "output", "prediction", "predictions")  # usual names of logits in a model's output
DRAWN_HEAD = (
    "torchvision starts the last layer of this model at zero, where no gradient reaches the layers below: its weights "
    "were drawn, as those of a model behind its first step; --weights takes yours"
)
_DRAWN = "_head_was_drawn"  # the attribute of a model for which that holds
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
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(f"{name} has weights on the meta device, which have no values: load them first")
    make_copyable(model)
    make_twice_differentiable(model)
    with blamed(f"{name} cannot be brought to the CPU:"):
        return model.to("cpu", torch.float32).eval()


def try_out(model: nn.Module, name: str, image_shape: Sequence[int], num_classes: int, seeded: torch.Generator) -> None:
    """See whether a model takes images (C, H, W) to K logits each; parameters that it does not use are frozen.

    Raises:
        ValueError: it does not.
    """
    images = torch.rand(PROBES, *image_shape, generator=seeded)
    shape = "x".join(map(str, image_shape))
    way = "set --image_size, such as 24 or 16x24, if it takes others"
    with blamed(f"{name} does not take images of {shape} ({way}):"):
        logits, again = model(images), model(images)
    if isinstance(logits, Tensor) and not torch.equal(torch.nan_to_num(again), torch.nan_to_num(logits)):
        raise ValueError(f"{name} gives other logits for the same images in eval mode: it draws random numbers")
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != PROBES:
        raise ValueError(
            f"{name} puts out {_kind(logits)} for {PROBES} images of {shape}, not logits (B, K){_way_to_logits(logits)}"
        )
    if logits.shape[1] != num_classes and (logits.shape[1], num_classes) != (1, 2):  # one logit: `network.one_logit`
        raise ValueError(
            f"{name} has {logits.shape[1]} classes, not {num_classes}: set --num_classes {logits.shape[1]}"
        )
    for own, values in model.state_dict().items():
        if not torch.isfinite(values).all():
            raise ValueError(f"{name}: weight {own!r} is not finite")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not logits.requires_grad:
        raise ValueError(f"{name} has no parameter that is trained")
    with blamed(f"{name} cannot be differentiated:"):
        gradients = torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
    try_batch(model, name, image_shape, PROBES + 1, num_classes)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    verify(model, images)


@torch.no_grad()
def try_batch(model: nn.Module, name: str, image_shape: Sequence[int], count: int, num_classes: int) -> None:
    """See whether a model from outside takes a batch of so many images (C, H, W); it may be made for fixed numbers.

    Raises:
        ValueError: it does not.
    """
    shape = "x".join(map(str, image_shape))
    with blamed(f"{name} takes {PROBES} images of {shape} and not {count}:"):
        logits = model(torch.full((count, *image_shape), 0.5).to(next(model.parameters())))
    if logits.shape != (count, num_classes) and (logits.shape, num_classes) != ((count, 1), 2):
        raise ValueError(f"{name} takes {PROBES} images of {shape} and not {count}: it puts out {_kind(logits)}")


def _from_torchvision(name: str, num_classes: int) -> Callable[[], nn.Module]:
    models, wanted = torchvision().models, name.removeprefix(TORCHVISION)
    known = models.list_models(module=models)  # classifiers alone: detectors would fetch the weights of their bodies
    if wanted not in known:
        raise ValueError(f"--model {name}: torchvision has no classifier {wanted!r}; it has {', '.join(known)}")
    return lambda: _with_drawn_head(models.get_model(wanted, weights=None, num_classes=num_classes))


@torch.no_grad()
def _with_drawn_head(model: nn.Module) -> nn.Module:
    """A model whose last layer is not zero, as torchvision's vision transformers have it before their first step."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if layers and not layers[-1].weight.any():
        layers[-1].reset_parameters()
        vars(model)[_DRAWN] = True
    return model


def notes_of(model: nn.Module) -> list[str]:
    """What was assumed of the weights of a model from outside, in sentences."""
    return [DRAWN_HEAD] if vars(model).get(_DRAWN) else []


def _from_file(name: str) -> Callable[[], object]:
    path, factory = FILE.fullmatch(name).groups()
    if not Path(path).is_file():
        raise ValueError(f"--model {name}: no such file: {path}")
    beside = _importing_from(Path(path).resolve().parent)
    executed = beside(lambda: with_torchvision(lambda: _executed(Path(path))))
    found = getattr(_called(executed, name), factory, None)
    if not callable(found):
        raise ValueError(f"--model {name}: {path} has no function {factory!r}")
    if needed := _arguments_of(found):
        raise ValueError(
            f"--model {name}: {factory} needs {', '.join(needed)}, and is called without arguments: name a function "
            f"that returns {factory}(...)"
        )
    return beside(lambda: with_torchvision(found))


def _arguments_of(function: Callable) -> list[str]:
    """The names of the arguments that a function cannot be called without; none where it does not tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in parameters if each.default is each.empty and each.kind not in optional]


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
    """What a user's code returns."""
    with blamed(f"--model {name} raises"):
        return function()


@contextmanager
def blamed(text: str) -> Iterator[None]:
    """Whatever a user's code raises is the user's to read, in a line; even what would end the program.

    A KeyboardInterrupt is the model's own, unless the signal of Ctrl-C has come.

    Raises:
        ValueError: the block raises something; the message begins with `text`.
    """
    came = []
    before = signal.getsignal(signal.SIGINT)
    is_watched = callable(before) and threading.current_thread() is threading.main_thread()

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        before(number, frame)

    if is_watched:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    except BaseException as error:
        if came and isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(f"{text} {_first_line(error)}") from None
    finally:
        if is_watched:
            signal.signal(signal.SIGINT, before)


def _way_to_logits(output: object) -> str:
    """How a model is to be wrapped that puts out an object with its logits; empty for a tensor."""
    if isinstance(output, Tensor):
        return ""
    part = "[0]"
    if isinstance(output, Mapping):
        part = f"[{next((key for key in output if key in LOGITS), next(iter(output), 'logits'))!r}]"
    elif not isinstance(output, (tuple, list)) or hasattr(output, "_fields"):
        part = f".{next((key for key in LOGITS if hasattr(output, key)), LOGITS[0])}"
    return (
        f": let FACTORY return a subclass of the model whose forward returns the logits alone, "
        f"`def forward(self, x): return super().forward(x){part}`"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _kind(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"
