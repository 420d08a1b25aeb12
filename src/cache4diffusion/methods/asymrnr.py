"""AsymRnR: within attention, redundant queries are left out and restored, and redundant keys and values left out.

Source: arXiv:2412.11706 (ICML 2025); released code wenhao728/AsymRnR.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.calibration import Given
from cache4diffusion.calibration.redundancies import Redundancies
from cache4diffusion.errors import SettingError
from cache4diffusion.gates import Throughout
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.settings import setting
from cache4diffusion.sites import ReducedAttention
from cache4diffusion.tokens import AsymmetricTokens

TIERS = 10


@dataclass(frozen=True)
class AsymRnR(Method):
    """On every step, each self-attention looks for fewer queries, and at fewer keys and values; see `AsymmetricTokens`.

    Each asymmetrically: queries have a matching of their own, and what was found for one that is left is copied to
    those it stands for; keys follow the matching of values, and what is left out there need not be restored. Both are
    reduced where they meet, behind their norms and positions, head by head. Text is never reduced.

    How much is left out depends on the block and the step. A ``calibration`` measures how redundant queries and values
    are there (`Redundancies`); the span from the least to the most redundant is cut into tiers 0 to 9. From tier
    ``query_tiers[i]`` on the share ``query_ratios[i]`` of the queries is left out, the largest if there are several;
    of values likewise. Without a calibration the first ratio holds everywhere. The strip is ``rrrr``.

    m equal keys count m times in a softmax, and those left out no more: exact only with a bias of ``log m``, which
    neither the code nor we add.

    Cost: distances of all tokens to the destinations, ``1/24`` of the matrix of attention's logits, at every
    ``renew``-th step; two indices per token and head. No host sync. Projections run on all tokens. Compiled blocks are
    refused.
    Differences from the code: its tiers are files for five models, made in a way that it does not say (those of Mochi
    go beyond 9: ratios hold from tiers 9, 10 and 14 on); ours are measured. Halves of guidance are matched together;
    windows that the grid does not fill lie at its end, where the code draws an offset; a mask is gathered, where the
    code cuts off its beginning. The joint reduction of what enters an attention (h) and reduction by the mean are not
    offered.
    """

    query_ratios: tuple[float, ...] = setting((0.4, 0.8), "shares of the queries left out; () for none. Code: 0.3-0.9")
    query_tiers: tuple[int, ...] = setting((6, 7), "from which tier, 0 to 9, each holds. Code: 5-7")
    value_ratios: tuple[float, ...] = setting((0.3,), "shares of keys and values left out; () for none. Code: 0.3-0.4")
    value_tiers: tuple[int, ...] = setting((8,), "from which tier, 0 to 9, each holds. Code: 7-9")
    window: tuple[int, ...] = setting((6, 2, 2), "frames, rows and columns that hold one destination")
    renew: int = setting(3, "steps that a matching serves. Code: 5 (CogVideoX), 3 (HunyuanVideo), 1 (FastVideo)", ge=1)
    max_downsample: float = setting(1.0, "up to how much coarser levels are served", ge=1)
    seed: int = setting(0, "of the draws", ge=0)
    calibration: Given = setting(None, "redundancies in your denoiser: a file of c4d calibrate, or what it returned")
    resample: bool = setting(False, "accept other steps or noise levels, by the nearest calibrated ones")

    calibrator = Redundancies
    info: ClassVar[MethodInfo] = MethodInfo(
        name="asymrnr",
        title="AsymRnR",
        arxiv="2412.11706",
        site="attention on fewer tokens",
        gate="every step",
        predictor="none",
        tokens="nearest destinations",
        fidelity="code",
        off={"query_ratios": (), "query_tiers": (), "value_ratios": (), "value_tiers": ()},
        family="tokens",
        when="a video denoiser spends its time in attention, and few frames differ",
        ladder=(
            {"query_ratios": (0.3,), "query_tiers": (7,), "value_ratios": (), "value_tiers": ()},
            {},
            {"query_ratios": (0.6, 0.8), "value_ratios": (0.3, 0.4), "value_tiers": (7, 9)},
        ),
        citation="Sun et al., AsymRnR: Video Diffusion Transformers Acceleration with Asymmetric Reduction, ICML 2025",
        published={
            "CogVideoX 2B": {"window": (2, 2, 2), "renew": 5},
            "CogVideoX 2B, fast": {
                "query_ratios": (0.6, 0.8),
                "value_ratios": (0.3, 0.4),
                "value_tiers": (7, 9),
                "window": (2, 2, 2),
                "renew": 5,
            },
            "HunyuanVideo": {"query_ratios": (0.9,), "query_tiers": (7,)},
            "HunyuanVideo, fast": {"query_ratios": (0.3, 0.9), "query_tiers": (5, 7)},
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, tiers, ratios in (
            ("query", self.query_tiers, self.query_ratios),
            ("value", self.value_tiers, self.value_ratios),
        ):
            are_shares, are_tiers = all(0 <= ratio <= 1 for ratio in ratios), all(0 <= tier < TIERS for tier in tiers)
            if len(tiers) != len(ratios) or not are_shares or not are_tiers:
                raise SettingError(
                    f"AsymRnR({what}_ratios={ratios}, {what}_tiers={tiers}): give as many tiers as ratios, ratios of 0 "
                    f"to 1, and tiers of 0 to {TIERS - 1}."
                )

    def compose(self) -> Composition:
        """Attention on fewer tokens x every step x nearest destinations."""
        ratios, levels = None, None
        if self.calibration is not None:
            entry = self.measured
            rungs = {
                "query": list(zip(self.query_tiers, self.query_ratios, strict=True)),
                "value": list(zip(self.value_tiers, self.value_ratios, strict=True)),
            }
            levels, ratios = entry.levels, {}
            for kind, steps in rungs.items():
                tables = {name: t.tolist() for name, t in entry.fit.items() if name.split(" ", 1)[0] == kind}
                for name, tiers in tiered(tables).items():
                    ratios[name] = tuple(max((r for least, r in steps if tier >= least), default=0.0) for tier in tiers)
        return Composition(
            site=ReducedAttention(max_downsample=self.max_downsample),
            gate=Throughout(is_on=max((*self.query_ratios, *self.value_ratios), default=0) > 0),
            tokens=AsymmetricTokens(
                ratio=next(iter(self.query_ratios), 0.0),
                value_ratio=next(iter(self.value_ratios), 0.0),
                ratios=ratios,
                window=self.window,
                renew=self.renew,
                seed=self.seed,
                levels=levels,
                resample=self.resample,
            ),
        )


def tiered(tables: Mapping[str, Sequence[float]]) -> dict[str, list[int]]:
    """Tiers 0 to 9 of all numbers, in equal parts from the smallest to the largest."""
    every = [value for table in tables.values() for value in table]
    least, span = min(every, default=0.0), max(every, default=0.0) - min(every, default=0.0)
    return {
        name: [min(int(TIERS * (value - least) / span), TIERS - 1) if span else 0 for value in table]
        for name, table in tables.items()
    }
