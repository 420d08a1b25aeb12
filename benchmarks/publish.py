"""Put measured results into the README and the docs, so that no number there is typed by hand.

    python benchmarks/publish.py out/results.json --readme README.md
    python benchmarks/publish.py results.json --page docs/benchmarks/scenes-flux.md --title "480 captions"

The README gets a short table between its two ``results`` markers; a page gets every column.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cache4diffusion import method
from cache4diffusion.measure import Results, markdown_table
from cache4diffusion.measure.results import Row
from cache4diffusion.measure.table import decibels, percent, points, size, speedup, steps
from cache4diffusion.method import METHODS

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def changed_settings(row: Row) -> str:
    """The settings that differ from the method's defaults: ``interval=6, warmup=10``."""
    defaults = method(row.method).settings if row.method in METHODS else {}
    return ", ".join(f"{name}={value}" for name, value in row.settings.items() if defaults.get(name) != value)


def short_table(results: Results) -> str:
    """The columns that a first look needs; *expected* is the speed-up of the latency on its left."""
    lines = [
        "| method | fidelity | full / steps | FLOPs | latency | expected | PSNR dB | accuracy | difference, points | "
        "PSNR wins | cache |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results.rows:
        settings = changed_settings(row) if row.kind == "method" else ""
        cells = [
            f"`{row.method}({settings})`" if settings else f"`{row.method}`",
            row.fidelity,
            steps(row),
            speedup(row.flops_speedup),
            speedup(row.latency_speedup),
            speedup(row.predicted_latency_speedup),
            decibels(row.psnr),
            percent(row.accuracy),
            points(row.accuracy_difference, row.accuracy_difference_interval),
            percent(row.psnr_wins),
            size(row.cache_bytes),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def into_readme(text: str, results: Results, introduction: str) -> str:
    """``text`` with a new block between the markers.

    Raises:
        ValueError: a marker is missing.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the file needs {BEGIN} and {END} once each, in this order")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    body = [introduction, "", short_table(results), "", f"<sub>{results.conditions.caption()}</sub>"]
    return before + "\n".join([BEGIN, *body, END]) + after


def page(results: Results, title: str, introduction: str) -> str:
    """A page with every column, and the accuracy per family of every row."""
    lines = [f"# {title}", "", introduction, "", markdown_table(results)]
    families = list(results.rows[0].accuracy_by_family or {})
    if families:
        lines += ["## Accuracy per family", "", f"| method | {' | '.join(families)} |"]
        lines.append("| --- |" + " ---: |" * len(families))
        for row in results.rows:
            own = row.accuracy_by_family or {}
            lines.append(f"| {row.name} | " + " | ".join(percent(own.get(family)) for family in families) + " |")
    strips = [row for row in results.rows if row.kind == "method"]
    lines += ["", "## Strips", "", "```", *[f"{row.strip}  {row.name}" for row in strips], "```", ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a results.json of c4d bench or c4d demo")
    parser.add_argument("--readme", type=Path, help="the file whose block is replaced")
    parser.add_argument("--page", type=Path, help="the page to write")
    parser.add_argument("--title", default="Results")
    parser.add_argument("--introduction", default="", help="a sentence or two above the table")
    args = parser.parse_args(argv)
    results = Results.load(args.results)
    if args.readme:
        text = args.readme.read_text(encoding="utf-8")
        args.readme.write_text(into_readme(text, results, args.introduction), encoding="utf-8")
    if args.page:
        args.page.write_text(page(results, args.title, args.introduction), encoding="utf-8")


if __name__ == "__main__":
    main()
