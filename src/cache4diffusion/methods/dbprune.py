"""DBPrune: each block decides by its input whether its residual is reused.

Source: no paper; released code vipshop/cache-dit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import EntranceThreshold, Guard, MaxRun, MaxTotal, Warmup
from cache4diffusion.method import Composition, Dial, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Blocks


@dataclass(frozen=True)
class DBPrune(Method):
    """A block whose input differs by less than ``threshold`` from the input it last ran on adds its last residual.

    ``score = mean|x - x_ref| / mean|x_ref|`` of the image stream; the comparison is on hidden states, so the threshold
    has another scale than `DBCache`'s. The first ``front`` and last ``back`` blocks always run. With ``dynamic`` the
    threshold follows the first scores of the step (see `EntranceThreshold`).

    Cost: two tensors per block (its input and its residual) and one residual per further stream: the heaviest of the
    gated methods. One host sync per block.
    Differences from the code: ``max_cached`` and ``max_run`` count each block's own cached steps (there a step counts
    as soon as one block was pruned in it, and then holds for the blocks behind it); blocks are counted over all lists;
    float32 scores.
    """

    threshold: float = setting(0.08, "largest relative change of a block's input; 0 is off. Code: 0.08", ge=0)
    front: int = setting(8, "first blocks that always run. Code: 8", ge=0)
    back: int = setting(0, "last blocks that always run. Code: 0", ge=0)
    keep: tuple[int, ...] = setting((), "numbers of further blocks that always run. Code: none")
    warmup: int = setting(8, "first steps that are full. Code: 8", ge=0)
    dynamic: bool = setting(False, "whether the threshold follows the first blocks of the step. Code: False")
    relax: float = setting(1.25, "factor on their mean score, with dynamic. Code: 1.25", gt=0)
    cap: float | None = setting(None, "largest dynamic threshold; None is twice the threshold. Code: None", ge=0)
    max_cached: int | None = setting(None, "most cached steps of a block; None for no limit", ge=0)
    max_run: int | None = setting(None, "most cached steps of a block in a row; None for no limit", ge=0)
    decide: Literal["batch", "any", "row"] = setting("batch", "one decision, full if any row needs it, or per row")
    branches: Literal["independent", "tied"] = setting("independent", "whether CFG branches follow the first one")

    info: ClassVar[MethodInfo] = MethodInfo(
        name="dbprune",
        title="DBPrune",
        arxiv=None,
        site="blocks",
        gate="input of each block",
        predictor="reuse of the residual",
        tokens=None,
        fidelity="code",
        off={"threshold": 0.0},
        family="adaptive gates",
        when="every block should decide for itself, and there is memory for what all of them add",
        dial=Dial("threshold", 0.03, 1.0),
        ladder=({"threshold": 0.05, "front": 1}, {"threshold": 0.15, "front": 1}, {"threshold": 0.4, "front": 1}),
        citation="DefTruth et al., cache-dit: A PyTorch-native inference engine with hybrid cache acceleration, 2025",
        published={
            "default, F8B0_W8_R0.08": {"threshold": 0.08, "front": 8, "back": 0, "warmup": 8},
            "FLUX.1-dev, 28 steps, 24 % pruned": {"threshold": 0.03, "front": 1, "back": 0},
            "FLUX.1-dev, 28 steps, 60 % pruned": {"threshold": 0.2, "front": 1, "back": 0},
        },
    )

    def compose(self) -> Composition:
        """Single blocks x their inputs x reuse, under guards."""
        guards: list[Guard] = [Warmup(self.warmup)]
        if self.max_cached is not None:
            guards.append(MaxTotal(self.max_cached))
        if self.max_run is not None:
            guards.append(MaxRun(self.max_run))
        return Composition(
            site=Blocks(self.front, self.back, self.keep),
            gate=EntranceThreshold(self.threshold, self.dynamic, self.relax, self.cap),
            predictor=Reuse(),
            guards=tuple(guards),
            decide=self.decide,
            branches=self.branches,
        )
