"""Delta-DiT: rear blocks rest while outlines form, front blocks while details do.

Source: arXiv:2406.01125; no released code was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.gates import FixedInterval
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import SwitchingSpan


@dataclass(frozen=True)
class DeltaDiT(Method):
    """Between full steps the residual of a range of blocks is reused: the rear early in the run, the front late.

    For a range ``[p, q)`` of the L blocks: ``D = x_q - x_p`` at the last full step; a cached step runs the blocks
    before ``p``, adds ``D``, and runs those from ``q`` on. Unlike a reused output, ``D`` lets the current latent
    through. Front blocks draw the outline and rear blocks the detail, so the rear ``round(share * L)`` blocks are
    cached before the step ``switch * num_steps`` and the front ones after it. Full every ``interval`` steps, and at the
    first step after the switch, whose residual is not known before.

    Cost: one residual per stream. A cached step runs ``1 - share`` of the blocks.
    Differences from the paper: its index details are reconstructed from its text; the block count is a share of the
    depth, the switch a share of the steps.
    """

    interval: int = setting(2, "distance of two full steps; 1 never caches. Paper: 2", ge=1)
    share: float = setting(0.75, "share of the blocks that is cached. Paper: 21 of 28, by its speed-up", ge=0, le=1)
    switch: float = setting(0.6, "where the front takes over, fraction of the steps. Paper: 12 of 20", ge=0, le=1)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="delta-dit",
        title="Delta-DiT",
        arxiv="2406.01125",
        site="switching span",
        gate="fixed interval",
        predictor="reuse of the residual",
        tokens=None,
        fidelity="reconstructed",
        off={"interval": 1},
        family="reuse of blocks and parts",
        when="memory is for one tensor, some blocks should see every step, and a moderate saving is enough",
        ladder=({"share": 0.5}, {}, {"interval": 3, "share": 1.0}),
        citation="Chen et al., Delta-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers, "
        "2024",
        published={
            "PixArt-alpha, 20 steps, 1.6x": {"interval": 2, "share": 0.75, "switch": 0.6},
        },
    )

    def compose(self) -> Composition:
        """Rear then front blocks x fixed interval x reuse."""
        return Composition(
            site=SwitchingSpan(self.share, self.switch), gate=FixedInterval(self.interval), predictor=Reuse()
        )
