"""LazyDiT: each part looks at its modulated input, and a trained score says whether its old output will do.

Source: arXiv:2412.12444 (AAAI 2025); released code shawnricecake/lazydit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.calibration import Given
from cache4diffusion.calibration.lazy_gates import LazyGates
from cache4diffusion.gates import LearnedScore
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import GatedParts


@dataclass(frozen=True)
class LazyDiT(Method):
    """A part is computed iff ``sigmoid(sum over tokens of z @ w) >= threshold``, for every sample of the batch.

    ``z`` is the part's normalised and modulated input of this step; ``w``, one weight per channel for each part and
    step, is trained by ``c4d calibrate`` on your denoiser, which stays as it is: to change its output little, and to
    compute little. Where a part is not computed, its last output is reused, of any age; gates, shifts and scales are
    today's. The first step is full, and with the published training every second one is: its weights are 0 and the
    score 0.5.

    With ``threshold=2`` nothing is computed after the first step: ``Fccccc``. The weights are for the steps, scheduler
    and size they were trained with (the sum over tokens grows with their number); other steps need ``resample=True``,
    which the paper does not have.

    Cost: 1 copy of every part's output, and the weights. One host sync per part and step. A cached part does not run,
    but the norm in front of it does. Where rows differ, a part runs on some of them.
    Differences from the code: one price for all parts; pairs of steps lie on your denoiser's own trajectories; all
    weights of a part with two streams make one score; a fused part has one score for attention and MLP, as it has one
    projection. As there, the halves of batched guidance decide freely.
    """

    threshold: float = setting(0.5, "computed where the score is as large; 0 is off. Code: 0.5", ge=0)
    decide: Literal["batch", "any", "row"] = setting(
        "row", "who decides: each sample, any of them for all, or their mean"
    )
    calibration: Given = setting(None, "weights of your denoiser: a file of c4d calibrate, or what it returned")
    resample: bool = setting(False, "accept other steps or noise levels, by the nearest calibrated ones")

    calibrator = LazyGates
    info: ClassVar[MethodInfo] = MethodInfo(
        name="lazydit",
        title="LazyDiT",
        arxiv="2412.12444",
        site="parts that decide for themselves",
        gate="trained score of the part's input",
        predictor="reuse",
        tokens=None,
        fidelity="code",
        off={"threshold": 0.0},
        family="learned routers",
        when="images of a batch differ, and each part may learn on your denoiser when to compute",
        citation="Shen et al., LazyDiT: Lazy Learning for the Acceleration of Diffusion Transformers, AAAI 2025",
        needs_calibration=True,
        published={"DiT-XL/2, 50 steps": {"threshold": 0.5}},
    )

    def compose(self) -> Composition:
        """Gated parts x trained score x reuse."""
        entry = self.measured
        num_steps = len(next(iter(entry.fit.values())))
        return Composition(
            site=GatedParts(),
            gate=LearnedScore(self.threshold, entry.fit, num_steps, entry.levels, self.resample),
            predictor=Reuse(),
            decide=self.decide,
        )
