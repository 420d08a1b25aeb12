"""MeanCache: the last velocity after guidance, moved towards the mean velocity of the coming step.

Source: arXiv:2601.19961 (ICLR 2026); released code UnicomAI/MeanCache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from cache4diffusion.gates import ScaledSchedule
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import MeanVelocity
from cache4diffusion.settings import setting
from cache4diffusion.sites import Trajectory

_QWEN_17 = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 17, 24, 31, 38, 45, 48, 49)
_QWEN_25 = (*range(17), 24, 32, 40, 43, 45, 47, 48, 49)
_PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen-Image, 50 steps, 25 full": {"full_steps": _QWEN_25, "look_back": (1,) * 19 + (5, 5, 5, 1, 1)},
    "Qwen-Image, 50 steps, 17 full": {"full_steps": _QWEN_17},
    "Qwen-Image, 50 steps, 10 full": {
        "full_steps": (0, 1, 3, 7, 14, 21, 28, 35, 42, 49),
        "look_back": (1, 2, 1, 1, 1, 1, 1, 1, 4),
    },
}


@dataclass(frozen=True)
class MeanCache(Method):
    """A schedule found offline; a cached step corrects the last velocity by a difference quotient of latents.

    See `MeanVelocity` for the formula; ``look_back`` has one entry per full step, for the cached steps that follow it.
    Schedules are for 50 steps and are stretched to the run's.

    Cost: ``2 max(look_back) + 1`` latents per run; a cached step runs nothing.
    Differences from the code: it logs full steps only where guidance is on, and fails without it; ours logs every
    step. Only ``FlowMatchEulerDiscreteScheduler``, as there.
    """

    full_steps: tuple[int, ...] | None = setting(_QWEN_17, "full steps of 50; None computes all. Code: Qwen-Image, 17")
    look_back: tuple[int, ...] = setting(
        (1,) * 8 + (2,) + (1,) * 5 + (4, 1), "steps of the mean, by full step. Code: 1 to 6"
    )

    info: ClassVar[MethodInfo] = MethodInfo(
        name="meancache",
        title="MeanCache",
        arxiv="2601.19961",
        site="trajectory",
        gate="given schedule",
        predictor="mean velocity",
        tokens=None,
        fidelity="code",
        off={"full_steps": None},
        family="trajectory",
        when="a flow-matching run has about 50 steps, as the published schedules do",
        citation="MeanCache: From Instantaneous to Average Velocity for Accelerating Flow Matching Inference, "
        "ICLR 2026",
        published=_PUBLISHED,
        ladder=tuple(_PUBLISHED.values()),
    )

    def compose(self) -> Composition:
        """Trajectory x given schedule x mean velocity."""
        return Composition(
            site=Trajectory("all", solvers=("FlowMatchEulerDiscreteScheduler",)),
            gate=ScaledSchedule(self.full_steps, made_for=50),
            predictor=MeanVelocity(self.look_back),
            branches="tied",
        )
