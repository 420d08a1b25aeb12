"""Which tokens are computed anyway on a cached step: score -> select -> compute -> write back.

The contract, drawn once::

    state = rule.init()                                   # per part, branch and run
    on a full step:     rule.observe(state, place, seen)  # after the part ran; ``seen`` holds what the rule asked for
    on a cached step:   index = rule.select(state, place) # [B, k], sorted; k depends on (step, layer, part) only
                        the engine gathers those tokens, runs the part on them, scatters the result

Everything that acts per token (norms, modulation, MLP, projections) is exact on a gathered subset; attention is not,
and is predicted as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from cache4diffusion.gates.base import Step


@dataclass(frozen=True)
class Segment:
    """Tokens ``start .. stop - 1`` of a part's sequence: ``"image"``, ``"text"`` or ``"joint"``."""

    kind: str
    start: int
    stop: int


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

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return max(segment.stop for segment in self.segments)


@runtime_checkable
class TokenRule(Protocol):
    """Frozen settings; the state belongs to the engine."""

    @property
    def needs_num_steps(self) -> bool:
        """Whether the length of the run must be known."""
        ...

    @property
    def observes(self) -> frozenset[str]:
        """What to capture on full steps: ``"attention"``, the mean attention that each token receives."""
        ...

    def init(self) -> Any:
        """Empty state of one part, for one branch of one run."""
        ...

    def observe(self, state: Any, place: TokenPlace, seen: dict[str, Tensor]) -> None:
        """Take in a full step: captured scores ``[B, N]`` in float32 by name."""
        ...

    def select(self, state: Any, place: TokenPlace, device: torch.device) -> Tensor:
        """Indices ``[B, k]`` (int64, sorted, unique per row) of the tokens to compute. Notes that they are fresh."""
        ...

    def tensors(self, state: Any) -> Sequence[Tensor]:
        """What the state holds, for the ledger."""
        ...
