"""The same methods on every architecture: full steps as expected, a state per branch, and what is won on a CPU.

    PYTHONPATH=tests python benchmarks/architectures.py               # all: docs/benchmarks/architectures.json, .md
    PYTHONPATH=tests python benchmarks/architectures.py --cases flux,sd --write out/architectures
    PYTHONPATH=tests python benchmarks/architectures.py --resume      # goes on with a file, case by case

Each architecture is a stock pipeline with random weights: text encoders and autoencoder in miniature, the denoiser wide
and long enough that computing takes the time, and not Python. Uncached runs and runs of every method take turns, so
that other work on the machine meets all of them; a speed-up is the median over the turns of one over the other.
Expected full steps are worked out here, by each method's published rule. The exit code is 1 if one is not as expected.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import cache4diffusion as c4d
from cache4diffusion.anatomy import Anatomy, observe
from cache4diffusion.cost import strips_of
from cache4diffusion.files import check_writable, write_whole
from cache4diffusion.flops import FlopCounter
from cache4diffusion.measure.bench import versions
from cache4diffusion.trace import FULL, Record
from pipelines.case import Case, denoisers
from pipelines.cases import CASES
from pipelines.parts import build
from resume import kept

SCHEMA = 1
STEPS = 12
TURNS = 2


# --- architectures ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wide:
    """A case of tests/pipelines with a denoiser in which computing takes the time.

    Args:
        title: what it is called.
        case: its name there.
        config: what changes in the denoiser's configuration.
        call: what changes in the pipeline's call.
    """

    title: str
    case: str
    config: dict[str, Any]
    call: dict[str, Any] = field(default_factory=dict)


def _square(side: int, **more: Any) -> dict[str, Any]:
    return {"height": side, "width": side, **more}


HEADS = {"num_attention_heads": 4, "attention_head_dim": 64}
EIGHT = {**HEADS, "num_layers": 8}
JOINT = {**HEADS, "num_layers": 3, "num_single_layers": 6}
THREE = ("CrossAttnDownBlock{}", "CrossAttnDownBlock{}", "DownBlock{}")


def _levels(words: str, down: tuple[str, ...] = THREE) -> dict[str, Any]:
    ups = tuple(name.replace("Down", "Up") for name in reversed(down))
    return {
        "block_out_channels": (64, 128, 128),
        "layers_per_block": 2,
        "down_block_types": tuple(name.format(words) for name in down),
        "up_block_types": tuple(name.format(words) for name in ups),
        "sample_size": 24,
    }


TRANSFORMERS = (
    Wide("FLUX", "flux", {**JOINT, "axes_dims_rope": (16, 24, 24)}, _square(48)),
    Wide("Qwen-Image", "qwen-image", {**EIGHT, "axes_dims_rope": (16, 24, 24)}, _square(96)),
    Wide("HunyuanImage-2.1", "hunyuan-image", {**JOINT, "rope_axes_dim": (32, 32)}, _square(48)),
    Wide("HunyuanVideo", "hunyuan-video", {**JOINT, "rope_axes_dim": (16, 24, 24)}, _square(48, num_frames=13)),
    Wide("Wan 2.2, both experts", "wan2.2", {**EIGHT, "ffn_dim": 1024}, _square(96, num_frames=13)),
    Wide("Stable Diffusion 3", "sd3", {**EIGHT, "caption_projection_dim": 256, "sample_size": 24}, _square(48)),
    Wide("PixArt", "pixart", {**EIGHT, "cross_attention_dim": 256, "sample_size": 24}, _square(48)),
    Wide("DiT", "dit", {**EIGHT, "sample_size": 24}),
    Wide(
        "CogVideoX",
        "cogvideox",
        {**EIGHT, "time_embed_dim": 64, "sample_width": 12, "sample_height": 12, "sample_frames": 13},
        _square(96, num_frames=13),
    ),
    Wide("LTX-Video", "ltx", {**EIGHT, "cross_attention_dim": 256}, {"num_frames": 9}),
    Wide("Mochi", "mochi", {**EIGHT, "pooled_projection_dim": 128}, _square(96, num_frames=19)),
    Wide(
        "Z-Image",
        "z-image",
        {"dim": 256, "n_layers": 8, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [16, 24, 24]},
        _square(48),
    ),
    Wide("Stable Audio", "stable-audio", {**EIGHT, "num_key_value_attention_heads": 2, "sample_size": 128}),
)
UNETS = (
    Wide("Stable Diffusion", "sd", {**_levels("2D"), "norm_num_groups": 16, "attention_head_dim": 4}, _square(48)),
    Wide(
        "SDXL",
        "sdxl",
        {
            **_levels("2D", (THREE[2], *THREE[:2])),
            "norm_num_groups": 16,
            "attention_head_dim": 4,
            "transformer_layers_per_block": (1, 2, 4),
        },
        _square(48),
    ),
    Wide(
        "Stable Video Diffusion",
        "svd",
        {**_levels("SpatioTemporal"), "num_attention_heads": 4},
        _square(48),
    ),
)


def case_of(wide: Wide, is_small: bool = False) -> Case:
    """The case with its wide denoisers; ``is_small``: as it is, for all that is not speed."""
    known = CASES[wide.case]

    def make() -> Any:
        pipe = known.make()
        for seed, (name, denoiser) in enumerate(denoisers(pipe).items()):
            config = {key: value for key, value in denoiser.config.items() if not key.startswith("_")}
            setattr(pipe, name, build(type(denoiser), seed, **{**config, **wide.config}))
        return pipe

    def call() -> dict[str, Any]:
        return {**known.call(), **wide.call}

    changes = {} if is_small else {"make": make, "call": call}
    return Case(**{**vars(known), **changes, "steps": STEPS})


# --- methods ----------------------------------------------------------------------------------------------------------


def every(interval: int) -> Callable[[int], bool]:
    """Full at the first step and at every ``interval``-th from there."""
    return lambda step: step % interval == 0


def taylor(interval: int, warmup: int) -> Callable[[int], bool]:
    """Full for ``warmup`` steps, and at every ``interval``-th from the last of them."""
    return lambda step: step < warmup or (step - warmup + 1) % interval == 0


@dataclass(frozen=True)
class Tried:
    """A method: with a schedule, or with a threshold, which is set between the scores that are met.

    Args:
        name: of the method.
        settings: of it.
        is_full: the schedule; None for a method that compares a score with ``threshold``.
        forced: how many steps at the beginning and at the end are full whatever the score.
        quantum: the threshold, in median scores between two steps.
        adds_up: whether scores count from one step to the next, and are summed up from full step to full step.
    """

    name: str
    settings: dict[str, Any]
    is_full: Callable[[int], bool] | None = None
    forced: tuple[int, int] = (0, 0)
    quantum: float = 1.25
    adds_up: bool = False


METHODS = (
    Tried("taylorseer", {"interval": 4, "warmup": 3}, taylor(4, 3)),
    Tried("taylorseer-lite", {"interval": 4, "warmup": 3}, taylor(4, 3)),
    Tried("dbcache", {"front": 1, "warmup": 3}, forced=(3, 0)),
    Tried("teacache", {"warmup": 1, "cooldown": 1}, forced=(1, 1), quantum=2.5, adds_up=True),
)
OF_UNETS = (Tried("deepcache", {"interval": 4}, every(4)),)


@dataclass
class Subject:
    """A pipeline whose denoisers were looked at once.

    Args:
        case: of which it is the pipeline.
        pipe: the pipeline.
        calls: the first call of each denoiser.
        anatomies: how each is built.
        flops: of the denoisers' calls in an uncached run.
    """

    case: Case
    pipe: Any
    calls: dict[str, Any]
    anatomies: dict[str, Anatomy]
    flops: int

    @classmethod
    def of(cls, case: Case) -> Subject:
        """Sample once, uncached, and look."""
        pipe, calls, hooks = case.pipe(), {}, []
        found = denoisers(pipe)
        for name, denoiser in found.items():

            def note(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                calls.setdefault(name, (args, kwargs))

            hooks.append(denoiser.register_forward_pre_hook(note, with_kwargs=True))
        with FlopCounter(list(found.values())) as counter:
            case.sample(pipe)
        for hook in hooks:
            hook.remove()
        anatomies = {name: observe(found[name], *call) for name, call in calls.items()}
        return cls(case, pipe, calls, anatomies, counter.module_total)

    @contextmanager
    def accelerated(self, method: str, settings: dict[str, Any]) -> Iterator[c4d.Handle]:
        """Within: attached, as after `Handle.prepare`, so that no run pays for looking."""
        with c4d.accelerate(self.pipe, method, **settings) as handle:
            for engine in handle._engines:
                if engine.attachment.needs_anatomy:
                    engine.prepare(*self.calls[engine.name], anatomy=self.anatomies[engine.name])
            yield handle

    def sample(self) -> Tensor:
        """One run."""
        return self.case.sample(self.pipe)

    def timed(self) -> tuple[float, float]:
        """Seconds of a run, by the wall and of the processor."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.sample()
        return time.perf_counter() - wall, time.process_time() - cpu


def threshold_for(subject: Subject, tried: Tried) -> float:
    """A threshold that some scores stay below: a multiple of the median change between two steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is cached, as is meant
        with subject.accelerated(tried.name, {**tried.settings, "threshold": 1e-12}) as handle:
            subject.sample()
            scores = [score for record in handle.trace.of() for score in record.scores if score is not None]
    if not scores:
        raise SystemExit(f"{subject.case.name}: {tried.name} met no score in {STEPS} steps")
    return tried.quantum * statistics.median(scores)


def faults(tried: Tried, records: list[Record], threshold: float | None) -> list[str]:
    """What is not as the method's rule has it, call by call. What no state was kept for yet is full in any case."""
    wrong: list[str] = []
    sums: dict[tuple[str, str], float] = {}
    for record in records:
        place = (record.denoiser, record.branch)
        where = f"step {record.step} of {record.denoiser}, {record.branch}"
        is_first, is_full = place not in sums, record.symbol == FULL
        score = next(iter(record.scores), None)
        change = (sums.get(place, 0.0) if tried.adds_up else 0.0) + (score or 0.0)
        if tried.is_full is not None:
            expected = is_first or tried.is_full(record.step)
        elif is_first or record.step < tried.forced[0] or record.step >= STEPS - tried.forced[1]:
            expected = True
        else:
            expected = score is None or change >= threshold
        sums[place] = 0.0 if is_full else change
        if expected != is_full:
            wrong.append(f"{where} is {'full' if is_full else 'cached'} and should not be ({record.scores})")
    return wrong


# --- runs -------------------------------------------------------------------------------------------------------------


class States:
    """What is held for every branch of every denoiser in a run, looked at after each call: bytes, and whose they are.

    Args:
        handle: of an accelerated pipeline or denoiser.
    """

    def __init__(self, handle: c4d.Handle) -> None:
        self.bytes: dict[str, int] = {}
        self.shared: set[str] = set()
        self._engines = handle._engines

    def look(self) -> None:
        """Look now, in the middle of a run."""
        for engine in self._engines:
            owner: dict[int, str] = {}
            for (_, branch), state in engine._states.items():
                name, storages = f"{engine.name}/{branch}", {}
                for tensor in engine.tensors_of(state):
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                self.bytes[name] = max(self.bytes.get(name, 0), sum(storages.values()))
                self.shared |= {f"{owner[address]} and {name}" for address in storages if address in owner}
                owner |= dict.fromkeys(storages, name)


@contextmanager
def at_every_step(pipe: Any, look: Callable[[], None]) -> Iterator[None]:
    """Call something before every step of the scheduler, in the middle of a run."""
    scheduler, step, found = pipe.scheduler, pipe.scheduler.step, vars(pipe.scheduler).get("step")

    @functools.wraps(step)  # pipelines look at its signature
    def stepped(*args: Any, **kwargs: Any) -> Any:
        look()
        return step(*args, **kwargs)

    scheduler.step = stepped
    try:
        yield
    finally:
        del scheduler.step
        if found is not None:
            scheduler.step = found


def checked(subject: Subject, tried: Tried) -> dict[str, Any]:
    """One run of one method: what it did, what it held, and what it should have done."""
    settings, threshold = dict(tried.settings), None
    if tried.is_full is None:
        threshold = settings["threshold"] = threshold_for(subject, tried)
    with subject.accelerated(tried.name, settings) as handle:
        states, counter = States(handle), FlopCounter(list(denoisers(subject.pipe).values()))
        with at_every_step(subject.pipe, states.look), counter:
            output = subject.sample()
        records, held = handle.trace.of(), handle.memory["held"]
    wrong = faults(tried, records, threshold)
    wrong += [f"{names} share a tensor" for names in sorted(states.shared)]
    wrong += [f"{held} bytes are held after the run"] if held else []
    wrong += [] if bool(torch.isfinite(output).all()) else ["the result is not finite"]
    missing = {f"{record.denoiser}/{record.branch}" for record in records} - states.bytes.keys()
    wrong += [f"{name} has no state" for name in sorted(missing)]
    symbols = {record.symbol for record in records}
    wrong += [] if len(symbols) > 1 else [f"all calls are {symbols}"]
    return {
        "method": tried.name,
        "settings": settings,
        "strips": strips_of(records),
        "steps": steps_by_branch(records),
        "full": sum(record.symbol == FULL for record in records),
        "calls": len(records),
        "states": states.bytes,
        "flops": counter.module_total,
        "ideal": round(subject.flops / counter.module_total, 3),
        "uncounted": counter.uncounted,
        "wrong": wrong,
    }


def steps_by_branch(records: list[Record]) -> dict[str, list[int]]:
    """Numbers of the full steps."""
    found: dict[str, list[int]] = {}
    for record in records:
        steps = found.setdefault(f"{record.denoiser}/{record.branch}", [])
        if record.symbol == FULL:
            steps.append(record.step)
    return found


def measure(subject: Subject, rows: list[dict[str, Any]], turns: int) -> None:
    """Fill in how much faster each method is: uncached and cached runs take turns."""
    found: dict[int, list[tuple[float, float]]] = {}
    for _ in range(turns):
        plain = subject.timed()
        for number, row in enumerate(rows):
            with subject.accelerated(row["method"], row["settings"]):
                cached = subject.timed()
            found.setdefault(number, []).append((plain[0] / cached[0], plain[1] / cached[1]))
            row["uncached_s"] = round(min(row.get("uncached_s", plain[0]), plain[0]), 3)
            row["cached_s"] = round(min(row.get("cached_s", cached[0]), cached[0]), 3)
    for number, ratios in found.items():
        rows[number]["latency"] = round(statistics.median(wall for wall, _ in ratios), 3)
        rows[number]["cpu"] = round(statistics.median(cpu for _, cpu in ratios), 3)


# --- both branches apart ----------------------------------------------------------------------------------------------


def in_two_calls(subject: Subject, tried: Tried) -> dict[str, Any]:
    """A guided run's denoiser calls again, as they were and each in two: both give the same, from two states.

    Args:
        subject: whose guidance puts both branches into one batch.
        tried: the method.
    """
    (name, denoiser), calls = next(iter(denoisers(subject.pipe).items())), []
    hook = denoiser.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True)
    subject.sample()
    hook.remove()
    together, _, _ = _replayed(denoiser, calls, tried, 1)
    apart, strips, states = _replayed(denoiser, calls, tried, 2)
    scale = max(float(output.abs().max()) for output in together)
    off = max(float((a - b).abs().max()) / scale for a, b in zip(together, apart, strict=True))
    wrong = [f"in two calls a result is off by {off:.1e}"] if off > 1e-4 else []
    wrong += [f"{names} share a tensor" for names in sorted(states.shared)]
    wrong += [] if len(states.bytes) == 2 else [f"two branches have {len(states.bytes)} states"]
    wrong += [] if len(set(strips.values())) == 1 else ["two branches differ in their full steps"]
    return {"denoiser": name, "off": off, "states": states.bytes, "strips": strips, "wrong": wrong}


@torch.no_grad()
def _replayed(
    denoiser: nn.Module, calls: list[Any], tried: Tried, pieces: int
) -> tuple[list[Tensor], dict[str, str], States]:
    """The denoiser called anew, each time in as many pieces of the batch."""
    outputs = []
    with c4d.accelerate(denoiser, tried.name, **tried.settings) as handle:
        states = States(handle)
        with handle.run(num_steps=len(calls)):
            for args, kwargs in calls:
                batch = args[0].shape[0]
                several = [
                    denoiser(*_rows((args, kwargs), rows, batch)[0], **_rows((args, kwargs), rows, batch)[1])[0]
                    for rows in torch.arange(batch).chunk(pieces)
                ]
                states.look()
                outputs.append(torch.cat(several))
        return outputs, strips_of(handle.trace.of()), states


def _rows(tree: Any, rows: Tensor, batch: int) -> Any:
    """Some rows of everything that has as many as the batch."""
    if isinstance(tree, Tensor):
        return tree[rows] if tree.ndim and tree.shape[0] == batch else tree
    if isinstance(tree, dict):
        return {key: _rows(value, rows, batch) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_rows(value, rows, batch) for value in tree)
    return tree


def rows_of(wide: Wide, *, is_small: bool = False, turns: int = TURNS) -> list[dict[str, Any]]:
    """All methods on one architecture; ``turns=0`` measures nothing."""
    subject = Subject.of(case_of(wide, is_small))
    tried = OF_UNETS if wide in UNETS else METHODS
    rows = [checked(subject, each) for each in tried]
    facts = {
        "title": wide.title,
        "case": wide.case,
        "pipeline": type(subject.pipe).__name__,
        "guidance": subject.case.guidance,
        "uncached_flops": subject.flops,
        "denoisers": {
            name: {"class": type(module).__name__, "parameters": sum(p.numel() for p in module.parameters())}
            for name, module in denoisers(subject.pipe).items()
        },
    }
    if turns:
        measure(subject, rows, turns)
    if wide in UNETS:
        for row, each in zip(rows, tried, strict=True):
            row["two_calls"] = in_two_calls(subject, each)
            row["wrong"] += row["two_calls"].pop("wrong")
    return [facts | row for row in rows]


# --- the file ---------------------------------------------------------------------------------------------------------


def conditions() -> dict[str, Any]:
    return {
        "steps": STEPS,
        "turns": TURNS,
        "device": f"cpu, {torch.get_num_threads()} thread(s), {platform.machine()}, shared with other work",
        "dtype": "float32",
        "batch": 1,
        "weights": "random",
        "versions": versions(),
    }


def page(result: dict[str, Any]) -> str:
    """The result as markdown."""
    told, rows = result["conditions"], result["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    titles = list(dict.fromkeys(row["title"] for row in rows))
    wrong = [(row, words) for row in rows for words in row["wrong"]]
    lines = [
        "# The same methods on every architecture",
        "",
        f"{len(titles)} architectures by their stock pipelines, {told['steps']} steps, batch {told['batch']}, "
        f"{told['dtype']}, {told['weights']} weights, {told['device']}: **{len(rows)} runs, "
        f"{len({id(row) for row, _ in wrong})} not as expected**. {versions}. Written by `benchmarks/architectures.py` "
        "(`make architectures`).",
        "",
        "Denoisers are wide and long enough that computing takes the time; text encoders and autoencoders are in "
        "miniature, and latents leave undecoded where the pipeline allows it. *Ideal* is the speed-up of the "
        "denoiser's calls by their FLOPs, counted in an uncached and in a cached run. *Latency* is that of whole runs, "
        f"and *CPU* the same by the processor's time: the median of {told['turns']} turns of an uncached run and one "
        "of each method. How the denoiser is built was looked at before (`handle.prepare`). The machine was busy with "
        "other work, which the wall's clock shows and the processor's does not: a latency beyond the ideal is no more "
        "than an uncached run that had to wait.",
        "",
        "Full steps are compared with the method's rule, worked out apart from the library: for schedules the list of "
        "steps, for `dbcache` (a probe of the first block) and `teacache` (a signal) each decision with its score; "
        "their thresholds are 1.25 and 2.5 times the median change between two steps. `>` is where the second expert "
        "takes over. A state is what is held for one branch of one denoiser; no two share a tensor.",
        "",
        "| architecture | denoiser | guidance | method | full steps | full / calls | states | ideal | latency | CPU |",
        "|---|---|---|---|---|---:|---|---:|---:|---:|",
        *map(_line, rows),
        "",
        "## What was not as expected",
        "",
        *([f"- {row['title']}, `{row['method']}`: {words}" for row, words in wrong] or ["Nothing."]),
        "",
        "## Both branches of a U-Net, in one call and in two",
        "",
        "The calls of a guided run, whose batch holds both branches, again in two calls each: two states instead of "
        "one, and the same result.",
        "",
        "| architecture | full steps of each | states | largest difference |",
        "|---|---|---|---:|",
        *(
            f"| {row['title']} | {_strips(row['two_calls']['strips'])} | {_states(row['two_calls']['states'])} | "
            f"{row['two_calls']['off']:.1e} |"
            for row in rows
            if "two_calls" in row
        ),
    ]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    classes = "<br>".join(
        f"`{facts['class']}`, {facts['parameters'] / 1e6:.1f} M" for facts in row["denoisers"].values()
    )
    cells = [
        row["title"],
        classes,
        row["guidance"],
        f"`{row['method']}`",
        _strips(row["strips"]),
        f"{row['full']} / {row['calls']}",
        _states(row["states"]),
        _ratio(row["ideal"]),
        _ratio(row["latency"]),
        _ratio(row["cpu"]),
    ]
    return "| " + " | ".join(cells) + " |"


def _strips(strips: dict[str, str]) -> str:
    """By branch; several denoisers one after another."""
    branches: dict[str, list[str]] = {}
    for name, strip in strips.items():
        branches.setdefault(name.split("/", 1)[1], []).append(strip)
    return "<br>".join(f"`{' > '.join(several)}` {branch}" for branch, several in branches.items())


def _states(states: dict[str, int]) -> str:
    return f"{len(states)}: " + ", ".join(f"{count / 2**20:.2f} MiB" for count in states.values())


def _ratio(number: float) -> str:
    return f"{number:.2f}x"


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {wide.case: wide for wide in (*TRANSFORMERS, *UNETS)}
    parser.add_argument("--cases", default=",".join(known), help="comma-separated")
    parser.add_argument("--resume", action="store_true", help="keep the cases that are there, run the rest")
    parser.add_argument("--write", metavar="STEM", default="docs/benchmarks/architectures", help="STEM.json and .md")
    options = parser.parse_args(arguments)
    names = options.cases.split(",")
    if not set(names) <= known.keys():
        parser.error(f"--cases {options.cases}: use some of {', '.join(known)}")
    options.wide = [known[name] for name in names]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    check_writable(f"{options.write}.json")
    diffusers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    told = conditions()
    rows = kept(options.write, SCHEMA, told) if options.resume else []
    known = {row["case"] for row in rows}
    result = {"schema": SCHEMA, "conditions": told, "rows": rows}
    for wide in options.wide:
        if wide.case in known:
            continue
        found = rows_of(wide)
        rows += found
        said = ", ".join(f"{row['method']} {row['ideal']:.2f}x by FLOPs, {row['latency']:.2f}x" for row in found)
        print(f"{wide.title}: {said}", file=sys.stderr)
        write_whole(f"{options.write}.json", json.dumps(result, indent=1) + "\n")
        write_whole(f"{options.write}.md", page(result))
    wrong = sum(bool(row["wrong"]) for row in rows)
    print(f"{len(rows)} runs, {wrong} not as expected: {options.write}.md")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
