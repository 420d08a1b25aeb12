"""SeaCache: TeaCache's sum, of what the noise level lets be seen.

Source: arXiv:2602.18993 (CVPR 2026); released code jiwoogit/SeaCache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import AccumulatedChange, ForceLast, Guard, Spectral, Warmup
from cache4diffusion.method import Composition, Dial, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Span


@dataclass(frozen=True)
class SeaCache(Method):
    """Sum up the change of the first block's modulated input behind a Wiener filter; cached below ``threshold``.

    Early in a run only low frequencies carry signal, later high ones as well; the filter (see `Spectral`) weighs a
    change by that, so no fitted polynomial is needed. Else as `TeaCache`: a cached step adds the residual of all blocks
    as it was at the last full step; the first and the last step are full.

    Cost: the filtered signal and one residual per stream that is read afterwards; a Fourier transform of the signal and
    one host sync per step.
    Differences from the code: the noise level is read off the timestep of a flow-matching run (there off the
    scheduler's sigmas); for other schedules it is an approximation.
    """

    threshold: float = setting(0.3, "accumulated change at which a step is full; 0 is off. Code: 0.3 (FLUX)", ge=0)
    power: float = setting(2.0, "falling power of the spectrum. Code: 2 (images), 3 (video)", gt=0)
    grid: tuple[int, ...] = setting((), "rows and columns of tokens, frames first; () finds them out")
    cooldown: int = setting(1, "last steps that are always full; 0 needs no step count. Code: 1", ge=0)
    decide: Literal["batch", "any", "row"] = setting("batch", "one decision, full if any row needs it, or per row")

    info: ClassVar[MethodInfo] = MethodInfo(
        name="seacache",
        title="SeaCache",
        arxiv="2602.18993",
        site="span",
        gate="accumulated filtered signal",
        predictor="reuse of the residual",
        tokens=None,
        fidelity="code",
        off={"threshold": 0.0},
        family="adaptive gates",
        when="TeaCache fits, but no coefficients are known for your flow-matching denoiser",
        dial=Dial("threshold", 0.08, 4.0),
        ladder=({"threshold": 0.1}, {"threshold": 0.3}, {"threshold": 0.5}),
        citation="Chung et al., SeaCache: Spectral-Evolution-Aware Cache for Accelerating Diffusion Models, CVPR 2026",
        published={
            "FLUX.1-dev, 18.0 s to 9.4 s": {"threshold": 0.3, "power": 2.0},
            "FLUX.1-dev, 18.0 s to 6.4 s": {"threshold": 0.6, "power": 2.0},
            "HunyuanVideo": {"threshold": 0.2, "power": 3.0},
        },
    )

    def compose(self) -> Composition:
        """All blocks x accumulated filtered signal x reuse, first and last step full."""
        guards: tuple[Guard, ...] = (Warmup(1),)
        if self.cooldown:
            guards += (ForceLast(self.cooldown),)
        return Composition(
            site=Span(),
            gate=AccumulatedChange(self.threshold, of=Spectral(self.power, self.grid)),
            predictor=Reuse(),
            guards=guards,
            decide=self.decide,
        )
