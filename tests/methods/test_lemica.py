"""LeMiCa: the search against brute force, its weights against plain hooks, its steps against the same axes by hand."""

from itertools import combinations, pairwise

import pytest
import torch

import cache4diffusion as c4d
from cache4diffusion.calibration import Calibration
from cache4diffusion.calibration.observer import Observer
from cache4diffusion.calibration.reuse_errors import ReuseErrors
from cache4diffusion.errors import SettingError
from cache4diffusion.methods.lemica import minimax
from small_denoisers import accelerated, differences, flux_inputs, sample

STEPS = 10


def random_errors(steps, max_gap, seed=0, levels=None):
    errors = torch.rand(steps, max_gap - 1, generator=torch.Generator().manual_seed(seed))
    return (errors if levels is None else (errors * levels).round()).tolist()


def weights_of(path, errors):
    """All edges of a path to behind the run, largest first."""
    edges = [0.0 if j == i + 1 else errors[j - 1][j - i - 2] for i, j in pairwise([*path, len(errors)])]
    return tuple(sorted(edges, reverse=True))


def by_brute_force(errors, count):
    steps, max_gap = len(errors), len(errors[0]) + 1
    paths = [(0, *rest) for rest in combinations(range(1, steps), count - 1)]
    paths = [path for path in paths if all(b - a <= max_gap for a, b in pairwise([*path, steps]))]
    return min((weights_of(path, errors), path) for path in paths)


@pytest.mark.parametrize("levels", [None, 3])  # few levels: many paths have the same largest edge
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("steps", "max_gap", "count"), [(9, 9, 3), (9, 4, 4), (11, 5, 5), (10, 3, 6), (8, 8, 1)])
def test_the_search_equals_brute_force(steps, max_gap, count, seed, levels):
    errors = random_errors(steps, max_gap, seed, levels)
    weights, path = by_brute_force(errors, count)
    found = minimax(errors, count)
    assert weights_of(found, errors) == pytest.approx(weights)
    assert weights_of(found, errors)[0] == min(weights_of(found, errors)[0], weights[0])
    if levels is None:
        assert found == path


def test_it_is_the_largest_edge_that_counts_and_not_the_sum():
    errors = [[0.0] * 4 for _ in range(5)]
    errors[1][0] = errors[3][0] = 3.0  # 0 -> 2 and 2 -> 4
    errors[4][1] = errors[4][0] = 3.0
    errors[2][1], errors[2][0], errors[4][3] = 7.0, 9.0, 9.0
    errors[3][2], errors[3][1] = 8.0, 8.0
    path = minimax(errors, 2)
    assert weights_of(path, errors) == by_brute_force(errors, 2)[0]


def test_the_budget_of_all_steps_skips_nothing(model):
    errors = random_errors(5, 4)
    assert minimax(errors, 5) == minimax(errors, 9) == (0, 1, 2, 3, 4)
    calibration = Calibration.by_hand("lemica", 5, {"errors": errors}, max_gap=4)
    reached, trace, _ = accelerated(model, flux_inputs(1), 5, "lemica", calibration=calibration, budget=1.0)
    assert trace.strip() == "FFFFF"
    assert differences(reached, sample(model, flux_inputs(1), 5)) == [0.0] * 5


def test_too_few_full_steps_are_refused_with_the_number_that_does():
    errors = random_errors(20, 4)
    with pytest.raises(SettingError, match="4 full steps cannot serve 20 steps with gaps of at most 4; use 5 or more"):
        minimax(errors, 4)
    assert len(minimax(errors, 5)) == 5


def plain_residuals(model, inputs, steps):
    """What all blocks add to the image stream, by hooks of its embedding and the final norm."""
    entered, left = [], []
    hooks = [
        model.x_embedder.register_forward_hook(lambda module, args, output: entered.append(output.clone())),
        model.norm_out.register_forward_hook(lambda module, args, output: left.append(args[0].clone())),
    ]
    sample(model, inputs, steps)
    for hook in hooks:
        hook.remove()
    return [b - a for a, b in zip(entered, left, strict=True)]


@pytest.mark.parametrize("levels", [None, [9.0, 7.0, 4.0, 3.0, 2.5, 1.0]])
def test_edges_are_the_sum_of_the_strides_errors_by_plain_hooks(model, levels):
    steps = 6
    residuals = plain_residuals(model, flux_inputs(1), steps)
    ends = [1 - i / steps for i in range(steps + 1)] if levels is None else [level / 9 for level in [*levels, 0.0]]
    with Observer(model, ReuseErrors(max_gap=4)) as observer, observer.run(timesteps=levels, num_steps=steps):
        sample(model, flux_inputs(1), steps)
    errors = observer.entries()["denoiser"].fit["errors"]
    assert errors.shape == (steps, 3)
    for t in range(steps):
        for run in (1, 2, 3):
            i, wanted = t - run, 0.0
            if i >= 0:
                off = sum((ends[s] - ends[s + 1]) * (residuals[i] - residuals[s]) for s in range(i + 1, t + 1))
                wanted = float(off.abs().mean())
            assert float(errors[t, run - 1]) == pytest.approx(wanted, rel=1e-3, abs=1e-7)


def test_its_steps_are_those_of_the_same_axes_by_hand(model):
    calibration = Calibration.by_hand("lemica", STEPS, {"errors": random_errors(STEPS, 6)}, max_gap=6)
    path = c4d.method("lemica", calibration=calibration, budget=0.4).compose().gate.full_steps[""]
    assert len(path) == 4
    mine, trace, stats = accelerated(model, flux_inputs(2), STEPS, "lemica", calibration=calibration, budget=0.4)
    assert trace.strip() == "".join("F" if step in path else "c" for step in range(STEPS))
    assert stats["syncs"] == 0
    theirs, _, _ = accelerated(
        model, flux_inputs(2), STEPS, "fora", site="span", predictor="reuse", gate=f"schedule(full_steps={path})"
    )
    assert differences(mine, theirs) == [0.0] * STEPS
