"""DeepCache: reuse what is deep in a U-Net, recompute what is shallow.

Source: arXiv:2312.00858 (CVPR 2024); released code horseee/DeepCache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import FixedInterval
from cache4diffusion.gates.quadratic import Quadratic
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import UNetLevel


@dataclass(frozen=True)
class DeepCache(Method):
    """On cached steps only the levels shallower than one up-layer run, fed by the cached feature that enters it.

    The level is counted from the output: ``block=0, layer=0`` keeps ``conv_in``, the last up-layer and the output;
    larger numbers keep more. The plug-in's ``cache_branch_id`` is ``3 block + layer``. The demo and the experiments
    leave ``conv_in`` out of the count: DDPM's ``branch`` is ``3 block + layer - 1``, and so is the demo's
    ``3 cache_layer_id + cache_block_id`` (its two words are the other way round). With ``schedule="quadratic"`` full
    steps are denser around the step ``center`` (see `Quadratic`).

    Cost: one feature map. What the host adds to skip connections (ControlNet) is added on cached steps as well.
    Differences from the code: fresh ControlNet residuals reach the shallow levels on cached steps; steps are counted
    by the run, not by looking the timestep up; nothing survives from one run to the next. The default is the demo's
    interval in the plug-in's uniform schedule and at its level (the demo's schedule is quadratic, its level one layer
    deeper; the plug-in's own interval is 1, off).
    """

    interval: int = setting(5, "distance of two full steps; 1 never caches. Code: 5 (demo), 3 (plug-in example)", ge=1)
    block: int = setting(0, "up-block at which the deep part is cut off, from the output. Code: 0, 1 (DDPM)", ge=0)
    layer: int = setting(0, "layer of that block, from its end. Code: 0 (plug-in), 1 (demo)", ge=0)
    schedule: Literal["uniform", "quadratic"] = setting(
        "uniform", "how full steps are spread. Code: quadratic (demo), uniform"
    )
    center: float = setting(15.0, "step around which a quadratic schedule is densest. Code: 15 (demo)", ge=0)
    power: float = setting(1.4, "how strongly it gathers there. Code: 1.4 (demo)", gt=1)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="deepcache",
        title="DeepCache",
        arxiv="2312.00858",
        site="unet level",
        gate="fixed interval",
        predictor="reuse",
        tokens=None,
        fidelity="code",
        off={"interval": 1},
        family="U-Net",
        when="the denoiser is a U-Net (Stable Diffusion 1.5, SDXL, SVD)",
        ladder=({"interval": 2}, {"interval": 3}, {"interval": 6}),
        citation="Ma et al., DeepCache: Accelerating Diffusion Models for Free, CVPR 2024",
        published={
            "Stable Diffusion, demo": {
                "interval": 5,
                "block": 0,
                "layer": 1,
                "schedule": "quadratic",
                "center": 15,
                "power": 1.4,
            },
            "Stable Diffusion, plug-in example": {"interval": 3, "block": 0, "layer": 0},
            "DDPM, 100 steps": {"interval": 5, "block": 1, "layer": 0},
        },
    )

    def compose(self) -> Composition:
        """U-Net level x fixed interval (or quadratic) x reuse."""
        if self.schedule == "quadratic" and self.interval > 1:
            gate = Quadratic(self.interval, self.center, self.power)
        else:
            gate = FixedInterval(self.interval)
        return Composition(site=UNetLevel(self.block, self.layer), gate=gate, predictor=Reuse())
