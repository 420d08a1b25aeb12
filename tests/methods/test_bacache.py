"""BAC: every part by its own update steps against a slow reference; its similarities against plain hooks."""

import pytest
import torch

import cache4diffusion as c4d
from cache4diffusion.calibration import Calibration, load_calibration
from cache4diffusion.calibration.observer import Observer
from cache4diffusion.calibration.similarities import Similarities, cosine
from cache4diffusion.cost import summarise
from cache4diffusion.errors import CalibrationError
from cache4diffusion.gates.update_sets import bubbled, caching_error, update_steps
from small_denoisers import (
    FLUX_PARTS,
    PerPart,
    SlowFlux,
    accelerated,
    differences,
    flux_inputs,
    path_of,
    sample,
)

STEPS = 10


def random_tables(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.rand(STEPS, STEPS, generator=g, dtype=torch.float64) for name in FLUX_PARTS}


def by_hand(tables):
    fit = {f"{FLUX_PARTS[name]} {path_of(name)}": table for name, table in tables.items()}
    return Calibration.by_hand("bacache", len(next(iter(tables.values()))), fit)


def gate(calibration, **settings):
    return c4d.method("bacache", calibration=calibration, **settings).compose().gate


@pytest.mark.parametrize("sources", [0, 2])
def test_every_part_follows_its_own_update_steps(model, sources):
    tables = random_tables()
    steps = {name: update_steps(table.tolist(), 3) for name, table in tables.items()}
    errors = {name: caching_error(table.tolist(), steps[name]) for name, table in tables.items()}
    readers = [name for name, kind in FLUX_PARTS.items() if kind != "attn"]
    updates = bubbled(steps, errors, readers, sources)
    assert len(set(updates.values())) > 3, "parts differ"
    expected = sample(SlowFlux(model, PerPart(updates)), flux_inputs(2), STEPS)
    calibration = by_hand(tables)
    assert gate(calibration, budget=0.3, sources=sources).full_steps == {path_of(n): updates[n] for n in updates}
    reached, trace, stats = accelerated(
        model, flux_inputs(2), STEPS, "bacache", calibration=calibration, budget=0.3, sources=sources
    )
    assert max(differences(reached, expected)) <= 1e-5
    running = [sum(step in steps for steps in updates.values()) for step in range(STEPS)]
    letters = ["c" if count == 0 else "F" if count == len(updates) else "m" for count in running]
    assert trace.strip() == "".join(letters)
    assert stats["syncs"] == 0


def test_the_flops_are_those_of_the_updates_that_were_made_and_not_of_the_budget(model):
    saved = {}
    for sources in (0, 8):
        method = c4d.method("bacache", calibration=by_hand(random_tables()), budget=0.2, sources=sources)
        with c4d.accelerate(model, method) as handle:
            with handle.run(num_steps=STEPS):
                sample(model, flux_inputs(1), STEPS)
            found = summarise(handle)
        saved[sources] = 1 - found.run_flops / (STEPS * found.full_flops)
    assert saved[0] > saved[8] > 0


def test_a_budget_of_all_steps_is_off(model):
    method = c4d.method("bacache", calibration=by_hand(random_tables()), budget=1.0)
    assert method.compose().is_off
    assert set(method.compose().gate.full_steps.values()) == {tuple(range(STEPS))}


def test_without_sources_every_part_has_the_budget():
    tables = random_tables(1)
    found = gate(by_hand(tables), budget=0.4, sources=0).full_steps
    assert found == {path_of(name): update_steps(table.tolist(), 4) for name, table in tables.items()}
    assert {len(steps) for steps in found.values()} == {4}


def test_even_the_smallest_budget_computes_the_first_step():
    assert set(gate(by_hand(random_tables()), budget=0.01, sources=0).full_steps.values()) == {(0,)}


def test_parts_are_upstream_in_the_order_in_which_they_run_also_from_a_file(model, tmp_path):
    with Observer(model, Similarities()) as observer, observer.run(num_steps=4):
        sample(model, flux_inputs(1), 4)
    entry = observer.entries()["denoiser"]
    order = [f"{kind} {path_of(name)}" for name, kind in FLUX_PARTS.items()]
    assert list(entry.fit) == order
    made = Calibration.by_hand("bacache", 4, entry.fit)
    assert list(load_calibration(made.save(tmp_path / "made.safetensors")).entry.fit) == order


def test_a_table_that_is_no_parts_is_refused():
    with pytest.raises(CalibrationError, match=r"mlp x is none of attn \*, cross_attn \*, ffn \*"):
        Calibration.by_hand("bacache", 4, {"mlp x": torch.zeros(4, 4)})


def test_another_number_of_steps_is_refused_unless_resampling_is_asked_for(model):
    calibration = by_hand(dict.fromkeys(FLUX_PARTS, torch.ones(STEPS, STEPS)))
    with pytest.raises(CalibrationError, match=r"calibrated for 10 steps, and the run has 5 steps\. .*resample=True"):
        accelerated(model, flux_inputs(1), 5, "bacache", calibration=calibration)
    _, trace, _ = accelerated(model, flux_inputs(1), 19, "bacache", calibration=calibration, resample=True)
    assert trace.strip() == "FcFcF" + "c" * 14


# -- what is measured --------------------------------------------------------------------------------------------------


def test_similarities_are_cosines_by_plain_hooks(model):
    outputs = {}

    def keep(name):
        def hook(module, args, output):
            leaves = output if isinstance(output, tuple) else (output,)
            outputs.setdefault(name, []).append(torch.cat([leaf.flatten() for leaf in leaves]).double())

        return hook

    watched = {path_of(name): kind for name, kind in FLUX_PARTS.items() if kind != "fused"}
    hooks = [model.get_submodule(path).register_forward_hook(keep(path)) for path in watched]
    sample(model, flux_inputs(2), 5)
    for hook in hooks:
        hook.remove()
    with Observer(model, Similarities()) as observer, observer.run(num_steps=5):
        sample(model, flux_inputs(2), 5)
    fit = observer.entries()["denoiser"].fit
    assert len(fit) == len(FLUX_PARTS)
    for path, kind in watched.items():
        table, steps = fit[f"{kind} {path}"], outputs[path]
        for i in range(5):
            for j in range(5):
                expected = float(steps[i] @ steps[j] / (steps[i].norm() * steps[j].norm())) if j > i else 0.0
                assert float(table[i, j]) == pytest.approx(expected, abs=1e-6)


def test_outputs_of_zero_are_alike_and_nothing_else_is_like_them():
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert cosine([zero, zero], [zero, zero]) == 1
    assert cosine([zero, zero], [one, zero]) == 0
    assert cosine([one, zero], [zero, one]) == 0
    assert float(cosine([one.half(), one], [one.half(), one])) == pytest.approx(1)
    assert float(cosine([one, one], [one, -one])) == 0


def test_parts_that_turn_alike_for_all_prompts_are_a_sound_basis_and_others_are_not():
    def quality(spread):
        sums, statistic, g = {}, Similarities(), torch.Generator().manual_seed(0)
        for _ in range(40):
            memory = {}
            for step in range(5):
                turned = torch.tensor([1.0, 0.3 * step * (float(torch.rand(1, generator=g)) if spread else 1.0)])
                seen = type("Seen", (), {"features": {"p": [turned]}, "decisions": {"p": "ffn"}})
                seen.step, seen.num_steps = step, 5
                statistic.observe(sums, memory, seen)
        return statistic.fit(sums).quality

    assert quality(False).r2 == pytest.approx(1)
    assert "a sound basis" in quality(False).verdict
    assert quality(True).r2 < 0.9
