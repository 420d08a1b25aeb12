"""Prune tokens that are like others, sparing those that move: dynamics-aware pruning, of DaTo (arXiv:2501.00375)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cache4diffusion.devices import sent
from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import Step
from cache4diffusion.tokens.base import TokenPlace, of_twins
from cache4diffusion.tokens.merging import match, merge_plan, others
from cache4diffusion.tokens.reduction import Plan, Signal


def windows_of(grid: tuple[int, int, int], side: int) -> Tensor:
    """The tokens of every window ``[windows, side^2]``; rows and columns that fill no window are in none.

    Args:
        grid: frames, rows and columns.
        side: of a window, within a frame.
    """
    frames, height, width = grid
    rows, columns = height // side, width // side
    tokens = torch.arange(frames * height * width).view(grid)[:, : rows * side, : columns * side]
    cells = tokens.reshape(frames, rows, side, columns, side).transpose(2, 3)
    return cells.reshape(frames * rows * columns, side * side)


@dataclass(frozen=True)
class DynamicTokens:
    """The token of each window that scores highest is a *base* token and kept; of the others, the ``P`` that are most
    like a base token (by cosine) are left out, and get the outputs of the tokens left that are most like them.

    ``score = weight * d + noise * n``, where ``d`` is how far the denoiser's output moved at the token, the mean over
    channels of ``|y_t - y_(t-1)|``, and ``n`` is normal noise; before two outputs are known it is the noise alone. So
    base tokens are those that move. ``P = int(ratio * N)``, at most all that are no base tokens. Nothing is averaged:
    those left go on as they are.

    Noise is drawn on the host, per block and step, the same on every device and for every row. Halves of batched
    guidance go by the mean of their dynamics and of their cosines, so that they have one plan.

    Args:
        ratios: share of the tokens that is left out, 0 to 1 each: one for all steps, or one per step. A run of n steps
            has at step s the one of place ``floor(s * len(ratios) / n)``.
        window: side of a neighbourhood.
        weight, noise: of the score, 0 or more. Released code: 0.1 and 0.1.
        seed: of the draws.
        variant: ``"official"``: the sign of ``weight`` is drawn per block and step, as in the released code, so that
            base tokens are those that move, or those that do not.

    Raises:
        SettingError: a value is out of range.

    Memory: nothing; the denoiser's output once more, and one number per position of it.
    """

    ratios: tuple[float, ...] = (0.4,)
    window: int = 2
    weight: float = 0.1
    noise: float = 0.1
    seed: int = 0
    variant: Literal["ours", "official"] = "ours"

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 <= ratio <= 1 for ratio in self.ratios):
            raise SettingError(f"DynamicTokens(ratios={self.ratios}): give one or more shares, 0 to 1.")
        if self.window < 1 or not min(self.weight, self.noise) >= 0:
            raise SettingError(
                f"DynamicTokens(window={self.window}, weight={self.weight}, noise={self.noise}): window must be 1 or "
                "more, weight and noise 0 or more."
            )
        if self.variant not in ("ours", "official"):
            raise SettingError(f"DynamicTokens(variant={self.variant!r}): variants are 'ours' and 'official'.")

    @property
    def needs_num_steps(self) -> bool:
        """Where steps differ."""
        return len(self.ratios) > 1

    @property
    def signal(self) -> Signal | None:
        """How far the output moves."""
        return "dynamics"

    def init(self) -> None:
        """Nothing is kept: every call has its own plan."""

    def ratio_at(self, step: Step) -> float:
        """The share of a step."""
        if len(self.ratios) == 1:
            return self.ratios[0]
        assert step.num_steps is not None  # the engine refuses to begin without it
        return self.ratios[min(step.index, step.num_steps - 1) * len(self.ratios) // step.num_steps]

    def plan(self, state: None, place: TokenPlace, entering: Tensor) -> Plan | None:
        """A new plan; None where nothing is left out."""
        (batch, length, dim), (segment,) = entering.shape, place.segments
        assert segment.grid is not None
        windows = sent(windows_of(segment.grid, self.window), entering.device)
        count = min(int(self.ratio_at(place.step) * length + 1e-9), length - len(windows))
        if not count or not len(windows):
            return None
        picks = self._score(place, length, entering.device)[:, windows].argmax(-1)
        base = windows.expand(batch, -1, -1).gather(2, picks.expand(batch, -1)[..., None])[..., 0].sort(dim=1).values
        rest = others(base, length)
        likeness, _ = match(entering, base, rest, place.twins)
        gone = rest.gather(1, likeness.topk(count, dim=1).indices).sort(dim=1).values
        kept = others(gone, length)
        nearest = match(entering, kept, gone, place.twins)[1]
        every = torch.arange(count, device=gone.device).expand(batch, -1)
        flops = 2 * batch * dim * (rest.shape[1] * base.shape[1] + count * kept.shape[1])
        return merge_plan(kept, gone, nearest, every, "pick", flops=flops)

    def _score(self, place: TokenPlace, length: int, device: torch.device) -> Tensor:
        """``[B, N]``, or ``[1, N]`` where no row differs from another."""
        generator = self._generator(place, "noise")
        noise = sent(torch.randn(1, length, generator=generator), device)
        if place.signal is None:
            return noise
        weight = self.weight
        if self.variant == "official" and float(torch.rand((), generator=self._generator(place, "sign"))) < 0.5:
            weight = -weight
        return weight * of_twins(place.signal, place) + self.noise * noise

    def _generator(self, place: TokenPlace, what: str) -> torch.Generator:
        key = f"{self.seed}/{place.step.index}/{place.part}/{what}"
        return torch.Generator("cpu").manual_seed(zlib.crc32(key.encode()))

    def tensors(self, state: None) -> Sequence[Tensor]:
        """Nothing."""
        return []
