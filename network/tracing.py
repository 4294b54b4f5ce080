"""A model's chain of stages, read off its own forward pass by `torch.fx`: the one place that knows what can be walked.

A stage is a module that the model calls with one tensor, a function or method that stands for such a module (`relu`,
`max_pool2d`, `flatten`, see `network.kinds`), or the sum of two branches. The chain is read from the logits downwards.
Whatever else a forward pass does (concatenation, attention, weights used by hand) ends it: that, and all below it, is
one opaque stage, which is run as a whole. A model that cannot be traced still has a head, and all below it is opaque.
A model that does not end in a linear layer has no chain, and is attacked as a whole.
"""

import inspect

import torch
from torch import Tensor, nn

from network.graph import GraphReader, Tracer
from network.kinds import kind_of
from network.normalise import NAME, normalisation
from network.stage import Stage, run
from network.unwalked import Unwalked, is_close, last_linear

UNTRACED = "cannot be traced"
# What torch.fx says, in part, of forward passes that it cannot follow, and what that means.
IN_WORDS = {
    "control flow": "its forward pass decides by a tensor's values or sizes, as in an if or an assert",
    "cannot be iterated": "its forward pass loops over a tensor",
    "'len' is not supported": "its forward pass asks for the length of a tensor (len)",
    "Proxy": "its forward pass takes a tensor's size or entry for a plain number",
}
_READ_AS = "_chain_of_stages"  # the attribute in which a model keeps its chain, or why it has none; copies keep it too


def stages(model: nn.Module) -> list[Stage]:
    """The chain of a model in eval mode, from images to logits; its last stage is the linear head.

    A model is read once: its layers may change their weights and their place, not their order.

    Raises:
        ValueError: it has no chain; the message says what the reason was.
    """
    if _READ_AS not in vars(model):
        try:
            _keep(model, _chain_of(model))
        except ValueError as error:
            _keep(model, str(error))
    found = vars(model)[_READ_AS]
    if isinstance(found, str):
        raise ValueError(found)
    front = normalisation(model)
    return [*found] if front is None else [Stage(NAME, front), *found]


def stages_if_walked(model: nn.Module) -> list[Stage] | None:
    """The same, or None where the model has no chain."""
    try:
        return stages(model)
    except ValueError:
        return None


def why_not_walked(model: nn.Module) -> str:
    """Why the model, or the part of it below some stage, cannot be walked, in words; empty where all of it can."""
    try:
        parts = [stage for stage in stages(model) if isinstance(stage.module, Unwalked)]
    except ValueError as error:
        return str(error)
    return f"{parts[0].name} ({parts[0].module.reason})" if parts else ""


@torch.no_grad()
def verify(model: nn.Module, images: Tensor) -> None:
    """Never walk this model again if its chain and itself disagree on images (B, C, H, W).

    They do where it changes tensors in place that it uses again under another name, which its graph does not show. Its
    head is then all that is walked, as it is of a model that cannot be traced.
    """
    try:
        if is_close(run(stages(model), images), model(images)):
            return
        reason = "its graph is not what it computes"
    except Exception as error:  # the model's own code runs here
        reason = str(error).partition("\n")[0]
    is_headless = isinstance(vars(model)[_READ_AS], str) and UNTRACED not in reason
    head = None if is_headless else last_linear(model, images)
    _keep(model, reason if head is None else _head_alone(model, head, reason))
    if head is not None and not is_close(run(stages(model), images), model(images)):
        _keep(model, reason)


def _keep(model: nn.Module, chain: list[Stage] | str) -> None:
    vars(model)[_READ_AS] = chain  # past the registry of modules: a container would call what it finds there


def _head_alone(model: nn.Module, head: str, reason: str) -> list[Stage]:
    return [Stage(f"all below {head}", Unwalked(model, reason, head=head)), Stage(head, model.get_submodule(head))]


def _chain_of(model: nn.Module) -> list[Stage]:
    tracer = Tracer()
    try:
        graph = tracer.trace(model, concrete_args=_defaults(model))
    except Exception as error:  # the model's own code runs here, on stand-ins for tensors
        raise ValueError(f"{type(model).__name__} {UNTRACED}: {_in_words(error)}") from None
    chain = GraphReader(model, graph, tracer.node_name_to_scope).chain()
    while chain and kind_of(chain[-1].module).is_reshape:
        chain.pop()  # of logits (B, K), which stay as they are
    if not chain or not isinstance(chain[-1].module, nn.Linear):
        raise ValueError(
            "the last stage is not linear" if not chain else f"the last stage, {chain[-1].name}, is not linear"
        )
    return chain


def _in_words(error: Exception) -> str:
    """What keeps a forward pass from being traced: torch's own message of common reasons speaks to its developers."""
    told = str(error).partition("\n")[0]
    return next((words for part, words in IN_WORDS.items() if part in told), told)


def _defaults(model: nn.Module) -> dict[str, object]:
    """What `forward` takes beside images, at its defaults."""
    taken = list(inspect.signature(model.forward).parameters.values())[1:]
    return {p.name: p.default for p in taken if p.default is not p.empty}
