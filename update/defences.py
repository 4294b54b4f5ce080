"""Defences by name, the words of --defence. Both sides know the defences; the client applies them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from update.training import LocalTraining


@dataclass(frozen=True)
class Amount:
    """A number that a defence takes: whole or not, from `least` to `most`; `above` excludes `least`.

    `per` is ROUND for a length of the weight difference, STEP for one of this difference over the client's steps.
    """

    name: str
    least: float = 0.0
    most: float = math.inf
    whole: bool = False
    above: bool = False
    per: str = ""

    def read(self, text: str, defence: str) -> float:
        """The number in `text`.

        Raises:
            ValueError: the text is no number, or the number is out of range; the message names the `defence`.
        """
        try:
            value = (int if self.whole else float)(text)
        except ValueError:
            kind = "a whole number" if self.whole else "a number"
            raise ValueError(f"--defence {defence}: {self.name} {text!r} is not {kind}") from None
        inside = math.isfinite(value) and self.least <= value <= self.most and not (self.above and value == self.least)
        if not inside:
            bound = f"{'above' if self.above else 'at least'} {self.least:g}"
            bound += f" and at most {self.most:g}" if math.isfinite(self.most) else ""
            raise ValueError(f"--defence {defence}: {self.name} must be {bound}, not {text}")
        return value


ROUND, STEP = "round", "step"
SUM, PRIVATE = "secure_sum", "dpsgd"
EIGHT_BITS = 127  # the largest whole number of int8, of which -127 ... 127 are used
SHARE = Amount("SHARE", most=1, above=True)
GAMMA = Amount("GAMMA", most=1e30, above=True, per=STEP)
AMOUNTS: Mapping[str, tuple[Amount, ...]] = {
    "clip": (Amount("NORM", above=True),),
    "noise": (Amount("STD", above=True),),
    "topk": (SHARE,),
    "feedback": (SHARE, Amount("ROUNDS", least=1, most=1000, whole=True)),
    "percentile": (Amount("PERCENT", most=100),),
    "truncate": (GAMMA,),
    "svt": (
        Amount("FRACTION", most=1, above=True), Amount("EPSILON", least=1e-6), Amount("NOISE_VAR", least=1e-6), GAMMA,
        Amount("TAU", most=1e30, per=STEP),
    ),
    "localdp": (
        Amount("CLIP", above=True, per=ROUND), Amount("SENSITIVITY", above=True, per=ROUND),
        Amount("EPSILON", above=True), Amount("DELTA", most=1, above=True),
    ),
    "quantise": (Amount("BITS", least=1, most=16, whole=True),),
    "int8": (),
    "sign": (),
    "float16": (),
    "bfloat16": (),
    SUM: (Amount("CLIENTS", least=2, most=10**4, whole=True),),
    PRIVATE: (Amount("CLIP", above=True), Amount("SIGMA", least=1e-6)),
}  # fmt: skip
NAMES = ("none", *(":".join([name, *(amount.name for amount in own)]) for name, own in AMOUNTS.items()))
RESCALING = ("clip", "localdp", PRIVATE)  # defences that may shorten an update by a factor that is not sent


@dataclass(frozen=True)
class Defence:
    """One defence, such as topk with its amount (0.1,)."""

    name: str
    amounts: tuple[float, ...]

    def of_gradient(self, training: LocalTraining) -> "Defence":
        """The defence with its amounts in units of the averaged gradient that the update holds.

        The weight difference of a client is `training.combination().total` times as long: its rate times its steps.
        """
        reach = training.combination().total
        units = {"": 1.0, ROUND: reach, STEP: reach / training.steps}
        own = zip(AMOUNTS[self.name], self.amounts, strict=True)
        return replace(self, amounts=tuple(value / units[amount.per] for amount, value in own))


@dataclass(frozen=True)
class Defences:
    """Defences in the order in which the client applies them, as in "clip:1.0,noise:0.01"; "none" holds none.

    `text` is the defences as they were written.
    """

    text: str
    steps: tuple[Defence, ...]

    @classmethod
    def parse(cls, text: str) -> "Defences":
        """The defences that `text` names, between commas.

        Raises:
            ValueError: an unknown name, a missing or wrong number, `dpsgd` that is not the first, or a second
                `secure_sum`.
        """
        words = text.split(",")
        steps = tuple(_step(word, text) for word in words if words != ["none"])
        names = [step.name for step in steps]
        if PRIVATE in names[1:]:
            raise ValueError(f"--defence {text}: {PRIVATE} forms the gradient, it must come first and once")
        if names.count(SUM) > 1:
            raise ValueError(f"--defence {text}: one {SUM}, of all clients, not {names.count(SUM)}")
        return cls(text, steps)

    def __iter__(self) -> Iterator[Defence]:
        return iter(self.steps)

    def __str__(self) -> str:
        return self.text

    def of_gradient(self, training: LocalTraining) -> list[Defence]:
        """The defences with their amounts in units of the averaged gradient, see `Defence.of_gradient`."""
        return [step.of_gradient(training) for step in self.steps]

    @property
    def clients(self) -> int:
        """The number of clients whose updates are in the server's sum."""
        return next((int(step.amounts[0]) for step in self.steps if step.name == SUM), 1)

    @property
    def private(self) -> tuple[float, float] | None:
        """CLIP and SIGMA of DP-SGD; None without DP-SGD."""
        return next((step.amounts for step in self.steps if step.name == PRIVATE), None)

    @property
    def uneven(self) -> bool:
        """Whether each image or each client is shortened by itself, so that no single factor undoes the shortening."""
        names = [step.name for step in self.steps]
        summed = names[: names.index(SUM)] if SUM in names else ()
        return PRIVATE in names or any(name in RESCALING for name in summed)

    @property
    def rescale(self) -> bool:
        """Whether the defences may shorten the update by a factor that is not sent."""
        return any(step.name in RESCALING for step in self.steps)


def _step(word: str, text: str) -> Defence:
    name, *numbers = word.strip().split(":")
    amounts = AMOUNTS.get(name)
    if amounts is None or len(numbers) != len(amounts):
        raise ValueError(f"unknown defence {word!r}: choose from {', '.join(NAMES)}")
    return Defence(name, tuple(amount.read(number, text) for amount, number in zip(amounts, numbers, strict=True)))
