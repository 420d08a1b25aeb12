"""GOC: gradient-optimised cache. Reuse of parts, plus a fraction of how they changed last.

Source: arXiv:2503.05156 (ICCV 2025); released code qiujx0520/GOC_ICCV2025.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.gates import FixedInterval, Window
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Delta
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts


@dataclass(frozen=True)
class GOC(Method):
    """FORA in the first part of a run; a cached step adds ``eta`` times the last change of a part to what it reuses.

    The change is between the last two values *used*, predicted ones included; see `Delta`. With the defaults over 20
    steps it caches at 1, 3, 5, 7, 9, as published; the first of them is plain reuse. With a router instead of the
    interval the code has ``eta`` 0.8: ``predictor="delta(eta=0.8, steps=...)"``.

    Cost: 2 copies of every part's output.
    Differences from the code: its list of steps is made for 20; we scale the part of the run with caching
    (``start_full``) and add the change at every cached step that has one, which is the published list. The paper's
    choice of steps by inflection points is not included.
    """

    interval: int = setting(2, "distance of two full steps; 1 never caches. Code: 2", ge=1)
    eta: float = setting(1.2, "fraction of the last change that is added; 0 is FORA. Code: 1.2", ge=0)
    delta_steps: tuple[int, ...] | None = setting(
        None, "cached steps with the change; None is all. Code: (3, 5, 7, 9) of 20"
    )
    start_full: float = setting(0.5, "fraction of the run from which all steps are full; 1 for never", ge=0, le=1)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="goc",
        title="GOC",
        arxiv="2503.05156",
        site="parts",
        gate="fixed interval",
        predictor="reuse plus last change",
        tokens=None,
        fidelity="code",
        off={"interval": 1},
        family="forecasting",
        when="steps are few and intervals short, and FORA loses detail there",
        ladder=({}, {"interval": 3, "start_full": 0.75}, {"interval": 6, "start_full": 1.0}),
        citation="Qiu et al., Accelerating Diffusion Transformer via Gradient-Optimized Cache, ICCV 2025",
        published={
            "DiT-XL/2 on FORA, 20 steps": {"interval": 2, "eta": 1.2, "delta_steps": (3, 5, 7, 9), "start_full": 0.5},
        },
    )

    def compose(self) -> Composition:
        """Parts x fixed interval in the first part of the run x reuse plus last change."""
        return Composition(
            site=Parts(),
            gate=FixedInterval(self.interval),
            predictor=Delta(self.eta, self.delta_steps),
            guards=(Window(stop=self.start_full),),
        )
