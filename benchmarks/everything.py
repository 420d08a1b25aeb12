"""Every method at settings from gentle to hard on a reference model, and which of them are worth their error.

    python benchmarks/everything.py                        # all, family by family: docs/benchmarks/all-methods.*
    python benchmarks/everything.py --families trajectory  # some families; those measured earlier are kept
    python benchmarks/everything.py --front                # then the front on more captions: all-methods-front.*
    python benchmarks/everything.py --front --share 1/2    # half of it, beside another process that does 2/2
    python benchmarks/everything.py --page                 # write the pages anew from what is measured
    python benchmarks/everything.py --model scenes-sd      # another model: docs/benchmarks/all-methods-scenes-sd.*

It is ``c4d bench --methods all``, cut into families so that what is measured is not lost, put together into one file.
Calibrations are those in --calibrations (see `calibrations.py`), which also say what cannot be calibrated. Every part
runs its own uncached rows and fewer-steps rows beside its methods; they are the same images, which is checked. A
*front* has the rows that no other row beats in FLOPs and PSNR at once.
"""

# ruff: noqa: RUF001 -- the dash is meant

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import cache4diffusion as c4d
from cache4diffusion.calibration.figure import Figure
from cache4diffusion.cli.models import load_model
from cache4diffusion.info import FAMILIES
from cache4diffusion.ladder import ladder
from cache4diffusion.measure import MeasureError, Results, Row, markdown_table
from cache4diffusion.measure.table import decibels, percent, points, speedup, steps
from side_by_side import side_by_side


def front_of(rows: Iterable[Row]) -> list[Row]:
    """The rows that no other row beats: none has both as large a FLOPs speed-up and as large a PSNR, and one larger."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (-row.flops_speedup, -row.psnr)):
        if not found or row.psnr > found[-1].psnr:
            found.append(row)
    return found[::-1]


def merged(parts: Sequence[Results], refused: Mapping[str, str] | None = None) -> Results:
    """One file of several that were measured under the same conditions; ``refused`` are methods left out, and why.

    Raises:
        MeasureError: conditions, or the uncached images' accuracies, differ.
    """
    first = parts[0]
    changing = {"left_out": {}, "date": None}
    for part in parts[1:]:
        if part.conditions.model_copy(update=changing) != first.conditions.model_copy(update=changing):
            raise MeasureError("These results do not go together: their conditions differ. Measure them anew.")
        if part.baseline.correct_per_caption != first.baseline.correct_per_caption:
            raise MeasureError("These results do not go together: their uncached images differ. Measure them anew.")
    fewer = {row.name: row for part in parts for row in part.fewer_steps}
    left_out = {name: reason for part in parts for name, reason in part.conditions.left_out.items()}
    left_out |= refused or {}
    return Results(
        conditions=first.conditions.model_copy(update={"left_out": left_out}),
        rows=[
            first.baseline,
            *sorted(fewer.values(), key=lambda row: -row.total_steps),
            *(row for part in parts for row in part.methods),
        ],
    )


# --- measuring --------------------------------------------------------------------------------------------------------


def part_file(folder: Path, family: str) -> Path:
    return folder / f"{family.replace(' ', '-')}.json"


def measure_families(options: argparse.Namespace) -> None:
    """Each family into a file of its own."""
    everything, refused = ladder(options.calibrations), refusals(options.calibrations)
    for family in options.families:
        members = [method for method in everything.methods if method.info.family == family]
        missing = {n: why for n, why in everything.left_out.items() if c4d.METHODS[n].info.family == family}
        print(f"{family}: {len(members)} rows", file=sys.stderr)
        if missing.keys() - refused.keys():
            names = ", ".join(sorted(missing.keys() - refused.keys()))
            raise SystemExit(f"{names}: make their calibrations first, with benchmarks/calibrations.py")
        if members:
            file = part_file(options.parts, family)
            side_by_side(load_model(options.model), members, options.captions, results=file, keep_going=True)


def refusals(folder: Path) -> dict[str, str]:
    """Methods that could not be calibrated on this model, and why."""
    record = folder / "calibrations.json"
    known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    return {name: facts["refused"] for name, facts in known.items() if "refused" in facts}


def measure_front(results: Results, options: argparse.Namespace) -> None:
    """The rows of the front that cache, and what is given by name, on more captions: this process's share of them."""
    wanted = [row for row in front_of(results.methods) if row.flops_speedup > 1.1]
    methods = [*(c4d.method(row.method, **_given(row)) for row in wanted), *options.also]
    number, count = options.share
    mine = methods[number - 1 :: count]
    print(f"front, {number} of {count}: {len(mine)} rows", file=sys.stderr)
    file = part_file(options.parts, f"front {number} of {count}")
    side_by_side(load_model(options.model), mine, options.front, results=file)


def front_parts(folder: Path) -> list[Results]:
    """What was measured of the front, if all of it was; of several divisions, the newest."""
    found = []
    for first in folder.glob("front-1-of-*.json"):
        count = int(first.stem.split("-")[-1])
        files = [part_file(folder, f"front {number} of {count}") for number in range(1, count + 1)]
        if all(file.exists() for file in files):
            found.append((max(file.stat().st_mtime for file in files), [Results.load(file) for file in files]))
    return max(found, key=lambda each: each[0])[1] if found else []


def _given(row: Row) -> dict[str, object]:
    """Settings of a row, as the method takes them: JSON knows no tuples."""

    def plain(value: object) -> object:
        return tuple(map(plain, value)) if isinstance(value, list) else value

    return {name: plain(value) for name, value in row.settings.items()}


# --- pages ------------------------------------------------------------------------------------------------------------


def beats_fewer_steps(row: Row) -> bool:
    """Whether more than half of all captions are closer to the uncached image than with fewer steps of its FLOPs."""
    return row.psnr_wins_interval is not None and row.psnr_wins_interval[0] > 0.5


def loses_accuracy(row: Row) -> bool:
    """Whether the interval of its difference to the uncached accuracy lies below zero."""
    return row.accuracy_difference_interval is not None and row.accuracy_difference_interval[1] < 0


def is_broken(row: Row) -> bool:
    """Whether it is no use here: less accurate for certain, or no closer than fewer steps of its FLOPs."""
    return loses_accuracy(row) or (row.psnr_wins is not None and row.psnr_wins <= 0.5)


def overview(results: Results) -> list[str]:
    """A line per method: what it reaches, where it beats fewer steps, and where it breaks."""
    lines = [
        "| method | fidelity | gentle | middle | hard | beats fewer steps | breaks |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(row.method for row in results.methods):
        rows = [row for row in results.methods if row.method == name]
        cells = [f"{speedup(row.flops_speedup)}, {decibels(row.psnr)} dB" for row in rows]
        cells += ["–"] * (3 - len(cells))
        wins = [speedup(row.flops_speedup) for row in rows if beats_fewer_steps(row)]
        broken = next((row for row in rows if is_broken(row)), None)
        words = "–"
        if broken is not None:
            words = f"{speedup(broken.flops_speedup)}: "
            words += f"{points(broken.accuracy_difference)} points, {percent(broken.psnr_wins)} wins"
        is_compared = any(row.psnr_wins is not None for row in rows)
        cells = [f"`{name}`", rows[0].fidelity, *cells, ", ".join(wins) or ("never" if is_compared else "–"), words]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def front_table(rows: Iterable[Row]) -> list[str]:
    """The rows, with everything that a choice needs."""
    lines = [
        "| method | fidelity | full / steps | FLOPs | latency | PSNR dB | Δ points | PSNR wins |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| `{row.name}` | {row.fidelity} | {steps(row)} | {speedup(row.flops_speedup)} | "
        f"{speedup(row.latency_speedup)} | {decibels(row.psnr)} | "
        f"{points(row.accuracy_difference, row.accuracy_difference_interval)} | {percent(row.psnr_wins)} |"
        for row in rows
    ]
    return lines


def drawing(results: Results) -> str:
    """Every row by what it saves and how close it stays; the text of an SVG file."""

    def places(rows: Iterable[Row]) -> list[tuple[float, float]]:
        return sorted((row.flops_speedup, row.psnr) for row in rows)

    lines = {"fewer steps": places(results.fewer_steps), "front": places(front_of(results.methods))}
    title = f"{results.conditions.denoiser}, {results.conditions.captions} captions"
    return Figure("FLOPs speed-up", "PSNR in dB", {"methods": places(results.methods)}, lines).svg(title)


def page(results: Results, picture: str) -> str:
    """All methods; ``picture`` is the name of their `drawing`."""
    methods = results.methods
    winners = {row.method for row in methods if beats_fewer_steps(row)}
    names = list(dict.fromkeys(row.method for row in methods))
    losers = dict.fromkeys(row.method for row in methods if row.psnr_wins is not None and row.method not in winners)
    lines = [
        f"# All methods on {results.conditions.denoiser}",
        "",
        f"{len(names)} methods at {len(methods)} settings, from gentle to hard: the ladder that `c4d show METHOD` "
        "prints. No method is left out because it does badly. What is written here holds for this denoiser: a small "
        "one, guided by two calls, which changes more from step to step than a large one; settings published for large "
        "models are often too coarse for it. Written by `benchmarks/everything.py`.",
        "",
        results.conditions.caption(),
        "",
        "*Beats fewer steps*: settings at which more than half of all captions (the lower end of the 95 % interval is "
        "above one half) are closer to the uncached image than with fewer steps that cost as many FLOPs. *Breaks*: the "
        "first setting at which accuracy is lost for certain, or half of the captions or fewer are closer. Latencies "
        "are medians of few batches: where other work is on the machine they scatter by a third, FLOPs do not.",
        "",
        f"{len(winners)} methods beat fewer steps at one setting or more; never: "
        f"{', '.join(f'`{name}`' for name in losers) or 'none'}.",
        "",
        f"![PSNR against FLOPs speed-up]({picture})",
        "",
        "## The front",
        "",
        "Rows that no other one beats in FLOPs and PSNR at once, fewer steps included.",
        "",
        *front_table(front_of([*results.fewer_steps, *methods])),
        "",
    ]
    for family in FAMILIES:
        mine = [row for row in methods if c4d.METHODS[row.method].info.family == family]
        if mine:
            part = results.model_copy(update={"rows": [results.baseline, *mine]})
            lines += [f"## {family[0].upper()}{family[1:]}", "", *overview(part), ""]
    lines += ["## Every row", "", markdown_table(results)]
    return "\n".join(lines)


def front_page(results: Results, whole: str) -> str:
    """The front, measured again; ``whole`` is the name of the `page`."""
    return "\n".join(
        [
            f"# The front on {results.conditions.captions} captions",
            "",
            f"The rows of [all methods]({whole}) that no other one beats in FLOPs and PSNR at once, measured on "
            "more captions, beside fewer steps of at least their FLOPs. Differences are paired, in points of accuracy "
            "with 95 % intervals. Written by `benchmarks/everything.py --front`.",
            "",
            markdown_table(results),
        ]
    )


def _share(text: str) -> tuple[int, int]:
    number, count = map(int, text.split("/"))
    if not 1 <= number <= count:
        raise ValueError(text)
    return number, count


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-flux", help="a reference model")
    parser.add_argument("--captions", type=int, default=64, help="of all methods")
    parser.add_argument("--families", help="comma-separated; all by default")
    parser.add_argument("--calibrations", type=Path, help="a folder made by calibrations.py; out/calibrations[-MODEL]")
    parser.add_argument("--parts", type=Path, help="a folder for the families' results; out/everything[-MODEL]")
    parser.add_argument("--front", type=int, nargs="?", const=480, metavar="CAPTIONS", help="measure the front again")
    parser.add_argument("--share", type=_share, default=(1, 1), metavar="K/N", help="of the front, in this process")
    parser.add_argument("--also", action="append", default=[], metavar="METHOD", help="beside the front")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument("--write", metavar="STEM", help="STEM.json and STEM.md; docs/benchmarks/all-methods[-MODEL]")
    options = parser.parse_args(arguments)
    suffix = "" if options.model == parser.get_default("model") else f"-{options.model}"
    options.calibrations = options.calibrations or Path(f"out/calibrations{suffix}")
    options.parts = options.parts or Path(f"out/everything{suffix}")
    options.write = options.write or f"docs/benchmarks/all-methods{suffix}"
    options.families = options.families.split(",") if options.families else list(FAMILIES)
    unknown = [family for family in options.families if family not in FAMILIES]
    if unknown:
        parser.error(f"--families {','.join(unknown)}: use some of {', '.join(FAMILIES)}")
    if not options.page and options.front is None:
        measure_families(options)
    parts = [part_file(options.parts, family) for family in FAMILIES]
    parts = [Results.load(file) for file in parts if file.exists()]
    whole = merged(parts, refusals(options.calibrations)) if parts else Results.load(f"{options.write}.json")
    whole.save(f"{options.write}.json")
    drawn = Path(f"{options.write}.svg")
    drawn.write_text(drawing(whole), encoding="utf-8")
    drawn.with_suffix(".md").write_text(page(whole, drawn.name), encoding="utf-8")
    if options.front is not None:
        measure_front(whole, options)
    again, fronts = Path(f"{options.write}-front.json"), front_parts(options.parts)
    if fronts:
        merged(fronts).save(again)
    if again.exists():
        again.with_suffix(".md").write_text(front_page(Results.load(again), f"{drawn.stem}.md"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
