"""MAGIA: reconstruct the images of a whole batch from one averaged gradient, without inferring labels first.

    python main_MAGIA_sel.py                                        # 16 bundled images, defaults below
    python main_MAGIA_sel.py --preset paper --batch_size 8          # the published settings
    python main_MAGIA_sel.py --dataset folder --data_path photos    # your own images
    python main_MAGIA_sel.py --update update.safetensors            # somebody's update, no truth at hand

Edit the defaults below or override them with flags (-h lists all). Results land in results/<run_name>/.

Source: MAGIA: Sensing Per-Image Signals from Single-Round Averaged Gradients for Label-Inference-Free Gradient
Inversion (arXiv 2509.18170).
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from attack.match.activations import ForwardMatching
from attack.match.common_scale import CommonScale
from attack.match.entries import observed
from attack.match.followed import followed
from attack.match.gradients import MatchingLoss
from attack.match.penalties import Penalty, disagreement
from attack.match.phases import Course
from attack.match.polish import Polish, why_over
from attack.match.replay import replayed
from attack.match.softening import SoftenedMatching, kinked_chain
from attack.optimise.budget import Annealing, Budget
from attack.optimise.pixels import PixelMap
from attack.optimise.state import AttackState, Terms
from attack.prepare import Known
from cli.ahead import known_ahead, known_from_pictures
from cli.audit import audit
from cli.console import Progress, introduction, show_end, show_leaks, show_remarks, show_schedule
from cli.digests import compare, digests_of
from cli.flags import read_flags
from cli.layouts import prepared
from cli.no_effect import without_effect
from cli.output import lasting_output, refused
from cli.provenance import provenance
from cli.runtime import INTERRUPTED, enough_threads, interruptible, place_named
from cli.settings import adopt, facts_of, privacy_of, resolve, run_path, schedule_of, words_of
from cli.start import annealing_of, first_state, pixel_map, weighed_penalties
from cli.victim import save_batch, victim
from data import Batch
from judge.recorder import Recorder, open_record
from judge.run_directory import RunDirectory
from network.memory import is_out_of_memory
from network.zoo import place_of
from priors import Prior
from schedules import Schedule
from update.shared import SharedUpdate

# ----------------------------------------------------------------------------------------------------
# Defaults. Each flag of the same name overrides one, and its comment is the flag's help (`make docs` writes them to
# docs/flags.md). The measurements behind them are in docs/results.md.

# preset
PRESET = "magia"  # magia: the defaults; published: paper, dlg, idlg, invertinggradients, gradinversion, cpa; from grey
# and not from noise: paper_tuned, dlg_tuned, idlg_tuned; from one start and not from two: gradinversion_tuned

# data (the client's batch)
DATASET = "sample"  # source of the images: sample (bundled), cifar10, cifar100, mnist, fashionmnist, svhn, folder, npz
DATA_PATH = None  # the folder or .npz to read, or where torchvision sets lie (None: ./data)
BATCH_SIZE = 16  # images averaged over, B
INDICES = None  # which images, e.g. 0,3,8-11 (0-based; None: the first B)
LABELS = "random"  # dataset: the images' own; random: uniform over the classes; unique: random without repetition
IMAGE_SIZE = None  # pixels to crop and resize to, 24 or 16x24 (height x width) (None: images keep their size)
CHANNELS = 3  # channels of an image, where no image is at hand: with --explain, and with an update from outside
SAVE_BATCH = None  # write the images and their own labels to this .npz, for --dataset npz, and stop

# model and update (what the server has)
MODEL = "lenet"  # lenet (of DLG, arXiv 1906.08935), mlp, convnet, resnet18, resnet18_cifar, vgg11, lenet5, or from
# outside: torchvision:NAME, FILE.py:FACTORY (the file is run, and FACTORY in it is called to make the model)
ACTIVATION = None  # of mlp: relu, sigmoid, tanh, gelu (None: sigmoid)
DEPTH = None  # hidden layers of mlp (None: 2)
WIDTH = None  # units in a hidden layer of mlp (None: 256)
NUM_CLASSES = 100  # outputs of the head, K (the paper's: 100); one logit is that of two classes
MEAN = None  # mean of the pixels by which images are normalised for the model, e.g. 0.485,0.456,0.406 (None: 0)
STD = None  # standard deviation of the same pixels (None: 1); images stay in [0, 1], the model's first layer normalises
WEIGHTS = None  # checkpoint to load, .safetensors, .npz, .pt, .ckpt, .bin (docs/update-format.md; None: random weights)
EXPLAIN = False  # forecast without any data which layers give this batch size away, and stop
FROZEN = None  # beginnings of the names of parameters that are not trained, e.g. head.bias,conv1
HIDDEN = None  # the same of parameters that are trained and encrypted: the server does not see how far these went
DEFENCE = "none"  # defences that the client applies in this order, e.g. clip:1.0,noise:0.01; from clip:NORM, noise:STD,
# topk:SHARE, feedback:SHARE:ROUNDS, percentile:PERCENT, truncate:GAMMA, svt:FRACTION:EPSILON:NOISE_VAR:GAMMA:TAU,
# localdp:CLIP:SENSITIVITY:EPSILON:DELTA, quantise:BITS, int8, sign, float16, bfloat16, secure_sum:CLIENTS,
# dpsgd:CLIP:SIGMA (docs/defences.md)
DP_DELTA = 1e-5  # delta of the (epsilon, delta)-differential privacy of dpsgd
DP_RATE = 0.01  # share of all examples that is sampled for a round of dpsgd
DP_ROUNDS = 1  # rounds of dpsgd that an example may be sampled for
SAVE_UPDATE = None  # file to write the shared update to before the attack, .safetensors or .npz
UPDATE = None  # attack the update in this file, see docs/update-format.md; there is then no truth to compare with
DEFENDED = None  # defences that the client applied already to an update from outside, in the words of --defence
UPDATE_KIND = "gradient"  # content of an update from outside: gradient, difference (new - old weights), weights (new)
LOCAL_LR = None  # the client's learning rate; needed for several steps, and where the update is of weights
LOCAL_STEPS = 1  # optimiser steps that the client makes, N; of plain SGD the difference is divided by rate and steps
LOCAL_BATCHES = 1  # minibatches of the batch that these steps go through in turn, M, or their sizes, e.g. 4,4,1
LOCAL_OPTIMIZER = "sgd"  # the client's optimiser: sgd, adam, adamw
LOCAL_MOMENTUM = 0.0  # momentum of the client's sgd
LOCAL_NESTEROV = False  # the client's momentum is Nesterov's
LOCAL_WEIGHT_DECAY = None  # weight decay of the client's optimiser (None: torch's own, 0.01 of adamw and else 0)
LOCAL_PROX = 0.0  # mu of FedProx (Li et al. 2020), which pulls the client's weights back to the server's
LOCAL_BETAS = "0.9,0.999"  # betas of the client's adam and adamw
LOCAL_EPS = 1e-8  # eps of the same
LOCAL_SCHEDULE = "constant"  # the client's rates: constant, cosine, linear (to 0), step:EVERY:FACTOR,
# exponential:FACTOR, warmup:STEPS or warmup:STEPS:cosine or :linear, or factors of each step or pass, e.g. 1,1,0.1
LOCAL_CLIP = None  # norm that the gradient of each of the client's steps is clipped to (None: not clipped)
LOCAL_SHUFFLE = False  # each pass goes through the images in another order, which the server does not know
LOCAL_PRECISION = "float32"  # of the client's activations: float32, bfloat16 (torch.autocast)
LOSS = "cross_entropy"  # the client's loss: cross_entropy, bce (each class by itself; one logit: two classes), mse
LABEL_SMOOTHING = 0.0  # eps of the cross-entropy's targets, (1 - eps) onehot + eps / K
CLASS_WEIGHTS = None  # the cross-entropy's weights of the K classes, e.g. 1,2.5,0.5 (None: 1, or read off the update)
BN = "eval"  # the client's BatchNorm: eval, train (batch statistics, running ones shared), train_private (not shared)
BN_FROZEN = None  # BatchNorm layers in eval mode while others train, or modules that hold them, by name: stem,layer1

# selection schedule S(t) (paper, appendix): how many images the random subset T of a step holds
SEL_MODE = "constk"  # const1, constk, linear_inc_l, linear_inc_total, linear_dec_l, linear_dec_total, sigmoid
SEL_K = 2  # S of constk in images; never more than B
SEL_L_ITER = 100  # steps that the _l modes ramp over
SIG_A = -0.1  # slope of sigmoid per step; negative: S falls
SIG_B = 200.0  # step at which sigmoid is half way
RESAMPLE = "step"  # step: T is fixed within a step's line search; closure: redrawn in every evaluation (published)
SHOW_SCHEDULE = False  # print S(t), save a plot of it, and stop

# objective: rho [alpha |g_all - g|^2 + (1 - alpha) D_sub(g_T, g)] + tv_weight prior(x)
DISTANCE = None  # of the full-batch term: l2 (squared), relative (each tensor's squares over their mean), cosine
# (Geiping et al. 2020), relative_cosine (None: relative where kinks are softened, else l2; after topk, sign and
# quantise the distance of attack/match/entries.py; relative_cosine where nothing tells the clip factor)
SOFTEN = "auto"  # kinks of ReLUs and max-pools: auto (soft at first, hardened over tv_evals; measured), off
ALPHA = 0.999  # weight of the full-batch term in [0, 1] (published); 1 leaves the subset term out
SUBSET_LOSS = "published"  # D_sub, see attack/match/gradients.py: published, mean, partial
RESCALE = "inclusion"  # rho: inclusion (S/B, derived in attack/match/gradients.py), none (1)
PRIOR = "opponent"  # opponent (luma and chroma apart), rgb (isotropic), anisotropic (published mean form)
TV_WEIGHT = 4e-3  # weight of the prior at the start (measured; published 5e-3)
TV_FINAL = 1e-3  # share of tv_weight left at the end of the annealing, 1: constant weight (measured)
TV_EVALS = 2500  # closure evaluations that the annealing takes, and the hardening of kinks (measured)
NOISE_WEIGHT = 240.0  # lower bound on the prior's weight: this times noise times rms of the entries, 0: off (measured)
CHROMA_WEIGHT = 3.0  # weight of chroma relative to luma in the opponent prior (measured)
CURVATURE_WEIGHT = 1.0  # weight of second differences relative to first in opponent and rgb (measured)
THIRD_WEIGHT = 1.0  # weight of third differences relative to first in opponent and rgb (measured)
PRIOR_POWER = 0.8  # power that lengths of differences are raised to in opponent and rgb (measured)
L2_WEIGHT = 0.0  # weight of the mean squared distance from mid-grey (Yin et al. 2021)
BN_WEIGHT = 0.0  # weight of the distance from BatchNorm's running statistics (Yin et al. 2021); 0 in models without
SCALE_WEIGHT = 0.1  # weight of the usual contrast, where a client's BatchNorm hides that of its images (measured)

# signals: labels and inputs of layers, image by image, read from the update before the attack
SIGNALS = "auto"  # auto: read where model and noise allow; on: read or fail; off: read nothing, label-inference-free;
# ica: features by ICA (Kariyappa et al. 2023)
FEATURE_WEIGHT = 1.0  # weight of |phi(x_i) - h_i|^2, mean over the batch, for images whose features h_i were read
FEATURE_DISTANCE = None  # of features: l2, relative (over |h_i|^2), cosine (Kariyappa et al. 2023) (None: as DISTANCE)

# labels
LABEL_STRATEGY = "optimise"  # where none was read: optimise (beside images), known (granted, no order), idlg, yin, ilrg

# variables of the optimiser, and their start
INIT = "grey"  # grey (0.5 and a little noise), normal (clamped; published), uniform, randn (normal, not clamped: DLG),
# standardised (normal about CIFAR-10's mean colour: Geiping et al. 2020), or a folder or .npz of images
BOX = "sigmoid"  # way to keep pixels in [0, 1]: sigmoid (x = sigmoid(u)), clamp (projected after steps), none
SPECTRAL_POWER = None  # p of the 1/(1+f)^p scaling of image frequencies, 0: plain pixels (None: 1 where gradients are
# matched; where activations are matched the network decides; measured)
CHROMA_GAIN = 0.5  # scaling of chroma relative to luma among these frequencies, 1: none (measured)
LABEL_GAIN = 2.0  # label logits per unit of their variables (measured)
LABEL_STD = 1.0  # standard deviation of the label logits at the start: far enough apart to settle on different classes
RESTARTS = 1  # starts attacked side by side, R; the best match is the result; R evaluations a closure call
GROUP_WEIGHT = 0.0  # weight of the squared distance of the R copies from their mean

# optimiser
OPTIMIZER = "lbfgs"  # optimiser of images and labels: lbfgs, adam
N_ITER = 300  # optimiser steps (paper: 300)
LR = None  # step size (None: 1 for lbfgs, 0.05 for adam)
LR_SCHEDULE = "constant"  # constant, step (a tenth at 3/8, 5/8, 7/8 of the run), cosine (to zero)
SIGNED = False  # move the images by the signs of their gradient (Geiping et al. 2020)
INNER_ITER = 20  # L-BFGS iterations in a step; a step takes at most 5/4 as many closure evaluations, plus 1
HISTORY = 100  # curvature pairs that L-BFGS keeps
LINE_SEARCH = "strong_wolfe"  # of L-BFGS: strong_wolfe, none (published)
MAX_EVALS = None  # closure evaluations never exceeded (None: no limit but n_iter)
MAX_SECONDS = None  # wall time after which no further step begins; a reading is aborted after half of it (None: none)

# run
SEED = 0  # one seed for labels, weights, start and subsets
DEVICE = "auto"  # cpu, cuda, cuda:1, ...; auto: cuda where there is one
CUDA_GRAPHS = "auto"  # evaluations on a GPU: auto (recorded once and replayed, where that gives the same), off
DTYPE = "float32"  # of the client's gradient and the attack: float32, float64
SAVE_DIR = "results"  # where run directories go
RUN_NAME = None  # name of the run directory (None: <dataset>_B<batch>_<sel_mode>_seed<seed>_<timestamp>)
OVERWRITE = False  # replace the run in a run directory that exists
RESUME = None  # go on from the checkpoint in this run directory, or without a value in that of run_name in save_dir
CHECKPOINT_EVERY = 50  # steps between checkpoints, 0: only at the end
LOG_EVERY = 1  # steps between rows of trace.csv
AUDIT = False  # attack once more under each of the nearest defences, and report which would stop the attack
QUIET = False  # print the last line only

# ----------------------------------------------------------------------------------------------------
# The attack

FLAGS = read_flags(Path(__file__), globals())


@dataclass(frozen=True)
class Objective:
    """The objective:  matching + tv_weight prior(x) + sum_j weight_j penalty_j(x).

    Its value is the mean over the copies of the batch that --restarts asks for, plus
    group_weight |x - mean over copies|^2. `annealing` says how tv_weight falls, down to a bound that the update's noise
    sets.
    """

    matching: MatchingLoss | SoftenedMatching | ForwardMatching
    prior: Prior
    annealing: Annealing | Course
    pixels: PixelMap
    penalties: Sequence[Penalty] = ()
    group_weight: float = 0.0
    exact: Tensor | None = None  # leading images (N, C, H, W) that are known already
    scale: CommonScale | None = None  # of all images, where nothing but their 8 bits tells it
    polish: Polish | None = None  # the steps after the course
    apart: int = 0  # leading images, of the exact ones, that the terms leave out

    def __str__(self) -> str:
        return " + ".join([f"{self.matching}", f"{self.annealing.weight:g} {self.prior}", *map(repr, self.penalties)])

    def images(self, state: AttackState) -> Tensor:
        """The state's images (R, B, C, H, W)."""
        copies = self.pixels.decode(state.z).unflatten(0, (state.copies, -1))
        if self.exact is None:
            return copies
        known = self.exact.to(copies).expand(state.copies, *self.exact.shape)
        return torch.cat([known, copies[:, len(self.exact) :]], 1)

    def __call__(self, state: AttackState, prior_weight: float | Tensor) -> Terms:
        """All terms at the state's images, label logits and subset."""
        copies = self.images(state)[:, self.apart :]
        batches = [copies.squeeze(0)] if state.copies == 1 else copies  # a view: iteration's gradient would be a copy
        each = [self._copy(*both, state.subset, prior_weight) for both in zip(batches, state.label_logits, strict=True)]
        loss, full, subset, roughness = map(torch.stack, zip(*each, strict=True))
        loss = loss.mean()
        if self.group_weight:
            loss = loss + self.group_weight * disagreement(copies)
        return Terms(loss, full, subset, roughness)

    def _copy(self, images: Tensor, logits: Tensor, subset: Tensor, prior_weight: float | Tensor) -> tuple[Tensor, ...]:
        match, roughness = self.matching(images, logits, subset), self.prior(images)
        loss = match.total + prior_weight * roughness + sum(penalty(images) for penalty in self.penalties)
        return loss, match.full, match.subset, roughness


def magia_step(state: AttackState, objective: Objective, schedule: Schedule, budget: Budget) -> tuple[int, Terms]:
    """One optimiser step on  rho [alpha |g_all - g|^2 + (1 - alpha) D_sub(g_T, g)] + tv_weight prior(x) + penalties.

    Images and label logits move together. T, a random subset of S(t) images, stays as it is during the line search,
    unless the schedule asks for the published way. Returns S(t) and the terms at the iterate that was reached.
    """
    size, spent, polish = schedule.size(state.step), state.spent, objective.polish
    weight, redraws = state.weigh(objective.annealing.at(spent)), schedule.resample == "closure"
    with state.timed():
        state.enter(max(state.phase, objective.annealing.phase(spent)))
        objective.matching.enter(state.phase, objective.pixels.decode(state.anchor))
        state.draw_subset(size)
        if polish and polish.is_on(state):
            polish.step(state, objective.pixels, budget)
        else:
            state.minimise(lambda: objective(state, weight).loss, budget, size if redraws else None)
        objective.pixels.project_(state.z)
    return size, objective(state, weight)  # for the record: neither its evaluation nor its time counts


def attack(
    state: AttackState,
    objective: Objective,
    schedule: Schedule,
    budget: Budget,
    observe: Callable[[AttackState, int, Terms, Tensor], None],
    interrupted: Callable[[], bool] = lambda: False,
) -> str:
    """MAGIA: step after step, a subset of scheduled size, until steps, evaluations or seconds are spent.

    Moves `state` and reports every step that ended well to `observe(state, subset size, terms, images)`; others are
    undone, see `AttackState.accept`. Returns why it ended: a bound of the budget, interrupt, non-finite, course, exact.
    """
    while not (ended := why_over(state, objective.annealing, objective.polish, budget)):
        size, terms = magia_step(state, objective, schedule, budget)
        if state.accept(terms):
            with torch.no_grad():
                observe(state, size, terms, objective.images(state)[state.leader].clamp(0, 1))
        if interrupted():
            return "interrupt"
    return ended


# ----------------------------------------------------------------------------------------------------
# From settings to an attack


def prepare(
    update: SharedUpdate,
    model: nn.Module,
    settings: argparse.Namespace,
    granted: Tensor | None = None,
    began: dict | None = None,
) -> tuple[AttackState, Objective, Known]:
    """The state that `attack` moves and the objective that it minimises, from the server's knowledge and the settings.

    Of the truth only `granted` goes in, the true labels (B,), where --label_strategy known asks for them. A resumed run
    passes the checkpoint that it `began` with, and keeps its signals.
    """
    started = time.perf_counter()
    known = known_ahead(update, model, settings, granted, began)
    known = known_from_pictures(update, model, known, settings, build_objective, attack, began)
    pixels = pixel_map(update, model, known, settings)
    state = first_state(update, known, pixels, settings)
    state.seconds = time.perf_counter() - started
    return state, build_objective(known.as_trained(update), model, known, pixels, settings), known


def build_objective(
    update: SharedUpdate, model: nn.Module, known: Known, pixels: PixelMap, settings: argparse.Namespace
) -> Objective:
    """The objective of the settings, with the penalties that have a weight and something to weigh.

    Where activations of all images are known, the objective matches these activations, with the gradients of the layers
    below. Gradients of a network with kinks are matched through softened kinks.
    """
    weights = (settings.chroma_weight, settings.curvature_weight, settings.third_weight)
    prior = Prior(settings.prior, *weights, settings.prior_power)
    if known.is_followed:
        matching, course, penalties, scale, polish = followed(update, model, known, prior, settings.tv_weight)
        return Objective(matching, prior, course, pixels, penalties, 0.0, known.pixels, scale, polish, known.apart)
    errors = known.signals.deltas.to(**place_of(model)) if known.signals else None
    kinked = kinked_chain(model) if settings.soften == "auto" else None
    matching = MatchingLoss(
        model,
        update.targets(model),
        settings.alpha,
        rescale=settings.rescale,
        subset_loss=settings.subset_loss,
        distance=settings.distance or ("relative" if kinked else "l2"),
        known=None if errors is None else (errors, known.features),
        training=update.training,
        statistics=update.batch_statistics(model),
        observed=None if settings.distance else observed(update, model, relative=bool(kinked)),
    )
    least = settings.noise_weight * matching.noise_of(update)
    scale = CommonScale.beside_gradients(update, model) if settings.scale_weight and known.pixels is None else None
    penalties = weighed_penalties(model, known, settings, matching.distance, scale)
    matching = SoftenedMatching(matching, kinked) if kinked else matching
    annealing = annealing_of(settings, known, least, matching.phases)
    return Objective(matching, prior, annealing, pixels, penalties, settings.group_weight, known.pixels, scale)


# ----------------------------------------------------------------------------------------------------
# The command line


@lasting_output
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Exit status: 0 done, 1 no step succeeded, or a file could not be written, 2 wrong input, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        settings, given = resolve(words, FLAGS, __doc__)
        if settings.show_schedule:
            return show_schedule(schedule_of(settings), Path(settings.save_dir))
        if settings.explain:
            return show_leaks(settings)
        if settings.save_batch:
            return save_batch(settings)
        if settings.audit:
            return audit(run_one, settings, given, words, FLAGS)
        return run_one(settings, given, words)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        return refused(Path(__file__).name, error)


def run_one(settings: argparse.Namespace, given: Mapping, words: Sequence[str]) -> int:
    """The victim's side, then the attacker's, in a directory of its own. Returns the exit status."""
    update, model, truth = victim(settings, place_named(settings), given)
    given = {name: value for name, value in given.items() if name not in update.overruled}
    adopt(settings, given, facts_of(update, settings), "the update")
    words = words_of(settings, FLAGS) if settings.resume else words  # the command of a resumed run, from its start
    with RunDirectory(run_path(settings), resume=bool(settings.resume), overwrite=settings.overwrite) as run:
        if settings.save_update:
            update.save(settings.save_update)
        with enough_threads(model, update.batch_size, update.image_shape):
            return run_attack(update, model, truth, settings, given, run, words)


def run_attack(
    update: SharedUpdate,
    model: nn.Module,
    truth: Batch | None,
    settings: argparse.Namespace,
    given: Mapping,
    run: RunDirectory,
    words: Sequence[str],
) -> int:
    """Prepare, attack, record: one run, in its directory. Returns the exit status."""
    began = run.read_checkpoint() if settings.resume else None
    digests = digests_of(settings, update, model, truth)
    granted = truth.labels.to(place_of(model)["device"]) if truth and settings.label_strategy == "known" else None
    notes = [*update.notes, *(truth.notes if truth else ())]
    with run.restored():
        if began:
            compare(began["digests"], digests)
        restored, scale, model, state, objective, known = prepared(prepare, update, model, settings, granted, began)
        config = vars(settings) | {"device": str(place_of(model)["device"])} | provenance(words)
        config |= privacy_of(update, settings) | {"scale": scale, "notes": notes}
        known = open_record(run, config, state, known, model, truth, began, digests)
    pace = {"log_every": settings.log_every, "checkpoint_every": settings.checkpoint_every}
    evidence = (*restored.evidence, *known.evidence)
    recorder = Recorder(run, truth, known, **pace, checkpoint=began, digests=digests, evidence=evidence)
    if not settings.quiet:
        print(introduction(update, settings, objective, known, model, run.path))
    vain = without_effect(given, settings, known, model, objective.annealing, holds_scale=objective.scale is not None)
    show_remarks(evidence, vain, notes, settings.quiet)
    if not began:
        recorder.start(objective.images(state)[state.leader])
    recorder.show = bar = Progress(settings.n_iter, state.step, quiet=settings.quiet)
    budget = Budget(settings.n_iter, settings.max_evals, settings.max_seconds)
    with interruptible() as interrupted, bar:
        try:
            ended_by = attack(state, objective, schedule_of(settings), budget, recorder, interrupted)
        except KeyboardInterrupt:
            state.restore_best()  # in the middle of a step: the checkpoint stays the last one written
            ended_by = "abort"
    images, labels = objective.images(state)[state.leader].detach(), state.label_logits[state.leader].softmax(1)
    if objective.scale:
        images, said = objective.scale.read(images)
        recorder.evidence = (*recorder.evidence, said)
    recorder.evidence = (*recorder.evidence, *(objective.polish.evidence if objective.polish else ()))
    replay = replayed(known.as_trained(restored), model, known, images.clamp(0, 1), labels, state.spent)
    figures = recorder.finish(state, images, ended_by, config, replay)
    return show_end(ended_by, figures, bool(recorder.sizes), state.setbacks, run, quiet=settings.quiet)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
