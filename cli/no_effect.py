"""Flags that were given by hand and change nothing in this run, and the reason: no flag is ignored silently."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from attack.match.phases import Course
from attack.match.softening import kinked_chain
from attack.optimise.budget import Annealing
from attack.prepare import Known
from network.zoo import place_of
from update.batchnorm import batchnorms
from update.declared import declared
from update.training import LocalTraining

SELECTION = ("sel_mode", "sel_k", "sel_l_iter", "sig_a", "sig_b", "resample")
GRADIENTS = ("distance", "soften", "alpha", "subset_loss", "rescale")  # how the batch's gradient is matched
ANNEALING = ("tv_final", "tv_evals", "noise_weight")
PENALTIES = ("l2_weight", "bn_weight", "scale_weight", "feature_weight", "feature_distance", "group_weight")
PRIOR = ("prior", "tv_weight", "chroma_weight", "curvature_weight", "third_weight", "prior_power")
LABELS = ("label_gain", "label_std")
VARIABLES = ("init", "box", "spectral_power", "chroma_gain", "restarts")
OPTIMISER = ("optimizer", "n_iter", "lr", "lr_schedule", "signed", "inner_iter", "history", "line_search", "max_evals")


@dataclass(frozen=True)
class Situation:
    """The facts that decide which flags matter.

    Attributes:
        settings: of the run.
        known: the signals and labels known before the first step.
        has_kinks, has_batchnorm: of the model.
        noise_decides: whether the update's noise sets a lower bound above the prior's weight.
        holds_scale: whether the update hides a scale of the images, which is held.
        device: that the attack runs on.
    """

    settings: argparse.Namespace
    known: Known
    has_kinks: bool
    has_batchnorm: bool
    noise_decides: bool
    holds_scale: bool
    device: torch.device

    @property
    def is_of_weights(self) -> bool:
        """Whether an update from outside is of weights."""
        return bool(self.settings.update) and self.settings.update_kind != "gradient"

    @property
    def matches_gradients(self) -> bool:
        """Whether the batch's gradient is matched, rather than known activations."""
        return not self.known.is_followed

    @property
    def labels_are_known(self) -> bool:
        """Whether no label is left to be optimised."""
        return self.known.labels is not None and len(self.known.labels) == self.known.batch_size

    @property
    def training(self) -> LocalTraining:
        """The client's."""
        return declared(vars(self.settings))


Condition = Callable[[Situation], bool]

# Flags, the condition under which they change nothing, and the reason. The first reason that applies is given.
RULES: tuple[tuple[tuple[str, ...], Condition, str], ...] = (
    (
        (*SELECTION, *GRADIENTS, *ANNEALING, *PENALTIES, *PRIOR, *LABELS, *VARIABLES, *OPTIMISER),
        lambda s: s.known.is_exact,
        "all images were read, nothing is left to be optimised",
    ),
    (
        (*SELECTION, *GRADIENTS, *PENALTIES),
        lambda s: not s.matches_gradients,
        "known activations are matched in place of the batch's gradient, without a subset",
    ),
    (
        ANNEALING,
        lambda s: not s.matches_gradients,
        "known activations are matched in a course of their own; --tv_weight scales its weights of the prior",
    ),
    (
        ("local_momentum", "local_nesterov", "local_prox", "local_betas"),
        lambda s: s.settings.local_steps == 1,
        "the client's first step is the same without",
    ),
    (
        ("local_schedule",),
        lambda s: s.settings.local_steps == 1 and s.training.optimiser.factors(1, 1) == [1.0],
        "the client's first step is the same without",
    ),
    (
        ("local_weight_decay",),
        lambda s: s.settings.local_steps == 1 and s.settings.local_optimizer == "sgd" and not s.is_of_weights,
        "the client shares the gradient of one step",
    ),
    (("local_shuffle",), lambda s: s.training.passes == 1, "the order of a single pass is sought in any case"),
    (("sel_k",), lambda s: s.settings.sel_mode != "constk", "only --sel_mode constk has it"),
    (("sel_l_iter",), lambda s: not s.settings.sel_mode.endswith("_l"), "only the modes that end in _l have it"),
    (("sig_a", "sig_b"), lambda s: s.settings.sel_mode != "sigmoid", "only --sel_mode sigmoid has it"),
    (("soften",), lambda s: not s.has_kinks, "the network has no kinks"),
    (("subset_loss",), lambda s: s.settings.alpha == 1, "--alpha 1 leaves the subset term out"),
    (("tv_weight", "tv_final"), lambda s: s.noise_decides, "noise in the update asks for more of the prior"),
    (("tv_evals",), lambda s: s.noise_decides and not s.has_kinks, "noise in the update asks for more of the prior"),
    (("tv_final", "tv_evals"), lambda s: not s.settings.tv_weight, "the prior has no weight"),
    (PRIOR[:1] + PRIOR[2:], lambda s: s.matches_gradients and not s.settings.tv_weight, "the prior has no weight"),
    (PRIOR[2:], lambda s: s.settings.prior == "anisotropic", "the anisotropic prior has no such weights"),
    (("chroma_weight",), lambda s: s.settings.prior == "rgb", "the rgb prior weighs all colours alike"),
    (("bn_weight",), lambda s: not s.has_batchnorm, "the model has no BatchNorm layers with running statistics"),
    (
        ("scale_weight",),
        lambda s: bool(s.settings.scale_weight) and not s.holds_scale,
        "the update tells the images' scale",
    ),
    (
        ("feature_weight", "feature_distance"),
        lambda s: not len(s.known.features),
        "no image's features were read",
    ),
    (("feature_distance",), lambda s: not s.settings.feature_weight, "features have no weight"),
    (("group_weight",), lambda s: s.settings.restarts == 1, "there is one start"),
    (LABELS, lambda s: s.labels_are_known, "all labels are known"),
    (("cuda_graphs",), lambda s: s.device.type != "cuda", "the attack does not run on a GPU"),
    (
        ("inner_iter", "history", "line_search"),
        lambda s: s.settings.optimizer != "lbfgs",
        "only --optimizer lbfgs has it",
    ),
)


def without_effect(
    given: Mapping[str, object],
    settings: argparse.Namespace,
    known: Known,
    model: nn.Module,
    annealing: Annealing | Course,
    *,
    holds_scale: bool,
) -> list[str]:
    """A line for each reason why flags that were given by hand change nothing, with these flags."""
    of_model = kinked_chain(model) is not None, bool(batchnorms(model))
    noise_decides, device = 0 < annealing.weight <= annealing.least, place_of(model)["device"]
    situation = Situation(settings, known, *of_model, noise_decides, holds_scale, device)
    by_reason: dict[str, list[str]] = {}
    for name in given:
        rule = next((reason for names, applies, reason in RULES if name in names and applies(situation)), None)
        if rule is not None:
            by_reason.setdefault(rule, []).append(f"--{name}")
    return [f"no effect here: {', '.join(names)} ({reason})" for reason, names in by_reason.items()]
