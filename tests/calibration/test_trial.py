"""A trial says what a calibration is worth: its method beside plain reuse of as many FLOPs, from other noise."""

import dataclasses

import pytest
import torch
from calibrating import CALL, STEPS, calibrated, prompts

import cache4diffusion as c4d
import toys
from cache4diffusion.calibration import Trial, load_calibration, merge_calibrations, outputs, trying
from cache4diffusion.calibration.run import try_out
from cache4diffusion.compare import parse_method
from cache4diffusion.errors import AnatomyError, CalibrationError, FileFormatError, SettingError
from cache4diffusion.strip import planned_strip
from cache4diffusion.wrap import owner_of


@pytest.fixture(scope="module")
def pipe():
    return toys.flux_pipeline()


def trial_of(errors, others, speedup=2.0):
    return Trial("teacache(threshold=0.1)", "fora(interval=2, warmup=3)", speedup, 1.9, tuple(errors), tuple(others))


@pytest.mark.parametrize(
    ("errors", "others", "wins", "is_won"),
    [
        ([0.1] * 4, [0.2] * 4, 4, True),
        ([0.1, 0.1, 0.1, 0.3], [0.2] * 4, 3, True),
        ([0.1, 0.1, 0.3, 0.3], [0.2] * 4, 2, False),  # could be chance
        ([0.19, 0.19, 0.19, 0.9], [0.2] * 4, 3, False),  # closer for most, and worse on average
        ([0.2] * 4, [0.2] * 4, 0, False),
        ([0.0] * 4, [0.2] * 4, 4, True),
    ],
)
def test_a_trial_is_won_by_most_prompts_and_on_average(errors, others, wins, is_won):
    trial = trial_of(errors, others)
    assert (trial.wins, trial.is_won) == (wins, is_won)
    assert f"closer for {wins} of 4" in trial.verdict()
    assert ("not worth its calibration" in trial.verdict()) is not is_won


def test_what_saves_nothing_wins_nothing():
    trial = trial_of([0.0], [0.2], speedup=1.01)
    assert not trial.is_won
    assert trial.verdict().endswith("tried on 1 prompt from other noise: 1.01x FLOPs, so hardly anything is cached.")


@pytest.mark.parametrize("steps", [2, 3, 9, 50])
def test_full_steps_are_those_of_the_reuse_that_is_tried(steps):
    for interval in (2, 3, 7, 24):
        for warmup in range(1, steps):
            for make in (trying._fora, trying._whole):
                made = make(interval=interval, warmup=warmup)[1]
                strip = planned_strip(made if make is trying._whole else made.compose(), steps)
                assert strip.count("F") == trying.full_steps(interval, warmup, steps)


@pytest.mark.parametrize("wanted", [1, 12, 19.4, 36, 49, 70])
def test_the_schedule_is_as_close_as_can_be(wanted):
    found = trying.schedule(wanted, 50)
    full = trying.full_steps(**found, steps=50)
    assert abs(full - wanted) <= (0.5 if 5 <= wanted <= 49 else 50), "from a tenth to all but one"
    assert full < 50, "something is cached"
    same = [w for n in range(2, 25) for w in range(1, 50) if trying.full_steps(n, w, 50) == full]
    assert abs(found["warmup"] - 10) == min(abs(w - 10) for w in same)


def test_a_trial_measures_what_sampling_gives(pipe):
    made = calibrated(pipe, "smoothcache", 2)
    chosen = c4d.method("smoothcache", calibration=made, threshold=0.5)
    trial = try_out(pipe, chosen, prompts(2), seeds=7, steps=STEPS, call=CALL)
    assert trial.method == "smoothcache(threshold=0.5)"

    def results():
        return [
            pipe(**prompt, **CALL, num_inference_steps=STEPS, generator=torch.manual_seed(seed)).images
            for prompt, seed in zip(prompts(2), (7 + trying.OTHER_NOISE, 8 + trying.OTHER_NOISE), strict=True)
        ]

    plain = results()
    name, settings = parse_method(trial.counterpart)
    assert name == "fora"
    for field, method in {"errors": chosen, "counterpart_errors": c4d.method(name, **settings)}.items():
        with c4d.accelerate(pipe, method):
            found = results()
        wanted = [float((a - b).norm() / b.norm()) for a, b in zip(found, plain, strict=True)]
        assert getattr(trial, field) == pytest.approx(wanted, rel=1e-5)
    assert trial.speedup > 1.05
    assert owner_of(pipe.transformer) is None


def test_what_is_held_against_itself_does_not_win(pipe):
    settings = trying.schedule(3, STEPS)
    trial = try_out(pipe, c4d.method("fora", **settings), prompts(2), steps=STEPS, call=CALL)
    assert trial.counterpart == trial.method
    assert trial.errors == trial.counterpart_errors
    assert trial.counterpart_speedup == trial.speedup
    assert not trial.is_won


def test_where_no_parts_are_found_the_output_is_reused(pipe, monkeypatch):
    def refused(**settings):
        raise AnatomyError("no parts")

    monkeypatch.setattr(trying, "_fora", refused)
    trial = try_out(pipe, c4d.method("fora", interval=2), prompts(1), steps=STEPS, call=CALL)
    assert trial.counterpart.startswith("reuse of the output(interval=")
    assert trial.counterpart_speedup == pytest.approx(trial.speedup, rel=0.35), "one step of six"


def test_calibrating_tries_what_it_made(pipe, tmp_path):
    file = tmp_path / "made.safetensors"
    given = c4d.method("smoothcache", threshold=0.5)
    made = c4d.calibrate(pipe, given, prompts(3), steps=STEPS, call=CALL, trial=2, out=file)
    assert made.trial is not None
    assert len(made.trial.errors) == 2
    assert made.trial.method == "smoothcache(threshold=0.5)"
    assert load_calibration(file).trial == made.trial
    assert load_calibration(file).verdict().splitlines()[-1] == made.trial.verdict()
    again = dataclasses.replace(given, calibration=str(file))
    assert try_out(pipe, again, prompts(2), steps=STEPS, call=CALL) == made.trial


def test_a_trial_that_fails_loses_nothing(pipe, tmp_path, monkeypatch):
    def fails(*_):
        raise CalibrationError("FLOPs cannot be counted here: none")

    monkeypatch.setattr(trying, "tried", fails)
    file = tmp_path / "made.safetensors"
    with pytest.warns(UserWarning, match="of smoothcache is made, but its trial failed: FLOPs cannot be counted"):
        made = c4d.calibrate(pipe, "smoothcache", prompts(1), steps=STEPS, call=CALL, out=file)
    assert made.trial is None
    assert load_calibration(file).trial is None


def test_without_a_trial_nothing_is_sound(pipe):
    made = calibrated(pipe, "smoothcache")
    good = dataclasses.replace(made.entry, quality=dataclasses.replace(made.entry.quality, r2=0.95))
    poor = dataclasses.replace(made.entry, quality=dataclasses.replace(made.entry.quality, r2=0.85))
    won, lost = trial_of([0.1], [0.2]), trial_of([0.2], [0.1])

    def is_sound(entry, trial):
        return dataclasses.replace(made, entries={"transformer": entry}, trial=trial).is_sound

    assert [is_sound(good, t) for t in (won, lost, None)] == [True, False, False]
    assert not is_sound(poor, won)
    assert made.verdict().splitlines()[-1] == "It was not tried in sampling: compare before use."


def test_shards_were_tried_each_for_itself(pipe):
    shards = [calibrated(pipe, "smoothcache", 1, first=i, trial=1) for i in range(2)]
    assert all(shard.trial is not None for shard in shards)
    assert merge_calibrations(shards).trial is None


def test_a_calibration_may_be_without_a_trial_but_not_with_half_of_one(pipe, tmp_path):
    made = dataclasses.replace(calibrated(pipe, "magcache"), trial=trial_of([0.1, 0.2], [0.2, 0.3]))
    assert load_calibration(made.save(tmp_path / "whole.safetensors")).trial == made.trial
    half = dataclasses.replace(made, trial=trial_of([0.1, 0.2], [0.2]))
    with pytest.raises(FileFormatError, match=r"trial has 2 errors and 1 counterpart_errors.*one per prompt"):
        load_calibration(half.save(tmp_path / "half.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"trial": -1}, r"trial=-1\): use 0"), ({"call": {"guidance": 2.0}}, "takes no argument 'guidance'")],
)
def test_bad_arguments_are_refused_before_anything_runs(pipe, arguments, said):
    with pytest.raises(SettingError, match=said):
        c4d.calibrate(pipe, "smoothcache", prompts(1), **{"call": CALL, **arguments})


def test_what_gives_no_numbers_cannot_be_compared():
    with pytest.raises(CalibrationError, match="there are no numbers to compare"):
        outputs.numbers_of([])
    assert outputs.numbers_of([torch.ones(2), {"b": torch.zeros(1, 2)}]).tolist() == [1, 1, 0, 0]
