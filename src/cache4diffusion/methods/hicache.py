"""HiCache: forecast every part's output by its differences on scaled Hermite polynomials.

Source: arXiv:2508.16984; code fenglang918/HiCache, known through re-implementations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.gates import FixedInterval
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Hermite
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts


@dataclass(frozen=True)
class HiCache(Method):
    """TaylorSeer with another basis: ``k^m / m!`` becomes ``sigma^m H_m(sigma k) / m!``.

    Below ``sigma = 0.7071`` only a part of the slope is followed (half of it at 0.5), which bears longer intervals. See
    `Hermite` for the formula and for what is exact.

    Cost: ``order + 1`` copies of every part's output, as TaylorSeer.
    """

    interval: int = setting(7, "distance of two full steps; 1 never caches. Paper: 7 (FLUX)", ge=1)
    order: int = setting(2, "highest Hermite polynomial; 0 is plain reuse. Paper: 2", ge=0, le=8)
    sigma: float = setting(0.5, "contraction; 0.7071 and order 1 is TaylorSeer. Paper: 0.5", gt=0)
    warmup: int = setting(3, "first steps that are always full. Paper: 3", ge=1)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="hicache",
        title="HiCache",
        arxiv="2508.16984",
        site="parts",
        gate="fixed interval",
        predictor="Hermite",
        tokens=None,
        fidelity="paper",
        off={"interval": 1},
        family="forecasting",
        when="intervals are long, and following the whole slope overshoots",
        ladder=({"interval": 2}, {"interval": 6, "warmup": 10}, {"interval": 7}),
        citation="Feng et al., HiCache: Training-free Acceleration of Diffusion Models via Hermite Polynomial-based "
        "Feature Caching, 2025",
        published={
            "FLUX.1-dev": {"interval": 7, "order": 2, "sigma": 0.5, "warmup": 3},
        },
    )

    def compose(self) -> Composition:
        """Parts x fixed interval after a warm-up x Hermite."""
        return Composition(
            site=Parts(),
            gate=FixedInterval(self.interval, anchor="warmup", warmup=self.warmup),
            predictor=Hermite(self.order, self.sigma, first_difference_step=self.warmup - 1),
        )
