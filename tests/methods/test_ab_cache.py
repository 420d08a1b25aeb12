"""AB-Cache: its schedule, its queues, and what each reproduces."""

import pytest
import torch
from forecasts import assert_same, slow_queue, walk, wavy

from cache4diffusion.gates import Step
from cache4diffusion.methods import ABCache
from cache4diffusion.predictors import AdamsBashforth, Newton, Taylor
from small_denoisers import accelerated, differences, dit, dit_inputs, flux, flux_inputs, sample

STRIP = "FFFFFcFcccccFcccccFccc"


def test_full_steps_of_50_are_the_cards():
    gate = ABCache().compose().gate
    assert gate is not None
    full = [i for i in range(50) if not gate.propose(None, Step(i, 50), None)]
    assert full == [0, 1, 2, 3, 4, 6, 12, 18, 24, 30, 36, 42, 48]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("queue", ["all", "full"])
def test_every_step_equals_the_cards_pseudo_code(order, queue):
    found = walk(AdamsBashforth(order, queue), wavy, STRIP)
    assert_same(found, slow_queue(wavy, STRIP, order, pushes_predictions=queue == "all"))


@pytest.mark.parametrize(("order", "weights"), [(2, [2, -1]), (3, [3, -3, 1]), (4, [4, -6, 4, -1])])
def test_coefficients(order, weights):
    times = [float(-i) for i in range(order)]
    assert AdamsBashforth(order).weights(times, 1.0) == weights
    assert sum(weights) == 1


def test_queue_of_every_step_is_exact_for_its_degree_and_newton_on_any_grid():
    def feature(i):
        return torch.tensor([[0.1 * i**2 - i]], dtype=torch.float64)

    truth = [feature(i) for i in range(len(STRIP))]
    assert_same(walk(AdamsBashforth(3, "all"), feature, STRIP), truth, 1e-7)
    assert_same(walk(AdamsBashforth(3, "newton"), feature, STRIP), truth, 1e-7)
    assert_same(walk(AdamsBashforth(3, "newton"), wavy, STRIP), walk(Newton(2), wavy, STRIP))


def test_queue_of_full_steps_gives_one_value_per_interval():
    found = walk(AdamsBashforth(2, "full"), wavy, STRIP)
    assert all(torch.equal(found[7], found[i]) for i in range(8, 12))
    assert not torch.equal(found[5], found[7])


def test_after_two_adjacent_full_steps_it_is_taylor_of_order_1():
    assert_same(walk(AdamsBashforth(2), wavy, "FFcccc"), walk(Taylor(1), wavy, "FFcccc"))


def test_order_1_is_plain_reuse_of_the_output():
    model, inputs = flux(1, 1), flux_inputs(1)
    found, trace, _ = accelerated(model, inputs, 8, "ab-cache", interval=3, warmup=2, order=1)
    assert trace.strip() == "FFcFccFc"
    assert torch.equal(found[4], found[3])
    assert torch.equal(found[5], found[3])


def test_acting_on_each_branch_is_acting_on_the_guided_output():
    """Of a batched call: both halves are combined in the same way, so the guided output is too."""
    model, inputs = dit(1), dit_inputs(2)
    found, _, _ = accelerated(model, inputs, 9, "ab-cache", interval=4, warmup=3)
    guided = [out[:1] + 3 * (out[1:] - out[:1]) for out in found]
    expected = slow_queue(lambda i: guided[i].double(), "FFFcFcccF", 2, pushes_predictions=True)
    assert_same([g.double() for g in guided], expected, 1e-4)
    assert differences(accelerated(model, inputs, 4, "ab-cache", interval=1)[0], sample(model, inputs, 4)) == [0.0] * 4
