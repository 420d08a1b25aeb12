"""FasterCache: attention goes on with its last change, the unconditional branch is rebuilt from the conditional one.

Source: arXiv:2410.19355 (ICLR 2025); released code Vchitect/FasterCache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from cache4diffusion.gates import FixedInterval
from cache4diffusion.guidance import FrequencyResidual
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import WeightedChange
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts


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


def _attention(warmup: int, interval: int, weight: float, slope: float = 0.0) -> dict[str, Any]:
    """Likewise, of attention: calls ``n > warmup`` (from 1) are cached where n is even, or no multiple of 3."""
    return {
        "attention_warmup": warmup,
        "attention_interval": interval,
        "attention_weight": weight,
        "attention_slope": slope,
        "attention_offset": interval - 1 if interval > 2 else 0,
    }


@dataclass(frozen=True)
class FasterCache(Method):
    """After a warm-up, self-attention runs on every third step, and both CFG branches on every ``interval``-th one.

    On the steps between, an attention's output is ``F_last + w (F_last - F_prev)`` of the last two steps at which it
    was computed, before its gate, with ``w = attention_weight`` (growing by ``attention_slope`` in a step); the
    unconditional branch is made from the conditional one and the filtered difference of the last step that ran both
    (`FrequencyResidual` has the formula). Where both branches share a call, half of its rows run; what was cached of
    these rows before serves them. A step that runs both computes its attention if a branch has missed a computation.
    In sequential guidance the second call is answered from the first, where the conditional branch must run first;
    where the host names its branches and runs the other one first, that is an error. Without guidance no branch is
    skipped, and ``report()`` says so.

    ``attention_interval=1`` leaves the CFG part alone. That part also goes with other methods:
    ``accelerate(pipe, name, cfg="fastercache")``.

    Cost: two copies of every self-attention's output, two output-sized float32 tensors. A step that skips a branch
    costs half a guided one, less what attention it skips.
    Differences from the code: the two filtered differences are kept as real maps, which is the same and needs no FFT
    on cached steps. The windows are fractions of the run; warm-ups are numbers of steps, as published. A difference
    older than ``interval`` steps (guidance paused) is not used. The rows of a branch go on with their own features;
    the Latte script takes those of the first half for whichever runs. The code for Vchitect-2.0 also reuses the
    residual of seven blocks on two steps of three, which is not part of this. Self-attention inside a fused part
    (FLUX's single-stream blocks) always runs.
    """

    interval: int = setting(5, "both branches run on every n-th step; 1 never skips. Code: 5, 6 (Open-Sora-Plan)", ge=1)
    warmup: int = setting(17, "first steps at which both run. Code: 17 of 50, 11 of 30", ge=0)
    low_gain: float = setting(
        1.1, "factor on low frequencies per skipped step in their window. Code: 1.05 to 1.15", gt=0
    )
    high_gain: float = setting(1.1, "factor on high frequencies per skipped step in theirs. Code: 1.1 to 1.2", gt=0)
    low_until: float = setting(0.8, "end of the low window, fraction of the steps. Code: 0.79 to 0.88", ge=0, le=1)
    high_from: float = setting(0.6, "begin of the high window, fraction of the steps. Code: 0.6 to 0.9", ge=0, le=1)
    attention_interval: int = setting(3, "self-attention runs on every n-th step; 1 never skips. Code: 3, 2", ge=1)
    attention_warmup: int = setting(17, "first steps at which it always runs. Code: 17 of 50, 7 of 30", ge=0)
    attention_weight: float = setting(0.3, "share of the last change that is added. Code: 0.3 to 0.5", ge=0, le=1)
    attention_slope: float = setting(0.0, "its growth per step from the warm-up on. Code: 0.045 (Open-Sora)", ge=0)
    attention_offset: int = setting(2, "step its interval is counted from. Code: 2, 0 (interval 2)", ge=0)
    layout: Literal["auto", "batched", "sequential"] = setting(
        "auto", "whether both branches share a call; auto sees it from the calls"
    )
    batch_order: Literal["auto", "uncond-cond", "cond-uncond"] = setting(
        "auto", "which half of a batched call is which (or which call is first); auto knows diffusers' pipelines"
    )

    info: ClassVar[MethodInfo] = MethodInfo(
        name="fastercache",
        title="FasterCache",
        arxiv="2410.19355",
        site="self-attention and cfg branch",
        gate="fixed intervals",
        predictor="share of the last change, frequency residual",
        tokens=None,
        fidelity="code",
        off={"interval": 1, "attention_interval": 1},
        family="guidance",
        when="classifier-free guidance is on: it halves guided steps, and combines with every other method",
        ladder=({"interval": 2, "attention_interval": 2}, {}, {"interval": 8, "warmup": 5, "attention_warmup": 5}),
        citation="Lv et al., FasterCache: Training-Free Video Diffusion Model Acceleration, ICLR 2025",
        shares_branches=True,
        published={
            "CogVideoX, 50 steps": _published(17, 5, low=(40 / 50, 1.1), high=(30 / 50, 1.1)) | _attention(17, 3, 0.3),
            "Latte, 50 steps": _published(17, 5, low=(44 / 50, 1.1), high=(45 / 50, 1.1)) | _attention(15, 2, 0.5),
            "Open-Sora 1.2, 30 steps": _published(11, 5, low=(25 / 30, 1.15), high=(20 / 30, 1.15))
            | _attention(7, 2, 0.045, slope=0.045),
            "Open-Sora-Plan, 150 steps": _published(39, 6, low=(130 / 150, 1.1), high=(131 / 150, 1.2))
            | _attention(44, 3, 0.3),
            "Vchitect-2.0, 100 steps": _published(30, 5, low=(79 / 100, 1.05), high=(61 / 100, 1.1))
            | _attention(30, 2, 0.0),
        },
    )

    def compose(self) -> Composition:
        """Self-attention x fixed interval x share of the last change; CFG branch x interval x frequency residual."""
        has_attention = self.attention_interval > 1
        cfg = FrequencyResidual(
            interval=self.interval,
            warmup=self.warmup,
            low_gain=self.low_gain,
            high_gain=self.high_gain,
            low_until=self.low_until,
            high_from=self.high_from,
            layout=self.layout,
            batch_order=self.batch_order,
            shares_history=has_attention,
        )
        if not has_attention:
            return Composition(site=None, gate=None, cfg=cfg)
        return Composition(
            site=Parts(("attn",)),
            gate=FixedInterval(self.attention_interval, warmup=self.attention_warmup, offset=self.attention_offset),
            predictor=WeightedChange(self.attention_weight, self.attention_slope, self.attention_warmup),
            cfg=cfg,
        )
