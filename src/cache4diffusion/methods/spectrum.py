"""Spectrum: forecast the last hidden feature by a regression of its whole history on Chebyshev polynomials.

Source: arXiv:2603.01623 (CVPR 2026); released code hanjq17/Spectrum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.gates import WideningInterval
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Chebyshev
from cache4diffusion.settings import setting
from cache4diffusion.sites import Span


@dataclass(frozen=True)
class Spectrum(Method):
    """What leaves the last block is fitted over all full steps; full steps become rarer as the run goes on.

    See `Chebyshev` for the formula and `WideningInterval` for the schedule: with the defaults over 50 steps 14 are full
    (0 to 4, 6, 8, 11, 15, 20, 25, 31, 38, 46), with ``growth=3`` 10.

    Cost: one copy of one hidden feature per full step.
    Differences from the code: time runs over the run's own length (the code divides by 50); weights are made in
    float64, without the coefficients' rounding to bf16; the code's further local terms of order 2 and 3, which take
    backward for forward differences, are left out (its default is order 1).
    """

    degree: int = setting(4, "highest Chebyshev polynomial. Code: 4", ge=0, le=16)
    ridge: float = setting(0.1, "penalty on the coefficients. Code: 0.1", gt=0)
    blend: float = setting(1.0, "share of the regression, the rest is a line. Code: 1", ge=0, le=1)
    warmup: int = setting(5, "first steps that are always full. Code: 5", ge=1)
    window: float = setting(2.0, "first distance of full steps; 1, with growth 0, never caches. Code: 2", ge=1)
    growth: float = setting(0.75, "what each full step adds to that distance. Code: 0.75, 3", ge=0)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="spectrum",
        title="Spectrum",
        arxiv="2603.01623",
        site="span output",
        gate="widening interval",
        predictor="Chebyshev regression",
        tokens=None,
        fidelity="code",
        off={"window": 1.0, "growth": 0.0},
        family="forecasting",
        when="runs are long, and a global fit is steadier than local slopes",
        ladder=({"growth": 0.0}, {}, {"growth": 3.0}),
        citation="Han et al., Adaptive Spectral Feature Forecasting for Diffusion Sampling Acceleration, CVPR 2026",
        published={
            "50 steps, 14 full": {"degree": 4, "ridge": 0.1, "blend": 1.0, "warmup": 5, "window": 2.0, "growth": 0.75},
            "50 steps, 10 full": {"growth": 3.0},
        },
    )

    def compose(self) -> Composition:
        """Output of all blocks x widening interval x Chebyshev regression."""
        return Composition(
            site=Span(form="output"),
            gate=WideningInterval(self.warmup, self.window, self.growth),
            predictor=Chebyshev(self.degree, self.ridge, self.blend),
        )
