"""CA-ToMe: tokens are merged by a threshold of similarity, and who is merged with whom is kept for several steps.

Source: arXiv:2501.00946; released code omidiu/ca_tome.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import Throughout
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.settings import setting
from cache4diffusion.sites import Reduced
from cache4diffusion.tokens import MergeTokens

_BEST = (0, 8, 11, 13, 20, 25, 30, 35, 45, 46, 47, 48, 49)


@dataclass(frozen=True)
class CAToMe(Method):
    """ToMe in self-attention, where every source is merged whose cosine to its destination reaches ``threshold``.

    Plans are made at the steps in ``renew_at``, or if there are none at every ``renew``-th, and kept for each block in
    between, the drawn destinations included. All state is the run's: nothing is left for the next.

    Cost: ToMe's, at the steps that renew, with one host sync per block there; two indices per token and block. Numbers
    of tokens depend on the data: ``bucket`` rounds them, so that there are few shapes.
    Differences from the code: of the rows of a batch the smallest number of tokens is merged, so that no row merges
    what is below the threshold (``variant="official"``: the largest). Halves of guidance are matched together. See
    `ToMe` for the rest.
    """

    threshold: float = setting(0.7, "smallest cosine that is merged; 1 merges nothing. Code: 0.7", ge=-1, le=1)
    renew: int = setting(5, "steps between two plans", ge=1)
    renew_at: tuple[int, ...] = setting((), "the steps that make plans, in place of renew; 0 always does")
    max_downsample: float = setting(1.0, "up to how much coarser levels are served. Code: 1", ge=1)
    window: int = setting(2, "side of the windows that hold one destination each. Code: 2", ge=1)
    bucket: int = setting(1, "merged tokens are a multiple of this", ge=1)
    seed: int = setting(0, "of the draws", ge=0)
    variant: Literal["ours", "official"] = setting("ours", "whose number of a batch is merged")

    info: ClassVar[MethodInfo] = MethodInfo(
        name="ca-tome",
        title="CA-ToMe",
        arxiv="2501.00946",
        site="parts on fewer tokens",
        gate="every step",
        predictor="none",
        tokens="merge",
        fidelity="code",
        off={"threshold": 1.0},
        family="tokens",
        when="ToMe serves you, and matching tokens anew on every step costs too much",
        ladder=({"threshold": 0.9}, {}, {"threshold": 0.4}),
        citation="Saghatchian et al., Cached Adaptive Token Merging, arXiv 2501.00946",
        published={
            "Stable Diffusion 1.5, 50 steps, best": {"threshold": 0.7, "renew_at": _BEST},
            "Stable Diffusion 1.5, 50 steps, early": {
                "threshold": 0.7,
                "renew_at": (0, 1, 2, 3, 5, 10, 15, 25, 35),
            },
            "Stable Diffusion 1.5, 50 steps, uniform": {"threshold": 0.7, "renew": 5},
        },
    )

    def compose(self) -> Composition:
        """Parts on fewer tokens x every step x merge, with plans that are kept."""
        return Composition(
            site=Reduced(("attn",), self.max_downsample),
            gate=Throughout(is_on=self.threshold < 1),
            tokens=MergeTokens(
                threshold=self.threshold,
                window=self.window,
                renew=self.renew,
                renew_at=self.renew_at,
                bucket=self.bucket,
                seed=self.seed,
                variant=self.variant,
            ),
        )
