"""The tensors of another program by the names of the model's parameters and buffers.

Arrays without names are counted: their number says which of the model's lists they are. Names may carry what a wrapper
of the model has put in front of them, such as `module.` (DataParallel), `_orig_mod.` (torch.compile), `_module.`
(Opacus) or `model.` (Lightning); and the model may have such a prefix that the file's names lack. A renaming is taken
only where it gives every needed tensor, and each one is said in a note.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from network.parameters import trainable
from update.layouts import fits
from update.storage import UNNAMED, StorageError

COUNTER = "num_batches_tracked"  # BatchNorm's buffer that no output depends on
VARIANCE = "running_var"
STATISTICS = ("running_mean", VARIANCE)
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_module", "module")
KERAS = (  # the weights of a layer of Keras or Flax, in the order that torch's layers have them in
    "depthwise_kernel", "pointwise_kernel", "kernel", "gamma", "scale", "beta", "bias", "moving_mean",
    "moving_variance",
)  # fmt: skip
SEPARATOR = re.compile(r"[./:]")  # behind a part of a name
SHOWN = 3  # names in a note


def without_counters(names: Iterable[str]) -> list[str]:
    """The names of a state dict, without BatchNorm's counters of batches."""
    return [name for name in names if name.rpartition(".")[2] != COUNTER]


def statistics_in(names: Iterable[str]) -> list[str]:
    """Those of a state dict's names that are of running statistics."""
    return [name for name in names if name.rpartition(".")[2] in STATISTICS]


def lists_of(model: nn.Module) -> dict[str, list[str]]:
    """The lists of tensors that a client may send without names, by what they are."""
    state = list(model.state_dict())
    return {
        "the state dict": state,
        "the trainable parameters": list(trainable(model)),
        f"the state dict without {COUNTER}": without_counters(state),
        "all parameters": [name for name, _ in model.named_parameters()],
    }


def by_names_of(
    model: nn.Module, tensors: Mapping[str, Tensor], needed: Sequence[str], source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """A file's tensors by the model's names, and a note on each thing that had to change.

    Args:
        model: with the parameters that the client does not train frozen.
        tensors: by name, with or without prefixes, by Keras's names, or numbered.
        needed: the names without which the tensors are of no use.
        source: the file's name in messages.

    Raises:
        StorageError: the tensors can be taken for none of the model's lists, or for more than one.
    """
    notes = []
    if has_keras_names(tensors) and not all(name in tensors for name in needed):
        tensors = dict(zip((f"{UNNAMED}{n}" for n in range(len(tensors))), in_keras_order(tensors), strict=True))
        notes = [f"{source}: its names are Keras's, so its arrays are taken in their order"]
    if is_numbered(tensors):
        found, more = from_numbers(tensors, model, source)
    else:
        found, more = renamed(tensors, model.state_dict(), needed, source)
    return found, notes + more


def has_keras_names(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all names end as the weights of Keras's layers are called, and some as no weight of torch is."""
    ends = {_keras_end(name) for name in tensors}
    return bool(ends) and ends <= set(KERAS) and bool(ends & set(KERAS) - {"bias"})


def in_keras_order(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors layer by layer as they come, and those of a layer in the order of its weights."""
    layers = list(dict.fromkeys(_keras_layer(name) for name in tensors))
    order = sorted(tensors, key=lambda name: (layers.index(_keras_layer(name)), KERAS.index(_keras_end(name))))
    return [tensors[name] for name in order]


def _keras_end(name: str) -> str:
    return re.split(r"[./]", name.partition(":")[0])[-1]


def _keras_layer(name: str) -> str:
    return name.partition(":")[0].removesuffix(_keras_end(name))


def is_numbered(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors came without names, and were numbered when they were read."""
    return bool(tensors) and all(re.fullmatch(rf"{UNNAMED}\d+", name) for name in tensors)


def from_numbers(tensors: Mapping[str, Tensor], model: nn.Module, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Numbered tensors by the model's names, and a note where the list is neither state dict nor trained parameters.

    Of several lists of the right length the first whose shapes fit is taken.

    Raises:
        StorageError: a number is missing, or no list has as many tensors; the message names all lengths.
    """
    missing = next((n for n in range(len(tensors)) if f"{UNNAMED}{n}" not in tensors), None)
    if missing is not None:
        raise StorageError(f"{source}: {UNNAMED}{missing} is missing")
    in_turn, state, lists = [tensors[f"{UNNAMED}{n}"] for n in range(len(tensors))], model.state_dict(), lists_of(model)
    of_length = {what: names for what, names in lists.items() if len(names) == len(tensors)}
    if not of_length:
        raise StorageError(
            f"{source}: it holds {len(tensors)} arrays without names, the model needs {_lengths(lists)}; "
            f"name parameters that the client does not send with --frozen"
        )

    def has_shapes(names: Sequence[str]) -> bool:
        return all(fits(tensor, state[name]) for name, tensor in zip(names, in_turn, strict=True))

    what = next((what for what, names in of_length.items() if has_shapes(names)), next(iter(of_length)))
    usual = list(lists)[:2]
    notes = [] if what in usual else [f"{source}: its {len(tensors)} arrays are taken for {what}"]
    return dict(zip(of_length[what], in_turn, strict=True)), notes


def _lengths(lists: Mapping[str, Sequence[str]]) -> str:
    """Every length that would fit, with what it would be."""
    by_length: dict[int, str] = {}
    for what, names in lists.items():
        by_length.setdefault(len(names), what)
    if len(by_length) == 1:
        return str(*by_length)
    *first, last = (f"{length} ({what})" for length, what in sorted(by_length.items(), reverse=True))
    return f"{', '.join(first)} or {last}"


@dataclass(frozen=True)
class Renaming:
    """A way from a file's names to the model's: parts of wrappers dropped, one prefix stripped, another put in front.

    Attributes:
        stripped: the prefix of the file's names that the model's lack.
        added: the prefix of the model's names that the file's lack.
        drops: whether the parts in `WRAPPERS` are dropped, wherever they stand.
    """

    stripped: str = ""
    added: str = ""
    drops: bool = False

    def __call__(self, name: str) -> str | None:
        """The model's name; None for a name without the prefix."""
        name = dropped(name) if self.drops else name
        return self.added + name.removeprefix(self.stripped) if name.startswith(self.stripped) else None

    def __str__(self) -> str:
        said = []
        if self.drops:
            said.append("the parts of wrappers in its names are dropped")
        if self.stripped and self.added:
            said.append(f"the prefix {self.stripped!r} of its names is taken for the model's {self.added!r}")
        elif self.stripped:
            said.append(f"the prefix {self.stripped!r} of its names is stripped")
        elif self.added:
            said.append(f"the model's prefix {self.added!r} is put in front of its names")
        return ", ".join(said)


def dropped(name: str) -> str:
    """The name without the parts that wrappers of the model or of a layer have put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def renamed(
    tensors: Mapping[str, Tensor], known: Iterable[str], needed: Sequence[str], source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Named tensors by the model's names, and a note where names had to change.

    Args:
        tensors: by the file's names.
        known: the names of all that the model has.
        needed: the names without which the tensors are of no use.
        source: the file's name in messages.

    Raises:
        StorageError: two renamings give all needed tensors.
    """
    known, plain = set(known), Renaming()
    found = {plain: sum(name in tensors for name in needed), **_renamings(tensors, known, set(needed))}
    most = max(found.values())
    if found[plain] == most or 2 * most < len(needed):
        return dict(tensors), []
    best = [renaming for renaming, count in found.items() if count == most]
    first = best[0]
    rivals = [other for other in best if other.drops == first.drops and other.stripped != first.stripped]
    if rivals and most == len(needed):
        raise StorageError(
            f"{source} holds two sets of tensors: {first.stripped!r} and {rivals[0].stripped!r} both stand before "
            f"all names; save one of them"
        )
    names = {name: first(name) for name in tensors}
    others = [name for name, new in names.items() if new is None]
    notes = [f"{source}: {first}"]
    if others:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        notes.append(f"{source}: left out, as they have no such prefix: {', '.join(map(repr, others[:SHOWN]))}{more}")
    return {new: tensors[name] for name, new in names.items() if new is not None}, notes


def _renamings(tensors: Mapping[str, Tensor], known: set[str], needed: set[str]) -> Counter[Renaming]:
    """How many of the needed names each renaming gives, with those that drop nothing first."""
    found: Counter[Renaming] = Counter()
    for spell, drops in ((str, False), (dropped, True)):
        spelt = [spell(name) for name in tensors]
        if drops and (spelt == list(tensors) or len(set(spelt)) < len(spelt)):
            continue
        for added in _common_prefixes(known):
            short = {name.removeprefix(added) for name in needed}
            found.update(_prefixes(spelt, short, lambda prefix, a=added, d=drops: Renaming(prefix, a, d)))
    return found


def _prefixes(names: Iterable[str], wanted: set[str], make: Callable[[str], Renaming]) -> Iterable[Renaming]:
    """For each name each prefix behind which one of the wanted names stands."""
    for name in names:
        for end in (0, *(mark.end() for mark in SEPARATOR.finditer(name))):
            if name[end:] in wanted:
                yield make(name[:end])


def _common_prefixes(names: set[str]) -> list[str]:
    """The prefixes that all names share, part by part, the empty one first."""
    least, most, shared = min(names), max(names), [""]
    for mark in SEPARATOR.finditer(least):
        if not most.startswith(least[: mark.end()]):
            break
        shared.append(least[: mark.end()])
    return shared
