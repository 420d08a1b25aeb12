"""Z-Cache: look ahead with predictions, compute there, and predict the steps in between from both sides.

Source: submission 4826 to ICLR 2026 (OpenReview 2VWQKehe0D), after its switch in the code of FreqCa (Tammytcl/FreqCa).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import LookAhead
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import TwoSided
from cache4diffusion.settings import setting
from cache4diffusion.sites import Trajectory


@dataclass(frozen=True)
class ZCache(Method):
    """A cycle of ``interval`` steps has one full step, taken ``ahead - 1`` steps on at a latent reached by prediction.

    The steps of the cycle then lie between two anchors; see `TwoSided` for the blend and `LookAhead` for the schedule.
    Nothing is rewound: at the cycle's first step the denoiser is called with the latent and timestep of the step ahead,
    and the scheduler is given the value for the step at hand. So guidance of any kind works, and the loop's callbacks
    see every step once.

    Cost: ``order + 2`` copies of the velocity and one latent per run; a cached step runs nothing.
    Differences from the code: it predicts the hidden feature before the final norm, we the output after guidance; it
    walks the look ahead through the sampler, we by the same Euler steps on a copy; at the first cycle's first step it
    takes the Hermite value at distance 0, we what was computed there. Only ``FlowMatchEulerDiscreteScheduler``.
    """

    interval: int = setting(6, "steps of a cycle; 1 never caches", ge=1)
    ahead: int = setting(6, "how far a cycle looks, its first step included; interval or more", ge=1)
    order: int = setting(2, "of both extrapolations; 0 is reuse. Code: 2", ge=0, le=8)
    basis: Literal["hermite", "taylor"] = setting("hermite", "of both extrapolations. Code: hermite")
    sigma: float = setting(0.71, "contraction of the Hermite polynomials. Code: 0.71", gt=0)
    warmup: int = setting(3, "first steps that are always full, one more follows. Code: 3", ge=1)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="z-cache",
        title="Z-Cache",
        arxiv=None,
        site="trajectory",
        gate="look-ahead cycles",
        predictor="two-sided",
        tokens=None,
        fidelity="code",
        off={"interval": 1},
        family="trajectory",
        when="a flow-matching run has many steps, and interpolating beats extrapolating",
        ladder=({"interval": 2, "ahead": 2}, {"warmup": 10}, {"interval": 8, "ahead": 8}),
        citation="Z-Cache, submission 4826 to ICLR 2026",
        published={
            "FreqCa's code": {"order": 2, "sigma": 0.71, "basis": "hermite", "warmup": 3},
        },
    )

    def compose(self) -> Composition:
        """Trajectory x look-ahead cycles x two-sided extrapolation."""
        predictor = TwoSided(self.order, self.basis, self.sigma, self.interval, self.ahead, self.warmup - 1)
        return Composition(
            site=Trajectory(solvers=("FlowMatchEulerDiscreteScheduler",)),
            gate=LookAhead(self.warmup, self.interval, self.ahead),
            predictor=predictor,
            branches="tied",
        )
