"""WaveEx's predictor: wavelet bands of the last latents along the step axis, each extended by one coefficient.

Source: the idea of WaveEx (AAAI 2026), after a public third-party implementation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from cache4diffusion.errors import SettingError
from cache4diffusion.predictors.base import RecursivePredictor
from cache4diffusion.predictors.differences import lagrange

Wavelet = Literal["haar", "db2", "db4", "sym4", "sym6"]
MOMENTS = {"haar": 1, "db2": 2, "db4": 4, "sym4": 4, "sym6": 6}


@lru_cache
def low_pass(wavelet: Wavelet) -> tuple[float, ...]:
    """The scaling filter: ``2 N`` numbers with ``N`` vanishing moments, orthonormal to its own even shifts.

    Daubechies' construction: of the roots of the polynomial ``P(y) = sum C(N-1+k, k) y^k`` in ``z``, those inside the
    unit circle (``db``), or the choice whose phase is nearest to linear (``sym``).
    """
    count = MOMENTS[wavelet]
    polynomial = [math.comb(count - 1 + k, k) for k in range(count)][::-1]
    groups: list[list[tuple[complex, ...]]] = []  # per pair of conjugate roots y: the two choices in z
    for y in np.roots(polynomial):
        if y.imag < -1e-9:
            continue
        inside = min(np.roots([1, 4 * y - 2, 1]), key=abs)
        choices = [inside, 1 / inside]
        is_real = abs(y.imag) <= 1e-9
        groups.append([(z,) if is_real else (z, z.conjugate()) for z in choices])
    picked = [[group[0] for group in groups]] if wavelet.startswith("db") else itertools.product(*groups)
    filters = [_filter(count, [z for roots in choice for z in roots]) for choice in picked]
    return tuple(min(filters, key=_phase_error).tolist())


def _filter(count: int, roots: list[complex]) -> np.ndarray:
    found = np.real(np.poly([-1.0] * count + roots))
    return found / found.sum() * math.sqrt(2)


def _phase_error(taps: np.ndarray) -> float:
    """How far the phase of a filter is from linear, where the filter passes."""
    omega = np.linspace(0.05, 2.0, 64)
    response = np.exp(-1j * np.outer(omega, np.arange(len(taps)))) @ taps
    phase = np.unwrap(np.angle(response))
    slope = (omega @ phase) / (omega @ omega)
    return float(np.sum(np.abs(response) ** 2 * (phase - slope * omega) ** 2))


def analyse(window: np.ndarray, taps: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Single-level periodised orthonormal transform of an even number of values: averages and details."""
    size = len(window)
    high = [(-1) ** n * tap for n, tap in enumerate(reversed(taps))]
    at = (np.arange(0, size, 2)[:, None] + np.arange(len(taps))[None, :]) % size
    return window[at] @ np.array(taps), window[at] @ np.array(high)


def synthesise(averages: np.ndarray, details: np.ndarray, taps: Sequence[float]) -> np.ndarray:
    """The inverse of `analyse`."""
    size = 2 * len(averages)
    high = [(-1) ** n * tap for n, tap in enumerate(reversed(taps))]
    values = np.zeros(size)
    for k in range(len(averages)):
        for n in range(len(taps)):
            values[(2 * k + n) % size] += averages[k] * taps[n] + details[k] * high[n]
    return values


def _extend(band: np.ndarray, order: int) -> float:
    """The next value of a band, by its last differences; of a short band, by as many as it has."""
    order = min(order, len(band) - 1)
    return float(sum((-1) ** j * math.comb(order + 1, j + 1) * band[-1 - j] for j in range(order + 1)))


@dataclass(frozen=True)
class WaveletExtrapolation(RecursivePredictor):
    """Predict the next latent from bands of the last ones: each element of the latent is a short series in the step.

    The window holds the latents of the last ``history`` steps, predicted ones included. With fewer than 4: the line
    (order 2: the parabola) through the last ones. All of it is linear, so it ends up in the weights of a sum.

    - ``"aligned"`` (ours): averages ``(x_i + x_{i-1}) / 2`` and details ``(x_i - x_{i-1}) / 2`` at every step, each
      extended by one step. Both extended: the line through the last two latents; details frozen:
      ``x_i + (x_i - x_{i-2}) / 2``, the mean slope of two steps. Haar only.
    - ``"literal"``: the third-party code. The orthonormal transform halves the rate, so bands are extended by *two*
      steps from values of the same phase: with Haar and both extended the prediction is ``2 x_{i-1} - x_{i-3}``, which
      ignores the newest latent. Longer filters wrap the ends of the window together.

    Exact for constants; for lines with both bands extended (``high="extrapolate"``), and aligned with frozen ones too.

    Args:
        order: of the extension, 1 or 2. Code: 1.
        history: latents in the window, 2 or more. Code: 2, with which no wavelet is reached.
        high: what becomes of the details: ``"extrapolate"``, ``"freeze"`` or ``"zero"``.
        wavelet: ``"haar"``, ``"db2"``, ``"db4"``, ``"sym4"`` or ``"sym6"``; for ``"literal"``.
        form: see above.

    Raises:
        SettingError: a value is out of range.

    Memory: ``history`` latents per run.
    """

    order: int = 1
    history: int = 4
    high: Literal["extrapolate", "freeze", "zero"] = "freeze"
    wavelet: Wavelet = "haar"
    form: Literal["aligned", "literal"] = "aligned"

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise SettingError(f"WaveletExtrapolation(order={self.order}): order must be 1 or 2.")
        if self.history < 2:
            raise SettingError(f"WaveletExtrapolation(history={self.history}): history must be 2 latents or more.")
        if self.high not in ("extrapolate", "freeze", "zero"):
            raise SettingError(
                f"WaveletExtrapolation(high={self.high!r}): high must be 'extrapolate', 'freeze' or 'zero'."
            )
        if self.wavelet not in MOMENTS:
            raise SettingError(f"WaveletExtrapolation(wavelet={self.wavelet!r}): use one of {', '.join(MOMENTS)}.")
        if self.form not in ("aligned", "literal"):
            raise SettingError(f"WaveletExtrapolation(form={self.form!r}): form must be 'aligned' or 'literal'.")
        if self.form == "aligned" and self.wavelet != "haar":
            raise SettingError("WaveletExtrapolation(form='aligned') is made for wavelet='haar'.")

    @property
    def capacity(self) -> int:
        """The window."""
        return self.history

    def weights(self, times: Sequence[float], time: float) -> list[float]:
        """What becomes of unit windows, newest first."""
        return list(_weights(self, len(times)))


@lru_cache(maxsize=64)
def _weights(settings: WaveletExtrapolation, count: int) -> tuple[float, ...]:
    if count < 4:
        known = min(count, settings.order + 1)
        return (*lagrange([-float(j) for j in range(known)], 1.0), *[0.0] * (count - known))
    made = _aligned if settings.form == "aligned" else _literal
    return tuple(made(settings, np.eye(count)[count - 1 - j]) for j in range(count))


def _next_detail(settings: WaveletExtrapolation, details: np.ndarray) -> float:
    if settings.high == "zero":
        return 0.0
    return float(details[-1]) if settings.high == "freeze" else _extend(details, settings.order)


def _aligned(settings: WaveletExtrapolation, window: np.ndarray) -> float:
    averages, details = (window[1:] + window[:-1]) / 2, (window[1:] - window[:-1]) / 2
    return _extend(averages, settings.order) + _next_detail(settings, details)


def _literal(settings: WaveletExtrapolation, window: np.ndarray) -> float:
    taps = low_pass(settings.wavelet)
    averages, details = analyse(window[len(window) % 2 :], taps)
    longer = np.append(averages, _extend(averages, settings.order))
    return float(synthesise(longer, np.append(details, _next_detail(settings, details)), taps)[-2])
