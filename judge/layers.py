"""The true error of each layer's recovered inputs, where the truth is known: a column of layers.csv."""

import copy
import itertools
from collections.abc import Mapping
from dataclasses import replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from attack.prepare import Known
from data import Batch
from network.chain import inputs_along, mixes_images, parametrised
from network.perceptrons import perceptrons
from network.tracing import stages_if_walked


def measured(known: Known, model: nn.Module, truth: Batch | None) -> Known:
    """`known`, each layer's row with its `relative_error`, None where the error cannot be known.

    Of a client's several steps it is that of the first minibatch, whose true inputs are those at the server's weights,
    and which BatchNorm in training mode mixed with no other.
    The recovered inputs have then served their purpose and are left out: they are as large as all activations.
    """
    recovered, first = known.recovered, known.steps.count(0)
    if known.in_steps:
        recovered = {name: inputs[:first] for name, inputs in recovered.items()}
    beside = first if known.in_steps and mixes_images(model.modules()) else None
    errors = relative_errors(recovered, model, truth.images[:beside]) if truth and recovered else {}
    rows = [_beside_uncertainty(row, errors.get(row["layer"])) for row in known.layers]
    return replace(known, layers=rows, recovered={})


def relative_errors(recovered: Mapping[str, Tensor], model: nn.Module, images: Tensor) -> dict[str, float]:
    """By layer, the largest relative error |a' - a| / |a| of the inputs a' recovered there.

    Args:
        recovered: inputs (N, ...) by the name of the layer or residual stage that takes them, in any order; single
            tokens (n, D) by that of a perceptron's first layer.
        model: the model that takes the images.
        images: the truth (B, C, H, W), B >= N. True inputs are computed in float64, and matched one to one.

    Returns:
        errors by the name of a layer; a residual stage has the name of its first layer, as in layers.csv.
    """
    exact, images = copy.deepcopy(model).double(), images.to(next(model.parameters()).device).double()
    taken = inputs_along(stages_if_walked(exact) or [], images)
    return _errors_of_tokens(recovered, exact, images) | {
        layer.name: float(matched(recovered[stage.name], truth)[2].max())
        for stage, truth in taken
        if stage.name in recovered and recovered[stage.name][:1].numel() == truth[:1].numel()  # tokens have fewer
        for layer in itertools.islice(parametrised([stage]), 1)  # none in a block without layers
    }


@torch.no_grad()
def _errors_of_tokens(recovered: Mapping[str, Tensor], model: nn.Module, images: Tensor) -> dict[str, float]:
    """The same of single tokens, each matched to one of all images' and positions'."""
    places = [place for place in perceptrons(model, images.shape[1:]) if recovered.get(place.first, images).dim() == 2]
    truth = {place.first: place.inputs(model, images).flatten(0, 1) for place in places}
    return {name: float(matched(recovered[name], tokens)[2].max()) for name, tokens in truth.items()}


def matched(found: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The one-to-one assignment of found (N, ...) to truth (B, ...) of least relative distance.

    Returns:
        found, true: indices (N,) of the pairs, on the CPU.
        error: (N,) relative distance |found - true| / |true| of each pair.
    """
    found, truth = found.flatten(1).to(truth), truth.flatten(1)
    sizes = truth.norm(dim=1).clamp(min=torch.finfo(truth.dtype).tiny)  # all of a small layer may be cut off
    distance = torch.cdist(found, truth, compute_mode="donot_use_mm_for_euclid_dist") / sizes  # (N, B)
    pairs = tuple(map(torch.from_numpy, linear_sum_assignment(distance.cpu().numpy())))
    return *pairs, distance.cpu()[pairs]


def _beside_uncertainty(row: Mapping, error: float | None) -> dict:
    names = list(row)
    at = names.index("uncertainty") + 1
    return {name: row[name] for name in names[:at]} | {"relative_error": error} | {n: row[n] for n in names[at:]}
