"""Gates on the walk (squeeze-and-excitation): what a gate multiplies follows from its outputs, if its layers agree.

The means of a gate's inputs solve equations that may have several solutions (`network.kinds.product`). The gradients of
the gate's own layers are sums over the images of what each image's delta and inputs give there. At the right inputs
they are those of the update, and at others they are not.

In front of a sum a gate's outputs are not known. The layer in front of it is then found together with the block
(`attack.walk.block`), with equations in which the gate makes delta of what the layer puts out (`GatedGradientRows`).
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from attack.walk.layer_source import BatchGradients
from attack.walk.sources import GatedSource
from network.chain import mixes_images, modules, parametrised, run_with
from network.kinds import kind_of
from network.known_outputs import UndeterminedError
from network.stage import Branched, Gate, Stage, delta_before, run

AGREED = 1e-2  # relative difference from the update's gradients up to which a gate's layers agree
SPREAD = 3.0  # standard deviations of the update's noise by which the difference may be larger


def contradicted(gate: Stage, inputs: Tensor, delta: Tensor, gradients: BatchGradients) -> None:
    """Compare the gradients of a gate's layers with those of the update; such as the update lacks are left out.

    Args:
        gate: the stage.
        inputs: of it, (B, ...).
        delta: of its outputs, (B, ...).
        gradients: of the update.

    Raises:
        UndeterminedError: they differ.
    """
    named = {
        f"{layer.name}.{name}": parameter
        for layer in parametrised([gate])
        for name, parameter in layer.module.named_parameters()
    }
    named = {name: parameter for name, parameter in named.items() if name in gradients.gradients}
    if not named:
        return
    with torch.enable_grad():
        leaves = {parameter: parameter.detach().requires_grad_() for parameter in named.values()}
        outputs = run_with([gate], inputs, leaves)
        made = torch.autograd.grad((outputs * delta).sum(), list(leaves.values()))
    for name, own in zip(named, made, strict=True):
        sent, layer = gradients.summed(name, own), name.rpartition(".")[0]
        noise = gradients.error(layer, own).max() * own.numel() ** 0.5
        off = float((own - sent).norm())
        if off > AGREED * float(sent.norm()) + SPREAD * float(noise):
            share = off / max(float(sent.norm()), 1e-300)
            raise UndeterminedError(f"the gradient of {name}, in its gate, contradicts its inputs by {share:.1e}")


def is_held(module: object) -> bool:
    """Whether a stage may be a gate whose outputs are not known, or stand between such a gate and the layer in front.

    They are run on what the layer puts out, and nothing has to be told of them but that they mix no images and that
    slopes between layer and gate do not jump, which would leave masks open.
    """
    if isinstance(module, Gate):
        return not mixes_images(modules(module.body))
    kind = kind_of(module)
    return not (isinstance(module, Branched) or kind.is_affine or kind.has_kink or kind.mixes_images(module))


def gates_behind(source: GatedSource, u: Tensor) -> Iterator[tuple[Stage, Tensor, Tensor]]:
    """The gates right behind a layer with inputs u (B, ...), each with its inputs and delta of its outputs."""
    x = source.map.outputs(u) + source.bias.view(source.columns)
    for index, stage in enumerate(source.behind):
        outputs = stage.module(x)
        if isinstance(stage.module, Gate):
            yield stage, x, delta_before(partial(run, source.behind[index + 1 :]), outputs, source.above.delta)
        x = outputs
