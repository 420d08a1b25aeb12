"""What observation cannot know of a few classes, declared: a row per class, and why it needs one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from cache4diffusion.anatomy.undisturbed import unwrapped


@dataclass(frozen=True)
class Hint:
    """Declared facts of one class.

    Args:
        why: what cannot be seen.
        latent: name of the argument that is denoised; None: seen.
        has_clock: whether an argument tells the noise level.
    """

    why: str
    latent: str | None = None
    has_clock: bool = True


HINTS: dict[str, Hint] = {
    "Cosmos3OmniTransformer": Hint(
        "its first argument is the prompt, and what is denoised is packed into one row of tokens",
        latent="vision_tokens",
    ),
    "T5FilmDecoder": Hint("its first argument is what was encoded", latent="decoder_input_tokens"),
    "UVit2DModel": Hint(
        "it denoises indices of a codebook, and masked ones among them show how far the run is",
        latent="input_ids",
        has_clock=False,
    ),
}
"""By class name."""

NOTHING = Hint("")


def hint_of(denoiser: nn.Module) -> Hint:
    """What is declared of a denoiser's class; `NOTHING` if nothing is."""
    return HINTS.get(type(unwrapped(denoiser)).__name__, NOTHING)
