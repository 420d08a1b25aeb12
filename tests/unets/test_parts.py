"""Methods for transformer parts on U-Nets: what works inside levels, and what is refused."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from torch import nn
from unet_zoo import call, counting, inputs, ip_adapter_like, sd_like, sdxl_like, unconditional

import cache4diffusion as c4d
from cache4diffusion.anatomy import observe
from cache4diffusion.errors import AnatomyError

METHODS = {"fora": {"interval": 3}, "taylorseer": {"interval": 3, "warmup": 1}}
PARTS = ("attn1", "attn2", "ff")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("make", "kind"), [(sd_like, "sd"), (sdxl_like, "sdxl"), (sd_like, "controlnet"), (ip_adapter_like, "ip-adapter")]
)
def test_parts_inside_levels_are_off_when_off_and_exact_on_a_frozen_input(name, make, kind):
    unet = make()
    plain = [call(unet, inputs(kind, step=i)) for i in range(3)]
    with c4d.accelerate(unet, name, interval=1) as handle:
        for i, expected in enumerate(plain):
            assert torch.equal(call(unet, inputs(kind, step=i)), expected)
        assert handle.trace.strip() == "FFF"
        assert handle.memory["held"] > 0
    parts = {path for path, _ in unet.named_modules() if path.split(".")[-1] in PARTS}
    assert len(parts) >= 18
    with c4d.accelerate(unet, name, **METHODS[name]) as handle:
        frozen = inputs(kind)
        full = call(unet, frozen)
        for _ in range(2):
            with counting(unet) as ran:
                output = call(unet, frozen)
            torch.testing.assert_close(output, full, rtol=1e-5, atol=1e-6)
            # A part is still called, but nothing inside it runs.
            assert not any(path.startswith(f"{part}.") for path in ran for part in parts)
            assert ran["mid_block.resnets.0"] == 1  # what is no part runs
        assert handle.trace.strip() == "Fcc"


@pytest.mark.parametrize("name", ["fbcache", "dbcache", "teacache", "speca", "toca"])
@pytest.mark.parametrize("make", [sd_like, unconditional])
def test_methods_that_need_a_stack_are_refused_before_the_first_call(name, make):
    unet = make()
    before = {path: set(module.__dict__) for path, module in unet.named_modules()}
    settings = {"coefficients": "identity"} if name == "teacache" else {}
    with pytest.raises(AnatomyError, match=r"has no stack of blocks.*'deepcache'.*'taylorseer-lite'"):
        c4d.accelerate(unet, name, **settings)
    assert {path: set(module.__dict__) for path, module in unet.named_modules()} == before


@pytest.mark.parametrize("name", ["fbcache", "speca", "toca"])
def test_a_u_net_in_disguise_is_refused_at_its_first_call(name):
    class Disguised(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = sd_like()

        def forward(self, sample, timestep, encoder_hidden_states):
            return self.net(sample, timestep, encoder_hidden_states)

    unet = Disguised()
    given = inputs()
    plain = call(unet, given)
    handle = c4d.accelerate(unet, name)
    with pytest.raises(AnatomyError, match="has no stack of blocks"):
        call(unet, given)
    handle.remove()
    assert torch.equal(call(unet, given), plain)


def test_u_nets_without_transformer_blocks_have_no_parts():
    unet = unconditional()
    with c4d.accelerate(unet, "fora"), pytest.raises(AnatomyError, match="no parts"):
        call(unet, inputs("unconditional"))


def test_the_default_for_a_u_net_is_deepcache(capsys):
    with c4d.accelerate(sd_like()):
        assert "deepcache" in capsys.readouterr().out


def contexts(unet, given):
    parts = [p for stack in observe(unet, (), given).stacks for block in stack.blocks for p in block.parts]
    return {part.context for part in parts if part.kind == "cross_attn"}


@pytest.mark.parametrize("processor", [None, AttnProcessor(), SlicedAttnProcessor(1)], ids=["fused", "plain", "sliced"])
@pytest.mark.parametrize("count", [1, 5])
def test_the_tokens_of_a_context_are_counted_whatever_computes_the_attention(processor, count):
    unet, given = sd_like(), inputs()
    if processor is not None:
        unet.set_attn_processor(processor)
    given["encoder_hidden_states"] = given["encoder_hidden_states"][:, :count]
    assert contexts(unet, given) == {count}


def test_an_adapters_tokens_beside_a_single_one_are_refused():
    """Trap: its attention has the same queries as the text's, which were counted once."""
    unet, given = ip_adapter_like(), inputs("ip-adapter")
    given["encoder_hidden_states"] = given["encoder_hidden_states"][:, :1]
    assert contexts(unet, given) == {1 + 4}
    with c4d.accelerate(unet, "vcut"), pytest.raises(AnatomyError, match="attends to 5 tokens"):
        call(unet, given)
