"""TeaCache: timestep embedding aware cache. A cheap input signal tells how much the output will change.

Source: arXiv:2411.19108 (CVPR 2025), eq. 4-6; released code ali-vilab/TeaCache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.calibration import Given
from cache4diffusion.calibration.polynomial import SignalPolynomial
from cache4diffusion.data import teacache_coefficients, teacache_thresholds
from cache4diffusion.errors import SettingError
from cache4diffusion.gates import AccumulatedChange, ForceLast, Guard, Warmup
from cache4diffusion.method import Composition, Dial, Method, MethodInfo
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
    themselves, highest power first. ``"identity"`` sums the raw changes: for denoisers without a fit. A ``calibration``
    takes their place: the polynomial fitted to your own denoiser, used within the range of changes it was fitted to.

    Cost: the signal and one residual per stream that is read afterwards. One host sync per step.
    Differences from the code: a polynomial that is negative outside its fitted range counts as 0, and one of your own
    is never asked outside it; ``handle.report()`` says how often. ``variant="official"`` does neither, and then even a
    threshold of 0 may cache. Scores are float32. The code has a polynomial for every denoiser it serves; the default
    here is none, and 0.4 is then not the 0.4 of the published tables: FLUX's polynomial counts a raw change from 0 to
    0.2 as 0.18 to 0.26.
    """

    threshold: float = setting(0.4, "accumulated change at which a step is full; 0 is off. Code: 0.4 (FLUX)", ge=0)
    coefficients: str | tuple[float, ...] = setting(
        "identity", "name of a published set, 'identity', or numbers, highest power first"
    )
    calibration: Given = setting(None, "polynomial of your denoiser: a file of c4d calibrate, or what it returned")
    warmup: int = setting(
        1, "first steps that are always full. Code: 1; a tenth of the run (HiDream), 5 (Wan, use_ret_steps)", ge=1
    )
    cooldown: int = setting(
        1, "last steps that are always full; 0 needs no step count. Code: 1; 0 (HiDream; Wan, use_ret_steps)", ge=0
    )
    decide: Literal["batch", "any", "row"] = setting("batch", "one decision, full if any row needs it, or per row")
    variant: Literal["default", "official"] = setting("default", "'official': negative rescaled changes lower the sum")

    calibrator = SignalPolynomial
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
        family="adaptive gates",
        when="coefficients were fitted to your denoiser, or may be, and a cached step should run no block at all",
        dial=Dial("threshold", 0.08, 3.0),
        ladder=({"threshold": 0.05}, {"threshold": 0.1}, {"threshold": 0.17}),
        citation="Liu et al., Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model, CVPR 2025",
        published={
            f"{name}, {note}": {"coefficients": name, "threshold": threshold}
            for name, threshold, note in teacache_thresholds()
        },
    )

    def compose(self) -> Composition:
        """All blocks x accumulated signal x reuse, first and last steps full."""
        fitted = None
        if self.calibration is not None:
            if self.coefficients != "identity":
                raise SettingError(
                    f"TeaCache(coefficients={self.coefficients!r}, calibration=...): give one of the two."
                )
            fit = self.measured.fit
            coefficients = tuple(fit["coefficients"].tolist())
            fitted = (float(fit["range"][0]), float(fit["range"][1]))
        elif isinstance(self.coefficients, str):
            coefficients = teacache_coefficients(self.coefficients)
        elif self.coefficients:
            coefficients = self.coefficients
        else:
            raise SettingError("TeaCache(coefficients=()): give at least one number, or the name of a set.")
        guards: tuple[Guard, ...] = (Warmup(self.warmup),)
        if self.cooldown:
            guards += (ForceLast(self.cooldown),)
        is_official = self.variant == "official"
        return Composition(
            site=Span(),
            gate=AccumulatedChange(
                self.threshold,
                coefficients,
                rescale="none" if is_official else "clamp0",
                fitted=None if is_official else fitted,
            ),
            predictor=Reuse(),
            guards=guards,
            decide=self.decide,
        )
