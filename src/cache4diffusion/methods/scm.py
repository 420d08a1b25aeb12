"""SCM: step computation masks. Which steps are computed is written down before sampling.

Source: no paper; released code vipshop/cache-dit (``steps_computation_mask``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import Mask, ProbeThreshold, StepMask
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Span


@dataclass(frozen=True)
class SCM(Method):
    """Steps marked 1 are computed; at the others everything between ``front`` and ``back`` is reused.

    ``policy="static"`` always caches there; ``"dynamic"`` still asks `DBCache`'s score, so that a step may be computed
    although the mask does not ask for it. Presets over 28 steps (F computed, c cached)::

        slow    FFFFFFFFcFFFccFFFccFFccFcccF
        medium  FFFFFFcFFcccFFcccFFcccFFcccF
        fast    FFFFFFcFcccFccccFcccccFccccF
        ultra   FFFFccFcccccFccccccFcccccccF

    Cost: one residual per stream. A cached step runs ``front + back`` blocks. No host sync with ``"static"``.
    Differences from the code: for other lengths than the published ones the 28-step mask is scaled in proportion
    (``variant="official"`` lets bins grow and then cuts the end off, which loses the proportion); one decision over all
    block lists.
    """

    mask: str | tuple[bool, ...] = setting(
        "medium", "'slow', 'medium', 'fast', 'ultra', 'off', one digit per step such as '1101', or flags"
    )
    policy: Literal["static", "dynamic"] = setting("static", "whether unmarked steps ask the score as well")
    threshold: float = setting(0.08, "largest relative change still cached, with policy='dynamic'. Code: 0.08", ge=0)
    front: int = setting(1, "first blocks that always run (and are watched if dynamic). Code: 8", ge=0)
    back: int = setting(0, "last blocks that always run. Code: 0", ge=0)
    variant: Literal["default", "official"] = setting("default", "'official': the code's masks for other lengths")

    info: ClassVar[MethodInfo] = MethodInfo(
        name="scm",
        title="SCM (step masks)",
        arxiv=None,
        site="span",
        gate="step mask",
        predictor="reuse of the residual",
        tokens=None,
        fidelity="code",
        off={"mask": "off"},
        family="reuse of blocks and parts",
        when="you want to say yourself which steps are computed, also with few-step denoisers",
        ladder=({"mask": "slow"}, {"mask": "medium"}, {"mask": "ultra"}),
        citation="DefTruth et al., cache-dit: A PyTorch-native inference engine with hybrid cache acceleration, 2025",
        published={
            "28 steps, slow": {"mask": "slow"},
            "28 steps, medium": {"mask": "medium"},
            "28 steps, fast": {"mask": "fast"},
            "28 steps, ultra": {"mask": "ultra"},
        },
    )

    def compose(self) -> Composition:
        """Span between front and back x mask (x probe) x reuse."""
        site = Span(self.front, self.back)
        resize = "bins" if self.variant == "official" else "scale"
        if self.policy == "static" or self.mask == "off":
            return Composition(site=site, gate=StepMask(self.mask, resize), predictor=Reuse())
        gate = ProbeThreshold(self.threshold, blocks=self.front)
        return Composition(site=site, gate=gate, predictor=Reuse(), guards=(Mask(self.mask, resize=resize),))
