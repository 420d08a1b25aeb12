"""Learning-to-Cache: on every second step, the parts that a trained router gives up are those of the step before.

Source: arXiv:2406.01733 (NeurIPS 2024); released code horseee/learning-to-cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.calibration import Entry, Given
from cache4diffusion.calibration.routers import PairedRouters
from cache4diffusion.gates import Timetable, routed_steps
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts


@dataclass(frozen=True)
class L2C(Method):
    """A trained table says which parts are computed at steps 1, 3, 5 ...; all are at steps 0, 2, 4 ...

    ``c4d calibrate`` trains a logit ``w`` per part and odd step on your denoiser, which stays as it is: with ``p =
    sigmoid(w)``, a part's output in the second step of a pair is ``p f(x) + (1 - p) F``, where ``F`` is that of the
    first; the loss is the change this makes to the denoiser's output, plus a price for every ``p``. While sampling, a
    part is computed iff ``p > threshold``, else ``F`` is reused; gates, shifts and scales are today's. Nothing is ever
    reused for longer than one step, so less than half of the work can be saved.

    A table that gives up everything is ``FcFcFc``. It is for the steps, scheduler and guidance it was trained with; a
    run of others needs ``resample=True``, which the paper does not have.

    Cost: 1 copy of every part's output; a cached part does not run. No host sync.
    Differences from the code: the pairs lie on your denoiser's own trajectories, with your guidance, in place of noised
    training images; every part has a logit, where DiT has attention and MLP; ``p`` stays soft (the code can round it).
    """

    threshold: float = setting(
        0.1, "computed iff p is larger; 0 is off, 1 computes nothing. Code: 0.1 (DiT), 0.9 (U-ViT)", ge=0, le=1
    )
    calibration: Given = setting(None, "routers of your denoiser: a file of c4d calibrate, or what it returned")
    resample: bool = setting(False, "accept other steps or noise levels, by the nearest calibrated ones")

    calibrator = PairedRouters
    info: ClassVar[MethodInfo] = MethodInfo(
        name="l2c",
        title="Learning-to-Cache",
        arxiv="2406.01733",
        site="parts",
        gate="trained schedule per part",
        predictor="reuse",
        tokens=None,
        fidelity="code",
        off={"threshold": 0.0},
        family="learned routers",
        when="little error matters more than speed, and routers may be trained on your denoiser for some minutes",
        ladder=({"threshold": 0.1}, {"threshold": 0.5}, {"threshold": 0.9}),
        citation="Ma et al., Learning-to-Cache: Accelerating Diffusion Transformer via Layer Caching, NeurIPS 2024",
        needs_calibration=True,
        published={
            "DiT-XL/2-256": {"threshold": 0.1},
            "DiT-XL/2-512 and U-ViT-H/2": {"threshold": 0.9},
        },
    )

    def compose(self) -> Composition:
        """Parts x trained schedule per part x reuse."""
        return routed(self.measured, self.threshold, resample=self.resample)


def routed(entry: Entry, threshold: float, *, resample: bool) -> Composition:
    """Parts that follow a trained table.

    Args:
        entry: probabilities by step, for every part.
        threshold: computed iff they are larger.
        resample: whether runs of other steps or noise levels are accepted.
    """
    tables = {path: routed_steps(table.tolist(), threshold) for path, table in entry.fit.items()}
    num_steps = len(next(iter(entry.fit.values())))
    return Composition(
        site=Parts(decisions="part"),
        gate=Timetable(tables, num_steps, entry.levels, resample=resample),
        predictor=Reuse(),
    )
