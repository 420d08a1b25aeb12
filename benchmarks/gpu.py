"""What full and cached steps take on a denoiser of real size with random weights, eager and compiled.

    python benchmarks/gpu.py                                # FLUX.1-dev, 1024 x 1024, bf16, 28 and 50 steps
    python benchmarks/gpu.py --model qwen-image --steps 28  # another denoiser of cache4diffusion.shapes
    python benchmarks/gpu.py --modes compiled --resume      # goes on with a file, row by row
    python benchmarks/gpu.py --tiny --write out/tiny        # the same class with a few small blocks, on a CPU

Nothing is downloaded. Random weights tell how long a step takes and nothing about when caching is right, so adaptive
methods are given thresholds that accept every score; they look at their scores all the same. *Ideal* is the speed-up
that the FLOPs of the calls in the trace ask for, *achieved* the uncached run's time over this run's. The file is
written anew after every row.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import diffusers
import torch
from torch import nn

import cache4diffusion as c4d
from cache4diffusion.compare import check_methods, parse_method, split_methods
from cache4diffusion.cost import flops_by_module, summarise
from cache4diffusion.engine.leaves import specs_of
from cache4diffusion.files import check_writable, write_whole
from cache4diffusion.handle import Handle
from cache4diffusion.measure import PeakMemory
from cache4diffusion.measure.cost import synchronize
from cache4diffusion.measure.table import size
from cache4diffusion.shapes import SHAPES, Shape, shape
from resume import kept

SCHEMA = 1
MODES = ("eager", "compiled")
METHODS = (
    "taylorseer-lite(interval=5, order=1)",
    "taylorseer(interval=5, order=1)",
    "fora(interval=5)",
    "toca(interval=5)",
    "freqca(interval=5)",
    "magcache(ratios=(1.0, 1.0), max_run=4)",
    "dbcache(threshold=1e9, front=8, warmup=4, max_run=4)",
    "fbcache(threshold=1e9)",
    "teacache(threshold=1e9, coefficients=(1.0, 0.0))",
    "speca(threshold=1e9, decay=1.0, max_run=4)",
)

# What makes each denoiser tiny: few blocks, narrow, with the inputs of the real one.
_NARROW = {"attention_head_dim": 16, "num_attention_heads": 2}
TINY: dict[str, dict[str, Any]] = {
    "flux.1-dev": {**_NARROW, "num_layers": 4, "num_single_layers": 8, "axes_dims_rope": (4, 6, 6)},
    "qwen-image": {**_NARROW, "num_layers": 12, "axes_dims_rope": (4, 6, 6)},
    "wan2.2-t2v-a14b": {**_NARROW, "attention_head_dim": 12, "num_layers": 12, "ffn_dim": 48, "freq_dim": 32},
    "hunyuan-video": {
        **_NARROW,
        "num_layers": 4,
        "num_single_layers": 8,
        "num_refiner_layers": 1,
        "rope_axes_dim": (4, 6, 6),
    },
}
TINY_SIDE, TINY_FRAMES = 64, 5


@dataclass
class Row:
    """One method at one number of steps in one mode; times in milliseconds. What was not measured is None.

    ``full_ms`` and ``cached_ms`` are medians over the steps of all repeats, scheduler's arithmetic included;
    ``run_ms`` is the median of ``runs_ms``.
    """

    method: str
    settings: dict[str, Any]
    fidelity: str
    mode: str
    steps: int
    strip: str = ""
    full_steps: float | None = None
    full_ms: float | None = None
    cached_ms: float | None = None
    run_ms: float | None = None
    runs_ms: list[float] = field(default_factory=list)
    achieved: float | None = None
    ideal: float | None = None
    achieved_over_ideal: float | None = None
    full_flops: int | None = None
    run_flops: float | None = None
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    peak_source: str = ""
    syncs: int | None = None
    notes: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells rows apart."""
        return self.method, json.dumps(self.settings, sort_keys=True), self.mode, self.steps


class Stopwatch:
    """Times of steps without waiting for the device in between."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, []

    def mark(self) -> None:
        """A step begins, or the last one is over."""
        if self.device.type == "cpu":
            self.marks.append(time.perf_counter())
            return
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        self.marks.append(event)

    def steps_ms(self) -> list[float]:
        """Times between marks; waits until the device has come so far."""
        synchronize()
        if self.device.type == "cpu":
            return [1e3 * (b - a) for a, b in pairwise(self.marks)]
        return [a.elapsed_time(b) for a, b in pairwise(self.marks)]


class Sampler:
    """Euler steps of a flow-matching run around a bare denoiser, with guidance where the denoiser is used so.

    Args:
        known: the denoiser's shape.
        denoiser: with weights, on its device.
        calls: arguments of one step's calls, one per CFG branch.
    """

    def __init__(self, known: Shape, denoiser: nn.Module, calls: list[dict[str, Any]], device: torch.device) -> None:
        self.known, self.denoiser, self.device = known, denoiser, device
        generator = torch.Generator(device).manual_seed(0)

        def noise(tensor: torch.Tensor) -> torch.Tensor:
            return torch.randn(tensor.shape, generator=generator, device=device, dtype=tensor.dtype)

        self.latent = noise(calls[0]["hidden_states"])
        texts = ("encoder_hidden_states", "pooled_projections")
        self.calls = [{name: noise(v) if name in texts else v for name, v in call.items()} for call in calls]
        first = {**self.calls[0], "hidden_states": self.latent, "return_dict": False}
        self.flops = flops_by_module(denoiser, *specs_of((), first))[""]  # of one call

    def call(self, index: int, latent: torch.Tensor, sigma: float) -> torch.Tensor:
        """The denoiser in one CFG branch."""
        call = self.calls[index]
        given = {**call, "hidden_states": latent, "timestep": 2 * sigma * call["timestep"]}  # made for sigma 1/2
        return self.denoiser(**given, return_dict=False)[0]

    @torch.no_grad()
    def run(self, steps: int, handle: Handle | None) -> tuple[list[float], float]:
        """Times of the steps, and of the run."""
        levels = [3 * s / (1 + 2 * s) for s in (1 - i / steps for i in range(steps + 1))]  # shifted by 3
        latent, watch = self.latent.clone(), Stopwatch(self.device)
        synchronize()
        begun = time.perf_counter()
        with handle.run(timesteps=levels[:-1]) if handle is not None else contextlib.nullcontext():
            for now, then in pairwise(levels):
                watch.mark()
                velocity = self.call(0, latent, now)
                for other in range(1, len(self.calls)):
                    rest = self.call(other, latent, now)
                    velocity = rest + 3.5 * (velocity - rest)
                latent = (latent.float() + (then - now) * velocity.float()).to(latent.dtype)
            watch.mark()
        synchronize()
        whole = 1e3 * (time.perf_counter() - begun)
        return watch.steps_ms(), whole


def build(known: Shape, tiny: bool, dtype: torch.dtype, device: torch.device) -> Sampler:
    torch.manual_seed(0)
    with torch.device(device):
        denoiser = known.with_weights(dtype, **(TINY[known.name] if tiny else {})).requires_grad_(False)
        small = {"height": TINY_SIDE, "frames": TINY_FRAMES if known.frames > 1 else 1} if tiny else {}
        calls = known.calls(dtype=dtype, **small)
    return Sampler(known, denoiser, calls, device)


def measured(sampler: Sampler, row: Row, handle: Handle | None, repeats: int, uncached_ms: float | None) -> Row:
    """Fill in a row; the denoiser is warm."""
    times: dict[bool, list[float]] = {True: [], False: []}
    with PeakMemory(sampler.device) as peak:
        for _ in range(repeats):
            steps, whole = sampler.run(row.steps, handle)
            row.runs_ms.append(whole)
            strip = "F" * row.steps if handle is None else summarise(handle, with_flops=False).strip
            assert len(strip) == row.steps, f"{len(strip)} steps were told in a run of {row.steps}"
            for letter, took in zip(strip, steps, strict=True):
                times[letter == "F"].append(took)
    row.strip, row.peak_bytes, row.peak_source = strip, peak.bytes, peak.source
    row.run_ms = statistics.median(row.runs_ms)
    row.full_ms = statistics.median(times[True])
    row.cached_ms = statistics.median(times[False]) if times[False] else None
    if handle is None:
        row.full_flops, row.run_flops = sampler.flops, float(row.steps * len(sampler.calls) * sampler.flops)
        row.full_steps, row.achieved, row.ideal, row.cache_bytes, row.syncs = float(row.steps), 1.0, 1.0, 0, 0
    else:
        found = summarise(handle)
        row.full_steps, row.ideal, row.full_flops = found.full_steps, found.predicted, found.full_flops
        row.run_flops, row.cache_bytes = found.run_flops, handle.memory["peak"]
        row.syncs = handle.trace.syncs // len(handle.trace.runs())
        row.notes = [*handle.trace.notes, *found.problems]
        row.achieved = uncached_ms / row.run_ms if uncached_ms is not None else None
    if row.achieved is not None and row.ideal is not None:
        row.achieved_over_ideal = row.achieved / row.ideal
    return row


def rows_of(
    sampler: Sampler, mode: str, all_steps: list[int], methods: list[str], repeats: int, known: list[Row]
) -> Iterator[Row]:
    """The rows of one mode, the uncached ones first; those that are known are not measured again."""
    have, uncached = {row.key for row in known}, {row.steps: row.run_ms for row in known if row.method == "uncached"}
    wanted = [Row("uncached", {}, "baseline", mode, steps) for steps in all_steps]
    if any(row.key not in have for row in wanted):
        sampler.run(min(all_steps), None)
    for row in wanted:
        if row.key not in have:
            yield measured(sampler, row, None, repeats, None)
            uncached[row.steps] = row.run_ms
    for text in methods:
        name, given = parse_method(text)
        chosen = c4d.method(name, **given)
        rows = [Row(name, plain(given), chosen.info.fidelity, mode, steps) for steps in all_steps]
        pending = [row for row in rows if row.key not in have]
        if not pending:
            continue
        try:
            with warnings.catch_warnings(), c4d.accelerate(sampler.denoiser, chosen) as handle:
                warnings.simplefilter("ignore")  # what they say is a note of the row
                sampler.run(min(all_steps), handle)  # learns how the denoiser is built; compiles
                while pending:
                    measured(sampler, pending[0], handle, repeats, uncached[pending[0].steps])
                    yield pending.pop(0)
        except (
            c4d.Cache4DiffusionError,
            RuntimeError,
            NotImplementedError,
        ) as error:  # of this denoiser, or memory
            words = " ".join(str(error).split())
            for row in pending:
                yield Row(
                    name, row.settings, row.fidelity, mode, row.steps, error=f"{type(error).__name__}: {words[:400]}"
                )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(settings))


def conditions_of(sampler: Sampler, options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    known, device = sampler.known, sampler.device
    versions = {
        "cache4diffusion": c4d.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        where = torch.cuda.get_device_properties(device)
        name = f"{where.name}, {where.total_memory / 2**30:.0f} GiB"
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    else:
        name = f"{device.type}, {torch.get_num_threads()} thread(s), {platform.machine()}"
    return {
        "model": known.name,
        "class": known.kind,
        "is_tiny": options.tiny,
        "parameters": sum(parameter.numel() for parameter in sampler.denoiser.parameters()),
        "weights": "random",
        "resolution": TINY_SIDE if options.tiny else known.resolution,
        "frames": (TINY_FRAMES if known.frames > 1 else 1) if options.tiny else known.frames,
        "batch": 1,
        "branches": known.branches,
        "dtype": str(dtype).removeprefix("torch."),
        "device": name,
        "compiled": f"denoiser.compile_repeated_blocks(fullgraph=True, backend={options.backend!r})",
        "repeats": options.repeats,
        "statistic": "medians over repeats, after a run that is not counted",
        "versions": versions,
    }


HEADS = (
    "method", "full steps", "full step ms", "cached step ms", "run ms", "achieved", "ideal", "achieved / ideal",
    "cache", "peak",
)  # fmt: skip


def page(result: dict[str, Any]) -> str:
    """The result as markdown."""
    told = result["conditions"]
    frames = f", {told['frames']} frames" if told["frames"] > 1 else ""
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    lines = [
        f"# {told['model']}: full and cached steps",
        "",
        f"{told['class']} with {told['parameters'] / 1e9:.3g} billion random weights"
        + (" (a tiny one: figures mean nothing)" if told["is_tiny"] else "")
        + f", {told['resolution']} x {told['resolution']} pixels{frames}, batch {told['batch']}, "
        f"{told['branches']} call(s) per step, {told['dtype']}, {told['device']}; {told['repeats']} repeats, "
        f"{told['statistic']}. Compiled is `{told['compiled']}`. {versions}. Written by `benchmarks/gpu.py`.",
        "",
        "*Ideal* is the speed-up that the FLOPs of the calls in the trace ask for, *achieved* the uncached run's time "
        "over this run's. Adaptive methods are given thresholds that accept every score: this is about cost, not about "
        "quality.",
    ]
    groups = dict.fromkeys((row["mode"], row["steps"]) for row in result["rows"])
    for mode, steps in groups:
        lines += [
            "",
            f"## {steps} steps, {mode}",
            "",
            f"| {' | '.join(HEADS)} |",
            "|---|" + "---:|" * (len(HEADS) - 1),
        ]
        rows = [row for row in result["rows"] if (row["mode"], row["steps"]) == (mode, steps)]
        lines += [_line(row) for row in rows]
        width = max(len(row["strip"]) for row in rows)
        lines += ["", "```", *(f"{row['strip']:<{width}}  {_label(row)}" for row in rows if row["strip"]), "```"]
        lines += [f"\n{_label(row)}: {note}" for row in rows for note in row["notes"]]
    return "\n".join(lines) + "\n"


def _label(row: dict[str, Any]) -> str:
    settings = ", ".join(f"{name}={_short(value)}" for name, value in row["settings"].items())
    return f"{row['method']}({settings})" if settings else row["method"]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _line(row: dict[str, Any]) -> str:
    if row["error"] is not None:
        return f"| `{_label(row)}` | {row['error'].replace('|', '/')} |" + " |" * (len(HEADS) - 2)

    def number(name: str, form: str) -> str:
        return "-" if row[name] is None else format(row[name], form)

    cells = [f"`{_label(row)}`", f"{row['full_steps']:g} / {row['steps']}"]
    cells += [number(name, ",.2f") for name in ("full_ms", "cached_ms", "run_ms")]
    cells += [number(name, ".2f") for name in ("achieved", "ideal")] + [number("achieved_over_ideal", ".3f")]
    cells += [size(row["cache_bytes"]), size(row["peak_bytes"])]
    return f"| {' | '.join(cells)} |"


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux.1-dev", help=", ".join(SHAPES))
    parser.add_argument("--steps", help="numbers of steps, comma-separated; 28,50, tiny 8,12")
    parser.add_argument("--modes", default=",".join(MODES), help="eager, compiled, or both")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated, each maybe with (settings)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="bfloat16; tiny: float32")
    parser.add_argument("--device", help="cuda by default, tiny: cpu")
    parser.add_argument("--tiny", action="store_true", help="a few small blocks of the same class")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows of the file that is there, measure the rest"
    )
    parser.add_argument("--write", metavar="STEM", help="STEM.json and STEM.md; docs/benchmarks/gpu-MODEL, tiny: none")
    options = parser.parse_args(arguments)
    options.steps = [int(number) for number in (options.steps or ("8,12" if options.tiny else "28,50")).split(",")]
    options.modes, options.methods = options.modes.split(","), split_methods(options.methods)
    if not set(options.modes) <= set(MODES):
        parser.error(f"--modes {','.join(options.modes)}: use {' or '.join(MODES)}, or both with a comma between")
    if options.model not in SHAPES:
        parser.error(f"--model {options.model}: use one of {', '.join(SHAPES)}")
    if options.repeats < 1 or min(options.steps) < 2:
        parser.error("--repeats must be 1 or more, --steps 2 or more")
    if options.device is None:
        options.device = "cpu" if options.tiny else "cuda"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: use --tiny, which runs on a CPU in seconds")
    if options.write is None and not options.tiny:
        options.write = f"docs/benchmarks/gpu-{options.model}"
    if options.resume and options.write is None:
        parser.error("--resume needs --write: the file to go on with")
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parsed(arguments)
    check_methods(options.methods)
    if options.write is not None:
        check_writable(f"{options.write}.json")
    dtype = getattr(torch, options.dtype or ("float32" if options.tiny else "bfloat16"))
    sampler = build(shape(options.model), options.tiny, dtype, torch.device(options.device))
    conditions = conditions_of(sampler, options, dtype)
    known = kept(options.write, SCHEMA, conditions) if options.resume else []
    rows = [Row(**row) for row in known if row["error"] is None]
    result = {"schema": SCHEMA, "conditions": conditions, "rows": [asdict(row) for row in rows]}
    for mode in sorted(options.modes, key=MODES.index):
        if mode == "compiled":  # the eager rows are behind us: it stays compiled
            sampler.denoiser.compile_repeated_blocks(fullgraph=True, backend=options.backend)
        of_mode = [row for row in rows if row.mode == mode]
        for row in rows_of(sampler, mode, options.steps, options.methods, options.repeats, of_mode):
            result["rows"].append(asdict(row))
            told = row.error or f"{row.run_ms:,.1f} ms"
            print(f"{mode}, {row.steps} steps, {row.method}: {told}", file=sys.stderr)
            if options.write is not None:
                write_whole(f"{options.write}.json", json.dumps(result, indent=1) + "\n")
    text = page(result)
    if options.write is not None:
        write_whole(f"{options.write}.md", text)
    print(text)
    return result


if __name__ == "__main__":
    main()
