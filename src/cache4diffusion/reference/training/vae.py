"""Train the autoencoder of the reference pipelines on scenes.

    python -m cache4diffusion.reference.training.vae --folder runs/vae --minutes 30

Loss: L1 of pixels, plus L1 of neighbouring differences (edges), plus a small KL term that keeps the latents smooth.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cache4diffusion.reference.networks import build_vae
from cache4diffusion.reference.scenes import draw_scene, render
from cache4diffusion.reference.training.options import facts_of, settings_of, training_parser
from cache4diffusion.reference.training.parallel import Trainer

EDGE_WEIGHT = 0.5
KL_WEIGHT = 5e-4


def scene_images(generator: torch.Generator, batch: int) -> Tensor:
    """Fresh scenes in -1..1: ``[batch, 3, 128, 128]``."""
    rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
    images = np.stack([render(draw_scene(rng)) for _ in range(batch)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


class VaeLoss:
    """Loss of one microbatch, for `Trainer`."""

    def __init__(self, batch: int, device: str = "cpu", bf16: bool = True) -> None:
        self.batch, self.device, self.bf16 = batch, torch.device(device), bf16

    def __call__(
        self, vae: Any, generator: torch.Generator, update: int, index: int
    ) -> tuple[Tensor, dict[str, float]]:
        """As `Loss`; the numbers are the parts of the loss and the spread of the latents."""
        images = scene_images(generator, self.batch)
        noise = torch.randn(self.batch, 8, images.shape[2] // 8, images.shape[3] // 8, generator=generator)
        images, noise = images.to(self.device), noise.to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            posterior = vae.encode(images).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            decoded = vae.decode(mean + std * noise).sample
        error = decoded.float() - images
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        loss = error.abs().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * kl
        numbers = {
            "mse": F.mse_loss(decoded.float().clamp(-1, 1), images).item(),
            "edges": edges.item(),
            "kl": kl.item(),
            "posterior_std": std.mean().item(),
            "latent_std": mean.std().item(),
        }
        return loss, numbers


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    args = training_parser(__doc__, minutes=30.0, cooldown=0.6, batch=4, seed=1).parse_args(argv)
    torch.set_num_threads(1)
    loss = VaeLoss(args.batch, args.device)
    Trainer(
        build_vae(args.seed), loss, settings_of(args), is_matrix=lambda name, p: ".conv" in name, facts=facts_of(args)
    ).run()


if __name__ == "__main__":
    main()
