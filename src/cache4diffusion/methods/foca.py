"""FoCa: forecast by a multistep formula, calibrate with the slope between full steps.

Source: arXiv:2508.16211 (AAAI 2026), eq. 6 to 8; no released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import FixedInterval
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import ForecastCalibrate
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts


@dataclass(frozen=True)
class FoCa(Method):
    """Every part's output follows a local slope that relaxes to the slope between the last two full steps.

    See `ForecastCalibrate` for the closed form of the paper's recursion, which needs no work on cached steps but one
    weighted sum.

    Cost: 3 copies of every part's output.
    Differences from the paper: it leaves open how a derivative is taken at the end point; we take backward differences,
    one step wide for the local slope and as wide as the last gap for the full step's. With full steps alone in the
    history both are the same, and the method is TaylorSeer of order 1.
    """

    interval: int = setting(5, "distance of two full steps; 1 never caches. Paper: 5 to 8 (FLUX)", ge=1)
    form: Literal["paper", "anchored", "bdf2"] = setting(
        "paper", "'paper': from step to step; 'anchored': always from the full step; 'bdf2': without calibration"
    )
    warmup: int = setting(3, "first steps that are always full. TaylorSeer: 3 (FLUX)", ge=1)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="foca",
        title="FoCa",
        arxiv="2508.16211",
        site="parts",
        gate="fixed interval",
        predictor="forecast, then calibrate",
        tokens=None,
        fidelity="paper",
        off={"interval": 1},
        family="forecasting",
        when="TaylorSeer of order 1 fits, but its first steps after a full one are too bold",
        ladder=({"interval": 2}, {"interval": 6, "warmup": 10}, {"interval": 7}),
        citation="Zheng et al., Forecast then Calibrate: Feature Caching as ODE for Efficient Diffusion Transformers, "
        "AAAI 2026",
        published={
            "FLUX.1-dev, 4.16 times fewer FLOPs": {"interval": 5},
            "FLUX.1-dev, 6.24 times fewer FLOPs": {"interval": 8},
        },
    )

    def compose(self) -> Composition:
        """Parts x fixed interval after a warm-up x forecast and calibration."""
        return Composition(
            site=Parts(),
            gate=FixedInterval(self.interval, anchor="warmup", warmup=self.warmup),
            predictor=ForecastCalibrate(self.form),
        )
