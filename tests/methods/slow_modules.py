"""The obvious way to cache what modules return: a copy of the denoiser whose modules' ``forward`` is replaced."""

from __future__ import annotations

import copy
import functools

import torch

import cache4diffusion as c4d
from cache4diffusion.zoo import tiny


class SlowModules:
    """A copy of a denoiser in which a rule stands in front of some modules.

    Args:
        denoiser: is copied.
        rule: called as ``rule(path, compute, args, kwargs)`` in place of every module whose path ends with one of
            ``ends``.
        ends: of paths.
    """

    def __init__(self, denoiser, rule, ends):
        self.denoiser = copy.deepcopy(denoiser)
        for path, module in self.denoiser.named_modules():
            if path.endswith(tuple(ends)):
                self._stand_in_front(path, module, rule)

    def _stand_in_front(self, path, module, rule):
        compute = module.forward

        def forward(*args, **kwargs):
            return rule(path, lambda: compute(*args, **kwargs), args, kwargs)

        module.forward = forward

    def __call__(self, *args, **kwargs):
        return self.denoiser(*args, **kwargs)


def timesteps_of(steps):
    """Evenly spaced, on a scale of 1000."""
    return [1000.0 - 1000.0 * i / steps for i in range(steps)]


def made(name, batch=2):
    """A tiny denoiser of the zoo, the same every time, and the arguments of a call."""
    denoiser, kwargs = _made(name, batch)
    return denoiser, {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()}


@functools.cache
def _made(name, batch):
    denoiser, _, kwargs = tiny(name).make(batch)
    return denoiser, kwargs


@torch.no_grad()
def sample(denoiser, inputs, steps, times=None, first=None):
    """The denoiser's output at every step of a loop of one's own.

    Args:
        denoiser: or what is slow.
        inputs: arguments of a call by name, the latent first.
        steps: how many.
        times: timesteps.
        first: called with the number of every step before it.
    """
    name = next(iter(inputs))
    x, outputs = inputs[name], []
    for step, time in enumerate(times or timesteps_of(steps)):
        if first is not None:
            first(step)
        given = inputs | {name: x, "timestep": torch.full_like(inputs["timestep"], time)}
        output = denoiser(**given, return_dict=False)[0]
        outputs.append(output)
        flat = output.reshape(-1).repeat(-(-x.numel() // output.numel()))
        x = x - flat[: x.numel()].reshape(x.shape).tanh() / steps
    return outputs


def accelerated(denoiser, inputs, steps, method, times=None, **settings):
    """The same loop under a method, and its handle."""
    with (
        c4d.accelerate(denoiser, method, **settings) as handle,
        handle.run(timesteps=times or timesteps_of(steps)),
    ):
        return sample(denoiser, inputs, steps, times), handle
