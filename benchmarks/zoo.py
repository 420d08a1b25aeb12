"""Every denoiser class of diffusers at every kind of site, called plainly and with every optional input.

    PYTHONPATH=tests python benchmarks/zoo.py                       # all: docs/benchmarks/zoo.json and .md
    PYTHONPATH=tests python benchmarks/zoo.py --classes FluxTransformer2DModel --write out/zoo
    PYTHONPATH=tests python benchmarks/zoo.py --resume              # goes on with a file, row by row

Classes are found by looking at what is installed, so one of a later release has a row without anybody adding it. Each
is tiny, with random weights (`cache4diffusion.zoo`). In each cell caching is off first, over four steps, and then every
second step is cached while the input stays the same; what runs is counted. The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import renaming
from cache4diffusion import anatomy, zoo
from cache4diffusion.accelerate import attach
from cache4diffusion.anatomy import Anatomy
from cache4diffusion.anatomy.hints import HINTS
from cache4diffusion.anatomy.tree import leaves, map_leaves
from cache4diffusion.composition import Composition
from cache4diffusion.errors import AnatomyError, CompositionError
from cache4diffusion.files import check_writable, write_whole
from cache4diffusion.gates import FixedInterval
from cache4diffusion.inspection import SITES
from cache4diffusion.measure.bench import versions
from cache4diffusion.zoo.optional import RICH, Rich, unread
from resume import kept

SCHEMA = 1
PLAIN = "plain"
KINDS = ("whole", "span", "parts")
PASSED, ABSENT, FAILED = "passed", "absent", "failed"
TOLERANCE = {"whole": 0.0, "levels": 0.0, "parts": 0.0, "span": 1e-5}  # a residual is added: rounding
UNKNOWN = "no configuration is known of this class yet"


# --- what is counted --------------------------------------------------------------------------------------------------


class Spy:
    """How often each module's own ``forward`` runs, under every wrapper; and how often from outside some modules.

    Args:
        denoiser: the network, before anything is attached.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.counts: Counter[str] = Counter()
        self.outside: Counter[str] = Counter()
        self.roots: frozenset[str] = frozenset()
        self._depth = 0
        self._modules = {
            path: module for path, module in denoiser.named_modules() if not isinstance(module, torch.jit.ScriptModule)
        }
        for path, module in self._modules.items():
            module.forward = self._watched(path, module.forward)

    def _watched(self, path: str, forward: Any) -> Any:
        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.counts[path] += 1
            is_root = path in self.roots
            self.outside[path] += not self._depth and not is_root
            self._depth += is_root
            try:
                return forward(*args, **kwargs)
            finally:
                self._depth -= is_root

        return watched

    def clear(self) -> None:
        """Begin anew."""
        self.counts.clear()
        self.outside.clear()

    def remove(self) -> None:
        """Give every ``forward`` back."""
        for module in self._modules.values():
            del module.forward


@contextmanager
def spied(denoiser: nn.Module) -> Iterator[Spy]:
    spy = Spy(denoiser)
    try:
        yield spy
    finally:
        spy.remove()


def within(path: str, roots: frozenset[str]) -> bool:
    return any(root in ("", path) or path.startswith(f"{root}.") for root in roots)


# --- cells ------------------------------------------------------------------------------------------------------------


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for _, leaf in leaves(tree) if isinstance(leaf, Tensor)]


@torch.no_grad()
def call(denoiser: nn.Module, kwargs: dict[str, Any]) -> list[Tensor]:
    """Its output's tensors; containers among the arguments may be used up by the call."""
    return tensors(denoiser(**map_leaves(lambda _, leaf: leaf, kwargs)))


def error_of(output: list[Tensor], truth: list[Tensor]) -> float:
    """How far an output is from the true one, by its norm; infinite if it is made of something else."""
    if [leaf.shape for leaf in output] != [leaf.shape for leaf in truth]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(output, truth, strict=True)]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)


def equal(output: list[Tensor], truth: list[Tensor]) -> bool:
    """Whether two outputs are the same to the bit."""
    return len(output) == len(truth) and all(map(torch.equal, output, truth))


def site_of(kind: str, found: Anatomy) -> str:
    """What a span is called there: of U-Nets it is their levels."""
    return "levels" if kind == "span" and found.unet is not None else kind


@dataclass
class Frozen:
    """Four steps with the same input: their letters, outputs and counts, and what was to rest.

    ``asked`` counts what lies in modules that rest and is run from elsewhere: DiT's head asks the first block's
    embedder.
    """

    letters: str
    steps: list[tuple[list[Tensor], Counter[str]]]
    roots: frozenset[str]
    asked: Counter[str]


def frozen(denoiser: nn.Module, kwargs: dict[str, Any], found: Anatomy, composition: Composition, spy: Spy) -> Frozen:
    """Run them.

    Raises:
        AnatomyError, CompositionError: the denoiser has no such site.
    """
    with attach(denoiser, {"denoiser": denoiser}, {"denoiser": composition}, nan_guard="now") as handle:
        handle._engines[0].prepare((), kwargs, anatomy=found)
        spy.roots = frozenset(handle._engines[0].attachment.bypassed)
        spy.clear()
        call(denoiser, kwargs)  # the first step of a run is full
        asked, spy.roots, roots = Counter(spy.outside), frozenset(), spy.roots
        with handle.run(num_steps=4):
            steps = [step(denoiser, kwargs, spy) for _ in range(4)]
        letters = "".join(record.symbol for record in handle.trace.of())
    return Frozen(letters, steps, roots, asked)


def step(denoiser: nn.Module, kwargs: dict[str, Any], spy: Spy) -> tuple[list[Tensor], Counter[str]]:
    """One call: its output, and what ran."""
    spy.clear()
    output = call(denoiser, kwargs)
    return output, Counter(spy.counts)


def cell(denoiser: nn.Module, kwargs: dict[str, Any], found: Anatomy, kind: str) -> dict[str, Any]:
    """What was found at one kind of site.

    Args:
        denoiser: the network, plain.
        kwargs: arguments of its call.
        found: its anatomy in such a call.
        kind: of the site.
    """
    site = site_of(kind, found)
    told: dict[str, Any] = {"site": site}
    wrong, resting, worst = [], 0, 0.0
    with spied(denoiser) as spy:
        truth, plain = step(denoiser, kwargs, spy)
        for interval, expected in ((1, "FFFF"), (2, "FcFc")):
            try:
                run = frozen(denoiser, kwargs, found, Composition(SITES[site], FixedInterval(interval)), spy)
            except (AnatomyError, CompositionError) as error:
                return told | {"outcome": ABSENT, "words": " ".join(str(error).split())}
            if run.letters != expected:
                wrong.append(f"{run.letters} instead of {expected}")
            for letter, (output, counts) in zip(run.letters, run.steps, strict=True):
                error = error_of(output, truth)
                if letter == "F":
                    if error or not equal(output, truth):
                        wrong.append(f"a full step at interval {interval} is off by {error:.1e}")
                    if counts != plain:
                        wrong.append(f"a full step at interval {interval} ran something else than the plain call")
                    continue
                worst = max(worst, error)
                if not error <= TOLERANCE[site]:
                    wrong.append(f"a cached step is off by {error:.1e}")
                ran = sorted(path for path in counts if within(path, run.roots) and counts[path] > run.asked[path])
                if ran:
                    wrong.append(f"{', '.join(ran[:3])} ran on a cached step")
                resting = sum(plain[path] > counts[path] for path in plain)
        if not equal(call(denoiser, kwargs), truth):
            wrong.append("the denoiser is not what it was")
    if not resting:
        wrong.append("nothing rests on a cached step")
    told |= {"outcome": FAILED if wrong else PASSED, "resting": resting, "error": worst}
    return told | ({"words": "; ".join(dict.fromkeys(wrong))} if wrong else {})


# --- rows -------------------------------------------------------------------------------------------------------------


def calls_of(name: str) -> list[str]:
    """The calls of a class: plain, and those with optional inputs."""
    return [PLAIN, *(rich.name for rich in RICH if rich.kind == name)] if name in zoo.TINY else [PLAIN]


def rich_of(name: str, called: str) -> Rich | None:
    return next((rich for rich in RICH if (rich.kind, rich.name) == (name, called)), None)


def specimen(name: str, called: str) -> tuple[nn.Module, dict[str, Any]]:
    """The denoiser of a row, and the arguments of its call."""
    plain, rich = zoo.tiny(name), rich_of(name, called)
    denoiser, _, kwargs = plain.make() if rich is None else rich.make(plain)
    return denoiser, kwargs


def row_of(name: str, called: str) -> dict[str, Any]:
    """A class with one of its calls."""
    row: dict[str, Any] = {"class": name, "call": called}
    if name not in zoo.TINY:
        return row | {"unknown": UNKNOWN, "sites": {}}
    denoiser, kwargs = specimen(name, called)
    found = anatomy.observe(denoiser, (), kwargs)
    plain = inputs_of(zoo.tiny(name).arguments(2))
    row |= {
        "inputs": sorted(set(inputs_of(kwargs)) - (set() if called == PLAIN else set(plain))),
        "stacks": [{"path": s.path, "blocks": len(s.blocks), "main": s.is_main} for s in found.stacks],
        "levels": None if found.unet is None else len(found.unet.up),
        "streams": kinds(stream.kind for s in found.main or found.stacks for b in s.blocks for stream in b.streams),
        "parts": kinds(part.kind for s in found.main or found.stacks for block in s.blocks for part in block.parts),
        "hint": HINTS[name].why if name in HINTS else None,
        "sites": {kind: cell(denoiser, kwargs, found, kind) for kind in KINDS},
    }
    if called == PLAIN:
        row["renamed"] = renamed_equal(name, found)
        row["left_out"] = left_out(name)
    return row


def left_out(name: str) -> dict[str, str]:
    """Parameters that no call of a class gives, with the reason."""
    plain = zoo.tiny(name)
    calls = [plain, *(rich.of(plain) for rich in RICH if rich.kind == name)]
    return unread(plain, {key: None for tiny in calls for key in tiny.arguments(2)})


def inputs_of(given: dict[str, Any]) -> list[str]:
    """Names of the arguments that hold tensors; of dictionaries, also of what is in them."""
    names = []
    for name, value in given.items():
        if isinstance(value, dict) and any(isinstance(key, str) for key in value):
            names += [f"{name}[{key}]" for key, inner in value.items() if tensors(inner)]
        elif tensors(value):
            names.append(name)
    return names


def kinds(found: Any) -> dict[str, int]:
    return dict(Counter(found).most_common())


def renamed_equal(name: str, expected: Anatomy) -> bool:
    """Whether the anatomy is the same where every sub-module goes by another name."""
    denoiser, args, kwargs = zoo.tiny(name).make()
    names = renaming.rename(denoiser)
    found = renaming.with_names(anatomy.observe(denoiser, args, kwargs), names)
    bare = [dataclasses.replace(facts, notes=()) for facts in (found, expected)]
    return bare[0] == bare[1] and len(found.notes) == len(expected.notes)


def wanted(names: list[str]) -> list[tuple[str, str]]:
    return [(name, called) for name in names for called in calls_of(name)]


# --- the file ---------------------------------------------------------------------------------------------------------


def conditions() -> dict[str, Any]:
    return {
        "weights": "random",
        "batch": 2,
        "device": f"cpu, {torch.get_num_threads()} thread(s), {platform.machine()}",
        "versions": versions(),
    }


def share(rows: list[dict[str, Any]], kind: str) -> str:
    there = sum(row["sites"][kind]["outcome"] == PASSED for row in rows)
    return f"{there} of {len(rows)} ({100 * there / len(rows):.0f} %)"


def page(result: dict[str, Any]) -> str:
    """The result as markdown."""
    told = result["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    rows = [row for row in result["rows"] if "unknown" not in row]
    plain = [row for row in rows if row["call"] == PLAIN]
    cells = [found for row in rows for found in row["sites"].values()]
    counts = Counter(found["outcome"] for found in cells)
    renamed = [row["class"] for row in plain if row["renamed"]]
    hinted = [row for row in plain if row["hint"]]
    lines = [
        "# Every denoiser class of diffusers",
        "",
        f"{len(plain)} classes, tiny and with random weights, in {len(rows)} calls, batch {told['batch']}, "
        f"{told['device']}: **{counts[PASSED]} checks passed, {counts[FAILED]} failed**, {counts[ABSENT]} sites are "
        f"not there. {versions}. Written by `benchmarks/zoo.py` (`make matrix`).",
        "",
        "Each check: with caching off four steps are bit-equal to the plain denoiser's and run what it runs; then "
        "every second step is cached while the input stays the same. Full steps are bit-equal again; cached ones are "
        "bit-equal at the whole denoiser, at levels and at parts, and within 1e-5 at spans, where a residual is added. "
        "Of what is bypassed nothing runs, counted module by module. Afterwards the denoiser is what it was.",
        "",
        f"Of all classes, in a plain call: whole denoiser {share(plain, 'whole')}, span of blocks (of U-Nets: levels) "
        f"{share(plain, 'span')}, parts {share(plain, 'parts')}. With every sub-module renamed (`m0`, `m1`, ...) "
        f"{len(renamed)} have the same anatomy ({100 * len(renamed) / len(plain):.0f} %).",
        "",
        "In a cell: modules that rest on a cached step. The inputs are those that hold tensors; of a call with "
        "optional inputs, those that the plain one leaves out. A class without such a call has none but what is listed "
        "at the end.",
        "",
        "| class | call | blocks | streams | parts | renamed | whole | span or level | part | inputs |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(_line, result["rows"]),
        "",
        "## What failed",
        "",
        *(
            [
                f"- {row['class']}, {row['call']}, {kind}: {found['words']}"
                for row in rows
                for kind, found in row["sites"].items()
                if found["outcome"] == FAILED
            ]
            or ["Nothing."]
        ),
        "",
        "## Sites that are not there",
        "",
        *(
            f"- {row['class']}, {row['call']}, {kind}: {found['words']}"
            for row in rows
            for kind, found in row["sites"].items()
            if found["outcome"] == ABSENT
        ),
        "",
        "## Classes that need a hint",
        "",
        *(f"- `{row['class']}`: {row['hint']}" for row in hinted),
        "",
        "## Another anatomy once modules are renamed",
        "",
        *([f"- `{row['class']}`" for row in plain if not row["renamed"]] or ["None."]),
        "",
        "## Optional inputs that no call gives",
        "",
        "What is no tensor in any class (switches, the scale of a LoRA) is left out here.",
        "",
        *_left_out(plain),
    ]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    if "unknown" in row:
        return f"| `{row['class']}` | {row['unknown']} | | | | | | | | |"
    stacks = [stack for stack in row["stacks"] if stack["main"]]
    blocks = "+".join(str(stack["blocks"]) for stack in stacks)
    if row["levels"] is not None:
        blocks = f"{row['levels']} levels"
    sites = [_word(row["sites"][kind]) for kind in KINDS]
    renamed = {True: "same", False: "other", None: ""}[row.get("renamed")]
    inputs = ", ".join(f"`{name}`" for name in row["inputs"])
    words = [f"{count} {kind}" for kind, count in row["parts"].items()]
    return (
        "| "
        + " | ".join(
            [
                f"`{row['class']}`",
                row["call"],
                blocks,
                ", ".join(row["streams"]),
                ", ".join(words),
                renamed,
                *sites,
                inputs,
            ]
        )
        + " |"
    )


def _word(found: dict[str, Any]) -> str:
    return {PASSED: str(found.get("resting")), ABSENT: "none", FAILED: "**failed**"}[found["outcome"]]


def _left_out(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        names = {name: why for name, why in row["left_out"].items() if not why.startswith("no tensor")}
        for name, why in names.items():
            yield f"- `{row['class']}`, `{name}`: {why or '**no reason is known**'}"


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", help="comma-separated; all by default")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there, check the rest")
    parser.add_argument("--write", metavar="STEM", default="docs/benchmarks/zoo", help="STEM.json and STEM.md")
    options = parser.parse_args(arguments)
    known = list(zoo.denoiser_classes())
    options.classes = options.classes.split(",") if options.classes else known
    unknown = sorted(set(options.classes) - set(known))
    if unknown:
        parser.error(f"--classes {','.join(unknown)}: diffusers has {', '.join(known)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    check_writable(f"{options.write}.json")
    diffusers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    told = conditions()
    rows = kept(options.write, SCHEMA, told) if options.resume else []
    known = {(row["class"], row["call"]) for row in rows}
    result = {"schema": SCHEMA, "conditions": told, "rows": rows}
    for name, called in wanted(options.classes):
        if (name, called) in known:
            continue
        rows.append(row_of(name, called))
        outcomes = ", ".join(f"{kind} {found['outcome']}" for kind, found in rows[-1]["sites"].items())
        print(f"{name}, {called}: {outcomes}", file=sys.stderr)
        write_whole(f"{options.write}.json", json.dumps(result, indent=1) + "\n")
    write_whole(f"{options.write}.md", page(result))
    failed = sum(found["outcome"] == FAILED for row in rows for found in row["sites"].values())
    print(f"{sum(len(row['sites']) for row in rows)} checks, {failed} failed: {options.write}.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
