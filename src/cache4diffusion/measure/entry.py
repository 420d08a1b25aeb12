"""A row of the results while it is being measured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Entry:
    """One row in the making: what is run, and what its runs have shown so far."""

    name: str
    label: str
    settings: dict[str, Any]
    fidelity: str
    attach: Callable[[], AbstractContextManager[Any]]
    steps: int
    counted_flops: float = 0.0  # per image
    denoiser_flops: float = 0.0
    counted_full: float = 0.0
    errors: list[float] | None = None
    seconds: list[float] = field(default_factory=list)  # per batch
    speedups: list[float] = field(default_factory=list)  # per batch: the baseline's seconds over these
    peak: int = 0
    peak_source: str = ""
    full_steps: list[tuple[float, int]] = field(default_factory=list)  # per batch: full steps, images
    expected: list[tuple[float, int]] = field(default_factory=list)  # per batch: predicted FLOPs speed-up, images
    total_steps: int = 0
    strip: str = ""
    cache_bytes: int = 0
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    flip: list[float] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)
    temporal: list[float] = field(default_factory=list)  # of videos, as what follows
    frames: dict[str, list[list[float]]] = field(default_factory=dict)  # by metric: per video, per frame
    shown: dict[int, Image | list[Image]] = field(default_factory=dict)
    broken: int = 0  # images with NaN or Inf
    last: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def plain(cls, steps: int, name: str = "uncached") -> Entry:
        """The pipeline as it is."""
        return cls(name, "", {} if name == "uncached" else {"steps": steps}, "baseline", nullcontext, steps)

    @property
    def title(self) -> str:
        """What it is called where names must differ."""
        return self.label or self.name

    @property
    def mean_full_steps(self) -> float:
        """Of the timed runs, per image."""
        return sum(steps * count for steps, count in self.full_steps) / sum(count for _, count in self.full_steps)

    @property
    def expected_flops_speedup(self) -> float | None:
        """Of all timed runs together, from their strips: a speed-up's mean is that of the costs."""
        if not self.expected:
            return None
        return sum(count for _, count in self.expected) / sum(count / speedup for speedup, count in self.expected)
