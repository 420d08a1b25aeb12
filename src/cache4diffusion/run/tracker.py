"""The run tracker: hears what the host announces, and places each call of a denoiser."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from torch import Tensor

from cache4diffusion.errors import RunError, SettingError
from cache4diffusion.run.path import Call, Path, Run, Source, floats, highest, length
from cache4diffusion.run.taps import (
    Tap,
    schedulers_of,
    wrap_cache_context,
    wrap_progress_bar,
    wrap_set_timesteps,
    wrap_step,
)


class Steering(Protocol):
    """Acts on the trajectory, around ``scheduler.step``."""

    def before_step(self, run: Run, scheduler: Any, arguments: dict[str, Any]) -> None:
        """``scheduler.step`` is called with these arguments; entries may be replaced."""
        ...

    def after_step(self, run: Run, scheduler: Any, arguments: dict[str, Any], result: Any) -> Any:
        """``scheduler.step`` has made ``result`` of them; what is returned goes to the loop."""
        ...


class RunTracker:
    """Follow the sampling runs of one or several denoisers, per thread.

    A run is *announced* by ``progress_bar``, ``set_timesteps`` or `run`, and *begins* with the first call of a
    denoiser: only then is ``on_begin`` called, when all announcements have been heard. A run without a call never
    reaches the callbacks. It ends when ``progress_bar`` or `run` is left, when an exception crosses the denoiser or
    ``scheduler.step``, or else when the next run is announced; a run in a bare loop therefore ends late.

    Args:
        on_begin: called with the run, once, before its first `Call` is returned.
        on_end: called with the run and whether it was aborted, once, if ``on_begin`` was (also when ``on_begin``
            raised). Called from another thread only for the run of a thread that died.
        on_pipeline: called with a watched pipeline when it enters its loop, before anything else; may refuse it.
    """

    def __init__(
        self,
        on_begin: Callable[[Run], None],
        on_end: Callable[[Run, bool], None],
        on_pipeline: Callable[[Any], None] | None = None,
    ) -> None:
        self._on_begin, self._on_end, self._on_pipeline = on_begin, on_end, on_pipeline
        self._ids = itertools.count()
        self._threads: dict[int, ThreadState] = {}
        self._lock = threading.Lock()
        self._taps: list[weakref.ref[Tap]] = []
        self._steerings: list[Steering] = []
        self._keys: weakref.WeakKeyDictionary[Any, Hashable] = weakref.WeakKeyDictionary()  # of watched denoisers

    # ------------------------------------------------------------------ what the engine calls

    @property
    def current(self) -> Run | None:
        """The calling thread's run: in progress, or announced and not called yet (``step == -1``)."""
        path = self._thread().path
        return path.run if path is not None else None

    def enter(
        self, denoiser_key: Hashable, *, timestep: Tensor | float, conditioning: Sequence[Tensor], latent: Tensor
    ) -> Call:
        """Place one call of a denoiser. Called before the denoiser runs.

        Args:
            denoiser_key: which of the denoisers that share this tracker. Steps are shared, branches are not.
            timestep: what the host passed; its maximum counts (one per token, for some models). Its value is read, a
                host sync on accelerators, only until ``scheduler.step`` has fired in the run.
            conditioning: the tensors that tell branches apart (prompt embeddings and the like); may be empty.
            latent: the denoiser's main input ``[B, ...]``.

        Raises:
            RunError: more steps than an explicit run lists.
        """
        thread = self._thread()
        path = thread.path
        value = highest(timestep) if path is None or path.must_look else None
        if path is not None and value is not None and path.is_restart(denoiser_key, value, latent):
            self._end(thread, aborted=False)
            path = None
        if path is None:
            path = self._announce(thread, "timesteps")
        run = path.run
        if run.step < 0:
            path.settle(0.0 if value is None else value)
            path.has_begun = True
            try:
                self._on_begin(run)
            except BaseException:
                self._end(thread, aborted=True)
                raise
        name = next((name for key, name in reversed(thread.names) if key is None or key == denoiser_key), None)
        call = path.place(denoiser_key, name, value, conditioning, latent)
        if thread.explicit is not None and run.timesteps is not None and run.step >= len(run.timesteps):
            self._end(thread, aborted=True)
            raise RunError(
                f"run(timesteps=...) lists {len(run.timesteps)} steps, but the denoiser was called for one more. List "
                "the timestep of every step (for a second-order scheduler, of every scheduler.step). If the loop calls "
                "the denoiser twice per step with the same conditioning, name the calls with branch(name)."
            )
        return call

    def fail(self) -> None:
        """An exception crossed the denoiser: the calling thread's run is over, the next call begins another."""
        self._end(self._thread(), aborted=True)

    @contextmanager
    def run(self, timesteps: Sequence[float] | Tensor | None = None, num_steps: int | None = None) -> Iterator[None]:
        """Everything inside is one run, whatever timesteps do; ``set_timesteps`` and the like begin none inside.

        Args:
            timesteps: one per step, in the order of the loop. Matched by order, not by value: the denoiser may get
                ``t / 1000``. The loop goes to the next one when ``scheduler.step`` returns or, where no scheduler
                fires, when the value of the timestep changes or a branch is called again.
            num_steps: number of steps, where only that is known.

        Raises:
            SettingError: no step, or ``num_steps`` is not the number of ``timesteps``.
            RunError: the thread is in an explicit run already.
        """
        times = floats(timesteps)
        if timesteps is not None and times is None:
            raise SettingError("run(timesteps=...): give at least one timestep, as a list of numbers or a 1-D tensor.")
        if times is not None and num_steps not in (None, len(times)):
            raise SettingError(f"run(num_steps={num_steps}) contradicts its {len(times)} timesteps; leave it out.")
        if num_steps is not None and num_steps < 1:
            raise SettingError(f"run(num_steps={num_steps}): a run has 1 step or more.")
        thread = self._thread()
        if thread.explicit is not None:
            raise RunError("run(...) inside run(...): this thread is in an explicit run already; leave it first.")
        self._end(thread, aborted=False)
        thread.explicit = (times, len(times) if times is not None else num_steps)
        aborted = True
        try:
            self._announce(thread, "explicit")
            yield
            aborted = False
        finally:
            thread.explicit = None
            self._end(thread, aborted)

    @contextmanager
    def branch(self, name: str, denoiser_key: Hashable = None) -> Iterator[None]:
        """Name the branch of the calls inside; what ``denoiser.cache_context(name)`` does for a watched denoiser."""
        names = self._thread().names
        entry = (denoiser_key, name)
        names.append(entry)
        try:
            yield
        finally:
            # From the top: contexts of generators may close out of order.
            position = next((i for i in reversed(range(len(names))) if names[i] is entry), None)
            if position is not None:
                del names[position]

    def steer(self, steering: Steering) -> None:
        """Let ``steering`` act around every ``scheduler.step`` of a run, until `unwatch`."""
        self._steerings.append(steering)

    def unsteer(self, steering: Steering) -> None:
        """Let it act no more."""
        self._steerings = [other for other in self._steerings if other is not steering]

    @property
    def is_steering(self) -> bool:
        """Whether anything acts on the trajectory."""
        return bool(self._steerings)

    # ------------------------------------------------------------------ what is listened to

    def watch_pipeline(self, pipe: Any) -> None:
        """Listen to ``pipe.progress_bar`` and to the schedulers the pipeline holds, now and at each run."""
        if callable(getattr(pipe, "progress_bar", None)):
            self._tap(pipe, "progress_bar", wrap_progress_bar)
        for scheduler in schedulers_of(pipe):
            self.watch_scheduler(scheduler)

    def watch_scheduler(self, scheduler: Any) -> None:
        """Listen to ``scheduler.set_timesteps`` and ``scheduler.step``."""
        self._tap(scheduler, "set_timesteps", wrap_set_timesteps)
        self._tap(scheduler, "step", wrap_step)

    def watch_denoiser(self, denoiser: Any, denoiser_key: Hashable = None) -> None:
        """Listen to ``denoiser.cache_context``, if it has one.

        Args:
            denoiser: the denoiser.
            denoiser_key: its key in `enter`; without one, the names hold for every denoiser of this tracker.
        """
        if callable(getattr(denoiser, "cache_context", None)):
            self._keys[denoiser] = denoiser_key
            self._tap(denoiser, "cache_context", wrap_cache_context)

    def unwatch(self, aborted: bool = False) -> None:
        """Stop listening, restore what was found, and end the runs of all threads."""
        with self._lock:
            taps, self._taps = self._taps, []
            self._steerings = []
        for reference in taps:
            tap = reference()
            if tap is not None:
                tap.leave(self)
        self.end(aborted)

    def end(self, aborted: bool = False) -> None:
        """End the runs of all threads."""
        with self._lock:
            threads = list(self._threads.values())
            self._threads.clear()
        for thread in threads:
            self._end(thread, aborted)

    def _tap(self, owner: Any, name: str, wrap: Callable[..., Any]) -> None:
        with self._lock:
            tap = Tap.of(owner, name, wrap)
            tap.join(self)
            # Weak: the tracker does not keep a pipeline alive.
            self._taps = [known for known in self._taps if known() not in (None, tap)] + [weakref.ref(tap)]

    # ------------------------------------------------------------------ what the shadows report

    def _timesteps_set(self, scheduler: Any) -> None:
        self._announce(self._thread(), "scheduler").follow(scheduler)

    def _step_called(self, scheduler: Any, arguments: dict[str, Any]) -> None:
        path = self._thread().path
        if path is not None and path.has_begun:
            for steering in self._steerings:
                steering.before_step(path.run, scheduler, arguments)

    def _step_made(self, scheduler: Any, arguments: dict[str, Any], result: Any) -> Any:
        path = self._thread().path
        if path is not None and path.has_begun:
            for steering in self._steerings:
                result = steering.after_step(path.run, scheduler, arguments, result)
        return result

    def _step_returned(self, scheduler: Any) -> None:
        path = self._thread().path
        if path is not None and path.has_begun:
            path.is_driven = path.is_step_over = True
            if path.limit is None and not path.is_bounded:
                path.limit = length(getattr(scheduler, "timesteps", None))

    def _context_named(self, denoiser: Any, name: str) -> AbstractContextManager[None]:
        return self.branch(name, self._keys.get(denoiser))

    def _bar_entered(self, pipe: Any, iterable: Any, total: Any) -> object:
        if self._on_pipeline is not None:
            self._on_pipeline(pipe)
        thread, bar = self._thread(), object()
        fresh = [s for s in schedulers_of(pipe) if not Tap.has(s, "step", self)]
        for scheduler in fresh:  # replaced since `watch_pipeline`
            self.watch_scheduler(scheduler)
        thread.bars.append(bar)
        path = self._announce(thread, "pipeline")
        main = getattr(pipe, "scheduler", None)
        if path.scheduler is None and any(main is s for s in fresh):
            path.follow(main)  # its set_timesteps was not heard
        path.expect(iterable, total, main)
        return bar

    def _bar_left(self, bar: object, aborted: bool) -> None:
        thread = self._thread()
        if bar in thread.bars:  # else: closed by another thread's garbage collection
            position = thread.bars.index(bar)
            left = thread.bars[position:]
            del thread.bars[position:]
            if thread.path is not None and thread.path.bar in left:
                self._end(thread, aborted)

    # ------------------------------------------------------------------ begin and end

    def _thread(self) -> ThreadState:
        owner = threading.current_thread()
        thread = self._threads.get(threading.get_ident())
        if thread is None or thread.owner() is not owner:
            with self._lock:
                # Idents are recycled: what is found here may be a dead thread's.
                former = self._threads.pop(threading.get_ident(), None)
                thread = self._threads[threading.get_ident()] = ThreadState(owner)
            if former is not None:
                self._end(former, aborted=True)
        return thread

    def _end_dead_threads(self) -> None:
        with self._lock:
            owners = {ident: thread.owner() for ident, thread in self._threads.items()}
            dead = [ident for ident, owner in owners.items() if owner is None or not owner.is_alive()]
            ended = [self._threads.pop(ident) for ident in dead]
        for thread in ended:
            self._end(thread, aborted=True)

    def _announce(self, thread: ThreadState, source: Source) -> Path:
        """Return the run to use from now on: the one announced before if it is still unused, else a new one."""
        path = thread.path
        if path is not None and (thread.explicit is not None or not path.has_begun):
            if thread.explicit is None:
                path.run.source = source
                path.bar = thread.bars[-1] if thread.bars else None
            return path
        self._end(thread, aborted=False)
        self._end_dead_threads()
        run = Run(next(self._ids), source=source)
        path = thread.path = Path(run, thread.bars[-1] if thread.bars else None)
        if thread.explicit is not None:
            run.source, (run.timesteps, run.num_steps) = "explicit", thread.explicit
            path.bar, path.is_counted = None, run.num_steps is not None
        return path

    def _end(self, thread: ThreadState, aborted: bool) -> None:
        path, thread.path = thread.path, None
        if path is not None and path.has_begun:
            self._on_end(path.run, aborted)


class ThreadState:
    """What one thread is doing."""

    def __init__(self, owner: threading.Thread) -> None:
        self.owner = weakref.ref(owner)
        self.path: Path | None = None
        self.explicit: tuple[tuple[float, ...] | None, int | None] | None = None
        self.bars: list[object] = []  # progress bars entered and not left, innermost last
        self.names: list[tuple[Hashable, str]] = []
