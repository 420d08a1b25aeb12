"""Small random denoisers, a sampling loop, and FLUX's forward written out once more with its parts in the open."""

from __future__ import annotations

import copy

import diffusers
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import cache4diffusion as c4d
from cache4diffusion.calibration import Calibration
from cache4diffusion.engine import host
from weights import ready

TEXT, IMAGE = 5, 12


def flux(double: int = 2, single: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return ready(
        diffusers.FluxTransformer2DModel(
            in_channels=8,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=20,
            axes_dims_rope=(4, 6, 6),
        )
    )


def flux_inputs(batch: int = 1, seed: int = 0, controlnet: nn.Module | None = None) -> dict:
    """Row b is the same whatever the size of the batch."""
    rows = []
    for row in range(batch):
        generator = torch.Generator().manual_seed(100 * seed + row)
        rows.append([torch.randn(*size, generator=generator) for size in [(IMAGE, 8), (TEXT, 24), (20,)]])
    image, text, pooled = (torch.stack(parts) for parts in zip(*rows, strict=True))
    ids = torch.zeros(IMAGE, 3)
    ids[:, 1], ids[:, 2] = torch.arange(IMAGE) // 4, torch.arange(IMAGE) % 4
    kwargs = {
        "hidden_states": image,
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }
    if controlnet is not None:
        generator = torch.Generator().manual_seed(7)
        for name, blocks in [
            ("controlnet_block_samples", controlnet.transformer_blocks),
            ("controlnet_single_block_samples", controlnet.single_transformer_blocks),
        ]:
            kwargs[name] = [torch.randn(batch, IMAGE, 32, generator=generator) for _ in blocks]
    return kwargs


def dit(layers: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return ready(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=1000,
        )
    )


def dit_inputs(batch: int = 1) -> dict:
    rows = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(row)) for row in range(batch)]
    return {"hidden_states": torch.stack(rows), "class_labels": torch.arange(batch), "return_dict": False}


def unet() -> nn.Module:
    torch.manual_seed(1)
    return ready(
        diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=4,
            norm_num_groups=4,
        )
    )


def unet_inputs(batch: int = 1) -> dict:
    generator = torch.Generator().manual_seed(3)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 5, 12, generator=generator),
        "return_dict": False,
    }


_LATENTS = ("hidden_states", "sample")


def sample(denoise, inputs: dict, steps: int, *, speed: float = 1.0, before=None) -> list[torch.Tensor]:
    """An Euler loop; returns the denoiser's output of every step.

    Args:
        denoise: called like the denoiser.
        inputs: arguments of the first step, without the timestep.
        steps: how many.
        speed: scale of an update: how much the latent changes from step to step.
        before: called with the step index before each call.
    """
    inputs, outputs = dict(inputs), []
    latent = next(name for name in _LATENTS if name in inputs)
    is_index = "class_labels" in inputs or latent == "sample"  # these take 0 .. 999
    x = inputs[latent]
    with torch.no_grad():
        for i in range(steps):
            if before is not None:
                before(i)
            t = 1 - i / steps
            clock = torch.full((x.shape[0],), round(999 * t)) if is_index else torch.full((x.shape[0],), t)
            (out,) = denoise(**{**inputs, latent: x, "timestep": clock})
            outputs.append(out.clone())
            x = x - out[:, : x.shape[1]] * speed / steps
    return outputs


def accelerated(denoiser: nn.Module, inputs: dict, steps: int, method, *, speed: float = 1.0, **settings):
    """Outputs of every step, the handle's trace, and its figures."""
    with c4d.accelerate(denoiser, method, **settings) as handle:
        with handle.run(num_steps=steps):
            outputs = sample(denoiser, inputs, steps, speed=speed)
        return outputs, handle.trace, handle.stats


def rows_of(inputs: dict, row: int) -> dict:
    """The inputs of one row of a batch."""
    batch = next(inputs[name] for name in _LATENTS if name in inputs).shape[0]
    whole = ("img_ids", "txt_ids")

    def one(value):
        return value[row : row + 1] if isinstance(value, torch.Tensor) and value.shape[0] == batch else value

    return {
        name: value if name in whole else [one(v) for v in value] if isinstance(value, list) else one(value)
        for name, value in inputs.items()
    }


def differences(reached: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    """Relative difference at every step."""
    return [
        float((a - b).norm() / b.norm()) if not torch.equal(a, b) else 0.0
        for a, b in zip(reached, expected, strict=True)
    ]


_SEEN: dict = {}


def remember_anatomy(monkeypatch) -> None:
    """Observe each denoiser once per way of calling it; observing is tested elsewhere and takes most of a small run."""
    observe = host.observe

    def remembered(denoiser, args, kwargs):
        given = sorted((name, getattr(value, "shape", None)) for name, value in kwargs.items() if value is not None)
        key = (id(denoiser), len(args), str(given))
        if key not in _SEEN:
            _SEEN[key] = (denoiser, observe(denoiser, args, kwargs))  # kept alive: no other gets its id
        return _SEEN[key][1]

    monkeypatch.setattr(host, "observe", remembered)


class LinearCounter(TorchFunctionMode):
    """Counts matrix products with given weights: a hook would also see modules whose forward is bypassed."""

    def __init__(self, modules) -> None:
        super().__init__()
        self.weights, self.count = {id(module.weight) for module in modules}, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear and id(args[1]) in self.weights:
            self.count += 1
        return func(*args, **(kwargs or {}))


# -- FLUX, slowly ----------------------------------------------------------------------------------------------------


# Parts of `flux()` in the order in which they run, by the slow references' names for them, and their kinds.
FLUX_PARTS = {
    **{
        f"double.{i}.{part}": kind
        for i in range(2)
        for part, kind in {"attn": "attn", "ffn": "ffn", "text_ffn": "ffn"}.items()
    },
    **{f"single.{i}": "fused" for i in range(3)},
}


def path_of(name: str) -> str:
    """The path of one of them."""
    if name.startswith("single"):
        return f"single_transformer_blocks.{name[-1]}.proj_out"
    _, layer, part = name.split(".")
    return f"transformer_blocks.{layer}.{ {'attn': 'attn', 'ffn': 'ff', 'text_ffn': 'ff_context'}[part] }"


def made_by_hand(method: str, tables: dict, **settings) -> Calibration:
    """A calibration of FLUX with a table per part, under the slow references' names; a row per step."""
    fit = {path_of(name): table for name, table in tables.items()}
    return Calibration.by_hand(method, len(next(iter(tables.values()))), fit, **settings)


class Plainly:
    """What to do with each part of FLUX: here, compute it. References override this."""

    def begin(self, step: int) -> None:
        """A step begins."""

    def attn(self, name, block, image, text, rope):
        """Joint attention of a two-stream block: outputs of both streams."""
        return block.attn(hidden_states=image, encoder_hidden_states=text, image_rotary_emb=rope)

    def ffn(self, name, module, x, layer, stream):
        """MLP of one stream."""
        return module(x)

    def fused(self, name, block, x, rope, layer):
        """Attention, MLP and their common projection of a single-stream block."""
        return block.proj_out(torch.cat([self.inner_attn(block, x, rope), block.act_mlp(block.proj_mlp(x))], dim=2))

    @staticmethod
    def inner_attn(block, x, rope):
        """Un-projected attention of a single-stream block."""
        return block.attn(hidden_states=x, image_rotary_emb=rope)


class Alike(Plainly):
    """Every part handled by `give`, whatever its kind. References of that sort override it."""

    def give(self, name, kind, entering, compute):
        """What the block goes on with: a tensor, of attention one per stream.

        Args:
            name, kind: as in `FLUX_PARTS`.
            entering: the modulated inputs, one per stream.
            compute: runs the part.
        """
        raise NotImplementedError

    def attn(self, name, block, image, text, rope):
        return self.give(name, "attn", [image, text], lambda: super(Alike, self).attn(name, block, image, text, rope))

    def ffn(self, name, module, x, layer, stream):
        return self.give(name, "ffn", [x], lambda: super(Alike, self).ffn(name, module, x, layer, stream))

    def fused(self, name, block, x, rope, layer):
        return self.give(name, "fused", [x], lambda: super(Alike, self).fused(name, block, x, rope, layer))


class PerPart(Alike):
    """Every part has its update steps; on others its outputs are those of the last one."""

    def __init__(self, updates):
        self.updates, self.kept, self.step = updates, {}, -1

    def begin(self, step):
        self.step = step

    def give(self, name, kind, entering, compute):
        if self.step in self.updates[name]:
            self.kept[name] = compute()
        return self.kept[name]


class SlowFlux:
    """FLUX's forward from its own sub-modules, block by block, with every part handed to ``parts``."""

    def __init__(self, model: nn.Module, parts: Plainly) -> None:
        self.model, self.parts, self.step = copy.deepcopy(model), parts, -1

    def embed(self, kwargs: dict):
        """Image tokens, text tokens, timestep embedding, rotary tables."""
        model = self.model
        image = model.x_embedder(kwargs["hidden_states"])
        text = model.context_embedder(kwargs["encoder_hidden_states"])
        temb = model.time_text_embed(kwargs["timestep"] * 1000, kwargs["pooled_projections"])
        return image, text, temb, model.pos_embed(torch.cat((kwargs["txt_ids"], kwargs["img_ids"]), dim=0))

    def head(self, image, temb):
        """Final norm and projection."""
        return (self.model.proj_out(self.model.norm_out(image, temb)),)

    def double(self, layer, image, text, temb, rope):
        """A two-stream block."""
        block, name = self.model.transformer_blocks[layer], f"double.{layer}"
        x, gate_attn, shift, scale, gate_ffn = block.norm1(image, emb=temb)
        y, text_gate_attn, text_shift, text_scale, text_gate_ffn = block.norm1_context(text, emb=temb)
        image_attn, text_attn = self.parts.attn(f"{name}.attn", block, x, y, rope)
        image = image + gate_attn[:, None] * image_attn
        x = block.norm2(image) * (1 + scale[:, None]) + shift[:, None]
        image = image + gate_ffn[:, None] * self.parts.ffn(f"{name}.ffn", block.ff, x, layer, "image")
        text = text + text_gate_attn[:, None] * text_attn
        y = block.norm2_context(text) * (1 + text_scale[:, None]) + text_shift[:, None]
        text = text + text_gate_ffn[:, None] * self.parts.ffn(f"{name}.text_ffn", block.ff_context, y, layer, "text")
        return image, text

    def single(self, layer, image, text, temb, rope):
        """A single-stream block on the joined tokens, text first."""
        block, count = self.model.single_transformer_blocks[layer], text.shape[1]
        joint = torch.cat([text, image], dim=1)
        x, gate = block.norm(joint, emb=temb)
        joint = joint + gate[:, None] * self.parts.fused(f"single.{layer}", block, x, rope, layer)
        return joint[:, count:], joint[:, :count]

    def blocks(self):
        """All blocks in order, each a function of (image, text, temb, rope)."""
        double, single = self.model.transformer_blocks, self.model.single_transformer_blocks
        calls = [lambda *a, i=i: self.double(i, *a) for i in range(len(double))]
        return calls + [lambda *a, i=i: self.single(i, *a) for i in range(len(single))]

    def through(self, image, text, temb, rope):
        """Run all blocks. References of span methods override this."""
        for block in self.blocks():
            image, text = block(image, text, temb, rope)
        return image, text

    def __call__(self, **kwargs):
        self.step += 1
        self.parts.begin(self.step)
        image, text, temb, rope = self.embed(kwargs)
        image, text = self.through(image, text, temb, rope)
        return self.head(image, temb)
