"""TeaCache: timestep embedding aware cache. A cheap input signal tells how much the output will change.

Source: arXiv:2411.19108 (CVPR 2025), eq. 4-6; released code ali-vilab/TeaCache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.data import teacache_coefficients
from cache4diffusion.errors import SettingError
from cache4diffusion.gates import AccumulatedChange, ForceLast, Guard, Warmup
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Span


@dataclass(frozen=True)
class TeaCache(Method):
    """Sum up the rescaled change of the first block's modulated input; cached while the sum stays below ``threshold``.

    ``score = mean|s_i - s_{i-1}| / mean|s_{i-1}|`` for the signal ``s``, rescaled by a polynomial fitted per denoiser,
    summed since the last full step. A cached step adds the residual of all blocks as it was at the last full step;
    embedders, final norm and projection run. The first and the last step are full. The signal is computed without
    running the block.

    ``coefficients`` is a set's name from the published table (``c4d show teacache`` lists them; none was re-measured
    here on real weights) or the numbers themselves, highest power first. ``"identity"`` sums the raw changes: for
    denoisers without a fit; thresholds then have another scale.

    Cost: the signal and one residual per stream that is read afterwards. One host sync per step.
    Published thresholds: FLUX 0.25 (1.5x), 0.4 (1.8x), 0.6 (2.0x), 0.8 (2.25x), with the ``flux`` coefficients.
    Differences from the code: a polynomial that is negative outside its fitted range counts as 0
    (``variant="official"`` lets it lower the sum); scores are float32.
    """

    threshold: float = setting(0.4, "accumulated change at which a step is full; 0 is off. Code: 0.4 (FLUX)", ge=0)
    coefficients: str | tuple[float, ...] = setting(
        "identity", "name of a published set, 'identity', or numbers, highest power first"
    )
    cooldown: int = setting(1, "last steps that are always full; 0 needs no step count. Code: 1", ge=0)
    decide: Literal["batch", "any", "row"] = setting("batch", "one decision, full if any row needs it, or per row")
    variant: Literal["default", "official"] = setting("default", "'official': negative rescaled changes lower the sum")

    info: ClassVar[MethodInfo] = MethodInfo(
        name="teacache",
        title="TeaCache",
        arxiv="2411.19108",
        site="span",
        gate="accumulated signal",
        predictor="reuse of the residual",
        tokens=None,
        fidelity="code",
        off={"threshold": 0.0},
        use="Adaptive where coefficients were fitted to the denoiser; a cached step runs no block at all.",
        citation="Liu et al., Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model, CVPR 2025",
    )

    def compose(self) -> Composition:
        """All blocks x accumulated signal x reuse, first and last step full."""
        if isinstance(self.coefficients, str):
            coefficients = teacache_coefficients(self.coefficients)
        elif self.coefficients:
            coefficients = self.coefficients
        else:
            raise SettingError("TeaCache(coefficients=()): give at least one number, or the name of a set.")
        guards: tuple[Guard, ...] = (Warmup(1),)
        if self.cooldown:
            guards += (ForceLast(self.cooldown),)
        return Composition(
            site=Span(),
            gate=AccumulatedChange(
                self.threshold, coefficients, rescale="none" if self.variant == "official" else "clamp0"
            ),
            predictor=Reuse(),
            guards=guards,
            decide=self.decide,
        )
