"""L2P: weights against least squares on the trajectories themselves, errors from the matrix alone, runs by hand."""

import numpy as np
import pytest
import torch

import cache4diffusion as c4d
from cache4diffusion.calibration import Calibration
from cache4diffusion.calibration.gram import StepGram, error_of
from cache4diffusion.calibration.observer import Observer
from cache4diffusion.errors import CalibrationError, SettingError
from cache4diffusion.predictors import LearnedCombination
from cache4diffusion.predictors.learned import solved
from small_denoisers import accelerated, differences, flux_inputs, sample

STEPS = 9


def gram_of(trajectories):
    """The card's matrix, entry by entry."""
    steps = len(trajectories[0])
    return torch.tensor(
        [[sum(float((t[i] * t[j]).sum()) for t in trajectories) for j in range(steps)] for i in range(steps)],
        dtype=torch.float64,
    )


def random_trajectories(steps, rank=None, count=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    if rank is None:
        return [torch.randn(steps, 40, generator=g).double().cumsum(0) for _ in range(count)]
    mix = torch.randn(steps, rank, generator=g).double()
    return [mix @ torch.randn(rank, 40, generator=g).double() for _ in range(count)]


def test_weights_are_least_squares_on_the_trajectories():
    trajectories, full, step, ridge = random_trajectories(8), [5, 2, 0], 6, 1e-5
    gram = gram_of(trajectories)
    a = np.concatenate([t[full].T.numpy() for t in trajectories])
    b = np.concatenate([t[step].numpy() for t in trajectories])
    pull = ridge * float(gram[full, full].mean())
    wanted = np.linalg.solve(a.T @ a + pull * np.eye(3), a.T @ b)
    assert solved(gram, full, step, ridge) == pytest.approx(wanted.tolist(), rel=1e-6)


def test_trajectories_of_as_many_dimensions_as_full_steps_are_exact():
    trajectories = random_trajectories(8, rank=3)
    predictor = LearnedCombination(tuple(map(tuple, gram_of(trajectories).tolist())), ridge=1e-14)
    unseen = random_trajectories(8, rank=3, seed=0)[1]
    state = predictor.init(None, 8)
    for step in (0, 2, 5):
        predictor.update(state, [unseen[step]], float(step))
    for step in (6, 7):
        torch.testing.assert_close(predictor.predict(state, float(step))[0], unseen[step], rtol=1e-5, atol=1e-6)


def test_where_reuse_is_right_the_weights_are_one_hot():
    trajectories = random_trajectories(6)
    for t in trajectories:
        t[4] = t[3]  # nothing changed since the last full step
    weights = solved(gram_of(trajectories), [3, 1, 0], 4, 1e-9)
    assert weights == pytest.approx([1.0, 0.0, 0.0], abs=1e-4)


def test_the_error_is_known_from_the_matrix_alone():
    trajectories, full, step = random_trajectories(8), [5, 2, 0], 7
    gram = gram_of(trajectories)
    weights = torch.tensor(solved(gram, full, step, 1e-5), dtype=torch.float64)
    true = sum(float((t[step] - weights @ t[full]).square().sum()) for t in trajectories)
    assert float(error_of(gram, full, step, weights)) == pytest.approx(true, rel=1e-9)
    for change in (0.01 * torch.randn(3, 3).double()).unbind():
        assert float(error_of(gram, full, step, weights + change)) > true


def test_rows_are_fitted_to_the_full_steps_there_are_and_not_to_all_earlier_ones():
    gram = gram_of(random_trajectories(8))
    all_earlier = solved(gram, [4, 3, 2, 1, 0], 5, 1e-5)
    dropped = [weight for weight, step in zip(all_earlier, [4, 3, 2, 1, 0], strict=True) if step in (3, 0)]
    fitted = torch.tensor(solved(gram, [3, 0], 5, 1e-5), dtype=torch.float64)
    assert float(error_of(gram, [3, 0], 5, fitted)) < float(
        error_of(gram, [3, 0], 5, torch.tensor(dropped, dtype=torch.float64))
    )


def test_the_matrix_is_that_of_the_uncached_outputs(model):
    inputs = [flux_inputs(1, seed=seed) for seed in range(2)]
    with Observer(model, StepGram()) as observer:
        for each in inputs:
            with observer.run(num_steps=STEPS):
                sample(model, each, STEPS)
    gram = observer.entries()["denoiser"].fit["gram"]
    torch.testing.assert_close(gram, gram_of([sample(model, each, STEPS) for each in inputs]), rtol=1e-5, atol=1e-5)


def test_the_verdict_is_the_share_of_the_change_since_the_last_full_step():
    trajectories = random_trajectories(9, rank=2)
    fit = StepGram(interval=4, warmup=1).fit({"gram": gram_of(trajectories)})
    left = moved = 0.0
    for step in (1, 2, 3, 5, 6, 7):
        full = [s for s in (4, 0) if s < step]
        weights = torch.tensor(solved(gram_of(trajectories), full, step, 1e-5), dtype=torch.float64)
        left += sum(float((t[step] - weights @ t[full]).square().sum()) for t in trajectories)
        moved += sum(float((t[step] - t[full[0]]).square().sum()) for t in trajectories)
    assert fit.quality.r2 == pytest.approx(1 - left / moved)
    assert "the change since the last one" in fit.quality.verdict
    assert StepGram().fit({"gram": torch.ones(6, 6).double()}).quality.r2 is None, "nothing changed"


def calibrated(model, steps=STEPS):
    with Observer(model, StepGram()) as observer, observer.run(num_steps=steps):
        sample(model, flux_inputs(1, seed=5), steps)
    return Calibration.by_hand("l2p", steps, observer.entries()["denoiser"].fit)


@pytest.mark.parametrize("history", [None, 2])
def test_every_step_equals_the_sum_by_hand(model, history):
    made, inputs = calibrated(model), flux_inputs(2)
    gram, kept = made.entry.fit["gram"], []

    def slow(**kwargs):
        step = slow.step = getattr(slow, "step", -1) + 1
        if step < 2 or (step - 1) % 3 == 0:
            (out,) = model(**kwargs)
            kept.append((step, out))
            return (out,)
        chosen = kept[-history:] if history else kept
        weights = solved(gram, [s for s, _ in chosen], step, 1e-5)
        return (sum(w * out for w, (_, out) in zip(weights, chosen, strict=True)),)

    expected = sample(slow, inputs, STEPS)
    found, trace, stats = accelerated(
        model, inputs, STEPS, "l2p", interval=3, warmup=2, history=history, calibration=made
    )
    assert trace.strip() == "FFccFccFc"
    assert f"``{trace.strip()}``" in (c4d.methods.L2P.__doc__ or "")
    assert max(differences(found, expected)) < 1e-5
    assert stats["syncs"] == 0


def test_it_beats_reuse_on_the_run_it_was_learned_from(model):
    plain = sample(model, flux_inputs(1, seed=5), STEPS)
    errors = {}
    for name, settings in (("l2p", {"calibration": calibrated(model)}), ("taylorseer-lite", {"order": 0})):
        found, trace, _ = accelerated(model, flux_inputs(1, seed=5), STEPS, name, interval=3, warmup=2, **settings)
        assert trace.strip() == "FFccFccFc"
        errors[name] = sum(differences(found, plain))
    assert errors["l2p"] < errors["taylorseer-lite"]


def test_a_run_of_other_steps_is_refused_or_served_by_its_share(model):
    made = calibrated(model)
    with pytest.raises(CalibrationError, match="calibrated for 9 steps, and the run has 5 steps"):
        accelerated(model, flux_inputs(1), 5, "l2p", calibration=made, interval=2, warmup=1)
    predictor = c4d.method("l2p", calibration=made, resample=True).compose().predictor
    state = predictor.init(None, 5)
    for step in (0, 2):
        predictor.update(state, [torch.tensor([float(step)])], float(step))
    wanted = solved(made.entry.fit["gram"], [4, 0], 6, 1e-5)  # of 9 steps, 0 2 3 of 5 are 0 4 6
    assert predictor.slot_weights(state, 3.0)[:2] == pytest.approx(wanted[::-1])
    _, trace, _ = accelerated(model, flux_inputs(1), 5, "l2p", calibration=made, interval=2, warmup=1, resample=True)
    assert trace.strip() == "FcFcF"


@pytest.mark.parametrize("bad", [{"ridge": -1.0}, {"history": 0}, {"gram": ((1.0, 2.0),)}])
def test_wrong_settings_are_refused(bad):
    with pytest.raises(SettingError):
        LearnedCombination(**bad)
