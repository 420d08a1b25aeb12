"""ToMe for Stable Diffusion: similar tokens are merged in front of self-attention and unmerged behind it.

Source: arXiv:2303.17604 (CVPR workshop 2023); released code dbolya/tomesd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.gates import Throughout
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.settings import setting
from cache4diffusion.sites import Reduced
from cache4diffusion.tokens import MergeTokens


@dataclass(frozen=True)
class ToMe(Method):
    """On every step, self-attention runs on ``N - r`` tokens, ``r = ratio * N``; see `MergeTokens` for which.

    ``x = x + unmerge(attn(merge(norm(x))))``: a merged token is the mean of its group, and every token of the group
    gets its output. Tokens are matched by what enters the block, once for all its parts. Nothing is kept from step to
    step, so the strip is ``rrrr``. Attention that text enters along with the image, or that is given positions (RoPE),
    is left alone or refused: a merged token has no single position.

    Both halves of batched guidance are merged alike.

    Cost: a matrix of cosines per block, ``3/4 N x 1/4 N``; with fused attention kernels it can cost what it saves.
    Differences from the code: of halves of guidance, the mean cosine decides, where the code shares the destinations
    and matches each by itself; destinations are drawn for any size of the batch; a level counts as coarse beside the
    finest one with attention, where the code compares with the latent (and does nothing on SDXL by default). Means are
    taken in float32.
    """

    ratio: float = setting(0.5, "share of the tokens that is merged; 0 is off. Code: 0.5", ge=0, le=1)
    max_downsample: float = setting(1.0, "up to how much coarser levels are served. Code: 1", ge=1)
    window: int = setting(2, "side of the windows that hold one destination each. Code: 2", ge=1)
    is_random: bool = setting(True, "whether destinations are drawn. Code: yes")
    merge_ffn: bool = setting(False, "also in MLPs. Code: no")
    merge_cross_attn: bool = setting(False, "also the queries of cross-attention. Code: no")
    seed: int = setting(0, "of the draws", ge=0)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="tome",
        title="ToMe",
        arxiv="2303.17604",
        site="parts on fewer tokens",
        gate="every step",
        predictor="none",
        tokens="merge",
        fidelity="code",
        off={"ratio": 0.0},
        family="tokens",
        when="a U-Net spends its time in self-attention of large images",
        ladder=({"ratio": 0.3}, {}, {"ratio": 0.75}),
        citation="Bolya and Hoffman, Token Merging for Fast Stable Diffusion, CVPR Workshop 2023",
        published={
            "Stable Diffusion 1.5, 512 px": {"ratio": 0.5, "max_downsample": 1.0, "window": 2},
            "Stable Diffusion 1.5, gentle": {"ratio": 0.3},
            "Stable Diffusion 1.5, hard": {"ratio": 0.6},
        },
    )

    def compose(self) -> Composition:
        """Parts on fewer tokens x every step x merge."""
        return Composition(
            site=Reduced.around_attention(
                ffn=self.merge_ffn, cross_attn=self.merge_cross_attn, max_downsample=self.max_downsample
            ),
            gate=Throughout(is_on=self.ratio > 0),
            tokens=MergeTokens(ratio=self.ratio, window=self.window, is_random=self.is_random, seed=self.seed),
        )
