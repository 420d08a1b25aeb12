"""Every mistake fails where it is made, names what is accepted, and leaves nothing attached."""

import copy

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXLatentUpsamplePipeline
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel
from torch import nn

import cache4diffusion as c4d
import toys
from cache4diffusion.errors import (
    AlreadyAcceleratedError,
    AnatomyError,
    CompositionError,
    FileFormatError,
    RunError,
    SettingError,
    UnknownNameError,
)
from cache4diffusion.gates import FixedInterval
from cache4diffusion.sites import Parts, Span

# (method, settings) -> error and the words a user needs.
WRONG = {
    "unknown method": (("tailorseer", {}), UnknownNameError, "no method 'tailorseer'; did you mean 'taylorseer'"),
    "unknown setting": (("taylorseer", {"intervall": 5}), SettingError, "'intervall'; did you mean 'interval'"),
    "unknown predictor": (("fora", {"predictor": "newtn"}), UnknownNameError, "'newtn'; did you mean 'newton'"),
    "unknown site": (("fora", {"site": "part"}), UnknownNameError, "no site 'part'; did you mean 'parts'"),
    "unknown gate": (("fora", {"gate": "intervall"}), UnknownNameError, "no gate 'intervall'; did you mean 'interval'"),
    "unknown token rule": (("fora", {"tokens": "topscore"}), UnknownNameError, "'topscore'; did you mean"),
    "unknown branch rule": (("fora", {"cfg": "fastcache"}), UnknownNameError, "did you mean 'fastercache'"),
    "setting of a component": (("fora", {"predictor": "newton(ordr=1)"}), SettingError, "did you mean 'order'"),
    "unreadable component": (("fora", {"predictor": "newton(order=)"}), SettingError, "write it like"),
    "component of the wrong kind": (("fora", {"predictor": 3}), CompositionError, "is no predictor"),
    "gate of the wrong kind": (("fora", {"gate": Parts()}), CompositionError, "is no gate"),
    "rel_l1_thresh": (("teacache", {"rel_l1_thresh": 0.4}), SettingError, "here it is called 'threshold'"),
    "residual_diff_threshold": (("dbcache", {"residual_diff_threshold": 0.1}), SettingError, "called 'threshold'"),
    "Fn_compute_blocks": (("dbcache", {"Fn_compute_blocks": 8}), SettingError, "called 'front'"),
    "fresh_threshold": (("taylorseer", {"fresh_threshold": 5}), SettingError, "called 'interval'"),
    "max_order": (("taylorseer", {"max_order": 1}), SettingError, "called 'order'"),
    "cache_interval": (("fora", {"cache_interval": 3}), SettingError, "called 'interval'"),
    "interval 0": (("taylorseer", {"interval": 0}), SettingError, "interval must be 1 or more"),
    "order -1": (("taylorseer", {"order": -1}), SettingError, "order must be 0 or more"),
    "threshold -1": (("fbcache", {"threshold": -1.0}), SettingError, "threshold must be 0 or more"),
    "threshold nan": (("fbcache", {"threshold": float("nan")}), SettingError, "threshold must be 0 or more"),
    "wrong type": (("taylorseer", {"interval": "5"}), SettingError, "interval must be a whole number"),
    "True is no number": (("taylorseer", {"interval": True}), SettingError, "interval must be a whole number"),
    "order 2.0": (("taylorseer", {"order": 2.0}), SettingError, "order must be a whole number"),
    "ratio 2": (("toca", {"recompute_ratio": 2.0}), SettingError, "recompute_ratio must be 0 or more and at most 1"),
    "decay 0": (("speca", {"decay": 0.0}), SettingError, "decay must be more than 0"),
    "choice": (("dbcache", {"decide": "rows"}), SettingError, "decide must be one of 'batch', 'any', 'row'"),
    "axis choice": (("fora", {"decide": "rows"}), SettingError, "use 'batch', 'any' or 'row'"),
    "coefficients": (("teacache", {"coefficients": "flx"}), UnknownNameError, "did you mean 'flux'"),
    "no coefficients": (("teacache", {"coefficients": ()}), SettingError, "at least one"),
    "contradiction": (("fbcache", {"site": "parts", "decide": "row"}), CompositionError, "Use site='span'"),
    "verified span": (("speca", {"site": "span"}), CompositionError, "Use site='parts'"),
    "nan_guard": (("fora", {"nan_guard": "never"}), SettingError, "'now', 'next' or 'off'"),
    "no method": ((None, {"interval": 5}), SettingError, "need a method"),
    "neither": ((5, {}), SettingError, "give a method's name"),
}  # fmt: skip


@pytest.fixture
def denoiser():
    return toys.flux()


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_fail_at_accelerate_and_attach_nothing(case, denoiser):
    (name, settings), error, words = WRONG[case]
    before = toys.Dicts(denoiser)
    with pytest.raises(error, match=words):
        c4d.accelerate(denoiser, name, **settings)
    assert not before.changed()


@pytest.mark.parametrize("name", toys.TRANSFORMER_METHODS)
def test_every_setting_with_a_bound_refuses_what_lies_outside(name):
    for row in c4d.METHODS[name].describe():
        default, is_bounded_below = row["default"], not row["accepts"].startswith("at most")
        if isinstance(default, (int, float)) and not isinstance(default, bool) and is_bounded_below:
            with pytest.raises(SettingError, match=row["name"]):
                c4d.method(name, **{row["name"]: type(default)(-1)})


def test_settings_belong_into_an_object(denoiser):
    with pytest.raises(SettingError, match="belong into it"):
        c4d.accelerate(denoiser, c4d.methods.Fora(), interval=3)


def test_a_second_accelerate_names_the_first(denoiser):
    with c4d.accelerate(denoiser, "fora", interval=4):
        with pytest.raises(AlreadyAcceleratedError, match=r"already accelerated by fora\(interval=4"):
            c4d.accelerate(denoiser, "fbcache")
        with pytest.raises(AlreadyAcceleratedError, match="already accelerated by fora"):
            c4d.accelerate(toys.flux_pipeline(denoiser), "fbcache")


def test_no_denoiser():
    with pytest.raises(AnatomyError, match="Pass the denoiser itself"):
        c4d.accelerate(object(), "fora")


def test_a_pipeline_without_a_denoiser():
    vae = AutoencoderKLLTXVideo(
        block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), upsample_residual=(False,), upsample_factor=(1,), latent_channels=4,
        patch_size=1,
    )  # fmt: skip
    upsampler = LTXLatentUpsamplerModel(in_channels=4, mid_channels=32, num_blocks_per_stage=1)
    pipe = LTXLatentUpsamplePipeline(vae=vae, latent_upsampler=upsampler)
    before = toys.Dicts(pipe, vae)
    with pytest.raises(AnatomyError, match="no other one takes a timestep"):
        c4d.accelerate(pipe, "fora")
    assert not before.changed()


class TimedControlNet(toys.MLP):
    """Takes a timestep beside the denoiser."""


def test_denoisers_are_found_by_what_they_take_where_their_name_is_not_known():
    """Ideogram has one network per branch; a ControlNet is told the time, too, and is no denoiser."""

    class Two:
        def __init__(self):
            self.transformer, self.unconditional_transformer = toys.flux(seed=1), toys.flux(seed=2)
            self.controlnet, self.text_encoder = TimedControlNet(), nn.Linear(3, 3)
            self.scheduler = FlowMatchEulerDiscreteScheduler()

    pipe = Two()
    with c4d.accelerate(pipe, "taylorseer-lite", interval=3) as handle:
        pipe.scheduler.set_timesteps(9)
        inputs = toys.flux_inputs()
        for t in pipe.scheduler.timesteps:
            with torch.no_grad():
                for denoiser in (pipe.transformer, pipe.unconditional_transformer):
                    denoiser(**inputs, timestep=t.expand(1) / 1000)
            pipe.scheduler.step(inputs["hidden_states"], t, inputs["hidden_states"])
        assert handle.stats["strips"] == dict.fromkeys(
            ("transformer/branch-0", "unconditional_transformer/branch-0"), "FFFccFccF"
        )


@pytest.mark.parametrize("name", ["taylorseer-lite", "fora", "taylorseer", "dbcache", "fbcache", "teacache", "toca"])
def test_two_denoisers_that_share_blocks_are_as_two_that_do_not(name):
    def experts(is_shared):
        found = toys.Experts()
        for lists in ("transformer_blocks", "single_transformer_blocks"):
            theirs = getattr(found.transformer, lists)
            setattr(found.transformer_2, lists, theirs if is_shared else copy.deepcopy(theirs))
        return found

    def sample(pipe):
        return torch.as_tensor(pipe([""], num_inference_steps=14, generator=[toys.generator(0)])[0])

    apart, together = experts(False), experts(True)
    plain = sample(together)
    assert torch.equal(sample(apart), plain)
    with c4d.accelerate(apart, name, **toys.ACTIVE[name]):
        truth = sample(apart)
    before = toys.Dicts(together.transformer, together.transformer_2)
    with c4d.accelerate(together, name, **toys.ACTIVE[name]) as handle:
        for _ in range(2):
            assert torch.equal(sample(together), truth)
        assert all("c" in strip or "p" in strip for strip in handle.stats["strips"].values())
    assert not before.changed()
    assert torch.equal(sample(together), plain)


def test_a_denoiser_without_a_clock():
    with pytest.raises(AnatomyError, match="no argument that is called like a timestep"):
        c4d.accelerate(nn.Linear(3, 3), "fora")


def test_one_of_two_denoisers_refused_leaves_the_other_alone():
    class Experts:
        def __init__(self):
            self.transformer, self.transformer_2 = toys.flux(), nn.Linear(3, 3)

    pipe = Experts()
    before = toys.Dicts(pipe, pipe.transformer, pipe.transformer_2)
    with pytest.raises(AnatomyError):
        c4d.accelerate(pipe, "fora")
    assert not before.changed()


# ---------------------------------------------------------------------- profiles

PROFILES = {
    "missing": (None, "cannot be read"),
    "no yaml": ("method: [fora", "not valid YAML"),
    "not utf-8": (b"\xff\xfe\x00", "cannot be read"),
    "empty": ("", "fields method, settings and axes"),
    "a list": ("[1, 2]", "fields method, settings and axes"),
    "other field": ("method: fora\nsetings: {}", "setings"),
    "no method": ("settings: {}", "method"),
    "unknown method": ("method: forra", "did you mean 'fora'"),
    "unknown setting": ("method: fora\nsettings: {intervl: 3}", "did you mean 'interval'"),
    "out of range": ("method: fora\nsettings: {interval: 0}", "interval must be 1 or more"),
    "unknown axis": ("method: fora\naxes: {predicter: newton}", "did you mean 'predictor'"),
    "tabs": ("method:\tfora\n\tsettings: {}", "not valid YAML"),
}


@pytest.mark.parametrize("case", PROFILES)
def test_a_broken_profile_is_a_clear_error(case, denoiser, tmp_path):
    text, words = PROFILES[case]
    path = tmp_path / "profile.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = toys.Dicts(denoiser)
    with pytest.raises((FileFormatError, UnknownNameError, SettingError), match=words):
        c4d.accelerate(denoiser, str(path))
    assert not before.changed()


def test_a_profile_works(denoiser, tmp_path):
    path = tmp_path / "profile.yaml"
    path.write_text("method: fora\nsettings: {interval: 4}\naxes: {predictor: newton(order=1)}")
    with c4d.accelerate(denoiser, path) as handle:
        assert "interval=4" in handle.label and "newton" in handle.label


# ---------------------------------------------------------------------- known only when the denoiser is called


@pytest.mark.parametrize("name", ["taylorseer", "taylorseer-lite", "dbcache", "toca", "fastercache", "fora"])
def test_a_warm_up_as_long_as_the_run_fails_at_the_first_call(name, denoiser):
    settings = {"dbcache": {"front": 1}, "fastercache": {"attention_warmup": 8}}.get(name, {})
    with c4d.accelerate(denoiser, name, warmup=8, **settings) as handle:
        with (
            pytest.raises(SettingError, match="warmup=8 leaves nothing to cache in a run of 8 steps"),
            handle.run(num_steps=8),
        ):
            toys.flux_loop(denoiser, toys.flux_inputs(), 8)
        assert handle.memory["held"] == 0


@pytest.mark.parametrize("name", ["speca", "teacache"])
def test_a_method_that_needs_the_number_of_steps_names_run(name, denoiser):
    with c4d.accelerate(denoiser, name) as handle:
        with pytest.raises(RunError, match=r"handle\.run\(timesteps=timesteps\)"):
            toys.flux_loop(denoiser, toys.flux_inputs(), 8)
        with handle.run(num_steps=8):
            toys.flux_loop(denoiser, toys.flux_inputs(), 8)
            assert "c" in handle.stats["strip"]


# (denoiser, method or composition, words about what is missing, words about what would work)
CANNOT = {
    "deepcache on flux": (toys.flux, "deepcache", {}, "has no U-Net levels", "'taylorseer', 'dbcache', 'fora'"),
    "fbcache on an mlp": (toys.MLP, "fbcache", {}, "no stack of blocks that carries the latent", "'taylorseer-lite'"),
    "teacache on an mlp": (
        toys.MLP,
        "teacache",
        {"cooldown": 0},
        "no stack of blocks that carries the latent",
        "'taylorseer-lite'",
    ),
    "fora on an mlp": (toys.MLP, "fora", {}, "no parts", "'taylorseer-lite'"),
    "toca on an mlp": (toys.MLP, "toca", {}, "no stack of blocks that carries the latent", "'taylorseer-lite'"),
    "too many front blocks": (toys.flux, "dbcache", {"front": 6}, "watches the first 6 blocks", "has 5: use fewer"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_a_denoiser_that_cannot_be_served_is_left_alone(case):
    make, name, settings, missing, remedy = CANNOT[case]
    denoiser = toys.seeded(make)()
    if isinstance(denoiser, toys.MLP):
        args, kwargs = (torch.ones(2, 4), torch.tensor([0.5])), {}
    else:
        args, kwargs = (), {**toys.flux_inputs(), "timestep": torch.tensor([0.5]), "return_dict": False}
    before = toys.Dicts(denoiser)
    with torch.no_grad():
        plain = denoiser(*args, **kwargs)
        handle = c4d.accelerate(denoiser, name, **settings)
        with pytest.raises(AnatomyError, match=missing) as error:
            denoiser(*args, **kwargs)
        assert remedy in str(error.value)
        assert not before.changed(), "something is left attached"
        assert torch.equal(toys.sample_of(denoiser(*args, **kwargs)), toys.sample_of(plain))
    handle.remove()
    with c4d.accelerate(denoiser, "taylorseer-lite"):  # not "already accelerated"
        pass


def test_a_call_that_is_wrong_in_itself_fails_as_it_would_and_changes_nothing():
    denoiser = toys.flux()
    with torch.no_grad(), c4d.accelerate(denoiser, "fora"):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            denoiser(**{**toys.flux_inputs(), "hidden_states": torch.ones(1, 16, 3)}, timestep=torch.tensor([0.5]))
        toys.flux_loop(denoiser, toys.flux_inputs(), 4)


# ---------------------------------------------------------------------- nothing is ignored silently


NEVER = {
    "dbcache": {"threshold": 1e-9, "front": 1, "warmup": 1},
    "fbcache": {"threshold": 1e-9},
    "teacache": {"threshold": 1e-9},
    "fastercache": {"warmup": 0, "attention_interval": 1},  # there is no guidance
}


@pytest.mark.parametrize("name", NEVER)
def test_0_steps_cached_warns(name, denoiser):
    with c4d.accelerate(denoiser, name, **NEVER[name]) as handle:
        with pytest.warns(UserWarning, match="0 of 5 steps were cached"), handle.run(num_steps=5):
            toys.flux_loop(denoiser, toys.flux_inputs(), 5)
        assert "0 of 5 steps were cached" in handle.report()


def test_runs_that_cannot_cache_or_did_not_end_do_not_warn():
    denoiser, inputs = toys.flux(), toys.flux_inputs()
    for settings, steps in (({"threshold": 0.0}, 5), ({"threshold": 1e-9}, 1)):
        with c4d.accelerate(denoiser, "fbcache", **settings) as handle, handle.run(num_steps=steps):
            toys.flux_loop(denoiser, inputs, steps)
    with pytest.raises(KeyboardInterrupt), c4d.accelerate(denoiser, "fbcache", threshold=1e-9):
        toys.flux_loop(denoiser, inputs, 8, fail_at=5, error=KeyboardInterrupt)


def test_a_bare_loop_warns_when_the_handle_goes():
    denoiser = toys.flux()
    handle = c4d.accelerate(denoiser, "fbcache", threshold=1e-9)
    toys.flux_loop(denoiser, toys.flux_inputs(), 5)
    with pytest.warns(UserWarning, match="0 of 5 steps were cached"):
        handle.remove()


def test_settings_that_leave_nothing_in_a_composition_of_ones_own():
    denoiser = toys.flux()
    composition = c4d.Composition(Span(front=1), FixedInterval(2))
    with c4d.accelerate(denoiser, composition) as handle, handle.run(num_steps=4):
        toys.flux_loop(denoiser, toys.flux_inputs(), 4)
        assert handle.stats["strip"] == "FcFc"


def test_a_span_of_no_block_says_so():
    denoiser = toys.flux()
    with c4d.accelerate(denoiser, "dbcache", front=2, back=3, warmup=1, threshold=1.0) as handle:
        with pytest.warns(UserWarning, match="0 of 4 steps were cached"), handle.run(num_steps=4):
            toys.flux_loop(denoiser, toys.flux_inputs(), 4)
        assert any("leaves none of the 5 blocks" in note for note in handle.stats["notes"])
