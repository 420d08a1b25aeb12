"""A loop with a scheduler and guidance, and the same loop written out for references that act on the trajectory."""

import copy

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import cache4diffusion as c4d
import toys

GUIDANCE = 2.0


def field():
    """A small denoiser ``(x, timestep, context)``."""

    def make():
        return toys.randomise(toys.Blocks(dim=8, count=2), std=0.3)

    return toys.seeded(make)().double().requires_grad_(False)


def start(batch=2):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(batch, 6, 4, generator=g).double()
    return x, [torch.randn(1, 1, 8, generator=g).double() for _ in range(2)]


def guide(outputs):
    return outputs[0] if len(outputs) == 1 else outputs[1] + GUIDANCE * (outputs[0] - outputs[1])


@torch.no_grad()
def loop(denoiser, scheduler, steps, branches=2, return_dict=False):
    """The latent after every step."""
    x, contexts = start()
    scheduler.set_timesteps(steps)
    latents = []
    for t in scheduler.timesteps:
        time = (t.double() / 1000).expand(x.shape[0])
        velocity = guide([denoiser(x, time, context=context) for context in contexts[:branches]])
        made = scheduler.step(velocity, t, x, return_dict=return_dict)
        x = made.prev_sample if return_dict else made[0]
        latents.append(x)
    return latents


def steered(name, steps, branches=2, scheduler=None, **settings):
    """Latents, strip and handle figures of a run under a method."""
    scheduler = FlowMatchEulerDiscreteScheduler() if scheduler is None else scheduler
    with c4d.accelerate(field(), name, **settings) as handle:
        handle.watch_scheduler(scheduler)
        latents = loop(handle._engines[0].denoiser, scheduler, steps, branches)
        return latents, handle.trace.strip(), handle


class Slow:
    """The loop again: noise levels, a plain guided velocity, and Euler steps; references override ``velocity``."""

    def __init__(self, steps, branches=2):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(steps)
        self.sigmas, self.times = scheduler.sigmas, scheduler.timesteps
        self.denoiser, self.steps, self.branches = copy.deepcopy(field()), steps, branches

    @torch.no_grad()
    def compute(self, i, x):
        contexts = start()[1][: self.branches]
        time = (self.times[i].double() / 1000).expand(x.shape[0])
        return guide([self.denoiser(x, time, context=context) for context in contexts])

    def advance(self, i, x, velocity):
        return x + (self.sigmas[i + 1] - self.sigmas[i]) * velocity

    def velocity(self, i, x):
        return self.compute(i, x)

    def run(self):
        x, latents = start()[0], []
        for i in range(self.steps):
            x = self.advance(i, x, self.velocity(i, x))
            latents.append(x)
        return latents


def assert_close(found, expected, tolerance=1e-5):
    """Schedulers step in float32."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"step {i}: {m}")
