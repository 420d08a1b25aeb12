"""Newton: forecast every part's output by the polynomial through its last full steps. Ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.gates import FixedInterval
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Newton as NewtonPredictor
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts


@dataclass(frozen=True)
class Newton(Method):
    """TaylorSeer's sites and schedule with divided differences instead of backward differences taken for derivatives.

    Exact for features that are polynomials of degree ``order`` in the step, at any spacing of the full steps;
    TaylorSeer is exact for straight lines only. Order 1 equals TaylorSeer of order 1.

    Cost: ``order + 1`` copies of every part's output, as TaylorSeer.
    """

    interval: int = setting(6, "distance of two full steps; 1 never caches. TaylorSeer: 6 (FLUX)", ge=1)
    order: int = setting(2, "degree of the polynomial; 0 is plain reuse", ge=0, le=8)
    warmup: int = setting(3, "first steps that are always full. TaylorSeer: 3 (FLUX)", ge=1)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="newton",
        title="Newton",
        arxiv=None,
        site="parts",
        gate="fixed interval",
        predictor="Newton",
        tokens=None,
        fidelity="ours",
        off={"interval": 1},
        family="forecasting",
        when="TaylorSeer fits, but features bend: order 2 follows a parabola exactly",
        ladder=({"interval": 2}, {"interval": 6, "warmup": 10}, {"interval": 7}),
        citation="cache4diffusion",
    )

    def compose(self) -> Composition:
        """Parts x fixed interval after a warm-up x Newton."""
        return Composition(
            site=Parts(),
            gate=FixedInterval(self.interval, anchor="warmup", warmup=self.warmup),
            predictor=NewtonPredictor(self.order),
        )
