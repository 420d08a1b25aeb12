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
        image: name of the blocks' argument that is the image, where the text may reach the output as well.
    """

    why: str
    latent: str | None = None
    has_clock: bool = True
    image: str | None = None


HINTS: dict[str, Hint] = {
    "Cosmos3OmniTransformer": Hint(
        "its first argument is the prompt; text and image are packed into one row, from which both are read",
        latent="vision_tokens",
        image="gen_seq",
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
