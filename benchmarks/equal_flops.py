"""Settings at which methods cost the same, and which of two is closer to the uncached images then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import cache4diffusion as c4d
from cache4diffusion.calls import quiet, sampler
from cache4diffusion.cli.models import Model, captions_for
from cache4diffusion.cost import summarise
from cache4diffusion.measure import Row, wilson_interval

SEED = 1000  # of captions that settings are chosen on; benchmarks begin at 0

Called = tuple[str, dict[str, Any]]  # a method, and its settings


def intervals(name: str, steps: int) -> list[Called]:
    """A method with an interval and a warm-up at settings that lie close in cost, the dearest first.

    Intervals of 2 to 4 behind long warm-ups, and of 2 to 12 behind the method's own.
    """
    long = [{"interval": interval, "warmup": steps - left} for interval in (2, 3, 4) for left in range(4, steps, 2)]
    own = [{"interval": interval} for interval in range(2, 13)]
    default = c4d.method(name).warmup

    def full_steps(settings: dict[str, Any]) -> float:
        warmup = settings.get("warmup", default)
        return warmup + (steps - warmup) / settings["interval"]

    return [(name, settings) for settings in sorted([*long, *own], key=full_steps, reverse=True)]


def closest(model: Model, target: Any, others: Sequence[Called]) -> Called:
    """Of ``others``, the dearest first, the one whose FLOPs are closest to those of the method ``target``.

    Cost: a run on two captions for the target, and for about ``log2(len(others))`` others.
    """
    wanted, known = reached(model, target), {}

    def at(index: int) -> float:
        if index not in known:
            name, settings = others[index]
            known[index] = reached(model, c4d.method(name, **settings))
        return known[index]

    low, high = 0, len(others) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) < wanted else (low, middle)
    return others[min((low, high), key=lambda index: abs(at(index) - wanted))]


def reached(model: Model, method: Any) -> float:
    """FLOPs speed-up of one run on two captions that are not measured later."""
    sample = sampler(model.pipe, model.call)
    captions = captions_for(model, 2, None, SEED)[0]
    with c4d.accelerate(model.pipe, method) as handle, quiet(model.pipe), torch.inference_mode():
        sample(captions, [SEED, SEED + 1], model.steps)
        speedup = summarise(handle).predicted
    assert speedup is not None
    return speedup


def wins(mine: Row, theirs: Row) -> tuple[float, list[float]]:
    """Share of captions on which mine is closer to the uncached image, with its 95 % interval; a tie is no win."""
    assert mine.psnr_per_caption is not None and theirs.psnr_per_caption is not None
    count = len(mine.psnr_per_caption)
    won = sum(a > b for a, b in zip(mine.psnr_per_caption, theirs.psnr_per_caption, strict=True))
    return won / count, list(wilson_interval(won, count, 0.95))


def called(name: str, settings: dict[str, Any]) -> str:
    """A method and its settings in a table."""
    words = ", ".join(f"{key}={round(v, 4) if isinstance(v, float) else v}" for key, v in settings.items())
    return f"`{name}({words})`" if words else f"`{name}`"
