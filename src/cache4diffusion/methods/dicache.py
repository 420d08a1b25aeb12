"""DiCache: the first blocks decide when, and how far the others' residual is extrapolated.

Source: arXiv:2508.17356; released code Bujiazi/DiCache (FLUX).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import AccumulatedChange, ForceLast, Front, Guard, Warmup, Window
from cache4diffusion.method import Composition, Dial, Method, MethodInfo
from cache4diffusion.predictors import ProbeAligned
from cache4diffusion.settings import setting
from cache4diffusion.sites import Span


@dataclass(frozen=True)
class DiCache(Method):
    """Sum up the change of what leaves the first ``front`` blocks; cached while the sum stays below ``threshold``.

    ``score = mean|p_i - p_(i-1)| / mean|p_(i-1)|`` for the stream ``p`` behind the first blocks, which run on every
    step. A cached step adds ``R_-2 + gamma * (R_-1 - R_-2)`` to what entered the stack, with the residuals R of all
    blocks at the last two full steps and ``gamma`` from how far the first blocks' residual moved (see `ProbeAligned`).
    Full up to the step ``int(retention * num_steps)`` and at the last one.

    Cost: two residuals of the stack and two of the probe per stream, and the probe. A cached step runs ``front``
    blocks. One host sync per step that is not forced.
    Differences from the code: only the last two residuals are kept (there a list grows until the run ends); ``gamma``
    is one per row where rows decide for themselves; it is 1 where the probe did not move (there 0 / 0).
    """

    threshold: float = setting(0.4, "accumulated change at which a step is full; 0 is off. Code: 0.4 (FLUX)", ge=0)
    front: int = setting(1, "first blocks that always run and are watched. Code: 1", ge=1)
    retention: float = setting(0.2, "first fraction of the steps that is full. Code: 0.2", ge=0, le=1)
    limit: float = setting(
        1.5, "largest factor of the extrapolation; 1 is plain reuse. Code: 1.5 (FLUX), 2 (Wan)", ge=1
    )
    error: Literal["change", "excess"] = setting(
        "change", "the change of the probe, or by how much it differs from that of the first block's input"
    )
    cooldown: int = setting(1, "last steps that are always full. Code: 1 (FLUX), 0 (Wan)", ge=0)
    decide: Literal["batch", "any", "row"] = setting("batch", "one decision, full if any row needs it, or per row")

    info: ClassVar[MethodInfo] = MethodInfo(
        name="dicache",
        title="DiCache",
        arxiv="2508.17356",
        site="span",
        gate="accumulated change of the front",
        predictor="probe-aligned extrapolation",
        tokens=None,
        fidelity="code",
        off={"threshold": 0.0},
        family="adaptive gates",
        when="nothing can be calibrated, and the cached residual should follow where the first blocks are going",
        dial=Dial("threshold", 0.1, 3.0),
        ladder=({"threshold": 0.1}, {"threshold": 0.3}, {"threshold": 2.0}),
        citation="Bu et al., DiCache: Let Diffusion Model Determine Its Own Cache, 2025",
        published={
            "FLUX.1-dev, 30 steps": {"threshold": 0.4, "retention": 0.2, "limit": 1.5},
            "FLUX.1-dev, 30 steps, excess": {"threshold": 0.08, "retention": 0.0, "error": "excess"},
            "Wan 2.1": {"threshold": 0.08, "retention": 0.2, "limit": 2.0, "cooldown": 0},
        },
    )

    def compose(self) -> Composition:
        """Span behind the front x accumulated change x probe-aligned extrapolation."""
        guards: tuple[Guard, ...] = (Warmup(1), Window(self.retention, is_start_full=True))
        if self.cooldown:
            guards += (ForceLast(self.cooldown),)
        watch = Front(self.front, of="stream", reference="last_step", is_excess=self.error == "excess")
        return Composition(
            site=Span(self.front),
            gate=AccumulatedChange(self.threshold, of=watch),
            predictor=ProbeAligned(self.limit, per_row=self.decide == "row"),
            guards=guards,
            decide=self.decide,
        )
