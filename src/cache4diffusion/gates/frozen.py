"""Cross-attention is frozen at a gate step: the gate of T-GATE (arXiv:2404.02747)."""

from __future__ import annotations

from dataclasses import dataclass

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import Place, StaticGate, Step


@dataclass(frozen=True)
class FrozenCross(StaticGate):
    """Cross-attention is cached from ``gate_step`` on, self-attention at an interval before and at another one after.

    Self-attention before the gate step is full up to step ``warmup`` and where ``step % interval == 0``, and at the
    step in front of the gate; from the gate step on where ``step % late_interval == 0``. With ``warmup=2, interval=5``
    and a gate step of 10 it is ``FFFccFcccFFFF...``.

    The decision called ``"attn"`` is self-attention's, any other one cross-attention's.

    Args:
        gate_step: from which on cross-attention is cached; 0: never.
        interval, late_interval: distances of self-attention's full steps before and after; 1 never caches.
        warmup: last step up to which self-attention is always full.

    Raises:
        SettingError: a value is out of range.
    """

    gate_step: int = 10
    interval: int = 1
    late_interval: int = 1
    warmup: int = 2

    def __post_init__(self) -> None:
        if min(self.gate_step, self.warmup) < 0 or min(self.interval, self.late_interval) < 1:
            raise SettingError(
                f"FrozenCross(gate_step={self.gate_step}, warmup={self.warmup}, interval={self.interval}, "
                f"late_interval={self.late_interval}): steps must be 0 or more, intervals 1 (never cached) or more."
            )

    @property
    def never_caches(self) -> bool:
        """Whether nothing is frozen and self-attention always runs."""
        return self.gate_step == 0 and self.interval == 1

    def begin(self, num_steps: int | None) -> str:
        """Of a decision without a name."""
        return ""

    def begin_at(self, place: Place) -> str:
        """Which decision it is."""
        return place.decision

    def propose(self, state: str, step: Step, score: float | None) -> bool:
        """As drawn above."""
        i, is_late = step.index, 0 < self.gate_step <= step.index
        if state != "attn":
            return is_late
        if is_late:
            return i % self.late_interval != 0
        return i > self.warmup and i % self.interval != 0 and i != self.gate_step - 1
