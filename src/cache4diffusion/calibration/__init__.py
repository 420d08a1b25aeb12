"""Calibrations: what a method needs to know of a denoiser before sampling."""

from pathlib import Path

from cache4diffusion.calibration.quality import Quality
from cache4diffusion.calibration.statistic import Fit, Seen, Statistic, StepMeans, Sums
from cache4diffusion.calibration.store import (
    Calibration,
    Entry,
    Provenance,
    load_calibration,
    merge_calibrations,
)

Given = str | Path | Calibration | None  # what a setting ``calibration`` may be

__all__ = [
    "Calibration",
    "Entry",
    "Fit",
    "Given",
    "Provenance",
    "Quality",
    "Seen",
    "Statistic",
    "StepMeans",
    "Sums",
    "load_calibration",
    "merge_calibrations",
]
