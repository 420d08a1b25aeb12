"""Places, tokens and denoisers of the tests of methods that compute fewer tokens."""

import torch

import anatomy_zoo
from cache4diffusion.gates import Step
from cache4diffusion.tokens import Segment, TokenPlace
from small_denoisers import dit, dit_inputs, unet, unet_inputs


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def place(height=4, width=6, step=0, batch=2, twins=None, layer=0, frames=1, part="a"):
    segment = Segment("image", 0, frames * height * width, (frames, height, width))
    return TokenPlace(part, "block", layer, 4, Step(step, 50), (segment,), batch, twins)


def tokens(height=4, width=6, batch=2, dim=5, seed=0):
    return torch.randn(batch, height * width, dim, generator=rng(seed))


def case(kind, batch=2):
    if kind == "unet":
        return unet(), unet_inputs(batch)
    if kind == "pixart":
        mask = torch.ones(batch, 5)
        mask[0, 3:] = 0
        return anatomy_zoo.pixart()[0], {
            "hidden_states": torch.randn(batch, 4, 8, 8, generator=rng(5)),
            "encoder_hidden_states": torch.randn(batch, 5, 12, generator=rng(6)),
            "encoder_attention_mask": mask,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "return_dict": False,
        }
    return dit(), dit_inputs(batch)


def twins_of(kind):
    """Both halves of guidance on one latent."""
    denoiser, inputs = case(kind)
    latent = "sample" if kind == "unet" else "hidden_states"
    return denoiser, {**inputs, latent: inputs[latent][:1].repeat(2, 1, 1, 1)}
