"""Running a pipeline under measurement: counting its FLOPs, timing it, comparing its images with the uncached ones."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .cost import FlopCounter, PeakMemory, Timer
from .entry import Entry
from .errors import MeasureError
from .metrics import as_images, as_pil
from .progress import RunBar
from .video import as_clips, as_videos, closeness, is_video

if TYPE_CHECKING:
    pass


@dataclass
class Run:
    """What one call of the pipeline gave."""

    images: np.ndarray  # [N, H, W, 3], or [N, F, H, W, 3]
    broken: int
    full_steps: float
    total_steps: int
    strip: str
    cache_bytes: int
    more: dict[str, Any]


@dataclass
class Runner:
    """Runs entries on the same captions and seeds.

    Args:
        generate: the pipeline, as in `bench`.
        captions: one image each.
        seeds: one per caption.
        batch: captions per run.
        counted: how many of the first batch FLOPs are counted on.
        denoisers: whose FLOPs are counted apart.
        judge: as in `bench`.
        shown: indices of the images that are kept.
        warmup: runs of the first batch before an entry is timed.
        bar: shows how far it is.
    """

    generate: Callable[..., Any]
    captions: list[str]
    seeds: list[int]
    batch: int
    counted: int
    denoisers: list[torch.nn.Module]
    judge: Callable[[str, Any], bool] | None
    shown: list[int]
    warmup: int
    bar: RunBar
    resolution: list[int] = field(default_factory=list)  # of the images, once there are any: height, width[, frames]

    @property
    def batches(self) -> list[slice]:
        """Of captions."""
        count = len(self.captions)
        return [slice(i, min(i + self.batch, count)) for i in range(0, count, self.batch)]

    @property
    def timed_runs(self) -> int:
        """How many `time` takes for each entry."""
        return self.warmup + len(self.batches)

    @property
    def device(self) -> str | None:
        """Of the denoiser; None if there is none to ask."""
        parameter = next((p for denoiser in self.denoisers[:1] for p in denoiser.parameters()), None)
        return None if parameter is None else parameter.device.type

    def count(self, entry: Entry, reference: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """Count FLOPs per image; returns the latents after each step, and compares them with ``reference``."""
        self.bar.step(f"count {entry.title}")
        latents: list[torch.Tensor] = []
        counter, part = FlopCounter(self.denoisers), slice(0, self.counted)
        run = self._run(entry, part, counter, lambda x: latents.append(x.detach().float().cpu().clone()))
        entry.counted_flops = counter.total / self.counted
        entry.denoiser_flops = counter.module_total / self.counted
        entry.counted_full = run.full_steps
        if counter.uncounted:
            entry.notes.append(f"FLOPs leave out {', '.join(counter.uncounted)}: no formula")
        if reference and len(reference) == len(latents):
            entry.errors = [_relative_error(x, y) for x, y in zip(latents, reference, strict=True)]
        return latents

    def flops_per_image(self, entry: Entry) -> float:
        """FLOPs per image of one run on the counted captions: as many, so that what is done per run weighs the same."""
        with FlopCounter() as counter:
            self._run(entry, slice(0, self.counted))
        return counter.total / self.counted

    def time(self, entries: list[Entry]) -> None:
        """Time ``entries``, in turn on every batch, and measure their images against those of the first."""
        baseline, batches = entries[0], self.batches
        for entry in entries:
            for _ in range(self.warmup):
                self.bar.step(f"warm up {entry.title}")
                self._run(entry, batches[0])
        for part in batches:
            images = None
            for entry in entries:
                self.bar.step(entry.title)
                run = self._timed(entry, part)
                entry.speedups.append(baseline.seconds[-1] / max(entry.seconds[-1], 1e-9))
                if images is None:
                    images, self.resolution = run.images, _resolution(run.images)
                found = closeness(run.images, images)
                entry.psnr += found.psnr.tolist()
                entry.ssim += found.ssim.tolist()
                entry.flip += found.flip.tolist()
                if found.temporal is not None and found.frames is not None:
                    entry.temporal += found.temporal.tolist()
                    for name, values in found.frames.items():
                        entry.frames.setdefault(name, []).extend(values.tolist())
                pictures = as_clips(run.images) if is_video(run.images) else as_pil(run.images)
                if self.judge is not None:
                    pairs = zip(self.captions[part], pictures, strict=True)
                    entry.correct += [bool(self.judge(caption, picture)) for caption, picture in pairs]
                here = [i for i in self.shown if part.start <= i < part.stop]
                entry.shown |= {i: pictures[i - part.start] for i in here}

    def _timed(self, entry: Entry, part: slice) -> Run:
        timer, first = Timer(), not entry.seconds
        if first:
            with PeakMemory(self.device) as peak:
                run = self._run(entry, part, timer)
            entry.peak, entry.peak_source = peak.bytes, peak.source
        else:
            run = self._run(entry, part, timer)
        entry.seconds.append(timer.seconds)
        entry.full_steps.append((run.full_steps, len(self.captions[part])))
        if run.more["predicted_flops_speedup"]:
            entry.expected.append((float(run.more["predicted_flops_speedup"]), len(self.captions[part])))
        entry.total_steps = run.total_steps
        entry.cache_bytes = max(entry.cache_bytes, run.cache_bytes)
        entry.broken += run.broken
        if first:
            entry.strip, entry.last = run.strip, run.more
        return run

    def _run(
        self,
        entry: Entry,
        part: slice,
        measure: AbstractContextManager[Any] | None = None,
        on_step: Callable[[torch.Tensor], None] | None = None,
    ) -> Run:
        captions, seeds = self.captions[part], self.seeds[part]
        extra = {"on_step": on_step} if on_step is not None and _takes_on_step(self.generate) else {}
        try:
            with entry.attach() as attached:
                with measure or nullcontext():
                    output = self.generate(list(captions), list(seeds), entry.steps, **extra)
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
                f"{entry.title} failed at {entry.steps} steps on {len(captions)} captions from "
                f"{captions[0]!r} (seed {seeds[0]}): {type(error).__name__}: {error}"
            ) from error
        if len(images) != len(captions):
            raise MeasureError(f"generate() returned {len(images)} images for {len(captions)} captions.")
        return Run(images, broken, more=more, **described)


def _repair(output: Any) -> tuple[np.ndarray, int]:
    """Images with NaN or Inf become black there: a broken method gets its bad figures, and a note."""
    if hasattr(output, "detach"):
        output = output.detach().float().cpu().numpy()
    bring = as_videos if is_video(output) else as_images
    if not isinstance(output, np.ndarray):
        return bring(output), 0
    bad = ~np.isfinite(output)
    if not bad.any():
        return bring(output), 0
    broken = int(bad.reshape(len(output), -1).any(axis=1).sum())
    return bring(np.where(bad, 0, output)), broken


def _resolution(images: np.ndarray) -> list[int]:
    """Height and width, then the number of frames if there are any."""
    *frames, height, width = images.shape[1:-1]
    return [height, width, *frames]


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
