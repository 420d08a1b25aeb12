"""VCUT: cross-attention to a single image embedding is computed once and added from then on.

Source: arXiv:2407.19205 (IEEE Access 2025); no code is out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.gates import FixedInterval, Schedule
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import SingleContext


@dataclass(frozen=True)
class VCUT(Method):
    """What a cross-attention returns is kept at the first step and added at all others; norm, queries, keys rest.

    ``CrossAttn(x, c) = W_o softmax(Q K^T) V + b_o`` with one key is ``W_o W_v c + b_o``, whatever x and the step are:
    it is exact but for rounding. A denoiser whose contexts are longer (text, an IP-adapter's tokens) is refused.

    Cost: one token for every row of a cross-attention's output (a frame; a place, where it is over time). A cached step
    saves all of cross-attention.
    Differences from the paper: the preprint leaves temporal cross-attention out altogether, and the journal's version
    replaces it by the linear layer; here both kinds are kept, exactly and at the same price. The one computation is the
    module's own at the first step; weights of the layers that rest stay in memory.
    """

    interval: int = setting(0, "steps after which it is computed anew; 0: once in a run, 1: always", ge=0)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="vcut",
        title="VCUT",
        arxiv="2407.19205",
        site="cross-attention",
        gate="the first step",
        predictor="reuse",
        tokens=None,
        fidelity="paper",
        off={"interval": 1},
        family="U-Net",
        when="a video is made from one image embedding (Stable Video Diffusion), and nothing may be lost",
        citation="Taghipour et al., Faster Image2Video Generation: A Closer Look at CLIP Image Embedding's Impact on "
        "Spatio-Temporal Cross-Attentions, IEEE Access 2025",
        is_exact=True,
    )

    def compose(self) -> Composition:
        """Cross-attention to one token x the first step x reuse."""
        gate = FixedInterval(self.interval) if self.interval else Schedule((0,))
        return Composition(site=SingleContext(), gate=gate, predictor=Reuse())
