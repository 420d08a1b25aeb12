"""Draft, verify, refresh: the gate of SpeCa (arXiv:2509.11628)."""

from __future__ import annotations

from dataclasses import dataclass, field

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import Step, Verification


@dataclass
class SpeculativeState:
    """Where in the cycle a unit is."""

    last_was_full: bool | None = None  # None before the first step
    run_length: int = 0  # cached steps since the last full one
    is_checked: bool = False  # whether the step just committed is to be verified


@dataclass(frozen=True)
class Speculative:
    """Cached until a verification fails or the run of cached steps is long enough.

    The rule of the released code, in which a check acts on the *next* step and nothing is rolled back::

        after a full step:  cached, n = 1, no check           (a full step never follows a full one)
        else:               tau = max(threshold * decay ** (step / num_steps), floor)
                            check = n >= min_run ;  failed = check and score > tau
                            full (n = 0) if step < warmup or n >= max_run or failed, else cached (n += 1)

    With an always failing check and ``min_run = 2`` the cycle is ``Fccc``; with none failing it is ``max_run``
    cached steps and a full one. With ``warmup = 3`` a run begins ``FcF``, not ``FFF``.

    Args:
        threshold: first value of tau, 0 or more. 0 is off (never cached) unless ``is_off_at_zero`` is False.
        decay: factor on tau over the whole run, in (0, 1].
        min_run: cached steps before checks begin, 1 or more.
        max_run: cached steps after which a full step is forced, ``min_run`` or more is sensible, 1 at least.
        warmup: steps before this one are full as the rule above says.
        floor: lower bound of tau.
        verification: what is measured on checked steps.
        is_off_at_zero: the released code still caches ``min_run + 1`` steps in a row at threshold 0.

    Raises:
        SettingError: a value is out of range.
    """

    threshold: float = 0.3
    decay: float = 0.3
    min_run: int = 2
    max_run: int = 8
    warmup: int = 3
    floor: float = 0.1
    verification: Verification = field(default_factory=Verification)
    is_off_at_zero: bool = True

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise SettingError(f"Speculative(threshold={self.threshold}): threshold must be 0 (off) or more.")
        if not 0 < self.decay <= 1:
            raise SettingError(f"Speculative(decay={self.decay}): decay must be above 0 and at most 1.")
        if self.min_run < 1 or self.max_run < 1:
            raise SettingError(
                f"Speculative(min_run={self.min_run}, max_run={self.max_run}): both must be 1 or more cached steps."
            )
        if self.warmup < 0 or self.floor < 0:
            raise SettingError(f"Speculative(warmup={self.warmup}, floor={self.floor}): both must be 0 or more.")

    @property
    def watch(self) -> Verification:
        """The error of the prediction at the step before."""
        return self.verification

    @property
    def needs_num_steps(self) -> bool:
        """The threshold decays over the run."""
        return self.decay != 1

    def begin(self, num_steps: int | None) -> SpeculativeState:
        """Before the first step."""
        return SpeculativeState()

    def tolerance(self, step: Step) -> float:
        """``tau`` at this step."""
        progress = step.index / step.num_steps if step.num_steps else 0.0
        return max(self.threshold * self.decay**progress, self.floor)

    def propose(self, state: SpeculativeState, step: Step, score: float | None) -> bool:
        """Apply the rule."""
        if self.threshold == 0 and self.is_off_at_zero:
            return False
        if state.last_was_full:
            return True
        if step.index < self.warmup or state.run_length >= self.max_run:
            return False
        is_due = state.run_length >= self.min_run
        return not (is_due and score is not None and score > self.tolerance(step)) and state.last_was_full is not None

    def commit(self, state: SpeculativeState, step: Step, cached: bool, score: float | None) -> None:
        """Advance the cycle."""
        state.is_checked = cached and not state.last_was_full and state.run_length >= self.min_run
        state.run_length = state.run_length + 1 if cached else 0
        state.last_was_full = not cached

    def is_checked(self, state: SpeculativeState) -> bool:
        """Whether the step just committed is to be verified."""
        return state.is_checked
