"""Prune the tokens that attention passes by: graph-based weighted PageRank, of AT-EDM (arXiv:2405.05252)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cache4diffusion.errors import SettingError
from cache4diffusion.tokens.base import TokenPlace
from cache4diffusion.tokens.merging import match, merge_plan
from cache4diffusion.tokens.reduction import Plan, Signal


def page_rank(maps: Tensor, iterations: int) -> Tensor:
    """``s <- A^T s`` from the uniform ``s``: what a token is worth if attention hands on what tokens are worth.

    Each row of A adds up to 1, and so does ``s`` throughout. Its fixed point is the eigenvector of ``A^T`` to the
    eigenvalue 1; where the columns of A add up to 1 as well, it is uniform.

    Args:
        maps: ``A[b, i, j]``, the attention that query i pays to key j, ``[B, N, N]``.
        iterations: as many products.

    Returns:
        ``[B, N]``.
    """
    score = maps.new_full((len(maps), 1, maps.shape[-1]), 1 / maps.shape[-1])
    for _ in range(iterations):
        score = score @ maps
    return score[:, 0]


@dataclass
class RankedState:
    """Of one block: what it goes by until it is looked at again."""

    plan: Plan | None = None


@dataclass(frozen=True)
class RankedTokens:
    """The tokens of lowest `page_rank` are left out, and get the outputs of the tokens left that are most like them (by
    cosine of what enters the block).

    The attention is that of the last full step, averaged over heads; halves of batched guidance go by the mean of
    theirs. Nothing is averaged: those left go on as they are. Nothing is drawn; of equal ranks, the first tokens are
    kept.

    In the first ``early`` of the run, the blocks at both ends leave out nothing: of those with such attention the
    share ``early_whole``, half from the first and half from the last.

    Args:
        ratio: share of the tokens that is left out, 0 to 1; one token is always left.
        iterations: of the ranking, 1 or more.
        early: fraction of the steps, 0 to 1.
        early_whole: share of the blocks, 0 to 1.

    Raises:
        SettingError: a value is out of range.

    Memory: two indices per token and block; on a full step, one map ``[B, N, N]`` in float32 at a time.
    """

    ratio: float = 0.4
    iterations: int = 20
    early: float = 0.0
    early_whole: float = 0.5

    def __post_init__(self) -> None:
        if not all(0 <= share <= 1 for share in (self.ratio, self.early, self.early_whole)) or self.iterations < 1:
            raise SettingError(
                f"RankedTokens(ratio={self.ratio}, iterations={self.iterations}, early={self.early}, "
                f"early_whole={self.early_whole}): iterations must be 1 or more, the others 0 to 1."
            )

    @property
    def needs_num_steps(self) -> bool:
        """A fraction of the run."""
        return 0 < self.early < 1 and self.early_whole > 0

    @property
    def signal(self) -> Signal | None:
        """Nothing of other steps."""
        return None

    def init(self) -> RankedState:
        """Nothing is ranked yet."""
        return RankedState()

    def rank(self, state: RankedState, place: TokenPlace, entering: Tensor, maps: Tensor) -> int:
        """Take in the attention of a full step."""
        (batch, length, dim), count = entering.shape, self._left(entering.shape[1])
        if place.twins is not None:
            mean = (maps + maps.roll(batch // 2, 0)) / 2
            maps = torch.where(place.twins[:, None, None], mean, maps)
        order = page_rank(maps, self.iterations).sort(dim=1, descending=True, stable=True).indices
        kept, gone = order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values
        nearest = match(entering, kept, gone, place.twins)[1]
        every = torch.arange(length - count, device=gone.device).expand(batch, -1)
        state.plan = merge_plan(kept, gone, nearest, every, "pick")
        return 2 * batch * (self.iterations * length**2 + count * (length - count) * dim)

    def plan(self, state: RankedState, place: TokenPlace, entering: Tensor) -> Plan | None:
        """What the last full step said."""
        served = state.plan
        if served is None or self._is_whole(place) or self._left(entering.shape[1]) == entering.shape[1]:
            return None
        return served

    def _left(self, length: int) -> int:
        """How many tokens are left."""
        return max(length - int(self.ratio * length + 1e-9), 1)

    def _is_whole(self, place: TokenPlace) -> bool:
        """Whether a block leaves out nothing at this step."""
        depth, is_early = (place.layer + 0.5) / place.num_layers, self.early == 1
        if self.needs_num_steps:
            assert place.step.num_steps is not None  # the engine refuses to begin without it
            is_early = place.step.index < self.early * place.step.num_steps - 1e-9
        return is_early and min(depth, 1 - depth) < self.early_whole / 2

    def tensors(self, state: RankedState) -> Sequence[Tensor]:
        """The plan."""
        return [] if state.plan is None else state.plan.tensors()
