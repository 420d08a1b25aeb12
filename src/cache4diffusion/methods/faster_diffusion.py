"""Faster Diffusion: the encoder of a U-Net runs at key steps; at the others the decoder goes on with what it made.

Source: arXiv:2312.09608 (NeurIPS 2024); released code hutaiHang/Faster-Diffusion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.gates import FixedInterval, ScaledSchedule
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import UNetEncoder

_KEYS = (0, 1, 2, 3, 5, 10, 15, 25, 35)


@dataclass(frozen=True)
class FasterDiffusion(Method):
    """At key steps everything runs; at the others ``Decoder(skips, middle, t)`` with the last key step's skips.

    The decoder is told the current timestep and the text; the latent of a step that is no key is not read by the
    network at all. ``parallel`` decodes all steps up to the next key in one batch, each at its own timestep, which is
    the same where only the latent and the timestep change from step to step; what is added to the skips (ControlNet) is
    then that of the first of these steps. The list of key steps is for 50 steps and is stretched to others.

    Cost: all skip tensors and what leaves the middle. A cached step runs the up blocks and the output, about half.
    Differences from the code: 0.003 of the initial noise, which it adds to the latent in the second half of the run to
    bring texture back, is left out. ControlNet's residuals are added to the cached skips on every step, fresh (but for
    ``parallel``), where the code runs that network at key steps only. For U-Nets; the paper's variant for transformers
    is not in.
    """

    key_steps: tuple[int, ...] = setting(_KEYS, "steps of 50 at which the encoder runs. Code: this list (50ls)")
    interval: int = setting(0, "instead of the list, every n-th step; 1 never caches. Code: 0, 4 (other weights)", ge=0)
    parallel: bool = setting(False, "decode all steps up to the next key in one batch")

    info: ClassVar[MethodInfo] = MethodInfo(
        name="faster-diffusion",
        title="Faster Diffusion",
        arxiv="2312.09608",
        site="unet encoder",
        gate="key steps",
        predictor="reuse",
        tokens=None,
        fidelity="code",
        off={"interval": 1},
        family="U-Net",
        when="the denoiser is a U-Net whose encoder may be spared, and several steps may share one batch",
        ladder=({"interval": 2}, {"interval": 4}, {}),
        citation="Li et al., Faster Diffusion: Rethinking the Role of the Encoder for Diffusion Model Inference, "
        "NeurIPS 2024",
        published={
            "Stable Diffusion, 50 steps": {"key_steps": _KEYS},
            "community checkpoints": {"interval": 4},
        },
    )

    def compose(self) -> Composition:
        """U-Net encoder x key steps x reuse."""
        gate = FixedInterval(self.interval) if self.interval else ScaledSchedule(self.key_steps, 50)
        return Composition(site=UNetEncoder(self.parallel), gate=gate, predictor=Reuse())
