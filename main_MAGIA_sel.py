"""MAGIA: reconstruct the images of a whole batch from one averaged gradient, without inferring labels first.

    python main_MAGIA_sel.py                                        # 16 bundled images, defaults below
    python main_MAGIA_sel.py --sel_mode constk --sel_k 2            # a constant subset of two images
    python main_MAGIA_sel.py --preset paper --batch_size 8          # the published settings
    python main_MAGIA_sel.py --dataset folder --data_path photos    # your own images
    python main_MAGIA_sel.py --update update.safetensors            # somebody's update, no truth at hand

Edit the defaults below or override them with flags (-h lists all). Results land in results/<run_name>/.

Source: MAGIA: Sensing Per-Image Signals from Single-Round Averaged Gradients for Label-Inference-Free Gradient
Inversion (arXiv 2509.18170).
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import DATASETS, LABEL_MODES, Batch, load_batch, open_source, parse_indices
from defences import DEFENCES, defend
from gradients import SharedUpdate, freeze, share_update
from ica import unmixed_features
from labels import STRATEGIES, infer_labels
from models import MODELS, build_model, load_checkpoint, load_weights
from objective import (
    DISTANCES,
    RESCALES,
    SUBSET_LOSSES,
    BatchNormLoss,
    FeatureLoss,
    MatchingLoss,
    disagreement,
)
from pixels import BOXES, PixelMap
from priors import PRIORS, Prior, contrast
from report import Recorder, RunDirectory, save_schedule, summary
from runtime import OneLineParser, choose_device, interruptible, number, provenance, stream
from schedules import MODES, subset_size
from signals import Signals, recover_signals
from state import (
    LEARNING_RATES,
    LINE_SEARCHES,
    LR_SCHEDULES,
    AttackState,
    Terms,
    annealed_weight,
    learning_rate,
    make_optimizer,
)

# ----------------------------------------------------------------------------------------------------
# Defaults. Each flag of the same name overrides one. The measurements behind them are in README.md, "Results".

PRESET = "magia"  # magia: what stands here; the others: published attacks, see PRESETS

# data: the victim's batch
DATASET = "sample"  # sample (bundled), cifar10, cifar100, mnist, fashionmnist, svhn, folder, npz
DATA_PATH = None  # where a dataset lies; torchvision sets default to ./data
BATCH_SIZE = 16  # images averaged over, B
INDICES = None  # which images, e.g. 0,3,8-11; None: the first B
LABELS = "random"  # dataset: the true ones; random: uniform over the classes; unique: without repetition
IMAGE_SIZE = None  # side in pixels to crop and resize to; None: as they are

# victim: the model whose gradient is shared
MODEL = "lenet"  # lenet, mlp, convnet, resnet18
NUM_CLASSES = 100  # outputs of the head, K (the paper's head)
WEIGHTS = None  # checkpoint to load into the model; None: random weights from the seed
FROZEN = None  # parameters that are not trained, by the beginnings of their names: head.bias, or conv1,conv2
DEFENCE = "none"  # what the client does to its update: none, noise:STD, float16, bfloat16, topk:SHARE
SAVE_UPDATE = None  # file to write the shared update to, .safetensors or .npz
UPDATE = None  # file of a shared update to attack instead; the truth is then not at hand

# schedule: how many images S the random subset T of a step holds
SEL_MODE = "linear_inc_l"  # const1, constk, linear_{inc,dec}_{l,total}, sigmoid
SEL_K = 2  # S of constk
SEL_L_ITER = 100  # steps that the _l modes ramp over
SIG_A = -0.1  # slope of sigmoid per step; negative: S falls
SIG_B = 200.0  # step at which sigmoid is half way
RESAMPLE = "step"  # step: T is fixed within a step's line search; closure: redrawn in every evaluation, as published
SHOW_SCHEDULE = False  # print S(t), save a plot of it, and stop

# objective: rho [alpha |g_all - g|^2 + (1 - alpha) D_sub(g_T, g)] + tv_weight prior(x)
DISTANCE = "l2"  # of the full-batch term: l2 (squared), cosine
ALPHA = 0.999  # weight of the full-batch term (published); 1 leaves the subset term out
SUBSET_LOSS = "published"  # D_sub: published, mean, partial
RESCALE = "inclusion"  # rho: inclusion (S/B) or none (1)
PRIOR = "opponent"  # opponent (luma and chroma apart), rgb (isotropic), anisotropic (published mean form)
TV_WEIGHT = 1e-2  # weight of the prior at the start
TV_FINAL = 1e-3  # share of tv_weight that is left at the end of the annealing; 1: constant weight
TV_EVALS = 2500  # closure evaluations that the annealing takes
NOISE_WEIGHT = 600.0  # the prior's weight stays above this times noise times root mean square of the update; 0: off
CHROMA_WEIGHT = 3.0  # weight of chroma relative to luma (opponent)
CURVATURE_WEIGHT = 1.0  # weight of second differences relative to first (opponent, rgb)
L2_WEIGHT = 0.0  # weight of the mean squared distance from mid-grey
BN_WEIGHT = 0.0  # weight of the distance from the running statistics of BatchNorm layers, where the model has them

# signals: labels and features read from the head's gradient before the attack
SIGNALS = "auto"  # auto: where model and noise allow; on: or fail; off: label-inference-free; ica: features alone
FEATURE_WEIGHT = 1.0  # weight of |phi(x_i) - h_i|^2, mean over the batch, for images whose features h_i were read
FEATURE_DISTANCE = "l2"  # of that term: l2 (squared), cosine

# labels: whether they move beside the images
LABEL_STRATEGY = "optimise"  # optimise, known (granted, without their order), idlg, yin, ilrg; signals come first

# variables: what the optimiser moves, and where it starts
INIT = "grey"  # grey (0.5 + 0.02 noise), normal (clamped), uniform, or a folder or .npz of images to start from
BOX = "sigmoid"  # sigmoid: x = sigmoid(u); clamp: projected after each step; none
SPECTRAL_POWER = 1.0  # p of the 1/(1+f)^p scaling of image frequencies; 0: plain pixels
CHROMA_GAIN = 0.5  # scaling of chroma relative to luma in the same map; 1: none
LABEL_GAIN = 2.0  # label logits are this multiple of their variables
LABEL_STD = 1.0  # standard deviation of the label logits at the start: far enough apart to settle on different classes
RESTARTS = 1  # starts attacked side by side, R; the one that matches best is the result. R evaluations per closure call
GROUP_WEIGHT = 0.0  # weight of the squared distance of the R copies from their mean

# optimiser
OPTIMIZER = "lbfgs"  # lbfgs, adam
N_ITER = 300  # optimiser steps
LR = None  # step size; None: 1 for lbfgs, 0.05 for adam
LR_SCHEDULE = "constant"  # constant, step (a tenth at 3/8, 5/8, 7/8 of the run), cosine (to zero)
SIGNED = False  # move the images by the signs of their gradient
INNER_ITER = 20  # L-BFGS iterations per step; a step takes at most 5/4 of them plus 1 closure evaluations
HISTORY = 100  # curvature pairs that L-BFGS keeps
LINE_SEARCH = "strong_wolfe"  # strong_wolfe, none
MAX_EVALS = None  # closure evaluations never exceeded; None: no limit but n_iter
MAX_SECONDS = None  # wall time, signals included, after which no further step begins; None: no limit

# run
SEED = 0  # one seed for labels, weights, start and subsets
DEVICE = "auto"  # auto: cuda where there is one, else cpu
DTYPE = "float32"  # float32, float64
SAVE_DIR = "results"  # where run directories go
RUN_NAME = None  # None: <dataset>_B<batch>_<sel_mode>_seed<seed>_<timestamp>
OVERWRITE = False  # empty a run directory that exists
RESUME = None  # True: go on with run_name; a path: go on with that run directory
CHECKPOINT_EVERY = 50  # steps between checkpoints; 0: only at the end
LOG_EVERY = 1  # steps between rows of trace.csv
QUIET = False  # print the last line only

SIGNALS_SHARE = 0.5  # of max_seconds, that the search for signals may take at most

# What published attacks share: whole batches, plain pixels, nothing read beforehand, no annealing.
PLAIN = {
    "alpha": 1.0,
    "rescale": "none",
    "signals": "off",
    "prior": "anisotropic",
    "tv_weight": 0.0,
    "tv_final": 1.0,
    "noise_weight": 0.0,
    "init": "normal",
    "box": "none",
    "spectral_power": 0.0,
    "chroma_gain": 1.0,
    "label_gain": 1.0,
    "label_std": 1.0,
    "lr": 1.0,
}

# Each attack as settings of the one loop; whatever is not named is as above. All start from clamped normal noise; what
# else differs from the source is said here in short and in README, "Presets", at length.
PRESETS = {
    "magia": {},
    # the published script of MAGIA (arXiv 2509.18170)
    "paper": PLAIN
    | {
        "sel_mode": "constk",
        "sel_k": 2,
        "resample": "closure",
        "alpha": 0.999,
        "subset_loss": "published",
        "tv_weight": 5e-3,
        "optimizer": "lbfgs",
        "line_search": "none",
    },
    # Zhu, Liu, Han 2019 (arXiv 1906.08935): L2, L-BFGS with step 1, labels beside the images, no prior
    "dlg": PLAIN | {"optimizer": "lbfgs", "line_search": "none"},
    # Zhao, Mopuri, Bilen 2020 (arXiv 2001.02610): DLG with labels read from the signs of the head's gradient. Differs:
    # they read one image's label, here as many as are negative
    "idlg": PLAIN | {"optimizer": "lbfgs", "line_search": "none", "label_strategy": "idlg"},
    # Geiping et al. 2020 (arXiv 2003.14053): cosine distance, signed Adam with step decay, box, TV, labels granted.
    # Differs: one start, TV weight measured
    "invertinggradients": PLAIN
    | {
        "distance": "cosine",
        "optimizer": "adam",
        "lr": 0.1,
        "lr_schedule": "step",
        "signed": True,
        "n_iter": 4800,
        "box": "clamp",
        "tv_weight": 1e-2,
        "label_strategy": "known",
    },
    # Yin et al. 2021 (arXiv 2104.07586): L2, Adam with cosine decay, TV, L2 and BatchNorm priors, group of starts.
    # Differs: two starts of eight, not registered to each other, no Langevin noise, TV weight measured
    "gradinversion": PLAIN
    | {
        "optimizer": "adam",
        "lr": 0.1,
        "lr_schedule": "cosine",
        "n_iter": 20000,
        "box": "clamp",
        "tv_weight": 3.0,
        "l2_weight": 1e-6,
        "bn_weight": 0.1,
        "restarts": 2,
        "group_weight": 1e-2,
        "label_strategy": "yin",
    },
    # Kariyappa et al. 2023 (arXiv 2209.05578): ICA on the head's gradient, then features and gradients by cosine, TV.
    # Differs: the ICA, see ica.py; weights measured
    "cpa": PLAIN
    | {
        "signals": "ica",
        "feature_weight": 0.1,
        "feature_distance": "cosine",
        "distance": "cosine",
        "optimizer": "adam",
        "lr": 0.1,
        "lr_schedule": "cosine",
        "n_iter": 25000,
        "box": "clamp",
        "tv_weight": 1e-2,
    },
}


# ----------------------------------------------------------------------------------------------------
# The attack


@dataclass(frozen=True)
class Objective:
    """What is minimised:  matching + tv_weight prior(x) + sum_j weight_j penalty_j(x).

    It is the mean over the copies of the batch that --restarts asks for, with group_weight |x - mean over copies|^2 on
    top of it. The annealing of tv_weight ends at `least_prior`, which grows with the noise in the update.
    """

    matching: MatchingLoss
    prior: Prior
    pixels: PixelMap
    penalties: Sequence[tuple[float, Callable[[Tensor], Tensor]]] = ()  # weights above 0 and what they weigh
    group_weight: float = 0.0
    least_prior: float = 0.0

    def images(self, state: AttackState) -> Tensor:
        """The state's images (R, B, C, H, W)."""
        return self.pixels.decode(state.z).unflatten(0, (state.copies, -1))

    def __call__(self, state: AttackState, prior_weight: float) -> Terms:
        """All terms at the state's images, label logits and subset."""
        copies = self.images(state)
        each = [self._copy(*copy, state.subset, prior_weight) for copy in zip(copies, state.label_logits, strict=True)]
        loss, full, subset, roughness = map(torch.stack, zip(*each, strict=True))
        loss = loss.mean()
        if self.group_weight:
            loss = loss + self.group_weight * disagreement(copies)
        return Terms(loss, full, subset, roughness)

    def _copy(self, images: Tensor, logits: Tensor, subset: Tensor, prior_weight: float) -> tuple[Tensor, ...]:
        match, roughness = self.matching(images, logits, subset), self.prior(images)
        loss = match.total + prior_weight * roughness + sum(weight * of(images) for weight, of in self.penalties)
        return loss, match.full, match.subset, roughness


def magia_step(state: AttackState, objective: Objective, size: int, settings: argparse.Namespace) -> Terms:
    """One optimiser step on  rho [alpha |g_all - g|^2 + (1 - alpha) D_sub(g_T, g)] + tv_weight prior(x) + penalties.

    Images and label logits move together. T, a random subset of `size` images, stays as it is during the line search
    unless `--resample closure` asks for the published way. Returns the terms at the iterate that was reached.
    """
    weight = annealed_weight(
        settings.tv_weight,
        state.evaluations / state.copies,
        final=settings.tv_final,
        horizon=settings.tv_evals,
        least=objective.least_prior,
    )

    def closure() -> Tensor:
        if settings.resample == "closure":
            state.draw_subset(size)
        loss = objective(state, weight).loss
        state.backward(loss, signed=settings.signed)
        return loss

    state.set_learning_rate(scheduled_rate(state, settings))
    state.draw_subset(size)
    state.minimise(closure, settings.max_evals)
    objective.pixels.project_(state.z)
    return objective(state, weight)  # for the record, so not counted as an evaluation


def attack(
    state: AttackState,
    objective: Objective,
    settings: argparse.Namespace,
    observe: Callable[[AttackState, int, Terms, Tensor], None],
    interrupted: Callable[[], bool] = lambda: False,
) -> str:
    """MAGIA: step after step, a subset of scheduled size, until steps, evaluations or seconds are spent.

    Moves `state` and reports every step that ended well to `observe(state, subset size, terms, images)`. A step that
    ended in a loss or image that is not finite is undone, see `AttackState.accept`. Returns what ended the attack:
    n_iter, max_evals, max_seconds, interrupt or non-finite.
    """
    while not (ended := state.ended(settings.n_iter, settings.max_evals, settings.max_seconds)):
        size = scheduled_size(state.step, state.batch_size, settings)
        with state.timed():
            terms = magia_step(state, objective, size, settings)
            accepted = state.accept(terms)
        if accepted:
            with torch.no_grad():
                observe(state, size, terms, objective.images(state)[state.leader].clamp(0, 1))
        if interrupted():
            return "interrupt"
    return ended


def scheduled_size(step: int, batch_size: int, settings: argparse.Namespace) -> int:
    """S(t) under the flags --sel_mode, --sel_k, --sel_l_iter, --sig_a, --sig_b and --n_iter."""
    return subset_size(
        settings.sel_mode,
        step,
        batch_size=batch_size,
        n_iter=settings.n_iter,
        k=settings.sel_k,
        l_iter=settings.sel_l_iter,
        a=settings.sig_a,
        b=settings.sig_b,
    )


def scheduled_rate(state: AttackState, settings: argparse.Namespace) -> float:
    """The step size under --lr and --lr_schedule, by the share that is spent of the budget that will end the run."""
    ends = [state.step / settings.n_iter]
    if settings.max_evals:
        ends.append(state.evaluations / settings.max_evals)
    if settings.max_seconds:
        ends.append(state.seconds / settings.max_seconds)
    return learning_rate(settings.lr or LEARNING_RATES[settings.optimizer], settings.lr_schedule, max(ends))


def prepare(
    update: SharedUpdate, model: nn.Module, settings: argparse.Namespace, granted: Tensor | None = None
) -> tuple[AttackState, Objective, Signals | None]:
    """All that `attack` needs, made from what the server has and the settings.

    Nothing of the truth goes in but `granted`, the true labels (B,), where --label_strategy known asks for them.
    Images whose signals were read come first in the batch: their labels are fixed, their features matched.
    """
    started = time.perf_counter()
    place = {"dtype": next(model.parameters()).dtype, "device": next(model.parameters()).device}
    signals = sense(update, model, settings)
    features = known_features(update, model, settings, signals).to(**place)
    labels = infer_labels(settings.label_strategy, update, model, granted)
    generator = stream(settings.seed, "attack")
    pixels = PixelMap(
        update.image_shape,
        box=settings.box,
        spectral_power=settings.spectral_power,
        chroma_gain=settings.chroma_gain,
        **place,
    )
    count = settings.restarts * update.batch_size
    start = start_images(settings.init, (update.batch_size, *update.image_shape), settings.restarts, generator)
    logits = settings.label_std * torch.randn(count, update.num_classes, generator=generator)
    state = AttackState(
        z=pixels.encode(start.to(**place)),
        label_variables=(logits / settings.label_gain).to(**place),
        generator=generator,
        make_optimizer=lambda variables: make_optimizer(variables, settings),
        label_gain=settings.label_gain,
        known_labels=signals.labels if signals else labels,
        copies=settings.restarts,
        seconds=time.perf_counter() - started,
    )
    matching = MatchingLoss(
        model,
        update.targets(model),
        settings.alpha,
        rescale=settings.rescale,
        subset_loss=settings.subset_loss,
        distance=settings.distance,
        known=(signals.errors.to(**place), features) if signals else None,
    )
    prior = Prior(settings.prior, settings.chroma_weight, settings.curvature_weight)
    batchnorm = BatchNormLoss(model)
    penalties = [
        (settings.feature_weight if len(features) else 0, FeatureLoss(model, features, settings.feature_distance)),
        (settings.l2_weight, contrast),
        (settings.bn_weight if batchnorm.layers else 0, batchnorm),
    ]
    penalties = [(weight, penalty) for weight, penalty in penalties if weight]
    least_prior = settings.noise_weight * update.noise() * update.strength()
    return state, Objective(matching, prior, pixels, penalties, settings.group_weight, least_prior), signals


def sense(update: SharedUpdate, model: nn.Module, settings: argparse.Namespace) -> Signals | None:
    """The per-image signals of the update, or None: not asked for, not to be had, or none found.

    Raises:
        ValueError: --signals on, and model or update do not permit them.
    """
    if settings.signals in ("off", "ica"):
        return None
    try:
        seconds = SIGNALS_SHARE * settings.max_seconds if settings.max_seconds else math.inf
        return recover_signals(update, model, generator=stream(settings.seed, "signals"), max_seconds=seconds)
    except ValueError as error:
        if settings.signals == "on":
            raise ValueError(f"--signals on: {error}") from None
        return None


def known_features(
    update: SharedUpdate, model: nn.Module, settings: argparse.Namespace, signals: Signals | None
) -> Tensor:
    """Features (N, d) of the leading images: those of the signals, those that ICA unmixes, or none.

    Raises:
        ValueError: --signals ica, and model or update do not permit it.
    """
    if signals:
        return signals.features
    if settings.signals != "ica":
        return torch.empty(0)
    try:
        return unmixed_features(update, model, generator=stream(settings.seed, "signals"))
    except ValueError as error:
        raise ValueError(f"--signals ica: {error}") from None


def start_images(init: str, shape: tuple[int, ...], copies: int, generator: torch.Generator) -> Tensor:
    """Images (R B, C, H, W) in [0, 1] that the attack starts from, `shape` those of one copy: grey, normal, uniform, or
    those of a path.

    Raises:
        ValueError: the path holds too few images, or images of another shape, or would start all copies alike.
    """
    drawn = (copies * shape[0], *shape[1:])
    if init == "grey":
        return 0.5 + 0.02 * torch.randn(drawn, generator=generator)
    if init == "normal":
        return torch.randn(drawn, generator=generator).clamp(0, 1)
    if init == "uniform":
        return torch.rand(drawn, generator=generator)
    if copies > 1:
        raise ValueError(f"--init {init}: {copies} restarts would all start from the same images")
    source = open_source("npz" if init.endswith(".npz") else "folder", init)
    images = load_batch(
        source, range(shape[0]), labels="random", num_classes=2, generator=generator, image_size=shape[-1]
    ).images
    if images.shape != shape:
        raise ValueError(f"--init {init}: images have shape {tuple(images.shape[1:])}, the update's {shape[1:]}")
    return images


# ----------------------------------------------------------------------------------------------------
# The victim


def victim(settings: argparse.Namespace, place: dict) -> tuple[SharedUpdate, nn.Module, Batch | None]:
    """The shared update, the model it was computed on, and the truth if it is at hand (not so with --update)."""
    if settings.update:
        update = SharedUpdate.load(settings.update)
        model = build_victim(settings, update.model, update.image_shape, update.num_classes)
        if update.weights and not settings.weights:
            load_weights(model, update.weights, settings.update)
        absent = [name for name, _ in model.named_parameters() if name not in update.gradients]
        freeze(model, absent)
        model.to(**place)
        update.targets(model)  # refuses an update that does not fit
        return update, model, None
    batch = load_batch(
        open_source(settings.dataset, settings.data_path),
        parse_indices(settings.indices) if settings.indices else range(settings.batch_size),
        labels=settings.labels,
        num_classes=settings.num_classes,
        generator=stream(settings.seed, "labels"),
        image_size=settings.image_size,
    )
    model = build_victim(settings, settings.model, tuple(batch.images.shape[1:]), settings.num_classes).to(**place)
    freeze(model, settings.frozen.split(",") if settings.frozen else [])
    images, labels = batch.images.to(**place), batch.labels.to(place["device"])
    update = share_update(model, settings.model, images, labels, settings.num_classes)
    update = defend(update, settings.defence, generator=stream(settings.seed, "defence"))
    if settings.save_update:
        update.save(settings.save_update)
    return update, model, batch


def build_victim(settings: argparse.Namespace, name: str, image_shape: tuple, num_classes: int) -> nn.Module:
    """The model the server sent out: weights from --weights, or drawn from the seed."""
    generator = stream(settings.seed, "model")
    model = build_model(name, image_shape=image_shape, num_classes=num_classes, generator=generator)
    if settings.weights:
        load_checkpoint(model, settings.weights)
    return model


# ----------------------------------------------------------------------------------------------------
# The command line


def build_parser() -> tuple[OneLineParser, dict]:
    """The flags, grouped, and their defaults, which come from the block at the top of this file.

    The parser itself has no defaults: what it returns is what was given by hand, see `resolve`.
    """
    count, size, positive = number(int, 0), number(int, 1), number(float, 0, above=True)
    weight, share, real = number(float, 0), number(float, 0, 1), number(float, -sys.float_info.max)
    parser = OneLineParser(
        prog=Path(__file__).name,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )

    defaults = {}

    def flag(group: argparse._ArgumentGroup, name: str, text: str, **kwargs: object) -> None:
        defaults[name] = globals()[name.upper()]
        shown = "off" if defaults[name] is False else defaults[name]
        group.add_argument(f"--{name}", help=f"{text}; default {shown}", **kwargs)

    g = parser.add_argument_group("preset")
    flag(
        g, "preset", "magia: the defaults; the others: published attacks, see README; a flag by hand beats it",
        choices=PRESETS,
    )  # fmt: skip

    g = parser.add_argument_group("data (victim)")
    flag(g, "dataset", "where the images come from; sample is bundled", choices=DATASETS)
    flag(g, "data_path", "the folder or .npz to read, or where torchvision sets lie (./data)", metavar="PATH")
    flag(g, "batch_size", "images averaged over, B", type=size, metavar="B")
    flag(g, "indices", "which images, e.g. 0,3,8-11 (0-based; None: the first B)", metavar="LIST")
    flag(g, "labels", "true labels, uniform over the classes, or uniform without repetition", choices=LABEL_MODES)
    flag(g, "image_size", "side in pixels to crop and resize to (None: as they are)", type=size, metavar="PIXELS")

    g = parser.add_argument_group("model and update (what the server has)")
    flag(g, "model", "architecture; lenet is that of DLG (arXiv 1906.08935)", choices=MODELS)
    flag(g, "num_classes", "outputs of the head, K (the paper's: 100)", type=number(int, 2), metavar="K")
    flag(g, "weights", "checkpoint to load (.safetensors, .npz, .pt); None: random from the seed", metavar="PATH")
    flag(g, "frozen", "parameters not trained, by the beginnings of their names: head.bias, conv1", metavar="NAMES")
    flag(g, "defence", f"what the client does to its update: {', '.join(DEFENCES)}", metavar="KIND")
    flag(g, "save_update", "write the shared update (.safetensors, .npz) before the attack", metavar="PATH")
    flag(g, "update", "attack a saved update, with no truth at hand", metavar="PATH")

    g = parser.add_argument_group("selection schedule S(t) (paper, appendix)")
    flag(g, "sel_mode", "how S changes over the steps", choices=MODES)
    flag(g, "sel_k", "S of constk in images, clamped to [1, B]", type=int, metavar="K")
    flag(g, "sel_l_iter", "steps that the _l modes ramp over", type=int, metavar="L")
    flag(g, "sig_a", "slope of sigmoid per step", type=real, metavar="A")
    flag(g, "sig_b", "midpoint of sigmoid in steps", type=real, metavar="B")
    flag(g, "resample", "redraw the subset each step, or in every evaluation as published", choices=("step", "closure"))
    flag(g, "show_schedule", "print S(t), save a plot of it, and stop", action="store_true")

    g = parser.add_argument_group("objective")
    flag(g, "distance", "of the full-batch term; cosine: Geiping et al. 2020", choices=DISTANCES)
    flag(g, "alpha", "weight of the full-batch term in [0, 1] (published script)", type=share, metavar="ALPHA")
    flag(g, "subset_loss", "D_sub, see objective.py (published script)", choices=SUBSET_LOSSES)
    flag(g, "rescale", "inclusion: matching times S/B (derived in objective.py); none: 1", choices=RESCALES)
    flag(g, "prior", "image prior, see priors.py (anisotropic: published script)", choices=PRIORS)
    flag(g, "tv_weight", "weight of the prior at the start (measured; published 5e-3)", type=weight, metavar="W")
    flag(
        g, "tv_final", "share of tv_weight left after the annealing, 1: constant (measured)",
        type=number(float, 0, 1, above=True), metavar="SHARE",
    )  # fmt: skip
    flag(g, "tv_evals", "closure evaluations that the annealing takes (measured)", type=size, metavar="N")
    flag(
        g, "noise_weight", "the prior's weight stays above this times noise times root mean square of the update's "
        "entries, 0: off (measured)", type=weight, metavar="W",
    )  # fmt: skip
    flag(g, "chroma_weight", "weight of chroma relative to luma, opponent prior (measured)", type=weight, metavar="W")
    flag(g, "curvature_weight", "weight of second differences relative to first (measured)", type=weight, metavar="W")
    flag(g, "l2_weight", "weight of the squared distance from mid-grey (Yin et al. 2021)", type=weight, metavar="W")
    flag(
        g, "bn_weight", "weight of the distance from BatchNorm's running statistics (Yin et al. 2021); nothing in "
        "models without it", type=weight, metavar="W",
    )  # fmt: skip

    g = parser.add_argument_group("signals")
    flag(
        g, "signals", "read labels and features from the head's gradient first; on: or fail; off: no label inference; "
        "ica: features alone (Kariyappa et al. 2023)", choices=("auto", "on", "off", "ica"),
    )  # fmt: skip
    flag(g, "feature_weight", "weight of the read features' distance (measured)", type=weight, metavar="W")
    flag(g, "feature_distance", "of the features; cosine: Kariyappa et al. 2023", choices=DISTANCES)

    g = parser.add_argument_group("labels")
    flag(
        g, "label_strategy", "how labels come about where no signals are read: moved beside the images, granted, or "
        "read by iDLG, Yin et al. 2021 or iLRG", choices=STRATEGIES,
    )  # fmt: skip

    g = parser.add_argument_group("variables")
    flag(g, "init", "start: grey, normal, uniform, or a folder or .npz of images (normal: published)", metavar="INIT")
    flag(g, "box", "how pixels are kept in [0, 1] (none: published)", choices=BOXES)
    flag(g, "spectral_power", "p of the 1/(1+f)^p frequency scaling, 0: off (measured)", type=weight, metavar="P")
    flag(
        g, "chroma_gain", "scaling of chroma relative to luma variables, 1: off (measured)", type=positive, metavar="G"
    )
    flag(g, "label_gain", "label logits per unit of their variables (measured)", type=positive, metavar="G")
    flag(g, "label_std", "standard deviation of the label logits at the start (measured)", type=weight, metavar="STD")
    flag(
        g, "restarts", "starts attacked side by side, R; the best match is the result, R evaluations a closure call",
        type=size, metavar="R",
    )  # fmt: skip
    flag(g, "group_weight", "weight of the R copies' squared distance from their mean", type=weight, metavar="W")

    g = parser.add_argument_group("optimiser")
    flag(g, "optimizer", "what moves images and labels", choices=tuple(LEARNING_RATES))
    flag(g, "n_iter", "optimiser steps (paper: 300)", type=size, metavar="N")
    flag(g, "max_evals", "stop before the step that could exceed this many closure evaluations", type=size, metavar="N")
    flag(
        g, "max_seconds", "begin no step after this much wall time, signals included", type=positive, metavar="SECONDS"
    )
    flag(g, "lr", "step size (None: 1 for lbfgs, 0.05 for adam)", type=positive, metavar="LR")
    flag(g, "lr_schedule", "step: a tenth at 3/8, 5/8, 7/8 of the run; cosine: to zero", choices=LR_SCHEDULES)
    flag(g, "signed", "move the images by the signs of their gradient (Geiping et al. 2020)", action="store_true")
    flag(g, "inner_iter", "L-BFGS iterations per step (torch's default)", type=size, metavar="N")
    flag(g, "history", "curvature pairs that L-BFGS keeps (torch's default)", type=size, metavar="N")
    flag(g, "line_search", "of L-BFGS (none: published)", choices=LINE_SEARCHES)

    g = parser.add_argument_group("run")
    flag(g, "seed", "one seed for labels, weights, start and subsets", type=number(int, 0, 2**31 - 1), metavar="SEED")
    flag(g, "device", "cpu, cuda, cuda:1, ...; auto: cuda where there is one", metavar="DEVICE")
    flag(g, "dtype", "of the victim's gradient and the attack", choices=("float32", "float64"))
    flag(g, "save_dir", "where run directories go", metavar="DIR")
    flag(g, "run_name", "None: <dataset>_B<batch>_<sel_mode>_seed<seed>_<timestamp>", metavar="NAME")
    flag(g, "overwrite", "empty a run directory that exists", action="store_true")
    flag(
        g, "resume", "go on from the checkpoint of a run: of DIR, or of --run_name in --save_dir",
        nargs="?", const=True, metavar="DIR",
    )  # fmt: skip
    flag(g, "checkpoint_every", "steps between checkpoints, 0: only at the end", type=count, metavar="STEPS")
    flag(g, "log_every", "steps between rows of trace.csv", type=size, metavar="STEPS")
    flag(g, "quiet", "print the last line only", action="store_true")
    return parser, defaults


# What a resumed run may set anew; everything else must be as the run began.
RESUMABLE = (
    "n_iter", "max_evals", "max_seconds", "device", "save_dir", "run_name", "resume", "overwrite", "quiet", "log_every",
    "checkpoint_every", "show_schedule", "save_update",
)  # fmt: skip


def resolve(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict]:
    """All settings, and those given by hand, which win over the preset's, which win over the defaults.

    A resumed run takes what it began with in place of preset and defaults.

    Raises:
        ValueError: flags that contradict each other or the run that is resumed.
    """
    parser, defaults = build_parser()
    given = vars(parser.parse_args(argv))
    preset = PRESETS[given.get("preset", PRESET)]
    settings = argparse.Namespace(**(defaults | preset | given))
    if settings.resume:
        began = read_config(run_path(settings))
        for name, value in given.items():
            if name not in RESUMABLE and value != began[name]:
                raise ValueError(f"--{name} {value}: the run to resume began with {began[name]}")
        settings = argparse.Namespace(**({name: began[name] for name in defaults} | given))
    if settings.update and (settings.frozen or settings.defence != "none"):
        raise ValueError("--frozen and --defence are the client's: a saved update comes as the client made it")
    if settings.indices:
        adopt(settings, given, {"batch_size": len(parse_indices(settings.indices))}, f"--indices {settings.indices}")
    scheduled_size(0, settings.batch_size, settings)  # refuses what no schedule can be made of
    return settings, given


def adopt(settings: argparse.Namespace, given: dict, facts: dict, source: str) -> None:
    """Set what `source` settles, unless a flag given by hand says otherwise.

    Raises:
        ValueError: it does.
    """
    for name, value in facts.items():
        if given.get(name, value) != value:
            raise ValueError(f"--{name} {given[name]}: {source} has {value}")
        setattr(settings, name, value)


def run_path(settings: argparse.Namespace) -> Path:
    """The run directory that the flags name."""
    if isinstance(settings.resume, str):
        return Path(settings.resume)
    if settings.resume and not settings.run_name:
        raise ValueError("--resume needs the run's directory, or --run_name")
    source = "update" if settings.update else settings.dataset
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = settings.run_name or f"{source}_B{settings.batch_size}_{settings.sel_mode}_seed{settings.seed}_{stamp}"
    return Path(settings.save_dir) / name


def read_config(path: Path) -> dict:
    """The config.json of a run directory.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        return json.loads((path / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"no run to resume in {path}: {error}") from None


def report_signals(signals: Signals | None, batch_size: int) -> str:
    """One line of what was found."""
    if signals is None:
        return "signals: none used"
    found = f"signals: {len(signals)} of {batch_size} images read from the head's gradient (rank {signals.rank})"
    return f"{found} in {signals.seconds:.1f} s"


def show_schedule(settings: argparse.Namespace) -> None:
    """Print step and S(t), one line per step, and save a plot."""
    sizes = [scheduled_size(step, settings.batch_size, settings) for step in range(settings.n_iter)]
    print("step S")
    for step, size in enumerate(sizes):
        print(step, size)
    title = f"{settings.sel_mode}, B={settings.batch_size}"
    path = Path(settings.save_dir) / f"schedule_{settings.sel_mode}_B{settings.batch_size}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_schedule(path, sizes, title)
    print(f"plot: {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 done, 1 no finite loss to be had, 2 wrong input, 130 interrupted."""
    try:
        settings, given = resolve(argv)
        if settings.show_schedule:
            show_schedule(settings)
            return 0
        device = choose_device(settings.device)
        update, model, truth = victim(settings, {"device": device, "dtype": getattr(torch, settings.dtype)})
        facts = {"batch_size": update.batch_size, "model": update.model, "num_classes": update.num_classes}
        adopt(settings, given, facts, "the update")
        where = {"path": run_path(settings), "resume": bool(settings.resume), "overwrite": settings.overwrite}
        RunDirectory.check(**where)
        granted = truth.labels.to(device) if truth and settings.label_strategy == "known" else None
        state, objective, signals = prepare(update, model, settings, granted)
        run = RunDirectory(**where)
        checkpoint = run.read_checkpoint(state) if settings.resume else None
        schedule = [scheduled_size(step, settings.batch_size, settings) for step in range(settings.n_iter)]
        run.write_json("config.json", vars(settings) | {"device": str(device), "schedule": schedule} | provenance())
    except (ValueError, OSError) as error:
        print(f"{Path(__file__).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2

    if not settings.quiet:
        shape = "x".join(map(str, update.image_shape))
        print(f"{settings.update or settings.dataset}: {update.batch_size} images {shape}, labels {settings.labels}")
        print(f"{settings.model}, {settings.num_classes} classes | {settings.sel_mode} | {objective.prior}")
        print(report_signals(signals, update.batch_size))
        print(f"{settings.optimizer} on {device}, {settings.dtype} | {run.path}")
    bar = tqdm(total=settings.n_iter, initial=state.step, disable=settings.quiet, unit="step", dynamic_ncols=True)

    def show(row: dict) -> None:
        bar.update(row["step"] + 1 - bar.n)
        psnr = {} if row["psnr_mean"] is None else {"PSNR": f"{row['psnr_mean']:.2f}"}
        bar.set_postfix({"loss": f"{row['loss']:.2e}", "S": row["S"]} | psnr)

    recorder = Recorder(
        run,
        truth,
        log_every=settings.log_every,
        checkpoint_every=settings.checkpoint_every,
        checkpoint=checkpoint,
        show=show,
    )
    with interruptible() as interrupted, bar:
        try:
            ended_by = attack(state, objective, settings, recorder, interrupted)
        except KeyboardInterrupt:
            state.restore_best()  # in the middle of a step: the checkpoint stays the last one written
            ended_by = "abort"
    figures = recorder.finish(state, objective.images(state)[state.leader], ended_by, signals)
    if ended_by == "non-finite":
        print(f"the loss was not finite {state.setbacks} times: stopped at the best iterate", file=sys.stderr)
    if not settings.quiet:
        print(f"pictures: {run.path}/" + ("comparison.png" if truth else "reconstruction.png"))
    print(summary(figures))
    return {"non-finite": 1, "interrupt": 130, "abort": 130}.get(ended_by, 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
