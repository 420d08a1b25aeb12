"""MD-DiT, as far as a frozen denoiser allows: a trained router picks the tokens that cached steps compute.

Source: Step-aware Mixture-of-Depths for Efficient Diffusion Transformers, NeurIPS 2024 workshop; neither text nor code
could be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.calibration import Given
from cache4diffusion.calibration.token_routers import TokenRouters
from cache4diffusion.errors import CalibrationError
from cache4diffusion.gates import FixedInterval, PartInput
from cache4diffusion.method import TRAINED, Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts
from cache4diffusion.tokens import RoutedTokens


@dataclass(frozen=True)
class MDDiT(Method):
    """Every ``interval``-th step is full; on the others, each MLP computes the tokens its router picks.

    A mixture of depths lets a token pass a block by, which takes a denoiser that was trained for it. Here the denoiser
    stays as it is, and a token that is not picked keeps the part's output of the last full step. A part's router is a
    vector ``w`` per step, trained by ``c4d calibrate``: of N tokens the ``ceil(capacity * N)`` with the largest ``z @
    w`` are computed, where ``z`` is what enters the part. Attention is reused as a whole.

    With an interval of 3 the strip is ``FppFpp``; a capacity of 0 is plain reuse, ``FccFcc`` by its outputs. It is for
    the steps, scheduler and guidance it was trained with; a run of others needs ``resample=True``.

    Cost: 1 copy of every part's output; per cached step the picked share of the MLPs. No host sync.
    Differences from the paper: its routers and blocks are trained together, for tokens that have no output at all in a
    block, with a capacity that follows the step; all of this is ours, under its idea.
    """

    interval: int | None = setting(
        None, "distance of two full steps; 1 is off, None is what it was calibrated for", ge=1
    )
    capacity: float | None = setting(
        None, "share of the tokens that is computed, None is what it was calibrated for", ge=0, le=1
    )
    calibration: Given = setting(None, "routers of your denoiser: a file of c4d calibrate, or what it returned")
    resample: bool = setting(False, "accept other steps or noise levels, by the nearest calibrated ones")

    calibrator = TokenRouters
    info: ClassVar[MethodInfo] = MethodInfo(
        name="md-dit",
        title="MD-DiT",
        arxiv=None,
        site="parts",
        gate="interval",
        predictor="reuse",
        tokens="trained router",
        fidelity="reconstructed",
        off={"interval": 1},
        family="tokens",
        when="you compare routings: as published it needs a denoiser trained for it, ours does not",
        ladder=({"capacity": 0.5}, {}, {"capacity": 0.0}),
        citation="Step-aware Mixture-of-Depths for Efficient Diffusion Transformers, NeurIPS 2024 workshop",
        needs_calibration=True,
        needs=f"{TRAINED} (as published; ours goes without)",
    )

    def compose(self) -> Composition:
        """Parts x interval x reuse x routed tokens."""
        entry, trained = self.measured, self.trained
        interval = trained.interval if self.interval is None else self.interval
        if interval not in (1, trained.interval):
            raise CalibrationError(
                f"MDDiT(interval={interval}): the routers were trained for an interval of {trained.interval}. "
                f"Calibrate with --set interval={interval}."
            )
        num_steps = len(next(iter(entry.fit.values())))
        return Composition(
            site=Parts(),
            gate=FixedInterval(interval),
            predictor=Reuse(),
            tokens=RoutedTokens(
                trained.capacity if self.capacity is None else self.capacity,
                PartInput(entry.fit, num_steps, entry.levels, self.resample),
            ),
        )

    @property
    def trained(self) -> TokenRouters:
        """What it was calibrated with."""
        made = self.loaded
        assert made is not None and isinstance(made.statistic, TokenRouters)  # `measured` has seen to it
        return made.statistic
