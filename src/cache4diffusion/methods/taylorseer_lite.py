"""TaylorSeer-Lite: forecast the denoiser's output itself, one tensor instead of hundreds.

Source: no paper of its own, so TaylorSeer's is cited (arXiv:2503.06923); its authors' released code for
HunyuanImage-2.1 (Cache4Diffusion repository).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.gates import FixedInterval
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Taylor
from cache4diffusion.settings import setting
from cache4diffusion.sites import Denoiser


@dataclass(frozen=True)
class TaylorSeerLite(Method):
    """TaylorSeer's schedule and predictor on the denoiser's output; a cached step runs nothing of the denoiser.

    Works on any denoiser. The prediction includes the final adaLN, so a cached step ignores the fresh timestep.

    Cost: ``order + 1`` copies of the output; a cached step is one weighted sum.
    Differences from the code: it runs the embedders on every step although nothing reads them; we do not. It predicts
    the final projection's output before it is unpatchified, we after: the same numbers in another order.
    """

    interval: int = setting(5, "distance of two full steps; 1 never caches. Code: 5 (fast), 4, 3 (detailed)", ge=1)
    order: int = setting(2, "highest power of the step offset; 0 is plain reuse. Code: 2", ge=0, le=8)
    warmup: int = setting(3, "first steps that are always full. Code: 3", ge=1)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="taylorseer-lite",
        title="TaylorSeer-Lite",
        arxiv="2503.06923",
        site="denoiser",
        gate="fixed interval",
        predictor="Taylor",
        tokens=None,
        fidelity="code",
        off={"interval": 1},
        family="forecasting",
        when="a cached step should cost next to nothing, on any denoiser, at almost no memory",
        ladder=({"interval": 2}, {"interval": 6, "warmup": 10}, {"interval": 7}),
        citation="Liu et al., From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers, ICCV 2025",
        published={
            "HunyuanImage-2.1, fast": {"interval": 5, "order": 2, "warmup": 3},
            "HunyuanImage-2.1, mid": {"interval": 4, "order": 2, "warmup": 3},
            "HunyuanImage-2.1, detailed": {"interval": 3, "order": 2, "warmup": 3},
        },
    )

    def compose(self) -> Composition:
        """Whole denoiser x fixed interval after a warm-up x Taylor."""
        return Composition(
            site=Denoiser(),
            gate=FixedInterval(self.interval, anchor="warmup", warmup=self.warmup),
            predictor=Taylor(self.order, first_difference_step=self.warmup - 1),
        )
