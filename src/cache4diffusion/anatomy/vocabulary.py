"""What the operations on a tape mean: which pass a tensor on, which mix tokens, which only look at shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


VIEWS = words("""
    view reshape flatten unflatten permute transpose movedim moveaxis swapaxes swapdims squeeze unsqueeze expand
    expand_as view_as reshape_as chunk split split_with_sizes tensor_split hsplit vsplit dsplit __getitem__ narrow
    unbind select t T mT H mH real data detach unfold as_strided diagonal view_as_real view_as_complex
""")
"""Give another look at (a piece of) their first operand."""

COPIES = words("""
    contiguous clone to type type_as float half bfloat16 double cpu cuda clip clamp clamp_min clamp_max nan_to_num
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout
""")
"""Give the values of their first operand, as far as a cache is concerned."""

WRITES = words("__setitem__ write_through")
"""Put their last operand into a piece of their first."""

PASSES = VIEWS | COPIES
JOINS = words("cat concat concatenate hstack vstack stack pad_sequence")
SUMS = words("add sub rsub")
PRODUCTS = words("mul multiply div divide true_divide")
FIRST_ONLY = PASSES | words("repeat tile flip roll masked_fill index_select gather")
"""Depend on the values of their first operand alone (the others give shapes, types or places)."""

CREATIONS = words("""
    zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full new_tensor
""")
"""Depend on no values."""

MATRIX = words("matmul mm bmm baddbmm addbmm einsum tensordot")
HEAVY = MATRIX | words("""
    linear addmm addmv mv bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    scaled_mm _scaled_mm grouped_mm _grouped_mm fold im2col fft fftn fft2 rfft rfft2 rfftn opaque
""")
"""Work worth saving when it reads a stream: what makes a module more than a norm."""

NORMS = words("layer_norm rms_norm")
"""Of whole layers, where a network normalises the stream itself between its parts."""

UNARY = words("gelu silu relu sigmoid tanh softplus mish leaky_relu hardswish elu celu selu square neg abs")
"""Act on every number by itself."""

CONVOLUTIONS = frozenset(name for name in HEAVY if name.startswith("conv"))
_OPERATORS = words("and or xor lshift rshift pow floordiv mod truediv matmul")


def name_of(func: Any) -> str:
    """Name of the operation: ``add`` for ``+``, ``add_`` for ``+=``, the property's name for a property."""
    name = getattr(func, "__name__", None) or type(func).__name__
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", name)
    if name.startswith("__") and name.endswith("__") and name not in ("__getitem__", "__setitem__"):
        bare = name[2:-2]
        if bare in _OPERATORS:
            return {"truediv": "div"}.get(bare, bare)
        if bare.startswith("i"):
            return {"truediv": "div"}.get(bare[1:], bare[1:]) + "_"
        if bare.startswith("r") and bare != "rsub":
            return {"truediv": "div"}.get(bare[1:], bare[1:])
        return bare
    return name.split(".")[0] if "." in name else name  # torch.ops.aten.add.Tensor is an add


def is_in_place(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether the operation writes into its first operand (or into ``out``)."""
    if name == "__setitem__":
        return True
    if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
        return True
    return bool(kwargs.get("inplace")) or kwargs.get("out") is not None


def is_attention(name: str) -> bool:
    """Whether the operation is a whole attention."""
    return "attention" in name or "attn" in name


def is_normalising(names: Iterable[str]) -> bool:
    """Whether these operations normalise (an activation does not)."""
    return any("norm" in name or name in ("rsqrt", "mean", "var") for name in names)


class Pieces(tuple):
    """Cut along one axis: ``(axis, ((start, length) of each output, ...))``."""


def detail_of(name: str, args: Any, kwargs: Any, shapes: list[tuple[int, ...]], serial: Callable[[Tensor], int]) -> Any:
    """What else must be known of an operation: where pieces were cut, along which axis was joined, which is the key."""
    try:
        if name in ("chunk", "split", "split_with_sizes", "tensor_split"):
            axis = _axis(kwargs.get("dim", args[2] if len(args) > 2 else 0), args[0].ndim)
            starts, start = [], 0
            for shape in shapes:
                starts.append((start, shape[axis]))
                start += shape[axis]
            return Pieces((axis, tuple(starts)))
        if name == "narrow":
            axis, start, length = args[1:4]
            return Pieces((_axis(axis, args[0].ndim), ((int(start), int(length)),)))
        if name == "__getitem__":
            return _slice(args[0], args[1])
        if name in ("cat", "concat", "concatenate"):
            tensors = kwargs.get("tensors", args[0] if args else ())
            return _axis(kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0)), tensors[0].ndim)
        if is_attention(name):
            query, key = (kwargs.get(k, args[i] if len(args) > i else None) for i, k in enumerate(("query", "key")))
            return (serial(query), serial(key)) if isinstance(query, Tensor) and isinstance(key, Tensor) else None
    except (IndexError, TypeError, AttributeError, ValueError):
        return None  # called in a way this does not know: then nothing is known
    return None


def _axis(axis: int, ndim: int) -> int:
    return axis % ndim


def _slice(tensor: Tensor, index: Any) -> Pieces | None:
    """The one contiguous range taken by ``tensor[index]``, if that is what it does."""
    index = index if isinstance(index, tuple) else (index,)
    if not all(item is Ellipsis or isinstance(item, slice) for item in index):
        return None
    if any(item is Ellipsis for item in index):
        at = next(i for i, item in enumerate(index) if item is Ellipsis)
        index = (*index[:at], *[slice(None)] * (tensor.ndim - len(index) + 1), *index[at + 1 :])
    found = None
    for axis, item in enumerate(index):
        start, stop, step = item.indices(tensor.shape[axis])
        if step != 1:
            return None
        if (start, stop) != (0, tensor.shape[axis]):
            if found is not None:
                return None
            found = Pieces((axis, ((start, max(0, stop - start)),)))
    return found
