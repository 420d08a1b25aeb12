"""Adaptive methods on the reference model: how their thresholds work, and whether rows of a batch are left in peace.

    python benchmarks/adaptive.py                                         # all: docs/benchmarks/adaptive.json and .md
    python benchmarks/adaptive.py --methods fbcache --captions 2 --rows 2 --write out/adaptive

1. **Sweep.** Every caption at the method's off settings, and at ten values of its dial (see `Dial`), the last of which
   accepts every score. Nothing may be cached at off; at the largest value the strip must be that of a gate which is
   always told 0; the mean cached share must rise with the value, with a rank correlation of 0.9 or more.
2. **Rows**, at the value whose mean share is nearest to the middle of the smallest and the largest, where rows differ
   most. In float32 the strip of each caption in one batch equals its strip alone. A step whose score lies within 1e-4
   relative of the threshold is excepted: its decision changes if the threshold is moved so far. Excepted are at most
   1 % of the steps; what comes behind one that was decided differently cannot be compared. Final latents agree to 1e-4
   relative. In bfloat16 they may deviate twice as much as those of the uncached batch deviate from uncached single
   runs.
3. **Spy.** In the batched run, every module that rests on cached steps was given as many rows, call by call, as were to
   be computed.

The exit code is 1 if anything does not hold.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import cache4diffusion as c4d
from cache4diffusion import reference
from cache4diffusion.accelerate import denoisers_of
from cache4diffusion.calls import quiet, sampler
from cache4diffusion.engine import Engine
from cache4diffusion.engine.leaves import flatten
from cache4diffusion.engine.span import SpanDriver
from cache4diffusion.files import check_writable, write_whole
from cache4diffusion.gates import Entrance, Outputs, Step
from cache4diffusion.measure.bench import versions
from cache4diffusion.method import Composition, Dial
from cache4diffusion.selfcheck.inside import always_resting
from cache4diffusion.sites import Blocks
from cache4diffusion.trace import Record

SCHEMA = 1
VALUES = 10
NEAR = 1e-4  # relative distance of a score from its threshold
MOST_NEAR = 0.01  # share of the steps
AGREE = 1e-4  # relative difference of final latents
RISES = 0.9  # rank correlation
# Of methods whose limits are made for more blocks and steps than there are here. QuantCache keeps channels in int8: of
# numbers that differ in their last bit, a batch may round one up and a single run the other down. Not so in 16 bits.
SETTINGS: dict[str, dict[str, Any]] = {
    "dbcache": {"front": 1, "warmup": 4},
    "dbprune": {"front": 1, "warmup": 4},
    "easycache": {"warmup": 4},
    "quantcache": {"bits": 16.0},
}
METHODS = sorted(name for name, method in c4d.METHODS.items() if method.info.dial is not None)


# --- what is decided --------------------------------------------------------------------------------------------------


@dataclass
class Decision:
    """One decision of one unit: whether it was cached, and whether a threshold a little off would have changed that."""

    step: int
    is_cached: bool
    is_near: bool


class Decisions:
    """Notes what is decided in a run, unit by unit, from where every decision ends up: the gate's ``commit``.

    Args:
        composition: whose gate is noted.
        around: gates whose thresholds are a little lower and higher.
        rows: units of a decision.
    """

    def __init__(self, composition: Composition, around: Sequence[Any], rows: int) -> None:
        self.kind, self.around, self.rows = type(composition.gate), around, rows
        self.log: list[Decision] = []

    def __enter__(self) -> Decisions:
        commit, log, around = self.kind.commit, self.log, self.around

        def noted(gate: Any, state: Any, step: Step, cached: bool, score: Any) -> None:
            opinions = {other.propose(state, step, score) for other in around} if score is not None else {cached}
            log.append(Decision(step.index, cached, len(opinions) > 1))
            commit(gate, state, step, cached, score)

        self.kind.commit = noted  # type: ignore[method-assign]
        self._undo = lambda: setattr(self.kind, "commit", commit)
        return self

    def __exit__(self, *error: object) -> None:
        self._undo()

    def of_rows(self) -> list[list[Decision]]:
        """Decisions of each row, step by step; within a step by branch (and block, where each decides)."""
        assert len(self.log) % self.rows == 0, "a decision is taken for all rows, one after the other"
        return [self.log[row :: self.rows] for row in range(self.rows)]


def strip_of(decisions: list[Decision]) -> str:
    """A letter per step: ``F``, ``c``, or ``m`` where branches or blocks differ."""
    letters = []
    for _, several in itertools.groupby(decisions, key=lambda decision: decision.step):
        seen = {decision.is_cached for decision in several}
        letters.append("m" if len(seen) > 1 else "c" if seen.pop() else "F")
    return "".join(letters)


def share_of(decisions: list[Decision]) -> float:
    """Share of decisions that were to cache."""
    return statistics.fmean(decision.is_cached for decision in decisions)


def allowed_strip(composition: Composition, steps: int) -> str:
    """What guards and the gate's own limits allow: the strip of a gate that is told 0 wherever there is a score."""
    gate, letters = composition.gate, []
    assert gate is not None
    compares_full_steps = isinstance(gate.watch, Outputs)  # the last two, at the step behind them
    is_pair = isinstance(gate.watch, Entrance) and gate.watch.with_angle
    nothing = (0.0, None) if is_pair else 0.0
    state, guards = gate.begin(steps), [(guard, guard.begin()) for guard in composition.guards]
    for index in range(steps):
        step = Step(index, steps)
        opinion = next((o for o in (guard.overrule(kept, step) for guard, kept in guards) if o is not None), None)
        score = None if compares_full_steps and (index < 2 or letters[-1] == "c") else nothing
        cached = index > 0 and (gate.propose(state, step, score) if opinion is None else opinion)
        gate.commit(state, step, cached, score)
        for guard, kept in guards:
            guard.commit(kept, step, cached, score)
        letters.append("c" if cached else "F")
    return "".join(letters)


# --- what is computed -------------------------------------------------------------------------------------------------


class Spy:
    """How many rows the own forward of every module was given since ``rows`` was cleared; rehearsals do not count."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser, self.rows = denoiser, dict[str, int]()
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Spy:
        for path, module in self.denoiser.named_modules():
            own = module.__dict__.get("forward")
            module.__dict__["forward"] = self._counting(path, module.forward)
            self._undo.append(lambda module=module, own=own: _put_back(module, own))
        return self

    def _counting(self, path: str, forward: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            tensors = [leaf for leaf in flatten((args, kwargs))[0] if isinstance(leaf, Tensor) and leaf.ndim > 1]
            if tensors and not isinstance(tensors[0], FakeTensor):
                self.rows[path] = self.rows.get(path, 0) + len(tensors[0])
            return forward(*args, **kwargs)

        counting.__wrapped__ = forward  # type: ignore[attr-defined]
        return counting

    def __exit__(self, *error: object) -> None:
        for undo in self._undo:
            undo()


def _put_back(module: nn.Module, own: Any) -> None:
    if own is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = own


def resting(engine: Engine) -> list[str]:
    """Modules that run for computed rows alone; where each block decides, the blocks in the order of decisions."""
    driver = engine.driver
    if isinstance(engine.composition.site, Blocks) and isinstance(driver, SpanDriver):
        return [engine.host.blocks[stretch.first].path for stretch in driver.stretches]
    watch = engine.gate.watch if engine.gate is not None else None
    if engine.attachment.bypassed == [""] and watch is not None and not watch.is_inside:
        return [""]
    return always_resting(engine)


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """The reference pipeline and what it is asked for."""

    pipe: Any
    captions: list[str]
    steps: int

    def sample(self, rows: Sequence[int]) -> Tensor:
        """Final latents of some captions in one batch; each has noise of its own seed."""
        call = {**reference.SAMPLING, "output_type": "latent", "negative_prompt": [""] * len(rows)}
        call.pop("num_inference_steps")
        with torch.inference_mode(), quiet(self.pipe):
            return sampler(self.pipe, call)([self.captions[row] for row in rows], list(rows), self.steps).float()

    @property
    def denoiser(self) -> nn.Module:
        """The network."""
        return next(iter(denoisers_of(self.pipe).values()))


@dataclass(frozen=True)
class Subject:
    """A method, deciding row by row where it can."""

    name: str

    @property
    def dial(self) -> Dial:
        """What it caches more or less by."""
        dial = c4d.METHODS[self.name].info.dial
        assert dial is not None
        return dial

    def settings(self, value: float | None) -> dict[str, Any]:
        """At a value of its dial; None is off."""
        info, known = c4d.METHODS[self.name].info, {entry["name"] for entry in c4d.METHODS[self.name].describe()}
        chosen = info.off if value is None else self.dial.at(value)
        return {**SETTINGS.get(self.name, {}), **({"decide": "row"} if "decide" in known else {}), **chosen}

    def composition(self, value: float | None) -> Composition:
        """What runs."""
        return c4d.method(self.name, **self.settings(value)).compose()

    def around(self, value: float | None) -> list[Any]:
        """Gates of values a little lower and higher."""
        if value is None:
            return [self.composition(None).gate]
        return [self.composition(value * factor).gate for factor in (1 - NEAR, 1 + NEAR)]


@contextmanager
def running(stage: Stage, subject: Subject, value: float | None, rows: int) -> Iterator[tuple[Decisions, Any]]:
    """Accelerated, with decisions noted."""
    made = subject.composition(value)
    units = rows if made.decide == "row" else 1
    with warnings.catch_warnings(), Decisions(made, subject.around(value), units) as seen:
        warnings.simplefilter("ignore")  # nothing cached is a result here
        with c4d.accelerate(stage.pipe, made) as handle:
            yield seen, handle


def sweep(stage: Stage, subject: Subject, batch: int) -> list[dict[str, Any]]:
    """Strips and cached shares of all captions, at off and at every value."""
    found = []
    together = batch if subject.composition(None).decide == "row" else 1
    for value in (None, *subject.dial.values(VALUES)):
        strips, shares = [], []
        for first in range(0, len(stage.captions), together):
            rows = range(first, min(first + together, len(stage.captions)))
            with running(stage, subject, value, len(rows)) as (seen, _):
                stage.sample(rows)
            for decisions in seen.of_rows():
                strips.append(strip_of(decisions))
                shares.append(share_of(decisions))
        found.append(
            {"value": value, "settings": plain(subject.settings(value)), "share": statistics.fmean(shares),
             "shares": shares, "strips": strips}
        )  # fmt: skip
    return found


def rank_correlation(values: Sequence[float], others: Sequence[float]) -> float:
    """Spearman's, equal numbers sharing their mean rank; 0 where all are equal."""

    def ranks(numbers: Sequence[float]) -> list[float]:
        order = sorted(numbers)
        return [order.index(number) + (order.count(number) - 1) / 2 for number in numbers]

    a, b = ranks(values), ranks(others)
    return 0.0 if min(statistics.pstdev(a), statistics.pstdev(b)) == 0 else statistics.correlation(a, b)


def distances(batched: Tensor, single: list[Tensor]) -> list[float]:
    """Relative difference of final latents, row by row."""
    return [float((a - b[0]).norm() / b[0].norm()) for a, b in zip(batched, single, strict=True)]


@dataclass
class Rows:
    """What is found by sampling captions in one batch and one by one."""

    value: float
    captions: int
    steps: int = 0  # decisions that were compared
    near: int = 0  # of them, those within `NEAR` of the threshold
    differing: list[str] = field(default_factory=list)  # decided differently, and not near
    behind: int = 0  # decisions that come behind one that was near and decided differently
    strips: list[str] = field(default_factory=list)
    distance: float = 0.0  # of the latents of rows that can be compared; the largest
    calls: int = 0  # of the denoiser, in the batched run
    mixed_calls: int = 0  # of them, those in which some rows were computed and some were not
    watched_modules: int = 0  # that rest on cached steps
    miscounted: list[str] = field(default_factory=list)
    bfloat16: dict[str, float] = field(default_factory=dict)


def compare_rows(stage: Stage, subject: Subject, value: float, count: int) -> Rows:
    """Strips, latents and computed rows of a batch, and of its captions alone."""
    found = Rows(value, count)
    if subject.composition(value).decide != "row":
        raise SystemExit(f"{subject.name} takes no decisions by row: give its dial a setting `decide`")
    with Spy(stage.denoiser) as spy, running(stage, subject, value, count) as (seen, handle):
        batched = watched(stage, spy, handle, seen, found)
    together, alone, latents = seen.of_rows(), [], []
    for row in range(count):
        with running(stage, subject, value, 1) as (single, _):
            latents.append(stage.sample([row]))
        alone += single.of_rows()
    comparable = []
    for row, (ours, theirs) in enumerate(zip(together, alone, strict=True)):
        found.strips.append(strip_of(ours))
        if compare_decisions(row, ours, theirs, found):
            comparable.append(row)
    if comparable:
        found.distance = max(distances(batched[comparable], [latents[row] for row in comparable]))
    return found


def compare_decisions(row: int, ours: list[Decision], theirs: list[Decision], found: Rows) -> bool:
    """Whether a row was decided the same in both runs, up to the end."""
    if len(ours) != len(theirs):
        found.differing.append(f"row {row}: {len(ours)} decisions in the batch, {len(theirs)} alone")
        return False
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        is_near = a.is_near or b.is_near
        found.steps, found.near = found.steps + 1, found.near + is_near
        if a.is_cached != b.is_cached:
            if not is_near:
                found.differing.append(f"row {row}, step {a.step}")
            found.behind += len(ours) - number - 1
            return False
    return True


def watched(stage: Stage, spy: Spy, handle: Any, seen: Decisions, found: Rows) -> Tensor:
    """Sample a batch, and compare at the end of every call the rows that ran with those that were to be computed."""
    engine, add, begun = handle._engines[0], handle.trace.add, 0

    def check(record: Record) -> None:  # the call is over
        nonlocal begun
        decisions, begun = seen.log[begun:], len(seen.log)
        groups = [decisions[i : i + seen.rows] for i in range(0, len(decisions), seen.rows)]
        computed = [sum(not decision.is_cached for decision in group) for group in groups]
        found.calls += 1
        found.mixed_calls += any(0 < count < seen.rows for count in computed)
        expected = expected_rows(engine, computed)
        found.watched_modules = len(expected)
        for path, wanted in expected.items():
            given = spy.rows.get(path, 0)
            if given != wanted:
                words = f"{path or 'the denoiser'} was given {given} rows, not {wanted}"
                found.miscounted.append(f"step {record.step}, {record.branch}: {words}")
        spy.rows.clear()
        add(record)

    handle.trace.add = check
    return stage.sample(range(found.captions))


def expected_rows(engine: Engine, computed: list[int]) -> dict[str, int]:
    """Rows that each resting module is to be given, by the one decision or, where each block takes one, by its own."""
    paths = resting(engine)
    if isinstance(engine.composition.site, Blocks):
        return dict(zip(paths, computed, strict=True))
    assert len(computed) == 1, f"{len(computed)} decisions in a call"
    return dict.fromkeys(paths, computed[0])


def in_bfloat16(stage: Stage, subjects: dict[str, float], count: int) -> dict[str, dict[str, float]]:
    """Deviation of a batch from single runs, cached and not, root mean square over captions."""

    def deviation(name: str | None, value: float) -> tuple[float, int]:
        def attached(rows: int) -> Any:
            return running(stage, Subject(name), value, rows) if name is not None else nullcontext((None, None))

        with attached(count) as (together, _):
            batched = stage.sample(range(count))
        singles, equal = [], 0
        for row in range(count):
            with attached(1) as (alone, _):
                singles.append(stage.sample([row]))
            if together is not None and alone is not None:
                equal += strip_of(together.of_rows()[row]) == strip_of(alone.of_rows()[0])
        return statistics.fmean(d * d for d in distances(batched, singles)) ** 0.5, equal

    stage.pipe.to(torch.bfloat16)
    try:
        uncached, _ = deviation(None, 0.0)
        found = {}
        for name, value in subjects.items():
            cached, equal = deviation(name, value)
            found[name] = {"uncached": uncached, "cached": cached, "equal_strips": equal}
        return found
    finally:
        stage.pipe.to(torch.float32)


# --- the file ---------------------------------------------------------------------------------------------------------


def measure(stage: Stage, names: Sequence[str], rows: int, batch: int) -> dict[str, Any]:
    """Everything, in the form of the file."""
    found: list[dict[str, Any]] = []
    for name in names:
        subject = Subject(name)
        swept = sweep(stage, subject, batch)
        middle = (swept[1]["share"] + swept[-1]["share"]) / 2
        value = min(swept[1:], key=lambda entry: abs(entry["share"] - middle))["value"]
        compared = compare_rows(stage, subject, value, rows)
        allowed = allowed_strip(subject.composition(Dial.OPEN), stage.steps)
        values = [entry["value"] for entry in swept[1:]]
        found.append(
            {
                "method": name,
                "dial": subject.dial.setting,
                "sweep": swept,
                "allowed": allowed,
                "correlation": rank_correlation(values, [entry["share"] for entry in swept[1:]]),
                "rows": compared,
            }
        )
        print(f"{name}: swept and compared", file=sys.stderr)
    half = in_bfloat16(stage, {entry["method"]: entry["rows"].value for entry in found}, rows)
    for entry in found:
        entry["rows"].bfloat16 = half[entry["method"]]
        entry["rows"] = vars(entry["rows"])
        entry["checks"] = checks_of(entry)
    return {"schema": SCHEMA, "conditions": conditions(stage, rows), "methods": found}


def checks_of(entry: dict[str, Any]) -> dict[str, bool]:
    """Each promise, and whether it holds."""
    off, largest, rows = entry["sweep"][0], entry["sweep"][-1], entry["rows"]
    half = rows["bfloat16"]
    return {
        "nothing is cached at off": off["share"] == 0,
        "all that is allowed is cached at the largest value": set(largest["strips"]) == {entry["allowed"]},
        "the share rises with the value": entry["correlation"] >= RISES,
        "strips in a batch are those alone": not rows["differing"],
        "few scores are near the threshold": rows["near"] <= MOST_NEAR * rows["steps"],
        "latents in a batch are those alone": rows["distance"] <= AGREE,
        "bfloat16 deviates no more than twice the uncached": half["cached"] <= 2 * half["uncached"],
        "only rows that were to be computed were": not rows["miscounted"] and rows["watched_modules"] > 0,
    }


def conditions(stage: Stage, rows: int) -> dict[str, Any]:
    return {
        "denoiser": type(stage.denoiser).__name__,
        "captions": len(stage.captions),
        "seeds": f"0..{len(stage.captions) - 1}",
        "rows": rows,
        "steps": stage.steps,
        "dtype": "float32, and bfloat16 where it says so",
        "device": f"cpu, {torch.get_num_threads()} thread(s), {platform.machine()}",
        "guidance": reference.SAMPLING["true_cfg_scale"],
        "versions": versions(),
    }


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(settings))


def page(result: dict[str, Any]) -> str:
    """The result as markdown."""
    told = result["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    broken = [(e["method"], what) for e in result["methods"] for what, holds in e["checks"].items() if not holds]
    lines = [
        "# Adaptive methods",
        "",
        f"{told['captions']} captions (seeds {told['seeds']}), {told['steps']} steps, guidance {told['guidance']}, "
        f"{told['denoiser']}, {told['device']}, {told['dtype']}; {told['rows']} captions in one batch beside each "
        f"alone. {versions}. Written by `benchmarks/adaptive.py`, which says what is promised.",
        "",
        "Settings that are not the defaults: "
        + "; ".join(f"`{name}` {', '.join(f'{k}={v}' for k, v in given.items())}" for name, given in SETTINGS.items())
        + ". In int8, which `quantcache` keeps some channels in by default, a number that differs in its last bit may "
        "be rounded to another; a batch is its rows alone only to that rounding.",
        "",
        "Everything holds." if not broken else f"**{len(broken)} promises do not hold:**",
        *(f"- `{method}`: {what}" for method, what in broken),
        "",
        "| method | dial | cached, smallest to largest | correlation | batch at | decisions | near | behind | latents "
        "| bf16, uncached | bf16, cached | calls | mixed |",
        "|---|---|---" + "|---:" * 10 + "|",
    ]
    for entry in result["methods"]:
        rows, swept = entry["rows"], entry["sweep"]
        cells = [
            f"`{entry['method']}`",
            f"`{entry['dial']}`",
            " ".join(f"{100 * each['share']:.0f}" for each in swept[1:]) + " %",
            f"{entry['correlation']:.3f}",
            f"{rows['value']:.3g}",
            f"{rows['steps']}",
            f"{rows['near']}",
            f"{rows['behind']}",
            *(f"{number:.1e}" for number in (rows["distance"], *list(rows["bfloat16"].values())[:2])),
            f"{rows['calls']}",
            f"{rows['mixed_calls']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for entry in result["methods"]:
        lines += ["", f"## {entry['method']}", "", "The first caption at every value:", "", "```"]
        for each in entry["sweep"]:
            value = "off" if each["value"] is None else f"{each['value']:.3g}"
            lines.append(f"{each['strips'][0]}  {value}")
        lines += [f"{entry['allowed']}  allowed", "```", "", f"All at {entry['rows']['value']:.3g}, in one batch:", ""]
        lines += ["```", *entry["rows"]["strips"], "```"]
        lines += [f"- {words}" for words in (*entry["rows"]["differing"], *entry["rows"]["miscounted"][:10])]
    return "\n".join(lines) + "\n"


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-flux", help="a reference model, or a folder like its")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated; all with a dial")
    parser.add_argument("--captions", type=int, default=16, help="of the sweep")
    parser.add_argument("--rows", type=int, default=8, help="captions in one batch")
    parser.add_argument("--batch", type=int, default=8, help="captions per call in the sweep")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--write", metavar="STEM", default="docs/benchmarks/adaptive", help="STEM.json and STEM.md")
    options = parser.parse_args(arguments)
    options.methods = options.methods.split(",")
    unknown = [name for name in options.methods if name not in METHODS]
    if unknown:
        parser.error(f"--methods {','.join(unknown)}: no dial; use some of {', '.join(METHODS)}")
    if not 2 <= options.rows <= options.captions or options.batch < 1:
        parser.error("--rows must be 2 or more and at most --captions, --batch 1 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    check_writable(f"{options.write}.json")
    diffusers.utils.logging.set_verbosity_error()  # changing the dtype is what is asked for
    stage = Stage(reference.load(options.model), reference.held_out_captions(options.captions, 0), options.steps)
    result = measure(stage, options.methods, options.rows, options.batch)
    write_whole(f"{options.write}.json", json.dumps(result, indent=1) + "\n")
    text = page(result)
    write_whole(f"{options.write}.md", text)
    print(text)
    return 0 if all(holds for entry in result["methods"] for holds in entry["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
