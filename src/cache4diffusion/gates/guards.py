"""Guards: limits that overrule any gate.

A guard answers `True` (must be cached), `False` (must be full) or `None` (no opinion); the first opinion counts. Its
state is advanced once per decision with what was finally decided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import Step
from cache4diffusion.gates.step_mask import Resize, StepMask, step_mask


class Guard(Protocol):
    """Frozen settings; the state belongs to the engine."""

    @property
    def needs_num_steps(self) -> bool:
        """Whether the length of the run must be known."""
        ...

    def begin(self) -> Any:
        """State of one unit at the start of a run."""
        ...

    def overrule(self, state: Any, step: Step) -> bool | None:
        """`False` forces a full step, `True` a cached one, `None` leaves it to the gate. Pure."""
        ...

    def commit(self, state: Any, step: Step, cached: bool, score: float | None) -> None:
        """Take note of the decision."""
        ...


@dataclass(frozen=True)
class _Stateless:
    @property
    def needs_num_steps(self) -> bool:
        return False

    def begin(self) -> Any:
        return None

    def commit(self, state: Any, step: Step, cached: bool, score: float | None) -> None:
        pass


@dataclass(frozen=True)
class Warmup(_Stateless):
    """The first ``steps`` steps are full; with ``interval`` above 1 only every ``interval``-th of them (DBCache)."""

    steps: int = 0
    interval: int = 1

    def __post_init__(self) -> None:
        if self.steps < 0 or self.interval < 1:
            raise SettingError(f"Warmup(steps={self.steps}, interval={self.interval}): steps >= 0, interval >= 1.")

    def overrule(self, state: Any, step: Step) -> bool | None:
        """Full during warm-up."""
        return False if step.index < self.steps and step.index % self.interval == 0 else None


@dataclass(frozen=True)
class ForceLast(_Stateless):
    """The last ``steps`` steps are full (a cooldown). Needs the length of the run."""

    steps: int = 1

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise SettingError(f"ForceLast(steps={self.steps}): steps must be 0 or more.")

    @property
    def needs_num_steps(self) -> bool:
        """The end must be known."""
        return self.steps > 0

    def overrule(self, state: Any, step: Step) -> bool | None:
        """Full at the end."""
        assert step.num_steps is not None
        return False if step.index >= step.num_steps - self.steps else None


@dataclass(frozen=True)
class Window(_Stateless):
    """Full outside a part of the run: ``Window(0.0, 0.5)`` caches in the first half only. Needs the run's length.

    Args:
        start: fraction of the steps before which all are full.
        stop: fraction of the steps from which all are full; 1 for none.
        is_start_full: whether the step ``int(start * n)`` of ``n``, where the window begins, is full as well.
    """

    start: float = 0.0
    stop: float = 1.0
    is_start_full: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= 1:
            raise SettingError(f"Window(start={self.start}, stop={self.stop}): 0 <= start <= stop <= 1.")

    @property
    def needs_num_steps(self) -> bool:
        """A fraction of what?"""
        return self.start > 0 or self.stop < 1

    def overrule(self, state: Any, step: Step) -> bool | None:
        """Full outside."""
        if not self.needs_num_steps:
            return None
        assert step.num_steps is not None  # the engine refuses to begin without it
        begin, index = self.start * step.num_steps, step.index
        has_begun = index > int(begin) if self.is_start_full else index >= begin
        return None if has_begun and index < self.stop * step.num_steps else False


@dataclass(frozen=True)
class Mask(_Stateless):
    """A given list of steps that must be computed; what happens at the others is the policy.

    Args:
        must_compute: one flag per step, steps beyond its end being left to the gate; or a mask as `StepMask` takes it,
            which needs the length of the run.
        policy: ``"static"`` always caches at the others, ``"dynamic"`` asks the gate.
        resize: how a preset is brought to another length, as in `StepMask`.
    """

    must_compute: str | tuple[bool, ...] = ()
    policy: Literal["static", "dynamic"] = "dynamic"
    resize: Resize = "scale"

    def __post_init__(self) -> None:
        if isinstance(self.must_compute, str):
            StepMask(self.must_compute, self.resize)
        elif self.must_compute and not self.must_compute[0]:
            raise SettingError("Mask(must_compute=(False, ...)): the first step cannot be cached.")

    @property
    def needs_num_steps(self) -> bool:
        """A preset is made for one length."""
        return isinstance(self.must_compute, str)

    def overrule(self, state: Any, step: Step) -> bool | None:
        """Full where the mask says so."""
        flags = self.must_compute
        if isinstance(flags, str):
            assert step.num_steps is not None  # the engine refuses to begin without it
            flags = step_mask(flags, step.num_steps, self.resize)
        if step.index >= len(flags):
            return None
        if flags[step.index]:
            return False
        return True if self.policy == "static" else None


@dataclass
class _Count:
    value: float = 0


@dataclass(frozen=True)
class MaxTotal(_Stateless):
    """At most ``steps`` cached steps in a run."""

    steps: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise SettingError(
                f"MaxTotal(steps={self.steps}): steps must be 0 or more; for no limit leave the guard out."
            )

    def begin(self) -> _Count:
        """None yet."""
        return _Count()

    def overrule(self, state: _Count, step: Step) -> bool | None:
        """Full once the budget is spent."""
        return False if state.value >= self.steps else None

    def commit(self, state: _Count, step: Step, cached: bool, score: float | None) -> None:
        """Count."""
        state.value += cached


@dataclass(frozen=True)
class MaxRun(_Stateless):
    """At most ``steps`` cached steps in a row (cache-dit 1.5.3 counts so; earlier releases drifted)."""

    steps: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise SettingError(
                f"MaxRun(steps={self.steps}): steps must be 0 or more; for no limit leave the guard out."
            )

    def begin(self) -> _Count:
        """No run yet."""
        return _Count()

    def overrule(self, state: _Count, step: Step) -> bool | None:
        """Full once the run is long enough."""
        return False if state.value >= self.steps else None

    def commit(self, state: _Count, step: Step, cached: bool, score: float | None) -> None:
        """Count the current run."""
        state.value = state.value + 1 if cached else 0


@dataclass(frozen=True)
class MaxAccumulated(_Stateless):
    """Full for the rest of the run once the scores, those of full steps included, sum up to ``total`` (DBCache)."""

    total: float = 1.0

    def __post_init__(self) -> None:
        if not self.total > 0:
            raise SettingError(f"MaxAccumulated(total={self.total}): total must be above 0.")

    def begin(self) -> _Count:
        """Nothing summed."""
        return _Count()

    def overrule(self, state: _Count, step: Step) -> bool | None:
        """Full once the sum is reached."""
        return False if state.value >= self.total else None

    def commit(self, state: _Count, step: Step, cached: bool, score: float | None) -> None:
        """Sum."""
        state.value += score if score is not None and score > 0 else 0.0
