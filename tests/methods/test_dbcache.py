"""FBCache and DBCache against slow references written from their cards: the same decisions, the same outputs."""

import copy

import diffusers
import pytest
import torch
from slow_references import DiTBlocks, FluxBlocks, SlowDBCache

import cache4diffusion as c4d
from small_denoisers import (
    LinearCounter,
    accelerated,
    differences,
    dit,
    dit_inputs,
    flux_inputs,
    rows_of,
    sample,
)

STEPS = 16


@pytest.fixture(scope="module")
def class_model():
    return dit(5)


def check(reached, trace, expected, reference, tolerance=1e-5):
    assert trace.strip() == reference.strip
    assert "c" in reference.strip
    assert "F" in reference.strip[1:], "the threshold must show both"
    scores = [record.scores[0] for record in trace.of() if record.scores and record.scores[0] is not None]
    assert scores == pytest.approx([s for s in reference.scores if s is not None][-len(scores) :], rel=1e-3)
    assert max(differences(reached, expected)) <= tolerance


@pytest.mark.parametrize("batch", [1, 3])
def test_fbcache_on_flux_is_the_slow_reference(model, batch):
    inputs, reference = flux_inputs(batch), SlowDBCache(FluxBlocks(model), 0.3)
    expected = sample(reference, inputs, STEPS)
    reached, trace, stats = accelerated(model, inputs, STEPS, "fbcache", threshold=0.3)
    check(reached, trace, expected, reference)
    assert stats["syncs"] == STEPS - 1, "one per decision that has something to compare"


def test_fbcache_on_dit_is_the_slow_reference(class_model):
    inputs, reference = dit_inputs(2), SlowDBCache(DiTBlocks(class_model), 0.17)
    expected = sample(reference, inputs, STEPS)
    reached, trace, _ = accelerated(class_model, inputs, STEPS, "fbcache", threshold=0.17)
    check(reached, trace, expected, reference)


@pytest.mark.parametrize("warmup", [0, 3])
def test_with_an_endless_threshold_all_but_the_warm_up_add_the_same_residual(model, warmup):
    inputs, reference = flux_inputs(1), SlowDBCache(FluxBlocks(model), float("inf"), warmup=warmup)
    expected = sample(reference, inputs, 6)
    reached, trace, _ = accelerated(model, inputs, 6, "fbcache", threshold=float("inf"), warmup=warmup)
    assert trace.strip() == reference.strip == "F" * max(warmup, 1) + "c" * (6 - max(warmup, 1))
    assert max(differences(reached, expected)) <= 1e-5


def test_fbcache_is_diffusers_first_block_cache(model):
    """Their hook on the same denoiser: the same decisions (but for equality) and the same outputs."""
    inputs, theirs, runs, strip = flux_inputs(1), copy.deepcopy(model), [], ""
    second = theirs.transformer_blocks[1].attn
    hook = second.register_forward_hook(lambda *_: runs.append(1))
    theirs.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.3))
    with theirs.cache_context("cond"):
        expected = sample(theirs, inputs, STEPS, before=lambda _: runs.append(0))
    hook.remove()
    strip = "".join("F" if pair == "01" else "c" for pair in "".join(map(str, runs)).replace("0", " 0").split())
    reached, trace, _ = accelerated(model, inputs, STEPS, "fbcache", threshold=0.3)
    assert trace.strip() == strip
    assert set(strip) == {"F", "c"}
    assert max(differences(reached, expected)) <= 1e-5


@pytest.mark.parametrize("case", ["flux", "dit"])
def test_fbcache_is_dbcache_with_one_front_block(model, class_model, case):
    denoiser, inputs, threshold = {
        "flux": (model, flux_inputs(2), 0.3),
        "dit": (class_model, dit_inputs(2), 0.17),
    }[case]
    one, trace, _ = accelerated(denoiser, inputs, STEPS, "fbcache", threshold=threshold)
    two, other, _ = accelerated(denoiser, inputs, STEPS, "dbcache", threshold=threshold, front=1, back=0, warmup=0)
    assert trace.strip() == other.strip()
    assert "c" in trace.strip()
    assert [r.scores for r in trace.of()] == [r.scores for r in other.of()]
    assert differences(one, two) == [0.0] * STEPS


@pytest.mark.parametrize(("front", "back"), [(1, 1), (2, 0), (2, 2), (3, 1)])
def test_dbcache_on_flux_takes_one_decision_over_both_lists(model, front, back):
    """With front=3 the probe itself reaches into the second list."""
    inputs = flux_inputs(2)
    reference = SlowDBCache(FluxBlocks(model), 0.27, front, back, warmup=3)
    expected = sample(reference, inputs, STEPS)
    settings = {"threshold": 0.27, "front": front, "back": back, "warmup": 3}
    reached, trace, _ = accelerated(model, inputs, STEPS, "dbcache", **settings)
    assert trace.strip()[:3] == "FFF"
    check(reached, trace, expected, reference)


@pytest.mark.parametrize(("front", "back"), [(1, 0), (1, 1)])
def test_the_official_variant_decides_once_per_list(model, front, back):
    inputs = flux_inputs(2)
    reference = SlowDBCache(FluxBlocks(model), 0.33, front, back, warmup=1, per_list=True)
    expected = sample(reference, inputs, STEPS)
    settings = {"threshold": 0.33, "front": front, "back": back, "warmup": 1, "variant": "official"}
    reached, trace, _ = accelerated(model, inputs, STEPS, "dbcache", **settings)
    assert {"Fc", "cF"} & set(reference.strips), "the lists disagree somewhere"
    symbols = {"FF": "F", "cc": "c", "Fc": "m", "cF": "m"}
    if front + back < 2:  # else nothing of the first list is left to cache
        assert trace.strip() == "".join(symbols[pair] for pair in reference.strips)
    assert max(differences(reached, expected)) <= 1e-5


def test_front_and_back_on_dit_are_the_slow_reference(class_model):
    inputs, reference = dit_inputs(2), SlowDBCache(DiTBlocks(class_model), 0.2, 2, 1, 2)
    expected = sample(reference, inputs, STEPS)
    reached, trace, _ = accelerated(class_model, inputs, STEPS, "dbcache", threshold=0.2, front=2, back=1, warmup=2)
    check(reached, trace, expected, reference)


@pytest.mark.parametrize(("front", "back"), [(5, 0), (2, 3), (4, 4)])
def test_nothing_left_to_cache_is_exact_for_any_threshold(model, front, back):
    inputs = flux_inputs(1)
    settings = {"threshold": 2.0, "front": front, "back": back, "warmup": 0}
    with pytest.warns(UserWarning, match="0 of 5 steps were cached"):
        reached, trace, _ = accelerated(model, inputs, 5, "dbcache", **settings)
    assert differences(reached, sample(model, inputs, 5)) == [0.0] * 5
    assert trace.strip() == "FFFFF"
    assert any("leaves none of the 5 blocks" in note for note in trace.notes)


def test_threshold_0_is_bit_equal_and_is_asked_at_every_step(model):
    inputs = flux_inputs(2)
    reached, trace, _ = accelerated(model, inputs, 5, "fbcache", threshold=0.0)
    assert differences(reached, sample(model, inputs, 5)) == [0.0] * 5
    assert all(record.scores[0] is not None for record in trace.of()[1:])


def test_threshold_1_skips_all_but_the_warm_up_and_the_limits(model):
    _, trace, _ = accelerated(model, flux_inputs(1), 9, "dbcache", threshold=1.0, front=1, warmup=2, max_run=3)
    assert trace.strip() == "FFcccFccc"


def test_the_front_runs_on_every_step_and_the_middle_only_on_full_ones(model):
    front, middle = model.transformer_blocks[0].attn.to_q, model.single_transformer_blocks[1].proj_mlp
    with c4d.accelerate(model, "fbcache", threshold=5.0) as handle:
        with handle.run(num_steps=2):
            sample(model, flux_inputs(1), 1)
        with handle.run(num_steps=6), LinearCounter([front]) as fronts, LinearCounter([middle]) as middles:
            sample(model, flux_inputs(1), 6)
    assert (fronts.count, middles.count) == (6, 1)


def test_the_same_input_at_every_step_is_cached_from_step_1(model):
    inputs = flux_inputs(1)
    with c4d.accelerate(model, "fbcache", threshold=1e-6) as handle, handle.run(num_steps=4), torch.no_grad():
        out = [model(**inputs, timestep=torch.tensor([0.5]))[0] for _ in range(4)]
    assert handle.trace.strip() == "Fccc"
    assert max(differences(out, [out[0]] * 4)) <= 1e-6


# -- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fbcache", "dbcache"])
def test_rows_of_a_batch_are_four_runs_of_one(model, method):
    inputs = flux_inputs(4)
    settings = {"threshold": 0.29, "decide": "row"}
    if method == "dbcache":
        settings |= {"front": 1, "back": 1, "warmup": 1, "max_run": 2}
    whole, trace, _ = accelerated(model, inputs, STEPS, method, **settings)
    decided = [record.rows for record in trace.of()]
    assert any(0 < sum(rows) < 4 for rows in decided), "the rows disagree somewhere"
    for row in range(4):
        alone, own, _ = accelerated(model, rows_of(inputs, row), STEPS, method, **settings)
        assert [rows[row] for rows in decided] == [record.symbol == "c" for record in own.of()]
        assert max(differences([out[row : row + 1] for out in whole], alone)) <= 1e-5


def test_rows_of_a_batch_are_runs_of_one_on_dit(class_model):
    inputs = dit_inputs(4)
    whole, trace, _ = accelerated(class_model, inputs, STEPS, "fbcache", threshold=0.17, decide="row")
    decided = [record.rows for record in trace.of()]
    assert any(0 < sum(rows) < 4 for rows in decided)
    for row in range(4):
        alone, own, _ = accelerated(class_model, rows_of(inputs, row), STEPS, "fbcache", threshold=0.17, decide="row")
        assert [rows[row] for rows in decided] == [record.symbol == "c" for record in own.of()]
        assert max(differences([out[row : row + 1] for out in whole], alone)) <= 1e-5


def test_any_is_full_where_a_single_row_would_be(model):
    inputs = flux_inputs(4)
    _, trace, _ = accelerated(model, inputs, STEPS, "fbcache", threshold=0.32, decide="any")
    records = trace.of()
    assert "c" in trace.strip()
    for record in records[1:]:
        assert (record.symbol == "c") == all(score < 0.32 for score in record.scores)


def test_batch_decides_by_the_ratio_of_sums_over_all_rows(model):
    inputs = flux_inputs(4)
    _, rows, _ = accelerated(model, inputs, 2, "fbcache", threshold=0.0, decide="row")
    _, batch, _ = accelerated(model, inputs, 2, "fbcache", threshold=0.0, decide="batch")
    single = rows.of()[1].scores
    (joint,) = batch.of()[1].scores
    assert min(single) < joint < max(single)


# -- branches --------------------------------------------------------------------------------------------------------


def guided(model, branches, threshold=0.3, steps=12):
    """Sequential guidance: two calls per step with other conditioning."""
    cond, uncond = flux_inputs(1, seed=1), flux_inputs(1, seed=2)
    x = cond["hidden_states"]
    with c4d.accelerate(model, "fbcache", threshold=threshold, branches=branches) as handle:
        with handle.run(num_steps=steps), torch.no_grad():
            for i in range(steps):
                t = torch.tensor([1 - i / steps])
                (a,) = model(**{**cond, "hidden_states": x}, timestep=t)
                (b,) = model(**{**uncond, "hidden_states": x}, timestep=t)
                x = x - (b + 2 * (a - b)) / steps
        return handle.trace, handle.stats


def test_tied_branches_take_the_first_ones_verdicts_but_keep_their_own_features(model):
    independent, costs = guided(model, "independent")
    _, fewer = guided(model, "tied")
    first, second = list(costs["strips"].values())
    assert first != second, "the branches would decide differently"
    first, second = list(fewer["strips"].values())
    assert first == second
    assert "c" in first
    assert fewer["syncs"] < costs["syncs"], "followers are not asked"
    assert independent.of()[0].branch != independent.of()[1].branch


def test_independent_branches_with_equal_inputs_decide_alike(model):
    inputs = flux_inputs(1)
    x = inputs["hidden_states"]
    with c4d.accelerate(model, "fbcache", threshold=0.3) as handle, handle.run(num_steps=8), torch.no_grad():
        for i in range(8):
            t = torch.tensor([1 - i / 8])
            twin = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
            with handle._tracker.branch("cond"):
                (a,) = model(**{**inputs, "hidden_states": x}, timestep=t)
            with handle._tracker.branch("uncond"):
                (b,) = model(**{**twin, "hidden_states": x}, timestep=t)
            assert torch.equal(a, b)
            x = x - a / 8
    strips = handle.stats["strips"]
    assert len(strips) == 2
    assert len(set(strips.values())) == 1


# -- what the host adds between blocks -------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"front": 1}, {"front": 2, "back": 1}, {"front": 1, "variant": "official"}])
def test_controlnet_residuals_are_no_part_of_the_spans_residual(model, settings):
    """They are another value at every step; were they in the residual, cached steps would add the old ones."""
    settings = {"threshold": 0.35, "warmup": 0, **settings}
    per_list = settings.get("variant") == "official"
    reference = SlowDBCache(FluxBlocks(model), 0.35, settings["front"], settings.get("back", 0), per_list=per_list)
    inputs = flux_inputs(2, controlnet=model)
    names = ("controlnet_block_samples", "controlnet_single_block_samples")
    original = {name: [s.clone() for s in inputs[name]] for name in names}

    def fade(step):
        for name in names:
            for kept, tensor in zip(original[name], inputs[name], strict=True):
                tensor.copy_(kept * (1 - step / STEPS))

    expected = sample(reference, inputs, STEPS, before=fade)
    with c4d.accelerate(model, "dbcache", **settings) as handle, handle.run(num_steps=STEPS):
        reached = sample(model, inputs, STEPS, before=fade)
    assert "c" in handle.trace.strip() or "m" in handle.trace.strip()
    assert max(differences(reached, expected)) <= 1e-5


@pytest.mark.parametrize("method", ["fbcache", "teacache"])
def test_with_frozen_input_controlnet_is_added_exactly_once(model, method):
    inputs = flux_inputs(1, controlnet=model)
    settings = {"cooldown": 0} if method == "teacache" else {}
    with c4d.accelerate(model, method, threshold=0.5, **settings) as handle, handle.run(num_steps=3), torch.no_grad():
        out = [model(**inputs, timestep=torch.tensor([0.5]))[0] for _ in range(3)]
    assert handle.trace.strip() == "Fcc"
    assert max(differences(out, [out[0]] * 3)) <= 1e-6
