"""One CFG branch made from the other: batched, sequential, in loops of one's own, with other methods."""

from contextlib import nullcontext

import pytest
import torch
from diffusers import FluxPipeline
from guidance_zoo import Guided, dit, flux, rows, unet

import cache4diffusion as c4d
from cache4diffusion.engine.maps import Grid
from cache4diffusion.errors import AnatomyError, CompositionError, RunError
from cache4diffusion.zoo import tiny

KINDS = ("sd", "dit", "flux")
ALONE = {"attention_interval": 1}  # the CFG part by itself
GAINS = {"low_gain": 1.0, "high_gain": 1.0}
EXACT = GAINS | ALONE


def strip_of(handle, branch=None):
    return handle.trace.strip(branch=branch)


@pytest.mark.parametrize("kind", KINDS)
def test_off_is_off(kind):
    guided = Guided(kind)
    for batch in (1, 2):
        plain = guided.sample(batch, steps=4)
        with c4d.accelerate(guided.pipe, "fastercache", **ALONE, interval=1) as handle:
            assert torch.equal(guided.sample(batch, steps=4), plain)
            assert not any("skipped" in note for note in handle.trace.notes)


@pytest.mark.parametrize("kind", ["sd", "dit"])
@pytest.mark.parametrize("batch", [1, 3])
def test_batched_guidance_runs_half_the_rows_on_skipped_steps(kind, batch):
    guided = Guided(kind)
    with (
        c4d.accelerate(guided.pipe, "fastercache", **ALONE, interval=5, warmup=2) as handle,
        rows(guided.denoiser) as seen,
    ):
        out = guided.sample(batch)
        assert seen == [2 * batch if n <= 2 or n % 5 == 0 else batch for n in range(1, 11)]
        assert strip_of(handle) == "FFhhFhhhhF"
        assert handle.trace.syncs == 1  # is it guidance? asked once
        assert out.isfinite().all()
        assert torch.equal(guided.sample(batch), out)
        assert handle.memory["held"] == 0
        assert handle.memory["peak"] > 0


def test_sequential_guidance_answers_the_second_call():
    guided = Guided("flux")
    for batch in (1, 2):
        with (
            c4d.accelerate(guided.pipe, "fastercache", **ALONE, interval=5, warmup=2) as handle,
            rows(guided.denoiser) as seen,
        ):
            guided.sample(batch)
            assert len(seen) == 10 + 4
            assert strip_of(handle, "cond") == "F" * 10
            assert strip_of(handle, "uncond") == "FFccFccccF"
            assert handle.trace.syncs == 1  # reading the grid of the tokens


# What is predicted --------------------------------------------------------------------------------------------------


def halves(denoiser, x, t, cond, uncond):
    return denoiser(x, t, cond), denoiser(x, t, uncond)


@torch.no_grad()
@pytest.mark.parametrize("order", ["uncond-cond", "cond-uncond"])
def test_batched_prediction_is_the_source_plus_the_last_difference(order):
    denoiser = unet()
    rng = torch.Generator().manual_seed(0)
    prompts = torch.randn(4, 5, 12, generator=rng)
    xs = [torch.randn(2, 4, 10, 10, generator=rng) for _ in range(3)]

    def batched(i):
        x = torch.cat([xs[i], xs[i]])
        return denoiser(x, torch.tensor(900 - i), encoder_hidden_states=prompts).sample

    plain = [batched(i) for i in range(3)]
    with c4d.accelerate(denoiser, "fastercache", interval=9, warmup=0, batch_order=order, **EXACT):
        ours = [batched(i) for i in range(3)]
    assert torch.equal(ours[0], plain[0])
    first, second = plain[0].chunk(2)
    difference = first - second if order == "uncond-cond" else second - first
    for i in (1, 2):
        source = plain[i].chunk(2)[1 if order == "uncond-cond" else 0]
        made = source + difference
        expected = torch.cat([made, source] if order == "uncond-cond" else [source, made])
        torch.testing.assert_close(ours[i], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("calls", [2, 3])
def test_sequential_prediction_in_a_loop_of_ones_own(calls):
    denoiser = unet()
    rng = torch.Generator().manual_seed(0)
    prompts = [torch.randn(2, 5, 12, generator=rng) for _ in range(calls)]
    xs = [torch.randn(2, 4, 10, 10, generator=rng) for _ in range(4)]

    def loop():
        return [
            [denoiser(x, torch.tensor(900 - i), encoder_hidden_states=p, return_dict=False)[0] for p in prompts]
            for i, x in enumerate(xs)
        ]

    plain = loop()
    with c4d.accelerate(denoiser, "fastercache", interval=9, warmup=0, **EXACT) as handle:
        with rows(denoiser) as seen:
            ours = loop()
        assert len(seen) == calls + 3 * (calls - 1)
        assert [strip_of(handle, f"branch-{i}") for i in range(calls)] == ["FFFF", "Fccc", "FFFF"][:calls]
        assert any("taken for the conditional" in note for note in handle.trace.notes)
    for i in range(4):
        for branch in range(calls):
            expected = plain[i][branch] if branch != 1 or i == 0 else plain[i][0] + plain[0][1] - plain[0][0]
            torch.testing.assert_close(ours[i][branch], expected, rtol=1e-5, atol=1e-5)


def test_gains_need_the_number_of_steps():
    denoiser = unet()
    with (
        c4d.accelerate(denoiser, "fastercache", **ALONE),
        torch.no_grad(),
        pytest.raises(RunError, match="number of steps"),
    ):
        denoiser(torch.randn(2, 4, 10, 10), torch.tensor(1), torch.randn(2, 5, 12))


# When nothing may be skipped ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_without_guidance_nothing_is_skipped_and_that_is_said(kind):
    guided = Guided(kind)
    plain = guided.sample(2, guidance=1.0)
    with c4d.accelerate(guided.pipe, "fastercache", **ALONE, interval=5, warmup=2) as handle:
        with pytest.warns(UserWarning, match=r"0 of 10 steps.*no guidance was seen"):
            assert torch.equal(guided.sample(2, guidance=1.0), plain)
        assert strip_of(handle) == "F" * 10
        assert any("no guidance was seen" in note for note in handle.trace.notes)


def test_a_run_whose_guided_steps_all_run_both_says_so():
    guided = Guided("flux")
    with c4d.accelerate(guided.pipe, "fastercache", **ALONE, interval=5, warmup=9) as handle:
        with pytest.warns(UserWarning, match="0 of 10 steps"):
            guided.sample()
        assert any("every guided step" in note for note in handle.trace.notes)


@torch.no_grad()
@pytest.mark.parametrize("prompts", ["equal", "different"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_two_images_of_one_seed_are_not_guidance(prompts, warmup):
    denoiser = unet()
    rng = torch.Generator().manual_seed(0)
    text = torch.randn(2, 5, 12, generator=rng)
    if prompts == "equal":
        text = text[:1].repeat(2, 1, 1)

    def loop():
        x = torch.randn(1, 4, 10, 10, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1)
        for i in range(5):
            x = x - 0.1 * denoiser(x, torch.tensor(900 - i), encoder_hidden_states=text).sample
        return x

    plain = loop()
    nothing = pytest.warns(UserWarning, match="no guidance was seen")
    with nothing, c4d.accelerate(denoiser, "fastercache", interval=9, warmup=warmup, **EXACT) as handle:
        assert torch.equal(loop(), plain)
        assert strip_of(handle) == "FFFFF"
        assert handle.trace.syncs == 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "settings"), [("fastercache", {"interval": 9, "warmup": 2, **EXACT}), ("t-gate-v1", {"gate_step": 2})]
)
def test_an_image_beside_the_latent_may_be_in_one_half_only(name, settings):
    """Stable Video Diffusion's unconditional half has zeros where the conditional one has the image."""
    denoiser, _, given = tiny("UNetSpatioTemporalConditionModel").make(2)
    rng = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, 4, 8, 8, generator=rng)
    beside = torch.cat([torch.zeros_like(image), image])
    with c4d.accelerate(denoiser, name, **settings) as handle, rows(denoiser) as seen:
        for i in range(5):
            x = torch.randn(1, 3, 4, 8, 8, generator=rng)
            both = torch.cat([torch.cat([x, x]), beside], 2)
            denoiser(**given | {"sample": both, "timestep": torch.full((2,), 900.0 - i)})
        assert not any("no guidance was seen" in note for note in handle.trace.notes)
    assert seen == [2, 2, 1, 1, 1]


@torch.no_grad()
def test_a_video_in_a_row_of_tokens_is_filtered_frame_by_frame():
    """Trap: LTX-Video's 4 frames of 2 x 2 tokens are as many as a square has."""
    denoiser, _, given = tiny("LTXVideoTransformer3DModel").make(2)
    given |= {"num_frames": 4, "height": 2, "width": 2}
    rng = torch.Generator().manual_seed(0)
    with c4d.accelerate(denoiser, "fastercache", interval=9, warmup=0, **EXACT) as handle:
        for i in range(2):
            x = torch.randn(1, 16, 4, generator=rng)
            denoiser(**given | {"hidden_states": torch.cat([x, x]), "timestep": torch.full((2,), 900.0 - i)})
        assert strip_of(handle) == "Fh"
        (state,) = handle._engines[0].branches._states.values()
        assert state.grid == Grid(2, 2, 1, frames=4)


@torch.no_grad()
def test_sound_beside_a_video_is_not_filtered():
    denoiser, _, given = tiny("LTX2VideoTransformer3DModel").make(2)
    refused = pytest.raises(AnatomyError, match=r"more than image tokens \(sound, beside a video\)")
    with c4d.accelerate(denoiser, "fastercache", interval=9, warmup=0, **EXACT), refused:
        denoiser(**given)


@torch.no_grad()
def test_the_layout_can_be_said():
    denoiser, text = unet(), torch.randn(1, 5, 12).repeat(2, 1, 1)
    xs = [torch.randn(1, 4, 10, 10).repeat(2, 1, 1, 1) for _ in range(3)]
    for layout, strip in (("batched", "Fhh"), ("sequential", "FFF"), ("auto", "FFF")):
        nothing = nullcontext() if "h" in strip else pytest.warns(UserWarning, match="0 of 3 steps")
        with nothing, c4d.accelerate(denoiser, "fastercache", interval=9, warmup=0, layout=layout, **EXACT) as handle:
            for i, x in enumerate(xs):
                denoiser(x, torch.tensor(900 - i), encoder_hidden_states=text)
            assert strip_of(handle) == strip
            assert handle.trace.syncs == (layout == "auto")


def test_guidance_switched_off_midway():
    def off(pipe, step, timestep, kwargs):
        if step == 3:
            pipe._guidance_scale = 1.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    guided = Guided("sd")
    with (
        c4d.accelerate(guided.pipe, "fastercache", **ALONE, interval=5, warmup=2) as handle,
        rows(guided.denoiser) as seen,
    ):
        original = guided.pipe._callback_tensor_inputs
        guided.pipe._callback_tensor_inputs = ["latents", "prompt_embeds"]
        out = guided.pipe(
            prompt_embeds=torch.randn(2, 5, 12),
            negative_prompt_embeds=torch.randn(2, 5, 12),
            num_inference_steps=10,
            height=16,
            width=16,
            output_type="latent",
            callback_on_step_end=off,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        ).images
        guided.pipe._callback_tensor_inputs = original
        assert seen == [4, 4, 2, 2, 2, 2, 2, 2, 2, 2]
        assert "".join(record.symbol for record in handle.trace.of()) == "FFhhFFFFFF"
        assert out.isfinite().all()


def test_uncond_first_is_refused_where_it_is_named_or_said():
    denoiser = flux()
    kwargs = {
        "pooled_projections": torch.randn(1, 10),
        "guidance": None,
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32),
        "txt_ids": torch.zeros(5, 3),
    }

    def loop(named):
        for i in range(2):
            x = torch.randn(1, 16, 16)
            for name in ("uncond", "cond"):
                with denoiser.cache_context(name) if named else nullcontext():
                    denoiser(x, torch.randn(1, 5, 12), timestep=torch.tensor([0.9 - i / 10]), **kwargs)

    with torch.no_grad():
        for named, settings in ((True, {}), (False, {"batch_order": "uncond-cond", "layout": "sequential"})):
            refused = pytest.raises(CompositionError, match="unconditional branch first")
            with c4d.accelerate(denoiser, "fastercache", warmup=0, **EXACT, **settings), refused:
                loop(named)
            with c4d.accelerate(denoiser, "fastercache", **ALONE, interval=1, **settings):
                loop(named)


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_equal_prompts_are_exact(kind):
    guided = Guided(kind)
    plain = guided.sample(prompts="equal")
    with c4d.accelerate(guided.pipe, "fastercache", **ALONE, interval=5, warmup=2):
        torch.testing.assert_close(guided.sample(prompts="equal"), plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_arguments_that_come_later_are_split_as_well():
    """ControlNet residuals that begin after the first call: half the rows get their half."""
    denoiser = unet()
    text, xs = torch.randn(2, 5, 12), [torch.randn(1, 4, 10, 10).repeat(2, 1, 1, 1) for _ in range(3)]
    shapes = [(8, 10), (8, 10), (8, 5), (16, 5)]
    control = {
        "down_block_additional_residuals": [torch.randn(2, c, n, n) for c, n in shapes],
        "mid_block_additional_residual": torch.randn(2, 16, 5, 5),
    }

    def loop():
        extras = [{}, {}, control]
        return [
            denoiser(x, torch.tensor(900 - i), encoder_hidden_states=text, **extra).sample
            for i, (x, extra) in enumerate(zip(xs, extras, strict=True))
        ]

    plain = loop()
    with c4d.accelerate(denoiser, "fastercache", interval=9, warmup=0, **EXACT) as handle:
        ours = loop()
        assert strip_of(handle) == "Fhh"
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine[1], theirs[1], rtol=1e-5, atol=1e-5)  # the conditional half is computed


# With other methods --------------------------------------------------------------------------------------------------

OFF = {"taylorseer": {"interval": 1}, "deepcache": {"interval": 1}}


@pytest.mark.parametrize(("kind", "name"), [("flux", "taylorseer"), ("dit", "taylorseer"), ("sd", "deepcache")])
def test_both_off_is_off(kind, name):
    guided = Guided(kind)
    plain = guided.sample(2, steps=5)
    with c4d.accelerate(guided.pipe, name, cfg="fastercache(interval=1)", **OFF[name]):
        assert torch.equal(guided.sample(2, steps=5), plain)


def test_taylorseer_and_fastercache_on_sequential_guidance():
    guided = Guided("flux")
    with c4d.accelerate(guided.pipe, "taylorseer", interval=3, cfg="fastercache(warmup=3)") as handle:
        out = guided.sample(steps=16)
        assert strip_of(handle, "cond") == "FFFccFccFccFccFc"
        # Where both branches run after a pause in which a full step fell, that step is made up for.
        assert strip_of(handle, "uncond") == "FFFccccccFccccFc"
        assert out.isfinite().all()


@pytest.mark.parametrize(("kind", "name"), [("dit", "taylorseer"), ("sd", "deepcache")])
def test_other_methods_and_fastercache_on_batched_guidance(kind, name):
    guided = Guided(kind)
    with c4d.accelerate(guided.pipe, name, interval=3, cfg="fastercache(warmup=3)") as handle:
        with rows(guided.denoiser) as seen:
            out = guided.sample(steps=16)
        assert seen == [2 if n <= 3 or n % 5 == 0 else 1 for n in range(1, 17)]
        records = handle.trace.of()
        both = "".join(r.symbol for r, n in zip(records, seen, strict=True) if n == 2)
        assert both[-2:] == "FF"  # what both halves share is never older than the pause
        assert {r.symbol for r in records} == {"F", "c", "h"}
        assert out.isfinite().all()
        assert torch.equal(guided.sample(steps=16), out)


@torch.no_grad()
def test_a_branch_computed_after_all_does_not_take_the_other_branch_for_its_own():
    denoiser = dit()
    xs = [torch.randn(1, 4, 10, 10).repeat(2, 1, 1, 1) for _ in range(3)]
    calls = [(x, torch.full((2,), 900 - i), torch.tensor([3, 1000])) for i, x in enumerate(xs)]
    plain = denoiser(*calls[2]).sample
    settings = {"interval": 9, "warmup": 1, "layout": "batched", **GAINS}
    rule = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    with c4d.accelerate(denoiser, "fbcache", threshold=1e9, cfg=f"fastercache({rule})") as handle:
        for call in calls[:2]:
            denoiser(*call)
        for band in handle._engines[0].branches.tensors():
            band.fill_(float("nan"))
        ours = denoiser(*calls[2]).sample
        assert strip_of(handle) == "Fhm"  # one half from the cache, one computed
    torch.testing.assert_close(ours[1], plain[1])  # its prediction was not finite
    assert (ours[0] - plain[0]).abs().max() > 0.01  # the site's, from the step before
