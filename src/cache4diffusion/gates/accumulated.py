"""Accumulated change of something cheap: the gate of TeaCache (arXiv:2411.19108, eq. 4-6), EasyCache and DiCache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import WATCHES, Signal, Step, Watch


@dataclass
class AccumulatedState:
    """The sum since the last full step."""

    total: float = 0.0


@dataclass(frozen=True)
class AccumulatedChange:
    """Cached while the rescaled changes of the signal since the last full step sum up to less than a threshold.

    ``total += P(score)`` on every step that is not forced; cached while ``total < threshold``; a full step sets
    ``total = 0``. ``P`` is a polynomial fitted to a denoiser, highest power first; ``(1.0, 0.0)`` is the identity.
    With a constant score ``u`` the run of cached steps has length ``ceil(threshold / P(u)) - 1``.

    Args:
        threshold: 0 or more; 0 never caches, but for ``rescale="none"`` and a ``P`` that is negative.
        coefficients: of ``P``, highest power first (``numpy.poly1d`` order).
        rescale: what to do where a fitted ``P`` is negative (outside its fitted range several published ones are):
            ``"clamp0"`` counts such a change as 0, ``"abs"`` as ``|P|``, ``"none"`` lets it lower the sum as the
            released code does.
        fitted: the range of scores that ``P`` was fitted to: a score outside counts as the nearest end, as a polynomial
            is worth nothing beyond its data. None: no such range is known.
        of: what is watched: `Signal` (against the previous step), `Front` or `Drift`; or the name of one.

    Raises:
        SettingError: the threshold is negative, there is no coefficient, or no such watch.
    """

    threshold: float = 0.4
    coefficients: tuple[float, ...] = (1.0, 0.0)
    rescale: Literal["none", "abs", "clamp0"] = "none"
    fitted: tuple[float, float] | None = None
    of: Watch | str = field(default_factory=Signal)

    def __post_init__(self) -> None:
        if isinstance(self.of, str) and self.of not in WATCHES:
            raise SettingError(f"AccumulatedChange(of={self.of!r}): use one of {', '.join(WATCHES)}.")
        if not self.threshold >= 0:
            raise SettingError(f"AccumulatedChange(threshold={self.threshold}): threshold must be 0 (off) or more.")
        if not self.coefficients:
            raise SettingError("AccumulatedChange(coefficients=()): give at least one coefficient.")
        if self.rescale not in ("none", "abs", "clamp0"):
            raise SettingError(f"AccumulatedChange(rescale={self.rescale!r}): use 'none', 'abs' or 'clamp0'.")

    @property
    def watch(self) -> Watch:
        """What is watched."""
        return WATCHES[self.of]() if isinstance(self.of, str) else self.of

    @property
    def needs_num_steps(self) -> bool:
        """The guard that forces the last step knows the length; this gate does not."""
        return False

    def begin(self, num_steps: int | None) -> AccumulatedState:
        """Start with an empty sum."""
        return AccumulatedState()

    def _raw(self, change: float) -> float:
        value = 0.0
        for coefficient in self.coefficients:
            value = value * change + coefficient
        return value

    def polynomial(self, change: float) -> float:
        """``P(change)``, rescaled."""
        if self.fitted is not None:
            change = min(max(change, self.fitted[0]), self.fitted[1])
        value = self._raw(change)
        if self.rescale == "abs":
            return abs(value)
        return max(value, 0.0) if self.rescale == "clamp0" else value

    def remark(self, score: float) -> str | None:
        """What is to be said of a score that ``P`` is no good for, and that counted as another one."""
        if self.fitted is not None and not self.fitted[0] <= score <= self.fitted[1]:
            return (
                f"changes outside the range {self.fitted[0]:.3g} to {self.fitted[1]:.3g} that the polynomial was "
                "fitted to counted as the nearest end of it"
            )
        if self.rescale == "clamp0" and self._raw(score) < 0:
            return "changes that the polynomial rescales to below 0, outside what it was fitted to, counted as 0"
        return None

    def propose(self, state: AccumulatedState, step: Step, score: float | None) -> bool:
        """Cached while the sum, this step included, stays below the threshold."""
        if score is None:
            return False
        return state.total + self.polynomial(score) < self.threshold

    def commit(self, state: AccumulatedState, step: Step, cached: bool, score: float | None) -> None:
        """A full step empties the sum, also a forced one; a cached one adds to it what was seen, if anything was."""
        if not cached:
            state.total = 0.0
        elif score is not None:
            state.total += self.polynomial(score)
