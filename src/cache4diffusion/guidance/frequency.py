"""CFG-Cache: the unconditional output from the conditional one and the filtered difference of an earlier step.

Source: FasterCache, arXiv:2410.19355, and its released code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import Step
from cache4diffusion.storage import PLAIN, Kept, Store


def low_pass(maps: Tensor) -> Tensor:
    """The disc of radius ``floor(min(H, W) / 5)`` around frequency 0 of each map ``[..., H, W]``, in float32.

    The disc is symmetric, so the filtered map is real; what is left is the high-pass.
    """
    height, width = maps.shape[-2:]
    radius = min(height, width) // 5
    rows = torch.fft.fftfreq(height, 1 / height, device=maps.device)
    columns = torch.fft.fftfreq(width, 1 / width, device=maps.device)
    disc = (rows[:, None] ** 2 + columns[None, :] ** 2) <= radius**2
    return torch.fft.ifft2(torch.fft.fft2(maps.float()) * disc).real


@dataclass
class FrequencyState:
    """Filtered differences of the last full step, times the gains applied since; float32 maps."""

    store: Store = PLAIN
    step: int = -1
    low: list[Kept] | None = None
    high: list[Kept] | None = None
    low_gain: float = 1.0
    high_gain: float = 1.0


@dataclass(frozen=True)
class FrequencyResidual:
    """``U = C + g_lo * LP(D) + g_hi * HP(D)`` with ``D = U - C`` of the last step at which both branches ran.

    Counting calls ``n`` from 1, as the paper's code does: the predicted branch is skipped where ``n > warmup`` and
    ``n % interval != 0``. On every skipped step the gain of a band inside its window is multiplied once more; it
    compounds until the next full step, as in the released code. With gains of 1 the result is ``C + D``.

    Args:
        interval: both branches run where ``n`` is a multiple of it; 1 never skips. Released code: 5 (6 for
            Open-Sora-Plan).
        warmup: first steps at which both branches always run.
        low_gain, high_gain: factors per skipped step; released code 1.05 to 1.2.
        low_until: the low band's window is the first part of the run, up to this fraction of the steps.
        high_from: the high band's window begins at this fraction.
        layout: whether the host runs both branches in one call (``"batched"``: then every call with an even number of
            rows is one), or one call each (``"sequential"``). ``"auto"`` sees it from the calls: both halves denoise
            the same latents under different conditioning.
        batch_order: which half of a batched call is which; in sequential guidance which call comes first.
        shares_history: whether parts' features that were computed for both branches of a batched call serve the
            conditional one on steps where it runs alone.

    Raises:
        SettingError: a value is out of range.

    Memory: two output-sized float32 tensors.
    """

    interval: int = 5
    warmup: int = 17
    low_gain: float = 1.1
    high_gain: float = 1.1
    low_until: float = 0.8
    high_from: float = 0.6
    layout: Literal["auto", "batched", "sequential"] = "auto"
    batch_order: Literal["auto", "uncond-cond", "cond-uncond"] = "auto"
    shares_history: bool = False

    source: ClassVar[Literal["cond", "uncond"]] = "cond"
    takes_either: ClassVar[bool] = False
    needs_maps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.interval < 1 or self.warmup < 0:
            raise SettingError(
                f"FrequencyResidual(interval={self.interval}, warmup={self.warmup}): interval must be 1 (never "
                "skipped) or more, warmup 0 or more steps."
            )
        if not (self.low_gain > 0 and self.high_gain > 0):
            raise SettingError(
                f"FrequencyResidual(low_gain={self.low_gain}, high_gain={self.high_gain}): gains must be above 0."
            )
        if not (0 <= self.low_until <= 1 and 0 <= self.high_from <= 1):
            raise SettingError(
                f"FrequencyResidual(low_until={self.low_until}, high_from={self.high_from}): both are fractions of the "
                "steps, 0 to 1."
            )
        if self.layout not in ("auto", "batched", "sequential"):
            raise SettingError(f"FrequencyResidual(layout={self.layout!r}): use 'auto', 'batched' or 'sequential'.")
        if self.batch_order not in ("auto", "uncond-cond", "cond-uncond"):
            raise SettingError(
                f"FrequencyResidual(batch_order={self.batch_order!r}): use 'auto', 'uncond-cond' or 'cond-uncond'."
            )

    @property
    def needs_num_steps(self) -> bool:
        """The windows are fractions of the run; without gains they do not matter."""
        return self.interval > 1 and (self.low_gain != 1 or self.high_gain != 1)

    @property
    def merges(self) -> bool:
        """The branches' features stay apart."""
        return False

    @property
    def begins(self) -> int:
        """Behind the warm-up, and behind a step with both branches."""
        return max(self.warmup, 1)

    def init(self, store: Store = PLAIN) -> FrequencyState:
        """Nothing is known."""
        return FrequencyState(store)

    def is_cached(self, state: FrequencyState, step: Step) -> bool:
        """Whether the predicted branch is skipped."""
        count = step.index + 1
        is_recent = state.low is not None and step.index - state.step < self.interval  # guidance may have paused
        return is_recent and count > self.warmup and count % self.interval != 0

    def update(self, state: FrequencyState, step: Step, source: list[Tensor], predicted: list[Tensor]) -> None:
        """Split the difference of the two branches into bands."""
        state.step, state.low, state.high = step.index, [], []
        for conditional, unconditional in zip(source, predicted, strict=True):
            difference = unconditional.float() - conditional.float()
            low = low_pass(difference)
            state.low.append(state.store.keep(low))
            state.high.append(state.store.keep(difference - low))
        state.low_gain = state.high_gain = 1.0

    def commit(self, state: FrequencyState, step: Step) -> None:
        """Multiply the gains whose window is open."""
        if step.num_steps is None:
            return
        count = step.index + 1
        if count <= round(self.low_until * step.num_steps, 6):
            state.low_gain *= self.low_gain
        if count >= round(self.high_from * step.num_steps, 6):
            state.high_gain *= self.high_gain

    def predict(self, state: FrequencyState, step: Step, source: list[Tensor]) -> list[Tensor]:
        """Add the bands to the source branch's output."""
        assert state.low is not None and state.high is not None
        return [
            (conditional.float() + low.read() * state.low_gain + high.read() * state.high_gain).to(conditional.dtype)
            for conditional, low, high in zip(source, state.low, state.high, strict=True)
        ]

    def prefetch(self, state: FrequencyState) -> None:
        """Begin to bring both bands."""
        for kept in [*(state.low or ()), *(state.high or ())]:
            kept.prefetch()

    def tensors(self, state: FrequencyState) -> Iterator[Tensor]:
        """The two bands."""
        for kept in [*(state.low or ()), *(state.high or ())]:
            yield from kept.tensors()
