"""AB-Cache: the denoiser's next output as a fixed linear combination of the previous ones.

Source: arXiv:2504.10540; code aSleepyTree/AB-Cache (FLUX), known through a re-implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import FixedInterval
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import AdamsBashforth
from cache4diffusion.settings import setting
from cache4diffusion.sites import Denoiser


@dataclass(frozen=True)
class ABCache(Method):
    """``warmup`` full steps, then those whose index is a multiple of ``interval``; nothing runs on the others.

    ``interval=6, warmup=5`` over 50 steps is full at 0 to 4, 6, 12, 18, ..., 48. See `AdamsBashforth` for the formula
    and for what the queue means.

    The paper acts on the output after guidance. Guidance is linear in its branches, and so is the combination: acting
    on every branch's output is the same (but for guidance rescaling), works with any solver, and costs one queue per
    branch.

    Cost: ``order`` copies of the output per branch; a cached step is one weighted sum.
    Differences from the code: the schedule does not end at step 49; which of the queues it uses could not be verified:
    its re-implementation has ``queue="full"``, the argument of the paper holds for ``"all"``.
    """

    interval: int = setting(6, "full at multiples of this step; 1 never caches. Code: 6", ge=1)
    order: int = setting(2, "previous outputs combined; 1 is plain reuse. Code: 2", ge=1, le=5)
    queue: Literal["all", "full", "newton"] = setting(
        "all", "'all': predictions too, unit steps; 'full': full steps as if one apart; 'newton': their true distances"
    )
    warmup: int = setting(5, "first steps that are always full. Code: 5", ge=1)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="ab-cache",
        title="AB-Cache",
        arxiv="2504.10540",
        site="denoiser",
        gate="fixed interval",
        predictor="Adams-Bashforth",
        tokens=None,
        fidelity="paper",
        off={"interval": 1},
        family="forecasting",
        when="whole steps should be skipped on any denoiser and solver, and a moderate speed-up is enough",
        ladder=({"interval": 2}, {"interval": 6, "warmup": 10}, {"interval": 7}),
        citation="Yu et al., AB-Cache: Training-Free Acceleration of Diffusion Models via Adams-Bashforth Cached "
        "Feature Reuse, 2025",
        published={
            "FLUX.1-dev, 50 steps": {"interval": 6, "order": 2, "warmup": 5},
        },
    )

    def compose(self) -> Composition:
        """Whole denoiser x multiples of the interval after a warm-up x Adams-Bashforth."""
        return Composition(
            site=Denoiser(),
            gate=FixedInterval(self.interval, anchor="first", warmup=self.warmup),
            predictor=AdamsBashforth(self.order, self.queue),
        )
