"""BWCache: reuse begins when neighbouring steps look alike, and ends before the details form.

Source: arXiv:2509.13789 (ICLR 2026); its code could not be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import TriggeredInterval
from cache4diffusion.method import Composition, Dial, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Span


@dataclass(frozen=True)
class BWCache(Method):
    """Full until what the blocks make differs little between two steps; then all blocks' outputs are reused.

    ``score = mean over blocks of mean|h_i - h_(i-1)| / mean|h_(i-1)|`` for what leaves each block (eq. 5 to 7). Once it
    is below ``threshold``, the outputs of that step are reused for a share ``reuse`` of the run, computed once,
    reused again, and so on (eq. 8), through the first half of the steps that remain; the second half is full. Reusing
    every block's output is reusing the last one's, so that one is all that is kept for it.

    Cost: the output of every block until reuse begins (for the score), and of the last one. A cached step runs no
    block. One host sync per full step until reuse begins.
    Differences from the paper: formulas and defaults were taken from summaries of it; the text and code were not at
    hand. On image denoisers the paper finds little to gain: their changes fall late, not in the middle.
    """

    threshold: float = setting(0.15, "mean relative change at which reuse begins; 0 is off. Paper: 0.15", ge=0)
    reuse: float = setting(0.1, "cached steps in a row, fraction of the run. Paper: 0.1", ge=0, le=1)
    tail: float = setting(0.5, "share of the remaining steps that is full at the end. Paper: 0.5", ge=0, le=1)
    decide: Literal["batch", "any", "row"] = setting("batch", "one decision, full if any row needs it, or per row")

    info: ClassVar[MethodInfo] = MethodInfo(
        name="bwcache",
        title="BWCache",
        arxiv="2509.13789",
        site="span",
        gate="triggered interval",
        predictor="reuse",
        tokens=None,
        fidelity="reconstructed",
        off={"threshold": 0.0},
        family="adaptive gates",
        when="a video denoiser changes little in its middle steps",
        dial=Dial("threshold", 0.05, 0.5),
        ladder=({"threshold": 0.05}, {"threshold": 0.2}, {"threshold": 0.2, "tail": 0.1}),
        citation="Cui et al., BWCache: Accelerating Video Diffusion Transformers through Block-Wise Caching, ICLR 2026",
        published={
            "Open-Sora": {"threshold": 0.15, "reuse": 0.1, "tail": 0.5},
        },
    )

    def compose(self) -> Composition:
        """Output of all blocks x triggered interval x reuse."""
        return Composition(
            site=Span(form="output"),
            gate=TriggeredInterval(self.threshold, self.reuse, self.tail),
            predictor=Reuse(),
            decide=self.decide,
        )
