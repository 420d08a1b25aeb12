"""Trying a calibration: how well numbers fit says nothing of what they are worth in sampling.

Steps at which an error matters most may be the ones that a method caches. So it samples a few prompts, and its results
are compared with the uncached ones beside those of plain reuse with a warm-up: `Fora`, or where no parts are found,
reuse of the denoiser's output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cache4diffusion.accelerate import accelerate
from cache4diffusion.calibration.outputs import numbers_of
from cache4diffusion.calibration.trial import Trial
from cache4diffusion.composition import Composition
from cache4diffusion.cost import summarise
from cache4diffusion.errors import AnatomyError, CalibrationError
from cache4diffusion.few_steps import unconcerned
from cache4diffusion.gates import FixedInterval
from cache4diffusion.method import Method
from cache4diffusion.methods.fora import Fora
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import call_text
from cache4diffusion.sites import Denoiser

OTHER_NOISE = 500_009  # added to the prompts' seeds: what was measured or learned from is no test


def tried(
    pipe: Any, method: Method, samples: Sequence[tuple[Any, int]], sample: Callable[[Any, int], Any], steps: int
) -> Trial:
    """Sample the prompts uncached, with the method, and with plain reuse that costs as much.

    Args:
        pipe: a diffusers pipeline.
        method: with its calibration.
        samples: prompts and the seeds they were calibrated with; the trial draws other noise.
        sample: runs the pipeline on one of them.
        steps: of a run.

    Raises:
        CalibrationError: FLOPs cannot be counted, or the pipeline gives no numbers to compare.
        Cache4DiffusionError: as `accelerate`.
    """
    with torch.inference_mode():
        runs = [functools.partial(sample, prompt, seed + OTHER_NOISE) for prompt, seed in samples]
        bench = Bench(pipe, steps, runs, [numbers_of(run()) for run in runs])
        speedup, errors = bench.measure(method)
        name, reuse = bench.reuse_at(speedup)
        other, others = bench.measure(reuse)
    defaults = {row["name"]: row["default"] for row in method.describe()}
    changed = {key: value for key, value in method.settings.items() if value != defaults[key] and key != "calibration"}
    return Trial(call_text(method.info.name, changed), name, speedup, other, errors, others)


@dataclass(frozen=True)
class Bench:
    """Runs of a pipeline, with the uncached results."""

    pipe: Any
    steps: int
    runs: Sequence[Callable[[], Any]]
    plain: Sequence[Tensor]

    def measure(self, chosen: Method | Composition, runs: int | None = None) -> tuple[float, tuple[float, ...]]:
        """FLOPs speed-up over the first ``runs`` (None: all), and the error of each."""
        costs, errors = [], []
        with unconcerned(), accelerate(self.pipe, chosen) as handle:
            for run, wanted in list(zip(self.runs, self.plain, strict=True))[:runs]:
                found = numbers_of(run())
                summary = summarise(handle)
                if summary.predicted is None:
                    raise CalibrationError(f"FLOPs cannot be counted here: {'; '.join(summary.problems)}")
                costs.append(1 / summary.predicted)
                errors.append(float((found - wanted).norm() / wanted.norm().clamp_min(1e-12)))
        return len(costs) / sum(costs), tuple(errors)

    def reuse_at(self, speedup: float) -> tuple[str, Method | Composition]:
        """Plain reuse of about this FLOPs speed-up, with its name."""
        try:
            return self._closest(_fora, speedup)
        except AnatomyError:  # no parts are found there
            return self._closest(_whole, speedup)

    def _closest(self, made: Callable[..., tuple[str, Any]], speedup: float) -> tuple[str, Any]:
        """As if a cached step cost nothing; then with what it was seen to cost."""
        guess = schedule(self.steps / speedup, self.steps)
        full = full_steps(**guess, steps=self.steps)
        cost = self.steps / self.measure(made(**guess)[1], runs=1)[0]
        cached = (cost - full) / (self.steps - full)  # of one cached step; a full one is 1
        return made(**schedule((self.steps / speedup - self.steps * cached) / (1 - cached), self.steps))


def _fora(interval: int, warmup: int) -> tuple[str, Method]:
    return call_text("fora", {"interval": interval, "warmup": warmup}), Fora(interval=interval, warmup=warmup)


def _whole(interval: int, warmup: int) -> tuple[str, Composition]:
    name = call_text("reuse of the output", {"interval": interval, "warmup": warmup})
    return name, Composition(Denoiser(), FixedInterval(interval, warmup=warmup), Reuse())


def schedule(wanted: float, steps: int) -> dict[str, int]:
    """The interval and the warm-up whose full steps are closest to ``wanted``, fewer than all.

    Of those that are equally close, the ones whose warm-up is nearest to a fifth of the run.
    """
    pairs = [(interval, warmup) for interval in range(2, 25) for warmup in range(1, steps)]
    counted = [(full, pair) for pair in pairs if (full := full_steps(*pair, steps)) < steps]
    _, (interval, warmup) = min(counted, key=lambda each: (abs(each[0] - wanted), abs(each[1][1] - steps / 5)))
    return {"interval": interval, "warmup": warmup}


def full_steps(interval: int, warmup: int, steps: int) -> int:
    """Of a run: the first ``warmup`` (1 or more), then every ``interval``-th counted from the first."""
    return warmup + (steps - 1) // interval - (warmup - 1) // interval
