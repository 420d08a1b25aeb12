"""Recompute the tokens with the highest scores: the token rule of ToCa (arXiv:2410.05317) and its released code."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cache4diffusion.errors import SettingError
from cache4diffusion.tokens.base import Segment, TokenPlace


@dataclass
class TokenState:
    """What is known of one part's tokens."""

    influence: Tensor | None = None  # s1, [B, N] float32, from the last full step
    age: Tensor | None = None  # steps since each token was computed, [B, N] float32


@dataclass(frozen=True)
class TopScore:
    """Per segment (image, text), the ``int(R * N)`` tokens with the highest ``s1 + age_weight * age / interval``.

    ``s1`` is the mean attention a token received at the last full step, normalised to length 1 over the segment;
    ``age`` counts steps since the token was last computed. Text and image tokens never compete.

    Args:
        recompute_ratio: ``R0``, the fraction that is computed, 0 to 1. Released code: 0.1 (FLUX), 0.07 (DiT).
        age_weight: ``w3``. Released code 0.25.
        interval: what ages are divided by: the distance of full steps.
        schedule: ``R = R0 * f(step, layer, part)``, clamped to [0, 1]: ``"constant"`` has ``f = 1``; ``"flux"`` is the
            FLUX code's ``(1.5 - l/27) * (0.4 in two-stream blocks, 1.6 in single-stream ones)``; ``"dit"`` the DiT
            code's for 50 DDIM steps, ``2.5 (3 - 4 s/T)(0.8 + 0.4 l/27)`` with ``s`` counted down, which needs the step
            count. ``l`` is the block's index in its list; both codes divide by 27, whatever the list's length.
        score: ``"attention"`` is ``s1``; ``"random"`` draws instead, the same on every device.
        seed: of the random score.

    Raises:
        SettingError: a value is out of range.
    """

    recompute_ratio: float = 0.1
    age_weight: float = 0.25
    interval: int = 4
    schedule: Literal["constant", "flux", "dit"] = "constant"
    score: Literal["attention", "random"] = "attention"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.recompute_ratio <= 1:
            raise SettingError(f"TopScore(recompute_ratio={self.recompute_ratio}): must be a fraction, 0 to 1.")
        if not self.age_weight >= 0 or self.interval < 1:
            raise SettingError(
                f"TopScore(age_weight={self.age_weight}, interval={self.interval}): age_weight must be 0 or more, "
                "interval 1 or more."
            )
        if self.schedule not in ("constant", "flux", "dit") or self.score not in ("attention", "random"):
            raise SettingError(
                f"TopScore(schedule={self.schedule!r}, score={self.score!r}): schedules are 'constant', 'flux', 'dit'; "
                "scores 'attention', 'random'."
            )

    @property
    def needs_num_steps(self) -> bool:
        """Only the DiT schedule depends on the progress of the run."""
        return self.schedule == "dit"

    @property
    def observes(self) -> frozenset[str]:
        """Attention maps on full steps, for the attention score."""
        return frozenset({"attention"}) if self.score == "attention" and self.recompute_ratio > 0 else frozenset()

    def ratio(self, place: TokenPlace) -> float:
        """``R``, clamped to [0, 1]."""
        depth = place.layer / 27
        factor = 1.0
        if self.schedule == "flux":
            factor = (1.5 - depth) * (1.6 if place.kind == "fused" else 0.4)
        elif self.schedule == "dit":
            assert place.step.num_steps is not None
            remaining = (place.step.num_steps - 1 - place.step.index) / place.step.num_steps
            factor = 2.5 * (3 - 4 * remaining) * (0.8 + 0.4 * depth)
        return min(max(self.recompute_ratio * factor, 0.0), 1.0)

    def count(self, segment: Segment, place: TokenPlace) -> int:
        """``k`` of a segment: known before the run, the same for every sample."""
        return int(self.ratio(place) * (segment.stop - segment.start) + 1e-9)

    def init(self) -> TokenState:
        """Nothing is known."""
        return TokenState()

    def observe(self, state: TokenState, place: TokenPlace, seen: dict[str, Tensor]) -> None:
        """Take the captured attention as the tokens' influence; every token is fresh."""
        state.influence = seen.get("attention")
        state.age = None

    def select(self, state: TokenState, place: TokenPlace, device: torch.device) -> Tensor:
        """The tokens to compute, sorted; they become fresh, the others a step older."""
        if state.age is None:
            state.age = torch.zeros(place.batch, place.length, device=device)
        chosen = []
        for segment in place.segments:
            k = self.count(segment, place)
            if k == 0:
                continue
            score = self._score(state, place, segment, device)
            chosen.append(score.topk(k, dim=1).indices + segment.start)
        state.age += 1
        if not chosen:
            return torch.zeros(place.batch, 0, dtype=torch.long, device=device)
        index = torch.cat(chosen, dim=1).sort(dim=1).values
        state.age.scatter_(1, index, 0.0)
        return index

    def _score(self, state: TokenState, place: TokenPlace, segment: Segment, device: torch.device) -> Tensor:
        span = slice(segment.start, segment.stop)
        assert state.age is not None
        if self.score == "random":
            key = f"{self.seed}/{place.step.index}/{place.part}/{segment.start}"  # the same on every device and Python
            generator = torch.Generator("cpu").manual_seed(zlib.crc32(key.encode()))
            return torch.rand(1, segment.stop - segment.start, generator=generator).expand(place.batch, -1).to(device)
        base = torch.zeros_like(state.age[:, span])
        if state.influence is not None:
            base = torch.nn.functional.normalize(state.influence[:, span], dim=1)
        return base + self.age_weight * state.age[:, span] / self.interval

    def tensors(self, state: TokenState) -> Sequence[Tensor]:
        """Scores and ages."""
        return [tensor for tensor in (state.influence, state.age) if tensor is not None]
