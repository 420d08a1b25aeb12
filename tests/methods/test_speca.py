"""SpeCa against a slow reference written from its card: draft, verification, decisions."""

import math

import pytest
import torch
from slow_references import TaylorParts

import cache4diffusion as c4d
from cache4diffusion.gates import Schedule
from cache4diffusion.predictors import Taylor
from cache4diffusion.sites import Parts
from small_denoisers import (
    LinearCounter,
    Plainly,
    SlowFlux,
    accelerated,
    differences,
    dit_inputs,
    flux_inputs,
    rows_of,
    sample,
)

STEPS = 24
# Thresholds at which the small random denoisers show every kind of cycle.
FLUX = {"threshold": 1.6, "decay": 0.6, "min_run": 2, "max_run": 6, "order": 2, "warmup": 3, "floor": 0.1}
DIT = {"threshold": 0.14, "decay": 0.8, "min_run": 2, "max_run": 5, "order": 2, "warmup": 3, "floor": 0.01}


class SpecaParts(TaylorParts):
    """The card's SpeCa on FLUX: the released rule, and a check of the last single-stream block."""

    def __init__(self, last, threshold, decay, min_run, max_run, order, warmup, floor, num_steps=STEPS):
        super().__init__(0, order, warmup)
        self.last_block, self.rule, self.num_steps = last, (threshold, decay, min_run, max_run, floor), num_steps
        self.last_type, self.n, self.err, self.check = None, 0, None, False
        self.strip, self.errors = "", []

    def begin(self, step):
        threshold, decay, min_run, max_run, floor = self.rule
        self.step = step
        if self.last_type == "F":
            self.is_full, self.n, self.check, self.err = False, 1, False, None
        else:
            tau = max(threshold * decay ** (step / self.num_steps), floor)
            self.check = self.n >= min_run
            bad = self.err is not None and self.err > tau
            if step < self.first_enhance or self.n >= max_run or (bad and self.check):
                self.is_full, self.n = True, 0
            else:
                self.is_full, self.n = False, self.n + 1
        if self.is_full:
            self.activated.append(step)
        self.last_type = "F" if self.is_full else "c"
        self.strip += self.last_type

    def fused(self, name, block, x, rope, layer):
        value = super().fused(name, block, x, rope, layer)
        if not self.is_full and self.check and name == self.last_block:
            true = Plainly.fused(self, name, block, x, rope, layer)
            self.err = float(((value - true).abs() / (true.abs() + 1e-10)).mean())
            self.errors.append((self.step, self.err))
        return value


def test_decisions_errors_and_outputs_are_the_slow_references(model):
    inputs, reference = flux_inputs(1), SpecaParts("single.2", **FLUX)
    expected = sample(SlowFlux(model, reference), inputs, STEPS)
    reached, trace, stats = accelerated(model, inputs, STEPS, "speca", **FLUX)
    assert trace.strip() == reference.strip
    lengths = {len(run) for run in reference.strip[3:].split("F")[1:-1]}
    assert len(lengths) > 1, "cycles of several lengths, else nothing was verified"
    assert max(differences(reached, expected)) <= 1e-5
    # A score is the error found at the step before; those not followed by a decision that reads them are left out.
    noted = [(r.step - 1, r.scores[0]) for r in trace.of() if r.scores[0] is not None]
    kept = [(step, error) for step, error in reference.errors if step + 1 < STEPS]
    assert [step for step, _ in noted] == [step for step, _ in kept]
    assert [error for _, error in noted] == pytest.approx([error for _, error in kept], rel=1e-3)
    assert stats["syncs"] == len(reference.errors), "one per checked step"


@pytest.mark.parametrize("case", ["flux", "dit"])
def test_rows_of_a_batch_are_four_runs_of_one(model, class_model, case):
    denoiser, inputs, settings = (model, flux_inputs(4), FLUX) if case == "flux" else (class_model, dit_inputs(4), DIT)
    whole, trace, _ = accelerated(denoiser, inputs, STEPS, "speca", **settings)
    decided = [record.rows for record in trace.of()]
    assert any(0 < sum(rows) < 4 for rows in decided), "the rows disagree somewhere"
    for row in range(4):
        alone, own, _ = accelerated(denoiser, rows_of(inputs, row), STEPS, "speca", **settings)
        assert [rows[row] for rows in decided] == [record.symbol == "c" for record in own.of()]
        assert max(differences([out[row : row + 1] for out in whole], alone)) <= 1e-5


@pytest.mark.parametrize("decide", ["row", "batch", "any"])
def test_verification_never_changes_the_output(model, decide):
    """The same schedule without a check gives the same bits."""
    inputs = flux_inputs(1)
    reached, trace, _ = accelerated(model, inputs, STEPS, "speca", decide=decide, **FLUX)
    strip = trace.strip()
    full = tuple(i for i, symbol in enumerate(strip) if symbol == "F")
    unchecked = c4d.Composition(Parts(), Schedule(full), Taylor(2, first_difference_step=2))
    expected, other, _ = accelerated(model, inputs, STEPS, unchecked)
    assert other.strip() == strip
    assert differences(reached, expected) == [0.0] * STEPS


def test_a_checked_step_runs_the_last_block_and_no_other(model):
    single = model.single_transformer_blocks
    settings = {**FLUX, "threshold": 1e9, "decay": 1.0, "max_run": 6}
    before = {"last": [], "other": []}
    with c4d.accelerate(model, "speca", **settings) as handle:
        with handle.run(num_steps=9):
            sample(model, flux_inputs(1), 1)
        with LinearCounter([single[-1].proj_mlp]) as last, LinearCounter([single[0].proj_mlp]) as other:

            def note(_):
                before["last"].append(last.count)
                before["other"].append(other.count)

            with handle.run(num_steps=9):
                sample(model, flux_inputs(1), 9, before=note)
    assert handle.trace.strip() == "FcFcccccc"
    totals = {"last": last.count, "other": other.count}
    counts = {k: [b - a for a, b in zip(v, [*v[1:], totals[k]], strict=True)] for k, v in before.items()}
    assert counts["other"] == [1, 0, 1, 0, 0, 0, 0, 0, 0]
    assert counts["last"] == [1, 0, 1, 0, 0, 1, 1, 1, 1], "from the third cached step of a cycle on"


def test_on_dit_the_blocks_output_is_compared(class_model):
    """The last block once more by hand, from its own input at a checked step."""
    settings = {**DIT, "threshold": 1e9, "decay": 1.0}
    inputs, entered, left = dit_inputs(1), [], []
    block = class_model.transformer_blocks[-1]
    with c4d.accelerate(class_model, "speca", **settings) as handle, handle.run(num_steps=8):
        before = block.register_forward_pre_hook(lambda _, a, k: entered.append((a, k)), with_kwargs=True)
        after = block.register_forward_hook(lambda _, a, out: left.append(out))
        sample(class_model, inputs, 8)
        before.remove()
        after.remove()
    assert handle.trace.strip() == "FcFccccc"
    # Step 5 is checked: the block is called twice there, predicted first, then true, on one input.
    calls = entered[-6:]  # steps 5, 6, 7, twice each
    for i in (0, 2, 4):
        with torch.no_grad():
            true = block(*calls[i][0], **calls[i][1])
        torch.testing.assert_close(left[-6:][i + 1], true)
    predicted, true = left[-6], left[-5]
    error = float(((predicted - true).abs() / (true.abs() + 1e-10)).mean())
    assert handle.trace.of()[6].scores[0] == pytest.approx(error, rel=1e-5)


def test_with_an_endless_tolerance_the_cycle_is_max_run_and_one(model):
    strip = accelerated(model, flux_inputs(1), 20, "speca", **{**FLUX, "threshold": 1e9, "max_run": 4})[1].strip()
    assert strip == "FcF" + ("ccccF" * 4)[:17]


def test_a_tolerance_of_nothing_gives_the_shortest_cycles(model):
    settings = {**FLUX, "floor": 0.0, "threshold": 1e-9}
    assert accelerated(model, flux_inputs(1), 15, "speca", **settings)[1].strip() == "FcFcccFcccFcccF"[:15]
    one = {**settings, "max_run": 1}
    assert accelerated(model, flux_inputs(1), 8, "speca", **one)[1].strip() == "FcFcFcFc"


def test_threshold_0_is_off_and_the_official_variant_caches(model):
    inputs = flux_inputs(2)
    reached, trace, _ = accelerated(model, inputs, 6, "speca", **{**FLUX, "threshold": 0.0})
    assert trace.strip() == "F" * 6
    assert differences(reached, sample(model, inputs, 6)) == [0.0] * 6
    official = {**FLUX, "threshold": 0.0, "floor": 0.0, "variant": "official"}
    assert accelerated(model, flux_inputs(1), 8, "speca", **official)[1].strip() == "FcFcccFc"


def test_batch_takes_one_decision_from_the_error_of_all_rows(model):
    inputs = flux_inputs(3)
    settings = {**FLUX, "threshold": 1e9, "decay": 1.0}
    _, batch, _ = accelerated(model, inputs, 8, "speca", decide="batch", **settings)
    _, rows, _ = accelerated(model, inputs, 8, "speca", decide="row", **settings)
    assert batch.strip() == rows.strip()
    for one, each in zip(batch.of(), rows.of(), strict=True):
        if one.scores[0] is not None:
            assert one.scores[0] == pytest.approx(sum(each.scores) / 3, rel=1e-4)


@pytest.mark.parametrize("metric", ["l1", "l2", "relative_l2", "cosine"])
def test_every_metric_verifies(model, metric):
    settings = {**FLUX, "threshold": 1e9, "decay": 1.0, "metric": metric}
    records = accelerated(model, flux_inputs(1), 9, "speca", **settings)[1].of()
    errors = [record.scores[0] for record in records if record.scores[0] is not None]
    assert errors
    assert all(math.isfinite(error) and error > 0 for error in errors)
