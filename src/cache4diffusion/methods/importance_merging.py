"""Importance-based token merging: what guidance moves most is never merged away.

Source: arXiv:2411.16720; no code was read.
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
class ImportanceMerging(Method):
    """ToMe in self-attention, with destinations drawn from the important tokens, none of which is merged.

    A token is important if the halves of guidance were far apart there at the step before: the mean of ``|conditional -
    unconditional|`` over channels, pooled to the block's grid; the top ``pool`` of the tokens are. At the first step,
    where the halves are not in one call, and without guidance, nothing is known, and it is `ToMe`; the last two are
    noted. The strip is ``rrrr``.

    Cost: ToMe's, and one number per position of the output.
    Differences from the paper: the share of important tokens and that destinations are drawn from them at random are
    reconstructed; there are as many destinations as ToMe's windows give, and the share never goes below that.
    """

    ratio: float = setting(0.5, "share of the tokens that is merged; 0 is off", ge=0, le=1)
    pool: float = setting(0.4, "share of the tokens that are important", ge=0, le=1)
    max_downsample: float = setting(1.0, "up to how much coarser levels are served", ge=1)
    window: int = setting(2, "there is one destination for so many rows and columns", ge=1)
    seed: int = setting(0, "of the draws", ge=0)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="importance-merging",
        title="Importance-based Token Merging",
        arxiv="2411.16720",
        site="parts on fewer tokens",
        gate="every step",
        predictor="none",
        tokens="merge",
        fidelity="reconstructed",
        off={"ratio": 0.0},
        family="tokens",
        when="ToMe loses detail where the prompt matters, and guidance runs in one batch",
        ladder=({"ratio": 0.3}, {}, {"ratio": 0.75, "pool": 0.25}),
        citation="Wu et al., Importance-Based Token Merging for Efficient Image and Video Generation, arXiv 2411.16720",
    )

    def compose(self) -> Composition:
        """Parts on fewer tokens x every step x merge around important tokens."""
        return Composition(
            site=Reduced(("attn",), self.max_downsample),
            gate=Throughout(is_on=self.ratio > 0),
            tokens=MergeTokens(ratio=self.ratio, window=self.window, pool=self.pool, seed=self.seed),
        )
