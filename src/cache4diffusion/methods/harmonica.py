"""HarmoniCa: Learning-to-Cache, trained as it samples: over whole runs, with caches of any age.

Source: arXiv:2410.01723 (ICML 2025); released code ModelTC/HarmoniCa.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.calibration import Given
from cache4diffusion.calibration.routers import TrajectoryRouters
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.methods.l2c import routed
from cache4diffusion.settings import setting


@dataclass(frozen=True)
class HarmoniCa(Method):
    """A trained table says which parts are computed at every step but the first; a reused output may be of any age.

    ``c4d calibrate`` trains a logit ``w`` per part and step on your denoiser, which stays as it is, in whole sampling
    runs of the student, whose part outputs are ``p f(x) + (1 - p) F`` with ``p = sigmoid(w)``. A step's loss is
    ``lambda_s * mean|teacher - student|^2 + price * sum(p)``, at the student's latent; ``lambda_s`` is what the routers
    of the step change of the final image. While sampling, a part is computed iff ``p > threshold``, and its cache is
    refreshed only then.

    A table that gives up everything is ``Fccccc``; one that alternates is that of `L2C`. It is for the steps, scheduler
    and guidance it was trained with; a run of others needs ``resample=True``, which the paper does not have.

    Cost: 1 copy of every part's output; a cached part does not run. No host sync.
    Differences from the code: every part has a logit, where DiT has attention and MLP; your prompts in place of random
    classes. As there, training keeps the mixed outputs and sampling the computed ones.
    """

    threshold: float = setting(
        0.1, "computed iff p is larger; 0 is off, 1 computes only the first step. Code: 0.1", ge=0, le=1
    )
    calibration: Given = setting(None, "routers of your denoiser: a file of c4d calibrate, or what it returned")
    resample: bool = setting(False, "accept other steps or noise levels, by the nearest calibrated ones")

    calibrator = TrajectoryRouters
    info: ClassVar[MethodInfo] = MethodInfo(
        name="harmonica",
        title="HarmoniCa",
        arxiv="2410.01723",
        site="parts",
        gate="trained schedule per part",
        predictor="reuse",
        tokens=None,
        fidelity="code",
        off={"threshold": 0.0},
        family="learned routers",
        when="steps are few, and a schedule for every part may be trained on whole runs of your denoiser",
        ladder=({"threshold": 0.02}, {"threshold": 0.1}, {"threshold": 0.5}),
        citation="Huang et al., HarmoniCa: Harmonizing Training and Inference for Better Feature Caching, ICML 2025",
        needs_calibration=True,
        published={"DiT-XL/2-256, 10 steps": {"threshold": 0.1}},
    )

    def compose(self) -> Composition:
        """Parts x trained schedule per part x reuse."""
        return routed(self.measured, self.threshold, resample=self.resample)
