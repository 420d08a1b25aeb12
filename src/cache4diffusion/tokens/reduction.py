"""Fewer tokens within a part: reduce -> compute on what is left -> restore, by a plan that may serve several steps.

The contract, drawn once::

    state = rule.init()                              # per block, branch and run
    in every block of a reduced step:
        plan = rule.plan(state, place, entering)     # from what enters the block; None: nothing is reduced
        for each part:  y = plan.give(part(plan.take(x)))

A plan says which tokens are left (`Plan.kept`: slot j stands at the place of token ``kept[j]``), how their inputs are
formed from those that are not, and from which slot each token gets its output (`Plan.owner`). A `LinearPlan` spreads
every token over several slots. What a part adds to the stream is what is restored, so the residual of every token stays
its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from cache4diffusion.tokens.base import TokenPlace

Form = Literal["pick", "mean", "mlerp"]
Signal = Literal["guidance", "dynamics"]


@dataclass(frozen=True, eq=False)
class Plan:
    """Which tokens of a block are computed, and for whom. Never written to.

    Args:
        kept: ``[B, n]``: the token at whose place each slot stands.
        owner: ``[B, N]``: the slot whose output every token gets; ``owner[kept[j]] == j``. None: only keys and values
            are reduced, and nothing has to be restored.
        form: how the input of a slot is made: ``"pick"``, that of its own token; ``"mean"``, the mean of all tokens it
            owns; ``"mlerp"``, their mean's direction with the largest of their norms. In float32.
        flops: what it took to make the plan.
        syncs: how many host syncs, likewise.
    """

    kept: Tensor
    owner: Tensor | None
    form: Form = "pick"
    flops: int = 0
    syncs: int = 0

    @property
    def length(self) -> int:
        """Tokens that are left."""
        return self.kept.shape[1]

    @property
    def restores(self) -> bool:
        """Whether queries are left out as well, so that their outputs have to be restored."""
        return self.owner is not None

    def take(self, x: Tensor) -> Tensor:
        """``[B, N, D]`` to ``[B, n, D]``."""
        if self.form == "pick" or self.owner is None:
            return x.gather(1, self.kept[..., None].expand(-1, -1, x.shape[-1]))
        wide, index = x.float(), self.owner[..., None].expand_as(x)
        room = wide.new_zeros(x.shape[0], self.length, x.shape[-1])
        sums = room.scatter_add(1, index, wide)
        if self.form == "mean":
            sizes = room[..., 0].scatter_add(1, self.owner, torch.ones_like(wide[..., 0]))
            return (sums / sizes[..., None]).to(x.dtype)
        norms = room[..., 0].scatter_reduce(1, self.owner, wide.norm(dim=-1), "amax")
        return (torch.nn.functional.normalize(sums, dim=-1) * norms[..., None]).to(x.dtype)

    def give(self, y: Tensor) -> Tensor:
        """``[B, n, D]`` to ``[B, N, D]``."""
        return y if self.owner is None else y.gather(1, self.owner[..., None].expand(-1, -1, y.shape[-1]))

    def where(self, is_own: Tensor, other: Plan) -> Plan:
        """This plan for some rows, another of its kind and shapes for the rest.

        Args:
            is_own: ``[B]``.
            other: the other one.
        """
        given = {entry.name: (getattr(self, entry.name), getattr(other, entry.name)) for entry in fields(self)}
        pairs = {name: pair for name, pair in given.items() if isinstance(pair[0], Tensor)}
        chosen = {
            name: torch.where(is_own.view(-1, *[1] * (mine.ndim - 1)), mine, theirs)
            for name, (mine, theirs) in pairs.items()
        }
        return replace(self, **chosen)

    def applying(self, dim: int) -> int:
        """FLOPs of reducing ``[B, N, dim]`` and restoring it."""
        return 0

    def tensors(self) -> Sequence[Tensor]:
        """What is held by it."""
        return [self.kept] if self.owner is None else [self.kept, self.owner]


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearPlan(Plan):
    """Every token belongs to several slots of its tile, to each by a weight: to reduce and to restore are products.

    Args:
        weights: ``[B, tiles, d, n]``, of the n tokens of a tile in its d slots; those of a token add up to 1.
        tiles: ``[B, tiles n]``: the tokens of all tiles, one tile after the other.
        places: ``[B, N]``: where every token is among them.
    """

    owner: Tensor | None = None
    weights: Tensor
    tiles: Tensor
    places: Tensor

    @property
    def restores(self) -> bool:
        """Always."""
        return True

    def take(self, x: Tensor) -> Tensor:
        """Means, weighted by rows."""
        rows = self.weights / self.weights.sum(-1, keepdim=True)
        tiled = x.gather(1, self.tiles[..., None].expand(-1, -1, x.shape[-1]))
        return (rows.to(x.dtype) @ tiled.unflatten(1, (rows.shape[1], -1))).flatten(1, 2)

    def give(self, y: Tensor) -> Tensor:
        """Sums, weighted by columns."""
        columns = self.weights.to(y.dtype).mT
        tiled = (columns @ y.unflatten(1, (columns.shape[1], -1))).flatten(1, 2)
        return tiled.gather(1, self.places[..., None].expand(-1, -1, y.shape[-1]))

    def applying(self, dim: int) -> int:
        """Two products."""
        return 4 * self.weights.numel() * dim

    def tensors(self) -> Sequence[Tensor]:
        """What is held by it."""
        return [self.kept, self.weights, self.tiles, self.places]


@runtime_checkable
class Reduction(Protocol):
    """Makes plans. Frozen settings; the state belongs to the engine."""

    @property
    def needs_num_steps(self) -> bool:
        """Whether the length of the run must be known."""
        ...

    @property
    def signal(self) -> Signal | None:
        """What the driver is to find out of the tokens, as `TokenPlace.signal`. ``"guidance"``: how far the halves of
        batched guidance were apart at the step before, ``|conditional - unconditional|``, the mean over channels.
        ``"dynamics"``: how far the denoiser's output moved, ``|y_t - y_(t-1)|`` of the last two that were computed,
        likewise.
        """
        ...

    def init(self) -> Any:
        """Empty state of one block, for one branch of one run."""
        ...

    def plan(self, state: Any, place: TokenPlace, entering: Tensor) -> Plan | None:
        """The plan of a block at a step; None where all tokens are computed.

        Rows that are `TokenPlace.twins` get the same plan. Shapes depend on the place alone.

        Args:
            state: of the block; a plan that is to serve later steps is kept there.
            place: which block; the one segment has its grid.
            entering: the stream ``[B, N, D]`` that enters the block, in front of its norm.
        """
        ...

    def tensors(self, state: Any) -> Sequence[Tensor]:
        """What the state holds, for the ledger."""
        ...


@runtime_checkable
class Ranking(Protocol):
    """A `Reduction` that goes by the self-attention of the last full step; before one there are no plans."""

    def rank(self, state: Any, place: TokenPlace, entering: Tensor, maps: Tensor) -> int:
        """Take in the self-attention of a block at a full step.

        Args:
            state, place, entering: as of `Reduction.plan`.
            maps: ``softmax(q k^T)``, the mean over heads, ``[B, N, N]`` in float32.

        Returns:
            How many FLOPs that took.
        """
        ...
