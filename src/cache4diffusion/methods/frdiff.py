"""FRDiff: reuse features where details form, hold the score where outlines do, and mix the two between.

Source: arXiv:2312.03517 (ECCV 2024); released code Jungwon-Lee/FRDiff.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import FixedInterval
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import MAP_KINDS, PART_KINDS, MixedScore


@dataclass(frozen=True)
class FRDiff(Method):
    """Between full steps at a fixed interval, the output is a mix of the last one and of one made with cached parts.

    ``lam = clip((slope * (i / num_steps - bias) + 2) / 4, 0, 1)``; ``e = lam * e_reuse + (1 - lam) * e_last``, before
    guidance. Early, where ``lam`` is 0, nothing runs: as if the solver took a larger step. Late, where it is 1, parts
    are reused. The ramp between is ``4 / slope`` of the run wide.

    On U-Nets, as in the code, a part is what a whole transformer adds to its feature map, or the first convolution of
    a ResNet block, before the timestep is added; everything else of such a block runs.

    Cost: one copy of every part's output, and one of the denoiser's.
    Differences from the code: ``parts="attn"`` caches attention alone, as the DiT code does. Learned key steps (AutoFR)
    are not in.
    """

    interval: int = setting(2, "distance of two full steps; 1 never caches. Code: 2", ge=1)
    bias: float = setting(0.5, "middle of the ramp, fraction of the steps. Code: 0.5", ge=-0.5, le=1.5)
    slope: float = setting(30.0, "steepness of the ramp. Code: 30", gt=0)
    parts: Literal["all", "attn"] = setting("all", "which parts are reused. Code: all (SD), attn (DiT)")

    info: ClassVar[MethodInfo] = MethodInfo(
        name="frdiff",
        title="FRDiff",
        arxiv="2312.03517",
        site="parts and output",
        gate="fixed interval",
        predictor="reuse",
        tokens=None,
        fidelity="code",
        off={"interval": 1},
        family="reuse of blocks and parts",
        when="fewer steps will do early in the run and reuse of parts late, in one method",
        ladder=({}, {"interval": 3}, {"interval": 6}),
        citation="So et al., FRDiff: Feature Reuse for Universal Training-free Acceleration of Diffusion Models, "
        "ECCV 2024",
        published={
            "Stable Diffusion, 50 steps": {"interval": 2, "bias": 0.5, "slope": 30.0, "parts": "all"},
        },
    )

    def compose(self) -> Composition:
        """Parts mixed with the output x fixed interval x reuse."""
        kinds = (*PART_KINDS, *MAP_KINDS) if self.parts == "all" else ("attn", "cross_attn")
        return Composition(
            site=MixedScore(kinds, slope=self.slope, bias=self.bias),
            gate=FixedInterval(self.interval),
            predictor=Reuse(),
        )
