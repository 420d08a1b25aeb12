"""BAC: every part has update steps of its own, where its output stands best for those of the steps behind.

Source: arXiv:2506.13456 (Block-wise Adaptive Caching, ICLR 2026), from descriptions of the paper; no code is out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.calibration import Given
from cache4diffusion.calibration.similarities import Similarities
from cache4diffusion.gates import Timetable
from cache4diffusion.gates.update_sets import bubbled, caching_error, update_steps
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts

FEED_FORWARD = ("ffn", "fused")  # a fused part has an MLP in it


@dataclass(frozen=True)
class BACache(Method):
    """Each part is computed at M of K steps, which a search places; parts in front of an MLP are refreshed with it.

    ``S[i, j]``, measured once by ``c4d calibrate`` and averaged over prompts, is the cosine of a part's outputs at
    steps i and j. The adaptive caching scheduler takes the M steps, 0 among them, that maximise the sum of
    ``S[c(j), j]`` over the cached steps j, with ``c(j)`` the update step before j (dynamic programming).

    The bubbling union algorithm then goes over the feed-forward parts from the last to the first: of all parts in front
    of it, the ``sources`` with the largest caching error, the sum of ``1 - S[c(j), j]``, are updated at its update
    steps as well. That only adds updates: the share that is computed is ``budget`` or more; the trace and
    the FLOPs say how much.

    With outputs that are all alike, ``sources=0`` and 2 of 6 steps, the strip is ``FFcccc``. A run of other steps or
    noise levels than the calibration's needs ``resample=True``.

    Cost: 1 copy of every part's output; a cached part does not run. No host sync. Calibrating keeps one copy per step.
    Differences from the paper: none that is known, but it was read second-hand. The similarity is that to the cached
    output, which includes the other reading, of neighbouring steps, as a special case; the defaults are ours. A part
    with attention and MLP in one, which the paper's policies lack, counts as feed-forward.
    """

    budget: float = setting(
        0.3, "share of the steps at which a part is updated; 1 is off. Paper: 10 of 100", gt=0, le=1
    )
    sources: int = setting(1, "parts in front of an MLP that are updated with it; 0: none", ge=0)
    calibration: Given = setting(None, "similarities of your denoiser: a file of c4d calibrate, or what it returned")
    resample: bool = setting(False, "accept other steps or noise levels, by the nearest calibrated ones")

    calibrator = Similarities
    info: ClassVar[MethodInfo] = MethodInfo(
        name="bacache",
        title="BAC",
        arxiv="2506.13456",
        site="parts",
        gate="calibrated schedule per part",
        predictor="reuse",
        tokens=None,
        fidelity="reconstructed",
        off={"budget": 1.0},
        family="reuse of blocks and parts",
        when="a small denoiser runs many steps, as policies do, and each part may have a schedule measured on it",
        ladder=({"budget": 0.5}, {"budget": 0.32}, {"budget": 0.18}),
        citation="Ji et al., Block-wise Adaptive Caching for Accelerating Diffusion Policy, ICLR 2026",
        needs_calibration=True,
        published={"Diffusion Policy, 100 steps": {"budget": 0.1}},
    )

    def compose(self) -> Composition:
        """Parts x searched schedule per part x reuse."""
        entry = self.measured
        tables, readers = {}, []
        for name, table in entry.fit.items():
            kind, path = name.split(" ", 1)
            tables[path] = table.tolist()
            if kind in FEED_FORWARD:
                readers.append(path)
        num_steps = len(next(iter(tables.values())))
        count = max(round(self.budget * num_steps), 1)
        updates = {path: update_steps(table, count) for path, table in tables.items()}
        errors = {path: caching_error(table, updates[path]) for path, table in tables.items()}
        return Composition(
            site=Parts(decisions="part"),
            gate=Timetable(
                bubbled(updates, errors, readers, self.sources), num_steps, entry.levels, resample=self.resample
            ),
            predictor=Reuse(),
        )
