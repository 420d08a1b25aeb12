"""From what was measured to a row of the results."""

from __future__ import annotations

import math
from statistics import fmean, median
from typing import Any

from .entry import Entry
from .equal_cost import CostLine
from .metrics import paired_interval, wilson_interval
from .results import Row


def row_of(
    entry: Entry,
    baseline: Entry,
    other: Entry | None,
    line: CostLine,
    share: float | None,
    families: list[str] | None,
    level: float,
    *,
    judged: bool,
) -> Row:
    """The row of a measured entry.

    Args:
        entry: what was measured.
        baseline: the uncached entry.
        other: the entry of fewer steps it is compared with, if any.
        line: cost of the uncached pipeline by number of steps.
        share: of the uncached run's time that lies in its steps.
        families: of the captions.
        level: of the intervals.
        judged: whether images were judged.
    """
    images, full, flops = len(entry.psnr), entry.mean_full_steps, line.flops_of(entry)
    scoped, whole = (flops, None), (baseline.counted_flops, None)
    if entry.denoiser_flops or baseline.denoiser_flops:
        scoped = (entry.denoiser_flops + flops - entry.counted_flops, flops)
        whole = (baseline.denoiser_flops, baseline.counted_flops)
    sizes = [count for _, count in entry.full_steps]
    notes = entry.notes + list(entry.last.get("notes") or [])
    differing = [value for value in entry.psnr if math.isfinite(value)]
    if differing and len(differing) < images:
        notes.append(
            f"{images - len(differing)} of {images} images are identical to the uncached ones; PSNR without them"
        )
    if entry.broken:
        notes.append(f"{entry.broken} of {images} images contained NaN or Inf, drawn black")
    values: dict[str, Any] = {
        "method": entry.name,
        "label": entry.label,
        "settings": entry.settings,
        "full_steps": round(full) if abs(full - round(full)) < 1e-9 else round(full, 2),
        "total_steps": entry.total_steps,
        "flops_speedup": whole[0] / scoped[0] if scoped[0] > 0 and whole[0] else 1.0,
        "latency_speedup": median(entry.speedups),
        "psnr": fmean(differing) if differing else math.inf,
        "ssim": fmean(entry.ssim),
        "flip": fmean(entry.flip),
        "cache_bytes": entry.cache_bytes,
        "peak_bytes": entry.peak,
        "strip": entry.strip,
        "fidelity": entry.fidelity,
        "flops": round(scoped[0]),
        "latency_ms": median(1000 * s / n for s, n in zip(entry.seconds, sizes, strict=True)),
        "pipeline_flops_speedup": whole[1] / scoped[1] if scoped[1] and whole[1] else None,
        "error_per_step": entry.errors,
        "psnr_per_caption": entry.psnr,
        "notes": notes,
    }
    if entry.temporal:
        values["temporal_error"] = fmean(entry.temporal)
        for name, per_video in entry.frames.items():
            values[f"{name}_per_frame"] = [_mean(column) for column in zip(*per_video, strict=True)]
    if entry.last.get("syncs") is not None:
        values["syncs"] = float(entry.last["syncs"])
    expected = entry.expected_flops_speedup
    if expected is not None:
        values["predicted_flops_speedup"] = expected
        if share is not None:
            values["predicted_latency_speedup"] = 1 / (1 - share + share / expected)
    if judged:
        values |= {
            "accuracy": fmean(entry.correct),
            "accuracy_interval": list(wilson_interval(sum(entry.correct), images, level)),
            "accuracy_by_family": _by_family(entry.correct, families),
            "correct_per_caption": entry.correct,
        }
        if entry is not baseline:
            values["accuracy_difference"] = fmean(entry.correct) - fmean(baseline.correct)
            values["accuracy_difference_interval"] = list(paired_interval(entry.correct, baseline.correct, level))
    if other is not None:
        wins = sum(a > b for a, b in zip(entry.psnr, other.psnr, strict=True))
        values |= {
            "reference_row": other.name,
            "psnr_wins": wins / images,
            "psnr_wins_interval": list(wilson_interval(wins, images, level)),
        }
        if judged:
            values["accuracy_vs_reference"] = fmean(entry.correct) - fmean(other.correct)
            values["accuracy_vs_reference_interval"] = list(paired_interval(entry.correct, other.correct, level))
    return Row(**values)


def _mean(values: tuple[float, ...]) -> float:
    """Of those that are finite; infinite if none is."""
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else math.inf


def _by_family(correct: list[bool], families: list[str] | None) -> dict[str, float] | None:
    if families is None:
        return None
    return {
        name: fmean(ok for ok, family in zip(correct, families, strict=True) if family == name)
        for name in dict.fromkeys(families)
    }
