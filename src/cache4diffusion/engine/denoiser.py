"""The whole-denoiser site: on a cached step nothing of the denoiser runs."""

from __future__ import annotations

from typing import Any

from cache4diffusion.engine.driver import Driver, Inner
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import own, take_apart
from cache4diffusion.engine.state import Context
from cache4diffusion.gates import Front, Signal


class DenoiserDriver(Driver):
    """Predicts the denoiser's output.

    Where the gate must look inside first, the blocks after the decision pass their input through and what the host
    makes of it is thrown away: its own code runs to the end, so nothing of the host is left half done.
    """

    def __init__(self, host: Host, site: Any) -> None:
        super().__init__(host, site)
        watch = host.gate.watch if host.gate is not None else None
        self.needs_anatomy = self.needs_blocks = isinstance(watch, (Signal, Front))

    def is_ready(self, context: Context, key: int) -> bool:
        """After the first full step, if the output's kind is known for this way of calling."""
        history = context.state.sites.get("output")
        is_known = self._kind(context) in context.state.extra.get("layouts", {})
        return history is not None and is_known and self.host.predictor.is_ready(history)

    @staticmethod
    def _kind(context: Context) -> Any:
        return context.kwargs.get("return_dict", True)

    def run(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute and record, or predict."""
        if 0 in context.verdicts and context.verdicts[0].is_cached:
            return self._predicted(context)
        output = inner(*args, **kwargs)
        verdict = context.verdict
        if verdict is None:  # the watch point was not reached; the engine says so
            return output
        if verdict.is_cached:  # decided on the way
            return self._predicted(context)
        return self._record(context, output)

    def _record(self, context: Context, output: Any) -> Any:
        tensors, layout = take_apart(output)
        context.state.extra.setdefault("layouts", {})[self._kind(context)] = layout
        self.keep(context, "output", tensors)
        return output

    def _predicted(self, context: Context) -> Any:
        tensors = own(self.forecast(context, "output"), context.state.sites["output"])
        return context.state.extra["layouts"][self._kind(context)].fill(tensors)

    def on_block(
        self, context: Context, position: int, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Pass through once the step is known to be cached."""
        verdict = context.verdicts.get(0)
        if verdict is not None and verdict.is_cached:
            return self.host.pass_through(position, args, kwargs)
        return inner(*args, **kwargs)

    def bypassed(self) -> list[str]:
        """Everything."""
        return [""]
