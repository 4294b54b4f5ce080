"""Values that come from a file: each is of the kind, the range and the shape that it must have, or a line says why not.

Files lie where others can change them, and JSON and torch files hold any type in any place. Whoever reads a file takes
each value through one of these functions before anything is computed from it.
"""

import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor


class DamagedError(ValueError):
    """A value of a file that cannot be what it should be; the message names the entry and its value."""


MANY = 10**9  # no count of steps, evaluations, rows or images is larger


def json_object(text: str) -> dict:
    """The object that a JSON text holds.

    Raises:
        DamagedError: the text is no JSON, is nested too deeply, or holds something else.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise DamagedError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise DamagedError(f"it holds {_shown(content)}, not an object with names")
    return content


def mapping(value: object, name: str, keys: Collection[str] = ()) -> Mapping:
    """A mapping that has all of these keys.

    Raises:
        DamagedError: it is none, or a key is missing.
    """
    if not isinstance(value, Mapping):
        raise DamagedError(f"{name} {_shown(value)} is not a mapping")
    missing = next((key for key in keys if key not in value), None)
    if missing is not None:
        raise DamagedError(f"{name} has no {missing!r}")
    return value


def sequence(value: object, name: str, length: int | None = None) -> Sequence:
    """A list or tuple of this length; None: of any.

    Raises:
        DamagedError: it is something else.
    """
    if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
        wanted = "a list" if length is None else f"a list of {length}"
        raise DamagedError(f"{name} {_shown(value)} is not {wanted}")
    return value


def whole(value: object, name: str, least: int = 0, most: int = MANY) -> int:
    """An integer within [least, most]; True is none, and neither is 2.0.

    Raises:
        DamagedError: it is something else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise DamagedError(f"{name} {_shown(value)} is not an integer from {least} to {most}")
    return value


def real(value: object, name: str, least: float = -math.inf, *, finite: bool = True) -> float:
    """A number of at least `least`, finite unless told otherwise.

    Raises:
        DamagedError: it is something else.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        is_number = False
    if not is_number or not value >= least or (finite and not abs(value) < math.inf):
        kind = "a finite number" if finite else "a number"
        raise DamagedError(
            f"{name} {_shown(value)} is not {kind}" + (f" from {least:g} on" if least > -math.inf else "")
        )
    return value


def switch(value: object, name: str) -> bool:
    """True or False.

    Raises:
        DamagedError: it is something else.
    """
    if not isinstance(value, bool):
        raise DamagedError(f"{name} {_shown(value)} is not true or false")
    return value


def word(value: object, name: str) -> str:
    """A text of characters that can be written.

    Raises:
        DamagedError: it is something else.
    """
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DamagedError(f"{name} {_shown(value)} is not a text")
    return value


def tensor(value: object, name: str, shape: Sequence[int], dtype: torch.dtype, *, finite: bool = True) -> Tensor:
    """A dense tensor of this shape and type, finite unless told otherwise; NaN is never let through.

    Raises:
        DamagedError: it is something else.
    """
    if not isinstance(value, Tensor) or not is_dense(value):
        raise DamagedError(f"{name} {_shown(value)} is not a dense tensor of numbers")
    if tuple(value.shape) != tuple(shape) or value.dtype != dtype:
        found, wanted = f"{value.dtype} {tuple(value.shape)}", f"{dtype} {tuple(shape)}"
        raise DamagedError(f"{name} is {found}, the settings ask for {wanted}")
    if value.isnan().any() or (finite and not value.isfinite().all()):
        raise DamagedError(f"{name} is not finite")
    return value.detach()


def indices(value: object, name: str, count: int, below: int) -> Tensor:
    """A tensor (count,) of integers from 0 to below - 1.

    Raises:
        DamagedError: it is something else.
    """
    found = tensor(value, name, (count,), torch.int64)
    if count and (int(found.min()) < 0 or int(found.max()) >= below):
        raise DamagedError(f"{name} has an entry outside 0 to {below - 1}")
    return found


def order(value: object, name: str, below: int) -> tuple[tuple[int, ...], ...]:
    """Lists of integers from 0 to below - 1: the images of each step.

    Raises:
        DamagedError: it is something else.
    """
    return tuple(
        tuple(whole(image, name, 0, below - 1) for image in sequence(step, name)) for step in sequence(value, name)
    )


def is_dense(value: Tensor) -> bool:
    """Whether a tensor holds its numbers one by one, in memory."""
    return value.layout == torch.strided and not (value.is_quantized or value.is_meta or value.is_nested)


def _shown(value: object) -> str:
    """A value as a message shows it: numbers and texts as they are, and no more of them than a line takes."""
    if isinstance(value, int) and abs(value) > 10**20:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)[:40]
    return f"a {type(value).__name__}"
