"""FORA: reuse the attention and MLP outputs of every block between full steps at a fixed interval.

Source: arXiv:2407.01425; released code prathebaselva/FORA (DiT).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import FixedInterval
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts


@dataclass(frozen=True)
class Fora(Method):
    """Every ``interval``-th step is full; between them each part returns what it returned then, before its gate.

    adaLN gates, shifts and scales are those of the current timestep. ``interval=3`` over 9 steps is ``FccFccFcc``;
    with ``anchor="last"``, which counts back from the last step as the released code does, ``FcFccFccF``.

    Cost: one copy of every part's output (``2 L`` tensors ``[B, N, D]`` for a DiT of L blocks). A cached step runs
    embedders, modulation and the final layer.
    Differences from the code: it numbers steps downwards (``anchor="last"``); the default counts up from 0, as most
    re-implementations and the published FLUX tables do, and needs no step count. It knows attention and MLP only, of
    DiT; here every part is cached, cross-attention as well. It has no warm-up.
    """

    interval: int = setting(3, "distance of two full steps; 1 never caches. Code: 3 (DiT, 250 steps)", ge=1)
    anchor: Literal["first", "last"] = setting("first", "where the count begins; 'last' is the released code's")
    warmup: int = setting(0, "first steps that are always full. Code: 0", ge=0)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="fora",
        title="FORA",
        arxiv="2407.01425",
        site="parts",
        gate="fixed interval",
        predictor="reuse",
        tokens=None,
        fidelity="code",
        off={"interval": 1},
        family="reuse of blocks and parts",
        when="a plain baseline is needed: reuse of every part at a fixed interval",
        ladder=({"interval": 2}, {"interval": 6, "warmup": 10}, {"interval": 6}),
        citation="Selvaraju et al., FORA: Fast-Forward Caching in Diffusion Transformer Acceleration, 2024",
        published={
            "DiT-XL/2, 250 steps": {"interval": 3, "anchor": "last"},
            "FLUX.1-dev, 50 steps, by others": {"interval": 3, "anchor": "first"},
        },
    )

    def compose(self) -> Composition:
        """Parts x fixed interval x reuse."""
        return Composition(
            site=Parts(), gate=FixedInterval(self.interval, anchor=self.anchor, warmup=self.warmup), predictor=Reuse()
        )
