"""FEB-Cache: a table says at which steps attention, and at which MLPs, are reused; the output may be scaled.

Source: arXiv:2503.07120 (first named EB-Cache); released code aSleepyTree/EB-Cache (DiT).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.gates import CodeTable
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import ScaledParts

# By the steps that remain: the last step, a third of those before it, every other one, and all of the first 22.
DIT_50 = (0, 2, 2, 0, 2, 2, 0, 2, 2, 2) + (0, 2) * 9 + (0,) * 22


@dataclass(frozen=True)
class FEBCache(Method):
    """One code per step, the last step's first: 0 computes all, 1 reuses attention and computes MLPs, 2 reuses both.

    Outputs are reused before their gate, which is fresh; with code 1 an MLP reads the stream that the old attention was
    added to. Reuse adds to the exposure bias of sampling, which the paper counters by dividing the predicted noise by
    ``delta`` on every step, full ones as well.

    The table of the code over 50 steps is 22 full steps and then ``cFcFcFcFcFcFcFcFcFcccFccFccF``.

    Cost: 1 copy of every part's output; a cached part does not run. No host sync.
    Differences from the code: ``delta`` is 1, which leaves the output as it is, because 0.965 was found for one
    denoiser and sampler; it divides each branch's output, which is the same, for guidance is linear; a table is
    stretched to runs of other lengths by the share of steps that remain; cross-attention goes with attention, a part
    with attention and MLP in one with the MLP.
    The paper's way to find a table, by frequency bands, is not in.
    """

    table: tuple[int, ...] = setting(DIT_50, "a code per step, the last step's first. Code: DiT's, 50 steps")
    delta: float = setting(1.0, "divides the output; 1 leaves it. Code: 0.965 (DiT, 50 DDPM steps)", gt=0)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="feb-cache",
        title="FEB-Cache",
        arxiv="2503.07120",
        site="parts",
        gate="given schedule per kind",
        predictor="reuse",
        tokens=None,
        fidelity="code",
        off={"table": (0,), "delta": 1.0},
        family="reuse of blocks and parts",
        when="DiT runs 50 steps, for which its table is published, or attention and MLP need tables of your own",
        citation="FEB-Cache: Frequency-Guided Exposure Bias Reduction for Enhancing Diffusion Transformer Caching, "
        "2025",
        published={"DiT-XL/2-256, 50 steps": {"table": DIT_50, "delta": 0.965}},
    )

    def compose(self) -> Composition:
        """Parts and the output's scale x table per kind x reuse."""
        return Composition(
            site=ScaledParts(decisions="kind", divisor=self.delta), gate=CodeTable(self.table), predictor=Reuse()
        )
