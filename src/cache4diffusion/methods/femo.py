"""FeMO: forecast every part's output with the momentum of its differences.

Source: submission 13027 to ICLR 2026 (OpenReview ih1oyr0j6y). Its formulas could not be read: reconstructed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.gates import FixedInterval
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import AdaptedMomentum, Momentum
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts


@dataclass(frozen=True)
class FeMO(Method):
    """TaylorSeer with differences smoothed over full steps, as Adam smooths gradients; ``beta=0`` is TaylorSeer.

    With ``adapted=True`` every part and row of the batch searches its own ``beta`` while sampling: at a full step it
    moves by ``gamma`` to the side that would have predicted that step better. See `Momentum` and `AdaptedMomentum`.

    Cost: ``history`` copies of every part's output. ``adapted=True``: two predictions more and a host sync per part at
    full steps.
    Differences from the paper: the rules are ours, under its idea; the momentum looks back ``history`` full steps.
    """

    interval: int = setting(6, "distance of two full steps; 1 never caches. Paper: 3 to 10", ge=1)
    order: int = setting(1, "highest power of the step offset; 0 is plain reuse. Paper: 1 or 2", ge=0, le=8)
    beta: float = setting(0.5, "weight of earlier differences (adapted: where the search begins)", ge=0, le=0.99)
    history: int = setting(4, "full steps the momentum looks back; more than the order", ge=1)
    adapted: bool = setting(False, "search beta while sampling")
    gamma: float = setting(0.1, "step of that search; 0 is none", ge=0)
    lowest: float = setting(0.0, "lower bound of the search", ge=0)
    highest: float = setting(0.9, "upper bound of the search", ge=0, le=0.99)
    warmup: int = setting(3, "first steps that are always full. TaylorSeer: 3 (FLUX)", ge=1)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="femo",
        title="FeMO",
        arxiv=None,
        site="parts",
        gate="fixed interval",
        predictor="momentum of differences",
        tokens=None,
        fidelity="reconstructed",
        off={"interval": 1},
        family="forecasting",
        when="TaylorSeer fits, but single differences are noisy",
        ladder=({"interval": 2}, {"interval": 6, "warmup": 10}, {"interval": 7}),
        citation="FeMO: Feature Momentum, submission 13027 to ICLR 2026",
        published={
            "order 1": {"interval": 10, "order": 1},
            "order 2": {"interval": 3, "order": 2},
        },
    )

    def compose(self) -> Composition:
        """Parts x fixed interval after a warm-up x momentum."""
        first = self.warmup - 1
        if self.adapted:
            predictor = AdaptedMomentum(
                self.order, self.beta, self.history, first, self.gamma, self.lowest, self.highest
            )
        else:
            predictor = Momentum(self.order, self.beta, self.history, first)
        gate = FixedInterval(self.interval, anchor="warmup", warmup=self.warmup)
        return Composition(site=Parts(), gate=gate, predictor=predictor)
