"""LeMiCa: the full steps that keep the worst stretch of reuse as harmless as can be.

Source: arXiv:2511.00090 (NeurIPS 2025); released code UnicomAI/LeMiCa, which has schedules and not how they are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.calibration import Given
from cache4diffusion.calibration.reuse_errors import ReuseErrors
from cache4diffusion.errors import SettingError
from cache4diffusion.gates import Timetable
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Span

Path = tuple[tuple[float, ...], tuple[int, ...]]  # weights of its edges, largest first, and its steps


@dataclass(frozen=True)
class LeMiCa(Method):
    """Reuse the residual of all blocks between full steps that are chosen by a search in a graph.

    An edge from step i to step j means: both full, reuse in between. Its weight is how far that moves the result
    (`ReuseErrors`, measured once by ``c4d calibrate`` and averaged over prompts). Among all paths with as many full
    steps the search takes the one whose largest weight is smallest, among those the one whose second largest is, and so
    on (lexicographic minimax); among equals the first in lexicographic order. DPCache's search, beside it, takes the
    smallest sum.

    A run of other steps or noise levels than the calibration's needs ``resample=True``.

    Cost: one residual per stream that is read afterwards. A cached step runs no block. No host sync.
    Differences from the paper: weights are the first order of the error in the result, from uncached runs alone; there
    every edge is sampled.
    """

    budget: float = setting(0.4, "share of the steps that is full; 1 is off. Code: 0.2 to 0.52", gt=0, le=1)
    calibration: Given = setting(None, "errors of your denoiser: a file of c4d calibrate, or what it returned")
    resample: bool = setting(False, "accept other steps or noise levels, by the nearest calibrated ones")

    calibrator = ReuseErrors
    info: ClassVar[MethodInfo] = MethodInfo(
        name="lemica",
        title="LeMiCa",
        arxiv="2511.00090",
        site="span",
        gate="calibrated schedule",
        predictor="reuse",
        tokens=None,
        fidelity="reconstructed",
        off={"budget": 1.0},
        family="reuse of blocks and parts",
        when="a schedule made for your denoiser, steps and scheduler must have no bad stretch",
        ladder=({"budget": 0.5}, {"budget": 0.32}, {"budget": 0.18}),
        citation="LeMiCa: Lexicographic Minimax Path Caching for Efficient Diffusion-Based Video Generation, "
        "NeurIPS 2025",
        needs_calibration=True,
    )

    def compose(self) -> Composition:
        """All blocks' residual x searched schedule x reuse."""
        entry = self.measured
        errors = entry.fit["errors"].tolist()
        count = max(round(self.budget * len(errors)), 1)
        return Composition(
            site=Span(),
            gate=Timetable({"": minimax(errors, count)}, len(errors), entry.levels, resample=self.resample),
            predictor=Reuse(),
        )


def minimax(errors: Sequence[Sequence[float]], count: int) -> tuple[int, ...]:
    """The ``count`` full steps whose edges, largest first, are the smallest.

    One best path per step and number of full steps is enough: an edge that is put behind two paths does not change
    which of them has the smaller list.

    Args:
        errors: by last cached step, and number of cached steps before the edge's end minus 1.
        count: how many full steps, the first among them.

    Raises:
        SettingError: so few cannot keep the largest gap.
    """
    steps, max_gap = len(errors), len(errors[0]) + 1
    if count >= steps:
        return tuple(range(steps))

    def edge(i: int, j: int) -> float:
        return errors[j - 1][j - i - 2] if j > i + 1 else 0.0

    best: dict[int, Path] = {0: ((), (0,))}
    for is_last in [False] * (count - 1) + [True]:
        longer: dict[int, Path] = {}
        for i, (weights, path) in best.items():
            ends = [steps] if is_last else range(i + 1, min(i + max_gap, steps - 1) + 1)
            for j in ends:
                if j - i <= max_gap:
                    found = (tuple(sorted((*weights, edge(i, j)), reverse=True)), (*path, j))
                    if j not in longer or found < longer[j]:
                        longer[j] = found
        best = longer
    if steps not in best:
        raise SettingError(
            f"LeMiCa: {count} full steps cannot serve {steps} steps with gaps of at most {max_gap}; use "
            f"{-(-steps // max_gap)} or more (budget), or calibrate with a larger max_gap."
        )
    return best[steps][1][:-1]
