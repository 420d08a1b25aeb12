"""EasyCache: what the denoiser did to the latent so far tells when its output must be computed again.

Source: arXiv:2507.02860; released code H-EmbodVis/EasyCache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import AccumulatedChange, Drift, ForceLast, Guard, Warmup
from cache4diffusion.method import Composition, Dial, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Denoiser


@dataclass(frozen=True)
class EasyCache(Method):
    """Sum up the change that the output should have made; cached while the sum stays below ``threshold``.

    ``k = mean|y_f - y_f'| / mean|x_f - x_f'|`` over the last two full steps ``f, f'`` (``x`` the latent that goes in,
    ``y`` the output); a step adds ``k * mean|x_i - x_(i-1)| / mean|y_f|``. A cached step returns ``x_i + (y_f - x_f)``
    and runs nothing at all. The first ``warmup`` steps and the last one are full, and so is the first step at which
    ``k`` is not known yet. Only the denoiser's input and output are looked at, so it works on any denoiser whose output
    has the latent's shape.

    Cost: four tensors of the latent's size per CFG branch. One host sync per step that is not forced.
    Differences from the code: means are taken in float32; with ``branches="independent"`` CFG branches decide apart.
    """

    threshold: float = setting(0.05, "accumulated change at which a step is full; 0 is off. Code: 0.05 (Wan)", ge=0)
    warmup: int = setting(10, "first steps that are full. Code: 10 (Wan), 5 (HunyuanVideo), of 50", ge=1)
    cooldown: int = setting(1, "last steps that are always full; 0 needs no step count. Code: 1", ge=0)
    decide: Literal["batch", "any", "row"] = setting("batch", "one decision, full if any row needs it, or per row")
    branches: Literal["independent", "tied"] = setting("tied", "whether CFG branches follow the first one. Code: tied")

    info: ClassVar[MethodInfo] = MethodInfo(
        name="easycache",
        title="EasyCache",
        arxiv="2507.02860",
        site="denoiser",
        gate="accumulated drift",
        predictor="reuse of output minus input",
        tokens=None,
        fidelity="code",
        off={"threshold": 0.0},
        family="adaptive gates",
        when="any denoiser should be cached adaptively, without calibration and without looking inside it",
        dial=Dial("threshold", 0.02, 1.0),
        ladder=({"threshold": 0.02}, {"threshold": 0.05}, {"threshold": 0.2, "warmup": 5}),
        citation="Zhou et al., Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive "
        "Caching, 2025",
        published={
            "Wan 2.1, 50 steps": {"threshold": 0.05, "warmup": 10},
            "HunyuanVideo, 50 steps": {"threshold": 0.025, "warmup": 5},
        },
    )

    def compose(self) -> Composition:
        """Whole denoiser (residual) x accumulated drift x reuse."""
        guards: tuple[Guard, ...] = (Warmup(self.warmup),)
        if self.cooldown:
            guards += (ForceLast(self.cooldown),)
        return Composition(
            site=Denoiser(form="residual"),
            gate=AccumulatedChange(self.threshold, of=Drift()),
            predictor=Reuse(),
            guards=guards,
            decide=self.decide,
            branches=self.branches,
        )
