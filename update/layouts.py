"""Tensors in the layout of Keras (TensorFlow, Flax), turned into torch's.

              torch                    Keras
convolution   (out, in, h, w)          (h, w, in, out)
depthwise     (in * m, 1, h, w)        (h, w, in, m)
dense         (out, in)                (in, out)

Behind a flattening the inputs of a dense layer are in another order too: (c, h, w) in torch, (h, w, c) in Keras. A
shape does not show that order, so the model is asked which of its layers stand behind one. A file is in one layout or
the other as a whole: the layout counts as Keras's where every kernel has its shape there and some kernel does not have
torch's.

What no shape shows has to be tried. `suspected` lists the layouts that a model's shapes leave open: rows behind a
flattening in the order (h, w, c), kernels whose height and width were exchanged, as `array.T` leaves Keras's, both, and
Keras's layout of a model whose kernels are all square. `relaid` turns tensors of such a layout into torch's.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from network.flattening import flattened_shapes
from update.storage import StorageError


def kernels(model: nn.Module) -> list[str]:
    """The names of the weights of dense and convolutional layers, which are those that layouts differ in."""
    return [f"{name}.weight" if name else "weight" for name, m in model.named_modules() if _has_kernel(m)]


def _has_kernel(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, _ConvNd)) and isinstance(getattr(module, "weight", None), Tensor)


def is_keras_shape(found: Sequence[int], needed: Sequence[int]) -> bool:
    """Whether a kernel whose shape in torch is `needed` may have the shape `found` in Keras."""
    *sides, before, behind = found
    if len(found) != len(needed) or tuple(sides) != tuple(needed[2:]):
        return False
    is_depthwise = bool(sides) and needed[1] == 1 and before * behind == needed[0]
    return (behind, before) == tuple(needed[:2]) or is_depthwise


def fits(tensor: Tensor, own: Tensor) -> bool:
    """Whether a tensor may be the model's `own` one, in the one layout or the other."""
    return tensor.shape == own.shape or (tensor.dim() > 1 and is_keras_shape(tensor.shape, own.shape))


def in_torch_layout(
    tensors: Mapping[str, Tensor], model: nn.Module, image_shape: Sequence[int] | None, source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors in torch's layout, and a note on what was turned.

    Args:
        tensors: by the model's names.
        image_shape: (C, H, W) of the images, which decides on the order behind a flattening.
        source: the file's name in messages.

    Raises:
        StorageError: the tensors are in Keras's layout, and there is no image shape.
    """
    own = {name: parameter for name, parameter in model.state_dict().items() if name in tensors}
    here = [name for name in kernels(model) if name in own]
    in_torch = all(tensors[name].shape == own[name].shape for name in here)
    in_keras = all(tensors[name].dim() > 1 and is_keras_shape(tensors[name].shape, own[name].shape) for name in here)
    if not here or not in_keras:
        return dict(tensors), []
    if in_torch:
        said = "every kernel has the same shape in torch's layout and in Keras's: they are taken as torch's, (out, in)"
        return dict(tensors), [f"{source}: {said}"]
    if image_shape is None:
        raise StorageError(f"{source} is in Keras's layout, and nothing says how large the images are")
    behind = flattened_shapes(model, image_shape)
    turned = {name: _turned(tensors[name], own[name].shape, behind.get(name)) for name in here}
    return {**tensors, **turned}, [_said(source, [own[name] for name in here], behind, turned)]


ROWS, SIDES, KERAS = "rows", "sides", "keras"
SUSPECTED = {  # layouts that shapes may not show, in words
    (ROWS,): "rows behind a flattening in the order (h, w, c)",
    (ROWS, SIDES): "Keras's layout, transposed as a whole: rows (h, w, c), and kernels (out, in, w, h)",
    (SIDES,): "kernels (out, in, w, h)",
    (KERAS,): "Keras's layout, (h, w, in, out) and (in, out)",
}


def suspected(model: nn.Module, image_shape: Sequence[int]) -> list[tuple[str, ...]]:
    """Those of `SUSPECTED` under which tensors of the model's shapes would be others than in torch's layout."""
    own = {name: t for name, t in model.state_dict().items() if name in kernels(model)}
    changes = {
        ROWS: any(shape[0] > 1 for shape in flattened_shapes(model, image_shape).values()),
        SIDES: any(_has_sides(t) for t in own.values()),
        KERAS: bool(own) and all(is_keras_shape(t.shape, t.shape) for t in own.values()),
    }
    return [parts for parts in SUSPECTED if all(changes[part] for part in parts)]


def relaid(
    tensors: Mapping[str, Tensor], model: nn.Module, image_shape: Sequence[int], layout: Sequence[str]
) -> dict[str, Tensor]:
    """Tensors in torch's layout, from such of one of the `suspected` layouts, by the model's names."""
    behind, found = flattened_shapes(model, image_shape), dict(tensors)
    for name in (name for name in kernels(model) if name in found):
        if KERAS in layout:
            found[name] = _turned(found[name], found[name].shape, behind.get(name))
        if ROWS in layout and name in behind:
            channels, *sides = behind[name]
            found[name] = found[name].reshape(-1, math.prod(sides), channels).transpose(1, 2).reshape(found[name].shape)
        if SIDES in layout and _has_sides(found[name]):
            found[name] = found[name].transpose(2, 3).contiguous()
    return found


def _has_sides(kernel: Tensor) -> bool:
    return kernel.dim() == 4 and kernel.shape[2] == kernel.shape[3] > 1


def _turned(tensor: Tensor, needed: Sequence[int], flattened: Sequence[int] | None) -> Tensor:
    """One kernel of Keras's layout in torch's; `flattened` is (c, h, w) behind a flattening."""
    if flattened is not None:
        channels, *sides = flattened
        tensor = tensor.reshape(*sides, channels, needed[0])
    *sides, before, behind = range(tensor.dim())
    first = (before, behind) if tensor.dim() > 2 and needed[1] == 1 else (behind, before)
    return tensor.permute(*first, *sides).reshape(*needed).contiguous()


def _said(source: str, own: Sequence[Tensor], behind: Mapping[str, Sequence[int]], turned: Mapping) -> str:
    orders = [order for dims, order in ((4, "(h, w, in, out)"), (2, "(in, out)")) if any(t.dim() == dims for t in own)]
    said = f"{source}: its kernels are in Keras's layout, {' and '.join(orders)}, and are turned into torch's"
    rows = [name for name in turned if name in behind and behind[name][0] > 1]
    if rows:
        said += f"; the rows of {', '.join(map(repr, rows))}, behind a flattening, are taken in the order (h, w, c)"
        if all(t.dim() == 2 for t in own):
            said += ": if the client flattens channels first, (c, h, w), transpose the kernels in the file yourself"
    return said


def hint(found: Sequence[int], needed: Sequence[int]) -> str:
    """The way on for one kernel whose shape is Keras's in a file that is not in Keras's layout; empty for others."""
    if len(found) < 2 or math.prod(found) != math.prod(needed) or not is_keras_shape(found, needed):
        return ""
    if len(found) == 2:
        return (
            ": it is transposed, and other kernels are not; (in, out) is Keras's order, whose rows behind a flattening "
            "are in the order (h, w, c) too: save all kernels as Keras has them, or all as torch has them"
        )
    order = ", ".join(map(str, (len(found) - 1, len(found) - 2, *range(len(found) - 2))))
    return (
        f": it is in Keras's order (h, w, in, out), and other kernels are not: transpose by ({order}), or save all "
        f"kernels as Keras has them"
    )
