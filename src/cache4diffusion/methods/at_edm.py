"""AT-EDM: tokens that attention passes by are left out, and take the outputs of those most like them.

Source: arXiv:2405.05252 (CVPR 2024); no official code was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.gates import FixedInterval, Throughout
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.settings import setting
from cache4diffusion.sites import Reduced
from cache4diffusion.tokens import RankedTokens


@dataclass(frozen=True)
class ATEDM(Method):
    """Every part of a block runs without the share ``ratio`` of its tokens that is worth least; see `RankedTokens`.

    A token is worth what attention pays to it, weighted by what those are worth that pay: the fixed point of
    ``s = A^T s`` (graph-based weighted PageRank). Early in the run less is left out: blocks at both ends stay whole
    (denoising-steps-aware pruning). Full steps look at the attention maps, and the steps between go by what was seen:
    ``FrrrrFrrrr``.

    Cost: on full steps, the attention map of each served block, made once more beside the host's own (``2 N^2 D`` FLOPs
    and ``4 N^2`` bytes per row, one block at a time), ``iterations`` products with it, and cosines; none of that on the
    others, which use the host's fused kernels. FLOPs of full steps include it.
    Differences from the paper: there each step ranks anew; the cross-attention of text tokens, which may enter the
    weights there, does not here; a token that is left out keeps its own residual, and copies only what parts add (the
    paper copies whole tokens, in front of the next convolution); which blocks stay whole early on, and for how long,
    are reconstructed.
    """

    ratio: float = setting(0.4, "share of the tokens that is left out; 0 is off", ge=0, le=1)
    interval: int = setting(5, "steps between two looks at the attention; 1 leaves out nothing", ge=1)
    iterations: int = setting(20, "of the ranking", ge=1)
    early: float = setting(0.3, "fraction of the steps that leave out less. Paper: 15 of 50", ge=0, le=1)
    early_whole: float = setting(0.5, "share of the blocks that are whole then", ge=0, le=1)
    max_downsample: float = setting(2.0, "up to how much coarser levels are served", ge=1)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="at-edm",
        title="AT-EDM",
        arxiv="2405.05252",
        site="parts on fewer tokens",
        gate="interval",
        predictor="none",
        tokens="ranked by attention",
        fidelity="reconstructed",
        off={"ratio": 0.0},
        family="tokens",
        when="a U-Net paints much background, which attention passes by",
        ladder=({"ratio": 0.25}, {}, {"ratio": 0.6, "interval": 10}),
        citation="Wang et al., Attention-Driven Training-Free Efficiency Enhancement of Diffusion Models, CVPR 2024",
    )

    def compose(self) -> Composition:
        """Parts on fewer tokens x interval x ranked."""
        return Composition(
            site=Reduced(("attn", "cross_attn", "ffn"), self.max_downsample),
            gate=FixedInterval(self.interval) if self.ratio > 0 else Throughout(is_on=False),
            tokens=RankedTokens(self.ratio, self.iterations, self.early, self.early_whole),
        )
