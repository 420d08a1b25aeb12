"""LazyDiT: per-row decisions of every part against a slow reference; its training against the card's, written out."""

import functools

import pytest
import torch
from slow_training import NAMES, Slow, adam, assert_same_numbers, blend, by_step, train, update

import cache4diffusion as c4d
from cache4diffusion.calibration import Calibration
from cache4diffusion.calibration.lazy_gates import LazyGates
from cache4diffusion.cost import summarise
from cache4diffusion.errors import CalibrationError, CompositionError
from cache4diffusion.gates import score_of
from small_denoisers import (
    FLUX_PARTS,
    Alike,
    SlowFlux,
    accelerated,
    differences,
    dit,
    dit_inputs,
    flux,
    flux_inputs,
    made_by_hand,
    rows_of,
    sample,
)

STEPS, WIDTH = 8, 32
by_hand = functools.partial(made_by_hand, "lazydit")


def channels(name):
    return 2 * WIDTH if FLUX_PARTS[name] == "attn" else WIDTH


def random_weights(scale, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(STEPS, channels(name), generator=g) for name in NAMES}


def score(w, entering):
    """The card's: a sum over tokens of z @ w."""
    begin, total = 0, 0
    for z in entering:
        total = total + (z @ w[begin : begin + z.shape[-1]]).sum(1)
        begin += z.shape[-1]
    return torch.sigmoid(total)


class Lazily(Alike):
    """The card's inference, row by row; remembers which rows were computed."""

    def __init__(self, weights, threshold=0.5):
        self.weights, self.threshold, self.kept, self.step, self.computed = weights, threshold, {}, -1, {}

    def begin(self, step):
        self.step = step

    def give(self, name, kind, entering, compute):
        out = compute()
        out = list(out) if isinstance(out, tuple) else [out]
        mask = torch.ones(len(out[0]), dtype=torch.bool)
        if name in self.kept:
            mask = score(self.weights[name][self.step], entering) >= self.threshold
            places = mask[:, None, None]
            out = [torch.where(places, new, old) for new, old in zip(out, self.kept[name], strict=True)]
        self.kept[name] = out
        self.computed[self.step, name] = mask.tolist()
        return tuple(out) if len(out) > 1 else out[0]


@pytest.mark.parametrize("batch", [1, 3])
def test_every_row_of_every_part_is_computed_where_its_score_says(model, batch):
    weights = random_weights(0.02)
    parts = Lazily(weights)
    expected = sample(SlowFlux(model, parts), flux_inputs(batch), STEPS)
    reached, trace, stats = accelerated(model, flux_inputs(batch), STEPS, "lazydit", calibration=by_hand(weights))
    assert max(differences(reached, expected)) <= 1e-5
    shares = [1 - sum(sum(parts.computed[s, name]) for name in NAMES) / (batch * len(NAMES)) for s in range(STEPS)]
    assert [record.cached for record in trace.of()] == pytest.approx(shares)
    assert 0.2 < sum(shares) / STEPS < 0.8
    if batch > 1:
        assert any(len(set(flags)) > 1 for flags in parts.computed.values()), "rows differ somewhere"
    assert stats["syncs"] == (STEPS - 1) * len(NAMES), "one per decision"


def test_zero_weights_score_one_half_and_compute(model):
    calibration = by_hand({name: torch.zeros(STEPS, channels(name)) for name in NAMES})
    with pytest.warns(UserWarning, match="0 of 8 steps were cached"):
        reached, trace, _ = accelerated(model, flux_inputs(2), STEPS, "lazydit", calibration=calibration)
    assert trace.strip() == "F" * STEPS
    assert differences(reached, sample(model, flux_inputs(2), STEPS)) == [0.0] * STEPS


def test_a_threshold_above_1_caches_everything_after_the_first_step(model):
    calibration = by_hand(random_weights(0.02))
    _, trace, _ = accelerated(model, flux_inputs(2), STEPS, "lazydit", calibration=calibration, threshold=1.1)
    assert trace.strip() == "F" + "c" * (STEPS - 1)


def test_threshold_0_is_bit_equal(model):
    calibration = by_hand(random_weights(3.0))
    reached, trace, _ = accelerated(model, flux_inputs(2), STEPS, "lazydit", calibration=calibration, threshold=0.0)
    assert trace.strip() == "F" * STEPS
    assert differences(reached, sample(model, flux_inputs(2), STEPS)) == [0.0] * STEPS


def test_permuting_the_batch_permutes_what_happens(model):
    calibration, order = by_hand(random_weights(0.02)), [2, 0, 1]
    inputs = flux_inputs(3)
    permuted = {k: v[order] if torch.is_tensor(v) and v.shape[0] == 3 else v for k, v in inputs.items()}
    first = accelerated(model, inputs, STEPS, "lazydit", calibration=calibration)[0]
    other = accelerated(model, permuted, STEPS, "lazydit", calibration=calibration)[0]
    assert max(differences([out[order] for out in first], other)) <= 1e-5


def test_each_row_of_a_batch_is_as_in_its_own_run(model):
    calibration = by_hand(random_weights(0.02))
    together = accelerated(model, flux_inputs(3), STEPS, "lazydit", calibration=calibration)[0]
    for row in range(3):
        alone = accelerated(model, rows_of(flux_inputs(3), row), STEPS, "lazydit", calibration=calibration)[0]
        assert max(differences([out[row : row + 1] for out in together], alone)) <= 1e-5


def test_deciding_for_the_batch_goes_by_the_mean_and_any_by_the_largest(model):
    weights = random_weights(0.02)
    rows = {}
    for decide in ("batch", "any", "row"):
        _, trace, _ = accelerated(
            model, flux_inputs(3), 2, "lazydit", calibration=by_hand(weights), decide=decide, resample=True
        )
        rows[decide] = trace.of()[1].cached
    assert rows["any"] <= rows["row"]
    assert rows["batch"] * len(NAMES) == pytest.approx(round(rows["batch"] * len(NAMES)))


def test_what_is_cached_does_not_run_and_the_flops_say_so(model):
    shares = []
    runs = {"ff": 0, "attn": 0}
    watched = {
        "ff": model.transformer_blocks[0].ff.net[2],
        "attn": model.single_transformer_blocks[1].attn.norm_q,
    }
    hooks = [m.register_forward_hook(lambda *_, n=n: runs.__setitem__(n, runs[n] + 1)) for n, m in watched.items()]
    for threshold in (0.0, 2.0):
        with c4d.accelerate(model, "lazydit", calibration=by_hand(random_weights(0.0)), threshold=threshold) as handle:
            handle.prepare(**flux_inputs(2), timestep=torch.ones(2))
            runs.update(dict.fromkeys(runs, 0))
            with handle.run(num_steps=STEPS):
                sample(model, flux_inputs(2), STEPS)
            assert set(runs.values()) == {STEPS if threshold == 0 else 1}
            found = summarise(handle)
        shares.append(found.run_flops / (STEPS * found.full_flops))
    for hook in hooks:
        hook.remove()
    assert shares[0] == pytest.approx(1)
    assert shares[1] < 0.4


def test_batched_guidance_on_dit_lets_its_halves_decide_freely():
    denoiser, g = dit(), torch.Generator().manual_seed(0)
    names = [f"transformer_blocks.{i}.{part}" for i in range(3) for part in ("attn1", "ff")]
    fit = {name: 0.05 * torch.randn(STEPS, WIDTH, generator=g, dtype=torch.float64) for name in names}
    calibration = Calibration.by_hand("lazydit", STEPS, fit)
    together, trace, _ = accelerated(denoiser, dit_inputs(2), STEPS, "lazydit", calibration=calibration)
    assert any(record.rows is None or len(set(record.rows)) for record in trace.of())
    for row in range(2):
        alone = accelerated(denoiser, rows_of(dit_inputs(2), row), STEPS, "lazydit", calibration=calibration)[0]
        assert max(differences([out[row : row + 1] for out in together], alone)) <= 1e-5


def test_compiled_blocks_are_refused_before_and_after(model):
    compiled = flux()
    compiled.transformer_blocks[0].compile(backend="eager")
    with pytest.raises(CompositionError, match="must not be compiled"):
        c4d.accelerate(compiled, "lazydit", calibration=by_hand(random_weights(0.02)))
    later = flux()
    with c4d.accelerate(later, "lazydit", calibration=by_hand(random_weights(0.02))) as handle:
        handle.prepare(**flux_inputs(1), timestep=torch.ones(1))
        with pytest.raises(CompositionError, match="must not be compiled"):
            later.transformer_blocks[0].compile(backend="eager")


def test_another_number_of_steps_is_refused_unless_resampling_is_asked_for(model):
    calibration = by_hand(random_weights(0.02))
    with pytest.raises(CalibrationError, match=r"calibrated for 8 steps, and the run has 5 steps\. .*resample=True"):
        accelerated(model, flux_inputs(1), 5, "lazydit", calibration=calibration)
    _, trace, _ = accelerated(model, flux_inputs(1), 5, "lazydit", calibration=calibration, resample=True)
    assert len(trace.strip()) == 5


# -- what is trained ---------------------------------------------------------------------------------------------------


def slow_training(model, steps, runs, rate, price, batch):
    """The card: pairs of steps on the uncached trajectory, mixed by each row's score; zero weights to begin with."""
    slow = Slow(model)
    w = {s: {name: torch.zeros(channels(name), requires_grad=True) for name in NAMES} for s in range(1, steps, 2)}
    optimizers = {s: adam(w[s].values(), rate) for s in w}
    for run in range(runs):
        inputs = flux_inputs(batch, seed=run)
        x = inputs["hidden_states"]
        for s in range(steps):
            with torch.no_grad():
                y = slow.full(x, s, steps, inputs) if s % 2 == 0 else slow.target(x, s, steps, inputs)
            if s % 2 == 1:
                lazy = []

                def student(name, entering, compute, kept, s=s, lazy=lazy):
                    scores = score(w[s][name], entering)
                    lazy.append(scores)
                    return blend(scores[:, None, None], compute(), kept[name])

                mixed = slow.taught(student, x, s, steps, inputs)
                loss = ((y - mixed) ** 2).mean() + price * torch.stack(lazy).sum(0).mean()
                update(optimizers[s], loss, w[s].values())
            x = x - y / steps
    return by_step(w, steps)


@pytest.mark.parametrize(("batch", "price"), [(1, 0.0), (2, 1e-3)])
def test_gates_are_trained_as_the_card_says(model, batch, price):
    entry = train(model, LazyGates(runs=4, rate=0.003, price=price), 4, batch=batch)
    assert_same_numbers(entry, slow_training(model, 4, 4, 0.003, price, batch))


def test_a_high_price_makes_every_part_lazy(model):
    entry = train(model, LazyGates(runs=20, rate=0.01, price=1.0), 4)
    assert "100% of the features are cached at the trained steps" in entry.quality.verdict


def test_the_score_is_a_sum_over_tokens():
    z, w = torch.randn(2, 5, 3), torch.randn(3)
    torch.testing.assert_close(score_of([z], w), torch.sigmoid((z @ w).sum(1)))
    torch.testing.assert_close(score_of([z, z], torch.cat([w, w])), torch.sigmoid(2 * (z @ w).sum(1)))
