"""DaTo: a U-Net is computed to a depth that a search chose for each step, and its attention without like tokens.

Source: arXiv:2501.00375; released code EvelynZhang-epiclab/DaTo (Stable Diffusion 1.5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.calibration import Given
from cache4diffusion.calibration.strategies import MADE_FOR, Strategies, full_counts
from cache4diffusion.errors import SettingError
from cache4diffusion.gates import DepthTable
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.settings import setting
from cache4diffusion.sites import ReducedLevel
from cache4diffusion.tokens import DynamicTokens

OFFICIAL = 0.4  # the ratio that the released code puts in the place of any other


@dataclass(frozen=True)
class DaTo(Method):
    """At each step the U-Net is computed to a depth of its own, and self-attention of its finest level without the
    tokens that are most like others; see `DynamicTokens` for which.

    Depth 2 or more computes everything; depth 1 the outermost level alone, from what a deeper layer gave it last, as
    `DeepCache`; depth 0 nothing: the output is the last one that was computed. What is computed is computed on fewer
    tokens: ``x = x + recover(attn(prune(norm(x))))``, where every token that was left out gets the output of the token
    left that is most like it. Tokens that move from step to step are spared. The strip is ``rpppcrpp...``.

    Which depth and which ratio a step has is searched for on your denoiser by ``c4d calibrate`` (`Strategies`): of the
    strategies it kept, the one with the least error whose FLOPs are at most the share ``budget`` is taken. What you
    give yourself goes before that. Without either, full steps lie at even distances, as many as the search allows (5, 3
    and 5 of the first 15, next 20 and last 15 of 50), with depth 1 between them: that is ours, not the paper's.

    Cost: per block and computed step, cosines of ``3/4 N`` tokens with ``1/4 N``, and of the ``P`` that are left out
    with all others; per branch the level's feature, two outputs and one number per position. No host sync.
    Differences from the code: there the weight of dynamics changes its sign at random, the ratio is 0.4 whatever was
    searched, and the list of timesteps is that of 50 DDIM steps (``variant="official"`` does the first two); its lists
    of depths begin with the second step, as the first is always full, and ours with the first. Halves of
    guidance share their plan, where the code shares base tokens and prunes each by itself; noise is one draw for all
    rows. Dynamics are those of the last two outputs that were computed, where a reused output counts there as one that
    did not move; they are averaged over what a token covers, where the code needs a latent of the grid's size. The full
    matrix of cosines is not made.
    """

    strategy: tuple[int, ...] = setting((), "depth of each step: 0, 1, or 2 and more for all; () see above")
    ratios: tuple[float, ...] = setting((), "share of tokens left out, per step; () is 0.4. Code: 0.4; paper: 0.3-0.7")
    budget: float = setting(0.5, "of what was found, the largest share of the FLOPs", gt=0, le=1)
    window: int = setting(2, "side of the windows that hold one base token each. Code: 2", ge=1)
    weight: float = setting(0.1, "of the dynamics in the score. Code: 0.1", ge=0)
    noise: float = setting(0.1, "of the noise in the score. Code: 0.1", ge=0)
    max_downsample: float = setting(1.0, "up to how much coarser levels are pruned. Code: 1", ge=1)
    seed: int = setting(0, "of the draws", ge=0)
    variant: Literal["ours", "official"] = setting("ours", "whose sign of the dynamics, and whose ratio")
    calibration: Given = setting(None, "strategies for your denoiser: a file of c4d calibrate, or what it returned")
    resample: bool = setting(False, "accept other steps or noise levels than the calibration's, by progress")

    calibrator = Strategies
    info: ClassVar[MethodInfo] = MethodInfo(
        name="dato",
        title="DaTo",
        arxiv="2501.00375",
        site="unet level and parts on fewer tokens",
        gate="searched depths",
        predictor="reuse",
        tokens="dynamics",
        fidelity="code",
        off={"strategy": (2,), "ratios": (0.0,)},
        family="U-Net",
        when="a U-Net makes large images in many steps, and a search of some hundred runs is affordable",
        ladder=({"ratios": (0.3,)}, {}, {"ratios": (0.7,)}),
        citation="Zhang et al., Token Pruning for Caching Better: 9 Times Acceleration on Stable Diffusion for Free, "
        "arXiv 2501.00375",
        published={"Stable Diffusion 1.5, released code": {"variant": "official"}},
    )

    def compose(self) -> Composition:
        """U-Net level and parts on fewer tokens x depth per step x reuse x dynamics.

        Raises:
            SettingError: no strategy that was found is as cheap as the budget; a depth or ratio is out of range.
        """
        strategy, ratios, made_for = self.strategy or spread(), self.ratios or (OFFICIAL,), None
        if self.calibration is not None and not (self.strategy and self.ratios):
            entry = self.measured
            place = chosen(entry.fit["cost"].tolist(), entry.fit["error"].tolist(), self.budget)
            found = tuple(int(depth) for depth in entry.fit["strategy"][place].tolist())
            strategy, ratios = self.strategy or found, self.ratios or tuple(entry.fit["ratios"][place].tolist())
            made_for = None if self.resample else (len(found), entry.levels)
        if self.variant == "official" and any(ratios):
            ratios = (OFFICIAL,)
        return Composition(
            site=ReducedLevel(max_downsample=self.max_downsample),
            gate=DepthTable(strategy, tuple(ratio > 0 for ratio in ratios)),
            tokens=DynamicTokens(ratios, self.window, self.weight, self.noise, self.seed, self.variant),
            made_for=made_for,
        )


def spread() -> tuple[int, ...]:
    """Depths of 50 steps: as many full ones in each third as the search allows, at even distances, and 1 elsewhere."""
    depths = []
    for length, count in full_counts(MADE_FOR):
        full = {i * length // count for i in range(count)}
        depths += [2 if i in full else 1 for i in range(length)]
    return tuple(depths)


def chosen(costs: list[float], errors: list[float], budget: float) -> int:
    """The place of the smallest error among those within the budget.

    Raises:
        SettingError: there is none.
    """
    within = [place for place, cost in enumerate(costs) if cost <= budget]
    if not within:
        least = math.ceil(1000 * min(costs)) / 1000
        raise SettingError(
            f"DaTo(budget={budget}): the cheapest strategy that was found takes {least:.3f} of the FLOPs. Use that or "
            "more, or search anew with other prompts or more generations."
        )
    return min(within, key=lambda place: errors[place])
