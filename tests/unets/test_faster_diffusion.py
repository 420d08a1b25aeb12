"""Faster Diffusion: the encoder at key steps, the decoder at all of them, one by one or together."""

import pytest
import torch
from unet_zoo import CASES, SKIPS, call, clone, counting, inputs, sd_like

import cache4diffusion as c4d
from cache4diffusion.errors import AnatomyError, CompositionError, RunError
from cache4diffusion.gates import ScaledSchedule, Step
from small_denoisers import flux, flux_inputs

STEPS = 7
KEYS = {"key_steps": (0, 14, 35)}  # of 50: steps 0, 2 and 5 of 7
TIMES = [float(900 - 10 * i) for i in range(STEPS)]
ENCODER = ("conv_in", "down_blocks", "mid_block")


def given(kind, i):
    """Arguments of step i: everything but latent and clock is the same."""
    now, fixed = inputs(kind, step=i), inputs(kind)
    return {**fixed, "sample": now["sample"], "timestep": now["timestep"]}


@torch.no_grad()
def slow(unet, kind="sd"):
    """The card: ``skips, m = Encoder(x, t, text)`` at key steps; ``eps = Decoder(skips, m, t, text)`` at all."""
    kept, outputs = {}, []
    for i in range(STEPS):
        is_key = i in (0, 2, 5)

        def keep(module, args, output, path, is_key=is_key):
            if is_key:
                kept[path] = copied(output)
            return copied(kept[path])

        hooks = [
            unet.get_submodule(path).register_forward_hook(lambda m, a, o, path=path, keep=keep: keep(m, a, o, path))
            for path in ("conv_in", "mid_block", *(f"down_blocks.{n}" for n in range(3)))
        ]
        try:
            outputs.append(call(unet, given(kind, i)))
        finally:
            for hook in hooks:
                hook.remove()
    return outputs


def copied(output):
    if isinstance(output, torch.Tensor):
        return output.clone()
    return tuple(copied(each) for each in output)


def run(unet, kind="sd", **settings):
    with c4d.accelerate(unet, "faster-diffusion", **settings) as handle, handle.run(timesteps=TIMES):
        return [call(unet, given(kind, i)) for i in range(STEPS)], handle


@pytest.mark.parametrize("kind", ["sd", "sdxl", "ip-adapter", "freeu"])
def test_outputs_are_the_slow_references(kind):
    make, name = CASES[kind]
    unet = make()
    expected = slow(unet, name)
    for _ in range(2):
        reached, handle = run(unet, name, **KEYS)
        for a, b in zip(reached, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert handle.trace.strip() == "FcFccFc"


@pytest.mark.parametrize("batch", [1, 2])
def test_parallel_is_serial(batch):
    unet = sd_like()

    def rows(i):
        now = given("sd", i)
        return {k: v if v.ndim == 0 else v[:batch] for k, v in now.items()}

    found, ran_rows = [], []
    hook = unet.conv_out.register_forward_pre_hook(lambda module, args: ran_rows.append(args[0].shape[0]))
    for parallel in (False, True):
        ran_rows.clear()
        with (
            c4d.accelerate(unet, "faster-diffusion", **KEYS, parallel=parallel) as handle,
            handle.run(timesteps=TIMES),
        ):
            found.append([call(unet, rows(i)) for i in range(STEPS)])
            assert handle.trace.strip() == "FcFccFc"
    hook.remove()
    assert ran_rows[-6:] == [batch, batch, batch, 2 * batch, batch, batch]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_encoder_runs_at_key_steps_only():
    unet, ran = sd_like(), []
    with c4d.accelerate(unet, "faster-diffusion", **KEYS) as handle, handle.run(timesteps=TIMES):
        handle.prepare(**given("sd", 0))
        for i in range(STEPS):
            with counting(unet) as seen:
                call(unet, given("sd", i))
            ran.append(any(path.startswith(ENCODER) and path.count(".") > 1 for path in seen))
            assert seen["up_blocks.2.resnets.2"] == 1
    assert ran == [i in (0, 2, 5) for i in range(STEPS)]


def test_the_latent_is_not_read_at_other_steps():
    unet = sd_like()
    found = []
    for shift in (0, 1):
        with c4d.accelerate(unet, "faster-diffusion", interval=2) as handle, handle.run(timesteps=TIMES[:2]):
            call(unet, given("sd", 0))
            other = given("sd", 1)
            found.append(call(unet, {**other, "sample": other["sample"] + shift}))
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:0 of")
@pytest.mark.parametrize("settings", [{"interval": 1}, {"key_steps": tuple(range(50))}])
def test_keys_everywhere_are_the_plain_denoiser(settings):
    unet = sd_like()
    reached, handle = run(unet, **settings)
    assert all(torch.equal(a, call(unet, given("sd", i))) for i, a in enumerate(reached))
    assert handle.trace.strip() == "F" * STEPS


@pytest.mark.parametrize("kind", ["sd", "controlnet", "t2i"])
def test_cached_steps_on_a_frozen_input_are_exact(kind):
    unet, frozen = sd_like(), inputs(kind)
    plain = call(unet, frozen)
    with c4d.accelerate(unet, "faster-diffusion", interval=4):
        for _ in range(4):
            assert torch.equal(call(unet, clone(frozen)), plain)


def test_the_published_list():
    gate = ScaledSchedule(c4d.method("faster-diffusion").key_steps, 50)
    keys = [i for i in range(50) if not gate.propose(None, Step(i, 50), None)]
    assert keys == [0, 1, 2, 3, 5, 10, 15, 25, 35]


def test_memory_is_the_skips_and_the_middle():
    unet = sd_like()
    _, handle = run(unet, **KEYS)
    skips = sum(2 * channels * size * size for channels, size in SKIPS)
    assert handle.memory["peak"] == 4 * (skips + 2 * 16 * 2 * 2)


@pytest.mark.parametrize("parallel", [False, True])
def test_memory_is_known_before(parallel):
    """Decoded together, the outputs of the steps to come are held as well."""
    unet, settings = sd_like(), {"interval": 4, "parallel": parallel}
    _, handle = run(unet, **settings)
    output = 2 * 4 * 8 * 8 * 4
    assert handle.memory["peak"] - run(unet, interval=4)[1].memory["peak"] == 3 * output * parallel
    assert (
        c4d.cache_bytes(unet, "faster-diffusion", inputs=given("sd", 0), steps=STEPS, **settings)
        == (handle.memory["peak"])
    )


def test_what_it_cannot_serve_is_refused():
    unet = sd_like()
    with (
        c4d.accelerate(unet, "faster-diffusion", **KEYS, parallel=True) as handle,
        handle.run(num_steps=STEPS),
        pytest.raises(RunError, match="needs the timesteps"),
    ):
        for i in range(2):
            call(unet, given("sd", i))
    with pytest.raises(CompositionError, match="decodes steps before their time"):
        c4d.accelerate(unet, "faster-diffusion", parallel=True, cfg="fastercache")
    with c4d.accelerate(flux(), "faster-diffusion") as handle, pytest.raises(AnatomyError, match="no U-Net levels"):
        handle.prepare(**flux_inputs(), timestep=torch.tensor([0.5]))
