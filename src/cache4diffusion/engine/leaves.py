"""Finding, replacing and splitting the tensors in a module's arguments and outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cache4diffusion.anatomy.tree import children, like
from cache4diffusion.anatomy.tree import leaves as tree_leaves

LeafPath = tuple[Any, ...]

_TENSOR, _TUPLE = "tensor", "tuple"  # layouts without a pytree specification


@lru_cache(maxsize=256)
def parameter_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of ``forward``'s parameters, without ``self``."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def _locate(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], head: Any) -> tuple[bool, Any] | None:
    """Where an argument was really passed: (is_keyword, key). A host may pass by name or by position."""
    names = parameter_names(type(module))
    if isinstance(head, str):
        if head in kwargs:
            return True, head
        if head in names and names.index(head) < len(args):
            return False, names.index(head)
        return None
    if head < len(args):
        return False, head
    if head < len(names) and names[head] in kwargs:
        return True, names[head]
    return None


def _child(value: Any, key: Any) -> Any:
    """What is there, or None: calls differ in which optional arguments they bring, and in how many of a list."""
    if isinstance(value, (tuple, list)):
        return value[key] if isinstance(key, int) and key < len(value) else None
    if isinstance(value, Mapping) and key in value:
        return value[key]
    return getattr(value, key, None) if isinstance(key, str) else None


def get_argument(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], path: LeafPath) -> Any:
    """The argument leaf at ``path`` (None if the host did not pass it)."""
    place = _locate(module, args, kwargs, path[0])
    if place is None:
        return None
    value = kwargs[place[1]] if place[0] else args[place[1]]
    for key in path[1:]:
        value = _child(value, key)
    return value


@dataclass(frozen=True)
class Place:
    """Where a module's argument is found, made out beforehand: inside a compiled block nothing may be looked up.

    Args:
        name: of the parameter, if it has one.
        index: among the positional arguments.
        path: from there to the leaf.
    """

    name: str | None
    index: int
    path: LeafPath = ()

    @classmethod
    def of(cls, module: nn.Module, path: LeafPath) -> Place:
        """The place of the argument leaf at ``path``, as `get_argument` finds it."""
        head, names = path[0], parameter_names(type(module))
        if isinstance(head, str):
            return cls(head, names.index(head) if head in names else len(names), tuple(path[1:]))
        return cls(names[head] if head < len(names) else None, head, tuple(path[1:]))

    def get(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What is there; None if the host did not pass it."""
        if self.name is not None and self.name in kwargs:
            value = kwargs[self.name]
        else:
            value = args[self.index] if self.index < len(args) else None
        for key in self.path:
            value = _child(value, key)
        return value


def get_output(output: Any, path: LeafPath) -> Any:
    """The leaf of an output at ``path``; ``()`` is the output itself."""
    for key in path:
        output = _child(output, key)
    return output


def _replaced(value: Any, path: LeafPath, leaf: Any) -> Any:
    if not path:
        return leaf
    key, rest = path[0], path[1:]
    if isinstance(value, tuple):
        items = [_replaced(v, rest, leaf) if i == key else v for i, v in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_replaced(v, rest, leaf) if i == key else v for i, v in enumerate(value)]
    if not isinstance(value, Mapping):  # a dataclass
        inside = children(value) or []
        return like(value, [_replaced(item, rest, leaf) if name == key else item for name, item in inside])
    changed = dict(value)
    changed[key] = _replaced(value[key], rest, leaf)
    return changed


def with_arguments(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], leaves: Mapping[LeafPath, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with some leaves replaced; nothing of the caller's is written to."""
    args, kwargs = list(args), dict(kwargs)
    for path, leaf in leaves.items():
        place = _locate(module, args, kwargs, path[0])
        if place is None:
            continue
        if place[0]:
            kwargs[place[1]] = _replaced(kwargs[place[1]], path[1:], leaf)
        else:
            args[place[1]] = _replaced(args[place[1]], path[1:], leaf)
    return tuple(args), kwargs


def take_rows(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    axes: Mapping[LeafPath, int],
    rows: Sequence[int],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the same call for some rows of the batch only.

    Args:
        module: whose arguments they are.
        args: positional arguments.
        kwargs: keyword arguments.
        axes: batch axis of every argument leaf that has one.
        rows: which rows.
    """
    replaced = {}
    for path, axis in axes.items():
        leaf = get_argument(module, args, kwargs, path)
        if isinstance(leaf, Tensor) and (leaf.shape[axis] > 1 or max(rows) == 0):  # one row for all is broadcast
            replaced[path] = select_rows(leaf, rows, axis)
    return with_arguments(module, args, kwargs, replaced)


def select_rows(leaf: Tensor, rows: Sequence[int], axis: int = 0) -> Tensor:
    """``leaf`` restricted to ``rows`` along ``axis``; a contiguous run of rows is a view."""
    first, count = rows[0], len(rows)
    if list(rows) == list(range(first, first + count)):
        return leaf.narrow(axis, first, count)
    return leaf.index_select(axis, torch.tensor(rows, device=leaf.device))


def flatten(output: Any) -> tuple[list[Any], Any]:
    """Flat leaves of an output, and what is needed to `unflatten` them.

    A tensor and a plain tuple of tensors, which nearly every module returns, do not go through pytree.
    """
    if isinstance(output, Tensor):
        return [output], _TENSOR
    if type(output) is tuple and all(isinstance(leaf, Tensor) for leaf in output):
        return list(output), _TUPLE
    leaves, spec = pytree.tree_flatten(output)
    if all(children(leaf) is None for leaf in leaves):
        return leaves, spec
    found, inside = [], []  # pytree knows neither dataclasses nor subclasses of containers
    for leaf in leaves:
        closed = _closed(leaf)
        found += [leaf] if closed is None else closed[0]
        inside.append(None if closed is None else closed[1])
    return found, _Opened(spec, tuple(inside))


@dataclass(frozen=True)
class _Box:
    """A container that pytree does not know: its class, its keys, and what is needed to rebuild each item."""

    kind: type
    keys: tuple[Any, ...]
    items: tuple[Any, ...]
    sizes: tuple[int, ...]
    empty: Any = field(compare=False)  # such a container, around None


@dataclass(frozen=True)
class _Opened:
    """What pytree says of a tree, and a `_Box` (or None) for each of its leaves."""

    spec: Any
    boxes: tuple[_Box | None, ...]


def _closed(leaf: Any) -> tuple[list[Any], _Box] | None:
    inside = children(leaf)
    if inside is None or not any(isinstance(item, Tensor) for _, item in tree_leaves(leaf)):
        return None
    parts = [flatten(item) for _, item in inside]
    box = _Box(
        type(leaf),
        tuple(key for key, _ in inside),
        tuple(spec for _, spec in parts),
        tuple(len(found) for found, _ in parts),
        like(leaf, [None] * len(inside)),
    )
    return [item for found, _ in parts for item in found], box


def unflatten(leaves: Iterable[Any], spec: Any) -> Any:
    """Rebuild an output of the same kind."""
    if spec is _TENSOR:
        (leaf,) = leaves
        return leaf
    if spec is _TUPLE:
        return tuple(leaves)
    if not isinstance(spec, _Opened):
        return pytree.tree_unflatten(list(leaves), spec)
    rest = iter(leaves)
    return pytree.tree_unflatten([next(rest) if box is None else _filled(rest, box) for box in spec.boxes], spec.spec)


def _filled(leaves: Iterator[Any], box: _Box) -> Any:
    items = [unflatten(islice(leaves, size), spec) for size, spec in zip(box.sizes, box.items, strict=True)]
    return like(box.empty, items)


@dataclass(frozen=True)
class Layout:
    """How an output is made of tensors and constants.

    Args:
        is_tensor: for each leaf, whether it is a tensor.
        spec: what `unflatten` needs.
        constants: the leaves that are none (None in the tensors' places); not compared.
    """

    is_tensor: tuple[bool, ...] = ()
    spec: Any = None
    constants: tuple[Any, ...] = field(default=(), compare=False)

    def fill(self, tensors: Iterable[Tensor]) -> Any:
        """An output of this kind around ``tensors``."""
        if all(self.is_tensor):
            return unflatten(tensors, self.spec)
        rest = iter(tensors)
        return unflatten(
            [next(rest) if flag else leaf for flag, leaf in zip(self.is_tensor, self.constants, strict=True)], self.spec
        )


_ONE_TENSOR = Layout((True,), _TENSOR, (None,))


def take_apart(output: Any) -> tuple[list[Tensor], Layout]:
    """The tensors of an output, and how to make such an output of others."""
    if isinstance(output, Tensor):
        return [output], _ONE_TENSOR
    leaves, spec = flatten(output)
    is_tensor = tuple(isinstance(leaf, Tensor) for leaf in leaves)
    constants = tuple(None if flag else leaf for flag, leaf in zip(is_tensor, leaves, strict=True))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], Layout(is_tensor, spec, constants)


def merge_rows(groups: Sequence[tuple[Sequence[int], Any]], batch: int) -> Any:
    """Put outputs computed for disjoint groups of rows together again.

    Args:
        groups: pairs of row indices and the output for those rows; axis 0 of every tensor leaf is the batch.
        batch: number of rows in all.
    """
    flat = [(list(rows), *flatten(output)) for rows, output in groups]
    spec, merged = flat[0][2], []
    for position, leaf in enumerate(flat[0][1]):
        if not isinstance(leaf, Tensor):
            merged.append(leaf)
            continue
        whole = leaf.new_empty((batch, *leaf.shape[1:]))
        for rows, leaves, _ in flat:
            whole.index_copy_(0, torch.tensor(rows, device=leaf.device), leaves[position])
        merged.append(whole)
    return unflatten(merged, spec)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply ``function`` to every tensor leaf."""
    leaves, spec = flatten(value)
    return unflatten([function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


@dataclass(frozen=True)
class Spec:
    """What is remembered of a tensor when its values are not."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def specs_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with a `Spec` for every tensor: no tensor is kept alive."""

    def spec(tensor: Tensor) -> Spec:
        return Spec(tensor.shape, tensor.dtype, tensor.device)

    return map_tensors(spec, tuple(args)), map_tensors(spec, dict(kwargs))


def version(tensor: Tensor) -> int | None:
    """Rises when somebody writes into the tensor; None in inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version


def own(leaves: Sequence[Any], state: Any) -> list[Any]:
    """The leaves, cloned where they share memory with what ``state`` keeps: a host may write into what it is given."""
    kept = {tensor.untyped_storage().data_ptr() for tensor in state.tensors()}
    return [
        leaf.clone() if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() in kept else leaf
        for leaf in leaves
    ]
