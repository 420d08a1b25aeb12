"""FasterCache, its CFG part: the unconditional branch is rebuilt from the conditional one.

Source: arXiv:2410.19355 (ICLR 2025); released code Vchitect/FasterCache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from cache4diffusion.guidance import FrequencyResidual
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.settings import setting


def _published(warmup: int, interval: int, low: tuple[float, float], high: tuple[float, float]) -> dict[str, Any]:
    """Settings from a script: ``low`` is the end of the low window and its gain, ``high`` the begin of the high one."""
    return {
        "warmup": warmup,
        "interval": interval,
        "low_until": low[0],
        "low_gain": low[1],
        "high_from": high[0],
        "high_gain": high[1],
    }


@dataclass(frozen=True)
class FasterCache(Method):
    """After a warm-up, both CFG branches run only on every ``interval``-th step; on the others one of them does.

    See `FrequencyResidual` for the formula. Works with batched guidance (half of the batch runs) and with sequential
    guidance (the second call is answered from the first), where the conditional branch must run first; where the
    host names its branches and runs the other one first, that is an error. Without guidance nothing is skipped, and
    ``report()`` says so.

    Cost: two output-sized float32 tensors. A cached step costs half a guided one.
    Differences from the code: the two filtered differences are kept as real maps, which is the same and needs no FFT
    on cached steps. The windows are fractions of the run; the warm-up is a number of steps, as published. A difference
    older than ``interval`` steps (guidance paused) is not used. The method's attention part is not in this name yet:
    combine with another method by ``accelerate(pipe, name, cfg="fastercache")``.
    """

    interval: int = setting(5, "both branches run on every n-th step; 1 never skips. Code: 5, 6 (Open-Sora-Plan)", ge=1)
    warmup: int = setting(17, "first steps at which both run. Code: 17 of 50, 11 of 30", ge=0)
    low_gain: float = setting(
        1.1, "factor on low frequencies per skipped step in their window. Code: 1.05 to 1.15", gt=0
    )
    high_gain: float = setting(1.1, "factor on high frequencies per skipped step in theirs. Code: 1.1 to 1.2", gt=0)
    low_until: float = setting(0.8, "end of the low window, fraction of the steps. Code: 0.79 to 0.88", ge=0, le=1)
    high_from: float = setting(0.6, "begin of the high window, fraction of the steps. Code: 0.6 to 0.9", ge=0, le=1)
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
        family="guidance",
        when="classifier-free guidance is on: it halves guided steps, and combines with every other method",
        ladder=({"interval": 2}, {}, {"interval": 8, "warmup": 5}),
        citation="Lv et al., FasterCache: Training-Free Video Diffusion Model Acceleration, ICLR 2025",
        shares_branches=True,
        published={
            "CogVideoX, 50 steps": _published(17, 5, low=(40 / 50, 1.1), high=(30 / 50, 1.1)),
            "Latte, 50 steps": _published(17, 5, low=(44 / 50, 1.1), high=(45 / 50, 1.1)),
            "Open-Sora 1.2, 30 steps": _published(11, 5, low=(25 / 30, 1.15), high=(20 / 30, 1.15)),
            "Open-Sora-Plan, 150 steps": _published(39, 6, low=(130 / 150, 1.1), high=(131 / 150, 1.2)),
            "Vchitect-2.0, 100 steps": _published(30, 5, low=(79 / 100, 1.05), high=(61 / 100, 1.1)),
        },
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
