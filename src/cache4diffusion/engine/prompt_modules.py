"""The site of modules that see nothing but the prompt: parts of the denoiser, not of its blocks."""

from __future__ import annotations

from collections.abc import Iterator

from cache4diffusion.anatomy import Anatomy, Part
from cache4diffusion.engine.parts import PartsDriver
from cache4diffusion.errors import AnatomyError
from cache4diffusion.sites import PromptModules


class PromptModulesDriver(PartsDriver):
    """Predicts what modules return that run once in a call, on nothing but the prompt."""

    site: PromptModules

    def all_sites(self) -> Iterator[tuple[int, str, Part]]:
        """One for each of them."""
        assert self.host.anatomy is not None
        for number, found in enumerate(self.host.anatomy.invariant):
            part = Part(
                found.path, "other", (((), "unknown"),), is_tokenwise=False, inputs=(), is_mutated=found.is_mutated
            )
            yield number, found.path, part

    def nothing_found(self, anatomy: Anatomy) -> AnatomyError:
        """Nothing is a function of the prompt alone."""
        return AnatomyError(
            f"No module of {anatomy.denoiser} works on the prompt alone: there is no text, or the timestep, a mask or "
            "the latent is in everything that is made of it. Methods that approximate may work: 'fora', 'taylorseer'."
        )
