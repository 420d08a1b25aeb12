"""Places, tokens, denoisers and a guard of the tests of methods that compute fewer tokens."""

import diffusers
import torch
from torch.overrides import TorchFunctionMode

import anatomy_zoo
from cache4diffusion import devices
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


def unet_of_two_levels():
    torch.manual_seed(1)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def with_streams(monkeypatch):
    """Tensors without values are on a device that copies while the host goes on."""
    found = devices.streams_of
    monkeypatch.setattr(devices, "streams_of", lambda device: "some" if device.type == "meta" else found(device))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda made: made)


class Waits(TorchFunctionMode):
    """Copies to another device that wait for it."""

    def __init__(self):
        super().__init__()
        self.seen, self.copies = [], 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.to and args[0].device != out.device:
            self.copies += 1
            if not (kwargs or {}).get("non_blocking"):
                self.seen.append((args[0].shape, args[1:]))
        return out
