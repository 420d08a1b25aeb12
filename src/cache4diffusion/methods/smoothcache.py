"""SmoothCache: which parts to reuse at which steps, from how much their outputs were seen to change.

Source: arXiv:2411.10510 (CVPR workshops 2025); released code Roblox/SmoothCache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.calibration import Given
from cache4diffusion.calibration.errors_at_lags import LagErrors
from cache4diffusion.gates import Timetable
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts


@dataclass(frozen=True)
class SmoothCache(Method):
    """Every kind of part has a schedule: a step's output is reused as long as the measured error stays small.

    ``E_r[i] = |o_i - o_(i+r)|_1 / |o_(i+r)|_1``, measured once by ``c4d calibrate`` and averaged over blocks and
    prompts, is the error of reusing step i's output r steps later. From step 0 on: the largest r up to the lookahead
    with ``E_r[i] <= threshold`` gives r cached steps after i; where there is none, the next step is full as well. The
    first and the last step are full. Only the error over the whole lag counts, not that of the steps between.

    With all errors 0 and a lookahead of 3, 9 steps are ``FcccFcccF``. A run of other steps or noise levels than the
    calibration's needs ``resample=True``.

    Cost: 1 copy of every part's output; a cached part does not run. No host sync.
    Differences from the code: a threshold of 0 is off (there a feature that does not change at all is reused); steps
    are counted per branch and run, not per call of a module.
    """

    threshold: float = setting(0.15, "largest error of a reused output; 0 is off. Code: 0.08, 0.18 (DiT), 0.15", ge=0)
    calibration: Given = setting(None, "errors of your denoiser: a file of c4d calibrate, or what it returned")
    resample: bool = setting(False, "accept other steps or noise levels, by the nearest calibrated ones")

    calibrator = LagErrors
    info: ClassVar[MethodInfo] = MethodInfo(
        name="smoothcache",
        title="SmoothCache",
        arxiv="2411.10510",
        site="parts",
        gate="calibrated schedule per kind",
        predictor="reuse",
        tokens=None,
        fidelity="code",
        off={"threshold": 0.0},
        family="reuse of blocks and parts",
        when="a schedule may be measured on your denoiser, for attention and for MLPs each its own",
        ladder=({"threshold": 0.05}, {"threshold": 0.1}, {"threshold": 0.3}),
        citation="Liu et al., SmoothCache: A Universal Inference Acceleration Technique for DiT, CVPR-W 2025",
        needs_calibration=True,
        published={
            "DiT-XL/2-256, 50 steps": {"threshold": 0.18},
            "DiT-XL/2-256, 50 steps, slow": {"threshold": 0.08},
            "Open-Sora, 30 steps": {"threshold": 0.35},
        },
    )

    def compose(self) -> Composition:
        """Parts x schedule per kind x reuse."""
        entry = self.measured
        tables = {kind: table.tolist() for kind, table in entry.fit.items()}
        num_steps = len(next(iter(tables.values()))[0])
        return Composition(
            site=Parts(decisions="kind"),
            gate=Timetable(
                {kind: smooth_schedule(table, self.threshold) for kind, table in tables.items()},
                num_steps,
                entry.levels,
                resample=self.resample,
            ),
            predictor=Reuse(),
        )


def smooth_schedule(errors: Sequence[Sequence[float]], threshold: float) -> tuple[int, ...]:
    """The full steps of one kind.

    Args:
        errors: row ``r - 1`` is lag r, by the step whose output is reused.
        threshold: largest error of a reused output; 0 reuses none.
    """
    num_steps, full, i = len(errors[0]), {0, len(errors[0]) - 1}, 0
    while i < num_steps:
        full.add(i)
        lags = [r for r in range(len(errors), 0, -1) if i < num_steps - r and errors[r - 1][i] <= threshold]
        i += lags[0] + 1 if lags and threshold > 0 else 1
    return tuple(sorted(full))
