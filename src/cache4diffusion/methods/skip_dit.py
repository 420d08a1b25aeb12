"""Skip-DiT: DeepCache for transformers with long skip connections.

Source: arXiv:2411.17616 (ICCV 2025); released code OpenSparseLLMs/Skip-DiT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.gates import FixedInterval, Window
from cache4diffusion.method import TRAINED, Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Span


@dataclass(frozen=True)
class SkipDiT(Method):
    """On cached steps the first and last ``keep`` blocks run, and the feature that leaves the middle is the last one's.

    Block ``l`` hands its output over to block ``L - 1 - l`` by a skip connection: what the first blocks make of the
    current latent reaches the last ones although the middle is cached. Made for denoisers that were trained with such
    connections (HunYuan-DiT has them); on others it is a plain reuse of the middle's output, which degrades. Full every
    ``interval`` steps; nothing is cached up to the fraction ``start`` of the run, nor from ``stop`` on.

    Cost: one tensor per stream. A cached step runs ``2 * keep`` blocks.
    Differences from the code: the window is a fraction of the run, which is the same for evenly spaced timesteps
    (``start = 1 - t_high / 1000``, ``stop = 1 - t_low / 1000``).
    """

    interval: int = setting(2, "distance of two full steps; 1 never caches. Code: 2", ge=1)
    keep: int = setting(1, "blocks at either end that always run. Code: 1 (Latte, HunYuan), 4 (DiT)", ge=0)
    start: float = setting(0.3, "up to here everything is full, fraction of the steps. Code: 0.3 (t 700)", ge=0, le=1)
    stop: float = setting(0.95, "from here on everything is full, likewise. Code: 0.95 (t 50)", ge=0, le=1)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="skip-dit",
        title="Skip-DiT",
        arxiv="2411.17616",
        site="span",
        gate="fixed interval",
        predictor="reuse",
        tokens=None,
        fidelity="code",
        off={"interval": 1},
        family="reuse of blocks and parts",
        when="the denoiser has long skip connections (HunYuan-DiT, Skip-DiT weights); not otherwise",
        ladder=({}, {"interval": 3, "start": 0.1, "stop": 1.0}, {"interval": 6, "start": 0.1, "stop": 1.0}),
        needs=TRAINED,
        citation="Chen et al., Accelerating Vision Diffusion Transformers with Skip Branches, ICCV 2025",
        published={
            "HunYuan-DiT": {"interval": 2, "keep": 1, "start": 0.3, "stop": 0.95},
            "Latte, class": {"interval": 2, "keep": 1, "start": 0.1, "stop": 0.95},
            "DiT-XL/2": {"interval": 2, "keep": 4, "start": 0.0, "stop": 0.98},
        },
    )

    def compose(self) -> Composition:
        """Output of the middle x fixed interval in a window x reuse."""
        return Composition(
            site=Span(self.keep, self.keep, form="output"),
            gate=FixedInterval(self.interval),
            predictor=Reuse(),
            guards=(Window(self.start, self.stop, is_start_full=True),),
        )
