"""Bands predictor: low spatial frequencies are reused, high ones are forecast.

Source: FreqCa, arXiv:2510.08669; released code Tammytcl/FreqCa.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cache4diffusion.errors import SettingError
from cache4diffusion.predictors.base import LinearPredictor
from cache4diffusion.predictors.hermite import Hermite
from cache4diffusion.predictors.history import History
from cache4diffusion.predictors.taylor import Taylor
from cache4diffusion.storage import PLAIN, Ring, Store

Transform = Literal["auto", "dct", "fft"]


@dataclass
class BandsState:
    """The two bands' histories."""

    low: History
    high: History

    def tensors(self) -> Iterator[Tensor]:
        """Everything held, for the ledger."""
        yield from self.low.tensors()
        yield from self.high.tensors()

    @property
    def rings(self) -> list[Ring]:
        """Of both."""
        return self.low.rings + self.high.rings

    @property
    def buffers(self) -> list[Tensor]:
        """Where they lie."""
        return [ring.data for ring in self.rings]


def low_band(x: Tensor, cutoff: float, transform: Transform = "auto") -> Tensor:
    """The part of a feature whose spatial frequency is at most ``cutoff`` times the highest, in float32 or wider.

    Args:
        x: tokens ``[B, N, D]`` or maps ``[B, C, H, W]`` (or with more spatial axes). A feature without spatial axes is
            low frequency as a whole.
        cutoff: 1 keeps everything, a negative one nothing.
        transform: ``"dct"`` orthonormal cosine transform of the square of tokens (of the last two axes of maps);
            ``"fft"`` Fourier transform along the row of all tokens; ``"auto"`` the first where tokens make a square.

    Raises:
        SettingError: ``"dct"`` for a number of tokens that is no square.
    """
    x = _wide(x)
    if x.ndim < 3:
        return x if cutoff >= 0 else torch.zeros_like(x)
    tokens = x if x.ndim == 3 else x.flatten(2).transpose(1, 2)
    height, width = _grid(x)
    if transform == "dct" and height * width != tokens.shape[1]:
        raise SettingError(
            f"transform='dct' needs a square of tokens, and there are {tokens.shape[1]}. Use transform='fft' or 'auto'."
        )
    is_plane = transform != "fft" and height * width == tokens.shape[1]
    low = _low_dct(tokens, height, width, cutoff) if is_plane else _low_fft(tokens, cutoff)
    return low if x.ndim == 3 else low.transpose(1, 2).reshape(x.shape)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _grid(x: Tensor) -> tuple[int, int]:
    if x.ndim == 4:
        return x.shape[2], x.shape[3]
    side = math.isqrt(x.shape[1]) if x.ndim == 3 else 0
    return side, side


def _low_fft(tokens: Tensor, cutoff: float) -> Tensor:
    frequencies = torch.fft.fftfreq(tokens.shape[1], device=tokens.device).abs()
    mask = frequencies <= cutoff * frequencies.max()
    return torch.fft.ifft(torch.fft.fft(tokens, dim=1) * mask[:, None], dim=1).real


def _low_dct(tokens: Tensor, height: int, width: int, cutoff: float) -> Tensor:
    rows, columns = _cosines(height, tokens), _cosines(width, tokens)
    u, v = torch.arange(height, device=tokens.device), torch.arange(width, device=tokens.device)
    frequency = (u[:, None] ** 2 + v[None, :] ** 2).sqrt()
    mask = frequency <= cutoff * frequency.max()
    plane = tokens.unflatten(1, (height, width))
    spectrum = torch.einsum("uh,vw,bhwd->buvd", rows, columns, plane) * mask[..., None]
    return torch.einsum("uh,vw,buvd->bhwd", rows, columns, spectrum).flatten(1, 2)


def _cosines(count: int, like: Tensor) -> Tensor:
    """Orthonormal DCT-II: row u is the cosine of frequency u."""
    n = torch.arange(count, dtype=torch.float64)
    table = torch.cos(math.pi / count * n[:, None] * (n[None, :] + 0.5)) * math.sqrt(2 / count)
    table[0] /= math.sqrt(2)
    return table.to(like)


@dataclass(frozen=True)
class Bands:
    """Predict ``low(y(i0)) + high-band forecast``: a feature is split by spatial frequency at every full step.

    ``y = L + H`` with ``L = inverse(mask * transform(y))``. The low band is forecast with ``low_order`` (0: reused),
    the high band with ``order``, by `Hermite` or `Taylor`. Both orders equal: no split at all, by linearity. Exact for
    constant features; otherwise as its bands.

    Args:
        order: of the high band. Code: 2.
        low_order: of the low band. Code: 0.
        sigma: of the Hermite polynomials. Code: 0.71.
        cutoff: highest low frequency, as a fraction of the highest there is; 1 makes all low. Code: 0.1.
        transform: see `low_band`. Code: ``"dct"`` for FLUX, ``"fft"`` for Qwen-Image.
        basis: ``"hermite"`` (code) or ``"taylor"``.
        first_difference_step: full steps before this one give no differences; see `Taylor`.

    Raises:
        SettingError: a value is out of range.

    Memory: ``order + low_order + 2`` copies of the feature per site and branch (the code keeps ``2 (order + 1)``). The
    transform runs at full steps only.
    """

    mixes_tokens: ClassVar[bool] = True  # frequencies are those of the whole row or plane

    order: int = 2
    low_order: int = 0
    sigma: float = 0.71
    cutoff: float = 0.1
    transform: Transform = "auto"
    basis: Literal["hermite", "taylor"] = "hermite"
    first_difference_step: int = 0

    def __post_init__(self) -> None:
        if self.order < 0 or self.low_order < 0:
            raise SettingError(f"Bands(order={self.order}, low_order={self.low_order}): both must be 0 or more.")
        if not self.cutoff <= 1:
            raise SettingError(f"Bands(cutoff={self.cutoff}): cutoff must be at most 1 (everything is low).")
        if self.transform not in ("auto", "dct", "fft"):
            raise SettingError(f"Bands(transform={self.transform!r}): transform must be 'auto', 'dct' or 'fft'.")
        if self.basis not in ("hermite", "taylor"):
            raise SettingError(f"Bands(basis={self.basis!r}): basis must be 'hermite' or 'taylor'.")
        self._of(self.order)

    def _of(self, order: int) -> LinearPredictor:
        if self.basis == "taylor":
            return Taylor(order, self.first_difference_step)
        return Hermite(order, self.sigma, self.first_difference_step)

    @property
    def needs_num_steps(self) -> bool:
        """It does not care where the run ends."""
        return False

    def init(self, rows: int | None, num_steps: int | None = None, store: Store = PLAIN) -> BandsState:
        """Two empty histories."""
        low, high = (self._of(order).init(rows, num_steps, store) for order in (self.low_order, self.order))
        return BandsState(low, high)

    def update(
        self, state: BandsState, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None
    ) -> None:
        """Split, and take both bands in."""
        low = [low_band(leaf, self.cutoff, self.transform) for leaf in leaves]
        high = [(_wide(leaf) - part).to(leaf.dtype) for leaf, part in zip(leaves, low, strict=True)]
        state.low.write([part.to(leaf.dtype) for leaf, part in zip(leaves, low, strict=True)], time, rows)
        state.high.write(high, time, rows)

    def is_ready(self, state: BandsState) -> bool:
        """Once every row was written."""
        return not state.high.is_empty

    def predict(self, state: BandsState, time: float, rows: Sequence[int] | None = None) -> list[Tensor]:
        """The sum of the bands' forecasts."""
        low = self._of(self.low_order).predict(state.low, time, rows)
        high = self._of(self.order).predict(state.high, time, rows)
        return [a + b for a, b in zip(low, high, strict=True)]

    def prefetch(self, state: BandsState, time: float) -> None:
        """Begin to bring both bands."""
        self._of(self.low_order).prefetch(state.low, time)
        self._of(self.order).prefetch(state.high, time)

    def commit(self, state: Any, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None) -> None:
        """Nothing: what is predicted enters no history of full steps."""
