"""Which mode each BatchNorm layer of a client was in, by the numbers of its update.

Running statistics move in training mode only, and batches are counted beside them. In training mode a layer's output is
normalised whatever its weights' length is, so <G_c, W_c> = 0 for each channel c below a BatchNorm. Both tell it layer
by layer: fine-tuning often keeps some layers in eval mode while others train.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from network.parameters import trainable
from update.batchnorm import frozen_among
from update.evidence import Evidence
from update.training import LocalTraining

MOVED = 1e-6  # relative distance of running statistics that is no rounding
FLAT = 0.05  # of what chance gives: <G_c, W_c> of layers below a BatchNorm in training mode is smaller
AS_BY_CHANCE = 0.3  # of what chance gives: in eval mode it is larger


def of_statistics(
    found: Mapping[str, Tensor],
    counted: Mapping[str, Tensor],
    model: nn.Module,
    training: LocalTraining,
    given: Collection[str] = (),
) -> tuple[LocalTraining, list[Evidence]]:
    """The training with the modes of BatchNorm that running statistics and counts show, and what they say of it.

    Args:
        found: running statistics after training, by buffer name.
        counted: BatchNorm's counts of batches after training, likewise.
        model: that the server sent out.
        training: as declared.
        given: names of the flags that were given by hand: what these declare stays, and the contradiction is said.
    """
    moved, evidence = statistics_moved(found, counted, model), []
    most, mode = max(moved.values(), default=0.0), training.batchnorm
    if most and mode == "eval":
        said = f"BatchNorm's running statistics moved by {most:.1e} of their size: it was in training mode"
        said += ", though --bn eval was declared" if "bn" in given else ", and is taken so (--bn train)"
        evidence.append(Evidence("batchnorm", said, most, contradicts="bn" in given))
        training = training if "bn" in given else replace(training, batchnorm="train")
    if moved and not most and mode == "train":
        said = "BatchNorm's running statistics did not move: it was in eval mode, though training mode was declared"
        evidence.append(Evidence("batchnorm", said, most, contradicts=True))
    if most and training.uses_batch_statistics:
        training, more = _with_frozen(training, moved, "bn_frozen" in given)
        evidence += more
    steps = steps_counted(counted, model)
    if steps is not None and steps != training.steps:
        said = f"BatchNorm counted {steps} batches, and --local_steps says {training.steps}"
        evidence.append(Evidence("steps", said, float(steps), contradicts=True))
    return training, evidence


def _with_frozen(
    training: LocalTraining, moved: Mapping[str, float], is_given: bool
) -> tuple[LocalTraining, list[Evidence]]:
    """The training with those layers frozen whose statistics did not move, and a word on it."""
    still = [name for name, distance in moved.items() if not distance]
    if still == frozen_among(moved, training.frozen_norms):
        return training, []
    said = f"the running statistics of {len(still)} of {len(moved)} BatchNorm layers did not move"
    named = f" (--bn_frozen {','.join(still)})" if still else ""
    if is_given:
        said += f": these were in eval mode{named}, and others were declared so"
        return training, [Evidence("batchnorm", said, float(len(still)), contradicts=True)]
    said += f": these were in eval mode, and are taken so{named}"
    return replace(training, frozen_norms=tuple(still)), [Evidence("batchnorm", said, float(len(still)))]


def statistics_moved(found: Mapping[str, Tensor], counted: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
    """How far each BatchNorm layer's running statistics are from the server's, relative to these, by the layer's name.

    It is 0 for layers in eval mode: their statistics are the server's but for rounding, or, where other layers have
    counted batches, they have not. Layers without statistics in `found` are left out.
    """
    server, distances = dict(model.named_buffers()), {}
    counts = {name: int(new) - int(server[name]) for name, new in counted.items() if name in server}
    for name, new in found.items():
        old, layer = server[name].double().cpu(), name.rpartition(".")[0]
        distance = float((new.double().cpu() - old).norm() / old.norm().clamp(min=1.0))
        rounding = max(MOVED, torch.finfo(new.dtype).eps if new.is_floating_point() else 0.0)
        has_counted = counts.get(f"{layer}.num_batches_tracked", 1) > 0 or not any(counts.values())
        distance = distance if distance > rounding and has_counted else 0.0
        distances[layer] = max(distance, distances.get(layer, 0.0))
    return distances


def steps_counted(found: Mapping[str, Tensor], model: nn.Module) -> int | None:
    """The batches that BatchNorm layers in training mode have counted since the server's model; None if none did."""
    server = dict(model.named_buffers())
    counts = {int(new) - int(server[name]) for name, new in found.items() if name in server} - {0}
    return counts.pop() if len(counts) == 1 and min(counts) > 0 else None


def _shares_along(gradients: Mapping[str, Tensor], pairs: Mapping[str, str], model: nn.Module) -> dict[str, float]:
    """The median of |<G_c, W_c>| / (|G_c| |W_c|) over channels c, as a share of what chance gives, by BatchNorm."""
    parameters, found = trainable(model), {}
    for layer, norm in pairs.items():
        gradient, weight = gradients.get(f"{layer}.weight"), parameters.get(f"{layer}.weight")
        if gradient is None or weight is None:
            continue
        g, w = gradient.double().cpu().flatten(1), weight.detach().double().cpu().flatten(1)
        length = g.norm(dim=1) * w.norm(dim=1)
        share = ((g * w).sum(1).abs() / length.clamp(min=1e-300))[length > 0] * math.sqrt(g.shape[1])
        if len(share):
            found[norm] = float(share.median())
    return found


def of_orthogonality(
    gradients: Mapping[str, Tensor], pairs: Mapping[str, str], model: nn.Module, training: LocalTraining
) -> list[Evidence]:
    """A word on layers whose gradients do not stand on their weights as the declared mode of BatchNorm has it.

    Args:
        gradients: by parameter name.
        pairs: names of the linear or convolutional layers right below a BatchNorm, and of that.
        model: with the weights that the server sent out.
        training: as declared.
    """
    chances = _shares_along(gradients, pairs, model)
    trains = [name for name, chance in chances.items() if chance < FLAT]
    still = [name for name, chance in chances.items() if chance > AS_BY_CHANCE]
    declared = frozen_among(chances, training.frozen_norms) if training.uses_batch_statistics else list(chances)
    odd = [name for name in trains if name in declared] + [name for name in still if name not in declared]
    if not odd:
        return []
    figure = sorted(chances[name] for name in odd)[len(odd) // 2]
    if not trains:
        said = (
            f"gradients below BatchNorm stand on their weights as in eval mode ({figure:.2g} of what chance gives), "
            "though training mode was declared"
        )
    else:
        frozen = f" --bn_frozen {','.join(still)}" if still else ""
        said = (
            f"gradients below {len(trains)} of {len(chances)} BatchNorm layers are orthogonal to their weights "
            f"({max(chances[name] for name in trains):.1e} of what chance gives at most): these were in training mode "
            f"(--bn train, or train_private where running statistics are not sent{';' if frozen else ''}{frozen})"
        )
    return [Evidence("batchnorm", said, figure, contradicts=True)]
