"""FastCache: a block whose input has hardly changed is replaced by a linear map of what enters it now.

Source: arXiv:2505.20353; released code NoakLiu/FastCache-xDiT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.calibration import Given
from cache4diffusion.calibration.maps import BlockMaps
from cache4diffusion.gates import Significance
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Blank, LinearMap, Weights
from cache4diffusion.settings import setting
from cache4diffusion.sites import Blocks


@dataclass(frozen=True)
class FastCache(Method):
    """Every block decides by ``delta = |H - H_ref|_F / |H_ref|_F`` of what enters it, and then adds ``W H + b``.

    Cached iff ``delta <= max(threshold, min(stat, adapt))``, with a chi-square bound and a polynomial of ``delta`` and
    the timestep (`Significance`); ``H_ref`` entered when the block last ran. The map is fitted by ``c4d calibrate`` to
    what the block adds (`BlockMaps`), by ridge regression; no past feature plays a part. Exact for affine blocks.

    Cost: one copy of what enters each block, and the maps, ``D^2`` numbers per block and stream. One host sync per
    block. A cached block costs ``D^2`` multiply-adds per token.
    Differences from the code: W and b are fitted (there they are random and never trained, and a cached block destroys
    the feature); the map gives what the block *adds*, so that regularisation pulls towards skipping it; every stream
    of a joint block has its map, and the image decides; 0 is off. ``variant="official"`` keeps the released rule at a
    threshold of 0, which caches changes up to about 0.02.
    Its split into moving and static tokens is left out: a block that runs on some tokens lets them attend to these
    alone and needs positions cut to them, which no site here can do; in the code the first image of a batch picks the
    tokens of all. Nor is there its merging of tokens.
    """

    threshold: float = setting(0.05, "relative change of what enters a block; 0 is off. Code: 0.05", ge=0)
    significance: float = setting(0.05, "level of the chi-square test. Code: 0.05", gt=0, le=0.999)
    adaptive: tuple[float, ...] = setting(
        (0.01, 0.5, -0.002, 0.00005), "the adaptive bound: constant, of the change, of the timestep, of its square"
    )
    variant: Literal["default", "official"] = setting("default", "'official': a threshold of 0 still caches")
    front: int = setting(0, "first blocks that always run", ge=0)
    back: int = setting(0, "last blocks that always run", ge=0)
    calibration: Given = setting(None, "maps of your denoiser: a file of c4d calibrate, or what it returned")

    calibrator = BlockMaps
    info: ClassVar[MethodInfo] = MethodInfo(
        name="fastcache",
        title="FastCache",
        arxiv="2505.20353",
        site="single blocks",
        gate="significance of the input's change",
        predictor="fitted linear map",
        tokens=None,
        fidelity="reconstructed",
        off={"threshold": 0.0},
        family="correctors",
        when="the calibration's verdict says that your blocks act nearly linearly",
        ladder=({}, {"threshold": 0.2}, {"threshold": 0.33}),
        citation="Liu et al., FastCache: Fast Caching for Diffusion Transformer Through Learnable Linear "
        "Approximation, 2025",
        needs_calibration=True,
        published={"DiT, PixArt, FLUX": {"threshold": 0.05, "significance": 0.05}},
    )

    def compose(self) -> Composition:
        """Single blocks x significance x fitted linear map."""
        return self._with(Weights(self.measured.fit))

    def outline(self) -> Composition:
        """With maps of the size they will have."""
        return self._with(Blank()) if self.loaded is None else self.compose()

    def _with(self, weights: Weights) -> Composition:
        return Composition(
            site=Blocks(self.front, self.back),
            gate=Significance(
                self.threshold, self.significance, self.adaptive, is_off_at_zero=self.variant == "default"
            ),
            predictor=LinearMap(weights),
        )
