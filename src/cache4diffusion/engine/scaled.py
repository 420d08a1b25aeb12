"""The scaled-parts site: cached parts, and an output that is divided by a number on every step."""

from __future__ import annotations

from typing import Any

from cache4diffusion.engine.denoiser import scaled
from cache4diffusion.engine.driver import Inner
from cache4diffusion.engine.leaves import take_apart
from cache4diffusion.engine.parts import PartsDriver
from cache4diffusion.engine.state import Context
from cache4diffusion.sites import ScaledParts


class ScaledPartsDriver(PartsDriver):
    """Predicts parts, and divides what comes out."""

    site: ScaledParts

    def run(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As parts do, then divide."""
        output = super().run(context, inner, args, kwargs)
        if self.site.divisor == 1:
            return output
        assert context.latent is not None  # a call without one is not taken part in
        latent = context.latent
        tensors, layout = take_apart(output)
        return layout.fill([scaled(tensor, latent, 1 / self.site.divisor) for tensor in tensors])
