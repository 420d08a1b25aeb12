"""Spectrum: its regression as the released code does it, its schedule, and what it reproduces."""

import pytest
import torch
from forecasts import Hidden, assert_same, slow_regression, slow_walk, walk, wavy

from cache4diffusion.gates import Step, WideningInterval
from cache4diffusion.methods import Spectrum
from cache4diffusion.predictors import Chebyshev, Newton
from small_denoisers import accelerated, differences, flux, flux_inputs, sample

STRIP = "FFFFFcFcFccFcccFcccc"


def strip_of(gate, steps):
    state, found = gate.begin(steps), ""
    for i in range(steps):
        cached = gate.propose(state, Step(i, steps), None)
        gate.commit(state, Step(i, steps), cached, None)
        found += "c" if cached else "F"
    return found


def slow_spectrum(feature, strip, degree, ridge, blend):
    def cached(fulls, used, s):
        regression = slow_regression(fulls, [feature(f) for f in fulls], s, len(strip), degree, ridge)
        now, before = fulls[-1], fulls[-2] if len(fulls) > 1 else fulls[-1]
        change = (feature(now) - feature(before)) / max(now - before, 1)
        return blend * regression + (1 - blend) * (feature(now) + (s - now) * change)

    return slow_walk(feature, strip, cached)


@pytest.mark.parametrize(("degree", "ridge", "blend"), [(4, 0.1, 1.0), (3, 0.01, 0.5), (0, 0.1, 1.0)])
def test_every_step_equals_the_released_regression(degree, ridge, blend):
    found = walk(Chebyshev(degree, ridge, blend), wavy, STRIP)
    assert_same(found, slow_spectrum(wavy, STRIP, degree, ridge, blend), 1e-8)


def test_polynomials_of_the_degree_are_exact_as_the_ridge_goes_to_0():
    def feature(i):
        return torch.tensor([[1 - i + 0.01 * i**3]], dtype=torch.float64)

    found = walk(Chebyshev(3, 1e-12), feature, STRIP)
    assert_same(found, [feature(i) for i in range(len(STRIP))], 1e-5)


def test_the_ridge_shrinks_even_a_constant():
    found = walk(Chebyshev(4, 0.1), lambda i: torch.ones(1, 1, dtype=torch.float64), STRIP)
    assert 0.8 < float(found[5]) < 1 - 1e-4


def test_without_regression_it_is_a_line_through_the_last_two():
    assert_same(walk(Chebyshev(blend=0.0), wavy, STRIP), walk(Newton(1), wavy, STRIP))


def test_the_window_forgets_the_oldest():
    short = walk(Chebyshev(2, window=4), wavy, STRIP)
    assert not torch.allclose(short[-1], walk(Chebyshev(2), wavy, STRIP)[-1])


def test_a_long_history_grows_and_keeps_every_full_step():
    found = walk(Chebyshev(2, 0.1), wavy, "F" * 21 + "c")
    assert_same(found, slow_spectrum(wavy, "F" * 21 + "c", 2, 0.1, 1.0), 1e-8)


def test_the_strip_is_the_docstrings_and_the_published_counts():
    strip = strip_of(WideningInterval(warmup=3, window=2.0, growth=1.0), 15)
    assert f"``{strip}``" in WideningInterval.__doc__
    fulls = [i for i, symbol in enumerate(strip_of(WideningInterval(), 50)) if symbol == "F"]
    assert fulls == [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46]
    assert ", ".join(str(i) for i in fulls[5:]) in Spectrum.__doc__
    assert strip_of(WideningInterval(growth=3.0), 50).count("F") == 10
    assert set(strip_of(WideningInterval(window=1.0, growth=0.0), 50)) == {"F"}


def test_the_method_follows_the_regression_of_the_last_hidden_feature():
    model, inputs = flux(1, 1), flux_inputs(1)
    found, trace, _ = accelerated(model, inputs, 11, "spectrum", degree=2)
    strip = trace.strip()
    assert strip == "FFFFFcFcFcc"

    def forecast(seen, step):
        return slow_regression(list(seen), list(seen.values()), step, 11, degree=2, ridge=0.1)

    assert max(differences(found, sample(Hidden(model, strip, forecast), inputs, 11))) <= 1e-4
    off, _, _ = accelerated(model, inputs, 4, "spectrum", window=1.0, growth=0.0, warmup=2)
    assert differences(off, sample(model, inputs, 4)) == [0.0] * 4
