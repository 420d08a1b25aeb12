"""MagCache against its released rule, and the law behind its table."""

import math

import pytest
import torch
from slow_gates import SlowMagCache
from slow_references import DiTBlocks, FluxBlocks

import cache4diffusion as c4d
from cache4diffusion.data import magcache_ratios
from cache4diffusion.errors import SettingError, UnknownNameError
from cache4diffusion.gates import MagnitudeError, Step
from cache4diffusion.gates.magnitude import resampled
from small_denoisers import accelerated, differences, dit, dit_inputs, flux_inputs, sample

FLUX = magcache_ratios("flux")


def strip(gate, num_steps):
    state, shown = gate.begin(num_steps), ""
    for i in range(num_steps):
        cached = gate.propose(state, Step(i, num_steps), None)
        gate.commit(state, Step(i, num_steps), cached, None)
        shown += "c" if cached else "F"
    return shown


@pytest.mark.parametrize("num_steps", [28, 20, 41])
@pytest.mark.parametrize("case", ["flux", "dit"])
def test_official_is_the_released_rule(model, case, num_steps):
    denoiser = model if case == "flux" else dit()
    inputs = flux_inputs(2) if case == "flux" else dit_inputs(2)
    net = FluxBlocks(denoiser) if case == "flux" else DiTBlocks(denoiser)
    reference = SlowMagCache(net, FLUX, 0.24, 5, 0.1, num_steps)
    expected = sample(reference, inputs, num_steps)
    reached, trace, stats = accelerated(denoiser, inputs, num_steps, "magcache", variant="official")
    assert trace.strip() == reference.strip
    assert "c" in reference.strip
    assert max(differences(reached, expected)) <= 1e-5
    assert stats["syncs"] == 0, "nothing is watched"


def test_ratios_of_1_cache_the_longest_run_again_and_again():
    gate = MagnitudeError((1.0,) * 5, threshold=0.1, max_run=3, retention=0.2)
    assert strip(gate, 15) == "FFFcccFcccFcccF"
    assert "``cccFcccF...``" in (MagnitudeError.__doc__ or "")


def test_a_threshold_of_0_never_caches_even_where_no_error_is_expected():
    assert strip(MagnitudeError((1.0,) * 5, threshold=0.0), 10) == "F" * 10
    assert strip(MagnitudeError((1.0,) * 5, threshold=0.1, max_run=0), 10) == "F" * 10


def test_a_full_step_resets_without_its_own_ratio():
    """Every ratio 0.9: errors of a run are 0.1, 0.1 + 0.19, ...; the third exceeds 0.3."""
    gate = MagnitudeError((0.9,) * 10, threshold=0.3, max_run=9, retention=0.0)
    assert strip(gate, 10) == "FccFccFccF"


def test_the_threshold_itself_is_cached_only_by_the_released_code():
    ratios = (1.0, 0.75, 0.75)
    assert strip(MagnitudeError(ratios, 0.25, 1, 0.0), 3) == "FFF"
    assert strip(MagnitudeError(ratios, 0.25, 1, 0.0, is_inclusive=True), 3) == "FcF"


def test_a_table_of_another_length_keeps_the_law():
    assert resampled(FLUX, 28, "law") == resampled(FLUX, 28, "nearest") == FLUX
    halves = resampled((1.0, 0.64, 0.64), 5, "law")
    assert halves == pytest.approx((1.0, 0.8, 0.8, 0.8, 0.8))
    for num_steps in (7, 50, 100):
        ratios = resampled(FLUX, num_steps, "law")
        assert math.prod(ratios[1:]) == pytest.approx(math.prod(FLUX[1:]))
        assert len(ratios) == num_steps
    assert resampled((1.0, 0.64, 0.64), 5, "nearest") == (1.0, 1.0, 0.64, 0.64, 0.64), "half to even, as numpy"


def test_more_steps_are_cached_as_the_threshold_grows():
    counts = [strip(MagnitudeError(FLUX, t, 5, 0.1), 50).count("c") for t in (0, 0.01, 0.03, 0.06, 0.12, 0.24, 1.0)]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] > 30


def test_ratios_can_be_given_and_must_make_sense(model):
    _, trace, _ = accelerated(model, flux_inputs(1), 8, "magcache", ratios=(1.0, 1.0, 1.0), max_run=2)
    assert trace.strip() == "FccFccFc"
    with pytest.raises(UnknownNameError, match="no ratios 'flx'; did you mean 'flux'"):
        c4d.method("magcache", ratios="flx")
    for wrong in ((1.0,), (1.0, -0.5), (1.0, math.nan)):
        with pytest.raises(SettingError, match="two or more numbers above 0"):
            c4d.method("magcache", ratios=wrong)


def test_the_cached_residual_is_not_rescaled(model):
    """Same input, same timestep: whatever the ratios say, the stack's residual is what it was."""
    inputs = flux_inputs(1)
    settings = {"ratios": (1.0, 0.9), "threshold": 9.0}
    with c4d.accelerate(model, "magcache", **settings) as handle, handle.run(num_steps=5), torch.no_grad():
        out = [model(**inputs, timestep=torch.tensor([0.5]))[0] for _ in range(5)]
    assert handle.trace.strip() == "Fcccc"
    assert max(differences(out, [out[0]] * 5)) <= 1e-6
