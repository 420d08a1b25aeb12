"""TeaCache against a slow reference written from its card."""

from itertools import pairwise

import pytest
import torch
from slow_references import DiTBlocks, FluxBlocks, SlowTeaCache, relative

import cache4diffusion as c4d
from cache4diffusion.gates import AccumulatedChange
from small_denoisers import accelerated, differences, dit, dit_inputs, flux_inputs, rows_of, sample

STEPS = 16


@pytest.mark.parametrize("coefficients", [(1.0, 0.0), (40.0, -3.0, 0.9, 0.01), (0.09,)])
@pytest.mark.parametrize("case", ["flux", "dit"])
def test_decisions_and_outputs_are_the_slow_references(model, case, coefficients):
    denoiser = model if case == "flux" else dit()
    inputs = flux_inputs(2) if case == "flux" else dit_inputs(2)
    net = FluxBlocks(denoiser) if case == "flux" else DiTBlocks(denoiser)
    reference = SlowTeaCache(net, 0.22, STEPS, coefficients)
    expected = sample(reference, inputs, STEPS)
    reached, trace, stats = accelerated(
        denoiser, inputs, STEPS, "teacache", threshold=0.22, coefficients=coefficients, variant="official"
    )
    assert trace.strip() == reference.strip
    assert "c" in reference.strip
    assert "F" in reference.strip[1:-1]
    scores = [record.scores[0] for record in trace.of() if record.scores[0] is not None]
    assert scores == pytest.approx(reference.scores, rel=1e-4)
    assert max(differences(reached, expected)) <= 1e-5
    assert stats["syncs"] == STEPS - 2, "one per step that is not forced"


def test_the_signal_is_block_0s_modulated_norm_computed_by_hand(model):
    seen = []
    net = FluxBlocks(model)

    def signals(**kwargs):
        streams, temb, _ = net.enter(kwargs)
        seen.append(net.signal(streams, temb))
        return model(**kwargs)

    with c4d.accelerate(model, "teacache", threshold=0.0) as handle, handle.run(num_steps=5):
        sample(signals, flux_inputs(2), 5)
    by_hand = [relative(b, a) for a, b in pairwise(seen)]
    observed = [record.scores[0] for record in handle.trace.of()]
    assert observed[1:4] == pytest.approx(by_hand[:3], rel=1e-5)
    assert (observed[0], observed[4]) == (None, None), "forced steps are not compared"


def test_the_signal_is_computed_without_running_the_block(model):
    runs = []
    hook = model.transformer_blocks[0].ff.register_forward_hook(lambda *_: runs.append(1))
    with c4d.accelerate(model, "teacache", threshold=50.0) as handle:
        with handle.run(num_steps=2):
            sample(model, flux_inputs(1), 1)
        runs.clear()
        with handle.run(num_steps=8):
            sample(model, flux_inputs(1), 8)
    hook.remove()
    assert handle.trace.strip() == "FccccccF"
    assert len(runs) == 2


def test_the_signal_is_compared_with_the_previous_step_also_after_a_cached_one(model):
    inputs = flux_inputs(1)
    _, cached, _ = accelerated(model, inputs, 4, "teacache", threshold=50.0)
    first = cached.of()[1].scores[0]
    assert cached.strip() == "FccF"
    assert cached.of()[2].scores[0] < 1.6 * first, "a lag-1 change, not the distance from the last full step"


def test_the_last_step_is_full_only_where_the_cooldown_says_so(model):
    inputs = flux_inputs(1)
    assert accelerated(model, inputs, 5, "teacache", threshold=50.0)[1].strip() == "FcccF"
    assert accelerated(model, inputs, 5, "teacache", threshold=50.0, cooldown=0)[1].strip() == "Fcccc"
    assert accelerated(model, inputs, 6, "teacache", threshold=50.0, cooldown=3)[1].strip() == "FccFFF"


def test_without_a_cooldown_no_step_count_is_needed(model):
    inputs = flux_inputs(1)
    with c4d.accelerate(model, "teacache", threshold=50.0, cooldown=0) as handle:
        sample(model, inputs, 4)
        assert handle.trace.strip() == "Fccc"
    with c4d.accelerate(model, "teacache"), pytest.raises(c4d.Cache4DiffusionError, match=r"handle\.run"):
        sample(model, inputs, 4)


def test_threshold_0_is_bit_equal(model):
    inputs = flux_inputs(2)
    reached, trace, _ = accelerated(model, inputs, 5, "teacache", threshold=0.0)
    assert trace.strip() == "FFFFF"
    assert differences(reached, sample(model, inputs, 5)) == [0.0] * 5


def test_published_coefficients_can_be_named(model):
    """FLUX's polynomial is nearly constant, so a threshold is an interval: 0.6 is one of 3 to 4, by the card."""
    _, trace, _ = accelerated(model, flux_inputs(1), 20, "teacache", threshold=0.6, coefficients="flux")
    lengths = [len(run) + 1 for run in trace.strip()[:-2].split("F")[1:-1]]
    assert set(lengths) <= {3, 4}


def test_a_time_invariant_residual_is_exact(model):
    """Same input, same timestep: the stack's residual is what it was."""
    inputs = flux_inputs(1)
    handle = c4d.accelerate(model, "teacache", threshold=9.0, cooldown=0)
    with handle, handle.run(num_steps=4), torch.no_grad():
        out = [model(**inputs, timestep=torch.tensor([0.5]))[0] for _ in range(4)]
    assert handle.trace.strip() == "Fccc"
    assert max(differences(out, [out[0]] * 4)) <= 1e-6


def test_rows_decide_as_if_alone(model):
    inputs = flux_inputs(4)
    settings = {"threshold": 0.2, "decide": "row"}
    whole, trace, _ = accelerated(model, inputs, STEPS, "teacache", **settings)
    decided = [record.rows for record in trace.of()]
    assert any(0 < sum(rows) < 4 for rows in decided)
    for row in range(4):
        alone, own, _ = accelerated(model, rows_of(inputs, row), STEPS, "teacache", **settings)
        assert [rows[row] for rows in decided] == [record.symbol == "c" for record in own.of()]
        assert max(differences([out[row : row + 1] for out in whole], alone)) <= 1e-5


def test_decisions_are_a_replay_of_the_recorded_scores(model):
    _, trace, _ = accelerated(model, flux_inputs(2), STEPS, "teacache", threshold=0.2)
    total, shown = 0.0, ""
    for record in trace.of():
        score = record.scores[0]
        total = 0.0 if score is None else total + score
        is_full = score is None or total >= 0.2
        total = 0.0 if is_full else total
        shown += "F" if is_full else "c"
    assert shown == trace.strip()


def test_branches_with_equal_signals_decide_alike(model):
    inputs = flux_inputs(1)
    x = inputs["hidden_states"]
    with c4d.accelerate(model, "teacache", threshold=0.2) as handle, handle.run(num_steps=STEPS), torch.no_grad():
        for i in range(STEPS):
            t = torch.tensor([1 - i / STEPS])
            twin = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] + 1}
            for name, given in (("cond", inputs), ("uncond", twin)):
                with handle._tracker.branch(name):  # block 0's modulated image tokens know nothing of the text
                    (out,) = model(**{**given, "hidden_states": x}, timestep=t)
            x = x - out / STEPS
    first, second = handle.stats["strips"].values()
    assert first == second
    assert set(first) == {"F", "c"}


@pytest.mark.parametrize("variant", ["default", "official"])
def test_scores_that_the_polynomial_makes_negative_are_counted_in_the_report(model, variant):
    middle = 0.05
    with c4d.accelerate(model, "teacache", threshold=0.3, coefficients=(1.0, -middle), variant=variant) as handle:
        with handle.run(num_steps=STEPS):
            sample(model, flux_inputs(2), STEPS)
        scores = [record.scores[0] for record in handle.trace.of() if record.scores[0] is not None]
        negative = sum(score < middle for score in scores)
        assert negative > 0
        reported = [line for line in handle.report().splitlines() if "rescales to below 0" in line]
        if variant == "official":
            assert not reported and not handle.stats["counts"]
        else:
            assert len(reported) == 1 and f" {negative} x " in reported[0]
            assert list(handle.stats["counts"].values()) == [negative]


def test_what_lies_outside_the_fitted_range_is_remarked_on():
    gate = AccumulatedChange(0.3, (1.0, -0.05), rescale="clamp0", fitted=(0.02, 0.2))
    assert "range 0.02 to 0.2" in gate.remark(0.3) and "range" in gate.remark(0.01)
    assert "below 0" in gate.remark(0.03)
    assert gate.remark(0.1) is None
    assert AccumulatedChange(0.3, (1.0, -0.05)).remark(0.01) is None
