"""L2P: the output of a cached step is a learned combination of all full steps before it.

Source: arXiv:2604.26365; its code is not out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.calibration import Given
from cache4diffusion.calibration.gram import StepGram
from cache4diffusion.gates import FixedInterval
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import LearnedCombination
from cache4diffusion.settings import setting
from cache4diffusion.sites import Denoiser


@dataclass(frozen=True)
class L2P(Method):
    """``F_s = sum over full steps j < s of W[s, j] F_j`` of the denoiser's output; a cached step runs nothing.

    W minimises the squared error over measured runs, row by row, in closed form from one matrix (`LearnedCombination`):
    for exactly the full steps that precede s in the schedule at hand, whatever the schedule. Runs must have the steps
    and noise levels of the calibration, or ``resample=True``. ``interval=3, warmup=2`` over 9 steps is ``FFccFccFc``.

    Cost: one copy of the output per full step and branch (``history`` limits it). No host sync.
    Differences from the paper: least squares in place of gradient descent on the same error; the schedule's numbers are
    not known, so they are ours.
    """

    interval: int = setting(5, "distance of two full steps after the warm-up; 1 never caches", ge=1)
    warmup: int = setting(3, "first steps that are full", ge=0)
    ridge: float = setting(1e-5, "relative to the mean squared size of the outputs. A re-implementation: 1e-5", ge=0)
    history: int | None = setting(None, "most full steps that are kept; None keeps all", ge=1)
    calibration: Given = setting(None, "products of your outputs: a file of c4d calibrate, or what it returned")

    resample: bool = setting(False, "accept other steps or noise levels, by the share of the run that is over")

    calibrator = StepGram
    info: ClassVar[MethodInfo] = MethodInfo(
        name="l2p",
        title="L2P",
        arxiv="2604.26365",
        site="denoiser",
        gate="interval",
        predictor="learned combination",
        tokens=None,
        fidelity="reconstructed",
        off={"interval": 1},
        family="forecasting",
        when="cached steps must cost next to nothing and you always sample with the same steps",
        ladder=({"interval": 2}, {"interval": 6, "warmup": 10}, {"interval": 7}),
        citation="L2P: learnable linear prediction of cached features, 2026",
        needs_calibration=True,
    )

    def compose(self) -> Composition:
        """Whole denoiser x interval x learned combination."""
        entry = self.measured
        gram = tuple(tuple(row) for row in entry.fit["gram"].tolist())
        return Composition(
            site=Denoiser(),
            gate=FixedInterval(self.interval, anchor="warmup", warmup=self.warmup),
            predictor=LearnedCombination(gram, self.ridge, self.history, stretch=self.resample),
            made_for=None if self.resample else (len(gram), entry.levels),
        )
