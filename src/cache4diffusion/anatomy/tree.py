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


def children(tree: Any) -> list[tuple[int | str, Any]] | None:
    """What a container holds, each with its key; None of a leaf."""
    if isinstance(tree, (tuple, list)):
        return list(enumerate(tree))
    if isinstance(tree, dict):
        return list(tree.items())
    if _is_dataclass(tree):
        return [(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    return None


def like(tree: Any, items: list[Any]) -> Any:
    """The same container around other items, in the order of `children`."""
    if isinstance(tree, (tuple, list)):
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    keys = [key for key, _ in children(tree) or ()]
    if isinstance(tree, dict):
        if type(tree) is dict:
            return dict(zip(keys, items, strict=True))
        twin = copy.copy(tree)  # an output class, maybe: it knows how it is made
        for key, item in zip(keys, items, strict=True):
            twin[key] = item
        return twin
    twin = copy.copy(tree)
    for key, item in zip(keys, items, strict=True):
        object.__setattr__(twin, str(key), item)
    return twin


def leaves(tree: Any, path: LeafPath = ()) -> Iterator[tuple[LeafPath, Any]]:
    """Yield every leaf with its path, in order."""
    inside = children(tree)
    if inside is None:
        yield path, tree
    for key, item in inside or ():
        yield from leaves(item, (*path, key))


def argument_leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[LeafPath, Any]]:
    """Yield every leaf of a call's arguments: positional ones start with an int, keywords with a str."""
    yield from leaves(args)
    yield from leaves(kwargs)


def map_leaves(change: Callable[[LeafPath, Any], Any], tree: Any, path: LeafPath = ()) -> Any:
    """Return the same container around ``change(path, leaf)`` of every leaf. The original is not touched."""
    inside = children(tree)
    if inside is None:
        return change(path, tree)
    return like(tree, [map_leaves(change, item, (*path, key)) for key, item in inside])


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
