"""WaveEx: predict the next latents by wavelet bands of the last ones; the model and the solver are both skipped.

Source: WaveEx (AAAI 2026); no released code. After a public third-party implementation: reconstructed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import ScaledSchedule
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import WaveletExtrapolation
from cache4diffusion.settings import setting
from cache4diffusion.sites import Trajectory


@dataclass(frozen=True)
class WaveEx(Method):
    """A few early steps are computed; all others extrapolate the latent itself along the steps.

    See `WaveletExtrapolation` for both forms. The default is ours, with bands that move one step at a time; the literal
    one (``form="literal"``) reproduces the third-party code, in which Haar bands ignore the newest latent.

    Cost: ``history`` latents per run; a cached step runs nothing. Made for step grids on which latents move evenly.
    Differences from that code: a window of 4 instead of 2, with which no wavelet was reached; see above.
    """

    full_steps: tuple[int, ...] | None = setting(
        (0, 1, 2, 5, 10, 20), "full steps of 40, stretched to the run; None computes all. Code: (0, 1, 2, 5, 10, 20)"
    )
    order: int = setting(1, "of the extrapolation of each band. Code: 1", ge=1, le=2)
    history: int = setting(4, "latents in the window. Code: 2", ge=2)
    high: Literal["extrapolate", "freeze", "zero"] = setting("freeze", "what becomes of the details")
    wavelet: Literal["haar", "db2", "db4", "sym4", "sym6"] = setting("haar", "for the literal form. Code: haar")
    form: Literal["aligned", "literal"] = setting("aligned", "'literal' is the third-party code's")

    info: ClassVar[MethodInfo] = MethodInfo(
        name="waveex",
        title="WaveEx",
        arxiv=None,
        site="trajectory",
        gate="given schedule",
        predictor="wavelet extrapolation",
        tokens=None,
        fidelity="reconstructed",
        off={"full_steps": None},
        family="trajectory",
        when="speech or music follows a straight flow-matching trajectory, and the speed-up should be highest",
        ladder=(
            {"full_steps": (*range(13), 15, 18, 21, 24, 28, 32, 36)},
            {"full_steps": (0, 1, 2, 3, 4, 5, 6, 8, 11, 15, 20, 26, 33)},
            {"full_steps": (0, 1, 2, 4, 7, 12, 18, 25, 32)},
        ),
        citation="WaveEx, AAAI 2026 (article 40490)",
        published={
            "third-party code, 40 steps": {"full_steps": (0, 1, 2, 5, 10, 20), "order": 1, "history": 2},
        },
    )

    def compose(self) -> Composition:
        """State of the trajectory x given schedule x wavelet extrapolation."""
        return Composition(
            site=Trajectory("state"),
            gate=ScaledSchedule(self.full_steps, made_for=40),
            predictor=WaveletExtrapolation(self.order, self.history, self.high, self.wavelet, self.form),
            branches="tied",
        )
