"""Calibrations: what a method needs to know of a denoiser before sampling."""

from pathlib import Path

from cache4diffusion.calibration.calibrator import Calibrator, Fit, Sums
from cache4diffusion.calibration.quality import Quality
from cache4diffusion.calibration.search import Search
from cache4diffusion.calibration.statistic import Seen, Statistic, StepMeans
from cache4diffusion.calibration.store import (
    Calibration,
    Entry,
    Provenance,
    load_calibration,
    merge_calibrations,
)
from cache4diffusion.calibration.training import Numbers, Reached, Spot, Training
from cache4diffusion.calibration.trial import Trial

Given = str | Path | Calibration | None  # what a setting ``calibration`` may be

__all__ = [
    "Calibration",
    "Calibrator",
    "Entry",
    "Fit",
    "Given",
    "Numbers",
    "Provenance",
    "Quality",
    "Reached",
    "Search",
    "Seen",
    "Spot",
    "Statistic",
    "StepMeans",
    "Sums",
    "Training",
    "Trial",
    "load_calibration",
    "merge_calibrations",
]
