"""A module whose sub-modules all go by other names: ``m0``, ``m1``, ... Its code still finds them by their own."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from torch import nn


@functools.cache
def _renamed_class(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class, with each of its sub-modules under another name: one class for all modules built alike."""
    members: dict[str, Any] = {
        name: property(lambda self, number=number: self._modules[f"m{number}"]) for number, name in enumerate(names)
    }
    if issubclass(cls, nn.ModuleDict):
        numbers = {name: number for number, name in enumerate(names)}
        members = {
            "__getitem__": lambda self, name: self._modules[f"m{numbers[name]}"],
            "__contains__": lambda self, name: name in numbers,
        }
    return type(cls.__name__, (cls,), members | {"__module__": cls.__module__})


def rename(denoiser: nn.Module) -> dict[str, str]:
    """Rename every sub-module in place (members of lists are numbered already): former paths by present ones."""
    former = {id(module): path for path, module in denoiser.named_modules()}
    for module in list(denoiser.modules()):
        if isinstance(module, (nn.ModuleList, nn.Sequential)) or not module._modules:
            continue
        names = tuple(module._modules)
        module.__dict__["_modules"] = {f"m{i}": child for i, child in enumerate(module._modules.values())}
        module.__class__ = _renamed_class(type(module), names)
    return {path: former[id(module)] for path, module in denoiser.named_modules()}


def with_names(facts: Any, names: dict[str, str]) -> Any:
    """Facts about a denoiser with every path replaced."""
    if isinstance(facts, str):
        return names.get(facts, facts)
    if dataclasses.is_dataclass(facts) and not isinstance(facts, type):
        changed = {field.name: with_names(getattr(facts, field.name), names) for field in dataclasses.fields(facts)}
        return dataclasses.replace(facts, **changed)
    if isinstance(facts, dict):
        return {with_names(key, names): with_names(value, names) for key, value in facts.items()}
    if isinstance(facts, tuple) and not hasattr(facts, "_fields"):
        return tuple(with_names(item, names) for item in facts)
    return facts
