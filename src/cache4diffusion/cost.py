"""What the newest run of a handle cost, and what it would have cost without caching.

FLOPs are counted when they are asked for, not while sampling: the denoiser's plain forward is run once under fake
tensors in the shapes of the run's first call, with a count per module; a cached step is that without the modules that
rest. No wrapper runs, and nothing is computed; but a denoiser that asks where its masks are true is run on zeros, with
masks that are true everywhere.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from cache4diffusion.anatomy.observing import Stage
from cache4diffusion.anatomy.undisturbed import unwrapped
from cache4diffusion.engine.leaves import Spec
from cache4diffusion.flops import missing_formulas
from cache4diffusion.trace import CACHED, FULL, HALF, MIXED, PARTIAL, REDUCED, Record
from cache4diffusion.units import size_text

if TYPE_CHECKING:
    from cache4diffusion.engine import Engine
    from cache4diffusion.handle import Handle

# Per denoiser: the shapes counted last, and FLOPs by module path ("" is the whole).
_COUNTED: weakref.WeakKeyDictionary[nn.Module, tuple[Any, dict[str, int]]] = weakref.WeakKeyDictionary()


class CountError(Exception):
    """The denoiser's forward could not be run on tensors without values."""


def flops_by_module(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    """FLOPs of one plain call, by module path; ``""`` is the whole denoiser, each module includes what is in it.

    Args:
        denoiser: the network.
        args, kwargs: of a call, with a `Spec` for every tensor.

    Raises:
        CountError: its forward reads the values of tensors.
    """
    denoiser = unwrapped(denoiser)
    key = (repr((args, kwargs)), sum(1 for _ in denoiser.modules()))
    known = _COUNTED.get(denoiser)
    if known is not None and known[0] == key:
        return known[1]
    empty = pytree.tree_map_only(Spec, lambda s: torch.empty(0, dtype=s.dtype, device=s.device), (args, kwargs))
    problems = []
    modes: list[Literal["fake", "fake_state", "real"]] = ["fake", "fake_state"]
    for mode in modes:  # which may grow
        stage, counts = Stage(denoiser, *empty, mode=mode), Counter[str]()
        counter = FlopCounterMode(display=False, custom_mapping=missing_formulas())

        def observer(
            path: str,
            forward: Any,
            args: Any,
            kwargs: Any,
            counter: FlopCounterMode = counter,
            counts: Counter[str] = counts,
        ) -> Any:
            begun = counter.get_total_flops()
            try:
                return forward(*args, **kwargs)
            finally:
                counts[path] += counter.get_total_flops() - begun

        try:
            with stage.active(observer):
                given = pytree.tree_map_only(Spec, _stand_in, (args, kwargs))
                with counter:
                    denoiser(*given[0], **given[1])
        except Exception as error:  # the host's own code may raise anything
            problems.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            if isinstance(error, DynamicOutputShapeException) and "real" not in modes:
                modes.append("real")
            continue
        _COUNTED[denoiser] = (key, dict(counts))
        return _COUNTED[denoiser][1]
    raise CountError(problems[0])


def _stand_in(spec: Spec) -> torch.Tensor:
    """A tensor of this kind: zeros, or a mask that is true everywhere (integers may be one, or times)."""
    return torch.full(spec.shape, float(not spec.dtype.is_floating_point), dtype=spec.dtype, device=spec.device)


@dataclass(frozen=True)
class StepCost:
    """FLOPs of one call of a denoiser with all rows of the batch.

    Args:
        full: everything runs.
        cached: what still runs when the method predicts.
        verification: of computing the last block to check a prediction.
        table: of every module, by path.
        corrections: of what a corrector computes in place of a module, by path.
        reduced: of a part on fewer tokens, by its path, the tokens that enter it, and the tokens there are.
    """

    full: int
    cached: int
    verification: int
    table: dict[str, int] = field(default_factory=dict)
    corrections: dict[str, int] = field(default_factory=dict)
    reduced: dict[tuple[str, int, int], int] = field(default_factory=dict)

    def of(self, record: Record) -> float:
        """FLOPs of a recorded call."""
        share = 0.5 if record.symbol == HALF or record.reason.endswith("one branch only") else 1.0
        if record.symbol == CACHED and record.reason.startswith("predicted from"):
            return 0.0
        if record.symbol in (FULL, HALF):
            return share * self.full + (record.reduced.planning if record.reduced is not None else 0)
        if record.reduced is not None or record.rested is not None:
            rested, planning = record.rested or (), 0
            paths = outermost([path for path, _ in rested])
            saved = sum(rows * self.table.get(path, 0) for path, rows in rested if path in paths)
            saved -= sum(rows * self.corrections.get(path, 0) for path, rows in rested)
            if record.reduced is not None:  # parts that ran: none of them lies in what rested
                saved += sum(self.table.get(key[0], 0) - self.reduced[key] for key in record.reduced.parts)
                saved, planning = saved + record.reduced.saved, record.reduced.planning
            return share * (self.full - saved) + planning
        predicted = 1.0
        if record.symbol == MIXED and record.rows:
            predicted = sum(record.rows) / len(record.rows)
        checks = self.verification if record.is_verified else 0
        return share * ((1 - predicted) * self.full + predicted * (self.cached + checks))


def step_cost(engine: Engine) -> StepCost:
    """What full and cached calls of a denoiser cost in the shapes of the newest run.

    Raises:
        CountError: there was no run, or nothing can be counted.
    """
    if engine.call_specs is None:
        raise CountError("it was not called yet")
    table = flops_by_module(engine.denoiser, *engine.call_specs)
    full = table[""]
    paths = engine.attachment.bypassed
    watch = engine.gate.watch if engine.gate is not None else None
    if paths == [""] and watch is not None and watch.is_inside:  # what comes before the decision still runs
        paths = [view.path for view in engine.host.blocks[engine.host.watched_blocks :]]
    resting = outermost(paths)
    corrections = engine.driver.corrections if engine.driver is not None else {}
    cached = full - sum(table.get(path, 0) for path in resting) + sum(corrections.get(path, 0) for path in paths)
    last = table.get(engine.host.blocks[-1].path, 0) if engine.host.blocks else 0
    specs: dict[tuple[str, int, int], Any] = getattr(engine.driver, "specs", {})
    reduced = {
        key: flops_by_module(engine.host.plain.get_submodule(key[0]), *given)[""] for key, given in specs.items()
    }
    return StepCost(full, cached, last, table, corrections, reduced)


def outermost(paths: list[str]) -> list[str]:
    """The paths that lie in none of the others."""
    known = set(paths)
    if "" in known:
        return [""]

    def is_inside(path: str) -> bool:
        pieces = path.split(".")
        return any(".".join(pieces[:i]) in known for i in range(1, len(pieces)))

    return [path for path in dict.fromkeys(paths) if not is_inside(path)]


@dataclass
class Summary:
    """The newest run in numbers. FLOPs and speed-ups are of the denoisers' calls; None where they are not known.

    Args:
        strip: one letter per step; where branches differ, ``h`` for "some computed, some predicted".
        strips: per denoiser and branch, one letter per call.
        full_steps: number of full steps; a mean over branches and rows where they differ.
        full_ms, cached_ms: median time of a full and of a cached call.
        total_ms: of all calls.
        full_flops, cached_flops: of one call of the first denoiser.
        run_flops: of all calls.
        predicted: all calls full over the calls as they were, in FLOPs.
        achieved: the same in time, a full call taken at its median.
        overhead_ms: time beyond what the FLOPs ask for, at the full calls' rate.
        problems: why figures are missing.
    """

    strip: str = ""
    strips: dict[str, str] = field(default_factory=dict)
    full_steps: float = 0.0
    total_steps: int = 0
    full_ms: float | None = None
    cached_ms: float | None = None
    total_ms: float = 0.0
    full_flops: int | None = None
    cached_flops: int | None = None
    run_flops: float | None = None
    predicted: float | None = None
    achieved: float | None = None
    overhead_ms: float | None = None
    problems: list[str] = field(default_factory=list)


def summarise(handle: Handle, *, with_flops: bool = True) -> Summary:
    """Figures of the newest run."""
    for engine in handle._engines:
        engine.timer.settle()
    records = handle.trace.of()
    found = Summary(strips=strips_of(records), strip=merged_strip(records))
    found.total_steps = len(found.strip)
    found.full_steps = full_steps(records)
    cached_letters = CACHED + PARTIAL + HALF + REDUCED
    full = sorted(r.wall_ms for r in records if r.symbol == FULL and r.wall_ms is not None)
    cached = sorted(r.wall_ms for r in records if r.symbol in cached_letters and r.wall_ms is not None)
    found.full_ms = full[len(full) // 2] if full else None
    found.cached_ms = cached[len(cached) // 2] if cached else None
    found.total_ms = sum(record.wall_ms or 0.0 for record in records)
    if full and found.total_ms:
        found.achieved = len(records) * full[len(full) // 2] / found.total_ms
    if not (with_flops and records):
        _say_if_copies_cost_more(handle, records, found)
        return found
    costs: dict[str, StepCost] = {}
    for engine in handle._engines:
        if any(record.denoiser == engine.name for record in records):
            try:
                costs[engine.name] = step_cost(engine)
            except CountError as error:
                found.problems.append(f"FLOPs of {engine.name} could not be counted ({error})")
                _say_if_copies_cost_more(handle, records, found)
                return found
    first = costs[records[0].denoiser]
    found.full_flops = first.full
    predicting = next((record for record in records if record.symbol in cached_letters), None)
    found.cached_flops = int(costs[predicting.denoiser].of(predicting)) if predicting is not None else None
    found.run_flops = sum(costs[record.denoiser].of(record) for record in records)
    uncached = sum(costs[record.denoiser].full for record in records)
    found.predicted = uncached / found.run_flops if found.run_flops else None
    if found.full_ms is not None and uncached:
        rate = len(records) * found.full_ms / uncached
        found.overhead_ms = found.total_ms - rate * found.run_flops
    _say_if_copies_cost_more(handle, records, found)
    return found


def _say_if_copies_cost_more(handle: Handle, records: list[Record], found: Summary) -> None:
    """Warn where bringing snapshots back took longer than computing would have."""
    spent = sum(copies.ms for engine in handle._engines for copies in engine.host.store.engines)
    if not spent or found.full_ms is None:
        return
    share = sum(record.symbol != FULL for record in records) / len(records)
    if found.predicted is not None:
        share = 1 - 1 / found.predicted
    saved = found.full_ms * len(records) * share
    if spent > saved:
        found.problems.append(
            f"copies to and from {handle.options.storage.device} took {spent:,.1f} ms, and what was not computed would "
            f"have taken {saved:,.1f} ms: without cache_device, or with fewer snapshots or a smaller cache_dtype, the "
            "same method is faster."
        )


def strips_of(records: list[Record]) -> dict[str, str]:
    """Letters of the calls, per denoiser and branch."""
    strips: dict[str, str] = {}
    for record in records:
        key = f"{record.denoiser}/{record.branch}"
        strips[key] = strips.get(key, "") + record.symbol
    return strips


def merged_strip(records: list[Record]) -> str:
    """One letter per step: that of all its calls, or ``m`` / ``h`` where they differ."""
    steps: dict[int, set[str]] = {}
    for record in records:
        steps.setdefault(record.step, set()).add(record.symbol)
    letters = []
    for step in sorted(steps):
        seen = steps[step]
        if len(seen) == 1:
            letters.append(next(iter(seen)))
        elif MIXED in seen:
            letters.append(MIXED)
        else:
            letters.append(PARTIAL if seen == {CACHED, PARTIAL} else HALF)
    return "".join(letters)


def full_steps(records: list[Record]) -> float:
    """Number of full steps: per step the share of its calls, and of their rows, that were computed."""
    shares: dict[int, list[float]] = {}
    for record in records:
        share = {FULL: 1.0, HALF: 0.5}.get(record.symbol, 0.0)
        if record.symbol == MIXED and record.cached is not None:
            share = 1 - record.cached
        shares.setdefault(record.step, []).append(share)
    total = sum(sum(several) / len(several) for several in shares.values())
    return float(round(total, 6))


def report_lines(handle: Handle) -> list[str]:
    """What ``handle.report()`` prints."""
    found = summarise(handle)
    names = ", ".join(dict.fromkeys(type(unwrapped(engine.denoiser)).__name__ for engine in handle._engines))
    lines = [f"{handle.label} on {names}"]
    if not found.total_steps:
        return [*lines, "no run yet: sample, then ask again"]
    if len(set(found.strips.values())) == 1:
        lines.append(_row("strip", found.strip + (f"  ({', '.join(found.strips)})" if len(found.strips) > 1 else "")))
    else:
        lines += [_row("strip", f"{strip}  ({name})") for name, strip in found.strips.items()]
    share = found.full_steps / found.total_steps
    lines.append(_row("steps", f"{found.full_steps:g} of {found.total_steps} full ({share:.0%})"))
    lines.append(_row("time", _times(found)))
    if found.full_flops is not None:
        text = f"{_flops(found.full_flops)} per full call"
        if found.cached_flops is not None:
            text += (
                f", {_flops(found.cached_flops)} ({found.cached_flops / max(found.full_flops, 1):.2%}) per cached one"
            )
        lines.append(_row("FLOPs", text))
    memory, places = handle.memory, handle.memory_by_place
    lines.append(_row("cache", f"{size_text(memory['held'])} held now, {size_text(memory['peak'])} at its largest"))
    if not handle.options.storage.is_plain and places:
        parts = [f"{size_text(count)} {place.replace(' ', ' as ')}" for place, count in sorted(places.items())]
        lines.append(_row("kept", f"{', '.join(parts)} ({handle.options.storage})"))
    copied = sum(copies.bytes for engine in handle._engines for copies in engine.host.store.engines)
    if copied:
        lines.append(_row("copies", f"{size_text(copied)} to and from {handle.options.storage.device} in this run"))
    if found.predicted is not None or found.achieved is not None:
        predicted = f"{found.predicted:.2f}x expected from FLOPs" if found.predicted else "expectation unknown"
        achieved = f"{found.achieved:.2f}x achieved in time" if found.achieved else "time not measured (no full step)"
        lines.append(_row("speed-up", f"{predicted}, {achieved} (of the denoiser's calls)"))
    if found.overhead_ms is not None:
        where = found.overhead_ms / found.total_ms
        lines.append(
            _row("the rest", f"{found.overhead_ms:,.1f} ms ({where:.1%} of the time) beyond what the FLOPs ask for")
        )
    lines.append(_row("syncs", f"{handle.trace.syncs} transfers to the host for decisions, since accelerate()"))
    lines.append(_row("run", _source(handle)))
    counts = [f"{count} x {text}, since accelerate()" for text, count in handle.trace.counts.items()]
    lines += [_row("note", note) for note in [*handle.trace.notes, *counts, *found.problems]]
    if not set(found.strip) - {FULL}:
        lines.append(_row("warning", _nothing_cached(handle, found)))
    return lines


def _row(name: str, text: str) -> str:
    return f"{name:<9} {text}"


def _times(found: Summary) -> str:
    if found.full_ms is None:
        return f"{found.total_ms:,.1f} ms in the denoiser"
    text = f"{found.full_ms:,.2f} ms per full call"
    if found.cached_ms is not None:
        text += f", {found.cached_ms:,.2f} ms ({found.cached_ms / found.full_ms:.2%}) per cached one"
    return f"{text}, {found.total_ms:,.1f} ms in all"


def _source(handle: Handle) -> str:
    run = handle._run
    words = {
        "pipeline": "announced by the pipeline",
        "scheduler": "announced by the scheduler",
        "explicit": "given by handle.run()",
    }
    if run is None or run.source == "timesteps":
        return "run inferred from timesteps; `with handle.run(timesteps=...)` around the loop leaves nothing to infer"
    return words[run.source]


def _nothing_cached(handle: Handle, found: Summary) -> str:
    reasons = Counter(record.reason for record in handle.trace.of())
    words = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3) if reason)
    off = " These settings are the method's off settings." if handle.method and handle.method.is_off() else ""
    return f"0 of {found.total_steps} steps were cached. Reasons to compute: {words or 'none recorded'}.{off}"


def _flops(count: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}FLOP"
    return f"{count:.0f} FLOP"
