"""Runs methods beside the uncached pipeline, and measures cost and quality on the same captions and seeds.

```
count   first batch:   baseline, methods       FLOPs, latents per step; images thrown away; also warms up
                       -> fewer-steps-N        N of at least a method's FLOPs, counted too
time    every batch:   baseline, fewer-steps, methods in turn, same seeds -> seconds, images (first batch: peak memory)
                       images -> PSNR, SSIM, FLIP against the baseline's; judge(caption, image)
again   every batch:   baseline, fewer-steps   only where a method took more full steps when timed than when counted, so
                       that its N is too small: the right one
```
Variants take turns on every batch, so that a machine that slows down slows all of them: the latency speed-up is the
median over batches of baseline seconds / variant seconds. Nothing here knows the caching core: a variant is anything
with a name, settings and an ``attach()``.
"""

from __future__ import annotations

import inspect
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import metadata
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .. import __version__
from .cost import FlopCounter, PeakMemory, Timer
from .errors import MeasureError, require
from .metrics import METRIC_LIBRARIES, as_images, as_pil, flip, paired_interval, psnr, quantile, ssim, wilson_interval
from .results import Conditions, Results, Row

if TYPE_CHECKING:
    from PIL.Image import Image


class Variant(Protocol):
    """A method to be measured.

    An optional attribute ``label`` tells variants of one name apart in tables and plots.
    """

    @property
    def name(self) -> str:
        """The method's name, as the results show it."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What it is called with; JSON-ready values."""
        ...

    @property
    def fidelity(self) -> str:
        """``code``, ``paper``, ``reconstructed``, ``ours``, or ``peer`` for another library's implementation."""
        ...

    def attach(self) -> AbstractContextManager[Any]:
        """Entered around every run and left after it.

        Yields an object whose attributes describe the *last* run: ``full_steps`` (a number), ``total_steps`` (int),
        ``strip`` (str), ``cache_bytes`` (int, at their largest); optional ``predicted_flops_speedup``, ``syncs``
        (numbers), ``notes`` (list of str). Yields None for "every step full".
        """
        ...


class Bench(NamedTuple):
    """What `bench` gives: results, and for each row's name the images of ``captions``, ready for `write_report`."""

    results: Results
    images: dict[str, list[Image]]
    captions: list[str]


@dataclass
class _Entry:
    """One row in the making."""

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
    shown: dict[int, Image] = field(default_factory=dict)
    broken: int = 0  # images with NaN or Inf
    last: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

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


@dataclass
class _Run:
    images: np.ndarray  # [N, H, W, 3]
    broken: int
    full_steps: float
    total_steps: int
    strip: str
    cache_bytes: int
    more: dict[str, Any]


def bench(
    variants: Sequence[Variant],
    generate: Callable[..., Any],
    captions: Sequence[str],
    seeds: int | Sequence[int] = 0,
    *,
    steps: int,
    batch: int = 16,
    judge: Callable[[str, Image], bool] | None = None,
    family: Callable[[str], str] | None = None,
    denoiser: torch.nn.Module | Sequence[torch.nn.Module] | None = None,
    conditions: Mapping[str, Any] | None = None,
    fewer_steps: bool = True,
    flops_captions: int | None = None,
    warmup: int = 0,
    show: int = 8,
    level: float = 0.95,
    progress: bool = True,
) -> Bench:
    """Measure ``variants`` against the uncached pipeline and against fewer steps of equal cost.

    Args:
        variants: see `Variant`. Names that occur twice get a label from the settings that differ.
        generate: ``generate(captions, seeds, steps)`` runs the pipeline on one batch and returns images as `as_images`
            takes them. Image ``i`` must depend on ``captions[i]`` and ``seeds[i]`` only (one generator per caption).
            If it has a parameter ``on_step``, that is None or a function to call with the latents ``[N, ...]`` after
            each step.
        captions: one image is made for each.
        seeds: one per caption, or an int ``s`` for ``s, s + 1, ...``.
        steps: of the uncached pipeline and of the methods.
        batch: captions per run; latencies hold for this batch.
        judge: says whether an image meets its caption; gives the accuracies.
        family: task family of a caption, for accuracies per family.
        denoiser: the network (or networks) called in the loop. ``flops`` and ``flops_speedup`` are then of all its
            calls in the run; the whole pipeline's ratio, text encoders and VAE included, is ``pipeline_flops_speedup``.
            Without it they are the whole pipeline's.
        conditions: fields of `Conditions` that cannot be read off here: ``denoiser`` (its name), ``dtype``, ``device``,
            ``scheduler``, ``guidance``, ``versions`` (added to those found), ``extra``.
        fewer_steps: add the rows ``fewer-steps-N``. For each method, N is the smallest number of steps whose FLOPs are
            at least the method's, so that the odds are never in the method's favour; rows are shared between methods.
        flops_captions: count FLOPs on that many captions of the first batch and scale; None: on the whole batch.
        warmup: runs of the first batch before timing, beside the counted one (for compiled denoisers, which are counted
            eagerly).
        show: images kept for the report, spread over the families.
        level: of the confidence intervals.
        progress: a progress bar on stderr.
    Returns:
        `Bench`; its results have rows uncached, fewer-steps (most steps first), variants in the given order.
    Raises:
        MeasureError: unusable arguments, or a variant failed (the message names it and its captions).
        MissingExtraError: a library that the metrics need is not installed.
    Cost: ``len(captions) / batch + 1 + warmup`` runs for the baseline, each fewer-steps row and each variant; images of
    one batch are held at a time, and ``show`` of each row.

    Where a variant's decisions depend on the images, its FLOPs are those counted, corrected for the full steps that the
    timed runs took on average. If that asks for a fewer-steps row that was not run, it is run afterwards, beside the
    baseline once more.
    """
    for library in METRIC_LIBRARIES:
        require(library)  # before minutes are spent
    captions = list(captions)
    seeds = list(range(seeds, seeds + len(captions))) if isinstance(seeds, int) else list(seeds)
    if not captions or len(seeds) != len(captions):
        raise MeasureError(f"bench needs one seed per caption and at least one caption: {len(captions)}, {len(seeds)}.")
    if steps < 1 or batch < 1:
        raise MeasureError(f"bench(steps={steps}, batch={batch}): both must be 1 or more.")
    if flops_captions is not None and flops_captions < 1:
        raise MeasureError(f"bench(flops_captions={flops_captions}): use 1 or more, or None for the whole batch.")
    quantile(level)  # refuses what is no level
    batches = [slice(i, min(i + batch, len(captions))) for i in range(0, len(captions), batch)]
    families = [family(caption) for caption in captions] if family else None
    denoisers = [denoiser] if isinstance(denoiser, torch.nn.Module) else list(denoiser or ())
    denoiser = denoisers[0] if denoisers else None
    shown = _spread(families or ["all"] * len(captions), show)

    baseline = _Entry("uncached", "", {}, "baseline", nullcontext, steps)
    methods = [
        _Entry(variant.name, label, dict(variant.settings), variant.fidelity, variant.attach, steps)
        for variant, label in zip(variants, _labels(variants), strict=True)
    ]
    with _Progress(enabled=progress) as bar:
        bar.expect((1 + len(methods)) * (1 + warmup + len(batches)))
        counted = slice(0, min(flops_captions or batch, batches[0].stop))
        reference = _count(baseline, generate, captions[counted], seeds[counted], denoisers, bar, None)
        for entry in methods:
            _count(entry, generate, captions[counted], seeds[counted], denoisers, bar, reference)
        line = _CostLine.measure(baseline, generate, captions[counted], seeds[counted])
        numbers = {entry.label or entry.name: line.equal_steps(entry.counted_flops) for entry in methods}
        fewer = [
            _Entry(f"fewer-steps-{n}", "", {"steps": n}, "baseline", nullcontext, n)
            for n in sorted({n for n in numbers.values() if n}, reverse=True)
            if fewer_steps
        ]
        bar.expect(len(fewer) * (1 + warmup + len(batches)))
        for entry in fewer:
            _count(entry, generate, captions[counted], seeds[counted], denoisers, bar, None)
        device = _device(denoiser)
        work = _Work(generate, captions, seeds, batches, device, judge, shown, bar)
        work.run([baseline, *fewer, *methods], warmup)
        numbers = {entry.label or entry.name: line.equal_steps(line.flops_of(entry)) for entry in methods}
        late = [
            _Entry(f"fewer-steps-{n}", "", {"steps": n}, "baseline", nullcontext, n)
            for n in sorted({n for n in numbers.values() if n} - {entry.steps for entry in fewer})
            if fewer_steps
        ]
        if late:
            bar.expect(len(late) * (1 + warmup) + (1 + len(late)) * len(batches))
            for entry in late:
                _count(entry, generate, captions[counted], seeds[counted], denoisers, bar, None)
            work.run([_Entry("uncached", "", {}, "baseline", nullcontext, steps), *late], warmup)
            fewer = sorted([*fewer, *late], key=lambda entry: -entry.steps)
        entries = [baseline, *fewer, *methods]

    details = dict(conditions or {})
    described = Conditions(
        **{
            "denoiser": type(denoiser).__name__ if denoiser is not None else "unnamed",
            "dtype": _dtype(denoiser),
            "device": device or "unknown",
            "threads": torch.get_num_threads(),
            "peak_source": baseline.peak_source,
            "flops_scope": "the denoiser's calls" if denoisers else "whole pipeline calls",
            "counted": counted.stop,
            **{key: value for key, value in details.items() if key != "versions"},
            "versions": {**versions(), **details.get("versions", {})},
            "steps": steps,
            "resolution": work.resolution,
            "batch": min(batch, len(captions)),
            "captions": len(captions),
            "seeds": seeds,
            "level": level,
        }
    )
    share = _share_of_steps(baseline, fewer)
    rows: list[Row] = []
    by_steps = {entry.steps: entry for entry in fewer}
    for entry in entries:
        other = by_steps.get(numbers.get(entry.label or entry.name) or 0) if entry in methods else None
        rows.append(_row(entry, baseline, other, line, share, families, level, judged=judge is not None))
    return Bench(
        Results(conditions=described, rows=rows),
        {entry.label or entry.name: [entry.shown[i] for i in shown] for entry in entries},
        [captions[i] for i in shown],
    )


def generators(seeds: Sequence[int], device: str = "cpu") -> list[torch.Generator]:
    """One generator per seed, as diffusers pipelines take them; on the CPU they give the same noise on every device."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def versions() -> dict[str, str]:
    """Versions that numbers depend on, of what is installed."""
    found = {"cache4diffusion": __version__, "python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


# --- running ----------------------------------------------------------------------------------------------------------


def _run(
    entry: _Entry,
    generate: Callable[..., Any],
    captions: Sequence[str],
    seeds: Sequence[int],
    measure: AbstractContextManager[Any] | None = None,
    on_step: Callable[[torch.Tensor], None] | None = None,
) -> _Run:
    extra = {"on_step": on_step} if on_step is not None and _takes_on_step(generate) else {}
    try:
        with entry.attach() as attached:
            with measure or nullcontext():
                output = generate(list(captions), list(seeds), entry.steps, **extra)
            plain = attached is None
            described = {
                "full_steps": float(entry.steps if plain else attached.full_steps),
                "total_steps": int(entry.steps if plain else attached.total_steps),
                "strip": "F" * entry.steps if plain else str(attached.strip),
                "cache_bytes": 0 if plain else int(attached.cache_bytes),
            }
            optional = ("predicted_flops_speedup", "syncs", "notes")
            more = {key: getattr(attached, key, None) for key in optional}
        images, broken = _repair(output)
    except Exception as error:
        raise MeasureError(
            f"{entry.label or entry.name} failed at {entry.steps} steps on {len(captions)} captions from "
            f"{captions[0]!r} (seed {seeds[0]}): {type(error).__name__}: {error}"
        ) from error
    if len(images) != len(captions):
        raise MeasureError(f"generate() returned {len(images)} images for {len(captions)} captions.")
    return _Run(images, broken, more=more, **described)


def _count(
    entry: _Entry,
    generate: Callable[..., Any],
    captions: Sequence[str],
    seeds: Sequence[int],
    denoisers: list[torch.nn.Module],
    bar: _Progress,
    reference: list[torch.Tensor] | None,
) -> list[torch.Tensor]:
    """Count FLOPs per image and compare the latents after each step; returns the latents."""
    bar.step(f"count {entry.label or entry.name}")
    latents: list[torch.Tensor] = []
    counter = FlopCounter(denoisers)
    run = _run(entry, generate, captions, seeds, counter, lambda x: latents.append(x.detach().float().cpu().clone()))
    entry.counted_flops = counter.total / len(captions)
    entry.denoiser_flops = counter.module_total / len(captions)
    entry.counted_full = run.full_steps
    if counter.uncounted:
        entry.notes.append(f"FLOPs leave out {', '.join(counter.uncounted)}: no formula")
    if reference and len(reference) == len(latents):
        entry.errors = [_relative_error(x, y) for x, y in zip(latents, reference, strict=True)]
    return latents


def _timed(
    entry: _Entry, generate: Callable[..., Any], captions: Sequence[str], seeds: Sequence[int], device: str | None
) -> _Run:
    timer, first = Timer(), not entry.seconds
    if first:
        with PeakMemory(device) as peak:
            run = _run(entry, generate, captions, seeds, timer)
        entry.peak, entry.peak_source = peak.bytes, peak.source
    else:
        run = _run(entry, generate, captions, seeds, timer)
    entry.seconds.append(timer.seconds)
    entry.full_steps.append((run.full_steps, len(captions)))
    if run.more["predicted_flops_speedup"]:
        entry.expected.append((float(run.more["predicted_flops_speedup"]), len(captions)))
    entry.total_steps = run.total_steps
    entry.cache_bytes = max(entry.cache_bytes, run.cache_bytes)
    entry.broken += run.broken
    if first:
        entry.strip, entry.last = run.strip, run.more
    return run


@dataclass
class _Work:
    """The timed part: every entry on every batch, in turn."""

    generate: Callable[..., Any]
    captions: list[str]
    seeds: list[int]
    batches: list[slice]
    device: str | None
    judge: Callable[[str, Image], bool] | None
    shown: list[int]
    bar: _Progress
    resolution: list[int] = field(default_factory=list)

    def run(self, entries: list[_Entry], warmup: int) -> None:
        """Time ``entries`` and measure their images against those of the first."""
        baseline, generate = entries[0], self.generate
        for entry in entries:
            for _ in range(warmup):
                self.bar.step(f"warm up {entry.label or entry.name}")
                _run(entry, generate, self.captions[self.batches[0]], self.seeds[self.batches[0]])
        for part in self.batches:
            images = None
            for entry in entries:
                self.bar.step(entry.label or entry.name)
                run = _timed(entry, generate, self.captions[part], self.seeds[part], self.device)
                entry.speedups.append(baseline.seconds[-1] / max(entry.seconds[-1], 1e-9))
                if images is None:
                    images, self.resolution = run.images, [int(size) for size in run.images.shape[1:3]]
                entry.psnr += psnr(run.images, images).tolist()
                entry.ssim += ssim(run.images, images).tolist()
                entry.flip += [min(1.0, max(0.0, value)) for value in flip(run.images, images).tolist()]
                pictures = as_pil(run.images)
                if self.judge is not None:
                    pairs = zip(self.captions[part], pictures, strict=True)
                    entry.correct += [bool(self.judge(caption, picture)) for caption, picture in pairs]
                here = [i for i in self.shown if part.start <= i < part.stop]
                entry.shown |= {i: pictures[i - part.start] for i in here}


def _repair(output: Any) -> tuple[np.ndarray, int]:
    """Images with NaN or Inf become black there: a broken method gets its bad figures, and a note."""
    if hasattr(output, "detach"):
        output = output.detach().float().cpu().numpy()
    if not isinstance(output, np.ndarray):
        return as_images(output), 0
    bad = ~np.isfinite(output)
    if not bad.any():
        return as_images(output), 0
    broken = int(bad.reshape(len(output), -1).any(axis=1).sum())
    return as_images(np.where(bad, 0, output)), broken


def _takes_on_step(generate: Callable[..., Any]) -> bool:
    try:
        return "on_step" in inspect.signature(generate).parameters
    except (TypeError, ValueError):
        return False


def _relative_error(x: torch.Tensor, y: torch.Tensor) -> float:
    if x.shape != y.shape:
        return 1.0
    x, y = x.flatten(1), y.flatten(1)
    value = ((x - y).norm(dim=1) / y.norm(dim=1).clamp_min(1e-12)).mean().item()
    return value if math.isfinite(value) else 1e6


# --- cost -------------------------------------------------------------------------------------------------------------


@dataclass
class _CostLine:
    """FLOPs per image of the uncached pipeline at ``n`` steps: ``fixed + n * per_step``."""

    fixed: float
    per_step: float
    steps: int

    @classmethod
    def measure(
        cls, baseline: _Entry, generate: Callable[..., Any], captions: Sequence[str], seeds: Sequence[int]
    ) -> _CostLine:
        few = min(2, baseline.steps - 1)
        if few < 1:
            return cls(0.0, baseline.counted_flops, baseline.steps)
        short = _Entry("uncached", "", {}, "baseline", nullcontext, few)
        with FlopCounter() as counter:
            _run(short, generate, captions[:1], seeds[:1])
        per_step = (baseline.counted_flops - counter.total) / (baseline.steps - few)
        return cls(baseline.counted_flops - baseline.steps * per_step, per_step, baseline.steps)

    def equal_steps(self, flops: float) -> int | None:
        """Smallest number of steps, 1 or more, whose FLOPs are at least ``flops``; None if that is no saving."""
        if self.per_step <= 0:
            return None
        number = max(1, math.ceil((flops - self.fixed) / self.per_step - 0.01))  # a hundredth of a step is rounding
        return number if number < self.steps else None

    def flops_of(self, entry: _Entry) -> float:
        """FLOPs per image of the timed runs: those counted, with the full steps that the timed runs took."""
        full, cached = entry.mean_full_steps, entry.total_steps - entry.counted_full
        if self.per_step <= 0 or cached <= 0 or full == entry.counted_full:
            return entry.counted_flops
        per_cached = (entry.counted_flops - self.fixed - entry.counted_full * self.per_step) / cached
        return entry.counted_flops + (full - entry.counted_full) * (self.per_step - per_cached)


def _share_of_steps(baseline: _Entry, fewer: list[_Entry]) -> float | None:
    """Share of the uncached run's time that lies in its sampling steps, 0..1; None without a shorter run beside it.

    From the run of the fewest steps: what the steps it lacks took, times all steps over those lacking.
    """
    if not fewer:
        return None
    short = min(fewer, key=lambda entry: entry.steps)
    saved = median(1 - 1 / speedup for speedup in short.speedups)
    return min(1.0, max(0.0, saved * baseline.steps / (baseline.steps - short.steps)))


# --- rows -------------------------------------------------------------------------------------------------------------


def _row(
    entry: _Entry,
    baseline: _Entry,
    other: _Entry | None,
    line: _CostLine,
    share: float | None,
    families: list[str] | None,
    level: float,
    *,
    judged: bool,
) -> Row:
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


def _by_family(correct: list[bool], families: list[str] | None) -> dict[str, float] | None:
    if families is None:
        return None
    return {
        name: fmean(ok for ok, family in zip(correct, families, strict=True) if family == name)
        for name in dict.fromkeys(families)
    }


def _spread(families: list[str], count: int) -> list[int]:
    """``count`` indices in ascending order, taken from the families in turn."""
    queues = {name: [i for i, family in enumerate(families) if family == name] for name in dict.fromkeys(families)}
    chosen: list[int] = []
    while len(chosen) < min(count, len(families)):
        for queue in queues.values():
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    return sorted(chosen)


def _labels(variants: Sequence[Variant]) -> list[str]:
    """A label for every variant whose name occurs twice: the name and the settings in which they differ."""
    labels = []
    for variant in variants:
        same = [other for other in variants if other.name == variant.name]
        label = str(getattr(variant, "label", "") or "")
        if not label and len(same) > 1:
            keys = dict.fromkeys(key for other in same for key in other.settings)
            differ = [key for key in keys if len({repr(other.settings.get(key)) for other in same}) > 1]
            said = ", ".join(f"{key}={variant.settings[key]}" for key in differ if key in variant.settings)
            label = f"{variant.name} ({said})" if said else variant.name
        labels.append(label)
    names = [label or variant.name for label, variant in zip(labels, variants, strict=True)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise MeasureError(f"Several variants are called {', '.join(twice)} with the same settings; give each a label.")
    reserved = [name for name in names if name == "uncached" or name.startswith("fewer-steps-")]
    if reserved:
        raise MeasureError(f"A variant is called {reserved[0]!r}: that row is made by the bench itself.")
    return labels


def _dtype(denoiser: torch.nn.Module | None) -> str:
    parameter = next(denoiser.parameters(), None) if denoiser is not None else None
    return "unknown" if parameter is None else str(parameter.dtype).removeprefix("torch.")


def _device(denoiser: torch.nn.Module | None) -> str | None:
    parameter = next(denoiser.parameters(), None) if denoiser is not None else None
    return None if parameter is None else parameter.device.type


class _Progress:
    """A bar on stderr that learns of more work as it goes."""

    def __init__(self, *, enabled: bool) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not enabled,
        )
        self._task = self._bar.add_task("bench", total=0)
        self._total, self._begun = 0, 0

    def expect(self, runs: int) -> None:
        self._total += runs
        self._bar.update(self._task, total=self._total)

    def step(self, what: str) -> None:
        """A run of ``what`` begins; the one before is done."""
        self._bar.update(self._task, description=what, completed=self._begun)
        self._begun += 1

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        if exc[0] is None:
            self._bar.update(self._task, description="measured", completed=self._total)
        self._bar.stop()
