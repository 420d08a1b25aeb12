"""DuCa: between full steps, those of ToCa take turns with steps that skip every block.

Source: arXiv:2412.18911; released code Shenyi-Z/DuCa.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.methods.toca import gate_of
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import PartsAndStream
from cache4diffusion.tokens import TopScore


@dataclass(frozen=True)
class DuCa(Method):
    """A full step in ``interval``; between them *conservative* and *aggressive* steps in turns.

    A conservative step is ToCa's: attention is reused, MLPs (and cross-attention) run on a fraction of the tokens. On
    an aggressive step no block runs, and the final layer, under today's timestep, is given what left the last block at
    the step before, whether that was full or conservative. ``order="since"``: odd distances since the full step are
    conservative, as in the PixArt and Open-Sora code; ``"until"``: odd distances to the next full step are, as in the
    DiT code, which counts down. Strips, ``p`` conservative and ``c`` aggressive: ``interval=3`` is ``FpcFpc``
    (``"until"``: ``FcpFcp``), ``interval=5`` is ``FpcpcFpcpc``.

    Which tokens: drawn at random (as in the paper's second version, which finds importance no better), or those of
    the smallest value norms (``score="value_norm"``, the first version's, which needs no attention map), or ToCa's
    (``"attention"``); age counts in each. Both halves of batched guidance compute the same tokens.

    Cost: ToCa's memory, and one copy of the last block's output. An aggressive step costs the embedders and the final
    layer. No host sync.
    Differences from the code: the gate is asked once per step (DiT's in every block). In Open-Sora's, cross-attention
    has a period of its own and keeps the last state of spatial and temporal blocks apart; here both have one. The
    schedule of the paper's second version on FLUX could not be read: the defaults are
    ours.
    """

    interval: int = setting(4, "distance of two full steps; 1 never caches. Code: 3", ge=1)
    recompute_ratio: float = setting(
        0.1, "fraction computed on conservative steps. Code: 0.05 (DiT), 0.75 (PixArt), 0.1 (Open-Sora)", ge=0, le=1
    )
    score: Literal["random", "value_norm", "attention"] = setting(
        "random", "what ranks the tokens besides age. Code: attention (DiT, PixArt), value_norm (Open-Sora)"
    )
    seed: int = setting(0, "of the random score", ge=0)
    age_weight: float = setting(0.25, "weight of the time since a token was computed. Code: 0.25", ge=0)
    schedule: Literal["flux", "dit", "dit-ddpm", "pixart", "open-sora", "constant"] = setting(
        "constant", "how the ratio varies over steps, layers and parts, as in ToCa"
    )
    warmup: int = setting(3, "first steps that are always full. Code: 3 (Open-Sora), 1 (others)", ge=1)
    cross_weight: float = setting(
        0.0, "share of the cross-attention's entropy in the ranking. Code: 1 (PixArt)", ge=0, le=1
    )
    bonus: float = setting(0.0, "raises the best token of each neighbourhood. Code: 0.8 (DiT), 0.4 (PixArt)", ge=0)
    window: int = setting(2, "side of a neighbourhood in tokens. Code: 2 (DiT), 4 (PixArt)", ge=1)
    full_steps: Literal["flux", "open-sora", "dit"] = setting("flux", "which steps are full, as in ToCa")
    order: Literal["since", "until"] = setting("since", "from where conservative and aggressive steps are counted")
    branches: Literal["independent", "tied"] = setting("independent", "whether CFG branches follow the first one")

    info: ClassVar[MethodInfo] = MethodInfo(
        name="duca",
        title="DuCa",
        arxiv="2412.18911",
        site="parts and last stream",
        gate="fixed interval",
        predictor="reuse",
        tokens="top score",
        fidelity="code",
        off={"interval": 1},
        family="tokens",
        when="ToCa serves you, and every second of its cached steps may skip all blocks",
        ladder=({"interval": 2}, {}, {"interval": 6}),
        citation="Zou et al., Accelerating Diffusion Transformers with Dual Feature Caching, arXiv 2412.18911",
        published={
            "DiT-XL/2, 50 DDIM steps": {
                "interval": 3,
                "recompute_ratio": 0.05,
                "score": "attention",
                "schedule": "dit",
                "full_steps": "dit",
                "warmup": 1,
                "bonus": 0.8,
                "window": 2,
                "order": "until",
            },
            "PixArt-alpha": {
                "interval": 3,
                "recompute_ratio": 0.75,
                "score": "attention",
                "cross_weight": 1.0,
                "schedule": "pixart",
                "full_steps": "open-sora",
                "warmup": 1,
                "bonus": 0.4,
                "window": 4,
            },
            "Open-Sora 1.2": {
                "interval": 3,
                "recompute_ratio": 0.1,
                "score": "value_norm",
                "schedule": "open-sora",
                "full_steps": "open-sora",
                "warmup": 3,
            },
        },
    )

    def compose(self) -> Composition:
        """Parts and last stream x fixed or modulated interval x reuse x top score."""
        gate, guards = gate_of(self.full_steps, self.interval, self.warmup, is_modulated=self.recompute_ratio > 0)
        return Composition(
            site=PartsAndStream(pattern="cj", counted=self.order),
            gate=gate,
            predictor=Reuse(),
            guards=guards,
            tokens=TopScore(
                recompute_ratio=self.recompute_ratio,
                age_weight=self.age_weight,
                interval=self.interval,
                schedule=self.schedule,
                score=self.score,
                seed=self.seed,
                cross_weight=self.cross_weight,
                bonus=self.bonus,
                window=self.window,
            ),
            branches=self.branches,
        )
