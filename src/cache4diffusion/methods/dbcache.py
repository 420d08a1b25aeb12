"""DBCache: dual block cache. The first blocks decide, the middle is cached, the last blocks always run.

Source: no paper; released code vipshop/cache-dit, counting of release 1.5.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import Guard, Mask, MaxAccumulated, MaxRun, MaxTotal, ProbeThreshold, Warmup
from cache4diffusion.method import Composition, Dial, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Span


@dataclass(frozen=True)
class DBCache(Method):
    """Compute ``front`` blocks; if their residual changed by less than ``threshold`` since the last full step, skip.

    ``score = mean|r - r_ref| / mean|r_ref|`` with ``r`` the residual of the first blocks; on a cached step the residual
    of the blocks between is added as it was at the last full step, and the last ``back`` blocks run. Limits are tried
    in cache-dit's order: warm-up, mask, total, run, accumulated, then the score.

    Cost: one residual per stream and the probe's. A cached step runs ``front + back`` blocks. One host sync per
    decision.
    Differences from the code: one decision over all block lists of a denoiser (FLUX has two); ``variant="official"``
    gates each list by its own first blocks. Scores are float32 sums; the code takes means in the model's dtype. With a
    threshold of 1 or more, which caches whatever the score, the code logs no score, so ``max_accumulated`` has nothing
    to sum there; here it has. Runs are counted as in release 1.5.3 (older ones drift). Left out: comparing hidden
    states instead of residuals, a subset of channels, or only tokens that changed enough.
    """

    threshold: float = setting(0.08, "largest relative change that is still cached; 0 is off. Code: 0.08", ge=0)
    front: int = setting(8, "first blocks that always run and are watched. Code: 8", ge=1)
    back: int = setting(0, "last blocks that always run. Code: 0", ge=0)
    warmup: int = setting(8, "first steps that are full. Code: 8", ge=0)
    warmup_interval: int = setting(1, "of the warm-up steps only every n-th is forced to be full. Code: 1", ge=1)
    max_cached: int | None = setting(None, "most cached steps in a run; None for no limit (code: -1)", ge=0)
    max_run: int | None = setting(None, "most cached steps in a row; None for no limit (code: -1)", ge=0)
    max_accumulated: float | None = setting(None, "sum of scores after which nothing is cached. Code: None", gt=0)
    mask: tuple[bool, ...] = setting(
        (), "steps that must be computed (SCM), () for none; its leading ones bound the warm-up"
    )
    mask_policy: Literal["dynamic", "static"] = setting("dynamic", "whether unmasked steps still ask the score")
    decide: Literal["batch", "any", "row"] = setting("batch", "one decision, full if any row needs it, or per row")
    branches: Literal["independent", "tied"] = setting("independent", "whether CFG branches follow the first one")
    variant: Literal["default", "official"] = setting("default", "'official': one decision per block list")

    info: ClassVar[MethodInfo] = MethodInfo(
        name="dbcache",
        title="DBCache",
        arxiv=None,
        site="span",
        gate="probe of front blocks",
        predictor="reuse of the residual",
        tokens=None,
        fidelity="code",
        off={"threshold": 0.0},
        family="adaptive gates",
        when="quality must hold from image to image: the dial is one threshold, the memory a few tensors",
        dial=Dial("threshold", 0.06, 0.9),
        ladder=({"threshold": 0.05, "front": 1}, {"threshold": 0.15, "front": 1}, {"threshold": 0.4, "front": 1}),
        citation="DefTruth et al., cache-dit: A PyTorch-native inference engine with hybrid cache acceleration, 2025",
        published={
            "default, F8B0_W8_R0.08": {"threshold": 0.08, "front": 8, "back": 0, "warmup": 8},
            "FLUX.1-dev, F8B0_W4MC0_R0.08": {"threshold": 0.08, "front": 8, "back": 0, "warmup": 4},
            "FLUX.1-dev, F8B0_W4MC3_R0.12": {"threshold": 0.12, "front": 8, "back": 0, "warmup": 4, "max_run": 3},
            "FLUX.1-dev, F4B0_W4MC3_R0.12": {"threshold": 0.12, "front": 4, "back": 0, "warmup": 4, "max_run": 3},
            "FLUX.1-dev, F4B0_W4MC4_R0.12": {"threshold": 0.12, "front": 4, "back": 0, "warmup": 4, "max_run": 4},
            "Qwen-Image-Lightning, 4 steps, F16B16_W2MC1_R0.8": {
                "threshold": 0.8,
                "front": 16,
                "back": 16,
                "warmup": 2,
                "max_run": 1,
            },
        },
    )

    def compose(self) -> Composition:
        """Span between front and back x probe x reuse, under guards."""
        warmup = self.warmup
        if self.mask:  # as in the code: the mask's leading ones are the longest warm-up it allows
            warmup = min(warmup, next((i for i, flag in enumerate(self.mask) if not flag), len(self.mask)))
        guards: list[Guard] = [Warmup(warmup, self.warmup_interval)]
        if self.mask:
            guards.append(Mask(self.mask, self.mask_policy))
        if self.max_cached is not None:
            guards.append(MaxTotal(self.max_cached))
        if self.max_run is not None:
            guards.append(MaxRun(self.max_run))
        if self.max_accumulated is not None:
            guards.append(MaxAccumulated(self.max_accumulated))
        return Composition(
            site=Span(self.front, self.back, per_list=self.variant == "official"),
            gate=ProbeThreshold(self.threshold, blocks=self.front, is_open_at_one=True),
            predictor=Reuse(),
            guards=tuple(guards),
            decide=self.decide,
            branches=self.branches,
        )
