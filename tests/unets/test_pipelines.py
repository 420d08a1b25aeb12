"""DeepCache in stock pipelines: schedulers, guidance, batches, run after run."""

import copy
import gc
import itertools

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from unet_zoo import controlnet, counting, ip_adapter_like, sd_like, text_parts, vae

import cache4diffusion as c4d

TEXT = text_parts()
PROMPTS = ("a red circle", "a blue star on a red background", "a star and a circle", "blue")


def pipeline(kind=StableDiffusionPipeline, scheduler=DDIMScheduler, unet=None, **more):
    pipe = kind(
        vae=vae(),
        unet=unet or sd_like(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **copy.deepcopy(TEXT),
        **more,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, batch=1, steps=6, seed=0, **more):
    size = {} if "image" in more and "strength" in more else {"height": 8, "width": 8}
    return pipe(
        [PROMPTS[(seed + row) % len(PROMPTS)] for row in range(batch)],
        negative_prompt=["a background"] * batch,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **{**size, **more},
    ).images


SCHEDULERS = {
    "ddim": (DDIMScheduler, "FccFcc"),
    "pndm": (lambda: PNDMScheduler(skip_prk_steps=True), "FccFccF"),  # one timestep is visited twice
    "dpm": (DPMSolverMultistepScheduler, "FccFcc"),
    "heun": (HeunDiscreteScheduler, "FccFccFccFc"),  # 2 n - 1 calls
}


@pytest.mark.parametrize("name", ["pndm", "heun", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ddim", "dpm"))])
def test_every_scheduler_with_batched_guidance(name):
    scheduler, strip = SCHEDULERS[name]
    pipe = pipeline(scheduler=scheduler)
    for batch in (1, 4):
        plain = sample(pipe, batch)
        with c4d.accelerate(pipe, "deepcache", interval=1):
            assert torch.equal(sample(pipe, batch), plain)
        with c4d.accelerate(pipe, "deepcache", interval=3) as handle:
            with counting(pipe.unet) as ran:
                cached = sample(pipe, batch)
            assert handle.trace.strip() == strip
            assert ran["mid_block"] == strip.count("F")
            assert ran["up_blocks.2.resnets.2"] == len(strip)
            assert torch.equal(sample(pipe, batch), cached)
            assert cached.isfinite().all()
            assert not torch.equal(cached, plain)
        assert torch.equal(sample(pipe, batch), plain)


def test_every_prompt_gives_another_image():
    """Else what follows could not tell one prompt's run from another's."""
    pipe = pipeline()
    assert not torch.equal(*(pipe.encode_prompt(p, "cpu", 1, False)[0] for p in PROMPTS[:2]))
    noise = torch.randn(1, 4, 8, 8)
    images = [sample(pipe, seed=seed, latents=noise) for seed in range(len(PROMPTS))]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(images, 2))


def test_a_prompt_replaced_midway_is_a_full_step():
    """Guidance in one call, whose branch has no name: the callback hands the loop another prompt of equal length."""
    pipe = pipeline()
    other, negative = pipe.encode_prompt("a blue star", "cpu", 1, True)
    other = torch.cat([negative, other])

    def swap(pipe, step, timestep, kwargs):
        return {**kwargs, "prompt_embeds": other} if step == 3 else kwargs

    call = {"callback_on_step_end": swap, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    pipe._callback_tensor_inputs = ["latents", "prompt_embeds"]
    with c4d.accelerate(pipe, "deepcache", interval=5) as handle:
        sample(pipe, steps=9, **call)
        assert handle.trace.strip() == "FcccFFccc"


def test_an_ip_adapters_image_prompt():
    pipe = pipeline(unet=ip_adapter_like())
    embeds = [torch.randn(2, 1, 10, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    plain = [sample(pipe, ip_adapter_image_embeds=[image]) for image in embeds]
    assert not torch.equal(*plain)
    with c4d.accelerate(pipe, "deepcache", interval=1):
        assert torch.equal(sample(pipe, ip_adapter_image_embeds=[embeds[0]]), plain[0])
    with c4d.accelerate(pipe, "deepcache", interval=3) as handle:
        cached = [sample(pipe, ip_adapter_image_embeds=[image]) for image in embeds]
        assert handle.trace.strip() == "FccFcc"
        assert not torch.equal(*cached)
    assert torch.equal(sample(pipe, ip_adapter_image_embeds=[embeds[1]]), plain[1])


def test_no_run_sees_another():
    """Two prompts, another length, another resolution, an aborted run: each as in a fresh process."""
    runs = [
        {"seed": 0},
        {"seed": 1},
        {"steps": 4},
        {"steps": 9},
        {"height": 16, "width": 8},
        {"guidance_scale": 1.0},
        {"batch": 2},
    ]
    fresh = []
    for run in runs:
        pipe = pipeline()
        with c4d.accelerate(pipe, "deepcache", interval=3):
            fresh.append(sample(pipe, **run))
    pipe = pipeline()
    with c4d.accelerate(pipe, "deepcache", interval=3) as handle:
        for run, expected in zip(runs, fresh, strict=True):
            assert torch.equal(sample(pipe, **run), expected), run
            assert handle.memory["held"] == 0

        def stop(pipe, step, timestep, kwargs):
            if step == 1:
                raise KeyboardInterrupt
            return kwargs

        with pytest.raises(KeyboardInterrupt):
            sample(pipe, callback_on_step_end=stop)
        assert handle.memory["held"] == 0
        assert torch.equal(sample(pipe, **runs[0]), fresh[0])


def test_image_to_image_counts_from_where_it_starts():
    pipe = pipeline(StableDiffusionImg2ImgPipeline)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = sample(pipe, image=image, strength=0.5, steps=10)
    with c4d.accelerate(pipe, "deepcache", interval=1):
        assert torch.equal(sample(pipe, image=image, strength=0.5, steps=10), plain)
    with c4d.accelerate(pipe, "deepcache", interval=3) as handle:
        for _ in range(2):
            cached = sample(pipe, image=image, strength=0.5, steps=10)
            assert handle.trace.strip() == "FccFc"
        assert cached.isfinite().all()


def test_controlnet_runs_on_every_step_and_reaches_the_shallow_level():
    pipe = pipeline(StableDiffusionControlNetPipeline, controlnet=controlnet())
    images = [torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    plain = sample(pipe, image=images[0])
    with c4d.accelerate(pipe, "deepcache", interval=1):
        assert torch.equal(sample(pipe, image=images[0]), plain)
    with c4d.accelerate(pipe, "deepcache", interval=3) as handle:
        with counting(pipe.unet) as ran, counting(pipe.controlnet) as control:
            sample(pipe, image=images[0])
        assert handle.trace.strip() == "FccFcc"
        assert (ran["mid_block"], control["mid_block"]) == (2, 6)


def test_freeu_switched_on_and_off_between_runs():
    pipe = pipeline()
    with c4d.accelerate(pipe, "deepcache", interval=3, block=1):
        before = sample(pipe)
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        with_freeu = sample(pipe)
        pipe.disable_freeu()
        assert torch.equal(sample(pipe), before)
    fresh = pipeline()
    fresh.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with c4d.accelerate(fresh, "deepcache", interval=3, block=1):
        assert torch.equal(sample(fresh), with_freeu)


def test_the_demo_schedule_is_made_for_each_runs_length():
    pipe = pipeline()
    with c4d.accelerate(pipe, "deepcache", interval=5, schedule="quadratic") as handle:
        for steps, full in ((20, 4), (50, 10)):
            sample(pipe, steps=steps)
            strip = handle.trace.strip()
            assert (len(strip), strip.count("F"), strip[0]) == (steps, full, "F")


def test_removing_leaves_nothing_behind():
    pipe = pipeline()
    before = {path: dict(module.__dict__) for path, module in pipe.unet.named_modules()}
    handle = c4d.accelerate(pipe, "deepcache", interval=3)
    sample(pipe)
    handle.remove()
    gc.collect()
    for path, module in pipe.unet.named_modules():
        assert module.__dict__.keys() == before[path].keys(), path
