"""The observer sees the uncached denoiser as the method would, in one pass, and changes nothing."""

import pytest
import torch
from calibrating import CALL, MEASURED, OPTIONS, STEPS, calibrated, prompts

import cache4diffusion as c4d
import toys
from cache4diffusion.calibration import merge_calibrations
from cache4diffusion.calibration.observer import Observer
from cache4diffusion.calibration.polynomial import SignalPolynomial
from cache4diffusion.errors import AlreadyAcceleratedError, CalibrationError, SettingError


@pytest.fixture(scope="module")
def pipe():
    return toys.flux_pipeline()


@pytest.mark.parametrize("name", MEASURED)
def test_merged_halves_equal_one_pass(pipe, name):
    whole = calibrated(pipe, name, 4)
    merged = merge_calibrations([calibrated(pipe, name, 2), calibrated(pipe, name, 2, first=2)], pipe)
    assert merged.provenance == whole.provenance
    assert merged.entry.fit.keys() == whole.entry.fit.keys()
    for key, value in whole.entry.fit.items():
        torch.testing.assert_close(merged.entry.fit[key], value, rtol=1e-9, atol=1e-12)
    assert merged.entry.quality.verdict == whole.entry.quality.verdict
    assert merged.entry.quality.r2 == pytest.approx(whole.entry.quality.r2)


def test_factors_of_weights_are_merged_only_where_the_weights_are(pipe):
    shards = [calibrated(pipe, "icc", 1), calibrated(pipe, "icc", 1, first=1)]
    with pytest.raises(CalibrationError, match=r"made from the denoiser's weights.*merge_calibrations\(shards, pipe\)"):
        merge_calibrations(shards)
    with pytest.raises(CalibrationError, match="another denoiser than transformer"):
        merge_calibrations(shards, toys.flux_pipeline(toys.flux(guidance=True)))


@pytest.mark.parametrize("name", MEASURED)
def test_a_calibration_of_one_pipeline_works_on_it(pipe, name, tmp_path):
    made = calibrated(pipe, name, 2)
    path = made.save(tmp_path / "made.safetensors")
    settings = {"threshold": 0.5} if name == "fastcache" else {}  # few steps are far apart
    with c4d.accelerate(pipe, name, calibration=str(path), **settings) as handle:
        toys.generate(pipe, STEPS)
    assert len(handle.trace.strip()) == STEPS
    assert all("</svg>" in text for text in made.plots().values())
    assert made.verdict().startswith("transformer: ")


@pytest.mark.parametrize("name", MEASURED)
def test_observing_changes_nothing(pipe, name):
    before, plain = toys.Dicts(pipe.transformer, pipe.scheduler), toys.generate(pipe, STEPS)
    statistic = c4d.METHODS[name].calibrator(**OPTIONS.get(name, {}))
    with Observer(pipe, statistic) as observer:
        assert torch.equal(toys.generate(pipe, STEPS), plain)
        assert observer._handle.trace.strip() == "F" * STEPS
        assert observer._handle.memory["peak"] <= 16 * 32 * 4, "at most the signal of the step before"
    changed = [name for name in before.changed() if "Scheduler" not in name]
    assert changed == []


def test_one_pass_is_one_call_per_prompt_and_step(pipe):
    pipe = toys.flux_pipeline(transformer=toys.flux())
    counter = toys.Counter(pipe.transformer)
    calibrated(pipe, "smoothcache", 3)
    assert counter.counts[""] == 3 * STEPS


def test_scores_are_the_ones_the_gate_is_given(pipe):
    made = calibrated(pipe, "teacache", 1)
    with c4d.accelerate(pipe, "teacache", threshold=0.0) as handle:
        pipe(**prompts(1)[0], **CALL, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
    given = [record.scores[0] for record in handle.trace.of()][1 : STEPS - 1]  # the last step is forced
    assert made.entry.sums["pairs"][: STEPS - 2, 0].tolist() == pytest.approx(given, rel=1e-6)


def test_branches_are_told_apart(pipe):
    made = c4d.calibrate(pipe, "magcache", [toys.prompt(1, negative=2)], steps=STEPS, call=CALL, trial=0)
    names = set(made.entry.fit) - {"ratios"}
    assert len(names) == 2
    a, b = (made.entry.fit[name] for name in names)
    assert not torch.allclose(a, b)
    torch.testing.assert_close(made.entry.fit["ratios"], (a + b) / 2)


def test_a_loop_of_ones_own_is_observed(pipe):
    denoiser = toys.flux()
    with Observer(denoiser, SignalPolynomial()) as observer, observer.run(timesteps=toys.timesteps(5)):
        toys.flux_loop(denoiser, toys.flux_inputs(), 5)
    entry = observer.entries()["denoiser"]
    assert entry.levels == tuple(toys.timesteps(5))
    assert len(entry.sums["pairs"]) == 4


def test_runs_of_different_lengths_are_refused(pipe):
    with Observer(pipe, SignalPolynomial()):
        toys.generate(pipe, 6)
        with pytest.raises(CalibrationError, match=r"same steps and noise levels: the first had 6 .*this one has 5"):
            toys.generate(pipe, 5)


def test_what_is_accelerated_is_not_calibrated(pipe):
    with c4d.accelerate(pipe, "fora"), pytest.raises(AlreadyAcceleratedError, match="must see it uncached"):
        calibrated(pipe, "teacache")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompts": []}, "one prompt or more"),
        ({"prompts": "a cat"}, "give a list"),
        ({"seeds": [1]}, "1 seeds for 2 prompts"),
        ({"steps": 1}, "use 2 or more"),
        ({"degree": 0}, "degree must be 1 or more"),
        ({"degre": 3}, "did you mean 'degree'"),
        ({"call": {"hight": 3}}, "did you mean 'height'"),
    ],
)
def test_wrong_arguments_are_answered_in_words(pipe, arguments, said):
    with pytest.raises(SettingError, match=said):
        c4d.calibrate(pipe, "teacache", **{"prompts": prompts(2), "call": CALL, **arguments})


def test_a_method_that_measures_nothing_is_refused(pipe):
    with pytest.raises(CalibrationError, match=r"fora needs no calibration.*smoothcache.*teacache"):
        calibrated(pipe, "fora")
