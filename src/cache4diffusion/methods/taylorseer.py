"""TaylorSeer: forecast every part's output by a Taylor polynomial in the step.

Source: arXiv:2503.06923 (ICCV 2025); released code Shenyi-Z/TaylorSeer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.gates import FixedInterval
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Taylor
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts


@dataclass(frozen=True)
class TaylorSeer(Method):
    """``warmup`` full steps, then one in ``interval``; between them each part's output is extrapolated.

    The schedule and the differences are the released code's: ``interval=5, warmup=3`` over 24 steps is full at
    0, 1, 2, 7, 12, 17, 22, and differences begin at full step ``warmup - 1``. Predictions are made before the adaLN
    gate. See `Taylor` for the formula and for what is exact.

    Cost: ``order + 1`` copies of every part's output; a prediction is their weighted sum.
    Differences from the code: it keeps the differences, we keep the full steps' features and put the recursion into
    the weights: the same numbers, without rounding the differences to the feature's dtype. fp16 is not clipped to its
    range; a prediction that leaves it is recomputed. diffusers' port is another method by its schedule (full at 0, 1,
    2, 4, 9, 14 for interval 5) and by its sites (attention only).
    """

    interval: int = setting(6, "distance of two full steps; 1 never caches. Code: 6 (FLUX)", ge=1)
    order: int = setting(1, "highest power of the step offset; 0 is plain reuse. Code: 1 (FLUX)", ge=0, le=8)
    warmup: int = setting(3, "first steps that are always full. Code: 3 (FLUX), 1 (HunyuanVideo)", ge=1)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="taylorseer",
        title="TaylorSeer",
        arxiv="2503.06923",
        site="parts",
        gate="fixed interval",
        predictor="Taylor",
        tokens=None,
        fidelity="code",
        off={"interval": 1},
        family="forecasting",
        when="the speed-up should be high at good quality, and memory for every part's output is at hand",
        ladder=({"interval": 2}, {"interval": 6, "warmup": 10}, {"interval": 7}),
        citation="Liu et al., From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers, ICCV 2025",
        published={
            "FLUX.1-dev": {"interval": 6, "order": 1, "warmup": 3},
            "FLUX.1-dev, tables, intervals 4 to 7": {"interval": 4, "order": 2, "warmup": 3},
            "HunyuanVideo": {"interval": 5, "order": 1, "warmup": 1},
            "Wan2.1": {"interval": 5, "order": 1, "warmup": 1},
            "Qwen-Image": {"interval": 6, "order": 1, "warmup": 3},
            "HiDream": {"order": 2, "warmup": 1},
            "DiT-XL/2": {"interval": 4, "order": 4, "warmup": 2},
        },
    )

    def compose(self) -> Composition:
        """Parts x fixed interval after a warm-up x Taylor."""
        return Composition(
            site=Parts(),
            gate=FixedInterval(self.interval, anchor="warmup", warmup=self.warmup),
            predictor=Taylor(self.order, first_difference_step=self.warmup - 1),
        )
