"""Which tokens are computed anyway on a cached step: score -> select -> compute -> write back.

The contract, drawn once::

    state = rule.init()                                   # per part, branch and run
    on a full step:     rule.observe(state, place, seen)  # after the part ran; ``seen`` holds what the rule asked for
    on a cached step:   index = rule.select(state, place) # [B, k], sorted; k depends on (step, layer, part) only
                        the engine gathers those tokens, runs the part on them, scatters the result

Everything that acts per token (norms, modulation, MLP, projections) is exact on a gathered subset; attention is not,
and is predicted as a whole.

The two halves of batched guidance must compute the same tokens: their outputs are subtracted from each other, and a
token that is fresh in one half and stale in the other would be amplified by the guidance scale. `TokenPlace.twins`
says which rows are such halves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from cache4diffusion.gates.base import Step


@dataclass(frozen=True)
class Segment:
    """Tokens ``start .. stop - 1`` of a part's sequence: ``"image"`` or ``"text"``."""

    kind: str
    start: int
    stop: int
    grid: tuple[int, int, int] | None = None  # frames, rows, columns of image tokens, if a rule asked for it


@dataclass(frozen=True)
class TokenPlace:
    """Where a selection is made. Shapes may depend on nothing else."""

    part: str  # path of the part
    kind: str  # "ffn", "fused", "cross_attn", ...
    layer: int  # index of the block among those of its anatomy, 0 .. num_layers - 1
    num_layers: int
    step: Step
    segments: tuple[Segment, ...]
    batch: int  # rows B
    twins: Tensor | None = field(default=None, compare=False)
    """[B] bool: whether rows b and b + B/2 denoise the same latent, as the halves of batched guidance do. On cached
    steps; None where B is odd."""
    entering: Tensor | None = field(default=None, compare=False)
    """[B, N, D]: what enters the part on this cached step, if the rule asked for it."""
    levels: tuple[float, ...] | None = field(default=None, compare=False)
    """The scheduler's timestep of every step of the run, if known."""
    signal: Tensor | None = field(default=None, compare=False)
    """[B, N] in float32: what a `Reduction` asked for of the tokens, where it is known."""
    survey: Any = field(default=None, compare=False)
    """What the rule found out about the streams at the last full step, if it is `Surveying` and did."""
    block: int = 0
    """Number of the block among all main ones."""
    num_blocks: int = 1

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return max(segment.stop for segment in self.segments)


def of_twins(values: Tensor, place: TokenPlace) -> Tensor:
    """``[B, N]`` values, where rows are twins their mean."""
    if place.twins is None:
        return values
    mean = (values + values.roll(place.batch // 2, 0)) / 2
    return torch.where(place.twins[:, None], mean, values)


@runtime_checkable
class TokenRule(Protocol):
    """Frozen settings; the state belongs to the engine."""

    @property
    def needs_num_steps(self) -> bool:
        """Whether the length of the run must be known."""
        ...

    @property
    def observes(self) -> frozenset[str]:
        """What the engine must find out, by name.

        On full steps, for the tokens of a part, as ``[B, N]`` in float32: ``"attention"``, the attention each receives
        in its block's self-attention, averaged over heads and queries; ``"value_norm"``, ``sum_h (1 - ||v_h||)`` of
        its values there; ``"cross_attention"``, the entropy ``-sum_j a_j log(a_j + 1e-7)`` of its attention ``a`` to
        the text, averaged over heads, and as ``"cross_attention_of_twins"`` that of the mean of rows b and b + B/2.
        Further ``"grid"``: `Segment.grid` is filled in; and ``"input"``: `TokenPlace.entering` is.
        """
        ...

    def init(self) -> Any:
        """Empty state of one part, for one branch of one run."""
        ...

    def observe(self, state: Any, place: TokenPlace, seen: dict[str, Tensor]) -> None:
        """Take in a full step: what was asked for and seen, by name."""
        ...

    def select(self, state: Any, place: TokenPlace, device: torch.device) -> Tensor:
        """Indices ``[B, k]`` (int64, sorted, unique per row) of the tokens to compute. Notes that they are fresh."""
        ...

    def tensors(self, state: Any) -> Sequence[Tensor]:
        """What the state holds, for the ledger."""
        ...


@runtime_checkable
class Wholesale(Protocol):
    """A token rule by which all of a block may be computed on a cached step: then its attentions run, too.

    It is asked for every part, not only for those that can run on some tokens.
    """

    def computes_all(self, place: TokenPlace) -> bool:
        """Whether all tokens of the place are computed; what `TokenRule.select` then selects."""
        ...


@runtime_checkable
class Surveying(Protocol):
    """A token rule that looks at the streams once per full step, for all parts of a branch together."""

    @property
    def kinds(self) -> frozenset[str]:
        """In which kinds of parts it computes tokens. It looks at what leaves the last main block that has one."""
        ...

    def survey(self, state: Any, streams: Mapping[str, Tensor], twins: Tensor | None) -> None:
        """Take in a full step's streams.

        Args:
            state: one of `TokenRule.init`, the branch's own; parts are shown it as `TokenPlace.survey`.
            streams: ``[B, N, D]`` by ``"image"`` and ``"text"``.
            twins: as `TokenPlace.twins`.
        """
        ...


@runtime_checkable
class Spreading(Protocol):
    """A token rule by which the computed tokens change those that are not."""

    def spread(
        self,
        state: Any,
        place: TokenPlace,
        predicted: Sequence[Tensor],
        last: Callable[[], Sequence[Tensor]],
        index: Tensor,
        fresh: Sequence[Tensor],
    ) -> list[Tensor]:
        """What a part's feature becomes on a cached step. Writes into nothing that it is given but its state.

        Args:
            state: of the part.
            place: as given to `TokenRule.select`.
            predicted: the feature's tensors ``[B, N, D]``, as predicted.
            last: makes the feature of the last full step.
            index: what was selected.
            fresh: what was computed there, ``[B, k, D]`` each.
        """
        ...
