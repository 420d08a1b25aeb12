"""Guidance in loops of one's own, with both branches in one call or one call each."""

from __future__ import annotations

import torch
from slow_modules import timesteps_of

SCALE = 3.0


class Prompted:
    """A denoiser, a latent and two prompts: the unconditional one first.

    Args:
        denoiser: of the zoo, or a U-Net of the tests.
        latent: name of the argument.
        shape: of the latent, without the batch.
        text: tokens and width.
    """

    def __init__(self, denoiser, latent, shape, text=(5, 12), batch=2):
        rng = torch.Generator().manual_seed(5)
        self.denoiser, self.name, self.batch = denoiser, latent, batch
        self.start = torch.randn(batch, *shape, generator=rng)
        self.uncond, self.cond = (torch.randn(batch, *text, generator=rng) for _ in range(2))

    def call(self, denoiser, x, time, text):
        given = {self.name: x, "timestep": torch.full((x.shape[0],), time), "encoder_hidden_states": text}
        return denoiser(**given, return_dict=False)[0]

    def step(self, x, output, steps):
        return x - output.reshape(-1)[: x.numel()].reshape(x.shape).tanh() / steps

    @torch.no_grad()
    def batched(self, steps, denoiser=None, first=None):
        """Both branches in one call; the guided output of every step."""
        x, outputs = self.start, []
        for i, time in enumerate(timesteps_of(steps)):
            if first is not None:
                first(i)
            both = self.call(denoiser or self.denoiser, torch.cat([x, x]), time, torch.cat([self.uncond, self.cond]))
            uncond, cond = both.chunk(2)
            outputs.append(uncond + SCALE * (cond - uncond))
            x = self.step(x, outputs[-1], steps)
        return outputs

    @torch.no_grad()
    def sequential(self, steps, denoiser=None, first=None):
        """The conditional branch first."""
        x, outputs = self.start, []
        for i, time in enumerate(timesteps_of(steps)):
            if first is not None:
                first(i)
            cond = self.call(denoiser or self.denoiser, x, time, self.cond)
            uncond = self.call(denoiser or self.denoiser, x, time, self.uncond)
            outputs.append(uncond + SCALE * (cond - uncond))
            x = self.step(x, outputs[-1], steps)
        return outputs


def assert_near(reached, expected, tolerance=2e-5):
    for step, (a, b) in enumerate(zip(reached, expected, strict=True)):
        assert float((a - b).norm() / b.norm()) < tolerance, f"step {step}"
