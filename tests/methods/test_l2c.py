"""L2C: its router and its training against the card's, written out; its schedule against a slow reference."""

import functools

import pytest
import torch
from slow_training import NAMES, Slow, adam, assert_same_numbers, blend, logits, train, update

import cache4diffusion as c4d
from cache4diffusion.calibration import Calibration
from cache4diffusion.calibration.routers import PairedRouters
from cache4diffusion.gates import routed_steps
from small_denoisers import (
    FLUX_PARTS,
    PerPart,
    SlowFlux,
    accelerated,
    differences,
    flux_inputs,
    made_by_hand,
    path_of,
    sample,
)

STEPS = 8
by_hand = functools.partial(made_by_hand, "l2c")


def random_tables(seed=0):
    """Of each part: 1 at the first step of every pair, a learned probability at the second."""
    g = torch.Generator().manual_seed(seed)
    tables = {name: torch.ones(STEPS) for name in NAMES}
    for table in tables.values():
        table[1::2] = torch.rand(STEPS // 2, generator=g)
    return tables


def test_a_part_is_computed_where_its_probability_is_above_the_threshold():
    assert routed_steps([1.0, 0.05, 1.0, 0.2], 0.1) == (0, 2, 3)
    assert routed_steps([0.0, 0.1, 0.0, 0.11], 0.1) == (0, 3), "not at equality, and the first step always"


def test_threshold_0_is_bit_equal(model):
    tables = {name: torch.zeros(STEPS) for name in NAMES}
    reached, trace, _ = accelerated(model, flux_inputs(2), STEPS, "l2c", calibration=by_hand(tables), threshold=0.0)
    assert trace.strip() == "F" * STEPS
    assert differences(reached, sample(model, flux_inputs(2), STEPS)) == [0.0] * STEPS


def test_threshold_1_is_fora_of_interval_2_from_the_first_step(model):
    calibration = by_hand(random_tables())
    reached, trace, _ = accelerated(model, flux_inputs(1), STEPS, "l2c", calibration=calibration, threshold=1.0)
    fora, strips, _ = accelerated(model, flux_inputs(1), STEPS, "fora", interval=2)
    assert trace.strip() == strips.strip() == "Fc" * (STEPS // 2)
    assert differences(reached, fora) == [0.0] * STEPS


def test_every_part_is_reused_where_its_router_says_and_is_one_step_old(model):
    tables = random_tables(1)
    updates = {name: [s for s in range(STEPS) if s % 2 == 0 or table[s] > 0.4] for name, table in tables.items()}
    assert len({tuple(steps) for steps in updates.values()}) > 3, "parts differ"
    expected = sample(SlowFlux(model, PerPart(updates)), flux_inputs(2), STEPS)
    reached, trace, stats = accelerated(model, flux_inputs(2), STEPS, "l2c", calibration=by_hand(tables), threshold=0.4)
    assert max(differences(reached, expected)) <= 1e-5
    assert set(trace.strip()[::2]) == {"F"} and "m" in trace.strip()
    assert stats["syncs"] == 0


def test_the_first_steps_of_pairs_call_every_part_and_the_second_those_that_are_computed(model):
    tables = {name: torch.tensor([1.0, 0.01] * (STEPS // 2)) for name in NAMES}
    tables["double.1.ffn"] = torch.tensor([1.0, 0.9] * (STEPS // 2))
    runs = {"ff": [0, 0], "single": 0}
    hooks = [
        model.transformer_blocks[i]
        .ff.net[2]
        .register_forward_hook(lambda *_, i=i: runs["ff"].__setitem__(i, runs["ff"][i] + 1))
        for i in (0, 1)
    ]
    inner = model.single_transformer_blocks[2].attn.norm_q
    hooks.append(inner.register_forward_hook(lambda *_: runs.__setitem__("single", runs["single"] + 1)))
    with c4d.accelerate(model, "l2c", calibration=by_hand(tables)) as handle, handle.run(num_steps=STEPS):
        handle.prepare(**flux_inputs(1), timestep=torch.ones(1))
        runs.update(ff=[0, 0], single=0)
        sample(model, flux_inputs(1), STEPS)
    for hook in hooks:
        hook.remove()
    assert runs == {"ff": [STEPS // 2, STEPS], "single": STEPS // 2}


# -- what is trained ---------------------------------------------------------------------------------------------------


def slow_training(model, steps, runs, rate, price):
    """The card: pairs of steps on the uncached trajectory, mixed by soft probabilities, one optimiser per step."""
    slow, w = Slow(model), logits(steps)
    optimizers = [adam(step.values(), rate) for step in w]
    for run in range(runs):
        inputs = flux_inputs(1, seed=run)
        x = inputs["hidden_states"]
        for s in range(steps):
            with torch.no_grad():
                y = slow.full(x, s, steps, inputs) if s % 2 == 0 else slow.target(x, s, steps, inputs)
            if s % 2 == 1:
                p = {name: torch.sigmoid(w[s][name]) for name in NAMES}
                mixed = slow.taught(
                    lambda name, z, compute, kept, p=p: blend(p[name], compute(), kept[name]), x, s, steps, inputs
                )
                loss = ((y - mixed) ** 2).mean() + price * sum(p.values())
                update(optimizers[s], loss, w[s].values(), limit=5.0)
            x = x - y / steps
    return {
        name: torch.tensor([1.0 if s % 2 == 0 else float(torch.sigmoid(w[s][name].detach())) for s in range(steps)])
        for name in NAMES
    }


@pytest.mark.parametrize("price", [0.0, 1e-3])
def test_routers_are_trained_as_the_card_says(model, price):
    entry = train(model, PairedRouters(runs=6, rate=0.1, price=price), 4)
    expected = slow_training(model, 4, 6, 0.1, price)
    assert_same_numbers(entry, expected)
    begun = {name: torch.sigmoid(logits(4)[1][name].detach()) for name in NAMES}
    assert max(abs(float(expected[name][1] - begun[name])) for name in NAMES) > 0.05, "something was learned"


def test_probabilities_of_1_mix_to_the_full_step(model):
    slow, inputs = Slow(model), flux_inputs(1)
    with torch.no_grad():
        full = slow.full(inputs["hidden_states"], 0, 4, inputs)
        again = slow.full(inputs["hidden_states"] * 0.9, 1, 4, inputs)
    slow.full(inputs["hidden_states"], 0, 4, inputs)
    mixed = slow.taught(
        lambda name, z, compute, kept: blend(torch.tensor(1.0), compute(), kept[name]),
        inputs["hidden_states"] * 0.9, 1, 4, inputs,
    )  # fmt: skip
    assert torch.equal(mixed, again) and not torch.equal(mixed, full)


def test_a_high_price_gives_every_part_up_and_none_keeps_what_matters(model):
    dear = train(model, PairedRouters(runs=30, rate=0.4, price=10.0), 4)
    assert all(float(table[s]) < 0.1 for table in dear.fit.values() for s in (1, 3))
    assert "100% of the features are cached" in dear.quality.verdict
    assert "little better than caching everything" in dear.quality.verdict
    free = train(model, PairedRouters(runs=20, rate=0.2, price=0.0), 4)
    assert float(free.sums["errors"][-5:].mean()) < float(free.sums["errors"][:5].mean())


def test_logits_stay_within_5(model):
    entry = train(model, PairedRouters(runs=12, rate=3.0, price=10.0), 2)
    lowest = float(torch.sigmoid(torch.tensor(-5.0)))
    assert all(float(table[1]) == pytest.approx(lowest) for table in entry.fit.values())


def test_parts_are_named_as_they_will_be_while_sampling(model):
    entry = train(model, PairedRouters(runs=1), 4)
    assert set(entry.fit) == {path_of(name) for name in FLUX_PARTS}
    gate = c4d.method("l2c", calibration=Calibration.by_hand("l2c", 4, entry.fit), threshold=1.0).compose().gate
    assert set(gate.full_steps.values()) == {(0, 2)}
