"""FBCache: first block cache. The first block decides whether the others run.

Source: no paper; released code chengzeyi/ParaAttention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.methods.dbcache import DBCache
from cache4diffusion.settings import setting


@dataclass(frozen=True)
class FBCache(Method):
    """`DBCache` with one front block, no back block, and no limits but the warm-up.

    Cost: one residual per stream and the probe's. A cached step runs one block.
    Published settings: threshold 0.08 for FLUX (0.12 with fp8), 0.06 for HunyuanVideo.
    Differences from the code: float32 scores; strict ``<`` as in ParaAttention (diffusers' port caches at equality).
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
        use="The simplest adaptive cache for transformers: one threshold, almost no memory.",
        citation="Cheng, ParaAttention: Context parallel attention and first block cache, 2024",
    )

    def compose(self) -> Composition:
        """A special case of DBCache."""
        return DBCache(
            threshold=self.threshold,
            front=1,
            back=0,
            warmup=self.warmup,
            decide=self.decide,
            branches=self.branches,
        ).compose()
