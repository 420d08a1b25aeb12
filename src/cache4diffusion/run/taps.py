"""What is listened to: methods of a pipeline, a scheduler and a denoiser, shadowed on the instance."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from cache4diffusion.shadow import Shadow

if TYPE_CHECKING:
    from cache4diffusion.run.tracker import RunTracker


class Tap:
    """One shadowed method of one object, heard by any number of trackers.

    Two trackers may watch one scheduler (pipelines that share it) and leave in any order, so they share one shadow.
    The object owns the tap and the tap knows its trackers weakly: watching keeps nothing alive, on either side.
    """

    def __init__(self, owner: Any, name: str, wrap: Callable[..., Any]) -> None:
        self._trackers: tuple[weakref.ref[RunTracker], ...] = ()
        wrapper = wrap(getattr(owner, name), self)
        wrapper._tap = self
        self.shadow = Shadow(owner, name, wrapper)

    @staticmethod
    def found(owner: Any, name: str) -> Tap | None:
        """Return the tap on a method of an object, also when something else was put in front of it."""
        shadows = getattr(owner.__dict__.get("__getstate__"), "shadows", {})
        tap = getattr(getattr(shadows.get(name), "value", None), "_tap", None)
        return tap if tap is not None and tap.shadow.owner is owner else None

    @classmethod
    def of(cls, owner: Any, name: str, wrap: Callable[..., Any]) -> Tap:
        """Return the tap on a method of an object; make it if there is none."""
        return cls.found(owner, name) or cls(owner, name, wrap)

    @classmethod
    def has(cls, owner: Any, name: str, tracker: RunTracker) -> bool:
        """Whether the tracker hears this method."""
        tap = cls.found(owner, name)
        return tap is not None and tracker in tap.trackers()

    def trackers(self) -> list[RunTracker]:
        """Return the trackers that listen and are alive."""
        alive = [reference() for reference in self._trackers]
        return [tracker for tracker in alive if tracker is not None]

    def join(self, tracker: RunTracker) -> None:
        """Let a tracker listen."""
        if tracker not in self.trackers():
            self._trackers = (*(r for r in self._trackers if r() is not None), weakref.ref(tracker))

    def leave(self, tracker: RunTracker) -> None:
        """Stop telling a tracker; the last one to leave takes the shadow away."""
        self._trackers = tuple(r for r in self._trackers if r() not in (None, tracker))
        if not self._trackers:
            self.shadow.remove()


def wrap_set_timesteps(original: Callable[..., Any], tap: Tap) -> Callable[..., Any]:
    """Tell that a run was announced."""

    @functools.wraps(original)  # hosts inspect the signature
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        for tracker in tap.trackers():
            tracker._timesteps_set(tap.shadow.owner)
        return result

    return set_timesteps


def wrap_step(original: Callable[..., Any], tap: Tap) -> Callable[..., Any]:
    """Let what steers the trajectory act; tell that a step is over, or that the run failed."""

    signature = inspect.signature(original)

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        try:
            steered = [tracker for tracker in tap.trackers() if tracker.is_steering]
            if not steered:
                result = original(*args, **kwargs)
            else:
                call = signature.bind(*args, **kwargs)
                for tracker in steered:
                    tracker._step_called(tap.shadow.owner, call.arguments)
                result = original(*call.args, **call.kwargs)
                for tracker in steered:
                    result = tracker._step_made(tap.shadow.owner, call.arguments, result)
        except BaseException:
            for tracker in tap.trackers():
                tracker.fail()
            raise
        for tracker in tap.trackers():
            tracker._step_returned(tap.shadow.owner)
        return result

    return step


def wrap_cache_context(original: Callable[..., Any], tap: Tap) -> Callable[..., Any]:
    """Name the branch of the calls inside, around the host's own context."""

    @functools.wraps(original)
    @contextmanager
    def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with ExitStack() as stack:
            context = stack.enter_context(original(name, *args, **kwargs))
            for tracker in tap.trackers():
                stack.enter_context(tracker._context_named(tap.shadow.owner, name))
            yield context

    return cache_context


def wrap_progress_bar(original: Callable[..., Any], tap: Tap) -> Callable[..., Any]:
    """Return a bar that tells when it is entered and left."""

    @functools.wraps(original)
    def progress_bar(*args: Any, **kwargs: Any) -> Any:
        iterable = args[0] if args else kwargs.get("iterable")
        total = args[1] if len(args) > 1 else kwargs.get("total")
        return ProgressBar(original(*args, **kwargs), tap, iterable, total)

    return progress_bar


class ProgressBar:
    """A pipeline's progress bar that reports when it is entered or iterated, and left."""

    def __init__(self, bar: Any, tap: Tap, iterable: Any, total: Any) -> None:
        self._bar, self._tap, self._counts = bar, tap, (iterable, total)
        self._open: list[tuple[RunTracker, object]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)

    def __len__(self) -> int:
        return len(self._bar)

    def _enter(self) -> list[tuple[RunTracker, object]]:
        pipe = self._tap.shadow.owner
        return [(tracker, tracker._bar_entered(pipe, *self._counts)) for tracker in self._tap.trackers()]

    @staticmethod
    def _leave(entered: list[tuple[RunTracker, object]], aborted: bool) -> None:
        for tracker, bar in reversed(entered):
            tracker._bar_left(bar, aborted)

    def __enter__(self) -> Any:
        bar = self._bar.__enter__()
        self._open = self._enter()
        return bar

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        entered, self._open = self._open, []
        try:
            return self._bar.__exit__(kind, error, trace)
        finally:
            self._leave(entered, aborted=kind is not None)

    def __iter__(self) -> Iterator[Any]:
        entered, aborted = self._enter(), True
        try:
            yield from self._bar
            aborted = False
        finally:  # also when the loop is left early: the generator is then closed at once
            self._leave(entered, aborted)


def schedulers_of(pipe: Any) -> list[Any]:
    """Return every scheduler the pipeline holds; cascades have several."""

    def is_scheduler(value: Any) -> bool:
        return (
            not isinstance(value, type) and callable(getattr(value, "set_timesteps", None)) and hasattr(value, "step")
        )

    return [value for value in vars(pipe).values() if is_scheduler(value)]
