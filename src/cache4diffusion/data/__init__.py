"""Tables of published numbers. Where each comes from, and under which licence, is in ``PROVENANCE.md`` beside this."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from cache4diffusion.errors import UnknownNameError, closest


@cache
def table(name: str) -> dict[str, Any]:
    """A table of this folder, by file name without ``.json``."""
    return json.loads(files("cache4diffusion.data").joinpath(f"{name}.json").read_text(encoding="utf-8"))


def teacache_coefficients(name: str) -> tuple[float, ...]:
    """A published set of TeaCache coefficients, highest power first; ``"identity"`` is ``(1, 0)``.

    Raises:
        UnknownNameError: no such set.
    """
    if name == "identity":
        return (1.0, 0.0)
    sets = table("teacache")["sets"]
    if name not in sets:
        raise UnknownNameError(
            f"TeaCache has no coefficients {name!r}{closest(name, sets) or '.'} Known: identity, {', '.join(sets)}."
        )
    return tuple(float(value) for value in sets[name]["coefficients"])


def teacache_thresholds() -> list[tuple[str, float, str]]:
    """Every published threshold: the set it belongs to, its value, and the speed-up it is published with, in words."""
    return [
        (name, float(threshold), note or f"threshold {threshold}")
        for name, entry in table("teacache")["sets"].items()
        for threshold, note in entry["thresholds"].items()
    ]


def magcache_ratios(name: str) -> tuple[float, ...]:
    """A published set of MagCache's magnitude ratios, one per step.

    Raises:
        UnknownNameError: no such set.
    """
    sets = table("magcache")["sets"]
    if name not in sets:
        raise UnknownNameError(
            f"MagCache has no ratios {name!r}{closest(name, sets) or '.'} Known: {', '.join(sets)}. For another "
            "denoiser give its own numbers, one per step."
        )
    return tuple(float(value) for value in sets[name]["ratios"])


def adacache_codebook(name: str) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """A published codebook of AdaCache: thresholds and rates; ``"off"`` is the one rate 1.

    Raises:
        UnknownNameError: no such codebook.
    """
    if name == "off":
        return (), (1,)
    books = table("adacache")["codebooks"]
    if name not in books:
        raise UnknownNameError(
            f"AdaCache has no codebook {name!r}{closest(name, books) or '.'} Known: off, {', '.join(books)}; or give "
            "your own thresholds and rates."
        )
    return tuple(books[name]["thresholds"]), tuple(books[name]["rates"])


def shipped_calibrations(method: str) -> dict[str, Path]:
    """The calibrations of a method that ship with this library, by the reference model they were made with."""
    found = Path(__file__).parent.glob(f"calibrations/*/{method}.safetensors")
    return {file.parent.name: file for file in sorted(found)}


def calibrated_models() -> list[str]:
    """The reference models that calibrations ship for."""
    return sorted(folder.name for folder in Path(__file__).parent.glob("calibrations/*") if folder.is_dir())
