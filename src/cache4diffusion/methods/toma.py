"""ToMA: tokens are merged into the ones that stand for them best, and taken apart again, by matrix products.

Source: arXiv:2509.10918 (ICML 2025); released code WenboLuu/ToMA (FLUX alone).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.gates import Throughout
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.settings import setting
from cache4diffusion.sites import Reduced
from cache4diffusion.tokens import FacilityTokens


@dataclass(frozen=True)
class ToMA(Method):
    """On every step, attention and MLPs run on ``(1 - ratio) N`` destinations; see `FacilityTokens` for which.

    ``x = x + W^T f(A norm(x))``, where W spreads every token over the destinations of its tile and A is W with rows
    that add up to 1. Where every token belongs to one destination, A is orthogonal up to its scale and ``W^T`` its
    pseudo-inverse. Destinations and W are those of several steps. Text is not touched: in cross-attention, queries are
    merged. The strip is ``rrrr``.

    Attention that text enters along with the image, or that is given positions (RoPE), is left alone or refused.

    Cost: at every ``renew``-th step a matrix of cosines per tile and the greedy choice in it; at every step, per part,
    two products of ``N x tile^2 (1 - ratio)`` numbers with the features. Nothing is sorted or scattered.
    Differences from the code: it is for FLUX, and merges in joint attention, which is refused here: all rows of a batch
    share one table of positions, and merge at places of their own, where the code takes the first row's for all. There
    destinations and W are made once for all blocks of a kind and serve one step, and of three steps two are whole; here
    they are each block's own and serve several, in numbers that are the paper's for U-Nets as remembered. Tiles differ
    in size where the grid asks for it (the code: squares), and halves of guidance share their destinations.
    """

    ratio: float = setting(0.5, "share of the tokens that is merged; 0 is off. Code: 0.5", ge=0, le=1)
    tile: int = setting(8, "side of the tiles, about. Paper: 8; code: 4 (FLUX)", ge=1)
    temperature: float = setting(1e-3, "of the softmax over destinations. Code: 1e-3", gt=0)
    renew: int = setting(10, "steps between two choices of destinations", ge=1)
    reweigh: int = setting(5, "steps between two W", ge=1)
    max_downsample: float = setting(1.0, "up to how much coarser levels are served", ge=1)
    merge_ffn: bool = setting(True, "also in MLPs. Paper: yes")
    merge_cross_attn: bool = setting(True, "also the queries of cross-attention. Paper: yes")

    info: ClassVar[MethodInfo] = MethodInfo(
        name="toma",
        title="ToMA",
        arxiv="2509.10918",
        site="parts on fewer tokens",
        gate="every step",
        predictor="none",
        tokens="facility location",
        fidelity="code",
        off={"ratio": 0.0},
        family="tokens",
        when="ToMe's sorting and scattering cost what it saves, as beside fused attention kernels on a GPU",
        ladder=({"ratio": 0.25}, {}, {"ratio": 0.75}),
        citation="Lu et al., ToMA: Token Merge with Attention for Diffusion Models, ICML 2025",
        published={"SDXL, 1024 px": {"ratio": 0.5, "tile": 8}},
    )

    def compose(self) -> Composition:
        """Parts on fewer tokens x every step x facility location."""
        return Composition(
            site=Reduced.around_attention(
                ffn=self.merge_ffn, cross_attn=self.merge_cross_attn, max_downsample=self.max_downsample
            ),
            gate=Throughout(is_on=self.ratio > 0),
            tokens=FacilityTokens(self.ratio, self.tile, self.temperature, self.renew, self.reweigh),
        )
