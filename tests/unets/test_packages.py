"""The packages that the authors released agree with what is here, on the same U-Net with the same settings."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from unet_zoo import counting, inputs, sd_like, text_parts, vae

import cache4diffusion as c4d
from cache4diffusion.engine.reducing import ReductionDriver

STEPS = 7


# ---------------------------------------------------------------------------------------------------------- DeepCache


def pipeline():
    pipe = StableDiffusionPipeline(
        vae=vae(),
        unet=sd_like(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **copy.deepcopy(text_parts()),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe):
    """Latents of two guided images, and how often each module ran."""
    with counting(pipe.unet) as ran:
        latents = pipe(
            ["a red circle", "a blue star"],
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            height=8,
            width=8,
        ).images
    return latents, ran


@pytest.mark.parametrize("branch", range(8))
@pytest.mark.parametrize("interval", [1, 3])
def test_deepcache(branch, interval):
    """``cache_branch_id`` is ``3 block + layer``. The package calls more: blocks whose output it then drops."""
    package = pytest.importorskip("DeepCache")
    pipe = pipeline()
    helper = package.DeepCacheSDHelper(pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    expected, theirs = sample(pipe)
    helper.disable()
    with c4d.accelerate(pipe, "deepcache", interval=interval, block=branch // 3, layer=branch % 3) as handle:
        found, ours = sample(pipe)
        assert handle.stats["strip"] == "".join("cF"[step % interval == 0] for step in range(STEPS))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert ours["mid_block.resnets.0"] == theirs["mid_block.resnets.0"] == len(range(0, STEPS, interval))
    assert ours["conv_in"] == theirs["conv_in"] == STEPS
    rested = {path for path, count in theirs.items() if count < STEPS}
    assert rested <= {path for path, count in ours.items() if count < STEPS}


# ------------------------------------------------------------------------------------------------------------- tomesd


def fine():
    """With attention on the finest level, which is the one that both serve by default."""
    return sd_like(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2D",
    )


def noise_of(denoiser, given):
    """A call as the package expects it: what is denoised is a positional argument."""
    given = dict(given)
    with torch.no_grad():
        return denoiser(given.pop("sample"), **given).sample


def groups(weights):
    """Which tokens ended up together: sets, from what merging makes of one-hot tokens ``[B, M, N]``."""
    return [{frozenset(row.nonzero().flatten().tolist()) for row in sample} for sample in weights]


@pytest.mark.parametrize("is_random", [False, True])
@pytest.mark.parametrize("settings", [{}, {"ratio": 0.3}, {"window": 4}, {"merge_ffn": True, "merge_cross_attn": True}])
def test_tome(settings, is_random, monkeypatch):
    """The same plan, with the package given our draws; rows are no halves of guidance, of which ours takes the mean."""
    tomesd = pytest.importorskip("tomesd")
    draw, draws, plans, merges = torch.randint, [], [], []
    denoiser = fine()
    steps = [inputs(step=step) for step in range(2)]

    def ours(*args, **kwargs):
        found = draw(*args, **kwargs)
        draws.append(found)
        return found

    made = ReductionDriver._made
    with c4d.accelerate(denoiser, "tome", is_random=is_random, **settings) as handle:
        with handle.run(num_steps=len(steps)), monkeypatch.context() as patch:
            noise_of(denoiser, steps[0])  # is examined in its first call
            patch.setattr(ReductionDriver, "_made", lambda *args: plans.append(made(*args)) or plans[-1])
            patch.setattr(torch, "randint", ours)
            found = noise_of(denoiser, steps[1])
        assert handle.stats["strip"] == "rr"
    assert bool(draws) == is_random

    def theirs(*args, size, device, generator):
        return draws.pop(0).reshape(size)

    def match(*args, **kwargs):
        merges.append(matching(*args, **kwargs))
        return merges[-1]

    matching = tomesd.merge.bipartite_soft_matching_random2d
    monkeypatch.setattr(tomesd.merge, "bipartite_soft_matching_random2d", match)
    side = settings.get("window", 2)
    tomesd.apply_patch(
        denoiser,
        ratio=settings.get("ratio", 0.5),
        sx=side,
        sy=side,
        use_rand=is_random,
        merge_mlp=settings.get("merge_ffn", False),
        merge_crossattn=settings.get("merge_cross_attn", False),
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", theirs)
        expected = noise_of(denoiser, steps[1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(plans) == len(merges) == 5  # two blocks down, three up
    assert not draws
    one_hot = torch.eye(64).expand(2, -1, -1)
    for plan, (merge, _) in zip(plans, merges, strict=True):
        assert groups(plan.take(one_hot)) == groups(merge(one_hot))
