"""Runs and models in which caching has little to gain are warned of, or refused."""

import warnings

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, LCMScheduler
from torch._subclasses.fake_tensor import FakeTensorMode

import cache4diffusion as c4d
from cache4diffusion.errors import CompositionError, SettingError
from cache4diffusion.few_steps import FEW_STEP_SCHEDULERS, FewStepsWarning, distilled_by, gain_at_most
from toys import FLUX_SCHEDULE, flux, flux_inputs, flux_loop, flux_pipeline, generate

SMALL = {
    "num_attention_heads": 1,
    "attention_head_dim": 16,
    "in_channels": 8,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6),
}


@pytest.mark.parametrize(
    ("name", "settings", "steps", "strip", "gain"),
    [
        ("fora", {"interval": 3}, 8, "FccFccFc", 8 / 3),
        ("taylorseer-lite", {"interval": 2, "warmup": 2}, 4, "FFcF", 4 / 3),
        ("fbcache", {"threshold": 0.1, "warmup": 4}, 4, "FFFF", 1.0),
        ("fbcache", {"threshold": 0.1, "warmup": 2, "max_run": 0}, 6, None, None),
    ],
)
def test_the_bound_is_that_of_the_strip(name, settings, steps, strip, gain):
    known = c4d.METHODS[name]().settings
    composition = c4d.method(name, **{key: value for key, value in settings.items() if key in known}).compose()
    found, factor = gain_at_most(composition, steps)
    assert len(found) == steps and found[0] == "F"
    if strip is not None:
        assert (found, factor) == (strip, pytest.approx(gain))
    assert factor == pytest.approx(steps / found.count("F"))


def test_both_an_interval_and_a_skipped_branch_count():
    composition = c4d.accelerate(flux(), "fora", interval=2, cfg="fastercache(interval=2, warmup=0)")
    with composition as handle:
        strip, gain = gain_at_most(handle._engines[0].composition, 8)
    assert set(strip) <= set("Fch") and gain == 8 / (strip.count("F") + 0.5 * strip.count("h"))


def loop(handle, denoiser, steps):
    with handle.run(num_steps=steps):
        flux_loop(denoiser, flux_inputs(), steps)


def test_a_run_of_few_steps_is_warned_of_once_and_one_of_nine_is_not():
    denoiser = flux()
    with c4d.accelerate(denoiser, "fora", interval=3) as handle:
        with pytest.warns(FewStepsWarning, match=r"8 steps leave fora.* at most 2.67x .*FccFccFc"):
            loop(handle, denoiser, 8)
        assert "at most 2.67x" in handle.report()
        with warnings.catch_warnings():
            warnings.simplefilter("error", FewStepsWarning)
            loop(handle, denoiser, 8)
            loop(handle, denoiser, 9)


def test_strict_refuses_a_run_of_few_steps_and_serves_the_next_one():
    denoiser = flux()
    with c4d.accelerate(denoiser, "fora", interval=3, strict=True) as handle:
        with pytest.raises(SettingError, match="strict=True refuses fewer than 9 steps"):
            loop(handle, denoiser, 4)
        loop(handle, denoiser, 9)
        assert "c" in handle.trace.strip()


def test_nobody_is_warned_of_a_method_that_is_off():
    denoiser = flux()
    with warnings.catch_warnings(), c4d.accelerate(denoiser, "fora", interval=1, strict=True) as handle:
        warnings.simplefilter("error", FewStepsWarning)
        loop(handle, denoiser, 4)


# -- distilled models --------------------------------------------------------------------------------------------------


class Pipe:
    """What is looked at of a pipeline."""

    def __init__(self, denoiser, scheduler, name=None):
        self.transformer, self.scheduler = denoiser, scheduler
        self.config = {"_name_or_path": name}


def schnell(layers=(19, 38), guidance=False):
    with FakeTensorMode():
        return FluxTransformer2DModel(
            num_layers=layers[0], num_single_layers=layers[1], guidance_embeds=guidance, **SMALL
        )


def reason(denoiser, scheduler, name=None):
    return distilled_by(Pipe(denoiser, scheduler, name), {"transformer": denoiser})


def test_schnell_is_known_by_its_configuration():
    plain, shifted = FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULE)
    assert "schnell" in reason(schnell(), plain)
    assert reason(schnell(), shifted) is None
    assert reason(schnell(guidance=True), plain) is None
    assert reason(schnell(layers=(1, 2)), plain) is None
    assert distilled_by(schnell(), {"denoiser": schnell()}) is None, "without a scheduler nothing is known of a shift"


def test_schedulers_of_few_steps_are_known_by_their_class():
    import diffusers

    assert all(hasattr(diffusers, name) for name in FEW_STEP_SCHEDULERS if name != "HeliosDMDScheduler")
    assert "LCMScheduler" in reason(flux(), LCMScheduler())


def test_names_are_read_by_words():
    plain = FlowMatchEulerDiscreteScheduler()
    for name, is_known in (
        ("stabilityai/sdxl-turbo", True),
        ("ByteDance/SDXL-Lightning", True),
        ("/models/FLUX.1-schnell", True),
        ("someone/turbodiesel-style", False),
        ("black-forest-labs/FLUX.1-dev", False),
        (None, False),
    ):
        assert (reason(flux(), plain, name) is not None) == is_known, name


def test_a_distilled_pipeline_is_warned_of_and_refused_if_strict():
    pipe = flux_pipeline()
    pipe.register_to_config(_name_or_path="somebody/flux-turbo")
    with pytest.warns(FewStepsWarning, match=r"distilled to few steps \('turbo'.*at most 2.00x in 4 steps and 2.67x"):
        c4d.accelerate(pipe, "fora", interval=3).remove()
    with pytest.raises(CompositionError, match="strict=True refuses"):
        c4d.accelerate(pipe, "fora", interval=3, strict=True)
    assert torch.isfinite(generate(pipe, 4)).all(), "and nothing is left attached"
