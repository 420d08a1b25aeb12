"""VCUT: cross-attention to one token is a constant of the run."""

from collections import Counter

import pytest
import torch
from slow_modules import accelerated, made, sample

import cache4diffusion as c4d
from cache4diffusion.errors import AnatomyError

STEPS = 5
SVD = "UNetSpatioTemporalConditionModel"


def crosses(denoiser):
    """The cross-attentions of both kinds."""
    return {path: module for path, module in denoiser.named_modules() if path.endswith(".attn2")}


def test_svd_is_exact_with_spatial_and_temporal_attention():
    denoiser, inputs = made(SVD)
    plain = sample(denoiser, inputs, STEPS)
    reached, handle = accelerated(denoiser, inputs, STEPS, "vcut")
    for a, b in zip(reached, plain, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())
    assert handle.trace.strip() == "F" + "c" * (STEPS - 1)
    kinds = {"temporal" in path for path in crosses(denoiser)}
    assert kinds == {True, False}


def test_nothing_of_it_runs_after_the_first_step():
    denoiser, inputs = made(SVD)
    with c4d.accelerate(denoiser, "vcut") as handle, handle.run(num_steps=STEPS), torch.no_grad():
        denoiser(**inputs)
        ran = Counter()
        hooks = [
            module.register_forward_hook(lambda *_, name=f"{path}.{end}": ran.update([name]))
            for path, attention in crosses(denoiser).items()
            for end, module in attention.named_modules()
            if end
        ]
        denoiser(**inputs | {"timestep": inputs["timestep"] - 100})
        for hook in hooks:
            hook.remove()
        assert not ran
        assert len(handle._engines[0].attachment.bypassed) >= len(crosses(denoiser))
    assert len(crosses(denoiser)) == 8


def test_it_is_the_projected_embedding():
    """The card: ``k_l = to_out(to_v(ctx))``, whatever the queries are."""
    denoiser, inputs = made(SVD)
    seen = {}
    hooks = [
        module.register_forward_hook(
            lambda module, args, kwargs, out, path=path: seen.update({path: (kwargs, out)}), with_kwargs=True
        )
        for path, module in crosses(denoiser).items()
    ]
    sample(denoiser, inputs, 1)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 8
    for path, module in crosses(denoiser).items():
        given, out = seen[path]
        k = module.to_out[0](module.to_v(given["encoder_hidden_states"]))
        torch.testing.assert_close(out, k.expand_as(out), rtol=1e-5, atol=1e-6)


def test_memory_is_one_token_per_cross_attention():
    denoiser, inputs = made(SVD)
    outputs = {}
    hooks = [
        module.register_forward_hook(lambda module, args, out, path=path: outputs.update({path: out}))
        for path, module in crosses(denoiser).items()
    ]
    sample(denoiser, inputs, 1)
    for hook in hooks:
        hook.remove()
    _, handle = accelerated(denoiser, inputs, STEPS, "vcut")
    tokens = sum(out.shape[0] * out.shape[2] for out in outputs.values())
    assert handle.memory["peak"] == 4 * tokens
    call = {**inputs, "timestep": inputs["timestep"]}
    assert c4d.cache_bytes(denoiser, "vcut", inputs=call, steps=STEPS) == 4 * tokens


@pytest.mark.filterwarnings("ignore:0 of")
def test_always_computed_is_the_plain_denoiser():
    denoiser, inputs = made(SVD)
    reached, _ = accelerated(denoiser, inputs, STEPS, "vcut", interval=1)
    assert all(torch.equal(a, b) for a, b in zip(reached, sample(denoiser, inputs, STEPS), strict=True))


def test_both_branches_of_guidance_keep_their_own_constant():
    denoiser, inputs = made(SVD)
    inputs["encoder_hidden_states"][0] = 0  # the unconditional half: only biases
    plain = sample(denoiser, inputs, STEPS)
    for a, b in zip(accelerated(denoiser, inputs, STEPS, "vcut")[0], plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["UNet3DConditionModel", "PixArtTransformer2DModel"])
def test_longer_contexts_are_refused(name):
    denoiser, inputs = made(name)
    with (
        c4d.accelerate(denoiser, "vcut"),
        torch.no_grad(),
        pytest.raises(AnatomyError, match=r"attends to 5 tokens.*'t-gate-v2'"),
    ):
        denoiser(**inputs)


def test_two_image_embeddings_are_refused():
    denoiser, inputs = made(SVD)
    inputs["encoder_hidden_states"] = torch.cat([inputs["encoder_hidden_states"]] * 2, 1)
    with c4d.accelerate(denoiser, "vcut"), torch.no_grad(), pytest.raises(AnatomyError, match="attends to 2 tokens"):
        denoiser(**inputs)


def test_two_image_embeddings_are_refused_after_runs_with_one():
    denoiser, inputs = made(SVD)
    twice = inputs | {"encoder_hidden_states": torch.cat([inputs["encoder_hidden_states"]] * 2, 1)}
    with c4d.accelerate(denoiser, "vcut") as handle, torch.no_grad():
        with handle.run(num_steps=2):
            denoiser(**inputs)
            denoiser(**inputs | {"timestep": inputs["timestep"] - 100})
        with pytest.raises(AnatomyError, match="attends to 2 tokens"), handle.run(num_steps=2):
            denoiser(**twice)
        with handle.run(num_steps=2):  # and goes on with one
            denoiser(**inputs)
            denoiser(**inputs | {"timestep": inputs["timestep"] - 100})
        assert handle.trace.strip() == "Fc"
