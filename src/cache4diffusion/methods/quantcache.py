"""QuantCache: one signal says how long a block is reused and what of it is kept in few bits.

Source: arXiv:2503.06545; no code is out (its repository holds a README).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import Guard, LadderedEntrance, Warmup
from cache4diffusion.method import Composition, Dial, Method, MethodInfo
from cache4diffusion.predictors import Graded
from cache4diffusion.settings import setting
from cache4diffusion.sites import Blocks


@dataclass(frozen=True)
class QuantCache(Method):
    """A block that diverged little is reused for long; what of it diverged most is kept in full, the rest in int8.

    Three rules, of which the paper's text gives the idea and our reading the numbers. *Hierarchical latent caching*:
    each block compares what enters with what entered when it last ran, ``d = mean|x - x_ref| / mean|x_ref|`` per step,
    and goes down a ladder of intervals, 6 to 1 (`LadderedEntrance`). *Importance-guided precision*: by the same
    measure, channel by channel of what a block adds, the cache's bits are dealt out within a budget: the channels that
    diverged most as they are, the others in int8 (`Graded`). *Redundancy-aware pruning*: a block whose output was
    nearly parallel to that of the block before is left out once when its time has come, and goes on adding what it
    added last.

    With a threshold of 0.5 and a divergence of 0.35 per step, 9 steps are ``FFccFccFc``.

    In int8, rows of a batch are what they are alone but for roundings: a number that differs in its last bit may fall
    on the other side. With ``bits=16`` they agree as closely as uncached ones.

    Cost: two tensors per block (its input, and its residual in ``bits`` of 16) and one residual per further stream. One
    host sync per block.
    Not reproduced: weights and activations in 4 to 8 bits by CUDA kernels of its own, with bits by layer and step.
    Weights are quantised before, by `quantised` or any other means; activations are computed as the denoiser does. The
    paper passes a pruned layer's input on. Its thresholds and ladders are not known; ours are.
    """

    threshold: float = setting(0.2, "divergence per step from which on a block runs at every step; 0 is off", ge=0)
    bits: float = setting(12.0, "of the cache, on average: 8 is int8, 16 keeps it as it is", ge=8, le=16)
    prune: float = setting(0.001, "largest 1 - cos of input and output of a block left out; 0: none", ge=0, le=1)
    warmup: int = setting(1, "first steps that are full", ge=0)
    front: int = setting(0, "first blocks that always run", ge=0)
    back: int = setting(0, "last blocks that always run", ge=0)
    decide: Literal["batch", "any", "row"] = setting("batch", "one decision, full if any row needs it, or per row")
    branches: Literal["independent", "tied"] = setting("independent", "whether CFG branches follow the first one")

    info: ClassVar[MethodInfo] = MethodInfo(
        name="quantcache",
        title="QuantCache",
        arxiv="2503.06545",
        site="blocks",
        gate="ladder by each block's divergence",
        predictor="reuse in mixed precision",
        tokens=None,
        fidelity="reconstructed",
        off={"threshold": 0.0},
        family="adaptive gates",
        when="every block should have its own interval, and memory for what all of them add is short",
        dial=Dial("threshold", 0.05, 1.0, beside={"prune": 0.0}),  # pruning leaves blocks out at any threshold
        ladder=({"threshold": 0.1}, {"threshold": 0.2}, {"threshold": 0.4}),
        citation="Wu et al., QuantCache: Adaptive Importance-Guided Quantization with Hierarchical Latent and Layer "
        "Caching for Video Generation, 2025",
    )

    def compose(self) -> Composition:
        """Single blocks x a ladder by their divergence x reuse in mixed precision."""
        guards: tuple[Guard, ...] = (Warmup(self.warmup),) if self.warmup else ()
        return Composition(
            site=Blocks(self.front, self.back),
            gate=LadderedEntrance(self.threshold, self.prune),
            predictor=Graded(self.bits),
            guards=guards,
            decide=self.decide,
            branches=self.branches,
        )
