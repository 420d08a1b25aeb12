"""Observing the first block's modulated input through a filter that follows the noise level (SeaCache)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cache4diffusion.engine.observers.signal import SignalObserver
from cache4diffusion.engine.state import Context
from cache4diffusion.errors import AnatomyError
from cache4diffusion.gates import Spectral

_TINY = 1e-16  # as in the released code


class SpectralObserver(SignalObserver):
    """Sees the signal, filtered."""

    watch: Spectral

    def install(self) -> None:
        """Find the watch point, and see that its tokens are an image's."""
        super().install()
        assert self.host.anatomy is not None
        if not self.watch.grid and self.host.anatomy.tokens is None:
            raise AnatomyError(
                f"{self.words} filters the tokens as a grid, and in {self.host.anatomy.denoiser} image and text are in "
                "one row when they enter the first block. Use a gate that filters nothing, as of 'teacache'."
            )

    def signal(self, context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The modulated input ``[B, N, D]`` as a grid, filtered, in its own shape and dtype."""
        plain = super().signal(context, args, kwargs)
        grid = self.watch.grid or grid_of(context, plain.shape[1])
        if not grid or math.prod(grid) != plain.shape[1]:
            raise AnatomyError(
                f"{self.words} filters the tokens as a grid, and how {plain.shape[1]} tokens lie in one could not be "
                f"told (grid={grid}): say so by grid=(rows, columns), or (frames, rows, columns)."
            )
        sigma = noise_level(context)
        shaped = plain.reshape(plain.shape[0], *grid, plain.shape[-1])
        return wiener(shaped, 1 - sigma, sigma, self.watch.power).reshape(plain.shape).to(plain.dtype)


def wiener(x: Tensor, a: float, b: float, power: float) -> Tensor:
    """Filter ``[B, *grid, D]`` along the axes of the grid, in float32."""
    axes = tuple(range(1, x.ndim - 1))
    gain = torch.ones((), device=x.device)
    for axis in axes:
        frequency = torch.fft.fftfreq(x.shape[axis], device=x.device).abs()
        signal = 1 / (frequency**power + _TINY)
        shape = [1] * x.ndim
        shape[axis] = -1
        gain = gain * (a * signal / (a * a * signal + b * b + _TINY)).reshape(shape)
    return torch.fft.ifftn(torch.fft.fftn(x.float(), dim=axes) * (gain / gain.mean()), dim=axes).real


def noise_level(context: Context) -> float:
    """``sigma`` of this step, from the scheduler's timesteps or from what the denoiser is told; 0 to 1, both open.

    Where tokens have timesteps of their own (the clean ones of a first frame), the largest counts.
    """
    run, extra = context.call.run, context.state.extra
    told = run.timesteps[context.step.index] if run.timesteps and context.step.index < len(run.timesteps) else None
    time = float(told if told is not None else torch.as_tensor(context.timestep).max())
    scale = extra.setdefault("time scale", 1000.0 if time > 1.5 else 1.0)  # a run begins at its largest timestep
    return min(max(time / scale, 1e-6), 1 - 1e-6)


def grid_of(context: Context, tokens: int) -> tuple[int, ...]:
    """How the image tokens lie in rows and columns (and frames), by the latent's axes or by position ids; or ()."""
    latent = context.latent
    if latent is not None and latent.ndim in (4, 5):
        *frames, height, width = latent.shape[2:]
        for stride in (1, 2, 4) if frames else (1,):
            count = frames[0] // stride if frames else 1
            patch = math.isqrt(max(count * height * width // tokens, 1))
            grid = (*([count] if frames else []), height // patch, width // patch)
            if math.prod(grid) == tokens:
                return grid
    for name, value in context.kwargs.items():
        if name.endswith("ids") and isinstance(value, Tensor) and value.ndim in (2, 3) and value.shape[-2] == tokens:
            ids = value.reshape(-1, tokens, value.shape[-1])[0].float()
            sizes = [int(size) for size in (ids.amax(0) - ids.amin(0) + 1).tolist()]
            grid = tuple(size for size in sizes[-3:] if size > 1) or (1,)
            if math.prod(grid) == tokens:
                return grid
    return ()
