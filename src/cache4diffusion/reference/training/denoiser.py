"""Train the denoiser of a reference model, and the text encoders that learn along, on latents of fresh examples.

    python -m cache4diffusion.reference.training.denoiser scenes-dit --folder runs/scenes-dit
    python -m cache4diffusion.reference.training.denoiser scenes-flux --vae runs/vae --folder runs/flow --minutes 240

Without ``--minutes`` it takes as many updates as ``--updates`` says, or as the model's description does. One example in
ten has no prompt, which is what classifier-free guidance subtracts. What a model takes over from
``scenes-flux`` (`cache4diffusion.reference.models`) is read from its folder.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import nn

from cache4diffusion.errors import Cache4DiffusionError
from cache4diffusion.reference.folder import load
from cache4diffusion.reference.models import MODELS, ReferenceModel, model_named
from cache4diffusion.reference.networks import build_vae
from cache4diffusion.reference.noise import FlowMatching
from cache4diffusion.reference.parts import Parts
from cache4diffusion.reference.scenes import draw_scene, render
from cache4diffusion.reference.training.attention import plain_attention
from cache4diffusion.reference.training.latents import DenoiserLoss, LatentPool
from cache4diffusion.reference.training.options import facts_of, settings_of, training_parser
from cache4diffusion.reference.training.parallel import Trainer, TrainSettings


def trainer_of(
    model: ReferenceModel,
    settings: TrainSettings,
    vae: AutoencoderKL,
    batch: int,
    facts: dict[str, Any] | None = None,
    parts: Parts | None = None,
) -> Trainer:
    """What trains the denoiser of ``model``.

    Args:
        model: what is trained; its ``training``, ``task`` and ``noise`` hold.
        settings: of the loop.
        vae: its scaling and shift set.
        batch: examples per microbatch.
        facts: recorded in the history.
        parts: other ones than those that the model makes.
    """
    parts = parts or model.parts(settings.seed)
    vae = vae.to(settings.device)  # type: ignore[arg-type]
    trainer = Trainer(parts, lambda *_: (torch.zeros(()), {}), settings, parts.is_matrix, facts, parts.lr_scale)
    updates, kept = trainer.history["updates"], model.training
    pool = LatentPool(
        vae, parts, model.task, updates, batch, settings.microbatches, kept.pool, kept.reuse, model.task.mix
    )
    trainer.loss = DenoiserLoss(pool, model.noise)
    return trainer


def load_vae(folder: Path) -> AutoencoderKL:
    """The averaged autoencoder of a training folder, with scaling and shift measured on 512 scenes.

    The normalised latents have mean 0 and standard deviation 1 over all channels together.
    """
    vae = build_vae()
    vae.load_state_dict(load_file(folder / "ema.safetensors"))
    vae.eval().requires_grad_(False)
    rng = random.Random("latent statistics")
    with torch.no_grad():
        means = []
        for _ in range(32):
            images = np.stack([render(draw_scene(rng)) for _ in range(16)])
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
            means.append(vae.encode(pixels, return_dict=False)[0].mean)
    latents = torch.cat(means)
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )
    return vae


def shared_vae() -> AutoencoderKL:
    """The autoencoder of ``scenes-flux``, without its shift, which is next to nothing and other pipelines know none."""
    vae: Any = load("scenes-flux").vae
    vae.register_to_config(shift_factor=None)
    return vae.eval().requires_grad_(False)


def vae_of(model: ReferenceModel, folder: Path | None) -> AutoencoderKL:
    """The autoencoder that a model is trained with: its own, from a training folder, or the shared one.

    Raises:
        FileNotFoundError: it has its own, and there is none in the folder.
    """
    if not model.has_own_vae:
        return shared_vae()
    if folder is None or not (folder / "ema.safetensors").exists():
        raise FileNotFoundError(f"{folder} holds no checkpoint (ema.safetensors) of an autoencoder; train vae first.")
    return load_vae(folder)


def load_parts(model: ReferenceModel, folder: Path) -> Parts:
    """The averaged weights of a training folder.

    Raises:
        ValueError: they are of another network.
    """
    parts = model.parts(0)
    found = load_file(folder / "ema.safetensors")
    # Tied weights once, as the trainer saves them; what does not learn is in place already.
    expected = {name for name, parameter in parts.named_parameters() if parameter.requires_grad}
    if expected != set(found):
        raise ValueError(f"{folder} holds other parameters than this model: {sorted(expected ^ set(found))[:5]} ...")
    parts.load_state_dict(found, strict=False)
    return parts.eval().requires_grad_(False)


def _mix_of(text: str) -> dict[str, float]:
    """Read ``"position=0.5,color_attr=0.5"``."""
    try:
        mix = {name: float(share) for name, share in (entry.split("=") for entry in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write family=share,family=share") from None
    if min(mix.values()) < 0 or sum(mix.values()) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: shares are 0 or more, and some of them more")
    return mix


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = training_parser(__doc__, lr=None, microbatches=None)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--vae", type=Path, help="folder of the trained autoencoder, for scenes-flux")
    parser.add_argument(
        "--compile", action="store_true", help="compile the blocks: a minute's wait, then a quarter faster"
    )
    parser.add_argument("--mix", type=_mix_of, help="shares of the families, e.g. position=0.5,color_attr=0.5")
    parser.add_argument("--sigma-mean", type=float, help="of the logit of the noise level, in flow matching")
    args = parser.parse_args(argv)
    model = model_named(args.model)
    if args.minutes is None:
        args.minutes = math.inf
        args.updates = model.training.updates if args.updates < 0 else args.updates
    for name in ("batch", "microbatches", "cooldown", "lr", "seed"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(model.training, name))
    try:
        if args.mix is not None:
            unknown = set(args.mix) - set(model.task.mix)
            if unknown:
                asked = ",".join(f"{family}={share:g}" for family, share in args.mix.items())
                parser.error(f"--mix {asked}: the families of {model.name} are {', '.join(model.task.mix)}")
            model = replace(model, task=replace(model.task, mix=args.mix))
        if args.sigma_mean is not None:
            if not isinstance(model.noise, FlowMatching):
                parser.error(f"--sigma-mean is for flow matching; {model.name} has {model.noise.words}")
            model = replace(model, noise=replace(model.noise, mean=args.sigma_mean))
        train(model, args)
    except (Cache4DiffusionError, OSError) as error:
        parser.exit(2, f"denoiser: {error}\n")


def compile_blocks(denoiser: Any) -> None:
    """Compile the blocks that diffusers calls repeated, or where it names none, all in the denoiser's lists."""
    if getattr(denoiser, "_repeated_blocks", None):
        denoiser.compile_repeated_blocks(dynamic=False)
        return
    for blocks in denoiser.children():
        for block in blocks if isinstance(blocks, nn.ModuleList) else ():
            block.compile(dynamic=False)


def train(model: ReferenceModel, args: argparse.Namespace) -> None:
    """Train ``model`` as the options say."""
    torch.set_num_threads(1)
    vae = vae_of(model, args.vae)
    facts = facts_of(args) | {"mix": dict(model.task.mix)}
    if isinstance(model.noise, FlowMatching):
        facts["sigma_mean"] = model.noise.mean
    facts |= {"shift_factor": vae.config["shift_factor"], "scaling_factor": vae.config["scaling_factor"]}
    parts = model.parts(args.seed)
    if args.compile:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        compile_blocks(getattr(parts, model.denoiser))
    trainer = trainer_of(model, settings_of(args), vae, args.batch, facts, parts)
    with plain_attention() if args.device == "cpu" else contextlib.nullcontext():
        trainer.run()


if __name__ == "__main__":
    main()
