"""What FastCache fits: a linear map from what enters a block to what it adds. Source: arXiv:2505.20353."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cache4diffusion.calibration.calibrator import Shape, Sums
from cache4diffusion.calibration.quality import judged
from cache4diffusion.calibration.statistic import Fit, Seen, Statistic
from cache4diffusion.errors import CalibrationError
from cache4diffusion.predictors.corrector import channels
from cache4diffusion.settings import setting
from cache4diffusion.sites import Blocks


@dataclass(frozen=True)
class BlockMaps(Statistic):
    """``W, b = argmin sum |W x + b - f|^2 + lam |W|^2`` for every block and stream: x enters, the block adds f.

    Over all tokens, steps, branches and prompts, from running sums of ``[x, 1]^T [x, 1]`` and ``[x, 1]^T f``; ``lam``
    is ``ridge`` times the mean diagonal of the first. A large ridge gives W = 0, the block that is skipped. The quality
    is the share of what blocks add that the maps explain, a mean over blocks and streams: the rest is lost where a
    block is cached. It is that of the prompts it was fitted to.

    Memory: ``2 (D + 1)^2`` numbers in float64 per block and stream, which the file holds too.
    """

    is_by_step: ClassVar[bool] = False
    sees: ClassVar[Literal["input"] | None] = "input"

    ridge: float = setting(1e-4, "pulls the maps towards skipping the block; 0 is plain least squares", ge=0)

    @property
    def site(self) -> Blocks:
        """Every block."""
        return Blocks()

    def observe(self, sums: Sums, memory: dict[str, Any], seen: Seen) -> None:
        """Add up the products."""
        for site, leaves in seen.features.items():
            for i, (f, x) in enumerate(zip(leaves, seen.entered[site], strict=True)):
                x, f = _tokens(x), _tokens(f)
                x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
                products = {"gram": x.T @ x, "cross": x.T @ f, "square": f.double().square().sum().reshape(1)}
                for kind, value in products.items():
                    number = value.to("cpu", torch.float64)
                    name = f"{site}/{i}/{kind}"
                    sums[name] = sums[name] + number if name in sums else number

    def fit(self, sums: Sums) -> Fit:
        """A map for each block and stream."""
        tensors, shares = {}, []
        for name in [name.removesuffix("/gram") for name in sums if name.endswith("/gram")]:
            gram, cross, square = (sums[f"{name}/{kind}"] for kind in ("gram", "cross", "square"))
            weight, bias = ridge_map(gram, cross, self.ridge)
            tensors[f"{name}/weight"], tensors[f"{name}/bias"] = weight.float(), bias.float()
            both = torch.cat([weight.T, bias[None]])
            left = float(square - 2 * (both * cross).sum() + (both * (gram @ both)).sum())
            if float(square) > 0:
                shares.append(max(left, 0.0) / float(square))
        if not tensors:
            raise CalibrationError("No block was seen: sample under torch.no_grad().")
        left = sum(shares) / len(shares) if shares else 0.0
        r2 = 1 - left if shares else None
        words = ("a linear map of what enters a block", "what the block adds", "this method")
        return Fit(tensors, judged(r2, left**0.5, len(shares), *words))

    def shapes(self, num_steps: int) -> Mapping[str, Shape]:
        """W and b of each block and stream."""
        return {"*/weight": (None, None), "*/bias": (None,)}


def ridge_map(gram: Tensor, cross: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """``W [out, in]`` and ``b [out]`` from the sums of ``[x, 1]^T [x, 1]`` and ``[x, 1]^T f``; b is not pulled."""
    pull = torch.full((len(gram),), ridge * float(gram.diagonal()[:-1].mean()), dtype=gram.dtype)
    pull[-1] = 0
    both = torch.linalg.lstsq(gram + torch.diag(pull), cross, driver="gelsd").solution
    return both[:-1].T.contiguous(), both[-1].clone()


def _tokens(x: Tensor) -> Tensor:
    tokens = x if x.ndim <= 3 else x.movedim(1, -1)
    return tokens.detach().float().reshape(-1, channels(x))
