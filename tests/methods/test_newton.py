"""Newton: exact where TaylorSeer is not, and TaylorSeer itself at order 1."""

import pytest
import torch
from forecasts import assert_same, walk

from cache4diffusion.predictors import Newton
from small_denoisers import accelerated, differences, flux, flux_inputs, sample


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("strip", ["FFFccccFccccFcc", "FcFcccFFccFcccc"])
def test_a_polynomial_of_its_degree_is_exact_on_any_spacing(order, strip):
    def feature(i):
        return torch.tensor([[(i / 5) ** order - 3 * i + 1.0, 2.0 * i]], dtype=torch.float64)

    known = [i for i, symbol in enumerate(strip) if symbol == "F"][order]  # order + 1 full steps
    found = walk(Newton(order), feature, strip)
    assert_same(found[known:], [feature(i) for i in range(known, len(strip))])


def test_order_1_is_taylorseer_of_order_1_and_order_2_is_not():
    model, inputs = flux(1, 1), flux_inputs(1)
    newton, trace, _ = accelerated(model, inputs, 12, "newton", interval=4, order=1)
    taylor, _, _ = accelerated(model, inputs, 12, "taylorseer", interval=4, order=1)
    assert trace.strip() == "FFFcccFcccFc"
    assert max(differences(newton, taylor)) <= 1e-6
    second, _, _ = accelerated(model, inputs, 12, "newton", interval=4, order=2)
    other, _, _ = accelerated(model, inputs, 12, "taylorseer", interval=4, order=2)
    assert differences(second, other)[-1] > 1e-4


def test_interval_1_never_predicts():
    model, inputs = flux(1, 1), flux_inputs(1)
    assert differences(accelerated(model, inputs, 4, "newton", interval=1)[0], sample(model, inputs, 4)) == [0.0] * 4
