"""T-GATE, version 2: as version 1, and self-attention is reused at an interval before the gate step.

Source: arXiv:2404.02747v2 (TMLR 2025); released code HaozheLiu-ST/T-GATE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import FrozenCross
from cache4diffusion.guidance import DropBranch
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts


@dataclass(frozen=True)
class TGateV2(Method):
    """Early in the run self-attention is reused, late in the run cross-attention, and guidance ends between.

    Cross-attention and guidance are as in version 1 (`TGateV1`). Self-attention is computed up to step ``warmup``, then
    on steps that are multiples of ``interval``, and at the step in front of the gate; from the gate on, on
    multiples of ``late_interval`` (1: always). Where it is reused right behind the gate, it is the mean of both
    branches as well. With the defaults it runs at 0, 1, 2, 5, 9, 10, 11, ... ``interval=1`` is version 1.

    Cost: one output of every attention, of both branches.
    Differences from the code: nothing survives from one image to the next; a gate so early that nothing was kept
    computes. Joint attention of text and image is left alone, as there is no cross-attention beside it.
    """

    gate_step: int = setting(10, "first step without guidance and cross-attention; 0: none. Code: 10 of 25", ge=0)
    interval: int = setting(5, "distance of self-attention's full steps before it; 1 never caches. Code: 5, 3", ge=1)
    late_interval: int = setting(1, "the same from the gate step on. Code: 1", ge=1)
    warmup: int = setting(2, "last step up to which self-attention is always computed. Code: 2", ge=0)
    layout: Literal["auto", "batched", "sequential"] = setting(
        "auto", "whether both branches share a call; auto sees it from the calls"
    )
    batch_order: Literal["auto", "uncond-cond", "cond-uncond"] = setting(
        "auto", "which half of a batched call is which; auto knows diffusers' pipelines"
    )

    info: ClassVar[MethodInfo] = MethodInfo(
        name="t-gate-v2",
        title="T-GATE, version 2",
        arxiv="2404.02747",
        site="attention and cfg branch",
        gate="intervals around one step",
        predictor="reuse, mean of both branches",
        tokens=None,
        fidelity="code",
        off={"gate_step": 0, "interval": 1},
        family="guidance",
        when="guidance is on, text enters by cross-attention, and self-attention is reused at first",
        ladder=({"gate_step": 30}, {"gate_step": 20}, {"gate_step": 10, "late_interval": 2}),
        citation="Liu et al., Faster Diffusion Through Temporal Attention Decomposition, TMLR 2025",
        shares_branches=True,
        published={
            "SDXL, 25 steps": {"gate_step": 10, "interval": 5, "late_interval": 1, "warmup": 2},
            "PixArt, 25 steps": {"gate_step": 15, "interval": 3, "late_interval": 1, "warmup": 2},
            "LCM-SDXL, 4 steps": {"gate_step": 1, "interval": 1, "late_interval": 1, "warmup": 0},
        },
    )

    def compose(self) -> Composition:
        """Attention x intervals around one step x reuse; CFG branch x one step x the other branch's output."""
        return Composition(
            site=Parts(("attn", "cross_attn"), decisions="kind", required=("cross_attn",)),
            gate=FrozenCross(self.gate_step, self.interval, self.late_interval, self.warmup),
            predictor=Reuse(),
            cfg=DropBranch(self.gate_step, self.layout, self.batch_order, shares_history=True, merges=True),
        )
