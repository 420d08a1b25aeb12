"""The handle on an accelerated pipeline or denoiser: what it did, what it holds, and how to take it away."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from cache4diffusion.anatomy.undisturbed import unwrapped
from cache4diffusion.engine import Engine
from cache4diffusion.errors import AlreadyAcceleratedError, RunError, SettingError, closest
from cache4diffusion.few_steps import FEW, FewStepsWarning, few_steps_text
from cache4diffusion.method import Method
from cache4diffusion.options import Options
from cache4diffusion.run import Run, RunTracker
from cache4diffusion.storage import Store
from cache4diffusion.trace import FULL, Trace
from cache4diffusion.wrap import owner_of

if TYPE_CHECKING:
    from cache4diffusion.accelerate import Choice
    from cache4diffusion.budget import Budget


class Handle:
    """Returned by `accelerate`. As a context manager it removes itself at the end, also after an error.

    Args:
        choice: the method with its overrides and options, or what took its place for a memory budget.
        label: how it is called in reports, where there is no choice.
        tracker: of runs, steps and branches.
        trace: of decisions.
        budget: weighs what will be stored, before it is.
    """

    def __init__(
        self,
        choice: Choice | None,
        label: str,
        tracker: RunTracker,
        trace: Trace,
        budget: Budget | None = None,
    ) -> None:
        self.choice, self.trace = choice, trace
        self._label, self._budget = label, budget
        self._few: set[int] = set()  # numbers of steps that were warned of
        if budget is not None:
            for note in budget.notes:
                trace.note(note)
        self._tracker = tracker
        self._engines: list[Engine] = []
        self._is_removed = False
        self._run: Run | None = None  # the newest

    @property
    def method(self) -> Method | None:
        """The method, if it is one."""
        return self.choice.method if self.choice is not None else None

    @property
    def label(self) -> str:
        """How the method, its overrides and options are called in reports."""
        return self.choice.label if self.choice is not None else self._label

    @property
    def options(self) -> Options:
        """How the cache is kept, and what is refused."""
        return self.choice.options if self.choice is not None else Options()

    def _on_begin(self, run: Run) -> None:
        self._run = run
        for engine in self._engines:
            engine.on_run_begin(run)

    def _on_end(self, run: Run, aborted: bool) -> None:
        for engine in self._engines:
            engine.on_run_end(run, aborted)
        if not aborted:
            self._warn_if_nothing_was_cached(run)

    def _on_pipeline(self, pipe: Any) -> None:
        """Refuse to go on beside a denoiser that took the place of an accelerated one.

        Raises:
            RunError: nothing of it would be cached.
        """
        for engine in self._engines:
            now = getattr(pipe, engine.name, None)
            is_other = isinstance(now, nn.Module) and unwrapped(now) is not unwrapped(engine.denoiser)
            if is_other and owner_of(engine.denoiser) is self:  # not while paused
                raise RunError(
                    f"{engine.name} was exchanged after accelerate(): the {type(now).__name__} there now is not "
                    "accelerated. Load or quantise a denoiser first; now, remove() this handle and call "
                    "accelerate(pipe, ...) again."
                )

    def _check_run(self, run: Run) -> None:
        """Warn of a run with few steps, once for each number of them, or refuse it.

        Raises:
            SettingError: ``strict``, and there are too few.
        """
        steps, engine = run.num_steps, self._engines[0]
        if steps is None or steps in self._few or not 1 < steps < FEW or engine.composition.is_off:
            return
        if not engine.composition.lives_on_other_steps:
            return
        text = few_steps_text(self.label, engine.composition, steps)
        if self.options.strict:
            raise SettingError(f"{text} strict=True refuses fewer than {FEW} steps.")
        self._few.add(steps)
        self.trace.note(text)
        warnings.warn(text, FewStepsWarning, stacklevel=2)

    def _weigh(self, name: str, calls: Sequence[Any], num_steps: int | None, is_more: bool) -> None:
        """Hold what a denoiser's calls would store against the budget; go on with something smaller where allowed.

        Raises:
            MemoryBudgetError: it is too much.
        """
        assert self._budget is not None
        before = self._budget.choice
        choice = self._budget.settle({name: calls}, num_steps, is_more=is_more)
        if choice is before:
            return
        compositions = choice.compositions(self._budget.found)
        for engine in self._engines:
            engine.adopt(compositions[engine.name], Store(choice.options.storage))
        self.choice = choice
        for note in self._budget.notes:
            self.trace.note(note)

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

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within: the denoisers are what they were before `accelerate`, and may be accelerated in another way.

        Runs that are in progress end, and what they cached is forgotten. The trace of earlier runs stays.

        Raises:
            RunError: the handle was removed.
            AlreadyAcceleratedError: at the end, where something else is still attached. This handle is removed then.
        """
        if self._is_removed:
            raise RunError(f"{self!r}: there is nothing to pause.")
        self._tracker.end()
        for engine in self._engines:
            engine.remove()
        try:
            yield
        finally:
            self._go_on()

    def _go_on(self) -> None:
        if self._is_removed:
            return
        taken = {engine.name: owner_of(engine.denoiser) for engine in self._engines}
        for name, owner in taken.items():
            if owner is not None:
                self.remove()
                raise AlreadyAcceleratedError(
                    f"{self.label} was paused and cannot go on: {name} was accelerated by {owner.label} in the "
                    "meantime. Call remove() on that handle, then accelerate() again."
                )
        for engine in self._engines:
            engine.put_back()

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
    def memory_by_place(self) -> dict[str, int]:
        """Bytes at the peak by device and dtype, such as ``{"cuda:0 bfloat16": ...}`` (the denoisers' peaks added)."""
        found: dict[str, int] = {}
        for engine in self._engines:
            for place, count in engine.ledger.places.items():
                found[" ".join(place)] = found.get(" ".join(place), 0) + count
        return found

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
            "memory_by_place": self.memory_by_place,
            "notes": list(self.trace.notes),
            "counts": dict(self.trace.counts),
        }

    def report(self) -> str:
        """A few lines on the newest run: strip, time, FLOPs, bytes, expected and achieved speed-up."""
        from cache4diffusion.cost import report_lines

        return "\n".join(report_lines(self))
