"""Step masks: the strips of the presets, and what runs between the marks."""

import pytest

import cache4diffusion as c4d
from cache4diffusion.data import table
from cache4diffusion.errors import SettingError
from cache4diffusion.gates import StepMask
from cache4diffusion.gates.step_mask import step_mask
from cache4diffusion.methods import SCM
from small_denoisers import accelerated, differences, flux_inputs, sample

PRESETS = ("slow", "medium", "fast", "ultra")


def strip(mask, num_steps):
    return "".join("F" if flag else "c" for flag in step_mask(mask, num_steps))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_are_the_docstrings_strips(preset):
    assert f"{preset:7} {strip(preset, 28)}\n" in (SCM.__doc__ or "")
    bins = table("scm")["presets"][preset]["28"]
    assert strip(preset, 28).count("F") == sum(bins["compute"])
    assert strip(preset, 28).count("c") == sum(bins["cache"])


@pytest.mark.parametrize(
    ("preset", "num_steps", "expected"),
    [
        ("slow", 8, "FFFFFcFF"),
        ("medium", 8, "FFFFcFcF"),
        ("fast", 8, "FFFcFccF"),
        ("ultra", 8, "FFccFccF"),
        ("slow", 9, "FFFFFcFFF"),
        ("ultra", 9, "FFFccFccF"),
        ("fast", 6, "FFFccF"),
        ("fast", 4, "FFcF"),
        ("ultra", 15, "FFcFccFcccFcccF"),
        ("fast", 56, "FFFFFFFFFFFFccFFccccccFFccccccccFFccccccccccFFccccccccFF"),
    ],
)
def test_other_lengths(preset, num_steps, expected):
    assert strip(preset, num_steps) == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_the_share_that_is_cached_does_not_depend_on_the_length(preset):
    share = strip(preset, 28).count("c") / 28
    for num_steps in (20, 40, 50, 100, 250):
        found = strip(preset, num_steps)
        assert (found[0], found[-1], len(found)) == ("F", "F", num_steps)
        assert found.count("c") / num_steps == pytest.approx(share, abs=0.06)


def released(preset, num_steps):
    """The released code's rule for lengths that have no bins of their own, line by line."""
    bins = table("scm")["presets"][preset][str(28 if num_steps > 15 else 15)]
    compute, cache = list(bins["compute"]), list(bins["cache"])
    missing = lambda: num_steps - sum(compute) - sum(cache)  # noqa: E731
    first = [list(compute), list(cache)]
    while missing() > 0:
        for i in range(len(cache)):
            compute[i] += max(int(first[0][i] * ((num_steps / 28) * 0.5)), 1)
            if missing() <= 0:
                break
            cache[i] += max(int(first[1][i] * ((num_steps / 28) * 0.5)), 1)
            if missing() <= 0:
                break
        if missing() <= 0:
            break
        compute[-1] += 1
    while missing() < 0:
        for counts in (cache, compute):
            if counts:
                counts[-1] -= 1
                if counts[-1] == 0:
                    counts.pop()
            if missing() >= 0:
                break
    shown = ""
    while compute or cache:
        shown += "F" * (compute.pop(0) if compute else 0)
        shown += "c" * (cache.pop(0) if cache else 0)
    return shown[:-1] + "F"


@pytest.mark.parametrize("preset", PRESETS)
def test_official_makes_masks_of_other_lengths_as_the_released_code(preset):
    for num_steps in (*range(10, 15), *range(16, 28), *range(29, 101)):
        flags = StepMask(preset, "bins").begin(num_steps)
        assert "".join("F" if flag else "c" for flag in flags) == released(preset, num_steps)
    for num_steps in (4, 6, 8, 9, 15, 28):
        assert step_mask(preset, num_steps, "bins") == step_mask(preset, num_steps)


@pytest.mark.parametrize("policy", ["static", "dynamic"])
def test_official_is_a_setting(model, policy):
    settings = {"mask": "fast", "policy": policy, "threshold": 9.0}
    _, trace, _ = accelerated(model, flux_inputs(1), 20, "scm", variant="official", **settings)
    assert trace.strip() == released("fast", 20) != accelerated(model, flux_inputs(1), 20, "scm", **settings)[1].strip()


def test_a_static_mask_is_reproduced_exactly_and_costs_no_sync(model):
    _, trace, stats = accelerated(model, flux_inputs(1), 8, "scm", mask="11010010")
    assert trace.strip() == "FFcFccFc"
    assert stats["syncs"] == 0
    _, again, _ = accelerated(
        model, flux_inputs(1), 8, "scm", mask=(True, True, False, True, False, False, True, False)
    )
    assert again.strip() == trace.strip()


@pytest.mark.parametrize("policy", ["static", "dynamic"])
def test_it_is_dbcache_under_a_mask(model, policy):
    """The parent with the same mask: the same decisions, bit-equal outputs."""
    flags = step_mask("fast", 28)
    settings = {"threshold": 0.3, "front": 1}
    expected, parent, _ = accelerated(
        model, flux_inputs(2), 28, "dbcache", mask=flags, mask_policy=policy, warmup=0, **settings
    )
    reached, trace, _ = accelerated(model, flux_inputs(2), 28, "scm", mask="fast", policy=policy, **settings)
    assert trace.strip() == parent.strip()
    assert "c" in trace.strip()
    assert differences(reached, expected) == [0.0] * 28


def test_a_dynamic_mask_asks_the_score_where_it_leaves_a_choice(model):
    settings = {"mask": "1010010000", "policy": "dynamic", "front": 1}
    _, free, _ = accelerated(model, flux_inputs(1), 10, "scm", threshold=9.0, **settings)
    assert free.strip() == "FcFccFcccc"
    scores = {record.step: record.scores[0] for record in free.of() if record.symbol == "c"}
    largest = max(scores, key=scores.__getitem__)
    _, trace, _ = accelerated(model, flux_inputs(1), 10, "scm", threshold=scores[largest], **settings)
    assert trace.strip()[: largest + 1] == free.strip()[:largest] + "F"


def test_off_is_bit_equal(model):
    inputs = flux_inputs(1)
    for policy in ("static", "dynamic"):
        reached, trace, _ = accelerated(model, inputs, 5, "scm", mask="off", policy=policy)
        assert trace.strip() == "FFFFF"
        assert differences(reached, sample(model, inputs, 5)) == [0.0] * 5


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ("fats", "There is no step mask 'fats'"),
        ("", "first step"),
        ("0110", "first step"),
        ((False, True), "first step"),
    ],
)
def test_a_mask_that_cannot_be_is_refused(mask, words):
    with pytest.raises(SettingError, match=words):
        c4d.method("scm", mask=mask)


def test_a_mask_of_another_length_is_refused_when_the_run_begins(model):
    with pytest.raises(SettingError, match="made for 4 steps; the run has 6"):
        accelerated(model, flux_inputs(1), 6, "scm", mask="1101")
    with pytest.raises(SettingError, match="begin at 4 steps; the run has 3"):
        StepMask("fast").begin(3)
