"""What was found in every case, as a table: counts per pipeline, scheduler and kind of site.

    PYTHONPATH=tests python -m pipelines                                   # all: docs/benchmarks/pipelines.json and .md
    PYTHONPATH=tests python -m pipelines --cases flux,wan2.2 --write out/pipelines
    PYTHONPATH=tests python -m pipelines --resume                          # goes on with a file, case by case

The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections import Counter
from typing import Any

import diffusers
import pytest
import torch

from cache4diffusion.files import check_writable, write_whole
from cache4diffusion.measure.bench import versions
from pipelines.absent import absent
from pipelines.case import Case
from pipelines.cases import CASES
from pipelines.conformance import METHODS, check, check_refused
from scripts import script

kept = script("resume").kept

SCHEMA = 1
PASSED, REFUSED, FAILED = "passed", "refused", "failed"


def row_of(case: Case) -> dict[str, Any]:
    """The outcome of one case on every kind of site."""
    pipe = case.pipe()
    found: dict[str, Any] = {
        "case": case.name,
        "pipeline": type(pipe).__name__,
        "scheduler": scheduler_of(pipe),
        "task": case.task,
        "guidance": case.guidance,
        "exercises": case.exercises,
        "sites": {},
    }
    for site in case.sites:
        try:
            if site in case.without:
                check_refused(case, site, case.without[site])
                found["sites"][site] = {"outcome": REFUSED, "words": case.without[site]}
            else:
                counts = check(case, site)
                found["sites"][site] = {
                    "outcome": PASSED,
                    "calls": counts.calls,
                    "full": counts.full,
                    "strips": counts.strips,
                }
        except (Exception, pytest.fail.Exception) as error:  # whatever goes wrong is a finding
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            found["sites"][site] = {"outcome": FAILED, "words": words}
    return found


def scheduler_of(pipe: Any) -> str:
    """Class of the scheduler, with what makes it another solver."""
    scheduler = pipe.scheduler
    config, told = scheduler.config, []
    told += ["Karras"] if config.get("use_karras_sigmas") else []
    told += [config["algorithm_type"]] if "sde" in str(config.get("algorithm_type", "")) else []
    told += ["flow"] if config.get("use_flow_sigmas") else []
    told += ["no Runge-Kutta steps"] if config.get("skip_prk_steps") else []
    name = type(scheduler).__name__.removesuffix("Scheduler")
    return f"{name} ({', '.join(told)})" if told else name


def conditions() -> dict[str, Any]:
    return {
        "device": f"cpu, {torch.get_num_threads()} thread(s), {platform.machine()}",
        "weights": "random",
        "methods": {site: f"{tried.method}({_settings(tried.settings)})" for site, tried in METHODS.items()},
        "versions": versions(),
    }


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def page(result: dict[str, Any]) -> str:
    """The result as markdown."""
    rows, told = result["rows"], result["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    outcomes = Counter(site["outcome"] for row in rows for site in row["sites"].values())
    pipelines = dict.fromkeys(row["pipeline"] for row in rows)
    schedulers = dict.fromkeys(row["scheduler"] for row in rows)
    methods = "; ".join(f"{site}: `{method}`" for site, method in told["methods"].items())
    lines = [
        "# Stock pipelines, case by case",
        "",
        f"{len(rows)} cases of {len(pipelines)} pipeline classes under {len(schedulers)} schedulers, with tiny random "
        f"components: **{outcomes[PASSED]} checks passed, {outcomes[FAILED]} failed**, {outcomes[REFUSED]} kinds of "
        f"sites are refused with the reason. {told['device']}. {versions}. Written by `make pipelines`.",
        "",
        "Each check: off is bit-equal to the plain pipeline; a caching run computes in its full calls exactly what the "
        "plain one does, and in cached calls nothing that the method says rests (counted, module by module); a second "
        "run equals the first; nothing is left attached, and the pipeline is what it was. In a cell: full calls of all "
        "calls of the denoiser, in one run.",
        "",
        f"The methods: {methods}.",
        "",
        "| case | pipeline | scheduler | task | guidance | what is special | whole | span or level | part |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sites = row["sites"]
        cells = [_cell(sites, "whole"), _cell(sites, "span", "level"), _cell(sites, "part")]
        words = [row["case"], f"`{row['pipeline']}`", row["scheduler"], row["task"], row["guidance"], row["exercises"]]
        lines.append(f"| {' | '.join([*words, *cells])} |")
    lines += [
        "",
        "## Counts",
        "",
        "| pipeline | cases | checks passed | calls | of them full |",
        "|---|---|---|---|---|",
    ]
    lines += _sums(rows, "pipeline")
    lines += ["", "| scheduler | cases | checks passed | calls | of them full |", "|---|---|---|---|---|"]
    lines += _sums(rows, "scheduler")
    lines += ["", "## What failed", ""]
    lines += [
        f"- {row['case']}, {site}: {found['words']}"
        for row in rows
        for site, found in row["sites"].items()
        if found["outcome"] == FAILED
    ] or ["Nothing."]
    lines += ["", "## What is refused", ""]
    lines += [
        f"- {row['case']}, {site}: {found['words']}"
        for row in rows
        for site, found in row["sites"].items()
        if found["outcome"] == REFUSED
    ] or ["Nothing."]
    lines += ["", "## What cannot be had here", ""]
    lines += [f"- {words}: {', '.join(f'`{name}`' for name in names)}" for words, names in result["absent"].items()]
    return "\n".join(lines) + "\n"


def _cell(sites: dict[str, Any], *kinds: str) -> str:
    found = next((sites[kind] for kind in kinds if kind in sites), None)
    if found is None:
        return ""
    return f"{found['full']} of {found['calls']}" if found["outcome"] == PASSED else found["outcome"]


def _sums(rows: list[dict[str, Any]], key: str) -> list[str]:
    lines = []
    for name in sorted({row[key] for row in rows}):
        mine = [row for row in rows if row[key] == name]
        passed = [site for row in mine for site in row["sites"].values() if site["outcome"] == PASSED]
        calls, full = (sum(site[what] for site in passed) for what in ("calls", "full"))
        lines.append(f"| `{name}` | {len(mine)} | {len(passed)} | {calls} | {full} |")
    return lines


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help="comma-separated; all by default")
    parser.add_argument("--resume", action="store_true", help="keep the cases that are there, check the rest")
    parser.add_argument("--write", metavar="STEM", default="docs/benchmarks/pipelines", help="STEM.json and STEM.md")
    options = parser.parse_args(arguments)
    options.cases = options.cases.split(",") if options.cases else list(CASES)
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"--cases {','.join(sorted(unknown))}: use some of {', '.join(CASES)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    diffusers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    check_writable(f"{options.write}.json")
    told = conditions()
    rows = kept(options.write, SCHEMA, told) if options.resume else []
    known = {row["case"] for row in rows}
    result = {"schema": SCHEMA, "conditions": told, "rows": rows, "absent": absent()}
    for name in options.cases:
        if name in known:
            continue
        rows.append(row_of(CASES[name]))
        outcomes = ", ".join(f"{site} {found['outcome']}" for site, found in rows[-1]["sites"].items())
        print(f"{name}: {outcomes}", file=sys.stderr)
        write_whole(f"{options.write}.json", json.dumps(result, indent=1) + "\n")
        write_whole(f"{options.write}.md", page(result))
    failed = sum(found["outcome"] == FAILED for row in rows for found in row["sites"].values())
    print(f"{sum(len(row['sites']) for row in rows)} checks, {failed} failed: {options.write}.md")
    return 1 if failed else 0
