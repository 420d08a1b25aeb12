"""What the uncached pipeline could do for the same cost: fewer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from .entry import Entry
from .runner import Runner


@dataclass
class CostLine:
    """FLOPs per image of the uncached pipeline at ``n`` steps: ``fixed + n * per_step``."""

    fixed: float
    per_step: float
    steps: int

    @classmethod
    def measure(cls, baseline: Entry, runner: Runner) -> CostLine:
        """Through the counted baseline and a run of two steps."""
        few = min(2, baseline.steps - 1)
        if few < 1:
            return cls(0.0, baseline.counted_flops, baseline.steps)
        short = runner.flops_per_image(Entry.plain(few))
        per_step = (baseline.counted_flops - short) / (baseline.steps - few)
        return cls(baseline.counted_flops - baseline.steps * per_step, per_step, baseline.steps)

    def equal_steps(self, flops: float) -> int | None:
        """Smallest number of steps, 1 or more, whose FLOPs are at least ``flops``; None if that is no saving."""
        if self.per_step <= 0:
            return None
        number = max(1, math.ceil((flops - self.fixed) / self.per_step - 0.01))  # a hundredth of a step is rounding
        return number if number < self.steps else None

    def flops_of(self, entry: Entry) -> float:
        """FLOPs per image of the timed runs: those counted, with the full steps that the timed runs took."""
        full, cached = entry.mean_full_steps, entry.total_steps - entry.counted_full
        if self.per_step <= 0 or cached <= 0 or full == entry.counted_full:
            return entry.counted_flops
        per_cached = (entry.counted_flops - self.fixed - entry.counted_full * self.per_step) / cached
        return entry.counted_flops + (full - entry.counted_full) * (self.per_step - per_cached)


def share_of_steps(baseline: Entry, fewer: list[Entry]) -> float | None:
    """Share of the uncached run's time that lies in its sampling steps, 0..1; None without a shorter run beside it.

    From the run of the fewest steps: what the steps it lacks took, times all steps over those lacking.
    """
    if not fewer:
        return None
    short = min(fewer, key=lambda entry: entry.steps)
    saved = median(1 - 1 / speedup for speedup in short.speedups)
    return min(1.0, max(0.0, saved * baseline.steps / (baseline.steps - short.steps)))
