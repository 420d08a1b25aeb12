"""T-GATE, version 1: cross-attention is frozen at a gate step, and guidance ends there.

Source: arXiv:2404.02747v1; released code HaozheLiu-ST/T-GATE, 0.1.1.
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
class TGateV1(Method):
    """Before step ``gate_step`` everything runs; from there on one CFG branch does, without cross-attention.

    What every cross-attention returned at the step in front of the gate is kept, and the mean over both branches stands
    for it: ``(o_uncond + o_cond) / 2``, before it is added to the stream. The branch that is left is the unconditional
    one; guidance leaves its output as it is. ``gate_step=0`` never caches; a gate behind the last step does nothing.

    Without guidance (distilled models) each call goes on with its own cross-attention. Where each branch has a call of
    its own, the one that is called first is left: with cross-attention frozen they differ in what else they are given.
    Where guidance begins only behind the gate, or a prompt is replaced there, both branches run at that step.

    Cost: one output of every cross-attention, of both branches. A step behind the gate costs less than half.
    Differences from the code: its counter wraps around, so that the very last step computes cross-attention again,
    under the negative prompt; here it does not. It keeps the mean, half as much. In both, whatever else is given to
    the denoiser beside the text (pooled text, sizes) is the unconditional branch's.
    """

    gate_step: int = setting(8, "first step without guidance and cross-attention; 0: none. Code: 8 of 20", ge=0)
    layout: Literal["auto", "batched", "sequential"] = setting(
        "auto", "whether both branches share a call; auto sees it from the calls"
    )
    batch_order: Literal["auto", "uncond-cond", "cond-uncond"] = setting(
        "auto", "which half of a batched call is which; auto knows diffusers' pipelines"
    )

    info: ClassVar[MethodInfo] = MethodInfo(
        name="t-gate-v1",
        title="T-GATE, version 1",
        arxiv="2404.02747",
        site="cross-attention and cfg branch",
        gate="one step",
        predictor="mean of both branches",
        tokens=None,
        fidelity="code",
        off={"gate_step": 0},
        family="guidance",
        when="guidance is on and text enters by cross-attention (SD, SDXL, PixArt): both end early",
        ladder=({"gate_step": 30}, {"gate_step": 20}, {"gate_step": 10}),
        citation="Zhang et al., Cross-Attention Makes Inference Cumbersome in Text-to-Image Diffusion Models, 2024",
        shares_branches=True,
        published={
            "Stable Diffusion, 20 steps": {"gate_step": 8},
            "SDXL, 25 steps": {"gate_step": 10},
            "PixArt-alpha, 25 steps": {"gate_step": 8},
            "LCM, 4 steps": {"gate_step": 1},
        },
    )

    def compose(self) -> Composition:
        """Cross-attention x one step x reuse; CFG branch x one step x the other branch's output."""
        return Composition(
            site=Parts(("cross_attn",)),
            gate=FrozenCross(self.gate_step),
            predictor=Reuse(),
            cfg=DropBranch(self.gate_step, self.layout, self.batch_order, shares_history=True, merges=True),
        )
