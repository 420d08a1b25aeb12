"""Tiny random denoisers and pipelines that behave like the real ones, the loops around them, and what is watched in
tests: which modules ran, and what an object's ``__dict__`` held."""

from __future__ import annotations

import copy
import functools
from contextlib import contextmanager

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import nn

import cache4diffusion as c4d
from cache4diffusion.calibration import Calibration
from cache4diffusion.predictors import LinearPredictor
from cache4diffusion.sites import PART_KINDS, Reduced, Trajectory

_DOUBLE = {"attn": "attn", "attn1": "attn", "ff": "ffn", "ff_context": "ffn"}

WIDTH = 32  # of every small denoiser that all methods meet
_LINEARS = {  # output and input of each linear layer, by the end of its path
    ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"): (WIDTH, WIDTH),
    ("net.0.proj", "proj_mlp"): (4 * WIDTH, WIDTH),
    ("net.2",): (WIDTH, 4 * WIDTH),
    ("proj_out",): (WIDTH, 5 * WIDTH),
    ("ff.0",): (2 * WIDTH, WIDTH),
    ("ff.2",): (WIDTH, 2 * WIDTH),
}
_PARTS = [
    *(f"transformer_blocks.{i}.{part}." for i in range(3) for part in ("attn", "attn1", "ff", "ff_context")),
    *(f"single_transformer_blocks.{i}.{part}" for i in range(3) for part in ("attn.", "")),
    *(f"blocks.{i}." for i in range(3)),
]


def _factors():
    """Of rank 2 for every linear layer of FLUX, of DiT and of `Blocks` (and for some that are none)."""
    g, found = torch.Generator().manual_seed(0), {}
    for part in _PARTS:
        for ends, (out, width) in _LINEARS.items():
            for end in ends:
                found[f"{part}{end}/0/a"] = 0.1 * torch.randn(out, 2, generator=g)
                found[f"{part}{end}/0/b"] = 0.1 * torch.randn(2, width, generator=g)
    return found


def _maps():
    """For two streams of six blocks."""
    g, found = torch.Generator().manual_seed(0), {}
    for block in range(6):
        for stream in range(2):
            found[f"block.{block}/{stream}/weight"] = 0.02 * torch.randn(WIDTH, WIDTH, generator=g)
            found[f"block.{block}/{stream}/bias"] = 0.02 * torch.randn(WIDTH, generator=g)
    return found


# Of FLUX (and scenes-flux), of DiT and of `Blocks`, by path.
PARTS = {
    **{f"transformer_blocks.{i}.{part}": kind for i in range(3) for part, kind in _DOUBLE.items()},
    **{f"single_transformer_blocks.{i}.proj_out": "fused" for i in range(6)},
    **{f"blocks.{i}.ff": "ffn" for i in range(3)},
}

# Calibrations that fit every small denoiser: written by hand, for 12 steps, and stretched to others where that can be.
CALIBRATED = {
    "smoothcache": {
        "calibration": Calibration.by_hand(
            "smoothcache",
            12,
            {kind: torch.full((3, 12), 0.1) for kind in PART_KINDS[:-1]} | {"other": torch.ones(3, 12)},
        ),
        "resample": True,
    },
    "dpcache": {
        "calibration": Calibration.by_hand("dpcache", 12, {"errors": torch.ones(12, 10, 9)}),
        "resample": True,
    },
    "bacache": {
        "calibration": Calibration.by_hand(
            "bacache",
            12,
            {  # the farther apart two steps are, the less alike
                f"{kind} {path}": 1 - (torch.arange(12.0)[:, None] - torch.arange(12.0)).abs() / 12
                for path, kind in PARTS.items()
            },
        ),
        "resample": True,
    },
    "lemica": {
        "calibration": Calibration.by_hand("lemica", 12, {"errors": torch.ones(12, 9)}),
        "resample": True,
    },
    "l2p": {
        "calibration": Calibration.by_hand(
            "l2p", 12, {"gram": 1 - (torch.arange(12.0)[:, None] - torch.arange(12.0)).abs() / 100}
        ),
        "resample": True,
    },
    "cachequant": {  # distances that grow evenly; scales and shifts belong to one denoiser
        "calibration": Calibration.by_hand("cachequant", 12, {"errors": torch.ones(12, 9).cumsum(1)}, unit="span"),
        "resample": True,
        "correction": False,
    },
    "icc": {"calibration": Calibration.by_hand("icc", 12, _factors())},
    "fastcache": {"calibration": Calibration.by_hand("fastcache", 12, _maps())},
    "block-caching": {
        "calibration": Calibration.by_hand(
            "block-caching", 12, {f"change block.{i}": torch.full((12,), 0.04) for i in range(9)}
        ),
        "resample": True,
        "scale_shift": False,
    },
    "lazydit": {  # without weights: the score is 0.5 everywhere
        "calibration": Calibration.by_hand("lazydit", 12, {"nowhere": torch.zeros(12, 1)}),
        "resample": True,
    },
    "md-dit": {  # without routers: the first tokens are computed
        "calibration": Calibration.by_hand("md-dit", 12, {"nowhere": torch.zeros(12, 1)}),
        "resample": True,
    },
    "tokencache": {  # without weights: every block computes its first tokens
        "calibration": Calibration.by_hand("tokencache", 12, {"nowhere": torch.zeros(12, 1)}, pruned=1.0),
        "resample": True,
    },
    "l2c": {
        "calibration": Calibration.by_hand("l2c", 12, dict.fromkeys(PARTS, torch.tensor([1.0, 0.01] * 6))),
        "resample": True,
    },
    "harmonica": {
        "calibration": Calibration.by_hand("harmonica", 12, dict.fromkeys(PARTS, torch.tensor([0.9, 0.01, 0.05] * 4))),
        "resample": True,
    },
}

# Settings at which a method caches within a dozen steps on these small denoisers, where its defaults do not. A method
# that is registered takes part in all general tests without a word here.
ACTIVE = {name: dict(CALIBRATED.get(name, {})) for name in c4d.METHODS} | {
    "bwcache": {"threshold": 9.0, "tail": 0.0},
    "dbcache": {"threshold": 0.5, "front": 1, "back": 1, "warmup": 2},
    "dbprune": {"threshold": 0.5, "front": 1, "warmup": 2},
    "delta-dit": {"interval": 3},
    "easycache": {"threshold": 0.5, "warmup": 1},
    "fastercache": {"interval": 3, "warmup": 2, "attention_interval": 1},  # its CFG part; methods/ has both together
    "fastcache": {**CALIBRATED["fastcache"], "threshold": 0.9},
    "fbcache": {"threshold": 0.5},
    "feb-cache": {"table": (0, 2, 2, 0, 2, 2, 0)},
    "fora": {"interval": 3},
    "goc": {"start_full": 1.0},
    "lazydit": CALIBRATED["lazydit"] | {"threshold": 2.0},
    "magcache": {"ratios": (1.0, 0.99), "max_run": 2},
    "pab": {"window": (0.0, 1000.0)},
    "quantcache": {"threshold": 2.0},
    "scm": {"mask": "ultra"},
    "skip-dit": {"interval": 3, "start": 0.0, "stop": 1.0},
    "speca": {"threshold": 0.5},
    "taylorseer": {"interval": 4},
    "taylorseer-lite": {"interval": 4},
    "teacache": {"threshold": 0.3},
    "toca": {"interval": 3, "recompute_ratio": 0.3, "schedule": "constant"},
}
# What a method that is off needs besides its registry row to fit so small a denoiser.
FITTING = CALIBRATED | {
    "dbcache": {"front": 1, "warmup": 2},
    "dbprune": {"front": 1, "warmup": 2},
    "easycache": {"warmup": 1},
    "fastercache": {"warmup": 2, "attention_interval": 1},
}
# Methods that act on the trajectory need a scheduler: test_trajectory.py has their general tests.
_TRAJECTORY = {
    name for name in c4d.METHODS if isinstance(c4d.method(name, **CALIBRATED.get(name, {})).compose().site, Trajectory)
}
# Methods that compute fewer tokens predict nothing: tests/methods/test_reductions.py has their general tests.
REDUCTIONS = sorted(
    name for name in c4d.METHODS if isinstance(c4d.method(name, **CALIBRATED.get(name, {})).compose().site, Reduced)
)
# Methods for what the denoisers here have not, or hardly: U-Net levels, cross-attention, modules that work on the
# prompt alone, a video made chunk by chunk. They have tests of their own.
ELSEWHERE = {
    *("ca2-vdm", "dato", "deepcache", "faster-diffusion", "t-gate-v1", "t-gate-v2", "text-kv-cache", "vcut"),
    *REDUCTIONS,
}
TRANSFORMER_METHODS = sorted(set(c4d.METHODS) - ELSEWHERE - _TRAJECTORY)
# Methods that cache nothing where there is no attention, or no guidance.
FOR_ATTENTION = {"fastercache", "pab"}


def _kind(name):
    """What decides which code of the engine runs: site, what is watched, kind of predictor, token rule, branch rule."""
    made = c4d.METHODS[name](**ACTIVE[name]).compose()
    watch = made.gate.watch if made.gate is not None else None
    is_linear = isinstance(made.predictor, LinearPredictor)
    parts = (made.site, watch, LinearPredictor if is_linear else made.predictor, made.tokens, made.cfg)
    return tuple(part if isinstance(part, type) else type(part) for part in parts), getattr(
        made.predictor, "capacity", 0
    )


def _twins():
    """Methods that run the same code as another one, which keeps at least as many snapshots."""
    chosen = {}
    for name in TRANSFORMER_METHODS:
        kind, capacity = _kind(name)
        if kind not in chosen or capacity > chosen[kind][1]:
            chosen[kind] = (name, capacity)
    return set(TRANSFORMER_METHODS) - {name for name, _ in chosen.values()}


TWINS = _twins()
methods = pytest.mark.parametrize("name", TRANSFORMER_METHODS)
distinct_methods = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in TWINS else ()) for name in TRANSFORMER_METHODS]
)
# These meet every case whether they are twins or not: most others are built from their parts.
FIRST_TEN = {
    *("fora", "taylorseer", "taylorseer-lite", "dbcache", "fbcache", "teacache", "speca", "toca", "fastercache"),
    "deepcache",
}


def with_cases(argument, cases, method="name", names=TRANSFORMER_METHODS, method_of=str):
    """Every method with every case; twins meet the first case, and the others among the slow checks."""
    first = next(iter(cases))

    def is_slow(name, case):
        twin = method_of(name)
        return case != first and twin in TWINS and twin not in FIRST_TEN

    return pytest.mark.parametrize(
        (method, argument),
        [
            pytest.param(name, case, marks=pytest.mark.slow if is_slow(name, case) else ())
            for name in names
            for case in cases
        ],
    )


def made(name, **settings):
    """What a method composes on small denoisers, with settings of one's own."""
    return c4d.method(name, **{**FITTING.get(name, {}), **settings}).compose()


def generator(seed):
    return torch.Generator().manual_seed(seed)


def off(name):
    return {**FITTING.get(name, {}), **c4d.METHODS[name].info.off}


def randomise(module: nn.Module, std: float = 0.1) -> nn.Module:
    """Make biases, gates and norms visible: fresh denoisers start with branches that add nothing."""
    for parameter in module.parameters():
        if parameter.ndim == 1 or not parameter.any():
            nn.init.normal_(parameter, std=std)
    return module.eval()


def seeded(make):
    def build(*args, seed=0, **kwargs):
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        try:
            return make(*args, **kwargs)
        finally:
            torch.set_rng_state(state)

    return build


@seeded
def flux(guidance=False, ip_adapter=False, channels=8) -> FluxTransformer2DModel:
    denoiser = FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    if ip_adapter:
        for block in denoiser.transformer_blocks:
            block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 24, num_tokens=(4,)))
        denoiser.encoder_hid_proj = MultiIPAdapterImageProjection(
            [ImageProjection(image_embed_dim=12, cross_attention_dim=24, num_image_text_embeds=4)]
        )
    return randomise(denoiser)


@seeded
def dit() -> DiTTransformer2DModel:
    return randomise(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
        )
    )


class Blocks(nn.Module):
    """A denoiser nobody registered: an embedding, blocks with one residual part each, a projection."""

    class Block(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.norm = nn.LayerNorm(dim)
            self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

        def forward(self, x, gate):
            return x + gate * self.ff(self.norm(x))

    def __init__(self, dim=8, count=3):
        super().__init__()
        self.embed = nn.Linear(4, dim)
        self.blocks = nn.ModuleList(self.Block(dim) for _ in range(count))
        self.out = nn.Linear(dim, 4)

    def forward(self, x, timestep, context):
        hidden, gate = self.embed(x) + context, torch.cos(timestep)[:, None, None]
        for block in self.blocks:
            hidden = block(hidden, gate)
        return self.out(hidden)


class MLP(nn.Module):
    """A denoiser without blocks."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 4))

    def forward(self, x, timestep):
        return self.net(torch.cat([x, timestep.expand(x.shape[0], 1)], 1))


def position_ids(height, width):
    ids = torch.zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None]
    return ids.view(-1, 3)


def flux_inputs(batch=1, seed=0, side=4, dtype=torch.float32, text=5, **extra):
    g = torch.Generator().manual_seed(seed)
    inputs = {
        "hidden_states": torch.randn(batch, side * side, 8, generator=g).to(dtype),
        "encoder_hidden_states": torch.randn(batch, text, 24, generator=g).to(dtype),
        "pooled_projections": torch.randn(batch, 20, generator=g).to(dtype),
        "img_ids": position_ids(side, side),
        "txt_ids": torch.zeros(text, 3),
    }
    return {**inputs, **extra}


def controlnet_inputs(batch=1, side=4, single=True, dtype=torch.float32):
    """Residuals whose value differs from block to block."""

    def samples(count, base):
        return [torch.full((batch, side * side, 32), base + 0.1 * i, dtype=dtype) for i in range(count)]

    extra = {"controlnet_block_samples": samples(2, 0.05)}
    return {**extra, "controlnet_single_block_samples": samples(3, 0.3)} if single else extra


def ip_adapter_inputs(batch=1):
    g = torch.Generator().manual_seed(9)
    return {"joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.randn(batch, 1, 12, generator=g)]}}


def fresh(inputs):
    """The arguments of one call: denoisers may take entries out of dictionaries."""
    return {k: dict(v) if isinstance(v, dict) else v for k, v in inputs.items()}


def sample_of(output):
    return output[0] if isinstance(output, tuple) else getattr(output, "sample", output)


def timesteps(num_steps):
    return [1 - i / num_steps for i in range(num_steps)]


@torch.no_grad()
def flux_loop(denoiser, inputs, num_steps=10, frozen=False, fail_at=None, error=RuntimeError, **options):
    """A bare Euler loop; returns the denoiser's output at every step. ``frozen``: the same input at every step."""
    x, outputs = inputs["hidden_states"], []
    dtype = x.dtype
    for i, t in enumerate(timesteps(num_steps)):
        if i == fail_at:
            raise error("stopped")
        time = torch.full((x.shape[0],), 0.5 if frozen else t, dtype=dtype)
        output = denoiser(**fresh({**inputs, "hidden_states": x, "timestep": time}), **options)
        outputs.append(sample_of(output))
        if not frozen:
            x = x - outputs[-1] / num_steps
    return outputs


@torch.no_grad()
def branch_loop(denoiser, branches, num_steps=10, scale=3.0, until=None):
    """Sequential guidance: one call per branch and step; after step ``until`` only the first branch is called."""
    x, outputs = branches[0]["hidden_states"], []
    for i, t in enumerate(timesteps(num_steps)):
        called = branches if until is None or i < until else branches[:1]
        found = []
        for inputs in called:
            time = torch.full((x.shape[0],), t)
            found.append(sample_of(denoiser(**fresh({**inputs, "hidden_states": x, "timestep": time}))))
        first, mean = found[0], sum(found) / len(found)
        outputs.append(mean + scale * (first - mean))
        x = x - outputs[-1] / num_steps
    return outputs


@torch.no_grad()
def dit_loop(denoiser, batch=1, num_steps=10, seed=0, scale=2.0, frozen=False):
    """Class-conditional guidance with both branches in one call, as DiTPipeline does it."""
    x = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    labels = torch.cat([torch.arange(batch) % 10, torch.full((batch,), 10)])
    outputs = []
    for i in range(num_steps):
        both = torch.cat([x, x])
        t = torch.full((2 * batch,), 500 if frozen else 999 - 90 * i)
        output = denoiser(both, timestep=t, class_labels=labels).sample
        outputs.append(output)
        cond, uncond = output.chunk(2)
        if not frozen:
            x = x - 0.1 * (uncond + scale * (cond - uncond))
    return outputs


# FLUX.1-dev's: noise levels are shifted by how many tokens the image has.
FLUX_SCHEDULE = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}


@seeded
def flux_pipeline(transformer=None, scheduler=None) -> FluxPipeline:
    """A stock pipeline without text encoders: prompts come as embeddings, images leave as latents."""
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=2, norm_num_groups=4, layers_per_block=1, sample_size=16,
    )  # fmt: skip
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler() if scheduler is None else scheduler,
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=flux() if transformer is None else transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Experts:
    """High-noise steps go to one denoiser, low-noise steps to the other; ``share`` of the steps are the first's."""

    def __init__(self, share=0.5):
        self.transformer, self.transformer_2 = flux(seed=1), flux(seed=2)
        self.scheduler, self.share = FlowMatchEulerDiscreteScheduler(), share

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=50, generator=None, output_type="np", return_dict=True):
        self.scheduler.set_timesteps(num_inference_steps)
        inputs = flux_inputs(len(prompt))
        x = torch.stack([torch.randn(inputs["hidden_states"].shape[1:], generator=g) for g in generator])
        for i, t in enumerate(self.scheduler.timesteps):
            expert = self.transformer if i < self.share * num_inference_steps else self.transformer_2
            time = (t / 1000).expand(len(x))
            x = self.scheduler.step(expert(**{**inputs, "hidden_states": x, "timestep": time}).sample, t, x)[0]
        image = x.repeat(1, 1, 2).sigmoid()  # 16 x 16
        return (image[..., None].expand(-1, -1, -1, 3).numpy(),)


def prompt(seed=1, batch=1, negative=None):
    """Embeddings that stand for a prompt (and for a negative one: then with true classifier-free guidance)."""

    def embed(seed, head):
        g = torch.Generator().manual_seed(seed)
        return {
            f"{head}prompt_embeds": torch.randn(batch, 5, 24, generator=g),
            f"{head}pooled_prompt_embeds": torch.randn(batch, 20, generator=g),
        }

    found = embed(seed, "")
    if negative is not None:
        found.update(embed(negative, "negative_"), true_cfg_scale=3.0)
    return found


def generate(pipe, num_steps=8, seed=0, side=16, batch=1, **arguments):
    """Latents of one image; the same seed gives the same."""
    conditioning = {} if "prompt_embeds" in arguments else prompt(batch=batch)
    return pipe(
        **conditioning,
        **arguments,
        height=side,
        width=side,
        num_inference_steps=num_steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        guidance_scale=1.0,
    ).images


class Counter:
    """How often each module's own ``forward`` ran (not: was called, for a call may be bypassed).

    Made before `accelerate`, so that it sits inside of every wrapper.
    """

    def __init__(self, module: nn.Module) -> None:
        self.counts: dict[str, int] = {}
        for name, child in module.named_modules():
            child.forward = self._counted(name, child.forward)

    def _counted(self, name, forward):
        @functools.wraps(forward)
        def counted(*args, **kwargs):
            self.counts[name] = self.counts.get(name, 0) + 1
            return forward(*args, **kwargs)

        return counted

    def during(self, call):
        """Names of the modules that ran during ``call()``, and its result."""
        self.counts.clear()
        result = call()
        return {name for name, count in self.counts.items() if count}, result


class Dicts:
    """A snapshot of what every module of a denoiser (or any object) has in its ``__dict__``, by identity."""

    def __init__(self, *objects) -> None:
        self.objects = [m for o in objects for m in (o.modules() if isinstance(o, nn.Module) else [o])]
        self.before = [self._look(o) for o in self.objects]

    @staticmethod
    def _look(owner):
        found = {}
        for key, value in vars(owner).items():
            found[key] = (id(value), tuple(value) if isinstance(value, dict) else None)
        return found

    def changed(self) -> list[str]:
        """Attributes that are not what they were."""
        return [
            f"{type(o).__name__}.{key}"
            for o, before in zip(self.objects, self.before, strict=True)
            for key in sorted(set(before) ^ set(vars(o)) | {k for k, v in self._look(o).items() if before.get(k) != v})
        ]


@contextmanager
def accelerated(denoiser, name, settings=None, num_steps=None, **options):
    """Accelerate within a block, one explicit run in it if the number of steps is given."""
    handle = c4d.accelerate(denoiser, name, **(ACTIVE[name] if settings is None else settings), **options)
    try:
        if num_steps is None:
            yield handle
        else:
            with handle.run(num_steps=num_steps):
                yield handle
    finally:
        handle.remove()


def on_a_fresh_copy(denoiser, name, loop, num_steps=None, **settings):
    """What ``loop(denoiser)`` gives on a copy that was never accelerated before: the truth for all tests of state."""
    with accelerated(copy.deepcopy(denoiser), name, {**ACTIVE[name], **settings}, num_steps) as handle:
        return loop(handle._engines[0].denoiser)


def fail(error):
    """Raise, where a statement must be an expression."""
    raise error("stopped")
