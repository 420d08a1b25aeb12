import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from cache4diffusion.measure import FlopCounter, MeasureError, PeakMemory, Timer, cost, count_flops, flux_block_flops

ATTENTION = 4 * 2 * 3 * 20 * 30 * 16  # 4 B H N M D of the tensors below


@pytest.fixture
def qkv():
    return torch.randn(2, 3, 20, 16), torch.randn(2, 3, 30, 16), torch.randn(2, 3, 30, 16)


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_every_attention_backend_of_the_cpu_counts_the_same(qkv, backend, inference, masked):
    mask = torch.zeros(20, 30) if masked else None
    with torch.inference_mode(inference), sdpa_kernel(backend):
        assert count_flops(lambda: F.scaled_dot_product_attention(*qkv, attn_mask=mask)) == ATTENTION


def test_torch_alone_still_counts_cpu_attention_as_nothing(qkv):
    # If this fails torch has learned it: MISSING_FORMULAS steps aside by itself, the entry can go.
    with FlopCounterMode(display=False) as counter:
        F.scaled_dot_product_attention(*qkv)
    assert counter.get_total_flops() == 0


def test_every_attention_operator_of_this_torch_has_a_formula():
    known = {*flop_registry, *cost.missing_formulas()}
    # Composite: torch breaks it up into products before the counter sees it. The other two only fill given buffers or
    # stand below operators that are counted.
    exempt = {"_scaled_dot_product_attention_math", "scaled_dot_product_attention", "_fused_sdp_choice"}
    exempt |= {"_flash_attention_forward_no_dropout_inplace", "_cudnn_attention_forward", "_cudnn_attention_backward"}
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "aten::" in name}
    attention = {name for name in names if "attention" in name or "scaled_dot" in name} - exempt
    assert not {name for name in attention if getattr(torch.ops.aten, name) not in known}


def test_counting_leaves_torchs_registry_as_it_was(qkv):
    before = dict(flop_registry)
    count_flops(lambda: F.scaled_dot_product_attention(*qkv))
    assert flop_registry == before


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_grouped_query_attention_counts_all_query_heads(kv_heads):
    q, k = torch.randn(1, 6, 8, 16), torch.randn(1, kv_heads, 8, 16)
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, k, enable_gqa=True)) == 4 * 6 * 8 * 8 * 16


def test_attention_backward_is_two_and_a_half_forwards(qkv):
    q, k, v = (x.requires_grad_() for x in qkv)
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == 3.5 * ATTENTION


X = torch.randn(2, 5, 16)


@pytest.mark.parametrize(
    ("call", "flops"),
    [
        (lambda: nn.Linear(16, 8)(X), 2 * 10 * 16 * 8),
        (lambda: X[0] @ X[0, 0], 2 * 5 * 16),
        (lambda: torch.einsum("bnd,bmd->bnm", X, X), 2 * 2 * 5 * 5 * 16),
        (lambda: torch.addbmm(torch.zeros(5, 5), X, X.mT), 2 * 2 * 5 * 5 * 16),
        (lambda: nn.Conv2d(4, 6, 3)(torch.zeros(1, 4, 8, 8)), 2 * 6 * 36 * 4 * 9),
        (lambda: nn.Conv2d(4, 8, 3, groups=2)(torch.zeros(1, 4, 8, 8)), 2 * 8 * 36 * 2 * 9),
        (lambda: nn.Linear(16, 8).bfloat16()(X.bfloat16()), 2 * 10 * 16 * 8),
        (lambda: F.gelu(F.layer_norm(X, (16,))), 0),
    ],
)
@pytest.mark.parametrize("inference", [True, False])
def test_products_and_convolutions_count_two_per_multiply_add(call, flops, inference):
    with torch.inference_mode(inference), FlopCounter() as counter:
        call()
    assert counter.total == flops
    assert sum(counter.by_operator.values()) == flops
    assert not counter.uncounted


@pytest.mark.parametrize("name", ["attention", "layer"])
def test_fused_fast_paths_count_as_the_plain_ones(name):
    if name == "attention":
        module = nn.MultiheadAttention(16, 2, batch_first=True)
    else:
        module = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    args = (X, X, X) if isinstance(module, nn.MultiheadAttention) else (X,)
    with torch.no_grad():
        fused, plain = count_flops(lambda: module.eval()(*args)), count_flops(lambda: module.train()(*args))
    assert fused == plain > 0


def test_placeholders_count_what_they_do():
    layer = nn.Linear(16, 8)
    assert count_flops(lambda: layer(X[:, :0])) == 0  # no tokens
    assert count_flops(lambda: torch.cat([X.new_empty(2, 5, 0), X], -1)) == 0  # zero width
    assert count_flops(lambda: layer(X.new_full((2, 1, 16), torch.nan))) == 2 * 2 * 16 * 8  # one token
    empty = X.new_empty(2, 3, 0, 16)
    assert count_flops(lambda: F.scaled_dot_product_attention(empty, empty, empty)) == 0


def test_an_operator_without_a_formula_is_named_not_hidden():
    with torch.inference_mode(), FlopCounter() as counter:
        nn.LSTM(16, 16)(X)
    assert any("rnn" in name or "lstm" in name for name in counter.uncounted)


def test_a_modules_share_is_counted_apart_even_if_it_fails():
    inner, outer = nn.Linear(16, 16), nn.Linear(16, 4)
    with FlopCounter(inner) as counter:
        outer(inner(inner(X)))
        with pytest.raises(RuntimeError):
            inner(X[..., :3])
    assert counter.module_total == 2 * 2 * 10 * 16 * 16
    assert counter.total == counter.module_total + 2 * 10 * 16 * 4
    assert not inner._forward_hooks
    assert not inner._forward_pre_hooks


@pytest.mark.parametrize("kind", ["double", "single"])
@pytest.mark.parametrize(("image_tokens", "text_tokens", "batch"), [(16, 8, 1), (64, 5, 3)])
def test_a_flux_block_counts_what_the_formula_says(kind, image_tokens, text_tokens, batch):
    from diffusers.models.transformers.transformer_flux import (
        FluxPosEmbed,
        FluxSingleTransformerBlock,
        FluxTransformerBlock,
    )

    width = 64
    block = (FluxTransformerBlock if kind == "double" else FluxSingleTransformerBlock)(width, 2, 32)
    inputs = {
        "hidden_states": torch.randn(batch, image_tokens, width),
        "encoder_hidden_states": torch.randn(batch, text_tokens, width),
        "temb": torch.randn(batch, width),
        "image_rotary_emb": FluxPosEmbed(10000, [8, 12, 12])(torch.zeros(image_tokens + text_tokens, 3)),
    }
    with torch.inference_mode():
        measured = count_flops(lambda: block(**inputs))
    shapes = {"image_tokens": image_tokens, "text_tokens": text_tokens, "width": width, "batch": batch}
    assert measured == pytest.approx(flux_block_flops(kind, **shapes), rel=0.01)


def test_an_unknown_kind_of_block_is_refused():
    with pytest.raises(MeasureError, match="'double' and 'single'"):
        flux_block_flops("triple", image_tokens=1, text_tokens=1, width=1)


def test_the_timer_measures_seconds():
    with Timer() as timer:
        time.sleep(0.02)
    assert 0.02 <= timer.seconds < 1


def test_peak_memory_sees_what_was_freed_again_and_forgets_it_next_time():
    megabytes = 200
    with PeakMemory() as quiet:
        pass
    with PeakMemory() as peak:
        torch.ones(megabytes << 18).sum()  # float32
    with PeakMemory() as after:
        pass
    if peak.source == "rss-process":
        pytest.skip("this system has no resettable peak")
    assert peak.bytes - quiet.bytes == pytest.approx(megabytes << 20, rel=0.1)
    assert after.bytes - quiet.bytes < megabytes << 18


def test_peak_memory_falls_back_to_sampling_and_to_the_process(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(cost, "_reset_rss_peak", lambda: False)
    if cost._status_bytes("VmRSS") is not None:
        with PeakMemory() as sampled:
            time.sleep(0.02)
        assert sampled.source == "rss-sampled"
        assert sampled.bytes > 1 << 20
    monkeypatch.setattr(cost, "_status_bytes", lambda field: None)
    with PeakMemory() as process:
        pass
    assert process.source == "rss-process"
    assert process.bytes > 1 << 20
