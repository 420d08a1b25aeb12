"""DPCache: the full steps that make the measured error of predicting all others smallest.

Source: arXiv:2602.22654 (CVPR 2026); its code is not out. Formula as in SGLang's implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.calibration import Given
from cache4diffusion.calibration.secants import SecantErrors
from cache4diffusion.errors import SettingError
from cache4diffusion.gates import Timetable
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Newton
from cache4diffusion.settings import setting
from cache4diffusion.sites import Span

FIRST = 3  # mandatory full steps at the beginning: a line needs two


@dataclass(frozen=True)
class DPCache(Method):
    """What the last block makes follows the line through its last two full steps; these are chosen by a search.

    ``C[i, j, k] = sum over j < t < k of mean|line(y_i, y_j)(t) - y_t|`` is what it costs to go from full step j to full
    step k if i was the one before, measured once by ``c4d calibrate`` and averaged over prompts. Among all schedules
    with as many full steps, beginning with 0, 1, 2 and never further apart than ``max_gap``, dynamic programming over
    pairs finds the one with the smallest sum; among equals the first in lexicographic order.

    Exact for features that are lines in the step. A run of other steps or noise levels than the calibration's needs
    ``resample=True``. Every step that is not chosen is cached, the last one too.

    Cost: 2 copies of the last block's output per branch; a cached step runs no block. No host sync.
    Differences from SGLang's implementation: a largest gap is part of the measurement (there optional), so that it
    takes one pass and little memory; the budget is a share of the steps.
    """

    budget: float = setting(0.4, "share of the steps that is full; 1 is off", gt=0, le=1)
    calibration: Given = setting(None, "errors of your denoiser: a file of c4d calibrate, or what it returned")
    resample: bool = setting(False, "accept other steps or noise levels, by the nearest calibrated ones")

    calibrator = SecantErrors
    info: ClassVar[MethodInfo] = MethodInfo(
        name="dpcache",
        title="DPCache",
        arxiv="2602.22654",
        site="span",
        gate="calibrated schedule",
        predictor="line",
        tokens=None,
        fidelity="reconstructed",
        off={"budget": 1.0},
        family="forecasting",
        when="the number of full steps is given, and their best places may be measured on your denoiser",
        ladder=({"budget": 0.5}, {"budget": 0.32}, {"budget": 0.18}),
        citation="DPCache: Denoising as Path Planning, CVPR 2026",
        needs_calibration=True,
    )

    def compose(self) -> Composition:
        """Last block's output x searched schedule x line."""
        entry = self.measured
        errors = entry.fit["errors"].tolist()
        count = max(round(self.budget * len(errors)), min(FIRST, len(errors)))
        return Composition(
            site=Span(form="output"),
            gate=Timetable(
                {"": planned(errors, count)},
                len(errors),
                entry.levels,
                resample=self.resample,
            ),
            predictor=Newton(order=1),
        )


def planned(errors: Sequence[Sequence[Sequence[float]]], count: int) -> tuple[int, ...]:
    """The ``count`` full steps of the smallest cost.

    Args:
        errors: by step, gap of the two full steps before it minus 1, and distance to the newer one minus 1.
        count: how many full steps, the mandatory ones among them.

    Raises:
        SettingError: so few cannot keep the largest gap.
    """
    steps, max_gap = len(errors), len(errors[0])
    if steps <= FIRST or count >= steps:
        return tuple(range(steps))

    def cost(i: int, j: int, k: int) -> float:
        return sum(errors[t][j - i - 1][t - j - 1] for t in range(j + 1, k))

    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(FIRST - 2, FIRST - 1): (0.0, tuple(range(FIRST)))}
    for _ in range(count - FIRST):
        longer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (i, j), (total, path) in best.items():
            for k in range(j + 1, min(j + max_gap, steps - 1) + 1):
                found = (total + cost(i, j, k), (*path, k))
                if (j, k) not in longer or found < longer[j, k]:
                    longer[j, k] = found
        best = longer
    ended = [(total + cost(i, j, steps), path) for (i, j), (total, path) in best.items() if steps - j <= max_gap]
    if not ended:
        fewest = FIRST + -(-(steps - FIRST - max_gap + 1) // max_gap)
        raise SettingError(
            f"DPCache: {count} full steps cannot serve {steps} steps with gaps of at most {max_gap}; use {fewest} or "
            "more (budget), or calibrate with a larger max_gap."
        )
    return min(ended)[1]
