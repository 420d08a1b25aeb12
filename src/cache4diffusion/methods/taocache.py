"""TaoCache: late in a run, predict the output after guidance by its last change, scaled as measured.

Source: arXiv:2508.08978; no code. Its formula could not be read: reconstructed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.calibration import Given
from cache4diffusion.calibration.changes import ChangeScales
from cache4diffusion.errors import SettingError
from cache4diffusion.gates import FixedInterval, Window
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import ScaledDelta
from cache4diffusion.settings import setting
from cache4diffusion.sites import Trajectory


@dataclass(frozen=True)
class TaoCache(Method):
    """Everything is computed in the early part of a run, which makes the structure; then every ``interval``-th step.

    A cached step follows the last change of the output, predicted ones included, times the measured ratio of norms and
    the cosine between successive changes; see `ScaledDelta`. ``c4d calibrate`` measures both on uncached runs, for runs
    of the same scheduler, steps and guidance; without a calibration changes go on unscaled.

    Cost: 2 copies of the output after guidance; a cached step runs nothing.
    Differences from the paper: the formula is ours under its idea (least-squares projection); schedule and numbers are
    not known, so the late steps have an interval.
    """

    interval: int = setting(2, "distance of two full steps in the late part; 1 never caches", ge=1)
    start: float = setting(0.5, "fraction of the run before which all steps are full", ge=0, le=1)
    ratios: tuple[float, ...] = setting((1.0,), "norm ratio of successive changes by step, the last one for the rest")
    cosines: tuple[float, ...] = setting((1.0,), "cosine between them by step; (1.0,) keeps the norm")

    calibration: Given = setting(None, "both, of your denoiser: a file of c4d calibrate, or what it returned")

    calibrator = ChangeScales
    info: ClassVar[MethodInfo] = MethodInfo(
        name="taocache",
        title="TaoCache",
        arxiv="2508.08978",
        site="trajectory",
        gate="late interval",
        predictor="scaled last change",
        tokens=None,
        fidelity="reconstructed",
        off={"interval": 1},
        family="trajectory",
        when="the structure must stay as it is, so that only late steps may be cached",
        ladder=({}, {"interval": 4, "start": 0.3}, {"interval": 6, "start": 0.1}),
        citation="Fan et al., TaoCache: Structure-Maintained Video Generation Acceleration, 2025",
    )

    def compose(self) -> Composition:
        """Trajectory x interval in the late part x scaled last change."""
        ratios, cosines, made_for = self.ratios, self.cosines, None
        if self.calibration is not None:
            if (ratios, cosines) != ((1.0,), (1.0,)):
                raise SettingError(f"TaoCache(ratios={ratios}, cosines={cosines}, calibration=...): one of the two.")
            entry = self.measured
            ratios, cosines = (tuple(entry.fit[name].tolist()) for name in ("ratios", "cosines"))
            made_for = (len(ratios), entry.levels)
        return Composition(
            site=Trajectory(),
            gate=FixedInterval(self.interval),
            predictor=ScaledDelta(ratios, cosines),
            guards=(Window(start=self.start),),
            branches="tied",
            made_for=made_for,
        )
