"""What is fitted is what was there: polynomials, magnitude laws, scales of changes; and the verdict says how well."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import cache4diffusion as c4d
import toys
from cache4diffusion.calibration import Calibration, Seen, StepMeans
from cache4diffusion.calibration.changes import ChangeScales
from cache4diffusion.calibration.magnitudes import MagnitudeRatios
from cache4diffusion.calibration.polynomial import SignalPolynomial, polyfit, polyval
from cache4diffusion.calibration.quality import judged, mean_of, r2_of_means
from cache4diffusion.errors import CalibrationError
from cache4diffusion.gates import AccumulatedChange, Place, Step
from cache4diffusion.predictors.tao import fit_changes
from cache4diffusion.sites import Denoiser


def pairs(x, y):
    return {"pairs": torch.tensor(np.stack([x, y], 1))}


def run_of(statistic, features, name="site", score=None, branch="cond", outputs=()):
    """One run of made-up features."""
    sums, memory = statistic.init(), {}
    for step, leaves in enumerate(features):
        given = None if score is None or step == 0 else score[step]
        seen = Seen(step, len(features), branch, given, {name: leaves}, {name: ""}, outputs[step] if outputs else ())
        statistic.observe(sums, memory, seen)
    return sums


# -- teacache ----------------------------------------------------------------------------------------------------------


def test_the_polynomial_is_numpys():
    rng = np.random.default_rng(0)
    x = rng.uniform(0.01, 0.3, 200)
    y = 30 * x**4 - 5 * x**3 + 2 * x**2 + 0.5 * x + 0.02 + rng.normal(0, 0.01, 200)
    found = polyfit(torch.tensor(x), torch.tensor(y), 4)
    assert found.numpy() == pytest.approx(np.polyfit(x, y, 4), rel=1e-6)
    assert polyval(found, torch.tensor(x)).numpy() == pytest.approx(np.polyval(np.polyfit(x, y, 4), x))


def test_a_polynomial_through_few_points_has_a_lower_degree():
    y = torch.tensor([1.0, 3.0]).double()
    assert polyfit(torch.tensor([0.1, 0.1]).double(), y, 4).tolist() == pytest.approx([0, 0, 0, 0, 2])
    assert polyfit(torch.tensor([0.0, 1.0]).double(), y, 2).tolist() == pytest.approx([0, 2, 1])


def test_a_known_polynomial_is_found_and_praised():
    x = np.linspace(0.02, 0.4, 60)
    fit = SignalPolynomial(degree=2).fit(pairs(x, 3 * x**2 + 0.5 * x + 0.1))
    assert fit.tensors["coefficients"].tolist() == pytest.approx([3, 0.5, 0.1])
    assert fit.tensors["range"].tolist() == pytest.approx([0.02, 0.4])
    assert fit.quality.r2 == pytest.approx(1)
    assert fit.quality.verdict == "the signal explains 100% of the change of the output: a sound basis for this gate."


def test_a_signal_that_says_nothing_is_told():
    rng = np.random.default_rng(1)
    fit = SignalPolynomial(degree=1).fit(pairs(rng.uniform(0, 1, 500), rng.uniform(0, 1, 500)))
    assert fit.quality.r2 < 0.05
    assert fit.quality.is_poor
    assert "this gate will not work here" in fit.quality.verdict


def test_an_output_that_changes_evenly_leaves_nothing_to_explain():
    fit = SignalPolynomial().fit(pairs(np.linspace(0.1, 0.2, 9), np.full(9, 0.3)))
    assert fit.quality.r2 is None
    assert "did not vary" in fit.quality.verdict
    assert polyval(fit.tensors["coefficients"], torch.tensor([0.15])).item() == pytest.approx(0.3)


@pytest.mark.parametrize("target", ["output", "residual"])
def test_a_pair_is_the_scores_and_the_relative_change_of_the_target(target):
    outputs = [[torch.tensor([[1.0, -1.0]])], [torch.tensor([[2.0, -1.0]])], [torch.tensor([[2.0, -1.0]])]]
    features = [[torch.tensor([[4.0]])], [torch.tensor([[4.0]])], [torch.tensor([[5.0]])]]
    sums = run_of(SignalPolynomial(target=target), features, score=[None, 0.1, 0.2], outputs=outputs)
    wanted = [[0.1, 0.5], [0.2, 0.0]] if target == "output" else [[0.1, 0.0], [0.2, 0.25]]
    assert sums["pairs"].tolist() == wanted


def test_a_fit_is_not_asked_outside_its_range():
    gate = AccumulatedChange(1.0, (-10.0, 4.0, 0.0), rescale="clamp0", fitted=(0.1, 0.2))
    inside = [gate.polynomial(x) for x in (0.1, 0.2)]
    assert [gate.polynomial(x) for x in (0.0, 0.9)] == inside
    assert AccumulatedChange(1.0, (-10.0, 4.0, 0.0)).polynomial(0.9) < 0, "the published form goes negative"


def test_teacache_takes_the_polynomial_and_its_range():
    made = Calibration.by_hand("teacache", 8, {"coefficients": [0, 0, 0, 2.0, 0.5], "range": [0.1, 0.3]})
    gate = c4d.method("teacache", calibration=made).compose().gate
    assert (gate.coefficients, gate.fitted) == ((0, 0, 0, 2.0, 0.5), (0.1, 0.3))
    official = c4d.method("teacache", calibration=made, variant="official").compose().gate
    assert (official.fitted, official.rescale) == (None, "none")


def test_too_few_pairs_are_refused():
    with pytest.raises(CalibrationError, match="1 pairs of changes were seen; a fit needs 2"):
        SignalPolynomial().fit(pairs(np.array([0.1]), np.array([0.2])))


# -- means by step -----------------------------------------------------------------------------------------------------


def test_a_new_statistic_is_one_short_declaration():
    class Size(StepMeans):
        site = Denoiser()

        def measure(self, memory, seen):
            return {"size": (seen.step, float(seen.features["output"][0].abs().mean()))}

        def shapes(self, num_steps):
            return {"size": (num_steps,)}

    fit = Size().fit(run_of(Size(), [[torch.full((2, 3), float(i))] for i in range(4)], "output"))
    assert fit.tensors["size"].tolist() == [0, 1, 2, 3]


def test_what_means_explain_is_measured_from_where_nothing_happens():
    g = torch.Generator().manual_seed(0)
    values = 0.1 + 0.01 * torch.randn(50, 6, generator=g, dtype=torch.float64)  # as large at every step
    sums = torch.stack([torch.full((6,), 50.0).double(), values.sum(0), values.square().sum(0)])
    assert mean_of(sums).tolist() == pytest.approx(values.mean(0).tolist())
    r2, residual = r2_of_means(sums, 0.0)
    assert r2 == pytest.approx(1 - float((values - values.mean(0)).square().sum() / values.square().sum()))
    assert residual == pytest.approx(float((values - values.mean(0)).square().mean().sqrt()))
    assert r2 > 0.98, "a flat curve that every prompt follows is a sound basis"
    shifted = torch.stack([sums[0], sums[1] + 50, (values + 1).square().sum(0)])
    assert r2_of_means(shifted, 1.0)[0] == pytest.approx(r2), "ratios near 1, errors near 0"


@pytest.mark.parametrize(("r2", "said"), [(0.95, "sound"), (0.7, "compare before use"), (0.09, "explains 9% of y")])
def test_verdicts(r2, said):
    assert said in judged(r2, 0.1, 5, "x", "y", "z").verdict


# -- magcache ----------------------------------------------------------------------------------------------------------


def test_magnitude_ratios_are_means_over_tokens_by_branch():
    g = torch.Generator().manual_seed(0)
    residuals = [torch.randn(1, 5, 8, generator=g) for _ in range(4)]
    fit = MagnitudeRatios().fit(run_of(MagnitudeRatios(), [[r] for r in residuals], branch="uncond"))
    by_hand = [1.0] + [float((b.norm(dim=-1) / a.norm(dim=-1)).mean()) for a, b in pairwise(residuals)]
    assert fit.tensors["ratios"].tolist() == pytest.approx(by_hand)
    assert fit.tensors["ratios/uncond"].tolist() == pytest.approx(by_hand)
    assert fit.quality.count == 4, "the copy of a single branch does not count twice"


def test_magcache_takes_the_ratios_of_its_branch():
    fit = {"ratios": torch.full((10,), 0.9), "ratios/cond": torch.ones(10), "ratios/uncond": torch.full((10,), 0.5)}
    made = Calibration.by_hand("magcache", 10, fit)
    with c4d.accelerate(toys.flux(), "magcache", calibration=made, threshold=0.1) as handle:
        gate = handle._engines[0].gate
    assert gate.branches.keys() == {"cond", "uncond"}
    states = {name: gate.begin_at(Place(10, None, name)) for name in ("cond", "uncond", "other")}
    assert gate.propose(states["cond"], Step(4, 10), None)
    assert not gate.propose(states["uncond"], Step(4, 10), None)
    assert states["other"].ratios[1] == pytest.approx(0.9)


def test_magcaches_law_serves_other_steps_only_when_asked():
    made = Calibration.by_hand("magcache", 10, {"ratios": torch.full((10,), 0.99)})
    inputs = toys.flux_inputs()
    with (
        toys.accelerated(toys.flux(), "magcache", {"calibration": made}, num_steps=8) as handle,
        pytest.raises(CalibrationError, match=r"for 10 steps, and the run has 8 steps\. Calibrate for such runs"),
    ):
        toys.flux_loop(handle._engines[0].denoiser, inputs, 8)
    with toys.accelerated(toys.flux(), "magcache", {"calibration": made, "resample": True}, num_steps=8) as handle:
        toys.flux_loop(handle._engines[0].denoiser, inputs, 8)
        assert "c" in handle.trace.strip()


# -- taocache ----------------------------------------------------------------------------------------------------------


def test_changes_are_those_of_fit_changes_and_the_verdict_is_what_they_explain():
    g = torch.Generator().manual_seed(0)
    runs = [[torch.randn(2, 3, generator=g) for _ in range(6)] for _ in range(3)]
    statistic = ChangeScales()
    fit = statistic.fit(statistic.merge([run_of(statistic, [[y] for y in run], "trajectory") for run in runs]))
    ratios, cosines = fit_changes(runs)
    assert fit.tensors["ratios"].tolist() == pytest.approx(ratios)
    assert fit.tensors["cosines"].tolist() == pytest.approx(cosines)
    left = []
    for run in runs:
        for i in range(2, 6):
            now, before = run[i] - run[i - 1], run[i - 1] - run[i - 2]
            left.append(float((now - ratios[i] * cosines[i] * before).square().sum() / now.square().sum()))
    assert fit.quality.r2 == pytest.approx(1 - sum(left) / len(left), rel=1e-4)
    assert fit.quality.is_poor, "noise has no direction"


def test_a_geometric_sequence_is_explained_in_full():
    features = [[torch.tensor([[3.0, -1.0]], dtype=torch.float64) * (1 - 0.8**i)] for i in range(8)]
    fit = ChangeScales().fit(run_of(ChangeScales(), features, "trajectory"))
    assert fit.tensors["ratios"][2:].tolist() == pytest.approx([0.8] * 6)
    assert fit.quality.r2 == pytest.approx(1)


def test_taocaches_scales_serve_their_own_steps_only():
    made = Calibration.by_hand("taocache", 8, {"ratios": torch.full((8,), 0.5), "cosines": torch.ones(8)})
    pipe = toys.flux_pipeline()
    with c4d.accelerate(pipe, "taocache", calibration=made) as handle:
        assert handle._engines[0].predictor.ratios == (0.5,) * 8
        toys.generate(pipe, 8)
        with pytest.raises(CalibrationError, match="for 8 steps, and the run has 12 steps"):
            toys.generate(pipe, 12)
