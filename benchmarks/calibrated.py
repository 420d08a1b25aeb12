"""Calibrated methods beside what needs no calibration, at equal FLOPs: was it worth it, and did the verdict say so?

    python benchmarks/calibrated.py                           # docs/benchmarks/calibrated.json and .md
    python benchmarks/calibrated.py --methods l2c,lazydit

Each method runs with a calibration made by ``c4d calibrate`` (see `calibrations.py`) beside its *counterpart*: the same
method with numbers that were not measured here, or else the nearest uncalibrated one. Of the counterpart's settings the
one is taken whose FLOPs, counted on two captions, are closest. A method *loses* where half of the captions or fewer are
closer to the uncached image than with its counterpart; then the tool must not have called it sound: both the fit and
the trial have a say in that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cache4diffusion as c4d
from cache4diffusion.calibration import load_calibration
from cache4diffusion.cli.models import load_model
from cache4diffusion.files import check_writable, write_whole
from cache4diffusion.measure import Row
from cache4diffusion.measure.table import decibels, percent, points, speedup
from calibrations import SETTINGS
from equal_flops import Called, called, closest, wins
from side_by_side import side_by_side

SCHEMA = 1
REUSE = [
    *(("fora", {"interval": interval, "warmup": 50 - left}) for interval in (2, 3, 4) for left in range(4, 50, 2)),
    *(("fora", {"interval": interval}) for interval in range(2, 7)),
]
PAIRS: dict[str, tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]] = {
    "smoothcache": (SETTINGS["smoothcache"], REUSE),
    "icc": (SETTINGS["icc"], REUSE),
    "l2c": ({}, REUSE),
    "lazydit": ({}, REUSE),
    "teacache": (SETTINGS["teacache"], [("teacache", {"threshold": 0.02 * 1.15**i}) for i in range(28)]),
    "magcache": (SETTINGS["magcache"], [("magcache", {"threshold": 0.01 * 1.25**i}) for i in range(24)]),
    "fastcache": (SETTINGS["fastcache"], [("fbcache", {"threshold": 0.01 * 1.2**i}) for i in range(24)]),
}
"""A method: its settings, and what it is held against, the cheapest last."""


def measure(loaded: Any, names: Sequence[str], captions: int, folder: Path) -> dict[str, Any]:
    """Methods and their counterparts, all on the same captions."""
    pairs, variants = {}, {}
    for name in names:
        settings, others = PAIRS[name]
        file = folder / f"{name}.safetensors"
        chosen = c4d.method(name, **settings, calibration=str(file))
        other, rest = closest(loaded, chosen, sorted(others, key=_cost))
        pairs[name] = (chosen, c4d.method(other, **rest), settings, (other, rest), file)
        variants |= {repr(each): each for each in pairs[name][:2]}
        print(f"{name}: beside {other}({rest})", file=sys.stderr)
    results = side_by_side(loaded, list(variants.values()), captions, fewer_steps=False)
    rows = dict(zip(variants, results.methods, strict=True))
    return {
        "schema": SCHEMA,
        "conditions": results.conditions.model_dump(mode="json"),
        "caption": results.conditions.caption(),
        "pairs": [
            {"method": name, **pair_of(rows[repr(chosen)], rows[repr(other)], settings, call, file)}
            for name, (chosen, other, settings, call, file) in pairs.items()
        ],
    }


def pair_of(mine: Row, theirs: Row, settings: dict[str, Any], other: Called, file: Path) -> dict[str, Any]:
    """What the file says of a method and its counterpart."""
    made = load_calibration(file)
    share, interval = wins(mine, theirs)
    return {
        "settings": settings,
        "r2": made.entry.quality.r2,
        "verdict": made.verdict(),
        "is_sound": made.is_sound,
        "calibrated": facts_of(mine),
        "counterpart": {"method": other[0], "settings": other[1], **facts_of(theirs)},
        "wins": share,
        "wins_interval": interval,
    }


def _cost(other: tuple[str, dict[str, Any]]) -> float:
    """Falls with FLOPs."""
    settings = other[1]
    if "threshold" in settings:
        return settings["threshold"]
    warmup, interval = settings.get("warmup", 0), settings["interval"]
    return -(warmup + (50 - warmup) / interval)


def facts_of(row: Row) -> dict[str, Any]:
    return {
        "flops_speedup": row.flops_speedup,
        "latency_speedup": row.latency_speedup,
        "psnr": row.psnr,
        "accuracy_difference": row.accuracy_difference,
        "accuracy_difference_interval": row.accuracy_difference_interval,
        "strip": row.strip,
    }


def contradicts(pair: dict[str, Any]) -> bool:
    """Whether a method loses that its verdict called sound."""
    return pair["wins"] <= 0.5 and pair["is_sound"]


def page(result: dict[str, Any]) -> str:
    """The result as markdown."""
    lines = [
        "# Calibrated methods beside what needs no calibration",
        "",
        "Each with a calibration made by `c4d calibrate`, beside the same method with numbers that were not measured "
        "here, or else the nearest uncalibrated one, at the setting whose FLOPs are closest. *Wins*: share of captions "
        "whose image is closer to the uncached one than the counterpart's, with its 95 % interval. Written by "
        "`benchmarks/calibrated.py`.",
        "",
        result["caption"],
        "",
        "| method | R² | FLOPs | PSNR dB | Δ points | counterpart | FLOPs | PSNR dB | Δ points | wins |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for pair in result["pairs"]:
        cells = [called(pair["method"], pair["settings"]), "-" if pair["r2"] is None else f"{pair['r2']:.3f}"]
        for side in (pair["calibrated"], pair["counterpart"]):
            if side is pair["counterpart"]:
                cells.append(called(side["method"], side["settings"]))
            cells += [speedup(side["flops_speedup"]), decibels(side["psnr"])]
            cells.append(points(side["accuracy_difference"], side["accuracy_difference_interval"]))
        low, high = pair["wins_interval"]
        cells.append(f"{percent(pair['wins'])} [{100 * low:.0f}, {100 * high:.0f}]")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## What the tool said", ""]
    for pair in result["pairs"]:
        lines.append(f"- `{pair['method']}`, {'sound' if pair['is_sound'] else 'not called sound'}:")
        lines += [f"  - {line}" for line in pair["verdict"].splitlines()]
    wrong = [pair["method"] for pair in result["pairs"] if contradicts(pair)]
    lost = [pair["method"] for pair in result["pairs"] if pair["wins"] <= 0.5]
    lines += ["", f"Lost to its counterpart: {', '.join(f'`{name}`' for name in lost) or 'none'}."]
    lines += [f"**Called sound, and lost: {', '.join(f'`{name}`' for name in wrong)}.**" for _ in range(bool(wrong))]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-flux", help="a reference model")
    parser.add_argument("--methods", default=",".join(PAIRS), help="comma-separated")
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--calibrations", type=Path, default=Path("out/calibrations"), help="a folder")
    parser.add_argument("--write", metavar="STEM", default="docs/benchmarks/calibrated", help="STEM.json and STEM.md")
    options = parser.parse_args(arguments)
    names = options.methods.split(",")
    unknown = [name for name in names if name not in PAIRS]
    if unknown:
        parser.error(f"--methods {','.join(unknown)}: use some of {', '.join(PAIRS)}")
    file = Path(f"{options.write}.json")
    check_writable(file)
    result = measure(load_model(options.model), names, options.captions, options.calibrations)
    write_whole(file, json.dumps(result, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(result), encoding="utf-8")
    return int(any(contradicts(pair) for pair in result["pairs"]))


if __name__ == "__main__":
    sys.exit(main())
