"""What CacheQuant measures: how far features drift, and the scale and shift per channel that follow them.

Source: arXiv:2503.01323 (CVPR 2025); released code BienLuky/CacheQuant.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cache4diffusion.calibration.calibrator import Fit, Shape, Sums
from cache4diffusion.calibration.figure import Figure
from cache4diffusion.calibration.quality import judged
from cache4diffusion.calibration.statistic import Seen, Statistic
from cache4diffusion.devices import in_double
from cache4diffusion.errors import CalibrationError
from cache4diffusion.settings import setting
from cache4diffusion.sites import Span, UNetLevel
from cache4diffusion.storage import Storage, Store

_VARIES = 1e-9  # of a channel's mean square: below that its variance is rounding


@dataclass(frozen=True)
class AffineFits(Statistic):
    """For every step i and r = 1 .. reach: the distance of its feature ``Y`` from ``X``, that of step i - r as it comes
    back from the cache, and the ``a``, ``b`` of least ``|a X + b - Y|^2``.

    ``a = cov(X, Y) / var(X)`` and ``b = mean(Y) - a mean(X)`` per channel, over the batch (both CFG branches), places
    and prompts; 1 and the mean change where X does not vary. The distance is ``mean|Y - X|``. All pairs are measured in
    one uncached run per prompt, so that any schedule can be made of them later.

    Quantisation is in it where it is in the pipeline: features are those of the denoiser as it is, quantised weights
    and all, and with ``cache_dtype`` X has been kept in that dtype, so that a and b undo what is systematic in its
    rounding as well. The quality is the share of the squared error of reuse that a and b take away.

    Memory: ``reach`` copies of the feature. The sums take ``4 x steps x reach x channels`` numbers in float64.
    Differences from the code: the variance is divided by the same count as the covariance (there by one less).
    """

    reach: int = setting(9, "most steps a feature is reused for; an interval of N asks for 2 N - 1", ge=1, le=199)
    unit: Literal["level", "span"] = setting(
        "level", "what is cached: 'level', a U-Net's (see deepcache), or 'span', all blocks of a transformer"
    )
    block: int = setting(0, "of a level: up-block at which the deep part is cut off, from the output. Code: 0", ge=0)
    layer: int = setting(0, "of a level: layer of that block, from its end. Code: 0", ge=0)
    cache_dtype: Literal["own", "bf16", "fp16", "int8", "fp8"] = setting(
        "own", "what the cache will be kept in, where accelerate is given a cache_dtype as well"
    )

    @property
    def site(self) -> UNetLevel | Span:
        """The feature that enters a level, or the residual of all blocks."""
        return UNetLevel(self.block, self.layer) if self.unit == "level" else Span()

    def observe(self, sums: Sums, memory: dict[str, Any], seen: Seen) -> None:
        """Compare with the last steps."""
        store = Store(Storage.of(None if self.cache_dtype == "own" else self.cache_dtype))
        for site, leaves in seen.features.items():
            past: deque[tuple[int, list[Tensor]]] = memory.setdefault(site, deque(maxlen=self.reach))
            for step, then in past:
                for place, (x, y) in enumerate(zip(then, leaves, strict=True)):
                    self._add(sums, f"{site} {place} {_behind(y)}", seen, seen.step - step, x, y.detach())
            past.append((seen.step, [store.keep(leaf.detach()).read().clone() for leaf in leaves]))

    def _add(self, sums: Sums, name: str, seen: Seen, lag: int, x: Tensor, y: Tensor) -> None:
        """One pair of features: of every channel ``x``, ``x x``, ``d`` and ``d x`` with ``d = y - x``; of all of them
        how many numbers there are to a channel, ``|d|`` and ``d d``."""
        if x.shape != y.shape or lag > self.reach:
            return
        axis = y.ndim - 1 - _behind(y)
        dims = [other for other in range(y.ndim) if other != axis]
        x, y = in_double(x), in_double(y)
        d = y - x
        shape = (seen.num_steps, self.reach)
        channels = sums.setdefault(f"channels {name}", torch.zeros(4, *shape, y.shape[axis], dtype=torch.float64))
        whole = sums.setdefault(f"whole {name}", torch.zeros(3, *shape, dtype=torch.float64))
        found = torch.stack([number.sum(dims) for number in (x, x * x, d, d * x)])
        channels[:, seen.step, lag - 1] += found.cpu()
        totals = torch.stack([d.new_tensor(y.numel() / y.shape[axis]), d.abs().sum(), d.square().sum()])
        whole[:, seen.step, lag - 1] += totals.cpu()

    def fit(self, sums: Sums) -> Fit:
        """Distances, and a scale and shift for every pair of steps."""
        names = [name.removeprefix("whole ") for name in sums if name.startswith("whole ")]
        if not names:
            raise CalibrationError("No feature was seen at two steps: runs need two steps or more.")
        tensors: dict[str, Tensor] = {}
        far, numbers, left, moved = 0.0, 0.0, 0.0, 0.0
        for name in names:
            count, distance, squares = sums[f"whole {name}"]
            x, xx, d, dx = sums[f"channels {name}"] / count.clamp_min(1)[..., None]
            variance, covariance = xx - x * x, dx - d * x
            varies = variance > _VARIES * xx
            slope = torch.where(varies, covariance / torch.where(varies, variance, 1.0), 0.0)
            tensors[f"scale {name}"], tensors[f"shift {name}"] = (1 + slope).float(), (d - slope * x).float()
            width = x.shape[-1]
            far, numbers = far + distance, numbers + count * width
            taken = (d * d + slope * covariance).sum(-1) * count
            left, moved = left + float((squares - taken).clamp_min(0).sum()), moved + float(squares.sum())
        tensors["errors"] = far / torch.as_tensor(numbers).clamp_min(1)
        total = float(torch.as_tensor(numbers).sum())
        quality = judged(
            1 - left / moved if moved > 0 else None,
            (left / total) ** 0.5,
            int(total),
            "scale and shift per channel",
            "the squared error of reuse",
            "the correction",
        )
        return Fit(tensors, quality)

    def shapes(self, num_steps: int) -> Mapping[str, Shape]:
        """By step and lag."""
        shape = (num_steps, self.reach)
        return {"errors": shape, "scale *": (*shape, None), "shift *": (*shape, None)}

    def figure(self, sums: Sums, fit: Fit) -> Figure:
        """Distances over the shortest and the longest reuse."""
        errors = fit.tensors["errors"]
        lines = {
            f"{lag} steps apart": [(float(i), float(errors[i, lag - 1])) for i in range(lag, len(errors))]
            for lag in sorted({1, min(self.reach, len(errors) - 1)})
        }
        return Figure("step", "distance of features", lines=lines)


def _behind(feature: Tensor) -> int:
    """Axes behind the channels: none of tokens ``[B, N, D]``, two of maps ``[B, C, H, W]``."""
    return max(feature.ndim - 2, 0) if feature.ndim > 3 else 0
