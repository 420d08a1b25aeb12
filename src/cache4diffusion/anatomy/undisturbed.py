"""Running a denoiser's own forwards for observation only: nothing of it is seen, kept or changed afterwards.

Every module's call is routed through an observer that runs the plain ``forward``: compiled calls, hooks, offloading
and wrappers (ours too) stay out of it. All instance attributes, and the contents of plain containers among them, are
put back at the end, because models memoise tensors (rotary tables, masks) and a traced tensor must not stay behind.
So is what weights hold, and what hangs on them: quantised layers may rearrange both at their first call.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_MISSING = object()

CallObserver = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, out of what ``torch.compile(module)`` returns, and of wrappers that hand a call on as it is:
    they say of no argument what it is, and hold one module (adapters, data parallelism)."""
    while (inside := _inside(module)) is not None:
        module = inside
    return module


def _inside(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper is around; None if it is no wrapper."""
    if "_orig_mod" in module._modules:
        return module._modules["_orig_mod"]
    if len(module._modules) != 1 or not _takes_anything(type(module)):
        return None
    (inside,) = module._modules.values()
    return inside


@functools.lru_cache(maxsize=1024)
def _takes_anything(cls: type[nn.Module]) -> bool:
    """Whether the forward is ``forward(*args, **kwargs)``."""
    forward = getattr(cls, "forward", None)  # a scripted class has none
    if forward is None:
        return False
    try:
        kinds = [parameter.kind for parameter in inspect.signature(forward).parameters.values()][1:]
    except (TypeError, ValueError):
        return False
    return kinds == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward under everything that was put in front of it on the instance."""
    if "_orig_mod" in module._modules:
        return module._modules["_orig_mod"]  # type: ignore[return-value]
    forward = module.__dict__.get("forward")
    shadow = getattr(module.__dict__.get("__getstate__"), "shadows", {}).get("forward")
    while forward is not None:
        if shadow is not None and forward is shadow.value:
            forward = shadow.found if callable(shadow.found) else None
            shadow = shadow.behind
            continue
        inner = getattr(forward, "_torchdynamo_orig_callable", None) or getattr(forward, "__wrapped__", None)
        if inner is None or isinstance(forward, types.MethodType):
            break
        forward = inner
    return forward if forward is not None else types.MethodType(type(module).forward, module)


def _memoised(function: Any) -> Any:
    """The function inside a memoising decorator, or None."""
    plain = getattr(function, "__wrapped__", None)
    if plain is None:
        return None
    if hasattr(function, "cache_clear"):
        return plain
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):
            if hasattr(cell.cell_contents, "cache_clear"):
                return plain
    return None


def _caches(modules: list[nn.Module]) -> list[Any]:
    """Memoised functions (not methods) of the files in which the modules' classes are written."""
    found = []
    for name in {base.__module__ for module in modules for base in type(module).__mro__}:
        if name == "torch" or name.startswith("torch."):
            continue
        for value in list(vars(sys.modules.get(name, types)).values()):
            if _memoised(value) is None:
                continue
            cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
            found += [item for item in (value, *cells) if hasattr(item, "cache_clear") and hasattr(item, "cache_info")]
    return found


class _Snapshot:
    """An object's attributes, and the contents of the plain containers among them."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.attributes = dict(owner.__dict__)
        self.contents = [
            (value, list(value.items()) if isinstance(value, dict) else list(value))
            for value in self.attributes.values()
            if isinstance(value, (dict, list, set))
        ]

    def restore(self) -> None:
        now = self.owner.__dict__
        for name in [name for name in now if name not in self.attributes]:
            del now[name]
        for name, value in self.attributes.items():
            if now.get(name, _MISSING) is not value:
                now[name] = value
        for value, kept in self.contents:
            current = list(value.items()) if isinstance(value, dict) else list(value)
            if len(current) == len(kept) and all(a is b for a, b in zip(_flat(current), _flat(kept), strict=True)):
                continue
            value.clear()
            value.extend(kept) if isinstance(value, list) else value.update(kept)


class _Held:
    """What a parameter or buffer holds. Subclasses of tensors that hold others have them for attributes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.data = tensor, tensor.data

    def restore(self) -> None:
        now = self.tensor.data
        if now.untyped_storage()._cdata != self.data.untyped_storage()._cdata or now.shape != self.data.shape:
            self.tensor.data = self.data


def _held(modules: list[nn.Module]) -> list[_Snapshot | _Held]:
    """Of the parameters and buffers: what they hold, and their attributes, down to objects of libraries' own."""
    tensors = {id(t): t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
    found: list[_Snapshot | _Held] = [_Held(t) for t in tensors.values() if not is_traceable_wrapper_subclass(t)]
    pending: list[Any] = [tensor for tensor in tensors.values() if getattr(tensor, "__dict__", None)]
    seen = {id(owner) for owner in pending}
    while pending:
        owner = pending.pop()
        found.append(_Snapshot(owner))
        inside = [v for v in owner.__dict__.values() if _is_helper(v, modules) and id(v) not in seen]
        seen.update(id(value) for value in inside)
        pending += inside
    return found


def _flat(items: list[Any]) -> list[Any]:
    return [part for item in items for part in (item if isinstance(item, tuple) else (item,))]


@contextlib.contextmanager
def undisturbed(denoiser: nn.Module, observer: CallObserver) -> Iterator[None]:
    """While active, every call of a module of ``denoiser`` is ``observer(path, forward, args, kwargs)``."""
    named = [
        (path, module) for path, module in denoiser.named_modules() if not isinstance(module, torch.jit.ScriptModule)
    ]
    modules = [module for _, module in named]
    snapshots: list[_Snapshot | _Held] = [_Snapshot(module) for module in modules]
    # Attention processors and the like: objects of the model's own files that hang on its modules.
    helpers = {id(v): v for m in modules for v in m.__dict__.values() if _is_helper(v, modules)}
    snapshots += [_Snapshot(helper) for helper in helpers.values()]
    snapshots += _held(modules)
    sizes = [(cache, cache.cache_info().currsize) for cache in _caches(modules)]
    random_state, torch_state = random.getstate(), torch.get_rng_state()
    keeps_casts = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a traced weight, cast, would stay for the real call
    try:
        for path, module in named:
            memoised = _memoised_methods(type(module))
            forward = plain_forward(module)
            if "forward" in memoised and getattr(forward, "__func__", None) is type(module).forward:
                forward = types.MethodType(memoised["forward"], module)
            module.__dict__["_compiled_call_impl"] = _observed(path, forward, observer)
            for name, function in memoised.items():
                module.__dict__[name] = types.MethodType(function, module)
        yield
    finally:
        for snapshot in snapshots:
            snapshot.restore()
        for cache, size in sizes:
            if cache.cache_info().currsize != size:
                cache.cache_clear()
        random.setstate(random_state)
        torch.set_rng_state(torch_state)
        torch.set_autocast_cache_enabled(keeps_casts)


def _observed(path: str, forward: Callable[..., Any], observer: CallObserver) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return observer(path, forward, args, kwargs)

    return call


def _is_helper(value: Any, modules: list[nn.Module]) -> bool:
    if isinstance(value, (nn.Module, torch.Tensor, type, types.FunctionType, types.MethodType)):
        return False
    home = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and home not in ("builtins", "torch", "collections", "functools")


def _memoised_methods(cls: type) -> dict[str, Any]:
    found = {}
    for base in reversed(cls.__mro__):
        for name, value in vars(base).items():
            plain = _memoised(value) if not name.startswith("__") else None
            if plain is not None:
                found[name] = plain
            else:
                found.pop(name, None)
    return found
