"""DPCache: the search against brute force, its costs against plain hooks, its steps against the same axes by hand."""

from itertools import combinations, pairwise

import pytest
import torch

import cache4diffusion as c4d
from cache4diffusion.calibration import Calibration
from cache4diffusion.calibration.observer import Observer
from cache4diffusion.calibration.secants import SecantErrors
from cache4diffusion.errors import SettingError
from cache4diffusion.methods.dpcache import planned
from small_denoisers import accelerated, differences, flux_inputs, sample

STEPS = 10


def random_errors(steps, max_gap, seed=0):
    return torch.rand(steps, max_gap, max_gap - 1, generator=torch.Generator().manual_seed(seed)).tolist()


def cost_of(path, errors):
    """The sum over consecutive triples, the last ending behind the run."""
    ends, total = [*path, len(errors)], 0.0
    for i, j, k in zip(ends, ends[1:], ends[2:], strict=False):
        total += sum(errors[t][j - i - 1][t - j - 1] for t in range(j + 1, k))
    return total


def by_brute_force(errors, count):
    steps, max_gap = len(errors), len(errors[0])
    paths = [(0, 1, 2, *rest) for rest in combinations(range(3, steps), count - 3)]
    paths = [path for path in paths if all(b - a <= max_gap for a, b in pairwise([*path, steps]))]
    return min((cost_of(path, errors), path) for path in paths)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("steps", "max_gap", "count"), [(9, 9, 4), (9, 4, 5), (11, 5, 6), (10, 3, 6), (8, 8, 3)])
def test_the_search_equals_brute_force(steps, max_gap, count, seed):
    errors = random_errors(steps, max_gap, seed)
    expected = by_brute_force(errors, count)
    found = planned(errors, count)
    assert cost_of(found, errors) == pytest.approx(expected[0])
    assert found == expected[1]


def test_equal_costs_are_decided_in_lexicographic_order():
    assert planned([[[1.0] * 3] * 4] * 9, 5) == (0, 1, 2, 3, 5)


def test_more_full_steps_never_cost_more():
    errors = random_errors(12, 12)
    costs = [cost_of(planned(errors, count), errors) for count in range(3, 13)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0
    assert planned(errors, 12) == tuple(range(12))


def test_too_few_full_steps_are_refused_with_the_number_that_does():
    errors = random_errors(20, 4)
    with pytest.raises(SettingError, match="4 full steps cannot serve 20 steps with gaps of at most 4; use 7 or more"):
        planned(errors, 4)
    assert len(planned(errors, 7)) == 7


def test_errors_are_the_cards_by_plain_hooks(model):
    seen = []
    hook = model.norm_out.register_forward_hook(lambda module, args, output: seen.append(args[0].clone()))
    sample(model, flux_inputs(1), 7)
    hook.remove()
    with Observer(model, SecantErrors(max_gap=3)) as observer, observer.run(num_steps=7):
        sample(model, flux_inputs(1), 7)
    errors = observer.entries()["denoiser"].fit["errors"]
    for t in range(7):
        for gap in (1, 2, 3):
            for horizon in (1, 2):
                j = t - horizon
                wanted = 0.0
                if j - gap >= 0:
                    line = seen[j] + (seen[j] - seen[j - gap]) * horizon / gap
                    wanted = float((line - seen[t]).abs().mean())
                assert float(errors[t, gap - 1, horizon - 1]) == pytest.approx(wanted, rel=1e-4, abs=1e-7)


def test_its_steps_are_those_of_the_same_axes_by_hand(model):
    calibration = Calibration.by_hand("dpcache", STEPS, {"errors": torch.tensor(random_errors(STEPS, 4))}, max_gap=4)
    path = c4d.method("dpcache", calibration=calibration, budget=0.5).compose().gate.full_steps[""]
    assert len(path) == 5
    mine, trace, stats = accelerated(model, flux_inputs(2), STEPS, "dpcache", calibration=calibration, budget=0.5)
    assert trace.strip() == "".join("F" if step in path else "c" for step in range(STEPS))
    assert stats["syncs"] == 0
    with (
        c4d.accelerate(
            model, "fora", site="span(form='output')", predictor="newton(order=1)", gate=f"schedule(full_steps={path})"
        ) as handle,
        handle.run(num_steps=STEPS),
    ):
        theirs = sample(model, flux_inputs(2), STEPS)
    assert differences(mine, theirs) == [0.0] * STEPS


def test_all_steps_in_the_budget_is_off(model):
    calibration = Calibration.by_hand("dpcache", 5, {"errors": torch.zeros(5, 4, 3)}, max_gap=4)
    reached, trace, _ = accelerated(model, flux_inputs(1), 5, "dpcache", calibration=calibration, budget=1.0)
    assert trace.strip() == "FFFFF"
    assert differences(reached, sample(model, flux_inputs(1), 5)) == [0.0] * 5
