"""AdaCache: every full step measures how fast things change, and a codebook says how long to reuse them.

Source: arXiv:2411.02397; released code AdaCache-DiT/AdaCache (Open-Sora).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.data import adacache_codebook
from cache4diffusion.gates import AdaptiveInterval, ForceLast, Guard, Warmup
from cache4diffusion.method import Composition, Dial, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Span


@dataclass(frozen=True)
class AdaCache(Method):
    """The change per step of one block's residual picks the next interval from a codebook.

    ``d = mean|q - p| / mean|p| / tau`` for the residual ``q`` of the measured block at this full step, ``p`` at the one
    before, ``tau`` steps earlier; the next interval is the codebook's rate for ``d``. Every block reuses both of its
    residuals (attention; cross-attention and MLP) on a cached step, after their gates; added up over the blocks that is
    the residual of the whole stack, so one tensor is kept instead of two per block. Steps 1, 2 and the last two are
    full.

    ``motion`` is the paper's motion regularisation for video: where neighbouring latent frames differ much, or suddenly
    more, the interval shrinks (see `AdaptiveInterval`). It needs a latent of shape ``[B, C, frames, H, W]``.

    Cost: one residual per stream, and the measured block's. A cached step runs no block. One host sync per full step.
    Differences from the code: the measured residual is that of the whole block (there of its attention, after the
    gate; of one temporal block, the 13th); the motion before the first measurement counts as 1.
    """

    codebook: str = setting("fast", "'fast', 'slow', 'long', or 'off' (every interval 1). Code: fast or slow")
    thresholds: tuple[float, ...] = setting((), "your own codebook: rising changes per step, one less than rates")
    rates: tuple[int, ...] = setting((), "your own codebook: an interval for each range between the thresholds")
    block: float = setting(0.5, "the measured block, as a fraction of the depth. Code: 13 of 28", ge=0, le=1)
    motion: bool = setting(False, "whether motion between frames shortens the intervals. Code: off by default")
    cooldown: int = setting(2, "last steps that are always full; 0 needs no step count. Code: 2", ge=0)
    decide: Literal["batch", "any", "row"] = setting("batch", "one decision, full if any row needs it, or per row")

    info: ClassVar[MethodInfo] = MethodInfo(
        name="adacache",
        title="AdaCache",
        arxiv="2411.02397",
        site="span",
        gate="adaptive interval",
        predictor="reuse of the residual",
        tokens=None,
        fidelity="code",
        off={"codebook": "off"},
        family="adaptive gates",
        when="videos differ: quiet scenes should be cached for long, moving ones should not",
        dial=Dial("thresholds", 0.1, 6.0, unit=(0.08, 0.16, 0.24, 0.32, 0.40), beside={"rates": (6, 5, 4, 3, 2, 1)}),
        ladder=(
            {"thresholds": (0.008, 0.016, 0.024, 0.032, 0.04), "rates": (6, 5, 4, 3, 2, 1)},
            {"thresholds": (0.024, 0.048, 0.072, 0.096, 0.12), "rates": (6, 5, 4, 3, 2, 1)},
            {"thresholds": (0.08, 0.16, 0.24, 0.32, 0.4), "rates": (6, 5, 4, 3, 2, 1)},
        ),
        citation="Kahatapitiya et al., Adaptive Caching for Faster Video Generation with Diffusion Transformers, "
        "ICCV 2025",
        published={
            "Open-Sora 1.2, 30 steps, fast": {"codebook": "fast"},
            "Open-Sora 1.2, 30 steps, slow": {"codebook": "slow"},
            "Open-Sora 1.2, 100 steps": {"codebook": "long"},
        },
    )

    def compose(self) -> Composition:
        """All blocks x adaptive interval x reuse; the last steps are full."""
        thresholds, rates = (self.thresholds, self.rates) if self.rates else adacache_codebook(self.codebook)
        guards: tuple[Guard, ...] = (Warmup(1),)
        if self.cooldown:
            guards += (ForceLast(self.cooldown),)
        return Composition(
            site=Span(),
            gate=AdaptiveInterval(thresholds, rates, block=self.block, motion=self.motion),
            predictor=Reuse(),
            guards=guards,
            decide=self.decide,
        )
