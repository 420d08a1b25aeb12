"""FreqCa: reuse the low spatial frequencies of the last hidden feature, forecast the high ones.

Source: arXiv:2510.08669; released code Tammytcl/FreqCa.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import FixedInterval
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Bands
from cache4diffusion.settings import setting
from cache4diffusion.sites import Span


@dataclass(frozen=True)
class FreqCa(Method):
    """One feature, what leaves the last block, is split into two bands; the final norm and projection always run.

    See `Bands` for the formula. The schedule is TaylorSeer's.

    Cost: ``order + low_order + 2`` copies of one hidden feature; the transform runs at full steps.
    Differences from the code: it keeps both bands up to the higher order. Its cosine transform takes the tokens to be a
    square and fails otherwise; ``transform="auto"`` then takes the Fourier transform.
    """

    interval: int = setting(6, "distance of two full steps; 1 never caches. Code: 6 or 9 (FLUX)", ge=1)
    order: int = setting(2, "Hermite order of the high band. Code: 2", ge=0, le=8)
    low_order: int = setting(0, "Hermite order of the low band; 0 is reuse. Code: 0", ge=0, le=8)
    sigma: float = setting(0.71, "contraction of the Hermite polynomials. Code: 0.71", gt=0)
    cutoff: float = setting(0.1, "highest low frequency, as a fraction of the highest. Code: 0.1", le=1)
    transform: Literal["auto", "dct", "fft"] = setting("auto", "'dct' for squares of tokens, 'fft' for any row of them")
    warmup: int = setting(3, "first steps that are always full. Code: 3", ge=1)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="freqca",
        title="FreqCa",
        arxiv="2510.08669",
        site="span output",
        gate="fixed interval",
        predictor="bands",
        tokens=None,
        fidelity="code",
        off={"interval": 1},
        family="forecasting",
        when="intervals are long, and memory is for a few hidden features only",
        ladder=({"interval": 2}, {"interval": 6, "warmup": 10}, {"interval": 7}),
        citation="Liu et al., FreqCa: Accelerating Diffusion Models via Frequency-Aware Caching, 2025",
        published={
            "FLUX.1-dev": {"interval": 6, "order": 2, "low_order": 0, "sigma": 0.71, "transform": "dct", "warmup": 3},
            "FLUX.1-dev, faster": {"interval": 9, "transform": "dct"},
            "Qwen-Image": {"interval": 6, "transform": "fft"},
            "FLUX.1-schnell, 4 steps": {"interval": 2, "transform": "dct"},
        },
    )

    def compose(self) -> Composition:
        """Output of all blocks x fixed interval after a warm-up x bands."""
        predictor = Bands(
            order=self.order,
            low_order=self.low_order,
            sigma=self.sigma,
            cutoff=self.cutoff,
            transform=self.transform,
            first_difference_step=self.warmup - 1,
        )
        gate = FixedInterval(self.interval, anchor="warmup", warmup=self.warmup)
        return Composition(site=Span(form="output"), gate=gate, predictor=predictor)
