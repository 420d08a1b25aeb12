"""The two noise processes of the reference models: what the denoiser sees, and what it is to predict."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from cache4diffusion.reference.networks import build_scheduler


class Corrupted(NamedTuple):
    """One microbatch of training.

    ``noisy`` and ``target`` have the latents' shape; ``time`` ``[B]`` is what the denoiser is told, ``level`` ``[B]``
    the same in 0 (clean) to 1 (noise).
    """

    noisy: Tensor
    time: Tensor
    target: Tensor
    level: Tensor


@dataclass(frozen=True)
class FlowMatching:
    """``x = (1 - sigma) * latents + sigma * noise``; the denoiser predicts the velocity ``noise - latents``.

    Args:
        mean: of the logit of ``sigma`` in training, which is normal.
        std: of the same.
    """

    words: ClassVar[str] = "flow matching: the denoiser predicts the velocity"
    mean: float = 0.5
    std: float = 1.2

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """That of the pipeline."""
        return build_scheduler()

    def corrupt(self, latents: Tensor, noise: Tensor, uniform: Tensor) -> Corrupted:
        """Add noise; ``uniform`` ``[B]`` in 0..1 says how much."""
        normal = torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4))
        sigma = torch.sigmoid(self.mean + self.std * normal).to(latents.device)
        share = sigma.view(-1, *[1] * (latents.ndim - 1))
        return Corrupted(torch.lerp(latents, noise, share), sigma, noise - latents, sigma)


@dataclass(frozen=True)
class VPrediction:
    """``x = a * latents + b * noise`` with ``a^2 + b^2 = 1``; the denoiser predicts ``v = a * noise - b * latents``.

    The 1000 timesteps of DDPM's linear schedule, whose last has next to no signal left (``a = 0.006``), so that a
    sample's background is the caption's and not the noise's. Timesteps are even in training, and so are those that the
    scheduler visits, the last of them included.

    Source: v-prediction, arXiv:2202.00512; trailing timesteps, arXiv:2305.08891.
    """

    words: ClassVar[str] = "DDPM's linear schedule: the denoiser predicts v"

    def scheduler(self) -> DDIMScheduler:
        """That of the pipeline."""
        return DDIMScheduler(
            num_train_timesteps=1000,
            beta_start=1e-4,
            beta_end=0.02,
            beta_schedule="linear",
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            steps_offset=1,  # without effect on trailing timesteps, but the pipelines warn of any other value
            clip_sample=False,
        )

    @cached_property
    def _signal(self) -> Tensor:
        alphas: Any = self.scheduler().alphas_cumprod
        return alphas.double().sqrt()

    def corrupt(self, latents: Tensor, noise: Tensor, uniform: Tensor) -> Corrupted:
        """Add noise; ``uniform`` ``[B]`` in 0..1 says how much."""
        count = len(self._signal)
        time = (uniform * count).long().clamp(0, count - 1)
        signal = self._signal[time]
        shape = (-1, *[1] * (latents.ndim - 1))
        a = signal.float().view(shape).to(latents.device)
        b = (1 - signal.square()).sqrt().float().view(shape).to(latents.device)
        level = (time / count).float().to(latents.device)
        return Corrupted(a * latents + b * noise, time.to(latents.device), a * noise - b * latents, level)


Noise = FlowMatching | VPrediction
