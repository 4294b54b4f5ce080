"""Named tensors on disk, `.safetensors` or `.npz`, with text metadata; nothing is ever unpickled.

Files of other programs are read as well: `.npz` files whose arrays have no names, and files of `torch.save`, loaded
with `weights_only=True`.
"""

import os
import re
import secrets
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from update.npz import check_size, read_arrays

TEMPORARY = re.compile(r"\.magia-[0-9a-f]{32}\.partial")  # names of files that `replace_atomically` leaves if killed
FORMATS = (".safetensors", ".npz")  # endings of files that are written and read
TORCH = (".pt", ".pth", ".ckpt", ".bin", ".pt.tar", ".pth.tar")  # endings of torch's files, which are only read
NESTS = (  # entries of a checkpoint that are entered, the first of them that there is
    "state_dict", "model_state_dict", "model", "module", "net", "weights", "params", "parameters", "gradients", "grads",
)  # fmt: skip
DEEPEST = 3  # entries within entries: beyond, a checkpoint may hold itself
MOST_SAID = 300  # characters of a list of names
ENTERED = "entered"  # the name of the text that says which entry of a torch file the tensors come from
UNNAMED = "arr_"  # numpy's name of an array without a name, before its number
_METADATA = "metadata/"  # prefix of the text entries of an .npz
MOST_TEXT = 10**7  # bytes of the text entries of an .npz
COPIES = 8  # of a model's tensors in a file, at most: gradients and weights, or weights and an optimiser's state
MARGIN = 10**6  # bytes of names and headers
NUMBERS = (  # types of tensors that can be computed with, or are refused by name where the file is checked
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
# errors of numpy and safetensors on a damaged file; TypeError on a lone .npy array
DAMAGED = (SafetensorError, OSError, ValueError, EOFError, TypeError, KeyError, zipfile.BadZipFile, zlib.error)


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


def read_text(path: str | Path) -> dict[str, str]:
    """The text metadata of a file, without its tensors.

    A torch file may hold the tensors in an entry beside others, such as a checkpoint's `state_dict` beside `epoch` and
    `optimizer`. The text says so under `ENTERED`, in a sentence.

    Raises:
        StorageError: as in `read_tensors`.
    """
    if _ending(Path(path)) in TORCH:  # such a file has none
        return {}
    return _read(path, wanted=lambda name: False)[1]


def read_tensors(
    path: str | Path, *, wanted: Callable[[str], bool] = lambda name: True, most: int | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Named tensors and text metadata of a file; a list of tensors in a torch file is named as numpy would name it.

    Args:
        path: the file.
        wanted: whether the tensor of a name is to be read; of a torch file all are.
        most: bytes of all wanted tensors together, see `room_for`; None: as many as fit into memory.

    Raises:
        StorageError: unknown ending, missing file, damaged content, too large, or content that is not tensors.
    """
    tensors, text = _read(path, wanted, most)
    for name, tensor in tensors.items():
        if tensor.dtype not in NUMBERS:
            raise StorageError(
                f"{path}: {name!r} holds {tensor.dtype}, with which nothing can be computed: store it as float32"
            )
    try:
        check_size(Path(path), sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()), most)
    except ValueError as error:  # a tensor of a torch file may repeat a few numbers without end
        raise StorageError(str(error)) from None
    return tensors, text


def room_for(model: nn.Module) -> int:
    """The bytes that a file of tensors of this model may take: COPIES of each of its tensors in double precision."""
    return MARGIN + COPIES * 8 * sum(tensor.numel() for tensor in model.state_dict().values())


def _read(
    path: str | Path, wanted: Callable[[str], bool], most: int | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = checked_name(path, FORMATS + TORCH)
    if not path.is_file():
        raise StorageError(f"no such file: {path}")
    if (content := _content_of(path)) and content != (TORCH[0] if _ending(path) in TORCH else path.suffix):
        raise StorageError(f"{path}: its content is that of a file that ends in {content}: rename it")
    try:
        if _ending(path) in TORCH:
            return _read_torch(path, most)
        if path.suffix == ".safetensors":
            return _read_safetensors(path, wanted, most)
        return _read_npz(path, wanted, most)
    except DAMAGED as error:
        if isinstance(error, StorageError):
            raise
        named = "" if str(path) in str(error) else f"{path} is damaged or not a {path.suffix} file: "
        raise StorageError(f"{named}{error}") from None


def _content_of(path: Path) -> str:
    """The ending that a file's first bytes, or the members of its archive, speak for; empty where they do not tell."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
            if any(Path(name).name == "data.pkl" for name in names):
                return TORCH[0]
            return ".npz" if any(name.endswith(".npy") for name in names) else ""
        with path.open("rb") as file:
            begins = file.read(9)  # of .safetensors the length of a JSON object, and its brace
    except (OSError, ValueError, zipfile.BadZipFile):
        return ""
    is_header = begins[8:] == b"{" and int.from_bytes(begins[:8], "little") < path.stat().st_size
    return ".safetensors" if is_header else ""


def _read_safetensors(path: Path, wanted: Callable[[str], bool], most: int | None) -> tuple[dict, dict]:
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if wanted(name)]  # noqa: SIM118
        check_size(path, path.stat().st_size if names else 0, most)
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def _read_npz(path: Path, wanted: Callable[[str], bool], most: int | None) -> tuple[dict, dict]:
    if not zipfile.is_zipfile(path):
        raise StorageError(f"{path} is damaged or not an .npz file")
    texts = read_arrays(path, lambda name: name.startswith(_METADATA), MOST_TEXT)
    numbers = read_arrays(path, lambda name: not name.startswith(_METADATA) and wanted(name), most)
    try:
        tensors = {name: torch.from_numpy(_in_order(array)) for name, array in numbers.items()}
    except TypeError as error:
        raise StorageError(f"{path} holds an array that is not of numbers: {error}") from None
    return tensors, {name.removeprefix(_METADATA): str(array) for name, array in texts.items()}


def _in_order(array: object) -> object:
    """An array with its bytes in this machine's order; other content of a file unchanged."""
    return array.astype(array.dtype.newbyteorder("="), copy=False) if isinstance(array, np.ndarray) else array


def _read_torch(path: Path, most: int | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    check_size(path, size, most)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of pickles that are refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on a damaged file
        raise StorageError(f"{path} is damaged or cannot be loaded safely: {_why_unsafe(error)}") from None
    said = []
    for _ in range(DEEPEST):
        if not isinstance(content, dict) or (entry := _entry_of(content, path)) is None:
            break
        said, content = [*said, f"{path}: the tensors in its entry {entry!r} are taken"], content[entry]
    if isinstance(content, (list, tuple)):
        content = {f"{UNNAMED}{index}": tensor for index, tensor in enumerate(content)}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise StorageError(f"{path} holds a {type(content).__name__}: a list of tensors, or tensors by name, is needed")
    if others := [name for name, entry in content.items() if not isinstance(entry, Tensor)]:
        if len(others) == len(content) or others[0].startswith(UNNAMED):
            raise StorageError(f"{path}: {others[0]!r} is a {type(content[others[0]]).__name__}, not a tensor")
        said.append(f"{path}: left out, as they are no tensors: {', '.join(map(repr, others))}"[:MOST_SAID])
    tensors = {name: tensor.detach() for name, tensor in content.items() if isinstance(tensor, Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
            raise StorageError(f"{path}: {name!r} is not a dense tensor of numbers")
    return tensors, {ENTERED: "; ".join(said)} if said else {}


def _why_unsafe(error: Exception) -> str:
    """Why torch does not load a file; what to save instead, where the file holds objects of a class."""
    if of_class := re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error)):
        return (
            f"it holds an object of {of_class[1]}, and nothing is ever unpickled; "
            f"save the tensors alone: a dict or a list of them, such as torch.save(model.state_dict(), path)"
        )
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__


def _entry_of(content: dict, path: Path) -> str | None:
    """The entry of a checkpoint that holds its tensors; None where the checkpoint holds tensors by name itself.

    Raises:
        StorageError: several entries hold tensors, and none has a usual name.
    """
    counts = {name: _tensors_in(entry) for name, entry in content.items() if isinstance(name, str)}
    nests = [name for name, count in counts.items() if count]
    if usual := next((name for name in NESTS if name in nests), None):
        return usual
    beside = sum(isinstance(entry, Tensor) for entry in content.values())  # such as a loss
    if not nests or beside >= max(counts.values()):
        return None
    if len(nests) > 1:
        raise StorageError(f"{path} holds tensors in {', '.join(map(repr, nests))}: save one of these alone")
    return nests[0]


def _tensors_in(entry: object, depth: int = DEEPEST) -> int:
    """How many tensors an entry of a checkpoint holds: as a list, as a dict by name, or in an entry of its own."""
    if isinstance(entry, (list, tuple)):
        return len(entry) if all(isinstance(value, Tensor) for value in entry) else 0
    if not isinstance(entry, dict) or not all(isinstance(name, str) for name in entry):
        return 0
    if all(isinstance(value, Tensor) for value in entry.values()):
        return len(entry)
    return max(_tensors_in(value, depth - 1) for value in entry.values()) if depth else 0


def replace_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary file beside `path`, then rename it over `path`: no reader ever sees half a file.

    A link at `path` is replaced, and the file that it names stays as it is.
    """
    # A name that nobody guesses: no two writers share it, no user has a file there, and nobody has put a link there.
    temporary = path.with_name(f".magia-{secrets.token_hex(16)}.partial")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename == str(temporary):  # a message names the file that the user knows
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def checked_name(path: str | Path, formats: Sequence[str] = FORMATS) -> Path:
    """The path, if its ending names one of the formats.

    Raises:
        StorageError: the ending names no format.
    """
    path = Path(path)
    if _ending(path) not in formats:
        raise StorageError(f"{path}: the name must end in {' or '.join(formats)}")
    return path


def _ending(path: Path) -> str:
    """The last ending of a name, or the last two of an old torch file, .pth.tar."""
    return "".join(path.suffixes[-2:] if path.suffix == ".tar" else path.suffixes[-1:])
