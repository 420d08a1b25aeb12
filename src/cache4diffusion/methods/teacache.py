"""TeaCache: timestep embedding aware cache. A cheap input signal tells how much the output will change.

Source: arXiv:2411.19108 (CVPR 2025), eq. 4-6; released code ali-vilab/TeaCache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.data import teacache_coefficients, teacache_thresholds
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

    ``coefficients`` is a set's name from the published table (``c4d show teacache`` lists them) or the numbers
    themselves, highest power first. ``"identity"`` sums the raw changes: for denoisers without a fit.

    Cost: the signal and one residual per stream that is read afterwards. One host sync per step.
    Differences from the code: a polynomial that is negative outside its fitted range counts as 0
    (``variant="official"`` lets it lower the sum, and then even a threshold of 0 may cache); scores are float32. The
    code has a polynomial for every denoiser it serves; the default here is none, and 0.4 is then not the 0.4 of the
    published tables: FLUX's polynomial counts a raw change from 0 to 0.2 as 0.18 to 0.26.
    """

    threshold: float = setting(0.4, "accumulated change at which a step is full; 0 is off. Code: 0.4 (FLUX)", ge=0)
    coefficients: str | tuple[float, ...] = setting(
        "identity", "name of a published set, 'identity', or numbers, highest power first"
    )
    warmup: int = setting(
        1, "first steps that are always full. Code: 1; a tenth of the run (HiDream), 5 (Wan, use_ret_steps)", ge=1
    )
    cooldown: int = setting(
        1, "last steps that are always full; 0 needs no step count. Code: 1; 0 (HiDream; Wan, use_ret_steps)", ge=0
    )
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
        published={
            f"{name}, {note}": {"coefficients": name, "threshold": threshold}
            for name, threshold, note in teacache_thresholds()
        },
    )

    def compose(self) -> Composition:
        """All blocks x accumulated signal x reuse, first and last steps full."""
        if isinstance(self.coefficients, str):
            coefficients = teacache_coefficients(self.coefficients)
        elif self.coefficients:
            coefficients = self.coefficients
        else:
            raise SettingError("TeaCache(coefficients=()): give at least one number, or the name of a set.")
        guards: tuple[Guard, ...] = (Warmup(self.warmup),)
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
