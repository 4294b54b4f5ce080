"""Defences by name, the words of --defence. Both sides know the defences; the client applies them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Amount:
    """A number that a defence takes: whole or not, from `least` to `most`; `above` excludes `least`."""

    name: str
    least: float = 0.0
    most: float = math.inf
    whole: bool = False
    above: bool = False

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


SUM, PRIVATE = "secure_sum", "dpsgd"
AMOUNTS: Mapping[str, tuple[Amount, ...]] = {
    "clip": (Amount("NORM", above=True),),
    "noise": (Amount("STD", above=True),),
    "topk": (Amount("SHARE", most=1, above=True),),
    "quantise": (Amount("BITS", least=1, most=16, whole=True),),
    "sign": (),
    "float16": (),
    "bfloat16": (),
    SUM: (Amount("CLIENTS", least=2, most=10**4, whole=True),),
    PRIVATE: (Amount("CLIP", above=True), Amount("SIGMA", least=1e-6)),
}
NAMES = ("none", *(":".join([name, *(amount.name for amount in own)]) for name, own in AMOUNTS.items()))
RESCALING = ("clip", PRIVATE)  # defences that may shorten an update by a factor that is not sent


@dataclass(frozen=True)
class Defence:
    """One defence, such as topk with its amount (0.1,)."""

    name: str
    amounts: tuple[float, ...]


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
        return PRIVATE in names or (SUM in names and "clip" in names[: names.index(SUM)])

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
