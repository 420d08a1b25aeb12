"""What TeaCache measures: how much the output changes where the signal does. Source: arXiv:2411.19108, eq. 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cache4diffusion.calibration.calibrator import Fit, Shape, Sums
from cache4diffusion.calibration.figure import Figure
from cache4diffusion.calibration.quality import judged, r2_of
from cache4diffusion.calibration.relative import relative_l1
from cache4diffusion.calibration.statistic import Seen, Statistic
from cache4diffusion.errors import CalibrationError
from cache4diffusion.gates import Signal
from cache4diffusion.settings import setting
from cache4diffusion.sites import Span


@dataclass(frozen=True)
class SignalPolynomial(Statistic):
    """Fit ``y = P(x)``: x the relative L1 change of the signal, y that of the output, between adjacent steps.

    Every pair of every prompt, step and branch is kept; P is the least-squares polynomial through all of them, as in
    the authors' recipe (numpy.polyfit). Where there are fewer different x than coefficients, the degree is lower.
    """

    is_by_step: ClassVar[bool] = False
    listed: ClassVar[tuple[str, ...]] = ("pairs",)

    degree: int = setting(4, "of the polynomial. Code: 4", ge=1, le=8)
    target: Literal["output", "residual"] = setting(
        "output", "y is the change of the denoiser's output (as the authors say), or of its blocks' residual"
    )

    @property
    def site(self) -> Span:
        """All blocks."""
        return Span()

    @property
    def watch(self) -> Signal:
        """The first block's modulated input, against the step before."""
        return Signal()

    def init(self) -> Sums:
        """No pair yet."""
        return {"pairs": torch.zeros((0, 2), dtype=torch.float64)}

    def observe(self, sums: Sums, memory: dict[str, Any], seen: Seen) -> None:
        """Note a pair."""
        if self.target == "output":
            now = [leaf.detach().clone() for leaf in seen.outputs]
        else:
            now = [leaf.detach().clone() for leaves in seen.features.values() for leaf in leaves]
        before, memory["before"] = memory.get("before"), now
        if before is None or seen.score is None:
            return
        pair = torch.tensor([[seen.score, relative_l1(now, before)]], dtype=torch.float64)
        if bool(pair.isfinite().all()):
            sums["pairs"] = torch.cat([sums["pairs"], pair])

    def fit(self, sums: Sums) -> Fit:
        """Coefficients, highest power first, and the range of x."""
        x, y = sums["pairs"].T
        if len(x) < 2:
            raise CalibrationError(f"{len(x)} pairs of changes were seen; a fit needs 2: use more steps or prompts.")
        coefficients = polyfit(x, y, self.degree)
        r2, residual = r2_of(y, polyval(coefficients, x))
        quality = judged(r2, residual, len(x), "the signal", f"the change of the {self.target}", "this gate")
        return Fit({"coefficients": coefficients, "range": torch.stack([x.min(), x.max()])}, quality)

    def shapes(self, num_steps: int) -> Mapping[str, Shape]:
        """What TeaCache takes."""
        return {"coefficients": (self.degree + 1,), "range": (2,)}

    def figure(self, sums: Sums, fit: Fit) -> Figure:
        """The pairs, and the polynomial through them."""
        low, high = fit.tensors["range"].tolist()
        grid = torch.linspace(low, high, 101, dtype=torch.float64)
        curve = list(zip(grid.tolist(), polyval(fit.tensors["coefficients"], grid).tolist(), strict=True))
        points = [(float(a), float(b)) for a, b in sums["pairs"]]
        return Figure(
            "relative change of the signal",
            f"relative change of the {self.target}",
            points={"steps": points},
            lines={"fit": curve},
        )


def polyfit(x: Tensor, y: Tensor, degree: int) -> Tensor:
    """Least-squares coefficients, highest power first; a lower degree (zeros in front) where there are too few x."""
    usable = min(degree, len(torch.unique(x)) - 1)
    scale = x.abs().max().clamp_min(1e-300)
    powers = torch.arange(usable, -1, -1, dtype=torch.float64)
    found = torch.linalg.lstsq((x / scale)[:, None] ** powers, y[:, None], driver="gelsd").solution[:, 0]
    return torch.cat([torch.zeros(degree - usable, dtype=torch.float64), found / scale**powers])


def polyval(coefficients: Tensor, x: Tensor) -> Tensor:
    """The polynomial at ``x`` (Horner)."""
    value = torch.zeros_like(x)
    for coefficient in coefficients:
        value = value * x + coefficient
    return value
