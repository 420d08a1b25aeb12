"""DMD: the released algorithm with its modes made, against ours without; what it reproduces."""

import pytest
import torch
from forecasts import assert_same, slow_dmd, walk, wavy

from cache4diffusion.predictors import DynamicModes, Taylor
from small_denoisers import accelerated, differences, flux, flux_inputs, rows_of, sample


def oscillations(i, count=2, rows=2, size=10):
    """Sums of damped oscillations; every row has its own."""
    g = torch.Generator().manual_seed(0)
    shape = (rows, count, 1)
    rate, pace = 0.02 * torch.rand(shape, generator=g).double(), 0.1 + 0.3 * torch.rand(shape, generator=g).double()
    phase, height = (6 * torch.rand(2, rows, count, size, generator=g).double()).unbind(0)
    return (height * torch.exp(-rate * i) * torch.cos(pace * i + phase)).sum(1)


@pytest.mark.parametrize("gap", [1, 3])
def test_oscillations_are_predicted_to_the_last_digits(gap):
    predictor = DynamicModes()
    state = predictor.init(2)
    for i in range(0, 6 * gap, gap):
        predictor.update(state, [oscillations(i)], float(i))
    for i in range(5 * gap + 1, 7 * gap):
        torch.testing.assert_close(predictor.predict(state, float(i))[0], oscillations(i), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 2])
def test_it_equals_the_released_algorithm(rank):
    predictor = DynamicModes(rank=rank)
    state = predictor.init(2)
    for i in range(0, 30, 5):
        predictor.update(state, [wavy(i, size=12)], float(i))
    for i in (26, 28, 31):
        expected = [
            slow_dmd(torch.stack([wavy(j, size=12)[row] for j in range(0, 30, 5)], 1), (i - 25) / 5, rank)
            for row in range(2)
        ]
        torch.testing.assert_close(predictor.predict(state, float(i))[0], torch.stack(expected), rtol=1e-6, atol=1e-6)


def test_only_the_uniform_end_of_the_history_counts():
    predictor, others = DynamicModes(history=8), DynamicModes(history=8)
    whole, part = predictor.init(2), others.init(2)
    for i in (0, 1, 4, 8, 12, 16):
        predictor.update(whole, [wavy(i)], float(i))
    for i in (4, 8, 12, 16):
        others.update(part, [wavy(i)], float(i))
    torch.testing.assert_close(predictor.predict(whole, 18.0)[0], others.predict(part, 18.0)[0])


def test_with_fewer_than_4_it_is_taylor_of_order_1():
    strip = "FccFccFccFc"
    assert_same(walk(DynamicModes(), wavy, strip)[:9], walk(Taylor(1), wavy, strip)[:9])
    assert not torch.allclose(walk(DynamicModes(), wavy, strip)[10], walk(Taylor(1), wavy, strip)[10])


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_constant_is_exact(value):
    found = walk(DynamicModes(), lambda i: torch.full((2, 3), value, dtype=torch.float64), "FFFFccFcc")
    assert_same(found, [torch.full((2, 3), value, dtype=torch.float64)] * 9, 1e-6)


def test_rows_are_independent():
    predictor = DynamicModes()
    both, one = predictor.init(2), predictor.init(1)
    for i in range(6):
        predictor.update(both, [wavy(i)], float(i))
        predictor.update(one, [wavy(i)[1:]], float(i))
    # Not to the last bit: batched products may add up in another order.
    assert_same(predictor.predict(both, 8.0)[0][1:], predictor.predict(one, 8.0)[0], 1e-12)


def test_an_exploding_fit_is_plain_reuse():
    predictor = DynamicModes(rank=1, ridge=0.0)
    state = predictor.init(1)
    for i in range(4):
        predictor.update(state, [torch.full((1, 2), 1e-150 * 1e40**i, dtype=torch.float64)], float(i))
    newest = torch.full((1, 2), 1e-150 * 1e40**3, dtype=torch.float64)
    assert torch.equal(predictor.predict(state, 20.0)[0], newest)


def test_the_method_follows_the_span_and_ignores_the_batch_partner():
    model, inputs = flux(1, 1), flux_inputs(2)
    found, trace, _ = accelerated(model, inputs, 14, "dmd", interval=3)
    assert trace.strip() == "FFFFccFccFccFc"
    alone, _, _ = accelerated(model, rows_of(inputs, 1), 14, "dmd", interval=3)
    assert max(differences([out[1:] for out in found], alone)) <= 1e-3
    assert differences(accelerated(model, inputs, 4, "dmd", interval=1)[0], sample(model, inputs, 4)) == [0.0] * 4
