"""The client's optimiser: one step from weights and their gradient, as torch.optim makes it, and differentiable.

sgd     d = g' + decay w,    v = momentum v + d,    w <- w - rate (v, or d + momentum v with Nesterov's momentum)
adam    d = g' + decay w,    m and v its first and second moments,    w <- w - rate m^ / (sqrt(v^) + eps)
adamw   d = g',              the same,    w <- (1 - rate decay) w - rate m^ / (sqrt(v^) + eps)

g' is the gradient with FedProx's prox (w - w_0) added, then shortened to the norm `clip`. The rate of a step
is the base rate times the schedule's factor. Adam's moments are means with the weights `betas`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from update import checked

OPTIMISERS = ("sgd", "adam", "adamw")
NAMES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam: torch's own
DECAY = {"adamw": 0.01}  # torch's own weight decay, where it is not 0
TINY = 1e-6  # by which torch's clipping enlarges the norm
SCHEDULES = (
    "constant, cosine, linear, warmup:STEPS, warmup:STEPS:cosine or :linear, step:EVERY:FACTOR, exponential:FACTOR, or "
    "factors such as 1,1,0.1"
)


@dataclass(frozen=True)
class LocalOptimiser:
    """The rule of one step.

    Attributes:
        name: one of `OPTIMISERS`.
        momentum: of sgd, in [0, 1); without dampening.
        nesterov: whether this momentum is Nesterov's.
        weight_decay: None: torch's own, see `decay`.
        prox: FedProx's mu (Li et al. 2020, arXiv 1812.06127), the pull back to the server's weights.
        schedule: one of `SCHEDULES`; factors are of each step, or of each pass through the minibatches.
        clip: the norm that each step's gradient is shortened to, as torch.nn.utils.clip_grad_norm_ does; None: none.
        betas: of Adam, by which its two moments decay, each in [0, 1).
        eps: of Adam, added to the root of the second moment.

    Raises:
        ValueError: an unknown name or schedule, a number that is out of range, or that the optimiser has no use for.
    """

    name: str = "sgd"
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float | None = None
    prox: float = 0.0
    schedule: str = "constant"
    clip: float | None = None
    betas: tuple[float, float] = BETAS
    eps: float = EPS

    @classmethod
    def stated(cls, facts: object) -> "LocalOptimiser":
        """The optimiser that the facts of an update's file state; what they leave out has its default.

        Raises:
            ValueError: a fact is unknown, of another kind, or refused as in a `LocalOptimiser`.
        """
        facts = checked.mapping(facts, "training.optimiser")
        for name, value in facts.items():
            where = f"training.optimiser.{name}"
            if name in ("name", "schedule"):
                checked.word(value, where)
            elif name == "nesterov":
                checked.switch(value, where)
            elif name == "betas":
                for beta in checked.sequence(value, where, len(BETAS)):
                    checked.real(beta, where, 0)
            elif name in ("momentum", "prox", "eps") or (name in ("weight_decay", "clip") and value is not None):
                checked.real(value, where, 0)
            elif name not in ("weight_decay", "clip"):
                raise checked.DamagedError(f"training.optimiser has {name!r}, which is none of its facts")
        return cls(**{**facts, "betas": tuple(facts.get("betas", BETAS))})

    def __post_init__(self) -> None:
        if self.name not in OPTIMISERS:
            raise ValueError(f"--local_optimizer {self.name!r}: choose one of {', '.join(OPTIMISERS)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"--local_momentum {self.momentum:g}: at least 0 and below 1")
        if self.name != "sgd" and (self.momentum or self.nesterov):
            raise ValueError(f"--local_momentum, --local_nesterov: of --local_optimizer sgd, not of {self.name}")
        if self.nesterov and not self.momentum:
            raise ValueError("--local_nesterov needs --local_momentum above 0")
        for name in ("weight_decay", "prox"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"--local_{name} {value:g}: a finite number, at least 0")
        for name in ("clip", "eps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--local_{name} {value:g}: a finite number above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"--local_betas {','.join(map(str, self.betas))}: two numbers, at least 0 and below 1")
        if self.name == "sgd" and (self.betas, self.eps) != (BETAS, EPS):
            raise ValueError("--local_betas, --local_eps: of --local_optimizer adam and adamw, not of sgd")
        self._factors(1)  # raises on an unknown schedule

    @property
    def decay(self) -> float:
        """The weight decay, torch's own where none was named."""
        return DECAY.get(self.name, 0.0) if self.weight_decay is None else self.weight_decay

    @property
    def is_linear(self) -> bool:
        """Whether weights are a linear combination of the server's and of the steps' gradients, or these shortened."""
        return self.name == "sgd" and not (self.clip and self.prox)

    @property
    def pull(self) -> float:
        """FedProx's mu where a step is linear in the weights; clipping and Adam take it with the gradient."""
        return self.prox if self.is_linear else 0.0

    def __str__(self) -> str:
        said = ["plain SGD" if self == LocalOptimiser() else NAMES[self.name]]
        said += [f"momentum {self.momentum:g}{' (Nesterov)' if self.nesterov else ''}"] if self.momentum else []
        said += ["betas {:g} and {:g}".format(*self.betas)] if self.betas != BETAS else []
        said += [f"eps {self.eps:g}"] if self.eps != EPS else []
        said += [f"weight decay {self.decay:g}"] if self.decay else []
        said += [f"FedProx mu {self.prox:g}"] if self.prox else []
        said += [f"schedule {self.schedule}"] if self.schedule != "constant" else []
        said += [f"gradients clipped to {self.clip:g}"] if self.clip else []
        return ", ".join(said)

    def factors(self, steps: int, passes: int) -> list[float]:
        """What the base rate is multiplied by at each of so many steps, which are so many passes.

        Raises:
            ValueError: factors of another number of steps.
        """
        self.check(steps, passes)
        found = self._factors(steps)
        return [factor for factor in found for _ in range(steps // len(found))]

    def check(self, steps: int, passes: int) -> None:
        """Refuse a list of factors for another number of steps.

        Raises:
            ValueError: there are as many neither as steps nor as passes.
        """
        listed = self._factors(1) if "," in self.schedule else []
        if listed and len(listed) not in (steps, passes):
            raise ValueError(f"--local_schedule has {len(listed)} factors, for {steps} steps in {passes} passes")

    def _factors(self, steps: int) -> list[float]:
        """The factors of so many steps, or the factors that the schedule lists.

        Raises:
            ValueError: an unknown schedule.
        """
        name, *numbers = self.schedule.split(":")
        try:
            if name in ("constant", "cosine", "linear") and not numbers:
                return [SHAPES[name](step / steps) for step in range(steps)]
            if name == "exponential":
                (factor,) = _positive(numbers)
                return [factor**step for step in range(steps)]
            if name == "step":
                every, factor = int(numbers[0]), *_positive(numbers[1:])
                if every >= 1:
                    return [factor ** (step // every) for step in range(steps)]
            if name == "warmup":
                rising, shape = int(numbers[0]), SHAPES[numbers[1] if numbers[1:] else "constant"]
                if rising >= 1 and len(numbers) <= 2:
                    return [_warm(step, rising, steps, shape) for step in range(steps)]
            listed = _positive(name.split(",")) if not numbers and "," in name else []
        except (ValueError, TypeError, LookupError, OverflowError):
            listed = []
        if not listed:
            raise ValueError(f"--local_schedule {self.schedule[:40]!r}: choose one of {SCHEDULES}")
        return listed

    def in_units_of(self, rate: float) -> "LocalOptimiser":
        """The same rule for gradients that carry the base rate: w - factor (rate g + ...)."""
        own = {"weight_decay": rate * self.decay, "prox": rate * self.pull, "schedule": "constant", "clip": None}
        return replace(self, **own)

    def begun(self, weights: Sequence[Tensor]) -> "Steps":
        """Training that begins at these weights, those that the server sent out."""
        return Steps(self, list(weights), list(weights))


@dataclass
class Steps:
    """A training in progress.

    Attributes:
        rule: of each step.
        start: the server's weights.
        weights: those that were reached.
        count: steps so far.
    """

    rule: LocalOptimiser
    start: list[Tensor]
    weights: list[Tensor]
    count: int = 0
    _velocity: list[Tensor] = field(default_factory=list)
    _squares: list[Tensor] = field(default_factory=list)

    def direction(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """What this step's gradients bring into the combination: themselves, clipped; of Adam its quotients."""
        rule, gradients = self.rule, list(gradients)
        if rule.prox and not rule.is_linear:
            parts = zip(gradients, self.weights, self.start, strict=True)
            gradients = [gradient + rule.prox * (weight - start) for gradient, weight, start in parts]
        if rule.clip is not None:
            gradients = clipped(gradients, rule.clip)
        return gradients if rule.name == "sgd" else self._quotients(gradients)

    def move(self, direction: Sequence[Tensor], rate: float) -> None:
        """Make the step."""
        rule = self.rule
        self.count += 1
        if rule.name == "sgd":
            direction = self._pushed(direction)
        elif rule.name == "adamw" and rule.decay:
            self.weights = [(1 - rate * rule.decay) * weight for weight in self.weights]
        self.weights = [weight - rate * move for weight, move in zip(self.weights, direction, strict=True)]

    def _pushed(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """With the pull of FedProx and of weight decay, and momentum."""
        rule, moves = self.rule, list(direction)
        if rule.pull:
            parts = zip(moves, self.weights, self.start, strict=True)
            moves = [move + rule.pull * (weight - start) for move, weight, start in parts]
        if rule.decay:
            moves = [move + rule.decay * weight for move, weight in zip(moves, self.weights, strict=True)]
        if not rule.momentum:
            return moves
        before = self._velocity or [torch.zeros_like(move) for move in moves]
        self._velocity = [rule.momentum * old + move for old, move in zip(before, moves, strict=True)]
        if rule.nesterov:
            return [move + rule.momentum * new for move, new in zip(moves, self._velocity, strict=True)]
        return self._velocity

    def _quotients(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Adam's m^ / (sqrt(v^) + eps)."""
        (first, second), step = self.rule.betas, self.count + 1
        if self.rule.name == "adam" and self.rule.decay:
            gradients = [g + self.rule.decay * w for g, w in zip(gradients, self.weights, strict=True)]
        means = self._velocity or [torch.zeros_like(g) for g in gradients]
        squares = self._squares or [torch.zeros_like(g) for g in gradients]
        self._velocity = [first * m + (1 - first) * g for m, g in zip(means, gradients, strict=True)]
        self._squares = [second * v + (1 - second) * g.square() for v, g in zip(squares, gradients, strict=True)]
        large, small = 1 - first**step, math.sqrt(1 - second**step)
        parts = zip(self._velocity, self._squares, strict=True)
        return [m / large / (_root(v) / small + self.rule.eps) for m, v in parts]


def clipped(gradients: Sequence[Tensor], most: float) -> list[Tensor]:
    """The gradients, shortened together to a norm of `most`, as torch.nn.utils.clip_grad_norm_ does."""
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    share = (most / (norm + TINY)).clamp(max=1.0)
    return [share * gradient for gradient in gradients]


def _root(squares: Tensor) -> Tensor:
    """The square root, whose slope at zero is taken for zero: an entry that no gradient has reached stays."""
    is_there = squares > 0
    return torch.where(is_there, squares, torch.ones_like(squares)).sqrt() * is_there


SHAPES = {
    "constant": lambda share: 1.0,
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),  # torch's CosineAnnealingLR with T_max all steps
    "linear": lambda share: 1 - share,  # to zero, as the usual schedule of transformers
}


def _warm(step: int, rising: int, steps: int, shape: Callable[[float], float]) -> float:
    """The factor of a step: up to 1 in equal parts, as torch's LinearLR, then a shape over the steps that are left."""
    return (step + 1) / rising if step < rising else shape((step - rising) / (steps - rising))


def _positive(texts: Sequence[str]) -> list[float]:
    """The finite numbers above 0 in texts.

    Raises:
        ValueError: a text is none.
    """
    values = [float(text) for text in texts]
    if not all(0 < value < math.inf for value in values):
        raise ValueError("a factor must be finite and above 0")
    return values
