"""What was found of every companion, as a table: put on before or after, on each kind of site.

    PYTHONPATH=tests python -m companions                              # all: docs/compatibility.json and .md
    PYTHONPATH=tests python -m companions --only "LoRA;tomesd" --write out/compatibility
    PYTHONPATH=tests python -m companions --resume                     # goes on with a file, companion by companion

The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import warnings
from collections import Counter
from typing import Any

import diffusers
import pytest
import torch

import cache4diffusion as c4d
from cache4diffusion.files import check_writable, write_whole
from companions.cases import COMPANIONS
from companions.companion import ORDERS, Companion, version_of
from companions.conformance import CHECKS, SLACK, check_refused
from scripts import script

kept = script("resume").kept

SCHEMA = 1
WORKS, REFUSED, ABSENT, FAILED = "works", "refused", "absent", "failed"
KINDS = ("whole", "span", "part")  # columns; a U-Net has levels in the place of spans
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def row_of(companion: Companion) -> dict[str, Any]:
    """The outcome of one companion in both orders on every kind of site."""
    cells: dict[str, dict[str, Any]] = {}
    for order in ORDERS:
        for site in companion.subject.methods:
            cells[f"{order} {site}"] = cell_of(companion, order, site)
    return {
        "companion": companion.name,
        "how": companion.how,
        "needs": companion.needs,
        "version": version_of(companion.needs) if companion.needs is not None else None,
        "cells": cells,
    }


def cell_of(companion: Companion, order: str, site: str) -> dict[str, Any]:
    """One check, whatever it comes to."""
    if companion.absence is not None:
        return {"outcome": ABSENT, "words": companion.absence}
    try:
        if companion.refusal(order, site) is not None:
            return {"outcome": REFUSED, "words": check_refused(companion, order, site)}
        found = CHECKS[order](companion, site)
    except (Exception, pytest.fail.Exception) as error:  # whatever goes wrong is a finding
        return {"outcome": FAILED, "words": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    error, apart = (float(f"{value:.2g}") for value in (found.error, found.apart))
    return {"outcome": WORKS, "strip": found.strip, "error": error, "apart": apart}


def conditions() -> dict[str, Any]:
    packages = sorted({c.needs for c in COMPANIONS.values() if c.needs is not None} - set(PACKAGES))
    return {
        "device": f"cpu, {torch.get_num_threads()} thread(s), {platform.machine()}",
        "weights": "random",
        "pipelines": {"FLUX": "9 steps", "Stable Diffusion (tomesd)": "9 steps, guided"},
        "methods": {
            site: f"{name}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"
            for companion in COMPANIONS.values()
            for site, (name, settings, _) in companion.subject.methods.items()
        },
        "slack": SLACK,
        "versions": {
            "cache4diffusion": c4d.__version__,
            "python": platform.python_version(),
            **{name: version_of(name) for name in (*PACKAGES, *packages)},
        },
    }


def page(result: dict[str, Any]) -> str:
    """The result as markdown."""
    rows, told = result["rows"], result["conditions"]
    versions = ", ".join(f"{name} {version or '(not here)'}" for name, version in told["versions"].items())
    outcomes = Counter(cell["outcome"] for row in rows for cell in row["cells"].values())
    methods = "; ".join(f"{site}: `{method}`" for site, method in told["methods"].items())
    pipelines = "; ".join(f"{name}, {words}" for name, words in told["pipelines"].items())
    lines = [
        "# Living with others",
        "",
        f"What else people put on a pipeline, before `accelerate` and after it: {len(rows)} companions, **"
        f"{outcomes[WORKS]} checks passed, {outcomes[FAILED]} failed**; {outcomes[REFUSED]} are refused with a reason, "
        f"{outcomes[ABSENT]} could not be made here. Written by `make compatibility`.",
        "",
        f"Tiny stock pipelines with random weights ({pipelines}) on {told['device']}: what needs an accelerator "
        "(streams, pinned memory, kernels of its own) is not tested here, and offload has the CPU for its accelerator; "
        "weights that are away are on the meta device, or NaN. What is compiled is compiled with the backend `eager`. "
        f"{versions}.",
        "",
        "Each check: with the method off the output is bit-equal to the companion's alone; with caching on the strip "
        "is the method's own, the second run equals the first, and the output is as near to the method's without the "
        f"companion as the companion's own error allows (at most {told['slack']:g} times); `remove()` gives back what "
        "was found. *After* means: attached and run, then put on; it comes to the same, bit for bit, as put on first. "
        "What can be taken away again is, while attached, and the method goes on as before. In a cell: how far it is "
        "from the method alone, relative; in the second column: how far the companion alone is from the plain one.",
        "",
        f"The methods: {methods}.",
        "",
        "| companion | own error | how | before: whole | before: span or level | before: part | after: whole | after: "
        "span or level | after: part |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    sentences: list[str] = []
    for row in rows:
        cells = [_cell(row["cells"], order, kind, sentences) for order in ORDERS for kind in KINDS]
        errors = [cell["error"] for cell in row["cells"].values() if cell["outcome"] == WORKS]
        version = f" {row['version']}" if row["version"] else ""
        name = row["companion"] + (f" ({row['needs']}{version})" if row["needs"] else "")
        lines.append(f"| {' | '.join([name, f'{errors[0]:g}' if errors else '', row['how'], *cells])} |")
    lines += ["", "## What is refused, and what is not here", ""]
    lines += [f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1)] or ["Nothing."]
    lines += ["", "## What failed", ""]
    lines += [
        f"- {row['companion']}, {place}: {cell['words']}"
        for row in rows
        for place, cell in row["cells"].items()
        if cell["outcome"] == FAILED
    ] or ["Nothing."]
    return "\n".join(lines) + "\n"


def _cell(cells: dict[str, Any], order: str, kind: str, sentences: list[str]) -> str:
    key = f"{order} {kind}"
    cell = cells[key] if key in cells else cells[f"{order} level"]
    if cell["outcome"] == WORKS:
        return f"works ({cell['apart']:g})" if cell["apart"] else "works"
    if cell["outcome"] == FAILED:
        return "**failed**"
    if cell["words"] not in sentences:
        sentences.append(cell["words"])
    word = "refused" if cell["outcome"] == REFUSED else "not here"
    return f"{word} [{sentences.index(cell['words']) + 1}]"


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of companions, between semicolons; all by default")
    parser.add_argument("--resume", action="store_true", help="keep the companions that are there, check the rest")
    parser.add_argument("--write", metavar="STEM", default="docs/compatibility", help="STEM.json and STEM.md")
    options = parser.parse_args(arguments)
    options.only = options.only.split(";") if options.only else list(COMPANIONS)
    unknown = set(options.only) - set(COMPANIONS)
    if unknown:
        parser.error(f"--only {';'.join(sorted(unknown))}: use some of {'; '.join(COMPANIONS)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    check_writable(f"{options.write}.json")
    told = conditions()
    rows = kept(options.write, SCHEMA, told) if options.resume else []
    known = {row["companion"] for row in rows}
    result = {"schema": SCHEMA, "conditions": told, "rows": rows}
    for name in options.only:
        if name not in known:
            row = row_of(COMPANIONS[name])
            rows.append(row)
            outcomes = Counter(cell["outcome"] for cell in row["cells"].values())
            print(f"{name}: {', '.join(f'{count} {word}' for word, count in outcomes.items())}", file=sys.stderr)
        rows.sort(key=lambda row: list(COMPANIONS).index(row["companion"]))
        write_whole(f"{options.write}.json", json.dumps(result, indent=1) + "\n")
        write_whole(f"{options.write}.md", page(result))
    failed = sum(cell["outcome"] == FAILED for row in rows for cell in row["cells"].values())
    print(f"{sum(len(row['cells']) for row in rows)} checks, {failed} failed: {options.write}.md")
    return 1 if failed else 0
