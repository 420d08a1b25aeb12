"""Wrapping a module of the host, reversibly: around its *call*, or around its ``forward``.

- `CallWrapper` sits in front of everything: compiled regions, offload hooks, adapters. A skipped call then costs
  nothing, whatever else is attached and in whatever order. It uses the instance's ``_compiled_call_impl``, which
  ``nn.Module.__call__`` runs when set, and shadows ``compile`` so that a later ``module.compile()`` lands inside.
- `ForwardWrapper` sits around ``forward`` and may be traced inside a compiled block, so what it runs reads a shared
  flag and buffers and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cache4diffusion.shadow import Shadow

CallHandler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class CallWrapper:
    """Run ``handler(inner, args, kwargs)`` whenever ``module(...)`` is called, until `remove`.

    Args:
        module: the host module. Its class is not touched.
        handler: gets the call as it would have been (``inner``) and its arguments, and returns the result.
        owner: whoever wraps, found again by `owner_of`.
        allow_compile: called before a ``module.compile()`` that comes later; raises to refuse it.
    """

    def __init__(
        self,
        module: nn.Module,
        handler: CallHandler,
        owner: Any = None,
        allow_compile: Callable[[], None] | None = None,
    ) -> None:
        self.module, self.handler, self.owner = module, handler, owner
        self.is_alive = True
        self.compiled: Any = module.__dict__.get("_compiled_call_impl")
        self._found = self.compiled

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.is_alive:
                return self.inner(*args, **kwargs)
            return self.handler(self.inner, args, kwargs)

        def compile_inside(*args: Any, **kwargs: Any) -> None:
            if allow_compile is not None and self.is_alive:
                allow_compile()
            behind = getattr(self.compiled, "c4d_wrapper", None)
            if behind is not None:  # another denoiser's, that has the same block
                behind.compile_inside(*args, **kwargs)
            else:
                self.compiled = torch.compile(module._call_impl, *args, **kwargs)

        call.c4d_wrapper = self  # type: ignore[attr-defined]
        self._call = Shadow(module, "_compiled_call_impl", call, restore_in_copies=False)
        self.compile_inside = compile_inside
        self._compile = Shadow(module, "compile", compile_inside)

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """The call as it would have been without this wrapper: compiled if the host compiled it."""
        return (self.compiled or self.module._call_impl)(*args, **kwargs)

    @property
    def is_in_place(self) -> bool:
        """Whether a call of the module still comes here."""
        return self._call.is_reached

    def remove(self) -> None:
        """Restore what was found; a ``compile()`` that came later stays, a wrapper that came later keeps working."""
        self.is_alive = False
        if self.compiled is not self._found:
            self._call.found = self.compiled
        self._call.remove()
        self._compile.remove()
        self.handler = _gone


def _gone(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return inner(*args, **kwargs)


def owner_of(module: nn.Module) -> Any:
    """Who wrapped the call of ``module`` (see `CallWrapper`), or None."""
    call = module.__dict__.get("_compiled_call_impl")
    wrapper = getattr(call, "c4d_wrapper", None)
    return wrapper.owner if wrapper is not None and wrapper.is_alive else None


class ForwardWrapper:
    """Replace ``module.forward`` on the instance by ``make(found)``, until `remove`."""

    def __init__(self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self.module = module
        self.found = module.forward
        self._shadow = Shadow(module, "forward", make(self.found))

    @property
    def is_in_place(self) -> bool:
        """Whether ``forward`` still comes here, whatever was put in front of it."""
        return self._shadow.is_reached

    def remove(self) -> None:
        """Restore what was found, if still in front; else a newcomer keeps calling a wrapper that does nothing."""
        self._shadow.remove()
