"""ToCa: token-wise caching. Between full steps the tokens that matter most are computed, the others reused.

Source: arXiv:2410.05317 (ICLR 2025); released code Shenyi-Z/ToCa.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from cache4diffusion.gates import FixedInterval, Gate, Guard, ModulatedInterval, Warmup
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts
from cache4diffusion.tokens import TopScore

FullSteps = Literal["flux", "open-sora", "dit", "pixart"]


def _published(
    schedule: str, full_steps: str, interval: int, ratio: float, *, warmup: int = 1, **scores: float
) -> dict[str, Any]:
    """Settings of a released script other than FLUX's, whose are the defaults."""
    return {
        "interval": interval,
        "recompute_ratio": ratio,
        "schedule": schedule,
        "full_steps": full_steps,
        "warmup": warmup,
        **scores,
    }


def gate_of(
    full_steps: FullSteps, interval: int, warmup: int, *, is_modulated: bool = True
) -> tuple[Gate, tuple[Guard, ...]]:
    """The gate of a released script, and its guards.

    Args:
        full_steps: whose script.
        interval: distance of two full steps, on average where it is modulated.
        warmup: first steps that are always full.
        is_modulated: whether the DiT and PixArt scripts vary the interval; else it is fixed there, too.
    """
    if full_steps == "flux":
        return FixedInterval(interval, "warmup", warmup), ()
    if full_steps == "open-sora":
        return FixedInterval(interval, "first", warmup), ()
    if not is_modulated:
        return FixedInterval(interval, "last" if full_steps == "dit" else "first", warmup), ()
    guards = (Warmup(warmup),) if interval > 1 else ()  # 1 never caches, however short the run
    return ModulatedInterval(interval, full_steps), guards


@dataclass(frozen=True)
class ToCa(Method):
    """A full step in ``interval``; between them MLPs (and cross-attention) run on a fraction of the tokens.

    Which tokens: those with the highest sum of four scores, self-attention, cross-attention, age and spread over the
    image; see `TopScore` for the scores and for how the fraction varies. Self-attention outputs are reused as a whole
    (computing a subset is worse, by the maintainers' account). In FLUX's single-stream blocks the un-projected
    attention output is kept, so that the fused projection can run on single tokens.

    Which steps are full (``full_steps``): ``"flux"``, the first ``warmup`` and then one in ``interval``;
    ``"open-sora"``, the first ``warmup`` and the multiples of ``interval``; ``"dit"`` and ``"pixart"``, the first and
    those of `ModulatedInterval` (of a fixed interval with ``recompute_ratio=0``, where ToCa is FORA).

    Both halves of batched guidance compute the same tokens. Branches that are called one after the other choose for
    themselves, or with ``branches="tied"`` all take the selection of the first.

    Cost: every part's output, the un-projected attention of fused blocks, and two to four numbers per token and part.
    On full steps the attention maps are computed a second time for the score (``score="value_norm"`` and ``"random"``
    need none).
    Differences from the code: text tokens are selected among themselves in every block (the FLUX code lets them compete
    with image tokens in single-stream blocks); the gate is asked once per step (DiT and PixArt ask in every block). Of
    two halves of guidance the mean map ranks the tokens, as in the PixArt code; the DiT code lets each half choose.
    Open-Sora's cross-attention has its own, doubled interval; here it has the others', and none of it is computed
    between full steps.
    """

    interval: int = setting(4, "distance of two full steps; 1 never caches. Code: 4 (FLUX), 3 (others)", ge=1)
    recompute_ratio: float = setting(
        0.1,
        "fraction of the tokens that is computed. Code: 0.1 (FLUX, Open-Sora), 0.07 (DiT), 0.3 (PixArt)",
        ge=0,
        le=1,
    )
    age_weight: float = setting(0.25, "weight of the time since a token was computed. Code: 0.25", ge=0)
    schedule: Literal["flux", "dit", "dit-ddpm", "pixart", "open-sora", "constant"] = setting(
        "flux", "how the ratio varies over steps, layers and parts"
    )
    score: Literal["attention", "value_norm", "random"] = setting(
        "attention", "what ranks the tokens besides text, age and place. Code: attention"
    )
    warmup: int = setting(3, "first steps that are always full. Code: 3 (FLUX, Open-Sora), 1 (DiT, PixArt)", ge=1)
    cross_weight: float = setting(
        0.0, "share of the cross-attention's entropy in the ranking. Code: 0 (FLUX, DiT), 1 (PixArt)", ge=0, le=1
    )
    bonus: float = setting(
        0.0, "raises the best token of each neighbourhood. Code: 0 (FLUX, Open-Sora), 0.6 (DiT), 0.4 (PixArt)", ge=0
    )
    window: int = setting(2, "side of a neighbourhood in tokens. Code: 2 (DiT), 4 (PixArt)", ge=1)
    full_steps: FullSteps = setting("flux", "which steps are full")
    branches: Literal["independent", "tied"] = setting("independent", "whether CFG branches follow the first one")

    info: ClassVar[MethodInfo] = MethodInfo(
        name="toca",
        title="ToCa",
        arxiv="2410.05317",
        site="parts",
        gate="fixed interval",
        predictor="reuse",
        tokens="top score",
        fidelity="code",
        off={"interval": 1},
        family="tokens",
        when="there are many tokens, and those the image looks at most should be fresh on every step",
        ladder=({"interval": 2}, {}, {"interval": 7}),
        citation="Zou et al., Accelerating Diffusion Transformers with Token-wise Feature Caching, ICLR 2025",
        published={
            "FLUX.1-dev (intervals 4 to 6)": {"interval": 4, "recompute_ratio": 0.1, "schedule": "flux", "warmup": 3},
            "DiT-XL/2, 50 DDIM steps": _published("dit", "dit", 3, 0.07, bonus=0.6, window=2),
            "DiT-XL/2, 250 DDPM steps": _published("dit-ddpm", "dit", 4, 0.07, bonus=0.6, window=2),
            "PixArt-alpha, 20 steps": _published("pixart", "pixart", 3, 0.3, bonus=0.4, window=4, cross_weight=1.0),
            "Open-Sora 1.2": _published("open-sora", "open-sora", 3, 0.1, warmup=3, cross_weight=1.0),
        },
    )

    def compose(self) -> Composition:
        """Parts x fixed or modulated interval x reuse x top score."""
        gate, guards = gate_of(self.full_steps, self.interval, self.warmup, is_modulated=self.recompute_ratio > 0)
        return Composition(
            site=Parts(),
            gate=gate,
            predictor=Reuse(),
            guards=guards,
            tokens=TopScore(
                recompute_ratio=self.recompute_ratio,
                age_weight=self.age_weight,
                interval=self.interval,
                schedule=self.schedule,
                score=self.score,
                cross_weight=self.cross_weight,
                bonus=self.bonus,
                window=self.window,
            ),
            branches=self.branches,
        )
