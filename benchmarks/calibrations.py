"""Calibrations of every method that takes one, on a reference model; small ones can be shipped with the library.

    python benchmarks/calibrations.py                               # all, into out/calibrations
    python benchmarks/calibrations.py --model scenes-sd             # of another one, into out/calibrations-scenes-sd
    python benchmarks/calibrations.py --methods l2c,lazydit
    python benchmarks/calibrations.py --again                       # the fits that are there, with a new trial
    python benchmarks/calibrations.py --ship 2000000                # and ship what fits into so many bytes

Prompts are captions of the reference model that no benchmark is judged by. Beside the files comes
``calibrations.json``: how each was made, its verdict, R², seconds and size; or why a method cannot be calibrated on
this model. Run it anew after the weights have changed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import cache4diffusion as c4d
from cache4diffusion import data
from cache4diffusion.calibration import Calibration, load_calibration
from cache4diffusion.calibration.run import try_out
from cache4diffusion.cli.models import Model, captions_for, load_model
from cache4diffusion.errors import AnatomyError, CompositionError
from cache4diffusion.files import check_writable, write_whole

SEED = 1000  # of the first caption and its noise; benchmarks begin at 0
CAPTIONS = 16
# Trainings and searches go over fewer captions, again and again. Their rates and prices were chosen here: published
# prices belong to published models, and with them nothing would be cached.
TRAINED = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "l2c": {"runs": 16, "rate": 0.2, "price": 1e-4},
    "lazydit": {"runs": 16, "rate": 1e-3, "price": 1e-3},
    "harmonica": {"runs": 16, "rate": 0.2, "price": 1e-6, "refresh": 8},
    "block-caching": {"runs": 12, "rate": 0.02, "threshold": 0.2},
    "md-dit": {"runs": 12, "rate": 0.02},
    "tokencache": {"runs": 16, "rate": 0.2},
    "l2p": {"interval": 6, "warmup": 10},
    "dato": {"population": 12, "generations": 6},
    "icc": {"rank": 32},
    "cachequant": {"unit": "span"},
}
# What is tried, where that is not the default: settings at which something is cached here.
SETTINGS: dict[str, dict[str, Any]] = {
    "smoothcache": {"threshold": 0.15},
    "teacache": {"threshold": 0.1},
    "magcache": {"threshold": 0.12},
    "fastcache": {"threshold": 0.2},
    "icc": {"interval": 2},
}
TRIED = 8  # captions
# What ships, the most wanted first, as long as there is room.
WANTED = (
    *("smoothcache", "teacache", "magcache", "l2c", "lazydit", "dpcache", "lemica", "harmonica", "l2p", "taocache"),
    *("bacache", "md-dit", "block-caching", "fastcache", "icc", "asymrnr", "tokencache", "cachequant", "dato"),
)


def made_for(model: Model, name: str) -> tuple[Calibration, dict[str, Any]]:
    """A calibration, and how it was made.

    Raises:
        AnatomyError, CompositionError: the method cannot serve this model.
    """
    options = OPTIONS.get(name, {})
    count = TRAINED if {"runs", "generations"} & options.keys() else CAPTIONS
    begun, captions = time.perf_counter(), captions_for(model, count, None, SEED)[0]
    made = c4d.calibrate(model.pipe, name, captions, seeds=SEED, steps=model.steps, call=model.call, trial=0, **options)
    facts = {
        "method": name,
        "options": options,
        "captions": count,
        "seeds": f"{SEED}..{SEED + count - 1}",
        "steps": model.steps,
        "seconds": round(time.perf_counter() - begun, 1),
        "quality": {key: asdict(entry.quality) for key, entry in made.entries.items()},
    }
    return made, facts


def tried(model: Model, made: Calibration) -> Calibration:
    """The calibration with a trial, on as many captions for every method."""
    method = c4d.method(made.method, **SETTINGS.get(made.method, {}), calibration=made)
    captions = captions_for(model, TRIED, None, SEED)[0]
    trial = try_out(model.pipe, method, captions, seeds=SEED, steps=model.steps, call=model.call)
    return replace(made, trial=trial)


def slim(made: Calibration) -> Calibration:
    """Without the sums, which only merging needs, and in single precision."""
    entries = {
        name: replace(entry, sums={}, fit={key: value.to(torch.float32) for key, value in entry.fit.items()})
        for name, entry in made.entries.items()
    }
    return replace(made, entries=entries)


def ship(folder: Path, model: str, room: int) -> list[str]:
    """Copy what is wanted into the library, as long as there is room for it; returns what was shipped."""
    target = Path(data.__file__).parent / "calibrations" / model
    target.mkdir(parents=True, exist_ok=True)
    shipped = []
    for name in WANTED:
        file = target / f"{name}.safetensors"
        file.unlink(missing_ok=True)
        source = folder / f"{name}.safetensors"
        if not source.exists():
            continue
        slim(load_calibration(source)).save(file)
        if file.stat().st_size > room:
            file.unlink()
            continue
        room -= file.stat().st_size
        shipped.append(name)
    return shipped


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-flux", help="a reference model")
    parser.add_argument("--methods", help="comma-separated; all that take a calibration by default")
    parser.add_argument("--out", type=Path, help="a folder; out/calibrations[-MODEL]")
    parser.add_argument("--again", action="store_true", help="fit nothing: try those of the folder anew")
    parser.add_argument("--ship", type=int, metavar="BYTES", help="also ship those of the folder that fit")
    options = parser.parse_args(arguments)
    suffix = "" if options.model == parser.get_default("model") else f"-{options.model}"
    options.out = options.out or Path(f"out/calibrations{suffix}")
    takes = sorted(name for name, cls in c4d.METHODS.items() if cls.calibrator is not None)
    names = options.methods.split(",") if options.methods is not None else takes
    unknown = [name for name in names if name and name not in takes]
    if unknown:
        parser.error(f"--methods {','.join(unknown)}: takes no calibration; use some of {', '.join(takes)}")
    record = options.out / "calibrations.json"
    check_writable(record)
    known = json.loads(record.read_text()) if record.exists() else {}
    model = load_model(options.model)
    for name in filter(None, names):
        file = options.out / f"{name}.safetensors"
        try:
            made, facts = (load_calibration(file), known[name]) if options.again else made_for(model, name)
        except (AnatomyError, CompositionError) as error:
            known[name] = {"method": name, "refused": str(error)}
            write_whole(record, json.dumps(known, indent=1) + "\n")
            print(f"{name}: refused: {error}", file=sys.stderr)
            continue
        made = tried(model, made)
        made.save(file)
        known[name] = {**facts, "bytes": file.stat().st_size, "trial": asdict(made.trial) if made.trial else None}
        write_whole(record, json.dumps(known, indent=1) + "\n")
        print(f"{name}: {facts['seconds']} s, {file.stat().st_size} bytes, {made.verdict()}", file=sys.stderr)
    if options.ship is not None:
        print("shipped:", ", ".join(ship(options.out, options.model, options.ship)) or "nothing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
