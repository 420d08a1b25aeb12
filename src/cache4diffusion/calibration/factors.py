"""What ICC measures: how large the channels of every linear layer are. Source: arXiv:2505.05829, ccccczzy/icc."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cache4diffusion.calibration.calibrator import Shape, Sums
from cache4diffusion.calibration.quality import judged
from cache4diffusion.calibration.statistic import Fit, Seen, WeightStatistic
from cache4diffusion.errors import CalibrationError
from cache4diffusion.settings import setting
from cache4diffusion.sites import Linears

SKETCH = 64  # rows of the random projection of increments by which a fit is judged


@dataclass(frozen=True)
class LinearFactors(WeightStatistic):
    """``A B ~ W`` of every linear layer, by a singular value decomposition that knows how large the channels are.

    ``W~ = diag(l) W diag(q) = U S V^T``; ``A = diag(l)^-1 U_r S_r``, ``B = V_r^T diag(q)^-1``. ``q = (mean|x|)^0.5`` by
    input channel and ``l = (mean|y|)^0.5`` by output channel, a mean over tokens, steps and prompts, raised to at least
    their largest over ``max_ratio``, plus 1e-6. In float32. The columns of A come in the order of the singular values,
    so that the first few are the factors of a lower rank.

    The quality is the share of the change of an output from step to step that ``A B`` times the change of the input
    explains, a mean over layers. It is found on a random projection of all increments (signs, `SKETCH` rows per layer),
    which keeps the sums small: ``|(W - A B) D|^2`` over all increments D is that over the projection, on average.

    Memory: one copy of every layer's input (and output, for ``"increment"``) while a prompt is sampled.
    Differences from the code: activations of sampled runs, not of noised images at random timesteps. Its Fisher
    variant, which needs gradients, is left out.
    """

    is_by_step: ClassVar[bool] = False
    sees: ClassVar[Literal["input"] | None] = "input"

    rank: int = setting(128, "columns of A, at most those of W. Code: 128", ge=1)
    source: Literal["magnitude", "increment", "none"] = setting(
        "magnitude",
        "l and q: of what flows ('mag', CA-SVD), of its change from step to step ('delta_mag', CD-SVD), or plain SVD",
    )
    sides: Literal["both", "left", "right"] = setting("both", "whether l and q are used, or only l, or only q")
    max_ratio: float = setting(1000.0, "largest over smallest of l and of q. Code: 1000", ge=1)

    @property
    def site(self) -> Linears:
        """Every linear layer inside a part."""
        return Linears()

    def observe(self, sums: Sums, memory: dict[str, Any], seen: Seen) -> None:
        """Add up sizes, and project increments."""
        for site, (y,) in seen.features.items():
            (x,) = seen.entered[site]
            now = {"x": _tokens(x), "y": _tokens(y)}
            before, memory[site] = memory.get(site), {"x": now["x"].clone()}
            if self.source == "increment":
                memory[site]["y"] = now["y"].clone()
            elif self.source == "magnitude":
                self._add(sums, site, now)
            if before is None or before["x"].shape != now["x"].shape:
                continue
            if self.source == "increment":
                self._add(sums, site, {side: now[side] - before[side] for side in now})
            increment = now["x"] - before["x"]
            known = sums.setdefault(f"{site}/sketch", torch.zeros(SKETCH, increment.shape[1], dtype=torch.float64))
            known += (_signs(increment) @ increment).to("cpu", torch.float64)

    @staticmethod
    def _add(sums: Sums, site: str, values: Mapping[str, Tensor]) -> None:
        for side, value in values.items():
            size = value.abs().mean(0).to("cpu", torch.float64)
            sums.setdefault(f"{site}/{side}", torch.zeros_like(size)).add_(size)
        sums.setdefault(f"{site}/count", torch.zeros(1, dtype=torch.float64)).add_(1)

    def fit_to(self, sums: Sums, weights: Callable[[str], Tensor]) -> Fit:
        """Factors of every layer."""
        sites = [name.removesuffix("/sketch") for name in sums if name.endswith("/sketch")]
        if not sites:
            raise CalibrationError("No linear layer was seen at two steps: runs need two steps or more.")
        tensors, shares = {}, []
        for site in sites:
            weight = weights(site).to("cpu", torch.float32)
            a, b = factors(weight, self.rank, *(self._scale(sums, site, side, weight) for side in ("y", "x")))
            tensors[f"{site}/0/a"], tensors[f"{site}/0/b"] = a, b
            sketch = sums[f"{site}/sketch"].float()
            moved = (sketch @ weight.T).square().sum()
            if moved > 0:
                shares.append(float((sketch @ weight.T - (sketch @ b.T) @ a.T).square().sum() / moved))
        left = sum(shares) / len(shares) if shares else 0.0
        quality = judged(
            1 - left if shares else None,
            left**0.5,
            len(shares),
            "the low-rank product with the change of what enters a linear layer",
            "the change of what leaves it",
            "this correction",
        )
        return Fit(tensors, quality)

    def _scale(self, sums: Sums, site: str, side: str, weight: Tensor) -> Tensor:
        """``l`` (of y) or ``q`` (of x)."""
        if self.source == "none" or self.sides == {"y": "right", "x": "left"}[side]:
            return torch.ones(weight.shape[0 if side == "y" else 1])
        size = (sums[f"{site}/{side}"] / sums[f"{site}/count"]).sqrt().float()
        return size.clamp_min(float(size.max()) / self.max_ratio) + 1e-6

    def shapes(self, num_steps: int) -> Mapping[str, Shape]:
        """A and B of each layer."""
        return {"*/0/a": (None, None), "*/0/b": (None, None)}


def factors(weight: Tensor, rank: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """``A [out, r]`` and ``B [r, in]`` of ``W [out, in]``, weighted by channels."""
    u, s, v = torch.linalg.svd(left[:, None] * weight * right, full_matrices=False)
    rank = min(rank, len(s))
    return (u[:, :rank] * s[:rank]) / left[:, None], v[:rank] / right


def _tokens(x: Tensor) -> Tensor:
    return x.detach().float().reshape(-1, x.shape[-1])


def _signs(x: Tensor) -> Tensor:
    """Random signs ``[SKETCH, tokens]`` that depend on the values alone, so that shards add up to one pass."""
    (bits,) = struct.unpack("<Q", struct.pack("<d", float(x.double().square().sum())))
    generator = torch.Generator().manual_seed(bits & (2**63 - 1))
    signs = torch.randint(0, 2, (SKETCH, x.shape[0]), generator=generator, dtype=torch.int8)
    return (2 * signs - 1).to(x.device, x.dtype)
