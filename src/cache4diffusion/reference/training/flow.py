"""Train the denoiser and the text encoders of ``scenes-flux`` by flow matching, on latents of fresh scenes.

    python -m cache4diffusion.reference.training.flow --vae runs/vae --folder runs/flow --minutes 240

The denoiser sees ``x = (1 - sigma) * latents + sigma * noise`` and predicts the velocity ``noise - latents``. One
caption in ten is left empty, which is what classifier-free guidance subtracts. Both text encoders learn along.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn

from cache4diffusion.reference.networks import (
    TEXT_LENGTH,
    build_text_encoder,
    build_text_encoder_2,
    build_tokenizer,
    build_transformer,
    build_vae,
    vocabulary,
)
from cache4diffusion.reference.scenes import TRAINING_MIX, draw_scene, render
from cache4diffusion.reference.training.options import facts_of, settings_of, training_parser
from cache4diffusion.reference.training.parallel import Trainer

CAPTION_DROPOUT = 0.1
SIGMA_MEAN, SIGMA_STD = 0.5, 1.2  # of the logit of the noise level


class FlowModel(nn.Module):
    """The trained parts of the pipeline: transformer, CLIP text encoder and T5 encoder."""

    def __init__(self, seed: int = 0, **transformer_overrides) -> None:
        super().__init__()
        self.transformer = build_transformer(seed, **transformer_overrides)
        self.text_encoder = build_text_encoder(seed)
        self.text_encoder_2 = build_text_encoder_2(seed)

    def forward(self, latents: Tensor, sigma: Tensor, ids: Tensor, ids_2: Tensor) -> Tensor:
        """Velocity ``[B, N, 32]`` at packed latents ``[B, N, 32]``, noise levels ``[B]`` and token ids ``[B, 16]``."""
        side = math.isqrt(latents.shape[1])
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        image_ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(latents)
        return self.transformer(
            hidden_states=latents,
            timestep=sigma,
            pooled_projections=self.text_encoder(ids).pooler_output,
            encoder_hidden_states=self.text_encoder_2(ids_2)[0],
            txt_ids=latents.new_zeros(ids_2.shape[1], 3),
            img_ids=image_ids,
            return_dict=False,
        )[0]


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter follows Muon: the matrices of attention and feed-forward layers of the transformer.

    Not those of the text encoders: their attention has no norm on queries and keys (T5's not even a scale), so that
    Muon's steps soon make it look at one word with all its weight, and then it learns no more.
    """
    return _is_inner(name)


def _is_inner(name: str) -> bool:
    return "transformer_blocks." in name and ".norm" not in name


def lr_scale(name: str) -> float:
    """Share of the learning rate that a parameter gets; those that follow Muon get all of it.

    The text encoders hardly move: as initialised they tell every word's neighbours, so which colour belongs to which
    shape can be read off, and the noise of larger steps washes just that away long before the denoiser asks for it.
    """
    if name.startswith("text_encoder"):
        return 0.02
    if name.startswith(("transformer.context_embedder.", "transformer.time_text_embed.text_embedder.")):
        return 0.1
    return 1.0 if _is_inner(name) else 0.3


def pack(latents: Tensor) -> Tensor:
    """``[B, 8, 16, 16]`` to ``[B, 64, 32]``, as `FluxPipeline` does."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


class _Attention(torch.autograd.Function):
    """Attention in plain matrix products.

    At 80 tokens the CPU's fused attention takes seven times longer, nearly all of it in its backward pass.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        shape, ctx.scale = q.shape, scale
        # Norms leave q and k in float32; v has the precision that autocast asked for.
        q, k, v = (x.reshape(-1, *x.shape[-2:]).to(v.dtype) for x in (q, k, v))
        with torch.autocast(v.device.type, enabled=False):
            logits = torch.bmm(q * scale, k.transpose(1, 2))
            if mask is not None:
                logits = (logits.view(*shape[:-1], -1) + mask.to(v.dtype)).view_as(logits)
            weights = torch.softmax(logits, -1)
            ctx.save_for_backward(q, k, v, weights)
            return torch.bmm(weights, v).view(shape)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, weights = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(-1, *grad.shape[-2:]).to(v.dtype)
        d_weights = torch.bmm(grad, v.transpose(1, 2))
        d_logits = (d_weights - (d_weights * weights).sum(-1, keepdim=True)) * weights * ctx.scale
        d_q, d_k = torch.bmm(d_logits, k), torch.bmm(d_logits.transpose(1, 2), q)
        return d_q.view(shape), d_k.view(shape), torch.bmm(weights.transpose(1, 2), grad).view(shape), None, None


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Within: attention of this process runs in plain matrix products, a faster way for short sequences."""
    fused = F.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if dropout_p or enable_gqa or query.shape[-2:] != key.shape[-2:]:
            return fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if is_causal:
            attn_mask = query.new_ones(query.shape[-2], query.shape[-2], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
        return _Attention.apply(query, key, value, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


class LatentPool:
    """Latents and captions of scenes, made by all processes, read by all.

    Encoding a scene costs a third of a training step on it. So each microbatch brings ``1 / reuse`` new scenes, draws
    the rest from the last ``size``, and every scene is met about ``reuse`` times, each time with other noise.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        first_update: int,
        batch: int,
        microbatches: int,
        size: int = 32768,
        reuse: int = 4,
        mix: Mapping[str, float] = TRAINING_MIX,
    ) -> None:
        self.mix = mix
        self.vae, self.first_update, self.batch, self.microbatches = vae.eval(), first_update, batch, microbatches
        self.size, self.reuse, self.filling = size, reuse, max(1, 2048 // (batch * microbatches))
        config = vae.config
        self.shift, self.scale = config["shift_factor"] or 0.0, config["scaling_factor"]
        self.device = next(vae.parameters()).device
        self.latents = torch.zeros(size, 64, 32, dtype=torch.bfloat16, device=self.device)
        self.ids = torch.zeros(size, 2, TEXT_LENGTH, dtype=torch.int32, device=self.device)
        if self.device.type == "cpu":
            self.latents.share_memory_()
            self.ids.share_memory_()
        self.index = {word: i for i, word in enumerate(vocabulary())}
        empty = ""
        tokenizers = [build_tokenizer(with_start=True), build_tokenizer(with_start=False)]
        self.empty = torch.stack([self._tokenise(t, [empty])[0] for t in tokenizers]).to(self.device)

    @staticmethod
    def _tokenise(tokenizer, captions: list[str]) -> Tensor:
        found = tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
        return found.input_ids.int()

    def _ids(self, caption: str) -> list[list[int]]:
        # The tokenizers' own rule, without their locks and threads, which do not survive a fork.
        words = [self.index[word] for word in caption.split()]
        rows = [[2, *words, 3], [*words, 3]]
        return [row + [0] * (TEXT_LENGTH - len(row)) for row in rows]

    def draw(self, generator: torch.Generator, update: int, microbatch: int) -> tuple[Tensor, Tensor]:
        """Latents ``[B, 64, 32]`` and token ids ``[B, 2, 16]`` of one microbatch."""
        done = update - self.first_update - 1  # updates of this call before this one
        fresh = self.batch if done < self.filling else max(1, self.batch // self.reuse)
        before = min(done, self.filling) * self.microbatches * self.batch
        before += max(0, done - self.filling) * self.microbatches * fresh
        latents, ids = self._make(generator, fresh)
        slots = (before + microbatch * fresh + torch.arange(fresh)) % self.size
        self.latents[slots], self.ids[slots] = latents, ids
        if fresh < self.batch:
            old = torch.randint(min(before, self.size), (self.batch - fresh,), generator=generator)
            latents = torch.cat([latents, self.latents[old]])
            ids = torch.cat([ids, self.ids[old]])
        return latents.float(), ids

    @torch.no_grad()
    def _make(self, generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
        families = rng.choices(tuple(self.mix), weights=tuple(self.mix.values()), k=n)
        scenes = [draw_scene(rng, family) for family in families]
        images = torch.from_numpy(np.stack([render(scene) for scene in scenes])).to(self.device)
        images = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            mean = self.vae.encode(images, return_dict=False)[0].mean.float()
        ids = torch.tensor([self._ids(scene.caption) for scene in scenes], dtype=torch.int32)
        return pack((mean - self.shift) * self.scale).bfloat16(), ids.to(self.device)


class FlowLoss:
    """Loss of one microbatch, for `Trainer`: mean squared error of the velocity.

    Args:
        pool: where scenes come from.
        bf16: whether matrix products run in bfloat16.
        sigma_mean: mean of the logit of the noise level.
    """

    def __init__(self, pool: LatentPool, bf16: bool = True, sigma_mean: float = SIGMA_MEAN) -> None:
        self.pool, self.bf16, self.sigma_mean = pool, bf16, sigma_mean

    def __call__(
        self, model: nn.Module, generator: torch.Generator, update: int, index: int
    ) -> tuple[Tensor, dict[str, float]]:
        """As `Loss`; the numbers are the loss at noise levels above 0.5 and up to 0.5."""
        latents, ids = self.pool.draw(generator, update, index)
        batch, device = latents.shape[0], latents.device
        # One noise level from each of B equal parts: less noise in the gradient than B independent ones.
        uniform = (torch.rand(batch, generator=generator) + torch.randperm(batch, generator=generator)) / batch
        normal = torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4))
        sigma = torch.sigmoid(self.sigma_mean + SIGMA_STD * normal).to(device)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        dropped = (torch.rand(batch, generator=generator) < CAPTION_DROPOUT).to(device)
        ids = torch.where(dropped[:, None, None], self.pool.empty, ids).long()
        noisy = torch.lerp(latents, noise, sigma[:, None, None])
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
            velocity = model(noisy, sigma, ids[:, 0], ids[:, 1])
        error = (velocity.float() - (noise - latents)).square().mean(dim=(1, 2))
        numbers = {
            "high": error[sigma > 0.5].mean().nan_to_num().item(),
            "low": error[sigma <= 0.5].mean().nan_to_num().item(),
        }
        return error.mean(), numbers


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


def load_model(folder: Path) -> FlowModel:
    """The averaged weights of a training folder."""
    model = FlowModel()
    found = load_file(folder / "ema.safetensors")
    expected = {name for name, _ in model.named_parameters()}  # tied weights once, as the trainer saves them
    if expected != set(found):
        raise ValueError(f"{folder} holds other parameters than this model: {sorted(expected ^ set(found))[:5]} ...")
    model.load_state_dict(found, strict=False)
    return model.eval().requires_grad_(False)


def _mix_of(text: str) -> dict[str, float]:
    """Read ``"position=0.5,color_attr=0.5"``."""
    try:
        mix = {name: float(share) for name, share in (entry.split("=") for entry in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write family=share,family=share") from None
    if not set(mix) <= set(TRAINING_MIX) or min(mix.values()) < 0 or sum(mix.values()) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: the families are {', '.join(TRAINING_MIX)}, shares 0 or more")
    return mix


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = training_parser(__doc__, minutes=240.0, cooldown=0.3, batch=16, seed=2)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the trained autoencoder")
    parser.add_argument(
        "--compile", action="store_true", help="compile the blocks: a minute's wait, then a quarter faster"
    )
    parser.add_argument(
        "--mix", type=_mix_of, default=TRAINING_MIX, help="shares of the families, e.g. position=0.5,color_attr=0.5"
    )
    parser.add_argument("--sigma-mean", type=float, default=SIGMA_MEAN, help="of the logit of the noise level")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    facts = facts_of(args) | {"mix": dict(args.mix), "sigma_mean": args.sigma_mean}
    vae = load_vae(args.vae).to(args.device)
    facts |= {"shift_factor": vae.config["shift_factor"], "scaling_factor": vae.config["scaling_factor"]}
    model = FlowModel(args.seed)
    if args.compile:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        model.transformer.compile_repeated_blocks(dynamic=False)
    trainer = Trainer(model, lambda *_: (torch.zeros(()), {}), settings_of(args), is_matrix, facts, lr_scale)
    pool = LatentPool(vae, trainer.history["updates"], args.batch, args.microbatches, mix=args.mix)
    trainer.loss = FlowLoss(pool, sigma_mean=args.sigma_mean)
    with plain_attention() if args.device == "cpu" else contextlib.nullcontext():
        trainer.run()


if __name__ == "__main__":
    main()
