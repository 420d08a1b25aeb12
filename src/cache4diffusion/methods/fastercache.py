"""FasterCache, its CFG part: the unconditional branch is rebuilt from the conditional one.

Source: arXiv:2410.19355 (ICLR 2025); released code Vchitect/FasterCache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.guidance import FrequencyResidual
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.settings import setting


@dataclass(frozen=True)
class FasterCache(Method):
    """After a warm-up, both CFG branches run only on every ``interval``-th step; on the others one of them does.

    See `FrequencyResidual` for the formula. Works with batched guidance (half of the batch runs) and with sequential
    guidance (the second call is answered from the first), where the conditional branch must run first; where the
    host names its branches and runs the other one first, that is an error. Without guidance nothing is skipped, and
    ``report()`` says so.

    Cost: two output-sized float32 tensors. A cached step costs half a guided one.
    Published settings (warm-up, interval; low window, gain; high window, gain) of 50 steps: CogVideoX 17, 5; to 40,
    1.1; from 30, 1.1. Latte 17, 5; to 44, 1.1; from 45, 1.1. Open-Sora (30 steps) 11, 5; to 25, 1.15; from 20, 1.15.
    Differences from the code: the two filtered differences are kept as real maps, which is the same and needs no FFT
    on cached steps. The windows are fractions of the run. The method's attention part is not in this name yet: combine
    with another method by ``accelerate(pipe, name, cfg="fastercache")``.
    """

    interval: int = setting(5, "both branches run on every n-th step; 1 never skips. Code: 5", ge=1)
    warmup: int = setting(17, "first steps at which both run. Code: 17 of 50, 11 of 30", ge=0)
    low_gain: float = setting(
        1.1, "factor on low frequencies per skipped step in their window. Code: 1.05 to 1.15", gt=0
    )
    high_gain: float = setting(1.1, "factor on high frequencies per skipped step in theirs. Code: 1.1 to 1.2", gt=0)
    low_until: float = setting(0.8, "end of the low window, fraction of the steps. Code: 0.8", ge=0, le=1)
    high_from: float = setting(0.6, "begin of the high window, fraction of the steps. Code: 0.6", ge=0, le=1)
    layout: Literal["auto", "batched", "sequential"] = setting(
        "auto", "whether both branches share a call; auto sees it from the calls"
    )
    batch_order: Literal["auto", "uncond-cond", "cond-uncond"] = setting(
        "auto", "which half of a batched call is which (or which call is first); auto knows diffusers' pipelines"
    )

    info: ClassVar[MethodInfo] = MethodInfo(
        name="fastercache",
        title="FasterCache (CFG cache)",
        arxiv="2410.19355",
        site="cfg branch",
        gate="fixed interval",
        predictor="frequency residual",
        tokens=None,
        fidelity="code",
        off={"interval": 1},
        use="Halves guided steps on any denoiser with classifier-free guidance; combines with every other method.",
        citation="Lv et al., FasterCache: Training-Free Video Diffusion Model Acceleration, ICLR 2025",
        shares_branches=True,
    )

    def compose(self) -> Composition:
        """CFG branch x fixed interval x frequency residual."""
        return Composition(
            site=None,
            gate=None,
            cfg=FrequencyResidual(
                interval=self.interval,
                warmup=self.warmup,
                low_gain=self.low_gain,
                high_gain=self.high_gain,
                low_until=self.low_until,
                high_from=self.high_from,
                layout=self.layout,
                batch_order=self.batch_order,
            ),
        )
