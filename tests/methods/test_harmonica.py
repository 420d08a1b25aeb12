"""HarmoniCa: whole runs of the student and the image error proxy, written out; its schedule, slowly."""

import functools
from itertools import pairwise

import pytest
import torch
from slow_training import NAMES, Slow, adam, assert_same_numbers, blend, logits, train, update

from cache4diffusion.calibration.routers import TrajectoryRouters
from small_denoisers import PerPart, SlowFlux, accelerated, differences, flux_inputs, made_by_hand, sample

STEPS = 8
THRESHOLD = 0.1
by_hand = functools.partial(made_by_hand, "harmonica")


def random_tables(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.rand(STEPS, generator=g) for name in NAMES}


def test_probabilities_above_the_threshold_are_bit_equal(model):
    calibration = by_hand({name: torch.full((STEPS,), 0.11) for name in NAMES})
    reached, trace, _ = accelerated(model, flux_inputs(2), STEPS, "harmonica", calibration=calibration)
    assert trace.strip() == "F" * STEPS
    assert differences(reached, sample(model, flux_inputs(2), STEPS)) == [0.0] * STEPS


def test_a_cache_is_as_old_as_the_last_step_that_was_worth_computing(model):
    tables = random_tables()
    updates = {name: [s for s in range(STEPS) if s == 0 or table[s] > 0.7] for name, table in tables.items()}
    assert max(b - a for steps in updates.values() for a, b in pairwise(steps)) > 2
    expected = sample(SlowFlux(model, PerPart(updates)), flux_inputs(2), STEPS)
    reached, trace, stats = accelerated(
        model, flux_inputs(2), STEPS, "harmonica", calibration=by_hand(tables), threshold=0.7
    )
    assert max(differences(reached, expected)) <= 1e-5
    assert set(trace.strip()[1:]) <= set("mcF") and trace.strip()[0] == "F"
    assert stats["syncs"] == 0


def test_probabilities_that_alternate_are_l2c_and_fora_of_interval_2(model):
    calibration = by_hand({name: torch.tensor([0.9, 0.01] * (STEPS // 2)) for name in NAMES})
    reached, trace, _ = accelerated(model, flux_inputs(1), STEPS, "harmonica", calibration=calibration)
    fora = accelerated(model, flux_inputs(1), STEPS, "fora", interval=2)[0]
    assert trace.strip() == "Fc" * (STEPS // 2)
    assert differences(reached, fora) == [0.0] * STEPS


# -- what is trained ---------------------------------------------------------------------------------------------------


def student(w, s):
    """Mixed outputs; they become the cache of parts that will be computed."""

    def mix(name, z, compute, kept):
        p = torch.sigmoid(w[s][name])
        out = blend(p, compute(), kept[name])
        if p > THRESHOLD:
            kept[name] = [leaf.detach() for leaf in out]
        return out

    return mix


def exactly(name, z, compute, kept):
    """All probabilities 1."""
    kept[name] = [leaf.detach() for leaf in compute()]
    return kept[name]


@torch.no_grad()
def final_latent(slow, w, inputs, steps, on):
    """A run in which the routers of the steps ``on`` are at work and the others say 1."""
    x = inputs["hidden_states"]
    for s in range(steps):
        if s == 0:
            y = slow.full(x, s, steps, inputs)
        else:
            y = slow.taught(student(w, s) if s in on else exactly, x, s, steps, inputs).detach()
        x = x - y / steps
    return x


def image_error_proxy(slow, w, inputs, steps):
    """The released get_lambda: routers are switched on step by step, from the second on."""
    weights, before = {}, final_latent(slow, w, inputs, steps, set())
    for s in range(1, steps):
        now = final_latent(slow, w, inputs, steps, set(range(1, s + 1)))
        weights[s], before = float(((now - before) ** 2).mean()), now
    return weights


def slow_training(model, steps, runs, rate, price, refresh):
    """The card: one update at every step but the first, on the student's own trajectory."""
    slow, w, weights = Slow(model), logits(steps), {}
    optimizers = [adam(step.values(), rate) for step in w]
    for run in range(runs):
        inputs = flux_inputs(1, seed=run)
        if run % refresh == 0:
            weights = image_error_proxy(slow, w, inputs, steps)
        x = inputs["hidden_states"]
        for s in range(steps):
            if s == 0:
                with torch.no_grad():
                    y = slow.full(x, s, steps, inputs)
            else:
                with torch.no_grad():
                    target = slow.target(x, s, steps, inputs)
                mixed = slow.taught(student(w, s), x, s, steps, inputs)
                loss = weights[s] * ((target - mixed) ** 2).mean()
                loss = loss + price * sum(torch.sigmoid(v) for v in w[s].values())
                update(optimizers[s], loss, w[s].values(), limit=5.0)
                y = mixed.detach()
            x = x - y / steps
    return {
        name: torch.stack([torch.tensor(1.0) if s == 0 else torch.sigmoid(w[s][name]).detach() for s in range(steps)])
        for name in NAMES
    }


@pytest.mark.parametrize(("price", "refresh"), [(0.0, 2), (1e-6, 3)])
def test_routers_are_trained_as_the_card_says(model, price, refresh):
    entry = train(model, TrajectoryRouters(runs=4, rate=0.3, price=price, refresh=refresh), 4)
    assert_same_numbers(entry, slow_training(model, 4, 4, 0.3, price, refresh))


def test_a_step_whose_routers_say_1_has_no_weight(model):
    weights = []

    class Watched(TrajectoryRouters):
        def start(self, spots, num_steps, generator, measured):
            numbers = super().start(spots, num_steps, generator, measured)
            for values in numbers[2].values():
                values[0].fill_(40.0)  # a sigmoid of 1 in float32
            return numbers

        def weigh(self, numbers, run, rehearse):
            weights.append(super().weigh(numbers, run, rehearse))
            return weights[-1]

    train(model, Watched(runs=1), 4)
    assert weights[0][2] == 0.0
    assert weights[0][1] > 0 and weights[0][3] > 0


def test_the_first_step_is_not_taught_and_every_other_is(model):
    entry = train(model, TrajectoryRouters(runs=1), 4)
    for table in entry.fit.values():
        assert float(table[0]) == 1.0
        assert all(0 < float(p) < 1 for p in table[1:])
