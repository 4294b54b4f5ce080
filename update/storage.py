"""Named tensors on disk, `.safetensors` or `.npz`, with text metadata; nothing is ever unpickled."""

import itertools
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_COUNT = itertools.count()
FORMATS = (".safetensors", ".npz")
_METADATA = "metadata/"  # prefix of the text entries of an .npz


class StorageError(ValueError):
    """A file that is missing, of an unknown kind, or damaged; the message names it."""


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write named tensors and text to `path`, in the format that its ending names.

    Raises:
        StorageError: unknown ending, or the file cannot be written.
    """
    path, metadata = checked_name(path), metadata or {}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(tensors, temporary, metadata)
            return
        # numpy has no bfloat16: such tensors go to float32, which holds them exactly
        arrays = {n: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for n, t in tensors.items()}
        with temporary.open("wb") as file:
            np.savez(file, **arrays, **{_METADATA + key: np.array(text) for key, text in metadata.items()})

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_atomically(path, write)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from None


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Named tensors and text metadata of a file written by `write_tensors`.

    Raises:
        StorageError: unknown ending, missing file, damaged content.
    """
    path = checked_name(path)
    if not path.is_file():
        raise StorageError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (SafetensorError, OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise StorageError(f"{path} is damaged or not a {path.suffix} file: {error}") from None
    try:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if not name.startswith(_METADATA)}
    except TypeError as error:
        raise StorageError(f"{path} holds an array that is not of numbers: {error}") from None
    text = {name.removeprefix(_METADATA): str(array) for name, array in arrays.items() if name.startswith(_METADATA)}
    return tensors, text


def replace_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary file beside `path`, then rename it over `path`: no reader ever sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_COUNT)}.partial")  # no two writers share one
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def checked_name(path: str | Path) -> Path:
    """The path, if its ending names a format.

    Raises:
        StorageError: it does not.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise StorageError(f"{path}: the name must end in {' or '.join(FORMATS)}")
    return path
