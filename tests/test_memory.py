"""What is predicted of a cache's bytes is what the ledger counts in a real run."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode

import cache4diffusion as c4d
from cache4diffusion.errors import AnatomyError, SettingError
from cache4diffusion.shapes import SHAPES, shape
from cache4diffusion.zoo import tiny
from toys import (
    ACTIVE,
    ELSEWHERE,
    TRANSFORMER_METHODS,
    distinct_methods,
    dit,
    dit_loop,
    flux,
    flux_inputs,
    flux_loop,
    flux_pipeline,
    generate,
    prompt,
    sample_of,
)

STEPS = 14
SMALL = {
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 1,
    "attention_head_dim": 16,
    "in_channels": 8,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6),
}
TRAJECTORY = sorted(set(c4d.METHODS) - set(TRANSFORMER_METHODS) - ELSEWHERE)


def inputs_of_one_call(batch=2):
    return {**flux_inputs(batch=batch), "timestep": torch.full((batch,), 0.5)}


def measured(denoiser, loop, name, **settings):
    with c4d.accelerate(denoiser, name, **settings) as handle:
        with handle.run(num_steps=STEPS):
            loop(denoiser)
        return handle.memory["peak"]


@distinct_methods
@pytest.mark.filterwarnings("ignore:0 of 14 steps were cached by fastercache")  # it needs two branches
def test_equal_to_the_ledger_of_a_run(name):
    denoiser, settings = flux(), ACTIVE[name]
    predicted = c4d.cache_bytes(denoiser, name, inputs=inputs_of_one_call(), steps=STEPS, **settings)
    held = measured(denoiser, lambda denoiser: flux_loop(denoiser, flux_inputs(batch=2), STEPS), name, **settings)
    assert predicted == held
    assert held > 0 or name == "fastercache"


@pytest.mark.parametrize("name", ["toca", "fastercache"])
def test_equal_with_both_branches_in_one_call(name):
    denoiser, settings = dit(), ACTIVE[name]
    inputs = {
        "hidden_states": torch.zeros(4, 4, 8, 8),
        "timestep": torch.full((4,), 500),
        "class_labels": torch.tensor([0, 1, 10, 10]),
    }
    predicted = c4d.cache_bytes(denoiser, name, inputs=inputs, steps=STEPS, **settings)
    assert predicted == measured(denoiser, lambda d: dit_loop(d, batch=2, num_steps=STEPS), name, **settings) > 0


@pytest.mark.parametrize("name", ["dbcache", "fastercache", *TRAJECTORY])
def test_equal_of_a_pipeline_with_branches_one_by_one(name):
    pipe, settings = flux_pipeline(), ACTIVE[name]
    call = {**prompt(negative=2), "height": 16, "width": 16, "num_inference_steps": STEPS}
    predicted = c4d.cache_bytes(pipe, name, call=call, **settings)
    with c4d.accelerate(pipe, name, **settings) as handle:
        generate(pipe, STEPS, **prompt(negative=2))
        assert predicted == handle.memory["peak"] > 0


def test_a_denoiser_without_weights_will_do():
    with FakeTensorMode():
        bare = FluxTransformer2DModel(**SMALL)
    inputs = inputs_of_one_call()
    with_weights, without = (
        c4d.cache_bytes(denoiser, "taylorseer", inputs=inputs, order=1)
        for denoiser in (FluxTransformer2DModel(**SMALL), bare)
    )
    assert with_weights == without > 0


def test_nothing_is_left_behind():
    denoiser = flux()
    before = dict(denoiser.__dict__)
    c4d.cache_bytes(denoiser, "taylorseer(order=2)", inputs=inputs_of_one_call())
    assert denoiser.__dict__ == before
    assert not any(isinstance(p, torch._subclasses.FakeTensor) for p in denoiser.parameters())


def test_branches_one_by_one_keep_as_much_each():
    denoiser, call = FluxTransformer2DModel(**SMALL), inputs_of_one_call()
    other = {**call, "encoder_hidden_states": call["encoder_hidden_states"] + 1}
    one, two = (c4d.cache_bytes(denoiser, "taylorseer", inputs=inputs) for inputs in (call, [call, other]))
    assert two == 2 * one


@pytest.mark.slow
def test_flux_dev_at_full_size():
    """Two snapshots in bfloat16 of four parts in 19 blocks and one part in 38, at 4096 + 512 tokens of width 3072."""
    known = shape("flux.1-dev")
    denoiser, calls = known.denoiser(), known.calls(height=1024)
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == 11_901_408_320
    parts = c4d.cache_bytes(denoiser, "taylorseer", inputs=calls, order=1)
    assert parts == 2 * 2 * 3072 * (4096 + 512) * (19 * 2 + 38)
    assert c4d.cache_bytes(denoiser, "taylorseer-lite", inputs=calls, order=1) == 2 * 2 * 4096 * 64


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_run_without_weights(name):
    shapes = SHAPES[name]
    fewer = {"num_layers": 1} | ({"num_single_layers": 1} if name in ("flux.1-dev", "hunyuan-video") else {})
    with torch.no_grad():
        outputs = [sample_of(shapes.denoiser(**fewer)(**call)) for call in shapes.calls(height=64, frames=5)]
    assert len(outputs) == shapes.branches
    assert all(output.dtype == torch.bfloat16 for output in outputs)
    with pytest.raises(SettingError, match="multiples of 16"):
        shapes.calls(height=63)


def test_what_cannot_be_counted_is_refused():
    denoiser = flux()
    with pytest.raises(SettingError, match="needs inputs"):
        c4d.cache_bytes(denoiser, "fora")
    with pytest.raises(SettingError, match="use 2 or more"):
        c4d.cache_bytes(denoiser, "fora", inputs=inputs_of_one_call(), steps=1)
    with c4d.accelerate(denoiser, "fora"), pytest.raises(SettingError, match=r"handle\.memory"):
        c4d.cache_bytes(denoiser, "fora", inputs=inputs_of_one_call())


class ReadsItsData(FluxTransformer2DModel):
    def forward(self, hidden_states, **kwargs):
        hidden_states = self.x_embedder(hidden_states)
        return (hidden_states * 2 if hidden_states.sum() > 0 else hidden_states,)


def test_a_denoiser_that_reads_its_data_is_refused_in_words():
    denoiser = ReadsItsData(**SMALL)
    with pytest.raises(AnatomyError, match="reads its data"):
        c4d.cache_bytes(denoiser, "taylorseer-lite", inputs=inputs_of_one_call())
    denoiser, _, inputs = tiny("HunyuanImageTransformer2DModel").make(2)
    with pytest.raises(AnatomyError, match="reads its data"):  # where its masks are true
        c4d.cache_bytes(denoiser, "taylorseer-lite", inputs=inputs)
