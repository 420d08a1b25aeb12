"""ICC: on cached steps every linear layer is corrected by a low-rank product with the change of its input.

Source: arXiv:2505.05829 (CVPR 2025); released code ccccczzy/icc (DiT).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.calibration import Given
from cache4diffusion.calibration.factors import LinearFactors
from cache4diffusion.errors import SettingError
from cache4diffusion.gates import FixedInterval
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Blank, Increment, Weights
from cache4diffusion.settings import setting
from cache4diffusion.sites import Linears


@dataclass(frozen=True)
class ICC(Method):
    """A cached step runs the whole denoiser but for its linear layers, which give ``Y + A (B (x - X))``.

    X and Y entered and left the layer at the last full step, x enters now; ``A B`` is close to its weight W, by a
    singular value decomposition weighted by how large the channels are (`LinearFactors`, made once by
    ``c4d calibrate``). Attention, norms and activations are computed. The anchor stays at the full step, so errors do
    not add up. Exact at full rank. At rank 0 nothing is corrected, which gives what reuse of whole parts gives.
    ``interval=2`` over 6 steps is ``FcFcFc``.

    Cost: input and output of every linear layer, 16 times the width per token and block of a DiT, and the factors; a
    cached step costs attention and ``r (in + out)`` multiply-adds per token and layer in place of ``in out``. Small
    savings and small errors: for where quality counts most. No host sync.
    Differences from the code: every layer has its own rank where its weight is smaller than ``rank`` (there ranks are
    equal); the text layers of joint blocks are corrected too; a bias in attention's value does not matter in either.
    """

    interval: int = setting(2, "distance of two full steps; 1 never caches. Code: 2", ge=1)
    rank: int | None = setting(None, "columns of the factors in use; 0 is plain reuse, None all. Code: 128", ge=0)
    calibration: Given = setting(None, "factors of your denoiser: a file of c4d calibrate, or what it returned")

    calibrator = LinearFactors
    info: ClassVar[MethodInfo] = MethodInfo(
        name="icc",
        title="ICC",
        arxiv="2505.05829",
        site="linear layers",
        gate="interval",
        predictor="increment correction",
        tokens=None,
        fidelity="code",
        off={"interval": 1},
        family="correctors",
        when="cached steps must still follow their input, at a low rank's cost and with much memory",
        ladder=({}, {"interval": 3}, {"interval": 6}),
        citation="Increment-Calibrated Caching with Channel-Aware SVD, CVPR 2025",
        needs_calibration=True,
        published={"DiT-XL/2, DDIM, 100 steps": {"interval": 2, "rank": 128}},
    )

    def compose(self) -> Composition:
        """Linear layers x interval x increment correction."""
        fit = self.measured.fit
        known = max((value.shape[1] for name, value in fit.items() if name.endswith("/a")), default=0)
        if self.rank is not None and self.rank > known:
            raise SettingError(
                f"ICC(rank={self.rank}): the calibration has factors of rank {known}. Use less, or calibrate with "
                f"rank={self.rank} (--set rank={self.rank})."
            )
        return self._with(Weights(fit))

    def outline(self) -> Composition:
        """With factors of the size they will have."""
        made = self.loaded
        return self._with(Blank(self.rank or LinearFactors().rank)) if made is None else self.compose()

    def _with(self, weights: Weights) -> Composition:
        return Composition(site=Linears(), gate=FixedInterval(self.interval), predictor=Increment(self.rank, weights))
