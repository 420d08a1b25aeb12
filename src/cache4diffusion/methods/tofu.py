"""ToFu: tokens are pruned in the first blocks and merged, with their norm kept, in the others.

Source: arXiv:2312.01026 (WACV 2024); no official code was found.
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
class ToFu(Method):
    """ToMe's matching in self-attention; what becomes of a group of tokens depends on the block.

    Where a block is far from linear, what lies between its inputs is none of them, and a group goes on as its
    destination (*pruned*); elsewhere as *MLERP* of its tokens: the direction of their mean, with the largest of their
    norms, which a mean would shrink. The first ``prune_depth`` of the blocks with self-attention prune, the others
    merge. The strip is ``rrrr``.

    Cost: ToMe's.
    Differences from the paper: which blocks prune is found there by a measure of linearity that could not be read; the
    depth is ours. MLERP's norm is as we remember it.
    """

    ratio: float = setting(0.5, "share of the tokens that is left out; 0 is off", ge=0, le=1)
    prune_depth: float = setting(0.5, "share of the blocks, from the first, that prune", ge=0, le=1)
    max_downsample: float = setting(1.0, "up to how much coarser levels are served", ge=1)
    window: int = setting(2, "side of the windows that hold one destination each", ge=1)
    is_random: bool = setting(True, "whether destinations are drawn")
    seed: int = setting(0, "of the draws", ge=0)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="tofu",
        title="ToFu",
        arxiv="2312.01026",
        site="parts on fewer tokens",
        gate="every step",
        predictor="none",
        tokens="merge or prune",
        fidelity="reconstructed",
        off={"ratio": 0.0},
        family="tokens",
        when="ToMe blurs: averaged tokens lose norm, and early blocks take none that lie between theirs",
        ladder=({"ratio": 0.3}, {}, {"ratio": 0.75}),
        citation="Kim et al., Token Fusion: Bridging the Gap between Token Pruning and Token Merging, WACV 2024",
    )

    def compose(self) -> Composition:
        """Parts on fewer tokens x every step x merge, with a form by depth."""
        return Composition(
            site=Reduced(("attn",), self.max_downsample),
            gate=Throughout(is_on=self.ratio > 0),
            tokens=MergeTokens(
                ratio=self.ratio,
                window=self.window,
                is_random=self.is_random,
                form="mlerp",
                pick_depth=self.prune_depth,
                seed=self.seed,
            ),
        )
