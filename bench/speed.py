"""The time of one evaluation, the time to sharp images, and the parts of a reading's time: `benchmark.py speed`.

Variants of one attack are timed side by side:

- published: the closure of MAGIA's script: the batch's gradient and the subset's each by a pass of its own, and both
  differentiated twice.
- loop: the program's own, `--signals off`: one pass forward and backward for both gradients.
- forward: the program once the activations of one layer are known (`attack.match.activations`). It matches the
  activations and, where these are too few, the gradients below the layer, which have to be differentiated twice.
- activations: as `forward`, without gradients.

The variants take turns, evaluation by evaluation, and the ratio is the median over turns: a machine that is slow for a
while is slow for all. Times of evaluations do not depend on the images' content, so evaluations are timed on noise, and
`forward` and `activations` get the activations that a reading would have found. Whole attacks are run on real images,
and read their own activations.
"""

import argparse
import copy
import functools
import itertools
import math
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import main_MAGIA_sel as magia
from attack.match.activations import ForwardLoss, ForwardMatching
from attack.match.entries import Gradient, squared_distance
from attack.match.gradients import Matching, subset_distance
from attack.optimise.budget import Budget
from attack.optimise.capture import FIRST
from attack.optimise.state import AttackState
from attack.prepare import Known
from attack.read.forecast import explain
from attack.read.layer_choice import candidate_layers
from attack.read.reader import read_layers
from attack.read.reading import Reading
from bench.cells import Cell
from bench.figures import write_table
from bench.measures import flags_of, victim_of
from bench.networks import short_names
from cli.ahead import known_ahead
from cli.model import model_options, server_model
from cli.runtime import enough_threads, place_named, stream
from cli.settings import resolve, schedule_of
from client.victim import share_update
from data import sides
from judge.metrics import mean_psnr
from judge.tables import markdown
from network.chain import index_of
from network.stage import run
from network.tracing import stages
from network.zoo import place_of
from update.gradients import averaged_gradient
from update.shared import SharedUpdate

SIDE = 32  # pixels of the images that evaluations are timed on
TURNS = 15  # of each variant, at most
SECONDS = 20.0  # of the turns of one batch size, about
WARM = {"cpu": 3, "cuda": FIRST + 3}  # evaluations before the first that is timed: on a GPU they are recorded first
LEAST = 3  # turns of each variant, at least
FULL = 6  # optimiser steps after which L-BFGS holds all its pairs
LONGEST = 0.15  # seconds of an evaluation beyond which L-BFGS's own share is not measured: that takes 150 evaluations
MATRIX = {"cpu": 1024, "cuda": 8192}  # side of the matrices whose product is the arithmetic limit
MARKS = (20, 25, 30)  # dB
BEST = 0.1  # dB below the best from which on the best counts as reached


@dataclass(frozen=True)
class PublishedMatching:
    """The matching loss as the published script computes it; `MatchingLoss` has the same value in one pass."""

    model: nn.Module
    target: Gradient
    alpha: float

    def enter(self, phase: int, images: Tensor) -> None:
        """Nothing changes in the only phase."""

    def __call__(self, images: Tensor, label_logits: Tensor, subset: Tensor) -> Matching:
        """Evaluate at images (B, C, H, W), label logits (B, K) and the indices (S,) of the subset T."""
        labels = label_logits.softmax(1)
        g_all = averaged_gradient(self.model, images, labels, create_graph=True)
        g_subset = averaged_gradient(self.model, images[subset], labels[subset], create_graph=True)
        full, sizes = squared_distance(g_all, self.target), {"batch_size": len(images), "subset_size": len(subset)}
        weak = subset_distance("published", g_subset, self.target, **sizes)
        return Matching(self.alpha * full + (1 - self.alpha) * weak, full, weak)


@dataclass(frozen=True)
class Variant:
    """One way to attack an update, ready for its first step."""

    state: AttackState
    objective: magia.Objective
    settings: argparse.Namespace

    def evaluate(self) -> Tensor:
        """Objective and gradient, as an optimiser's closure takes them."""
        return self.state.evaluate(self.loss)

    def evaluate_anew(self) -> None:
        """The same, never by a recording, which would show neither arithmetic nor memory."""
        self.state.backward(self.loss())

    def loss(self) -> Tensor:
        """The objective at the state's weight of the prior."""
        return self.objective(self.state, self.state.prior_weight).loss

    def ready(self) -> "Variant":
        """The variant, with a subset drawn, and the first phase and weight of the prior."""
        self.objective.matching.enter(0, self.objective.pixels.decode(self.state.anchor))
        self.state.draw_subset(schedule_of(self.settings).size(0))
        self.state.weigh(self.objective.annealing.at(0))
        return self


# ----------------------------------------------------------------------------------------------------
# The variants


def published(update: SharedUpdate, model: nn.Module, flags: Sequence[str]) -> Variant:
    """`--preset paper` with its closure as published."""
    settings, _ = resolve([*flags, "--preset", "paper"], magia.FLAGS)
    state, objective, _ = magia.prepare(update, model, settings)
    return Variant(
        state,
        replace(objective, matching=PublishedMatching(model, update.targets(model), settings.alpha)),
        settings,
    )


def loop(update: SharedUpdate, model: nn.Module, flags: Sequence[str]) -> Variant:
    """The defaults without signals."""
    settings, _ = resolve([*flags, "--signals", "off"], magia.FLAGS)
    state, objective, _ = magia.prepare(update, model, settings)
    return Variant(state, objective, settings)


def program(update: SharedUpdate, model: nn.Module, flags: Sequence[str]) -> Variant:
    """The defaults."""
    settings, _ = resolve(flags, magia.FLAGS)
    state, objective, _ = magia.prepare(update, model, settings)
    return Variant(state, objective, settings)


def forward(update: SharedUpdate, model: nn.Module, flags: Sequence[str]) -> Variant:
    """The defaults, with activations matched even where the images themselves are known.

    Raises:
        ValueError: not every image was told apart.
    """
    settings, _ = resolve(flags, magia.FLAGS)
    began = time.perf_counter()
    known = replace(known_ahead(update, model, settings, None, None), pixels=None)
    if not known.is_complete:
        raise ValueError(f"{len(known.features)} of {update.batch_size} images told apart")
    made = from_known(update, model, known, settings)
    made.state.seconds = time.perf_counter() - began
    return made


def from_known(update: SharedUpdate, model: nn.Module, known: Known, settings: argparse.Namespace) -> Variant:
    """The program's attack from `known`."""
    pixels = magia.pixel_map(update, model, known, settings)
    objective = magia.build_objective(update, model, known, pixels, settings)
    return Variant(magia.first_state(update, known, pixels, settings), objective, settings)


ATTACKS = {"published": published, "loop": loop, "program": program, "forward": forward}


def on_noise(batch_size: int, flags: Sequence[str]) -> dict[str, Variant]:
    """The variants on one update of noise images; `forward` and `activations` get activations and labels."""
    settings, _ = resolve(flags, magia.FLAGS)
    place = place_named(settings)
    generator, shape = stream(settings.seed, "speed"), (3, *sides(settings.image_size or SIDE))
    images = torch.rand(batch_size, *shape, generator=generator).to(**place)
    labels = torch.randint(settings.num_classes, (batch_size,), generator=generator).to(place["device"])
    options = model_options(settings)
    model = server_model(settings, settings.model, shape, settings.num_classes, options).to(**place)
    update = share_update(model, settings.model, images, labels, settings.num_classes, options=options)
    chain = stages(model)
    deepest = next((row["layer"] for row in explain(chain, shape, batch_size) if row["deepest"]), chain[-1].name)
    start = max(1, index_of(chain, deepest))
    with torch.no_grad():
        inputs = run(chain[:start], images)
    given = from_known(update, model, Known(batch_size, None, torch.empty(0), labels, start, inputs), settings)
    alone = ForwardLoss(chain, update.image_shape, start, inputs, labels, {})
    matching = ForwardMatching(alone, given.objective.annealing)
    variants = {
        "published": published(update, model, flags),
        "loop": loop(update, model, flags),
        "forward": given,
        "activations": replace(given, objective=replace(given.objective, matching=matching)),
    }
    return {name: variant.ready() for name, variant in variants.items()}


# ----------------------------------------------------------------------------------------------------
# The measures


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of wall time, to the end of all work that was queued on the device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def in_turns(works: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, list[float]]:
    """Seconds of each work, turn by turn."""
    for work in works.values():
        for _ in range(WARM[device.type]):
            work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    began = time.perf_counter()
    for turn in range(TURNS):
        if turn >= LEAST and time.perf_counter() - began > SECONDS:
            break
        for name, work in works.items():
            seconds[name].append(timed(work, device))
    return seconds


def peak_memory(work: Callable[[], object], device: torch.device) -> float:
    """MiB of tensors that `work` holds at its peak, beyond those held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    held = most = 0
    for event in sorted(record.events(), key=lambda event: event.time_range.start):
        held += event.self_cpu_memory_usage
        most = max(most, held)
    return most / 2**20


def arithmetic(work: Callable[[], object]) -> int:
    """Floating-point operations of its matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the device's own product of two large square matrices, the best of several."""
    side = MATRIX[device.type]
    a = torch.rand(side, side, device=device, dtype=dtype)
    (seconds,) = in_turns({"product": lambda: a @ a}, device).values()
    return 2 * side**3 / min(seconds)


def outside_share(variant: Variant, device: torch.device) -> float:
    """The share of an optimiser step outside its closure, once L-BFGS has all its pairs."""
    inside = 0.0

    def closure() -> Tensor:
        nonlocal inside
        found = []
        inside += timed(lambda: found.append(variant.evaluate()), device)
        return found[0]

    for _ in range(FULL):
        variant.state.optimizer.step(closure)
    inside = 0.0
    whole = timed(lambda: variant.state.optimizer.step(closure), device)
    return 1 - inside / whole


def evaluations(batch_size: int, flags: Sequence[str]) -> tuple[list[Cell], list[Cell]]:
    """For each variant a row of its time and memory, and a row of its arithmetic and L-BFGS's share of a step.

    Evaluations take as many threads as a run does; the matrix product, which is their limit, takes all threads.
    """
    variants = on_noise(batch_size, flags)
    pixels, model = variants["loop"].objective.pixels, variants["published"].objective.matching.model
    rate = matrix_rate(pixels.device, pixels.dtype)
    with enough_threads(model, batch_size, variants["loop"].state.z.shape[1:]):
        return _evaluated(variants, {"batch_size": batch_size, "device": str(pixels.device)}, pixels.device, rate)


def _evaluated(
    variants: Mapping[str, Variant], of: Cell, device: torch.device, rate: float
) -> tuple[list[Cell], list[Cell]]:
    seconds = in_turns({name: variant.evaluate for name, variant in variants.items()}, device)
    rows, limits = [], []
    for name, variant in variants.items():
        where = of | {"variant": name}
        own, flops = median(seconds[name]), arithmetic(variant.evaluate_anew)
        ratios = [other / mine for other, mine in zip(seconds["published"], seconds[name], strict=True)]
        figures = {"ms_per_evaluation": 1e3 * own, "ratio_to_published": median(ratios)}
        rows.append(where | figures | {"peak_mib": peak_memory(variant.evaluate_anew, device)})
        share = {"gflop": flops / 1e9, "gflop_per_second": flops / own / 1e9, "share_of_limit": flops / own / rate}
        own_share = outside_share(variant, device) if own < LONGEST and name != "published" else None
        limits.append(where | share | {"lbfgs_share_of_step": own_share})
    return rows, limits


def course(name: str, batch_size: int, flags: Sequence[str], max_evals: int) -> Cell:
    """Evaluations and seconds, the reading included, after which a whole attack reaches each of MARKS."""
    update, model, truth, _ = victim_of({"batch_size": batch_size}, flags)
    where = {"batch_size": batch_size, "device": str(place_of(model)["device"]), "variant": name}
    with enough_threads(model, update.batch_size, update.image_shape):
        try:
            variant = ATTACKS[name](update, model, [*flags_of({"batch_size": batch_size}), *flags])
        except ValueError as error:
            return where | {"note": str(error)}
        points = attacked(variant, truth.images, max_evals)
    best = max(points)[0]
    row = where | {"best_db": best, "seconds_to_best": first_at(points, best - BEST)[2]}
    for mark in MARKS:
        row |= dict(zip((f"evaluations_{mark}", f"seconds_{mark}"), first_at(points, mark)[1:], strict=True))
    return row | {"evaluations": points[-1][1], "seconds": points[-1][2], "note": ""}


def attacked(variant: Variant, truth: Tensor, max_evals: int) -> list[tuple[float, int, float]]:
    """The mean PSNR against true images (B, C, H, W) in dB, evaluations and seconds: at the start and after steps."""
    with torch.no_grad():
        start = variant.objective.images(variant.state)[0].clamp(0, 1).cpu()
    points = [(mean_psnr(truth, start), 0, variant.state.seconds)]

    def observe(state: AttackState, size: int, terms: object, images: Tensor) -> None:
        points.append((mean_psnr(truth, images.cpu()), state.evaluations, state.seconds))

    budget = Budget(n_iter=max_evals, max_evals=max_evals)
    magia.attack(variant.state, variant.objective, schedule_of(variant.settings), budget, observe)
    return points


def first_at(points: Iterable[tuple[float, int, float]], level: float) -> tuple:
    """The first point that reaches the level; Nones where no point does."""
    return next((point for point in points if point[0] >= level), (None, None, None))


def reading_stages(batch_size: int, flags: Sequence[str]) -> dict[str, float]:
    """Seconds of each stage of a reading: spans, images told apart, and each layer on the way down."""
    update, model, _, settings = victim_of({"batch_size": batch_size}, flags)
    with enough_threads(model, update.batch_size, update.image_shape):
        return _stage_seconds(update, model, settings)


def _stage_seconds(update: SharedUpdate, model: nn.Module, settings: argparse.Namespace) -> dict[str, float]:
    began = time.perf_counter()
    try:
        reading = read_layers(update, model, generator=stream(settings.seed, "signals"))
    except ValueError:
        return {"nothing told apart": time.perf_counter() - began}
    spans = _span_seconds(update, model, reading)
    told = {row["layer"]: row["seconds"] for row in reading.layers if row["dimension"] is not None}
    down = {f"down to {row['layer']}": row["seconds"] for row in reading.layers if row["dimension"] is None}
    seconds = {"span": sum(spans.values()), "unmixing": sum(told.values()) - sum(spans.values())}
    return seconds | {name: spent for name, spent in down.items() if spent > 0} | {"whole": reading.seconds}


def _span_seconds(update: SharedUpdate, model: nn.Module, reading: Reading) -> dict[str, float]:
    """Seconds of the spans of the layers that were asked, measured again by themselves."""
    chain = stages(copy.deepcopy(model).double())
    asked = {row["layer"] for row in reading.layers if row["dimension"] is not None}
    device, seconds = place_of(model)["device"], {}
    for layer in candidate_layers(chain, update.image_shape, update.gradients):
        if layer.name in asked:
            like = chain[-1].module.weight
            span = functools.partial(layer.span, update.gradients, update.batch_size, like)
            seconds[layer.name] = timed(span, device)
    return seconds


def growth(rows: Mapping[int, Mapping[str, float]]) -> list[Cell]:
    """By stage, seconds at each batch size, and the power of B with which they grow from the first to the last.

    A stage of no time, or of a negative difference of two clocks, has no power.
    """
    table = []
    for name in dict.fromkeys(name for stages_ in rows.values() for name in stages_):
        own = {size: stages_[name] for size, stages_ in rows.items() if name in stages_}
        sizes = sorted(own)
        power = None
        if len(sizes) > 1 and own[sizes[0]] > 0 and own[sizes[-1]] > 0:
            power = math.log(own[sizes[-1]] / own[sizes[0]]) / math.log(sizes[-1] / sizes[0])
        table.append({"stage": name} | {f"B={size}": own.get(size) for size in rows} | {"power_of_B": power})
    return table


# ----------------------------------------------------------------------------------------------------
# The command


def devices() -> list[str]:
    """The CPU, and CUDA where there is one."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def speed(asked: argparse.Namespace, flags: Sequence[str]) -> list[Cell]:
    """Measure all variants, write speed.csv, speed.md and the tables of its parts, and return the rows of speed.csv."""
    asked.out.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[Cell]] = {"speed": [], "limits": [], "courses": [], "stages": []}
    for device, (name, model) in itertools.product(asked.device, _networks(asked.models, flags).items()):
        for table, rows in _of_network([*flags, *model, "--device", device], asked).items():
            tables[table] += [{"network": name} | row for row in rows]
    for table, rows in tables.items():
        write_table(rows, asked.out / table)
    parts = {
        "One evaluation": tables["speed"],
        "Its arithmetic, the device's own matrix product as the limit, and L-BFGS's share of a step": tables["limits"],
        f"Whole attacks: evaluations and seconds to {', '.join(map(str, MARKS))} dB": tables["courses"],
        "A reading, stage by stage, in seconds": tables["stages"],
    }
    text = "\n".join(f"## {title}\n\n{markdown(part)}" for title, part in parts.items() if part)
    (asked.out / "speed.md").write_text(text, encoding="utf-8")
    return tables["speed"]


def _networks(models: Sequence[str], flags: Sequence[str]) -> dict[str, list[str]]:
    """The flags of each network by its name in tables; without a list of networks, the one that the flags name."""
    if not models:
        return {resolve(flags, magia.FLAGS)[0].model: []}
    return {name: ["--model", *shlex.split(text)] for text, name in short_names(models).items()}


def _of_network(flags: Sequence[str], asked: argparse.Namespace) -> dict[str, list[Cell]]:
    """The rows of each table of one network on one device."""
    rows, limits, courses, readings = [], [], [], {}
    for size in asked.batch_sizes:
        some, more = evaluations(size, flags)
        rows, limits = rows + some, limits + more
    if not asked.evaluations_only:
        for size in asked.course:
            courses += [course(name, size, flags, asked.max_evals) for name in ATTACKS]
        readings = {size: reading_stages(size, flags) for size in asked.reading}
    device = str(place_named(resolve(flags, magia.FLAGS)[0])["device"])
    stages_ = [{"device": device} | row for row in growth(readings)]
    return {"speed": rows, "limits": limits, "courses": courses, "stages": stages_}
