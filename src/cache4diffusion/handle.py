"""The handle on an accelerated pipeline or denoiser: what it did, what it holds, and how to take it away."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cache4diffusion.engine import Engine
from cache4diffusion.errors import RunError, SettingError, closest
from cache4diffusion.method import Method
from cache4diffusion.run import Run, RunTracker
from cache4diffusion.trace import FULL, Trace


class Handle:
    """Returned by `accelerate`. As a context manager it removes itself at the end, also after an error.

    Args:
        method: the method, as given or found by name.
        label: how the method and its overrides are called in reports.
        tracker: of runs, steps and branches.
        trace: of decisions.
    """

    def __init__(self, method: Method | None, label: str, tracker: RunTracker, trace: Trace) -> None:
        self.method, self.label, self.trace = method, label, trace
        self._tracker = tracker
        self._engines: list[Engine] = []
        self._is_removed = False
        self._run: Run | None = None  # the newest

    def _on_begin(self, run: Run) -> None:
        self._run = run
        for engine in self._engines:
            engine.on_run_begin(run)

    def _on_end(self, run: Run, aborted: bool) -> None:
        for engine in self._engines:
            engine.on_run_end(run, aborted)
        if not aborted:
            self._warn_if_nothing_was_cached(run)

    def _warn_if_nothing_was_cached(self, run: Run) -> None:
        records = self.trace.of(run.id)
        is_off = all(engine.composition.is_off for engine in self._engines)
        if is_off or run.step < 1 or {record.symbol for record in records} != {FULL}:
            return
        reasons = Counter(record.reason for record in records).most_common(3)
        text = (
            f"0 of {run.step + 1} steps were cached by {self.label}. Reasons to compute: "
            f"{', '.join(f'{reason} ({count})' for reason, count in reasons)}."
        )
        text = " ".join([text, *(e.branches.shortfall for e in self._engines if e.branches is not None)]).strip()
        self.trace.note(text)
        warnings.warn(text, stacklevel=2)

    # -- use -------------------------------------------------------------------------------------------------------

    @contextmanager
    def run(self, timesteps: Sequence[float] | None = None, num_steps: int | None = None) -> Iterator[None]:
        """Say where one sampling run begins and ends, in a loop of your own.

        Args:
            timesteps: what the loop will iterate over, in order; tells steps apart whatever the denoiser is given.
            num_steps: number of steps, where there is no list.
        """
        with self._tracker.run(timesteps=timesteps, num_steps=num_steps):
            yield

    def prepare(self, *args: Any, denoiser: str | None = None, **kwargs: Any) -> None:
        """Attach now, from the arguments of a call of the denoiser, instead of at its first call.

        What cannot work then fails here, and the first run is as fast as the second.

        Args:
            *args, **kwargs: of the call.
            denoiser: which one, by its attribute of the pipeline, where several take different arguments (a prior and
                a U-Net). None: all of them, as experts that share the steps take the same ones.

        Raises:
            RunError: the handle was removed.
            SettingError: there is no such denoiser.
            AnatomyError: a denoiser lacks what the method needs; nothing is attached by this call.
        """
        if self._is_removed:
            raise RunError(f"{self!r}: nothing can be attached any more. Call accelerate() again.")
        chosen = {engine.name: engine for engine in self._engines if denoiser in (None, engine.name)}
        if not chosen:
            names = [engine.name for engine in self._engines]
            raise SettingError(
                f"prepare(denoiser={denoiser!r}): there is none{closest(str(denoiser), names) or '.'} "
                f"Accelerated are: {', '.join(names)}."
            )
        fresh = [engine for engine in chosen.values() if not engine.attachment.is_installed]
        try:
            for engine in fresh:
                engine.prepare(args, kwargs)
        except BaseException:
            for engine in fresh:
                engine.attachment.uninstall()
            raise

    def watch_scheduler(self, scheduler: Any) -> None:
        """Listen to the scheduler of a loop of your own: it tells steps, and is what trajectory methods act on.

        The pipeline's own schedulers are listened to without this.
        """
        self._tracker.watch_scheduler(scheduler)

    def remove(self) -> None:
        """Take every wrapper away and free all memory; the denoiser is what it was. Harmless when repeated."""
        self._remove(aborted=False)

    def _remove(self, aborted: bool) -> None:
        if self._is_removed:
            return
        self._is_removed = True
        try:
            self._tracker.unwatch(aborted)
        finally:  # a warning may be an error
            for engine in self._engines:
                engine.remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._remove(aborted=kind is not None)

    def __repr__(self) -> str:
        state = "removed" if self._is_removed else f"{len(self._engines)} denoiser(s)"
        return f"<cache4diffusion handle {self.label!r}, {state}>"

    # -- what happened ---------------------------------------------------------------------------------------------

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of cached tensors: ``held`` now, and the ``peak`` since the beginning (the denoisers' peaks added)."""
        return {
            "held": sum(engine.ledger.held for engine in self._engines),
            "peak": sum(engine.ledger.peak for engine in self._engines),
        }

    @property
    def stats(self) -> dict[str, Any]:
        """Figures of the newest run: steps, strips per denoiser and branch, decisions' host syncs, time, memory."""
        from cache4diffusion.cost import summarise

        found = summarise(self, with_flops=False)
        return {
            "runs": len(self.trace.runs()),
            "strip": found.strip,
            "strips": found.strips,
            "total_steps": found.total_steps,
            "full_steps": int(found.full_steps) if found.full_steps.is_integer() else found.full_steps,
            "full_ms": found.full_ms,
            "cached_ms": found.cached_ms,
            "total_ms": found.total_ms,
            "syncs": self.trace.syncs,
            "memory": self.memory,
            "notes": list(self.trace.notes),
        }

    def report(self) -> str:
        """A few lines on the newest run: strip, time, FLOPs, bytes, expected and achieved speed-up."""
        from cache4diffusion.cost import report_lines

        return "\n".join(report_lines(self))
