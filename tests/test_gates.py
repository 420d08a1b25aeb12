"""Gates and guards as pure logic: every strip a docstring or a card shows, and the contract they all keep."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache4diffusion.engine.decide import decide, new_units, prediction_error, relative_change
from cache4diffusion.engine.state import BranchState, Context
from cache4diffusion.errors import SettingError
from cache4diffusion.gates import (
    GATES,
    AccumulatedChange,
    CodeTable,
    DepthTable,
    Entrance,
    FixedInterval,
    ForceLast,
    Front,
    Gate,
    LookAhead,
    Mask,
    MaxAccumulated,
    MaxRun,
    MaxTotal,
    ModulatedInterval,
    PartInput,
    Place,
    ProbeThreshold,
    Schedule,
    Speculative,
    Step,
    Throughout,
    Timetable,
    Verification,
    Warmup,
)
from cache4diffusion.gates.quadratic import Quadratic, quadratic_steps
from cache4diffusion.method import Composition
from cache4diffusion.methods import DBCache, FBCache, Fora, TaylorSeer, TaylorSeerLite, TeaCache, ToCa
from cache4diffusion.sites import Blocks, GatedParts, Parts, Span


def full_steps(strip):
    return [step for step, symbol in enumerate(strip) if symbol == "F"]


def seen_by(gate, change):
    """The score that a gate is given for a change: some are told more than that."""
    pairs = getattr(gate.watch, "with_size", False)
    return (change, 64) if pairs and change is not None else change


class Replay:
    """Decisions of a composition on a synthetic probe, through the engine's own ``decide``.

    Args:
        composition: gate and guards; a probe's reference is kept here as the engine's watcher keeps it.
        num_steps: length of the run.
    """

    def __init__(self, composition, num_steps):
        self.composition, self.num_steps = composition, num_steps
        self.branches = {}
        self.leads = {}
        self.asked = 0

    def step(self, index, probe=None, branch="a", score=None):
        """One decision; ``probe`` is the watched value, ``score`` a score given outright."""
        if branch not in self.branches:
            state = BranchState(None)
            state.units[0] = new_units(self.composition, Place(self.num_steps), 1)
            self.branches[branch] = SimpleNamespace(state=state, reference=None, is_ready=False)
        kept = self.branches[branch]
        context = Context(SimpleNamespace(), Step(index, self.num_steps), kept.state, 1)

        def observe():
            self.asked += 1
            if probe is None:
                return [seen_by(self.composition.gate, score)]
            return [None if kept.reference is None else abs(probe - kept.reference) / abs(kept.reference)]

        is_tied = self.composition.branches == "tied"
        verdict = decide(
            self.composition, context, 0, kept.is_ready, observe, self.leads.get(index) if is_tied else None
        )
        self.leads.setdefault(index, verdict)
        if verdict.is_full:
            kept.is_ready, kept.reference = True, probe
        return "F" if verdict.is_full else "-"

    def strip(self, probes=None, scores=None):
        """Symbols of a whole run."""
        return "".join(
            self.step(i, probes(i) if probes else None, score=scores(i) if scores else None)
            for i in range(self.num_steps)
        )


def composed(gate, guards=()):
    """A composition that the gate can decide for."""
    if isinstance(gate.watch, Verification):
        site = Parts()
    elif isinstance(gate.watch, Entrance):
        site = Blocks()
    elif isinstance(gate.watch, PartInput):
        site = GatedParts()
    else:
        site = Span(front=gate.watch.blocks if isinstance(gate.watch, Front) else 0)
    return Composition(site=site, gate=gate, guards=guards)


def strip(gate, num_steps, scores=lambda i: None, guards=()):
    """Symbols of a run of a gate, F and c."""
    return Replay(composed(gate, guards), num_steps).strip(scores=scores).replace("-", "c")


# -- static schedules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        (FixedInterval(3), "FccFccFccFcc"),
        (FixedInterval(3, anchor="last"), "FcFccFccFccF"),
        (FixedInterval(5, anchor="warmup", warmup=3), "FFFccccFcccc"),
        (FixedInterval(3, warmup=2), "FFcFccFccFcc"),
        (FixedInterval(1), "FFFFFFFFFFFF"),
        (FixedInterval(1, anchor="last"), "FFFFFFFFFFFF"),
        (Schedule((0, 1, 5)), "FFcccFcccccc"),
    ],
)
def test_static_gates_give_the_strips_of_their_docstrings(gate, expected):
    assert strip(gate, 12) == expected


def test_docstring_strips_of_schedule_and_interval_are_the_real_ones():
    assert "``FFcccFc``" in (Schedule.__doc__ or "")
    assert strip(Schedule((0, 1, 5)), 7) == "FFcccFc"
    for shown in (strip(FixedInterval(3), 12), strip(FixedInterval(3, anchor="last"), 12)):
        assert f"``{shown}``" in (FixedInterval.__doc__ or "")
    assert "``FccFccFcc``" in (Fora.__doc__ or "")
    assert strip(Fora(3).compose().gate, 9) == "FccFccFcc"
    assert "``FcFccFccF``" in (Fora.__doc__ or "")
    assert strip(Fora(3, anchor="last").compose().gate, 9) == "FcFccFccF"


@pytest.mark.parametrize("method", [TaylorSeer, TaylorSeerLite])
def test_taylorseer_is_full_at_the_steps_of_the_released_code(method):
    gate = method(interval=5, warmup=3).compose().gate
    assert full_steps(strip(gate, 24)) == [0, 1, 2, 7, 12, 17, 22]
    assert full_steps(strip(method(interval=6, warmup=3).compose().gate, 50)) == [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]
    assert [strip(method(interval=n, warmup=3).compose().gate, 50).count("F") for n in (4, 5, 6)] == [14, 12, 10]


@given(st.integers(1, 5), st.integers(1, 8), st.integers(6, 60))
def test_taylorseers_number_of_full_steps_is_the_cards(warmup, interval, num_steps):
    gate = FixedInterval(interval, anchor="warmup", warmup=warmup)
    assert strip(gate, num_steps).count("F") == warmup + (num_steps - warmup) // interval


def test_foras_code_counts_back_from_the_last_step():
    assert full_steps(strip(Fora(3, anchor="last").compose().gate, 50)) == [0, *range(1, 50, 3)]


@given(st.integers(1, 8), st.integers(1, 60))
def test_foras_number_of_full_steps_is_the_cards(interval, num_steps):
    shown = strip(FixedInterval(interval, anchor="last"), num_steps)
    assert shown.count("F") == 1 + math.ceil((num_steps - 1) / interval)
    assert shown[-1] == "F"


def test_toca_is_full_at_the_steps_of_the_flux_code():
    assert full_steps(strip(ToCa(interval=4).compose().gate, 18)) == [0, 1, 2, 6, 10, 14]


def test_quadratic_lists_rise_from_0_and_have_the_length_asked_for():
    for num_steps, interval, center in [(50, 5, 15), (50, 10, 25), (25, 3, 10), (100, 10, 15)]:
        count = math.ceil(num_steps / interval)
        steps = quadratic_steps(num_steps, count, center, 1.4)
        assert len(steps) == count
        assert steps[0] == 0
        assert list(steps) == sorted(set(steps))
        assert full_steps(strip(Quadratic(interval, center), num_steps)) == list(steps)


# -- TeaCache --------------------------------------------------------------------------------------------------------


def test_a_constant_signal_gives_teacaches_strip():
    composition = TeaCache(threshold=0.5, coefficients=(0.2,)).compose()
    assert Replay(composition, 20).strip(scores=lambda i: 0.3) == "F--F--F--F--F--F--FF"


@given(st.floats(0.05, 2), st.floats(0.01, 0.5))
def test_the_run_of_cached_steps_is_as_long_as_the_docstring_says(threshold, change):
    ratio = threshold / change
    if abs(ratio - round(ratio)) < 1e-6:
        return  # the sum's rounding decides
    shown = strip(AccumulatedChange(threshold), 200, lambda i: change)
    if ratio < 90:
        assert shown[1:].split("F")[0] == "c" * (math.ceil(ratio) - 1)


def test_the_sum_is_emptied_exactly_on_full_steps_also_on_forced_ones():
    gate, state = AccumulatedChange(1.0), AccumulatedChange(1.0).begin(None)
    for index, (cached, score, total) in enumerate(
        [(False, None, 0), (True, 0.4, 0.4), (True, 0.4, 0.8), (False, 0.9, 0), (True, 0.3, 0.3), (False, None, 0)]
    ):
        gate.commit(state, Step(index, None), cached, score)
        assert state.total == pytest.approx(total)


def test_first_and_last_step_are_full_whatever_the_signal_says():
    assert Replay(TeaCache(threshold=100).compose(), 6).strip(scores=lambda i: 0.0) == "F----F"
    assert Replay(TeaCache(threshold=100, cooldown=0).compose(), 6).strip(scores=lambda i: 0.0) == "F-----"


@pytest.mark.parametrize("rescale", ["clamp0", "abs"])
def test_a_threshold_of_0_never_skips(rescale):
    gate = AccumulatedChange(0.0, (1.0, -0.5), rescale=rescale)
    assert strip(gate, 8, lambda i: 0.1) == "FFFFFFFF"


def test_at_threshold_0_a_negative_polynomial_still_skips_in_the_official_variant():
    """The card: with the raw polynomial "never skips at 0" can fail. Mochi's is negative at 0.2, CogVideoX's at 0."""
    negative = {"threshold": 0.0, "coefficients": "mochi"}
    shown = Replay(TeaCache(**negative, variant="official").compose(), 6).strip(scores=lambda i: 0.2)
    assert shown == "F----F"
    assert Replay(TeaCache(**negative).compose(), 6).strip(scores=lambda i: 0.2) == "FFFFFF"
    assert strip(AccumulatedChange(0.0), 6, lambda i: 0.1) == "FFFFFF", "the identity is never negative"


def test_a_cached_step_that_was_not_compared_keeps_the_sum():
    """A static mask, or a branch that another one leads, caches without asking for the score."""
    mask = Mask((True, False, False, False, False), policy="static")
    gate = AccumulatedChange(1.0)
    asked = Mask((True,))
    assert strip(gate, 5, lambda i: 0.4, (asked,)) == "FccFc"
    state = gate.begin(None)
    for index, (score, total) in enumerate([(0.4, 0.4), (None, 0.4), (0.3, 0.7)]):
        gate.commit(state, Step(index, None), True, score)
        assert state.total == pytest.approx(total)
    assert strip(gate, 5, lambda i: 9.0, (mask,)) == "Fcccc"


def test_teacaches_forced_steps_follow_the_mode():
    """Default: the first and the last. HiDream: the first tenth. Wan with use_ret_steps: the first five."""
    modes = {(1, 1): "F" + "-" * 28 + "F", (3, 0): "FFF" + "-" * 27, (5, 0): "FFFFF" + "-" * 25}
    for (warmup, cooldown), expected in modes.items():
        composition = TeaCache(threshold=100, warmup=warmup, cooldown=cooldown).compose()
        assert Replay(composition, 30).strip(scores=lambda i: 0.0) == expected


def test_a_negative_polynomial_lowers_the_sum_only_where_asked_to():
    coefficients = (1.0, -0.5)  # P(0.1) = -0.4, P(0.9) = 0.4
    changes = [0.9, 0.1, 0.9, 0.9, 0.9, 0.9]
    scores = changes.__getitem__
    assert strip(AccumulatedChange(0.9, coefficients, "none"), 6, scores) == "FccccF"  # -0.4 0 .4 .8 1.2
    assert strip(AccumulatedChange(0.9, coefficients, "clamp0"), 6, scores) == "FcccFc"  # 0 .4 .8 1.2
    assert strip(AccumulatedChange(0.9, coefficients, "abs"), 6, scores) == "FccFcc"  # .4 .8 1.2


@given(st.floats(0, 1), st.lists(st.floats(-5, 5), min_size=1, max_size=5))
def test_the_polynomial_has_its_highest_power_first(change, coefficients):
    expected = sum(c * change ** (len(coefficients) - 1 - i) for i, c in enumerate(coefficients))
    assert AccumulatedChange(1.0, tuple(coefficients)).polynomial(change) == pytest.approx(expected, abs=1e-9)


def test_coefficients_by_name_are_the_published_ones():
    cards = {
        "flux": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
        "hunyuan-video": (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896),
        "mochi": (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719),
    }
    for name, expected in cards.items():
        assert TeaCache(coefficients=name).compose().gate.coefficients == expected
    assert AccumulatedChange(1, cards["mochi"]).polynomial(0.2) == pytest.approx(-1.08, abs=0.01)  # by the card
    for change in (0.0, 0.05, 0.1, 0.15, 0.2):
        assert 0.17 < AccumulatedChange(1, cards["flux"]).polynomial(change) < 0.27, "nearly constant, by the card"
    assert TeaCache().compose().gate.coefficients == (1.0, 0.0)
    with pytest.raises(ValueError, match="did you mean 'flux'"):
        TeaCache(coefficients="fluks")


# -- FBCache and DBCache ---------------------------------------------------------------------------------------------


def dbcache(num_steps, probes=lambda i: 1.0, **settings):
    composition = DBCache(front=1, **{"threshold": 0.5, "warmup": 2, **settings}).compose()
    return Replay(composition, num_steps).strip(probes)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "FF------------"),
        ({"max_run": 0}, "FFFFFFFFFFFFFF"),
        ({"max_run": 1}, "FF-F-F-F-F-F-F"),
        ({"max_run": 2}, "FF--F--F--F--F"),
        ({"max_run": 3}, "FF---F---F---F"),
        ({"max_cached": 3}, "FF---FFFFFFFFF"),
    ],
)
def test_dbcache_counts_as_release_1_5_3(settings, expected):
    assert dbcache(14, **settings) == expected


def test_an_accumulated_difference_once_reached_stops_caching_for_good():
    assert dbcache(14, lambda i: 1 + 0.01 * i, max_accumulated=0.1) == "FF-----FFFFFFF"


def test_a_static_mask_is_reproduced_exactly():
    mask = tuple(bool(flag) for flag in (1, 1, 0, 1, 0, 0, 1, 0))
    assert dbcache(8, mask=mask, mask_policy="static") == "FF-F--F-"
    changing = dbcache(8, lambda i: 2.0**i, mask=mask, mask_policy="static")
    assert changing == "FF-F--F-", "no score is asked"


def test_a_mask_shortens_the_warm_up_to_its_own_leading_ones():
    mask = tuple(bool(flag) for flag in (1, 1, 0, 1, 0, 0, 1, 0))
    assert dbcache(8, mask=mask, mask_policy="static", warmup=8) == "FF-F--F-"


def test_a_dynamic_mask_only_adds_full_steps():
    mask = tuple(bool(flag) for flag in (1, 1, 0, 1, 0, 0, 1, 0))
    assert dbcache(8, mask=mask, mask_policy="dynamic") == "FF-F--F-"
    assert dbcache(8, lambda i: 2.0**i, mask=mask, mask_policy="dynamic") == "FFFFFFFF"


def test_warm_up_with_an_interval_forces_only_every_nth_step():
    assert dbcache(8, warmup=6, warmup_interval=2) == "F-F-F---"


@pytest.mark.parametrize(
    ("branches", "expected"),
    [("independent", "FF -F FF -F FF -- -F F-"), ("tied", "FF -- FF -- FF -- -- FF")],
)
def test_separate_branches_decide_as_release_1_5_3(branches, expected):
    composition = DBCache(threshold=0.15, front=1, warmup=1, branches=branches).compose()
    replay = Replay(composition, 8)
    pairs = [replay.step(i, 1 + 0.1 * i, "a") + replay.step(i, 1 + 0.3 * i, "b") for i in range(8)]
    assert " ".join(pairs) == expected


def test_a_tied_follower_is_never_asked_and_costs_no_sync():
    composition = DBCache(threshold=0.15, front=1, warmup=1, branches="tied").compose()
    replay = Replay(composition, 6)
    for i in range(6):
        replay.step(i, 1.0, "a")
        before = replay.asked
        replay.step(i, 1.0 * 9**i, "b")
        assert replay.asked == before


def test_a_slow_drift_is_compared_with_the_last_full_step():
    composition = DBCache(threshold=0.08, front=1, warmup=0).compose()
    assert Replay(composition, 7).strip(lambda i: 1 + 0.03 * i)[:4] == "F--F"  # .03 .06 .09: the third


def test_equality_with_the_threshold_is_full():
    assert strip(ProbeThreshold(0.25), 2, lambda i: 0.25) == "FF"
    assert strip(ProbeThreshold(0.25), 2, lambda i: 0.2499) == "Fc"


def test_a_threshold_of_1_or_more_caches_whatever_the_score_in_dbcache_only():
    """ParaAttention's FBCache has no such rule."""
    assert dbcache(8, lambda i: 7.0**i, threshold=1.0) == "FF------"
    first_block = Replay(FBCache(threshold=1.0, warmup=2).compose(), 8)
    assert first_block.strip(lambda i: 7.0**i) == "FFFFFFFF"
    assert Replay(FBCache(threshold=math.inf, warmup=2).compose(), 8).strip(lambda i: 7.0**i) == "FF------"


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_the_first_steps_of_a_warm_up_are_full(warmup):
    for method in (DBCache(front=1, warmup=warmup), FBCache(warmup=warmup)):
        shown = Replay(method.compose(), 9).strip(lambda i: 1.0)
        assert shown == "F" * max(warmup, 1) + "-" * (9 - max(warmup, 1))


def test_a_threshold_of_0_never_caches():
    assert dbcache(8, threshold=0.0) == "FFFFFFFF"


def test_guards_are_tried_in_cache_dits_order():
    kinds = [
        type(guard) for guard in DBCache(mask=(True,), max_cached=1, max_run=1, max_accumulated=1).compose().guards
    ]
    assert kinds == [Warmup, Mask, MaxTotal, MaxRun, MaxAccumulated]
    # warm-up beats a static mask's "cached"; a static mask beats the limits behind it
    assert dbcache(6, mask=(True, False, False, False, False, False), mask_policy="static", max_run=1) == "F-----"
    # the total is spent before the run is: 2 cached in all, runs of 1
    assert dbcache(10, max_run=1, max_cached=2) == "FF-F-FFFFF"
    # a run limit full step does not count as a score
    assert dbcache(8, lambda i: 1 + 0.01 * i, max_run=1, max_accumulated=1.0) == "FF-F-F-F"


def test_the_first_guard_with_an_opinion_names_the_reason():
    composition = DBCache(front=1, warmup=2, threshold=0.5, max_run=1).compose()
    replay = Replay(composition, 6)
    replay.strip(lambda i: 1.0)
    state = replay.branches["a"].state
    context = Context(SimpleNamespace(), Step(1, 6), state, 1)
    assert decide(composition, context, 0, True, lambda: [0.0]).reason == "Warmup"


def test_scores_of_forced_steps_are_not_accumulated():
    guard = MaxAccumulated(1.0)
    state = guard.begin()
    for score in (None, 0.5, -1.0, 0.25):
        guard.commit(state, Step(0, 9), False, score)
    assert state.value == 0.75


# -- SpeCa -----------------------------------------------------------------------------------------------------------


def speca(num_steps, error=lambda i: 0.0, **settings):
    """The card's pseudo-code beside the gate: the error of a checked step acts on the next one."""
    gate = Speculative(**{"threshold": 0.5, "decay": 1.0, "min_run": 2, "max_run": 8, "warmup": 3, **settings})
    composition = Composition(site=Parts(), gate=gate)
    replay, shown = Replay(composition, num_steps), ""
    for i in range(num_steps):
        shown += replay.step(i).replace("-", "T")
        unit = replay.branches["a"].state.units[0][0]
        if shown[-1] == "T" and gate.is_checked(unit.gate):
            unit.feedback = error(i)
    return shown


def card(num_steps, error, threshold=0.5, decay=1.0, min_run=2, max_run=8, warmup=3, floor=0.1):
    """The released rule, literally."""
    last, n, err, shown = None, 0, None, ""
    for s in range(num_steps):
        if last == "F":
            kind, n, check, err = "T", 1, False, None
        else:
            tau = max(threshold * decay ** (s / num_steps), floor)
            check = n >= min_run
            bad = err is not None and err > tau
            if last is None or s < warmup or n >= max_run or (bad and check):
                kind, n = "F", 0
            else:
                kind, n = "T", n + 1
        last = kind
        shown += kind
        if kind == "T" and check:
            err = error(s)
    return shown


@pytest.mark.parametrize("max_run", [1, 2, 3, 8])
def test_without_failures_a_cycle_is_max_run_cached_steps_and_a_full_one(max_run):
    shown = speca(40, max_run=max_run, warmup=0)
    assert shown == (("F" + "T" * max_run) * 40)[:40]
    assert shown == card(40, lambda i: 0.0, max_run=max_run, warmup=0)


def test_always_failing_gives_the_shortest_cycle_of_three_cached_steps():
    assert speca(17, lambda i: math.inf, warmup=0) == ("FTTT" * 5)[:17]


def test_a_warm_up_of_3_begins_F_T_F():
    assert speca(12, lambda i: math.inf)[:7] == "FTFTTTF"
    assert "``FcF``" in (Speculative.__doc__ or "")
    assert "``Fccc``" in (Speculative.__doc__ or "")


def test_a_threshold_of_0_is_off_and_the_official_variant_still_caches():
    assert speca(8, threshold=0.0) == "F" * 8
    assert speca(9, lambda i: 1.0, threshold=0.0, is_off_at_zero=False, warmup=0, floor=0.0) == "FTTTFTTTF"


@given(
    st.lists(st.floats(0, 2), min_size=30, max_size=30),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(0, 6),
    st.sampled_from([1.0, 0.3, 0.01]),
)
def test_decisions_are_reproducible_from_the_list_of_errors(errors, min_run, max_run, warmup, decay):
    settings = {"min_run": min_run, "max_run": max_run, "warmup": warmup, "decay": decay}
    assert speca(30, errors.__getitem__, **settings) == card(30, errors.__getitem__, **settings)


def test_the_tolerance_decays_over_the_run_down_to_its_floor():
    gate = Speculative(threshold=7.0, decay=0.3, floor=3.0)
    taus = [gate.tolerance(Step(i, 50)) for i in range(50)]
    assert taus[0] == 7.0
    assert taus[25] == pytest.approx(7 * 0.3**0.5)
    assert taus[-1] == 3.0


@pytest.mark.parametrize("metric", ["relative_l1", "l1", "l2", "relative_l2", "cosine"])
def test_errors_are_measured_as_the_card_says(metric):
    predicted, true = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    a, b = predicted.flatten(1), true.flatten(1)
    relative = (a - b).abs() / (b.abs() + 1e-10)
    expected = {
        "relative_l1": relative.mean(1),
        "l1": (a - b).abs().mean(1),
        "l2": (a - b).pow(2).mean(1).sqrt(),
        "relative_l2": relative.pow(2).mean(1).sqrt(),
        "cosine": 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)),
    }[metric]
    verification = Verification(metric=metric)
    torch.testing.assert_close(prediction_error(predicted, true, verification), expected)
    whole = prediction_error(predicted, true, verification, per_row=False)
    assert whole.shape == (1,), "one figure for the batch"
    if metric in ("l2", "relative_l2"):
        torch.testing.assert_close(whole[0], expected.pow(2).mean().sqrt())
    elif metric != "cosine":
        torch.testing.assert_close(whole[0], expected.mean())


# -- scores ----------------------------------------------------------------------------------------------------------


def test_relative_change_is_a_ratio_of_sums_in_float32():
    now, before = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    rows = relative_change(now, before, per_row=True)
    torch.testing.assert_close(rows, (now - before).abs().sum((1, 2)) / before.abs().sum((1, 2)))
    whole = relative_change(now, before, per_row=False)
    torch.testing.assert_close(whole, ((now - before).abs().mean() / before.abs().mean()).reshape(1))
    narrow = relative_change(now.half(), before.half(), per_row=True)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, relative_change(now.half().float(), before.half().float(), per_row=True))


def test_nothing_compared_with_nothing_is_no_change_and_something_is_infinite():
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert relative_change(zero, zero, per_row=True).tolist() == [0.0]
    assert relative_change(one, zero, per_row=True).tolist() == [math.inf]


# -- the contract ----------------------------------------------------------------------------------------------------

CHOSEN = {
    "interval": FixedInterval(3, warmup=2),
    "schedule": Schedule((0, 3, 7)),
    "code-table": CodeTable((0, 2, 1, 2, 0)),
    "depths": DepthTable((2, 1, 0, 2, 1)),
    "quadratic": Quadratic(4, 5.0),
    "accumulated": AccumulatedChange(0.5, (1.0, 0.1)),
    "probe": ProbeThreshold(0.3),
    "speculative": Speculative(),
    "throughout": Throughout(start=1),  # from the first step on it is for reductions, which need no full one
}


ALL_GATES = {name: CHOSEN[name] if name in CHOSEN else gate() for name, gate in GATES.items()}
# A gate that looks ahead goes with a predictor and a site of its own; tests/methods/test_z_cache.py has its runs.
ALONE = {name: gate for name, gate in ALL_GATES.items() if not isinstance(gate, LookAhead)}


@pytest.mark.parametrize("gate", ALL_GATES.values(), ids=ALL_GATES)
@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=20, max_size=20))
def test_propose_is_pure_and_the_first_step_is_full(gate, scores):
    state = gate.begin(20)
    scores = [seen_by(gate, score) for score in scores]
    assert isinstance(gate, Gate)
    assert not gate.propose(copy.deepcopy(state), Step(0, 20), None)
    for index, score in enumerate(scores):
        step, before = Step(index, 20), copy.deepcopy(state)
        first = gate.propose(state, step, score)
        assert gate.propose(state, step, score) == first
        assert state == before, "propose changes nothing"
        gate.commit(state, step, index > 0 and first, score)


@pytest.mark.parametrize("gate", ALONE.values(), ids=ALONE)
def test_an_overruled_gate_goes_on_as_if_it_had_said_so_itself(gate):
    overruled = strip(gate, 20, lambda i: 0.1, (Mask(tuple([True] * 10)),))
    assert overruled[:10] == "F" * 10
    all_ones = strip(gate, 20, lambda i: 0.1, (Mask(tuple([True] * 20)),))
    assert all_ones == "F" * 20


@pytest.mark.parametrize("gate", ALONE.values(), ids=ALONE)
def test_two_interleaved_runs_are_the_two_runs(gate):
    composition = composed(gate)
    one, two = [Replay(composition, 16) for _ in range(2)], [Replay(composition, 16) for _ in range(2)]
    scores = lambda i: 0.05 * (i % 7)  # noqa: E731
    for i in range(16):
        one[0].step(i, score=scores(i))
        one[1].step(i, score=0.2)
    alone = two[0].strip(scores=scores), two[1].strip(scores=lambda i: 0.2)
    again = [Replay(composition, 16).strip(scores=s) for s in (scores, lambda i: 0.2)]
    assert list(alone) == again
    assert one[0].branches["a"].state.units == two[0].branches["a"].state.units
    assert one[1].branches["a"].state.units == two[1].branches["a"].state.units


@pytest.mark.parametrize(
    "guard", [Warmup(3), ForceLast(2), Mask((True, False)), MaxTotal(2), MaxRun(2), MaxAccumulated(0.3)]
)
def test_guards_are_pure_until_they_are_told(guard):
    state = guard.begin()
    for index in range(10):
        before = copy.deepcopy(state)
        assert guard.overrule(state, Step(index, 10)) == guard.overrule(state, Step(index, 10))
        assert state == before
        guard.commit(state, Step(index, 10), index % 2 == 1, 0.05)


def test_a_guards_counters_see_the_final_verdict_of_others():
    # The mask forces step 4; the run limit must start to count anew there.
    mask = tuple(index in (0, 1, 4) for index in range(10))
    assert dbcache(10, mask=mask, max_run=3) == "FF--F---F-"


def test_any_computes_when_a_single_row_would():
    composition = dataclasses.replace(DBCache(threshold=0.5, front=1, warmup=0).compose(), decide="any")
    state = BranchState(None)
    state.units[0] = new_units(composition, Place(5), 3)
    context = Context(SimpleNamespace(), Step(0, 5), state, 3)
    decide(composition, context, 0, False)
    for index, (scores, cached) in enumerate([([0.1, 0.2, 0.3], True), ([0.1, 0.9, 0.1], False)], start=1):
        context = Context(SimpleNamespace(), Step(index, 5), state, 3)
        verdict = decide(composition, context, 0, True, lambda scores=scores: scores)
        assert verdict.cached == (cached,) * 3


def test_force_last_makes_the_cooldown_full():
    assert strip(FixedInterval(20), 8, guards=(ForceLast(3),)) == "FccccFFF"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FixedInterval(0), r"interval must be 1"),
        (lambda: FixedInterval(3, warmup=-1), r"warmup must be 0"),
        (lambda: FixedInterval(3, anchor="middle"), r"'first', 'last' or 'warmup'"),
        (lambda: Schedule(()), r"begin with 0"),
        (lambda: Schedule((0, 4, 3)), r"must rise"),
        (lambda: Schedule((0, 9), num_steps=8), r"beyond 8 steps"),
        (lambda: Schedule((0, 4), num_steps=8).begin(9), r"made for 8 steps; the run has 9"),
        (lambda: AccumulatedChange(-1), r"0 \(off\) or more"),
        (lambda: AccumulatedChange(math.nan), r"0 \(off\) or more"),
        (lambda: AccumulatedChange(1, ()), r"at least one coefficient"),
        (lambda: AccumulatedChange(1, rescale="square"), r"'none', 'abs' or 'clamp0'"),
        (lambda: ProbeThreshold(-0.1), r"0 \(off\) or more"),
        (lambda: ProbeThreshold(0.1, blocks=0), r"at least one block"),
        (lambda: Speculative(threshold=-1), r"0 \(off\) or more"),
        (lambda: Speculative(decay=0), r"above 0 and at most 1"),
        (lambda: Speculative(max_run=0), r"1 or more cached steps"),
        (lambda: Quadratic(1), r"interval must be 2"),
        (lambda: ModulatedInterval(0), r"interval must be 1"),
        (lambda: ModulatedInterval(3, "flux"), r"'dit' or 'pixart'"),
        (lambda: Mask((False, True)), r"first step cannot be cached"),
        (lambda: Warmup(-1), r"steps >= 0"),
        (lambda: ForceLast(-1), r"0 or more"),
        (lambda: MaxTotal(-1), r"0 or more"),
        (lambda: MaxRun(-1), r"0 or more"),
        (lambda: MaxAccumulated(0), r"above 0"),
    ],
)
def test_bad_settings_are_refused_in_words(make, words):
    with pytest.raises(SettingError, match=words):
        make()


# -- timetables --------------------------------------------------------------------------------------------------------


def timetable(gate, num_steps, decision="", levels=None):
    state = gate.begin_at(Place(num_steps, levels, "", decision))
    return "".join("c" if gate.propose(state, Step(i, num_steps), None) else "F" for i in range(num_steps))


def test_a_timetable_has_a_list_for_every_decision():
    gate = Timetable({"attn": (0, 1, 5), "ffn": (0,)}, 7)
    assert timetable(gate, 7, "attn") == "FFcccFc"
    assert timetable(gate, 7, "ffn") == "Fcccccc"
    assert timetable(gate, 7, "other") == "FFFFFFF", "what is not named is full"


def test_a_timetable_for_no_length_in_particular_is_a_schedule():
    assert timetable(Timetable({"": (0, 1, 5)}), 7) == "FFcccFc"
    assert not Timetable({"": (0,)}).needs_num_steps


def test_a_timetable_serves_other_runs_by_the_nearest_level():
    gate = Timetable({"": (0, 2, 3)}, 4, (1000.0, 500.0, 400.0, 10.0), resample=True)
    assert timetable(gate, 6, "", (1000.0, 800.0, 600.0, 410.0, 200.0, 0.0)) == "FccFcF"
    assert timetable(gate, 7) == "FcccFcF", "by progress where the run's levels are not known"


def test_a_timetables_lists_rise_from_0_and_fit_their_run():
    for steps in ((), (1, 2), (0, 2, 2), (0, 7)):
        with pytest.raises(SettingError):
            Timetable({"": steps}, 7)
