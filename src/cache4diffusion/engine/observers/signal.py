"""Observing the first block's modulated input (TeaCache)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from cache4diffusion.engine.decide import relative_change
from cache4diffusion.engine.driver import Inner
from cache4diffusion.engine.leaves import get_argument
from cache4diffusion.engine.observers.base import Observer, Seen
from cache4diffusion.engine.state import Context
from cache4diffusion.errors import AnatomyError


class _Reached(BaseException):
    """The part whose input is the signal is about to run: no need to go on."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_seen, self.kwargs_seen = args, kwargs


class SignalObserver(Observer):
    """Sees what the first part of the first block would read, in front of the block."""

    @property
    def reference(self) -> Literal["last_step"]:
        """The changes of all steps are summed up."""
        return "last_step"

    def install(self) -> None:
        """There must be a first part that reads it."""
        anatomy = self.host.anatomy
        assert anatomy is not None
        if anatomy.signal is None:
            raise AnatomyError(
                f"{self.words} watches the modulated input of the first block's first part, and none was found in "
                f"{anatomy.denoiser}. 'fbcache' or 'dbcache' watch the first blocks' residual instead."
            )

    def before(
        self, context: Context, position: int, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """At the first block."""
        if position == 0:
            self.meet(context, 0, lambda: {"signal": self.signal(context, args, kwargs)})
        elif 0 not in context.verdicts:
            self.miss(context, 0)

    def score(self, now: Seen, then: Seen) -> Tensor:
        """Its relative change."""
        return relative_change(now["signal"], then["signal"], self.per_row, group=self.host.group)

    def signal(self, context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the first block up to its first part, and no further."""
        anatomy = self.host.anatomy
        assert anatomy is not None and anatomy.signal is not None
        part = self.host.plain.get_submodule(anatomy.signal.path)

        def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(args, kwargs)

        hook = part.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.host.modules[0].forward(*args, **kwargs)
        except _Reached as reached:
            return get_argument(part, reached.args_seen, reached.kwargs_seen, anatomy.signal.argument)
        finally:
            hook.remove()
        raise AnatomyError(f"{anatomy.signal.path} was not called by its block this time, so there is no signal.")
