"""Importance-based token merging: what guidance moves most is merged last.

Source: arXiv:2411.16720 (ICCV 2025); released code cvlab-stonybrook/importance-token-merge.
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
    """ToMe in self-attention, with destinations drawn from the important tokens, which are merged after all others.

    A token is important if the halves of guidance were far apart there at the step before: the mean of ``|conditional -
    unconditional|`` over channels, pooled to the block's grid. Of N tokens, r of which are merged, the first
    ``pool (N - r)`` are: all others are merged, and of these as many as it then takes, those most like a destination
    first; with a pool of 1 or less, none. At the first step, where the halves are not in one call, and without
    guidance, nothing is known, and it is `ToMe`; the last two are noted. The strip is ``rrrr``.

    Cost: ToMe's, and one number per position of the output.
    Differences from the code: there are as many destinations as ToMe's windows give, where the code takes a quarter of
    the tokens (the same for even grids); destinations are one draw for all rows, of those that matter as much some are
    drawn, and the matching of halves is `ToMe`'s; for PixArt the code matches by distance. In its examples groups go on
    as their destination for the first 2 of 50 steps (PixArt: 4 of 20): here all are averaged. Videos (AnimateDiff in
    the paper) are ToMe's.
    """

    ratio: float = setting(0.5, "share of the tokens that is merged; 0 is off. Code: 0.5 to 0.7", ge=0, le=1)
    pool: float = setting(1.4, "important tokens, as a multiple of those left. Code: 1.4 (SD 2), 1 (PixArt)", gt=0)
    max_downsample: float = setting(1.0, "up to how much coarser levels are served. Code: 1", ge=1)
    window: int = setting(2, "there is one destination for so many rows and columns. Code: 2", ge=1)
    seed: int = setting(0, "of the draws", ge=0)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="importance-merging",
        title="Importance-based Token Merging",
        arxiv="2411.16720",
        site="parts on fewer tokens",
        gate="every step",
        predictor="none",
        tokens="merge",
        fidelity="code",
        off={"ratio": 0.0},
        family="tokens",
        when="ToMe loses detail where the prompt matters, and guidance runs in one batch",
        ladder=({"ratio": 0.3}, {}, {"ratio": 0.75}),
        citation="Wu et al., Importance-Based Token Merging for Efficient Image and Video Generation, ICCV 2025",
        published={
            "Stable Diffusion 2, 768 px": {"ratio": 0.7, "pool": 1.4},
            "PixArt-alpha, 1024 px": {"ratio": 0.5, "pool": 1.0},
        },
    )

    def compose(self) -> Composition:
        """Parts on fewer tokens x every step x merge around important tokens."""
        return Composition(
            site=Reduced(("attn",), self.max_downsample),
            gate=Throughout(is_on=self.ratio > 0),
            tokens=MergeTokens(ratio=self.ratio, window=self.window, pool=self.pool, seed=self.seed),
        )
