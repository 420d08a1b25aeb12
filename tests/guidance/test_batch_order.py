"""Which half of a call is the unconditional one: as pipelines take it, seen in what guidance makes of the halves."""

import pytest
import torch
from diffusers import (
    DDPMWuerstchenScheduler,
    FlowMatchEulerDiscreteScheduler,
    LuminaPipeline,
    StableCascadePriorPipeline,
)
from guidance_zoo import Guided, vae

import cache4diffusion as c4d
from cache4diffusion.zoo import tiny
from pipelines.images import z_image, z_image_call
from pipelines.parts import clip_with_projection


class Enough(Exception):
    """What guidance made has been seen."""


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def guided(kind):
    pipe = Guided(kind)
    return pipe.pipe, pipe.denoiser, lambda: pipe.sample(steps=2)


def lumina():
    pipe = LuminaPipeline(
        transformer=tiny("LuminaNextDiT2DModel").make(1)[0],
        vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
    )
    call = {f"{head}prompt_embeds": noise(seed, 1, 5, 12) for head, seed in (("", 1), ("negative_", 2))}
    call |= {f"{head}prompt_attention_mask": torch.ones(1, 5) for head in ("", "negative_")}
    return pipe, pipe.transformer, lambda: pipe(**call, num_inference_steps=2, height=64, width=64)


def cascade():
    pipe = StableCascadePriorPipeline(
        prior=tiny("StableCascadeUNet").make(1)[0],
        scheduler=DDPMWuerstchenScheduler(),
        text_encoder=clip_with_projection(),
        tokenizer=None,
    )
    call = {f"{head}prompt_embeds": noise(seed, 1, 5, 14) for head, seed in (("", 1), ("negative_", 2))}
    call |= {f"{head}prompt_embeds_pooled": noise(seed, 1, 1, 10) for head, seed in (("", 3), ("negative_", 4))}
    return pipe, pipe.prior, lambda: pipe(**call, num_inference_steps=2, height=336, width=336)


def lists():
    pipe = z_image()
    return pipe, pipe.transformer, lambda: pipe(**z_image_call(), num_inference_steps=2)


PIPELINES = {"sd": guided, "dit": guided, "lumina": lumina, "stable-cascade": cascade, "z-image": lists}


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_guidance_goes_away_from_the_half_that_is_taken_for_unconditional(name):
    """``u + g (c - u)`` with ``g > 1`` falls where u rises."""
    pipe, denoiser, sample = PIPELINES[name](name) if name in ("sd", "dit") else PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    made = []

    def step(model_output, *args, **kwargs):
        made.append(model_output.mean())
        raise Enough

    pipe.scheduler.step = step

    def mean_with(raised):
        def lift(module, args, kwargs, output):
            rows = output[0]
            half = len(rows) // 2
            for row in [*range(half)] * raised[0] + [*range(half, 2 * half)] * raised[1]:
                rows[row].add_(1.0)

        hook = denoiser.register_forward_hook(lift, with_kwargs=True)
        torch.manual_seed(0)
        with pytest.raises(Enough):
            sample()
        hook.remove()
        return made.pop()

    plain = mean_with((0, 0))
    first, whole = mean_with((1, 0)) - plain, mean_with((1, 1)) - plain
    with c4d.accelerate(denoiser, "fastercache", attention_interval=1) as handle:
        order = handle._engines[0].branches.batch_order
    assert order == ("uncond-cond" if first / whole < 0 else "cond-uncond")
