"""Text-KV cache: what works on the prompt alone runs once per prompt, and every output is what it was."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from guided_loops import Prompted
from slow_modules import accelerated, made, sample, timesteps_of

import cache4diffusion as c4d
from cache4diffusion.anatomy import observe
from cache4diffusion.errors import AnatomyError

STEPS = 4
CROSS = {
    "PixArtTransformer2DModel": ("caption_projection", "attn2.to_k", "attn2.to_v"),
    "WanTransformer3DModel": ("text_embedder", "attn2.to_k", "attn2.to_v"),
    "UNet2DConditionModel": ("attn2.to_k", "attn2.to_v"),
    "NucleusMoEImageTransformer2DModel": ("encoder_proj", "add_k_proj", "add_v_proj"),
}


@contextmanager
def counting(denoiser, ends):
    """How often these modules compute. Within, they may be wrapped; around, they are counted."""
    ran, counted = Counter(), [(path, m) for path, m in denoiser.named_modules() if path.endswith(tuple(ends))]

    def count(path, forward):
        def counting_forward(*args, **kwargs):
            ran.update([path])
            return forward(*args, **kwargs)

        return counting_forward

    for path, module in counted:
        module.forward = count(path, module.forward)
    try:
        yield ran
    finally:
        for _, module in counted:
            del module.forward


@pytest.mark.parametrize("name", CROSS)
def test_outputs_are_bit_equal_and_each_projection_runs_once(name):
    denoiser, inputs = made(name)
    plain = sample(denoiser, inputs, STEPS)
    with counting(denoiser, CROSS[name]) as ran, c4d.accelerate(denoiser, "text-kv-cache") as handle:
        handle.prepare(**inputs)
        ran.clear()  # what is seen of it is seen in a forward
        for run in (1, 2):
            with handle.run(timesteps=timesteps_of(STEPS)):
                reached = sample(denoiser, inputs, STEPS)
            assert all(torch.equal(a, b) for a, b in zip(reached, plain, strict=True))
            assert set(ran.values()) == {run}
        assert handle.trace.strip() == "F" + "c" * (STEPS - 1)
        assert {path.split(".")[-1] for path in ran} >= {end.split(".")[-1] for end in CROSS[name]}
        assert handle.memory["held"] == 0


def test_memory_is_that_of_keys_and_values():
    denoiser, inputs = made("PixArtTransformer2DModel")
    _, handle = accelerated(denoiser, inputs, STEPS, "text-kv-cache")
    found = observe(denoiser, (), inputs).invariant
    batch, text = inputs["encoder_hidden_states"].shape[:2]
    width = denoiser.inner_dim
    assert handle.memory["peak"] == 4 * batch * text * width * len(found)
    assert c4d.cache_bytes(denoiser, "text-kv-cache", inputs=inputs, steps=STEPS) == handle.memory["peak"]


def test_two_prompts_give_two_entries():
    prompted = Prompted(made("PixArtTransformer2DModel")[0], "hidden_states", (4, 8, 8))
    more = {"encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool)}
    call = prompted.call
    prompted.call = lambda denoiser, x, time, text: denoiser(
        x,
        encoder_hidden_states=text,
        timestep=torch.full((x.shape[0],), time),
        encoder_attention_mask=more["encoder_attention_mask"],
        return_dict=False,
    )[0]
    assert call is not None
    plain = prompted.sequential(STEPS)
    with (
        c4d.accelerate(prompted.denoiser, "text-kv-cache") as handle,
        handle.run(timesteps=timesteps_of(STEPS)),
    ):
        reached = prompted.sequential(STEPS)
        assert list(handle.stats["strips"].values()) == ["Fccc", "Fccc"]
    assert all(torch.equal(a, b) for a, b in zip(reached, plain, strict=True))


@torch.no_grad()
def test_conditioning_that_is_written_into_is_computed_anew():
    """Trap: an entry by the address of the text's memory is found again under other words."""
    denoiser, inputs = made("PixArtTransformer2DModel")
    inputs = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone()}

    def call(time):
        return denoiser(**inputs | {"timestep": torch.full_like(inputs["timestep"], time)}, return_dict=False)[0]

    with c4d.accelerate(denoiser, "text-kv-cache") as handle, handle.run(timesteps=[900.0, 800.0, 700.0]):
        call(900.0)
        call(800.0)
        inputs["encoder_hidden_states"].mul_(-1)
        reached = call(700.0)
        assert handle.trace.strip() == "FcF"
    assert torch.equal(reached, call(700.0))


def test_in_flux_only_the_embedding_of_the_text_is_invariant():
    """Trap: text that is modulated by the timestep and updated by attention has no constant keys and values."""
    denoiser, inputs = made("FluxTransformer2DModel")
    found = {each.path for each in observe(denoiser, (), inputs).invariant}
    assert found == {"context_embedder", "time_text_embed.text_embedder"}
    plain = sample(denoiser, inputs, STEPS)
    reached, _ = accelerated(denoiser, inputs, STEPS, "text-kv-cache")
    assert all(torch.equal(a, b) for a, b in zip(reached, plain, strict=True))


def test_without_a_prompt_it_is_refused():
    denoiser, inputs = made("UNet2DModel")
    with (
        c4d.accelerate(denoiser, "text-kv-cache"),
        torch.no_grad(),
        pytest.raises(AnatomyError, match="works on the prompt alone"),
    ):
        denoiser(**inputs)


@pytest.mark.filterwarnings("ignore:0 of")
def test_always_computed_is_the_plain_denoiser():
    denoiser, inputs = made("PixArtTransformer2DModel")
    reached, handle = accelerated(denoiser, inputs, STEPS, "text-kv-cache", interval=1)
    assert all(torch.equal(a, b) for a, b in zip(reached, sample(denoiser, inputs, STEPS), strict=True))
    assert handle.trace.strip() == "F" * STEPS
