"""Does it pay to compute some tokens between full steps, and does it matter which? ToCa, DuCa and ClusCa judged.

    python benchmarks/tokens.py                                # scenes-pixart, 256 image tokens
    python benchmarks/tokens.py --model scenes-flux --size 256 # four times the tokens that it was trained on
    python benchmarks/tokens.py --model scenes-dit
    python benchmarks/tokens.py --page                         # docs/benchmarks/tokens.md from what is measured

Each rule runs at several intervals and with each of its scores, beside FORA and TaylorSeer at the settings whose FLOPs,
counted on two captions, are closest: what the same FLOPs buy without a token rule. All run on the same captions. A rule
is *better* where the 95 % interval of its wins over the other lies above one half, *worse* where it lies below.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cache4diffusion as c4d
from cache4diffusion.cli.models import Model, load_model
from cache4diffusion.files import check_writable, write_whole
from cache4diffusion.measure import Row
from cache4diffusion.measure.table import decibels, percent, speedup
from equal_flops import Called, called, closest, intervals, wins
from side_by_side import side_by_side

SCHEMA = 1
INTERVALS = (2, 4, 6)
SCORES = {"toca": ("attention", "value_norm", "random"), "duca": ("attention", "value_norm", "random"), "clusca": ()}
"""A rule, and its scores: what it would be by importance first, then what needs no attention map, then none."""
OTHERS = ("fora", "taylorseer")
PLACE = Path("docs/benchmarks")


def rules() -> Iterator[Called]:
    """Every rule at every interval with every score."""
    for name, scores in SCORES.items():
        for interval in INTERVALS:
            for score in scores or (None,):
                yield name, {"interval": interval, **({"score": score} if score else {})}


def measure(model: Model, captions: int) -> dict[str, Any]:
    """Every rule beside its counterparts, all on the same captions."""
    beside: list[tuple[Called, list[Called]]] = []
    for rule in rules():
        method = c4d.method(rule[0], **rule[1])
        beside.append((rule, [closest(model, method, intervals(name, model.steps)) for name in OTHERS]))
        print(called(*rule), "beside", ", ".join(called(*other) for other in beside[-1][1]), file=sys.stderr)
    everything = {called(*each): each for rule, others in beside for each in (rule, *others)}
    methods = [c4d.method(name, **settings) for name, settings in everything.values()]
    results = side_by_side(model, methods, captions, fewer_steps=False)
    rows = dict(zip(everything, results.methods, strict=True))
    table = [
        {
            "method": rule[0],
            "settings": rule[1],
            **facts_of(rows[called(*rule)]),
            "beside": [against(rows[called(*rule)], rows[called(*other)], other) for other in others],
            "over_random": over_random(rule, rows),
        }
        for rule, others in beside
    ]
    return {
        "schema": SCHEMA,
        "model": model.name,
        "caption": results.conditions.caption(),
        "conditions": results.conditions.model_dump(mode="json"),
        "rows": table,
    }


def facts_of(row: Row) -> dict[str, Any]:
    return {
        "flops_speedup": row.flops_speedup,
        "latency_speedup": row.latency_speedup,
        "psnr": row.psnr,
        "accuracy": row.accuracy,
        "strip": row.strip,
    }


def against(mine: Row, theirs: Row, other: Called) -> dict[str, Any]:
    """What a file says of the other, and of the wins over it."""
    share, interval = wins(mine, theirs)
    return {"method": other[0], "settings": other[1], **facts_of(theirs), "wins": share, "wins_interval": interval}


def over_random(rule: Called, rows: dict[str, Row]) -> dict[str, Any] | None:
    """The same rule at random beside it; None where it is that, or has no scores."""
    name, settings = rule
    drawn = {**settings, "score": "random"}
    if settings.get("score", "random") == "random":
        return None
    return against(rows[called(*rule)], rows[called(name, drawn)], (name, drawn))


# --- the page ---------------------------------------------------------------------------------------------------------


def verdict(pair: dict[str, Any]) -> str:
    """How a rule compares with another row: better, worse, or neither."""
    low, high = pair["wins_interval"]
    return "better" if low > 0.5 else "worse" if high < 0.5 else "as good"


def share(pair: dict[str, Any]) -> str:
    low, high = pair["wins_interval"]
    return f"{percent(pair['wins'])} [{100 * low:.0f}, {100 * high:.0f}]"


def counted(pairs: list[dict[str, Any]]) -> str:
    """How often which verdict: ``better at 2, as good at 1, worse at 6 of 9``."""
    found = [verdict(pair) for pair in pairs]
    return ", ".join(f"{word} at {found.count(word)}" for word in ("better", "as good", "worse")) + f" of {len(found)}"


def section(result: dict[str, Any]) -> list[str]:
    """What was found on one model."""
    rows = result["rows"]
    lines = [f"## {result['model']}", "", result["caption"], ""]
    for name in SCORES:
        mine = [row for row in rows if row["method"] == name]
        for place, other in enumerate(OTHERS):
            lines.append(f"- `{name}` beside `{other}`: {counted([row['beside'][place] for row in mine])}.")
    for name, scores in SCORES.items():
        for score in scores[:-1]:
            pairs = [r["over_random"] for r in rows if r["method"] == name and r["settings"]["score"] == score]
            lines.append(f"- `{name}` by {score.replace('_', ' ')} beside random tokens: {counted(pairs)}.")
    lines += ["", "| rule | FLOPs | PSNR dB |" + "".join(f" {other} | FLOPs | PSNR dB | wins |" for other in OTHERS)]
    lines[-1] += " wins over random |"
    lines.append("| --- | ---: | ---: |" + " --- | ---: | ---: | ---: |" * len(OTHERS) + " ---: |")
    for row in rows:
        cells = [called(row["method"], row["settings"]), speedup(row["flops_speedup"]), decibels(row["psnr"])]
        for pair in row["beside"]:
            settings = ", ".join(f"{key}={value}" for key, value in pair["settings"].items())
            cells += [settings, speedup(pair["flops_speedup"]), decibels(pair["psnr"]), share(pair)]
        cells.append("-" if row["over_random"] is None else share(row["over_random"]))
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def page(results: list[dict[str, Any]]) -> str:
    """All models on one page."""
    lines = [
        "# Do single tokens pay, and does it matter which?",
        "",
        "ToCa, DuCa and ClusCa compute some tokens between full steps. Beside each stand FORA and TaylorSeer at the "
        "settings whose FLOPs are closest: what the same FLOPs buy without a token rule. ToCa and DuCa run by each of "
        "their scores; by *attention* and *value norm* they choose tokens that matter, at *random* they do not choose, "
        "which the second version of DuCa's paper finds no worse. *Wins*: share of captions whose image is closer to "
        "the uncached one, with its 95 % interval; *better* where that lies above one half, *worse* where it lies "
        "below, else *as good*. Written by `benchmarks/tokens.py`.",
        "",
    ]
    for result in results:
        lines += section(result)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-pixart", help="a reference model")
    parser.add_argument(
        "--size", type=int, metavar="PIXELS", help="of a side; what the model was trained on by default"
    )
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=PLACE, help="a folder for tokens-MODEL.json and tokens.md")
    options = parser.parse_args(arguments)
    if not options.page:
        model = load_model(options.model)
        if options.size is not None:
            sides = {"height": options.size, "width": options.size}
            model = replace(model, name=f"{model.name}-{options.size}", call={**model.call, **sides})
        file = options.out / f"tokens-{model.name}.json"
        check_writable(file)
        write_whole(file, json.dumps(measure(model, options.captions), indent=1) + "\n")
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(options.out.glob("tokens-*.json"))]
    write_whole(options.out / "tokens.md", page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
