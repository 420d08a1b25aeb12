"""DeepCache on U-Nets called in a loop: what rests, what is exact, what reaches the shallow levels."""

import gc
import weakref

import pytest
import torch
from torch import nn
from unet_zoo import CASES, LEVELS, call, cast, clone, counting, inputs, sd_like, two_paths

import cache4diffusion as c4d
from cache4diffusion.errors import AnatomyError, RunError, SettingError
from cache4diffusion.gates.quadratic import Quadratic, quadratic_steps
from cache4diffusion.methods import DeepCache


def levels_of(case: str) -> list[tuple[int, int]]:
    return [level for level in LEVELS if not (case == "no-mid" and level == (2, 2))]


def shallow(path: str, block: int, layer: int) -> bool:
    """The card's rule, by name: whether a module runs on a cached step.

    Deeper levels rest, shallower ones run; on the level itself a down layer rests if its index is ``layer`` or more,
    an up layer if its index from the end is more than ``layer``; nothing that resizes towards or from deeper runs.
    """
    words = path.split(".")
    if words[0] == "mid_block":
        return False
    if words[0] not in ("down_blocks", "up_blocks"):
        return True
    level = int(words[1]) if words[0] == "down_blocks" else 2 - int(words[1])
    if level != block or len(words) == 2:
        return level < block or (level == block and (words[0] == "up_blocks" or layer > 0))
    if len(words) == 3:
        return False  # a list of modules is never called
    if words[2] in ("downsamplers", "upsamplers"):
        return words[2] == "upsamplers"
    index = int(words[3])
    return index < layer if words[0] == "down_blocks" else 2 - index <= layer


def called(denoiser: nn.Module, given: dict) -> set[str]:
    with counting(denoiser) as ran:
        call(denoiser, given)
    return set(ran)


@pytest.mark.parametrize("case", CASES)
def test_off_is_off_and_only_what_is_shallow_runs_on_a_frozen_input(case):
    make, kind = CASES[case]
    denoiser = make()
    plain = [call(denoiser, inputs(kind, step=i)) for i in range(2)]
    frozen = inputs(kind)
    everything = called(denoiser, frozen)
    for block, layer in levels_of(case):
        with c4d.accelerate(denoiser, "deepcache", interval=1, block=block, layer=layer) as handle:
            for i, expected in enumerate(plain):
                assert torch.equal(call(denoiser, inputs(kind, step=i)), expected), (block, layer)
            assert handle.trace.strip() == "FF"
            assert handle.memory["held"] > 0  # the feature was recorded at every step
        with (
            counting(denoiser) as ran,
            c4d.accelerate(denoiser, "deepcache", interval=4, block=block, layer=layer) as handle,
        ):
            full, steps = None, []
            for i in range(3):
                ran.clear()
                output = call(denoiser, frozen)
                steps.append(set(ran))
                full = output if full is None else full
                assert torch.equal(output, full), (block, layer, i)
            assert handle.trace.strip() == "Fcc"
            rests = {path for path in everything if not shallow(path, block, layer)}
            expected = {path for path in everything if not any((path + ".").startswith(f"{rest}.") for rest in rests)}
            assert steps[0] == everything
            assert steps[1:] == [expected] * 2, (block, layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_half_precision_is_off_when_off_and_exact_on_a_frozen_input(case, dtype):
    make, kind = CASES[case]
    denoiser = make().to(dtype)
    given = [cast(inputs(kind, step=step), dtype) for step in range(2)]
    plain = [call(denoiser, step) for step in given]
    assert {output.dtype for output in plain} == {dtype}
    assert all(output.isfinite().all() for output in plain)
    for block, layer in ((0, 0), (1, 1)):
        with c4d.accelerate(denoiser, "deepcache", interval=1, block=block, layer=layer) as handle:
            for step, expected in zip(given, plain, strict=True):
                assert torch.equal(call(denoiser, step), expected)
            assert handle.trace.strip() == "FF"
        with c4d.accelerate(denoiser, "deepcache", interval=3, block=block, layer=layer) as handle:
            for _ in range(3):
                output = call(denoiser, given[0])
                assert output.dtype == dtype
                assert torch.equal(output, plain[0])
            assert handle.trace.strip() == "Fcc"


def test_at_the_outermost_level_a_cached_step_runs_one_up_layer():
    unet = sd_like()
    with c4d.accelerate(unet, "deepcache", interval=2):
        call(unet, inputs(step=0))
        ran = called(unet, inputs(step=1))
    assert {path for path in ran if path.count(".") <= 3 and not path.startswith("time")} == {
        "conv_in",
        "up_blocks.2",
        "up_blocks.2.resnets.2",
        "conv_norm_out",
        "conv_act",
        "conv_out",
    }


@pytest.mark.parametrize(
    ("what", "runs"),
    [
        ("Stable Diffusion, plug-in example", ["up_blocks.2.resnets.2"]),
        (
            "Stable Diffusion, demo",
            ["down_blocks.0.resnets.0", "up_blocks.2.resnets.1", "up_blocks.2.resnets.2"],
        ),
        (
            "DDPM, 100 steps",
            [
                "down_blocks.0.resnets.0",
                "down_blocks.0.resnets.1",
                "up_blocks.1.resnets.2",
                *(f"up_blocks.2.resnets.{i}" for i in range(3)),
            ],
        ),
    ],
)
def test_published_sets_cut_where_their_codes_do(what, runs):
    """The plug-in counts skip connections from ``conv_in``'s on, the demo and DDPM from the first layer's."""
    published, unet = DeepCache.info.published[what], sd_like()
    level = {name: published[name] for name in ("block", "layer")}
    with c4d.accelerate(unet, "deepcache", interval=2, **level):
        call(unet, inputs(step=0))
        ran = called(unet, inputs(step=1))
    assert sorted(path for path in ran if path.split(".")[2:3] == ["resnets"] and path.count(".") == 3) == runs


def slow_deepcache(unet, given, kept, block, layer):
    """DeepCache as the card has it, on flat lists of layers; ``kept`` None is a full step. Returns output and F."""
    t, text = given["timestep"].expand(len(given["sample"])), given["encoder_hidden_states"]
    temb = unet.time_embedding(unet.time_proj(t))

    def run(modules, h):
        for module in modules:
            name = type(module).__name__
            if name == "ResnetBlock2D":
                h = module(h, temb)
            elif name == "Transformer2DModel":
                h = module(h, encoder_hidden_states=text).sample
            else:
                h = module(h)
        return h

    def layers(level):
        attentions = getattr(level, "attentions", [None] * len(level.resnets))
        return [[m for m in pair if m is not None] for pair in zip(level.resnets, attentions, strict=True)]

    down = [pair for level in unet.down_blocks for pair in [*layers(level), *[[d] for d in level.downsamplers or []]]]
    up = [
        [*pair, *(level.upsamplers or [] if i == 2 else [])]
        for level in unet.up_blocks
        for i, pair in enumerate(layers(level))
    ]
    branch = 3 * block + layer  # number of the skip connection, the output of conv_in is 0
    skips = [unet.conv_in(given["sample"])]
    for pair in down if kept is None else down[:branch]:
        skips.append(run(pair, skips[-1]))
    if kept is None:
        h = unet.mid_block(skips[-1], temb, encoder_hidden_states=text)
        for number in range(8, branch, -1):
            h = run(up[8 - number], torch.cat([h, skips[number]], 1))
        kept = h
    h = kept
    for number in range(branch, -1, -1):
        h = run(up[8 - number], torch.cat([h, skips[number]], 1))
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h))), kept


@pytest.mark.parametrize("block", range(3))
@torch.no_grad()
def test_agrees_with_a_slow_deepcache_written_from_the_paper(block):
    unet = sd_like()
    for layer in range(3):
        with c4d.accelerate(unet, "deepcache", interval=3, block=block, layer=layer):
            ours = [call(unet, inputs(step=i)) for i in range(7)]
        kept = None
        for i in range(7):
            expected, kept = slow_deepcache(unet, inputs(step=i), None if i % 3 == 0 else kept, block, layer)
            torch.testing.assert_close(ours[i], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("level", "deep"),
    [((0, 0), "up_blocks.2.resnets.1"), ((1, 1), "up_blocks.1.attentions.0"), ((1, 2), "up_blocks.0")],
)
@pytest.mark.parametrize("case", ["sd", "freeu", "controlnet", "t2i"])
def test_is_exact_when_the_deep_sub_network_is_constant(case, level, deep):
    make, kind = CASES[case]
    unet = make()
    constants = {}

    def constant(module, args, output):
        main = output[0] if isinstance(output, tuple) else output
        main = constants.setdefault("value", main.clone()).clone()
        return (main,) if isinstance(output, tuple) else main

    unet.get_submodule(deep).register_forward_hook(constant)
    plain = [call(unet, inputs(kind, step=i)) for i in range(5)]
    assert not torch.equal(plain[0], plain[1])
    with c4d.accelerate(unet, "deepcache", interval=5, block=level[0], layer=level[1]) as handle:
        for i, expected in enumerate(plain):
            assert torch.equal(call(unet, inputs(kind, step=i)), expected)
        assert handle.trace.strip() == "Fcccc"


def test_fresh_controlnet_residuals_reach_the_shallow_levels_on_cached_steps():
    unet = sd_like()
    given = inputs("controlnet")
    shallow_changed, deep_changed = clone(given), clone(given)
    residuals = given["down_block_additional_residuals"]
    shallow_changed["down_block_additional_residuals"] = [residuals[0] + 1, *residuals[1:]]
    deep_changed["down_block_additional_residuals"] = [residuals[0], *[residual + 1 for residual in residuals[1:]]]
    with c4d.accelerate(unet, "deepcache", interval=4) as handle:
        full = call(unet, given)
        assert torch.equal(call(unet, given), full)
        assert torch.equal(call(unet, deep_changed), full)  # what is deep is that of the full step
        assert not torch.equal(call(unet, shallow_changed), full)
        assert handle.trace.strip() == "Fccc"


def test_t2i_residuals_are_consumed_as_without_a_cache():
    unet = sd_like()
    with c4d.accelerate(unet, "deepcache", interval=2):
        for step in range(2):
            given = inputs("t2i", step=step)
            with torch.no_grad():
                unet(**given)
            assert given["down_intrablock_additional_residuals"] == []


@torch.inference_mode()
def test_in_place_writes_work_under_inference_mode_as_well():
    for case in ("freeu", "t2i"):
        make, kind = CASES[case]
        unet, given = make(), inputs(kind)
        for block, layer in ((0, 0), (1, 0), (2, 1)):
            with c4d.accelerate(unet, "deepcache", interval=2, block=block, layer=layer) as handle:
                full = unet(**clone(given)).sample
                assert torch.equal(unet(**clone(given)).sample, full)
                assert handle.trace.strip() == "Fc"


def test_memory_of_a_cached_run_is_one_feature_map():
    unet, batch = sd_like(), 2
    for case in ("sd", "controlnet", "t2i"):
        with c4d.accelerate(unet, "deepcache", interval=3) as handle:
            for step in range(4):
                call(unet, inputs(case, batch, step))
            assert handle.memory["held"] == handle.memory["peak"] == 4 * batch * 8 * 8 * 8
        assert handle.memory["held"] == 0


def test_outputs_of_a_full_step_are_not_kept_alive():
    unet, kept = sd_like(), []
    unet.mid_block.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    with c4d.accelerate(unet, "deepcache", interval=3):
        call(unet, inputs())
        gc.collect()
        assert [reference() for reference in kept] == [None]


@pytest.mark.parametrize("kind", ["sd", "t2i"])
def test_a_placeholder_that_leaks_is_caught_and_the_step_recomputed(kind):
    unet, deep = sd_like(), []
    shallow_norm, block = unet.conv_norm_out.forward, unet.down_blocks[2]
    expected = call(unet, inputs(kind, step=1))
    nothing = pytest.warns(UserWarning, match="not finite, recomputed")
    with nothing, c4d.accelerate(unet, "deepcache", interval=2, nan_guard="now") as handle:
        call(unet, inputs(kind))
        found = block.__dict__["_compiled_call_impl"]
        block.__dict__["_compiled_call_impl"] = lambda *args, **kwargs: deep.append(found(*args, **kwargs)) or deep[-1]
        # The host reads what is deep behind the back of the skip connections.
        unet.conv_norm_out.forward = lambda x: shallow_norm(x) + 0 * deep[-1][0].mean()
        output = call(unet, inputs(kind, step=1))
        block.__dict__["_compiled_call_impl"] = found
        assert torch.equal(output, expected)
        assert any("not finite" in note for note in handle.trace.notes)
        assert handle.trace.strip() == "FF"


def test_levels_that_do_not_exist_are_refused_and_nothing_stays_attached():
    unet = sd_like()
    for level, words in {(3, 0): "3 up-blocks", (0, 3): "has 3 layers"}.items():
        handle = c4d.accelerate(unet, "deepcache", block=level[0], layer=level[1])
        with pytest.raises(AnatomyError, match=words):
            call(unet, inputs())
        handle.remove()
    unet = sd_like(mid=None)
    with c4d.accelerate(unet, "deepcache", block=2, layer=2), pytest.raises(AnatomyError, match="no middle block"):
        call(unet, inputs())


def test_up_blocks_that_hand_on_two_tensors_are_exact_on_a_frozen_input():
    unet = two_paths()
    given = {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor(5)}
    for block, layer in ((0, 0), (0, 1), (1, 0), (1, 1)):
        with c4d.accelerate(unet, "deepcache", interval=3, block=block, layer=layer) as handle:
            full = call(unet, given)
            for _ in range(2):
                assert torch.equal(call(unet, given), full), (block, layer)
            assert handle.trace.strip() == "Fcc"


def test_channels_last_keeps_its_rounding():
    unet = sd_like().to(memory_format=torch.channels_last)
    given = inputs()
    given["sample"] = given["sample"].to(memory_format=torch.channels_last)
    for block, layer in ((0, 1), (1, 0)):
        with c4d.accelerate(unet, "deepcache", interval=2, block=block, layer=layer) as handle:
            assert torch.equal(call(unet, given), call(unet, given))
            assert handle.trace.strip() == "Fc"


# The schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_steps", "count", "center", "power", "steps"),
    [
        (50, 10, 15, 1.4, "0,5,9,13,17,21,26,31,37,43"),
        (50, 10, 10, 1.2, "0,5,9,12,16,21,26,32,38,43"),
        (50, 17, 15, 1.4, "0,3,6,8,11,13,15,17,20,22,25,28,32,35,38,42,46"),
    ],
)
def test_quadratic_steps_are_those_of_the_released_code(num_steps, count, center, power, steps):
    assert ",".join(map(str, quadratic_steps(num_steps, count, center, power))) == steps


@pytest.mark.parametrize("interval", [2, 3, 5, 10])
def test_a_quadratic_schedule_has_one_full_step_per_interval_and_begins_with_one(interval):
    for num_steps in (20, 25, 50):
        steps = Quadratic(interval).begin(num_steps)
        assert len(steps) == -(-num_steps // interval)
        assert steps[0] == 0


def test_the_strips_are_those_of_the_schedules():
    unet = sd_like()
    with c4d.accelerate(unet, "deepcache", interval=3) as handle:
        for step in range(7):
            call(unet, inputs(step=step))
        assert handle.trace.strip() == "FccFccF"
    with c4d.accelerate(unet, "deepcache", interval=5, schedule="quadratic") as handle:
        with pytest.raises(RunError, match="Write `with handle"):
            call(unet, inputs())
        with handle.run(num_steps=50):
            for step in range(50):
                call(unet, inputs(step=step))
        full = [i for i, symbol in enumerate(handle.trace.strip()) if symbol == "F"]
        assert full == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]


def test_impossible_quadratic_schedules_are_errors():
    with pytest.raises(SettingError, match="interval"):
        Quadratic(interval=1)
    with pytest.raises(SettingError, match="no list of 12 different full steps"):
        quadratic_steps(10, 12, 5, 1.4)
