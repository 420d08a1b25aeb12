"""Nested containers of tensors: where a leaf sits, and how to build the same container around other leaves.

Understood are tuples, named tuples, lists, dicts (also the ordered, attribute-carrying ones that model libraries
return) and dataclass instances. Everything else is a leaf.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

LeafPath = tuple[int | str, ...]
"""Where a leaf sits. ``()`` is the tree itself, ``(0,)`` its first item, ``("sample",)`` its key or attribute.

In the arguments of a call the first element is the position (int) or the keyword (str), the rest is nested keys:
``("res_hidden_states_tuple", 2)``.
"""


class Mark:
    """Base of what stands for a leaf in a template: never looked into."""


def _is_dataclass(tree: Any) -> bool:
    return dataclasses.is_dataclass(tree) and not isinstance(tree, (type, Mark))


def leaves(tree: Any, path: LeafPath = ()) -> Iterator[tuple[LeafPath, Any]]:
    """Yield every leaf with its path, in order."""
    if isinstance(tree, (tuple, list)):
        for index, item in enumerate(tree):
            yield from leaves(item, (*path, index))
    elif isinstance(tree, dict):
        for key, item in tree.items():
            yield from leaves(item, (*path, key))
    elif _is_dataclass(tree):
        for field in dataclasses.fields(tree):
            yield from leaves(getattr(tree, field.name), (*path, field.name))
    else:
        yield path, tree


def argument_leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[LeafPath, Any]]:
    """Yield every leaf of a call's arguments: positional ones start with an int, keywords with a str."""
    yield from leaves(args)
    yield from leaves(kwargs)


def map_leaves(change: Callable[[LeafPath, Any], Any], tree: Any, path: LeafPath = ()) -> Any:
    """Return the same container around ``change(path, leaf)`` of every leaf. The original is not touched."""
    if isinstance(tree, (tuple, list)):
        items = [map_leaves(change, item, (*path, index)) for index, item in enumerate(tree)]
        if hasattr(tree, "_fields"):  # a named tuple
            return type(tree)(*items)
        return type(tree)(items)
    if isinstance(tree, dict):
        changed = {key: map_leaves(change, item, (*path, key)) for key, item in tree.items()}
        return changed if type(tree) is dict else type(tree)(**changed)
    if _is_dataclass(tree):
        twin = copy.copy(tree)
        for field in dataclasses.fields(tree):
            object.__setattr__(twin, field.name, map_leaves(change, getattr(tree, field.name), (*path, field.name)))
        return twin
    return change(path, tree)


def at(tree: Any, path: LeafPath) -> Any:
    """Return what sits at ``path``, or raise LookupError."""
    for key in path:
        if isinstance(tree, (tuple, list, dict)):
            tree = tree[key]  # type: ignore[index]
        elif isinstance(key, str) and hasattr(tree, key):
            tree = getattr(tree, key)
        else:
            raise LookupError(f"Nothing at {path!r}.")
    return tree


def argument_at(args: tuple[Any, ...], kwargs: dict[str, Any], path: LeafPath) -> Any:
    """Return the argument at ``path`` of a call, or raise LookupError."""
    return at(args if isinstance(path[0], int) else kwargs, path)


def replace_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[LeafPath, Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with every leaf replaced by ``change(path, leaf)``."""
    return map_leaves(change, tuple(args)), map_leaves(change, dict(kwargs))
