"""TaylorSeer against a plain, slow reference written from its card."""

from itertools import pairwise

import pytest
import torch
from slow_references import TaylorParts

import cache4diffusion as c4d
from cache4diffusion.gates import FixedInterval
from cache4diffusion.predictors import Reuse
from cache4diffusion.sites import Parts
from small_denoisers import (
    LinearCounter,
    Plainly,
    SlowFlux,
    accelerated,
    differences,
    dit,
    dit_inputs,
    flux_inputs,
    sample,
)

STEPS = 24


def test_the_slow_forward_is_the_models_own(model):
    inputs = flux_inputs(2)
    plain = sample(model, inputs, 3)
    assert max(differences(sample(SlowFlux(model, Plainly()), inputs, 3), plain)) <= 1e-6


@pytest.mark.parametrize(("interval", "order"), [(5, 1), (3, 2), (6, 1)])
def test_every_step_equals_the_slow_reference(model, interval, order):
    inputs, reference = flux_inputs(2), TaylorParts(interval, order)
    expected = sample(SlowFlux(model, reference), inputs, STEPS)
    reached, trace, _ = accelerated(model, inputs, STEPS, "taylorseer", interval=interval, order=order, warmup=3)
    strip = trace.strip()
    assert [i for i, symbol in enumerate(strip) if symbol == "F"] == reference.full_steps
    if interval == 5:
        assert reference.full_steps == [0, 1, 2, 7, 12, 17, 22]
    assert max(differences(reached, expected)) <= 1e-5


def test_predictions_are_no_plain_reuse(model):
    """The reference would agree with a predictor that never extrapolates only if order did not matter."""
    inputs = flux_inputs(1)
    reached = [accelerated(model, inputs, 9, "taylorseer", interval=5, order=order)[0] for order in (0, 1)]
    assert differences(*reached)[4] > 1e-4


def test_order_0_is_interval_reuse_bit_for_bit(model):
    inputs = flux_inputs(1)
    reached, _, _ = accelerated(model, inputs, 12, "taylorseer", interval=4, order=0, warmup=3)
    reuse = c4d.Composition(Parts(), FixedInterval(4, anchor="warmup", warmup=3), Reuse())
    expected, _, _ = accelerated(model, inputs, 12, reuse)
    assert differences(reached, expected) == [0.0] * 12


def test_interval_1_never_predicts(model):
    inputs = flux_inputs(1)
    reached, trace, _ = accelerated(model, inputs, 6, "taylorseer", interval=1)
    assert trace.strip() == "F" * 6
    assert differences(reached, sample(model, inputs, 6)) == [0.0] * 6


def test_a_cached_step_runs_no_part(model):
    double, single = model.transformer_blocks, model.single_transformer_blocks
    modules = [m for b in double for m in (b.attn.to_q, b.ff.net[2], b.ff_context.net[2])]
    modules += [m for b in single for m in (b.attn.to_q, b.proj_mlp, b.proj_out)]
    before = []
    counter = LinearCounter(modules)
    with c4d.accelerate(model, "taylorseer", interval=3) as handle, handle.run(num_steps=6), counter:
        sample(model, flux_inputs(1), 6, before=lambda i: before.append(counter.count))
    counts = [b - a for a, b in pairwise([*before, counter.count])]
    assert counts[1:] == [len(modules), len(modules), 0, 0, len(modules)]


def test_lite_extrapolates_the_output_itself(model):
    inputs = flux_inputs(1)
    reached, trace, _ = accelerated(model, inputs, 12, "taylorseer-lite", interval=5, order=2)
    assert trace.strip() == "FFFccccFcccc"
    y0, y1, y2, y7 = (reached[i] for i in (0, 1, 2, 7))
    assert not torch.equal(y0, y1)
    d1 = y2 - y1  # differences begin at full step warmup - 1 = 2
    torch.testing.assert_close(reached[5], y2 + 3 * d1, rtol=1e-4, atol=1e-5)
    e1 = (y7 - y2) / 5
    e2 = (e1 - d1) / 5
    torch.testing.assert_close(reached[10], y7 + 3 * e1 + 9 / 2 * e2, rtol=1e-4, atol=1e-5)


def test_dit_parts_are_predicted_before_their_gate():
    """With every part constant in time, a cached step is exact although its gates have moved on."""
    model = dit()
    for block in model.transformer_blocks:
        for last in (block.attn1.to_out[0], block.ff.net[2]):
            last.weight.zero_()  # the part's output is its bias: constant
            last.bias.normal_(generator=torch.Generator().manual_seed(5))
    inputs = dit_inputs(2)
    plain = sample(model, inputs, 10)
    for settings in ({"interval": 4, "order": 1}, {"interval": 3, "order": 0}):
        reached, trace, _ = accelerated(model, inputs, 10, "taylorseer", **settings)
        assert "c" in trace.strip()
        assert max(differences(reached, plain)) <= 1e-6
    reached, _, _ = accelerated(model, inputs, 10, "fora", interval=3)
    assert differences(reached, plain) == [0.0] * 10, "reuse of a constant is bit-equal"


def test_lite_of_order_0_is_reuse_of_the_output_bit_for_bit(model):
    reached, trace, _ = accelerated(model, flux_inputs(1), 9, "taylorseer-lite", interval=3, order=0)
    assert trace.strip() == "FFFccFccF"
    for cached, full in [(3, 2), (4, 2), (6, 5), (7, 5)]:
        assert torch.equal(reached[cached], reached[full])


def test_lite_on_the_distilled_models_8_steps_is_full_at_the_cards(model):
    _, trace, _ = accelerated(model, flux_inputs(1), 8, "taylorseer-lite", interval=5)
    assert [i for i, symbol in enumerate(trace.strip()) if symbol == "F"] == [0, 1, 2, 7]
