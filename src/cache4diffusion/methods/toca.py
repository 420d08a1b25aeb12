"""ToCa: token-wise caching. Between full steps the tokens that matter most are computed, the others reused.

Source: arXiv:2410.05317 (ICLR 2025); released code Shenyi-Z/ToCa.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import FixedInterval
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts
from cache4diffusion.tokens import TopScore


@dataclass(frozen=True)
class ToCa(Method):
    """``warmup`` full steps, then one in ``interval``; between them the MLPs run on a fraction of the tokens.

    Attention outputs are reused as a whole (computing a subset is worse, by the maintainers' account). See `TopScore`
    for the score and the ratio. In FLUX's single-stream blocks the un-projected attention output is kept, so that the
    fused projection can run on single tokens.

    Cost: every part's output, the un-projected attention of fused blocks, and two numbers per token and part. On full
    steps the attention maps are computed a second time for the score (``score="random"`` needs none).
    Published settings (interval, ratio): FLUX 4, 0.1; DiT 3, 0.07 (``schedule="dit"``); PixArt 3, 0.3.
    Differences from the code: text tokens are selected among themselves in every block (the FLUX code lets them compete
    with image tokens in single-stream blocks); the gate is asked once per step; the spatial bonus ``s4`` (off in the
    FLUX code) and the cross-attention score ``s2`` are not in yet.
    """

    interval: int = setting(4, "distance of two full steps; 1 never caches. Code: 4 (FLUX), 3 (DiT)", ge=1)
    recompute_ratio: float = setting(0.1, "fraction of the tokens that is computed. Code: 0.1 (FLUX)", ge=0, le=1)
    age_weight: float = setting(0.25, "weight of the time since a token was computed. Code: 0.25", ge=0)
    schedule: Literal["flux", "dit", "constant"] = setting("flux", "how the ratio varies over steps, layers and parts")
    score: Literal["attention", "random"] = setting("attention", "what ranks the tokens. Code: attention")
    warmup: int = setting(3, "first steps that are always full. Code: 3 (FLUX)", ge=1)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="toca",
        title="ToCa",
        arxiv="2410.05317",
        site="parts",
        gate="fixed interval",
        predictor="reuse",
        tokens="top score",
        fidelity="code",
        off={"interval": 1},
        use="Reuse that refreshes the tokens the image looks at most; pays at many tokens.",
        citation="Zou et al., Accelerating Diffusion Transformers with Token-wise Feature Caching, ICLR 2025",
    )

    def compose(self) -> Composition:
        """Parts x fixed interval after a warm-up x reuse x top score."""
        return Composition(
            site=Parts(),
            gate=FixedInterval(self.interval, anchor="warmup", warmup=self.warmup),
            predictor=Reuse(),
            tokens=TopScore(self.recompute_ratio, self.age_weight, self.interval, self.schedule, self.score),
        )
