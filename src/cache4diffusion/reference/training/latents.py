"""What a denoiser is trained on: encoded examples in a pool, and the loss on them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cache4diffusion.reference.noise import Noise
from cache4diffusion.reference.parts import Parts
from cache4diffusion.reference.tasks import Task

PROMPT_DROPOUT = 0.1
"""Share of the examples whose prompt is left empty: what classifier-free guidance subtracts."""


class LatentPool:
    """Latents and prompts of drawn examples, made by all processes, read by all.

    Encoding a scene costs a third of a training step on it. So each microbatch brings ``1 / reuse`` new ones, draws
    the rest from the last ``size``, and every example is met about ``reuse`` times, each time with other noise.

    Args:
        vae: encodes; its shift and scale are set.
        parts: says how prompts become ids and how the denoiser takes its latents.
        task: draws.
        first_update: the first that draws from here comes after it.
        batch: examples per microbatch.
        microbatches: per update.
        size: examples kept.
        reuse: how often each is met.
        mix: shares of the families; None: the task's own.
    """

    def __init__(
        self,
        vae: Any,
        parts: Parts,
        task: Task,
        first_update: int,
        batch: int,
        microbatches: int,
        size: int = 32768,
        reuse: int = 4,
        mix: Mapping[str, float] | None = None,
    ) -> None:
        self.vae, self.parts, self.task, self.mix = vae.eval(), parts, task, mix
        self.first_update, self.batch, self.microbatches = first_update, batch, microbatches
        self.size, self.reuse, self.filling = size, reuse, max(1, 2048 // (batch * microbatches))
        config = vae.config
        self.shift, self.scale = config["shift_factor"] or 0.0, config["scaling_factor"]
        self.device = next(vae.parameters()).device
        side = task.side // 2 ** (len(config["block_out_channels"]) - 1)
        shape = parts.arrange(torch.zeros(1, task.frames or 1, config["latent_channels"], side, side)).shape[1:]
        self.empty = torch.tensor(parts.nothing(), dtype=torch.int32, device=self.device)
        self.latents = torch.zeros(size, *shape, dtype=torch.bfloat16, device=self.device)
        self.ids = torch.zeros(size, *self.empty.shape, dtype=torch.int32, device=self.device)
        if self.device.type == "cpu":
            self.latents.share_memory_()
            self.ids.share_memory_()

    def draw(self, generator: torch.Generator, update: int, microbatch: int) -> tuple[Tensor, Tensor]:
        """Latents ``[B, ...]`` as the denoiser takes them, and ids ``[B, rows, length]``, of one microbatch."""
        done = update - self.first_update - 1  # updates of this call before this one
        fresh = self.batch if done < self.filling else max(1, self.batch // self.reuse)
        before = min(done, self.filling) * self.microbatches * self.batch
        before += max(0, done - self.filling) * self.microbatches * fresh
        latents, ids = self._make(generator, fresh)
        slots = (before + microbatch * fresh + torch.arange(fresh)) % self.size
        self.latents[slots], self.ids[slots] = latents, ids
        if fresh < self.batch:
            old = torch.randint(min(before, self.size), (self.batch - fresh,), generator=generator)
            latents = torch.cat([latents, self.latents[old]])
            ids = torch.cat([ids, self.ids[old]])
        return latents.float(), ids

    @torch.no_grad()
    def _make(self, generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
        drawn = self.task.training(rng, n, self.mix)
        pixels = torch.from_numpy(np.stack([self.task.render(each) for each in drawn])).to(self.device)
        frames = pixels.flatten(0, -4).permute(0, 3, 1, 2).float() / 127.5 - 1  # [n * F, 3, H, W]
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            mean = self.vae.encode(frames, return_dict=False)[0].mean.float()
        latents = (mean - self.shift) * self.scale
        ids = torch.tensor([self.parts.tokens(self.task.prompt(each)) for each in drawn], dtype=torch.int32)
        return self.parts.arrange(latents.unflatten(0, (n, -1))).bfloat16(), ids.to(self.device)


class DenoiserLoss:
    """Loss of one microbatch, for `Trainer`: mean squared error of what the denoiser predicts.

    Args:
        pool: where examples come from.
        noise: the process.
        bf16: whether matrix products run in bfloat16.
    """

    def __init__(self, pool: LatentPool, noise: Noise, bf16: bool = True) -> None:
        self.pool, self.noise, self.bf16 = pool, noise, bf16

    def __call__(
        self, model: nn.Module, generator: torch.Generator, update: int, index: int
    ) -> tuple[Tensor, dict[str, float]]:
        """As `Loss`; the numbers are the loss at noise levels above 0.5 and up to 0.5."""
        latents, ids = self.pool.draw(generator, update, index)
        batch, device = latents.shape[0], latents.device
        # One noise level from each of B equal parts: less noise in the gradient than B independent ones.
        uniform = (torch.rand(batch, generator=generator) + torch.randperm(batch, generator=generator)) / batch
        noise = torch.randn(latents.shape, generator=generator).to(device)
        dropped = (torch.rand(batch, generator=generator) < PROMPT_DROPOUT).to(device)
        ids = torch.where(dropped[:, None, None], self.pool.empty, ids).long()
        noisy, time, target, level = self.noise.corrupt(latents, noise, uniform)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
            predicted = model(noisy, time, ids)
        error = (predicted.float() - target).square().flatten(1).mean(1)
        numbers = {
            "high": error[level > 0.5].mean().nan_to_num().item(),
            "low": error[level <= 0.5].mean().nan_to_num().item(),
        }
        return error.mean(), numbers
