"""FBCache: first block cache. The first block decides whether the others run.

Source: no paper; released code chengzeyi/ParaAttention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import ProbeThreshold, Warmup
from cache4diffusion.method import Composition, Dial, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Span


@dataclass(frozen=True)
class FBCache(Method):
    """Compute the first block; if its residual changed by less than ``threshold`` since the last full step, skip.

    ``score = mean|r - r_ref| / mean|r_ref|`` with ``r`` the first block's residual; on a cached step the residual of
    all other blocks is added as it was at the last full step. It is `DBCache` with one front block and no limits, up
    to a threshold of 1, from which on that one no longer looks at the score.

    Cost: one residual per stream and the probe's. A cached step runs one block.
    Differences from the code: float32 scores, over all channels (the code can take every n-th); strict ``<`` as in
    ParaAttention (diffusers' port caches at equality). The code's own default is 0, off; ours is FLUX's.
    """

    threshold: float = setting(0.08, "largest relative change that is still cached; 0 is off. Code: 0.08 (FLUX)", ge=0)
    warmup: int = setting(0, "first steps that are full. Code: 0", ge=0)
    decide: Literal["batch", "any", "row"] = setting("batch", "one decision, full if any row needs it, or per row")
    branches: Literal["independent", "tied"] = setting("independent", "whether CFG branches follow the first one")

    info: ClassVar[MethodInfo] = MethodInfo(
        name="fbcache",
        title="FBCache",
        arxiv=None,
        site="span",
        gate="probe of the first block",
        predictor="reuse of the residual",
        tokens=None,
        fidelity="code",
        off={"threshold": 0.0},
        family="adaptive gates",
        when="a transformer needs the simplest adaptive cache: one threshold, almost no memory",
        dial=Dial("threshold", 0.06, 1.2),
        ladder=({"threshold": 0.05}, {"threshold": 0.1}, {"threshold": 0.25}),
        citation="Cheng, ParaAttention: Context parallel attention and first block cache, 2024",
        published={
            "FLUX.1-dev": {"threshold": 0.08},
            "FLUX.1-dev in fp8": {"threshold": 0.12},
            "HunyuanVideo": {"threshold": 0.06},
            "diffusers' port": {"threshold": 0.05},
        },
    )

    def compose(self) -> Composition:
        """All blocks but the first x its residual x reuse, after a warm-up."""
        return Composition(
            site=Span(front=1),
            gate=ProbeThreshold(self.threshold),
            predictor=Reuse(),
            guards=(Warmup(self.warmup),),
            decide=self.decide,
            branches=self.branches,
        )
