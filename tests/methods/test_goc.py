"""GOC: its steps, its history of what was used, and what it reproduces."""

import pytest
import torch
from forecasts import assert_same, slow_goc, walk, wavy

from cache4diffusion.predictors import Delta, Reuse
from small_denoisers import accelerated, differences, dit, dit_inputs, flux, flux_inputs, sample

STRIP = "FcFcFcFcFcFFFFFFFFFF"


def test_every_step_equals_the_released_code():
    expected = slow_goc(wavy, STRIP, eta=1.2, steps=(3, 5, 7, 9))
    assert_same(walk(Delta(1.2, (3, 5, 7, 9)), wavy, STRIP), expected)
    assert_same(walk(Delta(1.2), wavy, STRIP), expected)  # at step 1 there is nothing to add yet


def test_predictions_enter_the_history():
    strip = "FFcccFcc"
    assert_same(walk(Delta(0.8), wavy, strip), slow_goc(wavy, strip, 0.8, range(8)))


@pytest.mark.parametrize("predictor", [Delta(0.0), Delta(1.2, ())])
def test_eta_0_or_no_step_is_reuse(predictor):
    found, reused = walk(predictor, wavy, STRIP), walk(Reuse(), wavy, STRIP)
    assert all(torch.equal(a, b) for a, b in zip(found, reused, strict=True))


def test_a_constant_is_exact_and_a_line_at_eta_1_once_the_history_is():
    assert_same(walk(Delta(1.2), lambda i: torch.ones(1, 2), STRIP), [torch.ones(1, 2)] * 20, 1e-6)

    def line(i):
        return torch.tensor([[3.0 * i - 1]], dtype=torch.float64)

    assert_same(walk(Delta(1.0), line, "FFcccccFccc"), [line(i) for i in range(11)])


def test_rows_with_their_own_full_steps_are_as_if_alone():
    predictor, strips = Delta(0.9), ["FcFccF", "FFccFc"]
    together, alone = (
        predictor.init(2),
        [walk(predictor, lambda i, r=r: wavy(i)[r : r + 1], s) for r, s in enumerate(strips)],
    )
    for i in range(6):
        full = [row for row in range(2) if strips[row][i] == "F"]
        rest = [row for row in range(2) if row not in full]
        if rest:
            (value,) = predictor.predict(together, float(i), rest)
            predictor.commit(together, [value], float(i), rest)
            assert_same([value], [torch.cat([alone[row][i] for row in rest])])
        if full:
            predictor.update(together, [wavy(i)[full]], float(i), full)


def test_the_method_caches_the_published_steps_of_20_and_differs_from_fora():
    model, inputs = dit(1), dit_inputs(2)
    found, trace, _ = accelerated(model, inputs, 20, "goc")
    assert trace.strip() == STRIP
    fora, _, _ = accelerated(model, inputs, 20, "goc", eta=0.0)
    assert differences(found, fora)[3] > 1e-4
    official, _, _ = accelerated(model, inputs, 20, "goc", delta_steps=(3, 5, 7, 9))
    assert differences(found, official) == [0.0] * 20


def test_without_eta_it_is_fora_bit_for_bit():
    model, inputs = flux(1, 1), flux_inputs(1)
    found, _, _ = accelerated(model, inputs, 8, "goc", interval=3, eta=0.0, start_full=1)
    fora, _, _ = accelerated(model, inputs, 8, "fora", interval=3)
    assert differences(found, fora) == [0.0] * 8
    assert differences(accelerated(model, inputs, 4, "goc", interval=1)[0], sample(model, inputs, 4)) == [0.0] * 4
