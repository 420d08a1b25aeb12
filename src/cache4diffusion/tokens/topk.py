"""Recompute the tokens with the highest scores: the token rule of ToCa (arXiv:2410.05317) and its released code."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, normalize

from cache4diffusion.devices import sent
from cache4diffusion.errors import SettingError
from cache4diffusion.tokens.base import Segment, TokenPlace, of_twins

# R / R0 by schedule, from the kind of part, the progress i / T and the depth l / 27. The codes count DiT's steps down.
_FACTORS: dict[str, Callable[[str, float, float], float]] = {
    "constant": lambda kind, progress, depth: 1.0,
    "flux": lambda kind, progress, depth: (1.5 - depth) * (1.6 if kind == "fused" else 0.4),
    "dit": lambda kind, remaining, depth: 2.5 * (3.0 - 4.0 * remaining) * (0.8 + 0.4 * depth),
    "dit-ddpm": lambda kind, remaining, depth: 2.5 * (1.4 - 0.8 * remaining) * (1.8 - 1.6 * depth),
    "pixart": lambda kind, progress, depth: (
        (1.9 - 1.8 * progress) * (1.6 - 1.2 * depth) * (0.6 if kind == "cross_attn" else 1.6)
    ),
    "open-sora": lambda kind, progress, depth: -0.005 if kind == "cross_attn" else 1.495,
}
_COUNTED_DOWN = ("dit", "dit-ddpm")
_SCORES = ("attention", "value_norm", "random")


@dataclass
class TokenState:
    """What is known of one part's tokens; each ``[B, N]`` float32."""

    influence: Tensor | None = None  # of s1: attention received, or value norms, at the last full step
    entropy: Tensor | None = None  # of s2: of the cross-attention at the last full step
    entropy_of_twins: Tensor | None = None  # the same, of the mean map of two rows
    age: Tensor | None = None  # steps since each token was computed


@dataclass(frozen=True)
class TopScore:
    """Per segment (image, text), the ``int(R * N)`` tokens with the highest score.

    ``S = (1 - cross_weight) * s1 + cross_weight * s2 + age_weight * s3``, and then ``S += bonus * |S|`` for the highest
    token of each ``window x window`` neighbourhood (``s4``), so that the computed tokens spread over the image (the
    code adds ``bonus * S``, which lowers it where value norms above 1 make S negative):

    - ``s1``, self-attention: the mean attention a token received at the last full step, normalised to length 1 over
      the segment; or what ``score`` says instead.
    - ``s2``, cross-attention: ``1 + e``, normalised likewise, where ``e`` is the entropy of the token's attention to
      the text at the last full step.
    - ``s3``, cache frequency: ``age / interval``, steps since the token was last computed.

    Text and image tokens never compete, and text has no ``s2`` and no ``s4``. The halves of batched guidance compute
    the same tokens, by the mean of their attention maps. All shapes are known before the run.

    Args:
        recompute_ratio: ``R0``, the fraction that is computed, 0 to 1. Released code: 0.1 (FLUX), 0.07 (DiT).
        age_weight: ``w3``. Released code 0.25.
        interval: what ages are divided by: the distance of full steps.
        schedule: ``R = R0 * f(step, layer, part)``, clamped to [0, 1]. With ``l`` the block's index in its list (every
            code divides by 27, whatever the list's length), ``s`` steps and ``T`` their number, ``f`` is

            - ``"constant"``: 1
            - ``"flux"``: ``(1.5 - l/27) * (0.4 in two-stream blocks, 1.6 in single-stream ones)``
            - ``"dit"`` (50 DDIM steps): ``2.5 (3 - 4 s/T)(0.8 + 0.4 l/27)``, ``s`` counted down; 0 in the first quarter
            - ``"dit-ddpm"`` (250 DDPM steps): ``2.5 (1.4 - 0.8 s/T)(1.8 - 1.6 l/27)``, ``s`` counted down
            - ``"pixart"``: ``(1.9 - 1.8 s/T)(1.6 - 1.2 l/27) * (0.6 for cross-attention, 1.6 for MLPs)``
            - ``"open-sora"``: 1.495 for MLPs, nothing of cross-attention
        score: what ``s1`` is: ``"attention"``; ``"value_norm"``, ``sum_h (1 - ||v_h||)`` of the values (DuCa: tokens
            with small values first), which needs no attention map; ``"random"``, uniform draws in [0, 1), the same on
            every device and for every row.
        seed: of the random score.
        cross_weight: weight of ``s2``, 0 to 1. Released code: 0 (DiT, FLUX), 1 (PixArt, Open-Sora).
        bonus: of ``s4``. Released code: 0.6 (DiT), 0.4 (PixArt), 0 (FLUX, Open-Sora).
        window: side of its neighbourhoods in tokens, per frame; those at the edge may be smaller. Released code: 2
            (DiT), 4 (PixArt).

    Raises:
        SettingError: a value is out of range.

    Memory: per token and part one number for the age, one for ``s1``, two for ``s2``.
    """

    recompute_ratio: float = 0.1
    age_weight: float = 0.25
    interval: int = 4
    schedule: Literal["constant", "flux", "dit", "dit-ddpm", "pixart", "open-sora"] = "constant"
    score: Literal["attention", "value_norm", "random"] = "attention"
    seed: int = 0
    cross_weight: float = 0.0
    bonus: float = 0.0
    window: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.recompute_ratio <= 1:
            raise SettingError(f"TopScore(recompute_ratio={self.recompute_ratio}): must be a fraction, 0 to 1.")
        if not self.age_weight >= 0 or self.interval < 1:
            raise SettingError(
                f"TopScore(age_weight={self.age_weight}, interval={self.interval}): age_weight must be 0 or more, "
                "interval 1 or more."
            )
        if self.schedule not in _FACTORS or self.score not in _SCORES:
            raise SettingError(
                f"TopScore(schedule={self.schedule!r}, score={self.score!r}): schedules are "
                f"{', '.join(map(repr, _FACTORS))}; scores {', '.join(map(repr, _SCORES))}."
            )
        if not (0 <= self.cross_weight <= 1 and self.bonus >= 0) or self.window < 1:
            raise SettingError(
                f"TopScore(cross_weight={self.cross_weight}, bonus={self.bonus}, window={self.window}): cross_weight "
                "must be 0 to 1, bonus 0 or more, window 1 token or more."
            )

    @property
    def needs_num_steps(self) -> bool:
        """Where the ratio depends on the progress of the run."""
        return self.schedule in ("dit", "dit-ddpm", "pixart")

    @property
    def observes(self) -> frozenset[str]:
        """What the weighted terms are made of."""
        if self.recompute_ratio == 0:
            return frozenset()
        wanted = {
            self.score: self.cross_weight < 1 and self.score != "random",
            "cross_attention": self.cross_weight > 0,
            "grid": self.bonus > 0,
        }
        return frozenset(name for name, is_wanted in wanted.items() if is_wanted)

    def ratio(self, place: TokenPlace) -> float:
        """``R``, clamped to [0, 1]."""
        progress = 0.0
        if self.needs_num_steps:
            assert place.step.num_steps is not None
            steps, index = place.step.num_steps, place.step.index
            progress = (steps - 1 - index if self.schedule in _COUNTED_DOWN else index) / steps
        factor = _FACTORS[self.schedule](place.kind, progress, place.layer / 27)
        return min(max(self.recompute_ratio * factor, 0.0), 1.0)

    def count(self, segment: Segment, place: TokenPlace) -> int:
        """``k`` of a segment: known before the run, the same for every sample."""
        return int(self.ratio(place) * (segment.stop - segment.start) + 1e-9)

    def init(self) -> TokenState:
        """Nothing is known."""
        return TokenState()

    def observe(self, state: TokenState, place: TokenPlace, seen: dict[str, Tensor]) -> None:
        """Keep what was captured; every token is fresh."""
        state.influence = seen.get(self.score)
        state.entropy, state.entropy_of_twins = seen.get("cross_attention"), seen.get("cross_attention_of_twins")
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
            if self.bonus > 0 and segment.grid is not None:
                score = with_bonus(score, segment.grid, self.window, self.bonus)
            chosen.append(score.topk(k, dim=1).indices + segment.start)
        state.age += 1
        if not chosen:
            return torch.zeros(place.batch, 0, dtype=torch.long, device=device)
        index = torch.cat(chosen, dim=1).sort(dim=1).values
        if place.twins is not None:  # equal scores may still be ordered differently where tokens tie
            first_half = index[: place.batch // 2].repeat(2, 1)
            index = torch.where(place.twins[:, None], first_half, index)
        state.age.scatter_(1, index, 0.0)
        return index

    def _score(self, state: TokenState, place: TokenPlace, segment: Segment, device: torch.device) -> Tensor:
        """``s1``, ``s2`` and ``s3``, weighted and summed."""
        span = slice(segment.start, segment.stop)
        assert state.age is not None
        score = self.age_weight * of_twins(state.age, place)[:, span] / self.interval
        has_entropy = self.cross_weight > 0 and state.entropy is not None and segment.kind != "text"
        cross_weight = self.cross_weight if has_entropy else 0.0
        if self.score == "random":
            key = f"{self.seed}/{place.step.index}/{place.part}/{segment.start}"  # the same on every device and Python
            generator = torch.Generator("cpu").manual_seed(zlib.crc32(key.encode()))
            drawn = torch.rand(1, segment.stop - segment.start, generator=generator)
            score = score + (1 - cross_weight) * sent(drawn, device)
        elif state.influence is not None:
            score = score + (1 - cross_weight) * normalize(of_twins(state.influence, place)[:, span], dim=1)
        if has_entropy:
            assert state.entropy is not None
            entropy = state.entropy
            if place.twins is not None:
                assert state.entropy_of_twins is not None
                entropy = torch.where(place.twins[:, None], state.entropy_of_twins, entropy)
            score = score + cross_weight * normalize(1 + entropy[:, span], dim=1)
        return score

    def tensors(self, state: TokenState) -> Sequence[Tensor]:
        """Scores and ages."""
        return [t for t in (state.influence, state.entropy, state.entropy_of_twins, state.age) if t is not None]


def with_bonus(score: Tensor, grid: tuple[int, int, int], window: int, bonus: float) -> Tensor:
    """``s4``: ``[B, N]`` scores, where the highest of each window is raised by ``bonus`` times its size."""
    maps = score.view(-1, *grid)
    _, highest = max_pool2d(maps, window, ceil_mode=True, return_indices=True)
    is_highest = torch.zeros_like(maps).flatten(2).scatter_(2, highest.flatten(2), 1.0).view_as(score)
    return score + bonus * score.abs() * is_highest
