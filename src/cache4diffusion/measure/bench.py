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

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import __version__
from .entry import Entry
from .equal_cost import CostLine, share_of_steps
from .errors import MeasureError, require
from .metrics import METRIC_LIBRARIES, quantile
from .progress import RunBar
from .results import Conditions, Results
from .rows import row_of
from .runner import Runner
from .variant import Variant, labels_of

if TYPE_CHECKING:
    from PIL.Image import Image


class Bench(NamedTuple):
    """What `bench` gives: results, and for each row's name the images of ``captions``, ready for `write_report`.

    Of a pipeline that makes videos they are clips: lists of images.
    """

    results: Results
    images: dict[str, list[Image | list[Image]]]
    captions: list[str]


def bench(
    variants: Sequence[Variant],
    generate: Callable[..., Any],
    captions: Sequence[str],
    seeds: int | Sequence[int] = 0,
    *,
    steps: int,
    batch: int = 16,
    judge: Callable[[str, Any], bool] | None = None,
    family: Callable[[str], str] | None = None,
    denoiser: torch.nn.Module | Sequence[torch.nn.Module] | None = None,
    conditions: Mapping[str, Any] | None = None,
    fewer_steps: bool = True,
    flops_captions: int | None = None,
    warmup: int = 0,
    show: int = 8,
    level: float = 0.95,
    progress: bool = True,
    keep_going: bool = False,
) -> Bench:
    """Measure ``variants`` against the uncached pipeline and against fewer steps of equal cost.

    Args:
        variants: see `Variant`. Names that occur twice get a label from the settings that differ.
        generate: ``generate(captions, seeds, steps)`` runs the pipeline on one batch and returns images as `as_images`
            takes them, or videos as `as_videos` does. Image ``i`` must depend on ``captions[i]`` and ``seeds[i]`` only
            (one generator per caption). If it has a parameter ``on_step``, that is None or a function to call with the
            latents ``[N, ...]`` after each step.
        captions: one image is made for each.
        seeds: one per caption, or an int ``s`` for ``s, s + 1, ...``.
        steps: of the uncached pipeline and of the methods.
        batch: captions per run; latencies hold for this batch.
        judge: says whether an image (of a video: the list of its frames) meets its caption; gives the accuracies.
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
        keep_going: leave out a variant whose first run fails, and say why in the conditions' ``left_out``.
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
    families = [family(caption) for caption in captions] if family else None
    denoisers = [denoiser] if isinstance(denoiser, torch.nn.Module) else list(denoiser or ())
    shown = _spread(families or ["all"] * len(captions), show)

    baseline = Entry.plain(steps)
    methods = [
        Entry(variant.name, label, dict(variant.settings), variant.fidelity, variant.attach, steps)
        for variant, label in zip(variants, labels_of(variants), strict=True)
    ]
    counted = min(flops_captions or batch, batch, len(captions))
    with RunBar(enabled=progress) as bar:
        runner = Runner(generate, captions, seeds, batch, counted, denoisers, judge, shown, warmup, bar)
        bar.expect((1 + len(methods)) * (1 + runner.timed_runs))
        reference = runner.count(baseline)
        left_out: dict[str, str] = {}
        for entry in methods:
            try:
                runner.count(entry, reference)
            except MeasureError as error:
                if not keep_going:
                    raise
                left_out[entry.title] = " ".join(str(error.__cause__ or error).split())
        variants = [variant for variant, entry in zip(variants, methods, strict=True) if entry.title not in left_out]
        methods = [entry for entry in methods if entry.title not in left_out]
        _rename(methods, variants)
        line = CostLine.measure(baseline, runner)
        numbers = {entry.title: line.equal_steps(entry.counted_flops) for entry in methods}
        fewer = _fewer_steps(numbers.values()) if fewer_steps else []
        bar.expect(len(fewer) * (1 + runner.timed_runs))
        for entry in fewer:
            runner.count(entry)
        runner.time([baseline, *fewer, *methods])
        numbers = {entry.title: line.equal_steps(line.flops_of(entry)) for entry in methods}
        known = {entry.steps for entry in fewer}
        late = [entry for entry in _fewer_steps(numbers.values()) if entry.steps not in known] if fewer_steps else []
        if late:
            bar.expect(len(late) + (1 + len(late)) * runner.timed_runs)
            for entry in late:
                runner.count(entry)
            runner.time([Entry.plain(steps), *late])
            fewer = sorted([*fewer, *late], key=lambda entry: -entry.steps)

    entries, share = [baseline, *fewer, *methods], share_of_steps(baseline, fewer)
    by_steps = {entry.steps: entry for entry in fewer}
    rows = []
    for entry in entries:
        other = by_steps.get(numbers.get(entry.title) or 0) if entry in methods else None
        rows.append(row_of(entry, baseline, other, line, share, families, level, judged=judge is not None))
    return Bench(
        Results(conditions=_conditions(runner, baseline, level, conditions or {}, left_out), rows=rows),
        {entry.title: [entry.shown[i] for i in shown] for entry in entries},
        [captions[i] for i in shown],
    )


def _rename(entries: Sequence[Entry], variants: Sequence[Variant]) -> None:
    """What ran may be another method than the one asked for: a memory budget asks for what fits."""
    for entry, variant in zip(entries, variants, strict=True):
        if (entry.name, entry.settings) == (variant.name, dict(variant.settings)):
            continue
        asked, entry.name, entry.settings, entry.fidelity = (
            entry.title,
            variant.name,
            dict(variant.settings),
            variant.fidelity,
        )
        entry.label = f"{variant.name} (for {asked})"


def _fewer_steps(numbers: Iterable[int | None]) -> list[Entry]:
    """A row for each number of steps, the most steps first."""
    return [Entry.plain(n, f"fewer-steps-{n}") for n in sorted({n for n in numbers if n}, reverse=True)]


def _conditions(
    runner: Runner, baseline: Entry, level: float, given: Mapping[str, Any], left_out: Mapping[str, str]
) -> Conditions:
    """What the figures hold for: as far as it can be read off, as ``given``, and as it was run."""
    denoiser = runner.denoisers[0] if runner.denoisers else None
    return Conditions(
        **{
            "denoiser": type(denoiser).__name__ if denoiser is not None else "unnamed",
            "dtype": _dtype(denoiser),
            "device": runner.device or "unknown",
            "threads": torch.get_num_threads(),
            "peak_source": baseline.peak_source,
            "flops_scope": "the denoiser's calls" if denoiser is not None else "whole pipeline calls",
            "counted": runner.counted,
            **{key: value for key, value in given.items() if key != "versions"},
            "versions": {**versions(), **given.get("versions", {})},
            "left_out": {**given.get("left_out", {}), **left_out},
            "steps": baseline.steps,
            "resolution": runner.resolution,
            "batch": min(runner.batch, len(runner.captions)),
            "captions": len(runner.captions),
            "seeds": runner.seeds,
            "level": level,
        }
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


def _spread(families: list[str], count: int) -> list[int]:
    """``count`` indices in ascending order, taken from the families in turn."""
    queues = {name: [i for i, family in enumerate(families) if family == name] for name in dict.fromkeys(families)}
    chosen: list[int] = []
    while len(chosen) < min(count, len(families)):
        for queue in queues.values():
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    return sorted(chosen)


def _dtype(denoiser: torch.nn.Module | None) -> str:
    parameter = next(denoiser.parameters(), None) if denoiser is not None else None
    return "unknown" if parameter is None else str(parameter.dtype).removeprefix("torch.")
