"""A folder like that of scenes-flux, tiny and untrained."""

import json

import torch

from cache4diffusion.reference.folder import save_folder
from cache4diffusion.reference.networks import build_vae
from cache4diffusion.reference.parts import FluxParts


def save(folder):
    """Write it; returns the folder."""
    vae = build_vae(block_out_channels=(4, 8, 8, 8), layers_per_block=1, norm_num_groups=2)
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    model = FluxParts(0, num_layers=1, num_single_layers=2, num_attention_heads=1)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    folder = save_folder(folder, vae, model, card="# tiny")
    (folder / "facts.json").write_text(json.dumps({}))
    return folder
