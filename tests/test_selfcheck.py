"""selfcheck proves what holds, and names the site where it does not."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import cache4diffusion as c4d
from cache4diffusion.engine.blocks import BlockView
from cache4diffusion.engine.level import LevelDriver
from cache4diffusion.engine.part_sites import PartSite
from cache4diffusion.engine.state import BranchState
from cache4diffusion.engine.trajectory import TrajectoryDriver
from cache4diffusion.errors import SettingError, UnknownNameError
from cache4diffusion.predictors import History
from cache4diffusion.selfcheck import INVARIANTS
from cache4diffusion.wrap import owner_of
from toys import CALIBRATED, FIRST_TEN, MLP, REDUCTIONS, Experts, dit, flux, flux_inputs, flux_pipeline, prompt

STEPS = 6
SMALL = {"height": 16, "width": 16}


@pytest.fixture
def denoiser():
    return flux()


def inputs(batch=2, text=16):
    """Image and text of equal length: streams could be mistaken for each other without a wrong shape telling."""
    return {**flux_inputs(batch, text=text), "timestep": torch.ones(batch)}


def check(denoiser, methods, **more):
    return c4d.selfcheck(denoiser, methods, inputs=inputs(), steps=STEPS, **more)


FEW = sorted(FIRST_TEN | {"dbprune", "easycache", "meancache", "scm", "spectrum"})


@pytest.mark.parametrize(
    "methods",
    [FEW[::2], pytest.param(FEW[1::2], marks=pytest.mark.slow), pytest.param(None, marks=pytest.mark.slow)],
    ids=["few", "others", "all"],
)
def test_every_invariant_holds_for_every_method_that_fits(denoiser, methods):
    found = check(denoiser, methods)
    assert found.ok, str(found)
    assert {finding.method for finding in found.findings} == set(methods or c4d.METHODS)
    for name in methods or c4d.METHODS:
        mine = {finding.invariant: finding for finding in found.findings if finding.method == name}
        assert list(mine) == list(INVARIANTS)
        unfit = dict.fromkeys(["t-gate-v1", "t-gate-v2", "vcut"], "cross_attn")
        unfit |= {
            "dato": "no U-Net levels",
            "deepcache": "no U-Net levels",
            "faster-diffusion": "no U-Net levels",
            "ca2-vdm": "causal in time",
            "dbcache": "watches the first 8 blocks",
        }  # the toy has five
        unfit |= dict.fromkeys(["meancache", "taocache", "waveex", "z-cache"], "acts in scheduler.step")
        unfit["dbprune"] = "keeps the first 8"
        unfit |= dict.fromkeys({*REDUCTIONS} - {"asymrnr"}, "one stream of tokens")
        unfit |= {other: "c4d calibrate" for other, cls in c4d.METHODS.items() if cls.info.needs_calibration}
        if name in unfit:
            assert all(f.status == "not applicable" and unfit[name] in f.detail for f in mine.values()), str(found)
            continue
        not_shown = {key for key, finding in mine.items() if finding.status == "not applicable"}
        unpromised = {"frozen_input"} if name in REDUCTIONS else set()
        assert not_shown == {"linear_feature"} | unpromised, str(found)
    assert owner_of(denoiser) is None
    facts = json.loads(found.to_json())
    assert facts["ok"]
    assert "passed" in {row["off_is_off"]["status"] for row in facts["methods"].values()}
    assert "nothing failed" in str(found)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "toma" else pytest.mark.slow) for name in REDUCTIONS]
)
def test_methods_on_fewer_tokens_are_checked_for_all_but_what_they_do_not_promise(name):
    """They predict nothing, so nobody expects the full step's output of them."""
    denoiser = dit()
    call = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([5, 5]),
        "class_labels": torch.tensor([1, 2]),
    }
    found = c4d.selfcheck(denoiser, [name], inputs=call, steps=STEPS)
    assert found.ok, str(found)
    silent = {finding.invariant for finding in found.findings if finding.status == "not applicable"}
    idle = {"nan_guard"} if name == "ca-tome" else set()  # a threshold raised as far as it goes merges nothing
    assert silent == {"linear_feature", "frozen_input"} | idle, str(found)


@pytest.mark.parametrize("name", ["fastcache", "harmonica", "icc", "l2p", "md-dit", "smoothcache"])
def test_calibrated_methods_are_checked_with_their_calibration(denoiser, name):
    """Thresholds are raised as far as they go; of a fit that does not keep constants nobody expects it."""
    settings = dict(CALIBRATED[name])
    if "resample" in c4d.METHODS[name]().settings:
        settings["resample"] = True  # they were made for runs of another length
    chosen = c4d.method(name, **settings)
    found = check(denoiser, [chosen])
    assert found.ok, str(found)
    silent = {finding.invariant: finding.detail for finding in found.findings if finding.status == "not applicable"}
    fits = {"frozen_input"} if name in ("fastcache", "l2p") else set()
    assert set(silent) == {"linear_feature"} | fits, str(found)
    assert all(silent[invariant].startswith("its predictor does not keep") for invariant in fits)


def test_a_threshold_that_a_training_belongs_to_is_not_raised():
    pipe, call = flux_pipeline(), {**SMALL, "output_type": "latent"}
    brief = {"steps": STEPS, "call": call, "trial": 0, "runs": 1, "threshold": 0.8}
    made = c4d.calibrate(pipe, "block-caching", [prompt()], **brief)
    chosen = c4d.method("block-caching", calibration=made)
    found = c4d.selfcheck(pipe, [chosen], call={**prompt(), **call}, steps=STEPS)
    assert found.ok, str(found)
    assert found.of("block-caching", "repeatable").status == "passed"


def test_a_pipeline_is_checked_with_its_own_calls_and_guidance():
    pipe = flux_pipeline()
    g = torch.Generator().manual_seed(0)
    call = {
        "prompt_embeds": torch.randn(2, 5, 24, generator=g),
        "pooled_prompt_embeds": torch.randn(2, 20, generator=g),
        "negative_prompt_embeds": torch.randn(2, 5, 24, generator=g),
        "negative_pooled_prompt_embeds": torch.randn(2, 20, generator=g),
        "true_cfg_scale": 2.0,
        "height": 16,
        "width": 16,
    }
    found = c4d.selfcheck(pipe, ["fastercache", "taylorseer-lite"], call=call, steps=STEPS)
    assert found.ok, str(found)
    assert found.of("fastercache", "frozen_input").status == "passed"


def test_methods_on_the_trajectory_are_checked_in_whole_runs_of_a_pipeline():
    found = c4d.selfcheck(flux_pipeline(), "taocache", call={**prompt(batch=2), **SMALL}, steps=STEPS)
    assert found.ok, str(found)
    passed = {finding.invariant for finding in found.findings if finding.status == "passed"}
    assert passed == {"off_is_off", "remove_restores", "repeatable", "bad_settings_fail"}
    assert "never calls" in found.of("taocache", "frozen_input").detail


def test_a_latent_that_is_touched_on_a_full_step_fails(monkeypatch):
    made = TrajectoryDriver.after_step
    monkeypatch.setattr(TrajectoryDriver, "after_step", lambda *args: tuple(0.9 * part for part in made(*args)))
    found = c4d.selfcheck(flux_pipeline(), "taocache", call={**prompt(batch=2), **SMALL}, steps=STEPS)
    assert found.of("taocache", "off_is_off").status == "failed"


def swap_streams(monkeypatch, name):
    given = PartSite.given

    def swapped(self, *call):
        return given(self, *call)[::-1] if self.name == name else given(self, *call)

    monkeypatch.setattr(PartSite, "given", swapped)


def test_a_part_whose_streams_are_swapped_is_named(denoiser, monkeypatch):
    swap_streams(monkeypatch, "transformer_blocks.1.attn")
    found = check(denoiser, "taylorseer")
    assert not found
    finding = found.of("taylorseer", "frozen_input")
    assert finding.status == "failed"
    assert finding.site == "transformer_blocks.1.attn"
    assert "transformer_blocks.1.attn" in str(found)


def test_a_part_whose_streams_are_swapped_is_named_when_lengths_differ(denoiser, monkeypatch):
    swap_streams(monkeypatch, "transformer_blocks.0.attn")
    found = c4d.selfcheck(denoiser, "fora", inputs=inputs(text=5), steps=STEPS)
    finding = found.of("fora", "frozen_input")
    assert (finding.status, finding.site) == ("failed", "transformer_blocks.0.attn")
    assert "a cached step failed" in finding.detail


def test_a_span_whose_streams_are_swapped_is_named(denoiser, monkeypatch):
    rebuild = BlockView.rebuild
    last = "single_transformer_blocks.2"
    monkeypatch.setattr(
        BlockView, "rebuild", lambda self, v, *of: rebuild(self, v[::-1] if self.path == last else v, *of)
    )
    finding = check(denoiser, "fbcache").of("fbcache", "frozen_input")
    assert finding.status == "failed"
    assert finding.site == f"span.0 (transformer_blocks.1 .. {last})"


def test_a_cache_that_never_caches_fails(denoiser, monkeypatch):
    monkeypatch.setattr(History, "is_empty", property(lambda self: True))
    finding = check(denoiser, "fora").of("fora", "frozen_input")
    assert finding.status == "failed"
    assert "nothing was cached" in finding.detail


def test_bytes_nobody_accounts_for_fail(denoiser, monkeypatch):
    def hidden(self):
        return iter(())

    monkeypatch.setattr(BranchState, "tensors", hidden)
    finding = check(denoiser, "taylorseer-lite").of("taylorseer-lite", "ledger_equals_held")
    assert finding.status == "failed"
    assert "the ledger says 0 bytes" in finding.detail


def test_tensors_without_memory_elsewhere_in_the_process_do_not_count(denoiser):
    # torch.compile leaves such tensors alive.
    without_memory = [FakeTensorMode().from_tensor(torch.ones(64)), torch._to_functional_tensor(torch.ones(64))]
    with pytest.raises(RuntimeError, match="data pointer"):
        without_memory[1].untyped_storage().data_ptr()
    assert check(denoiser, "taylorseer-lite").ok


def test_a_wrapper_left_behind_fails(denoiser, monkeypatch):
    monkeypatch.setattr("cache4diffusion.wrap.ForwardWrapper.remove", lambda self: None)
    finding = check(denoiser, "fora").of("fora", "remove_restores")
    assert finding.status == "failed"


def test_a_denoiser_without_blocks_is_served_by_what_needs_none():
    call = {"x": torch.randn(3, 4), "timestep": torch.tensor([1.0])}
    found = c4d.selfcheck(MLP(), ["taylorseer-lite", "fbcache"], inputs=call, steps=STEPS)
    assert found.ok, str(found)
    assert found.of("taylorseer-lite", "frozen_input").status == "passed"
    assert found.of("fbcache", "frozen_input").status == "not applicable"


def test_batched_guidance_on_a_dit():
    torch.manual_seed(0)
    half = torch.randn(1, 4, 8, 8)
    call = {
        "hidden_states": torch.cat([half, half]),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([1, 10]),
    }
    found = c4d.selfcheck(dit(), ["fastercache", "fora"], inputs=call, steps=STEPS)
    assert found.ok, str(found)
    assert found.of("fastercache", "frozen_input").status == "passed"
    assert found.of("fastercache", "nan_guard").status == "passed"


def unet():
    """A small one, and a call of it."""
    torch.manual_seed(0)
    denoiser = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4,
    ).eval()  # fmt: skip
    return denoiser, {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": torch.randn(2, 3, 12),
    }


def test_what_a_module_adds_by_itself_is_not_expected_back_bit_for_bit():
    """In few digits ``x + (y - x)`` is not always y."""
    denoiser, call = unet()
    for path, module in denoiser.named_modules():
        if path.endswith("attentions.0.proj_out"):
            torch.nn.init.normal_(module.weight)  # adds as much as there is
    call = {name: value.bfloat16() if value.is_floating_point() else value for name, value in call.items()}
    found = c4d.selfcheck(denoiser.bfloat16(), "frdiff", inputs=call, steps=8)
    assert found.ok, str(found)
    assert "cached calls within" in found.of("frdiff", "frozen_input").detail, "else nothing was rounded"


def test_the_level_of_a_unet(monkeypatch):
    denoiser, call = unet()
    found = c4d.selfcheck(denoiser, "deepcache", inputs=call, steps=STEPS)
    assert found.ok, str(found)
    assert found.of("deepcache", "frozen_input").status == "passed"

    stand_in = LevelDriver._stand_in

    def flipped(*args):
        return pytree.tree_map(lambda leaf: leaf.flip(-1), stand_in(*args))

    monkeypatch.setattr(LevelDriver, "_stand_in", flipped)
    finding = c4d.selfcheck(denoiser, "deepcache", inputs=call, steps=STEPS).of("deepcache", "frozen_input")
    assert finding.status == "failed"
    assert finding.site


def test_bf16(denoiser):
    call = {k: v.bfloat16() if v.is_floating_point() and "ids" not in k else v for k, v in inputs().items()}
    found = c4d.selfcheck(denoiser.bfloat16(), ["fbcache"], inputs=call, steps=STEPS)
    assert found.ok, str(found)
    assert "bfloat16" in found.of("fbcache", "kept_type").detail


def test_bad_requests(denoiser):
    with pytest.raises(SettingError, match="needs inputs"):
        c4d.selfcheck(denoiser)
    with pytest.raises(SettingError, match="4 or more"):
        c4d.selfcheck(denoiser, inputs=inputs(), steps=2)
    with pytest.raises(UnknownNameError, match="did you mean 'fora'"):
        check(denoiser, "foro")


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_what_accelerates_a_pipeline_is_checked_and_goes_on(dtype):
    pipe, call = flux_pipeline(), {**prompt(batch=2), **SMALL}
    with c4d.accelerate(pipe, "fbcache", threshold=0.3, cache_dtype=dtype) as handle:
        before = pipe(**call, num_inference_steps=8, output_type="latent", generator=torch.Generator().manual_seed(0))
        strip, memory = handle.stats["strip"], handle.memory
        found = c4d.selfcheck(pipe, call=call)
        assert found.ok, str(found)
        assert {finding.method for finding in found.findings} == {"fbcache"}
        assert found.steps == 6
        assert dtype in found.labels["fbcache"]
        assert owner_of(pipe.transformer) is handle
        assert (handle.stats["strip"], handle.memory) == (strip, memory)
        after = pipe(**call, num_inference_steps=8, output_type="latent", generator=torch.Generator().manual_seed(0))
        assert torch.equal(before[0], after[0])
        assert handle.stats["strip"] == strip
        assert len(handle.trace.runs()) == 2
        other = c4d.selfcheck(pipe, "fora", call=call)
        assert {finding.method for finding in other.findings} == {"fora"}
    assert owner_of(pipe.transformer) is None


def test_runs_are_as_long_as_the_attached_method_needs(denoiser):
    with c4d.accelerate(denoiser, "taylorseer-lite", gate="widening(warmup=8,window=2,growth=1)"):
        found = c4d.selfcheck(denoiser, inputs=inputs())
    assert found.ok, str(found)
    assert found.steps == 12
    assert found.of("taylorseer-lite", "frozen_input").status == "passed"


def test_a_method_that_is_off_is_not_blamed_for_caching_nothing(denoiser):
    with c4d.accelerate(denoiser, "fbcache", threshold=0):
        found = c4d.selfcheck(denoiser, inputs=inputs())
    assert found.ok, str(found)
    assert "the method is off" in found.of("fbcache", "frozen_input").detail


def test_a_report_in_words(denoiser, monkeypatch):
    found = str(check(denoiser, "fora"))
    for promise in INVARIANTS.values():
        assert promise in found
    assert "method: fora(" in found
    assert "why: nothing in a real network changes so evenly" in found
    assert "nothing failed (8 hold, 1 do not apply)" in found
    swap_streams(monkeypatch, "transformer_blocks.1.attn")
    found = str(check(denoiser, "fora"))
    assert "2 FAILED: Given the same input" in found
    assert "(at transformer_blocks.1.attn)" in found
    assert "something failed: do not use it here" in found


def test_several_handles_on_one_pipeline_are_not_guessed_at():
    pipe = Experts()
    with c4d.accelerate(pipe.transformer, "fora"), c4d.accelerate(pipe.transformer_2, "fbcache"):
        with pytest.raises(SettingError, match="2 handles"):
            c4d.selfcheck(pipe)
        assert owner_of(pipe.transformer).label.startswith("fora")
        assert owner_of(pipe.transformer_2).label.startswith("fbcache")
