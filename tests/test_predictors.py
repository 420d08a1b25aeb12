"""Predictors and their memory: what the formulas must reproduce, and what a snapshot may never do."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache4diffusion.errors import SettingError
from cache4diffusion.predictors import PREDICTORS, Corrector, History, Newton, Predictor, Reuse, Taylor, weighted_sum

grids = st.lists(st.integers(0, 60), min_size=1, max_size=5, unique=True).map(lambda steps: sorted(steps, reverse=True))
horizons = st.integers(1, 12)
predictors = st.one_of(st.just(Reuse()), st.builds(Taylor, st.integers(0, 4)), st.builds(Newton, st.integers(0, 4)))


def predict(predictor, feature, full_steps, step):
    """Feed ``feature(i)`` at the full steps, and predict ``step``."""
    state = predictor.init(None)
    for i in full_steps:
        predictor.update(state, [feature(i)], float(i))
    return predictor.predict(state, float(step))[0]


def newest(predictor, grid):
    """The part of a grid (newest first) that a predictor keeps."""
    return [float(step) for step in grid[: predictor.capacity]]


# -- weights ---------------------------------------------------------------------------------------------------------


@given(predictors, grids, horizons)
def test_weights_sum_to_1_so_constants_are_reproduced(predictor, grid, k):
    assert sum(predictor.weights(newest(predictor, grid), grid[0] + k)) == pytest.approx(1, abs=1e-9)


@given(predictors, grids, horizons)
def test_lines_are_reproduced_from_order_1_on(predictor, grid, k):
    times = newest(predictor, grid)
    if len(times) < 2:
        return  # one full step: plain reuse, whatever the order
    weights = predictor.weights(times, grid[0] + k)
    reached = sum(weight * time for weight, time in zip(weights, times, strict=True))
    assert reached == pytest.approx(grid[0] + k, rel=1e-9, abs=1e-7)


@given(st.integers(0, 4), grids, horizons)
def test_newton_is_exact_for_polynomials_of_its_degree_on_any_grid(order, grid, k):
    times = newest(Newton(order), grid)
    degree, step = len(times) - 1, grid[0] + k
    weights = Newton(order).weights(times, step)
    middle = grid[0]  # powers of the distance to the newest step: the numbers stay small
    reached = sum(weight * (time - middle) ** degree for weight, time in zip(weights, times, strict=True))
    size = sum(abs(weight) * abs(time - middle) ** degree for weight, time in zip(weights, times, strict=True))
    assert reached == pytest.approx(k**degree, abs=1e-9 * max(size, 1))


@pytest.mark.parametrize(
    ("predictor", "full_steps", "step", "expected"),
    [
        (Taylor(2), [14, 8, 2], 17, [1.625, -0.75, 0.125]),
        (Newton(2), [14, 8, 2], 17, [1.875, -1.25, 0.375]),
        (Taylor(2), [8, 2, 1], 9, [1.180556, -0.263889, 0.083333]),  # gaps differ: the released recursion
        (Taylor(1), [14, 8], 17, [1.5, -0.5]),
        (Newton(1), [14, 8], 17, [1.5, -0.5]),
        (Reuse(), [14], 17, [1.0]),
    ],
)
def test_weights_are_the_cards_reference_numbers(predictor, full_steps, step, expected):
    assert predictor.weights([float(s) for s in full_steps], step) == pytest.approx(expected, abs=5e-7)


@given(grids.filter(lambda grid: len(grid) > 1), horizons)
def test_order_1_of_newton_and_taylor_is_the_same(grid, k):
    times = [float(step) for step in grid[:2]]
    assert Newton(1).weights(times, grid[0] + k) == pytest.approx(Taylor(1).weights(times, grid[0] + k), abs=1e-9)


@given(st.integers(2, 8), st.integers(1, 8))
def test_taylor_of_order_2_misses_a_quadratic_by_minus_interval_times_horizon(interval, k):
    times = [2.0 * interval, float(interval), 0.0]
    weights = Taylor(2).weights(times, times[0] + k)
    reached = sum(weight * time**2 for weight, time in zip(weights, times, strict=True))
    assert reached - (times[0] + k) ** 2 == pytest.approx(-interval * k, abs=1e-7)


@given(st.integers(2, 8), st.integers(1, 8))
def test_taylor_of_order_1_misses_a_quadratic_by_the_cards_error(interval, k):
    times = [2.0 * interval, float(interval)]
    weights = Taylor(1).weights(times, times[0] + k)
    reached = sum(weight * time**2 for weight, time in zip(weights, times, strict=True))
    assert reached - (times[0] + k) ** 2 == pytest.approx(-k * (k + interval), abs=1e-7)


def recursion(full_steps, step, order, first_enhance):
    """The card's recursion, literally, on unit histories: entry i is the weight of full step i."""
    weights = []
    for unit in full_steps:
        old, previous = {}, None
        for s in full_steps:
            new = {0: 1.0 if s == unit else 0.0}
            for i in range(order):
                if i in old and s > first_enhance - 2:
                    new[i + 1] = (new[i] - old[i]) / (s - previous)
                else:
                    break
            old, previous = new, s
        k = step - full_steps[-1]
        weights.append(sum(value * k**i / math.factorial(i) for i, value in old.items()))
    return weights


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("warmup", [1, 2, 3, 5])
@pytest.mark.parametrize("interval", [2, 5])
def test_taylor_is_the_released_recursion_at_every_step_of_a_run(order, warmup, interval):
    full_steps = [0]
    for step in range(1, 30):
        if step < warmup or (step - warmup + 1) % interval == 0:
            full_steps.append(step)
            continue
        predictor = Taylor(order, first_difference_step=warmup - 1)
        times = [float(s) for s in reversed(full_steps)][: predictor.capacity]
        expected = recursion(full_steps, step, order, warmup)[::-1]
        assert predictor.weights(times, step) == pytest.approx(expected[: len(times)], abs=1e-9)
        assert expected[len(times) :] == pytest.approx([0] * (len(full_steps) - len(times)), abs=1e-9)


def test_the_order_grows_by_one_at_each_full_step_after_the_warm_up():
    orders = []
    for count, times in [(2, [1, 0]), (3, [2, 1, 0]), (4, [7, 2, 1, 0]), (5, [12, 7, 2, 1, 0])]:
        weights = Taylor(4, first_difference_step=2).weights([float(t) for t in times], times[0] + 1)
        assert len(weights) == count
        orders.append(sum(weight != 0 for weight in weights) - 1)
    assert orders == [0, 1, 2, 3]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_order_stops_growing_at_its_setting(order):
    state, orders = Taylor(order, first_difference_step=2).init(None), []
    for step in (0, 1, 2, 7, 12, 17):
        Taylor(order, 2).update(state, [torch.zeros(1)], float(step))
        orders.append(sum(weight != 0 for weight in Taylor(order, 2).slot_weights(state, step + 1.0)) - 1)
    assert orders == [0, 0, *(min(order, j) for j in (1, 2, 3, 4))]


@pytest.mark.parametrize("predictor", [Taylor(3, 2), Newton(3), Reuse()])
def test_slot_weights_are_the_weights_in_the_order_of_the_ring(predictor):
    state = predictor.init(None)
    for step in (0, 1, 2, 7, 12):
        predictor.update(state, [torch.full((1, 2), float(step))], float(step))
        by_slot = predictor.slot_weights(state, 20.0)
        expected = predictor.predict(state, 20.0)[0]
        filled = torch.nan_to_num(state.buffers[0]) * torch.tensor(by_slot).view(-1, 1, 1)
        kept = filled[[slot for slot, weight in enumerate(by_slot) if weight]].sum(0)
        torch.testing.assert_close(kept, expected)


# -- predictions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predictor", [Reuse(), Taylor(order=0), Newton(order=0)])
def test_order_0_is_plain_reuse(predictor):
    y = torch.randn(2, 5, 8)
    assert torch.equal(predict(predictor, lambda i: y * i, [0, 4], 6), y * 4)


@pytest.mark.parametrize("predictor", [Taylor(1), Taylor(4), Newton(1), Newton(3)])
@pytest.mark.parametrize("full_steps", [[0, 1], [0, 1, 2, 7], [0, 5, 10], [0, 3, 4, 11, 12]])
def test_affine_feature_is_exact(predictor, full_steps):
    y, z = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    reached = predict(predictor, lambda i: y * i + z, full_steps, full_steps[-1] + 3)
    torch.testing.assert_close(reached, y * (full_steps[-1] + 3) + z, rtol=1e-5, atol=1e-4)


def sees_input(cls):
    return getattr(cls, "sees", None) == "input"


BLIND = [name for name, cls in PREDICTORS.items() if not hasattr(cls, "needs_latents") and not sees_input(cls)]


@pytest.mark.parametrize("name", BLIND)
def test_every_predictor_of_the_table_keeps_the_contract(name):
    predictor = PREDICTORS[name]()
    state = predictor.init(3, 8)
    assert isinstance(predictor, Predictor)
    assert not predictor.is_ready(state)
    y = torch.randn(3, 4, 2)
    for step in range(4):
        predictor.update(state, [y, y + 1], float(step))
    assert predictor.is_ready(state)
    before = [buffer.clone() for buffer in state.buffers]  # slots that are still free hold anything, NaN as well
    first, second = predictor.predict(state, 6.0), predictor.predict(state, 6.0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "predict is pure"
    kept = zip(before, state.buffers, strict=True)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in kept), "predict writes nothing"
    assert [leaf.shape for leaf in first] == [y.shape, y.shape]
    if name != "chebyshev":  # whose ridge shrinks constants too
        rounding = y.abs().max() / 254 if name == "graded" else 0.0  # half a scale, at most
        torch.testing.assert_close(first[0], y, rtol=1.3e-6, atol=float(rounding) + 1e-5)
    predictor.commit(state, first, 6.0)
    assert all(torch.equal(a, b) for a, b in zip(predictor.predict(state, 6.0), first, strict=True)), (
        "what a cached step went on with is what is found there again"
    )


@pytest.mark.parametrize("name", [name for name, cls in PREDICTORS.items() if sees_input(cls)])
def test_every_corrector_of_the_table_keeps_the_contract(name):
    predictor, y, x = PREDICTORS[name](), torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    assert isinstance(predictor, Predictor)
    assert isinstance(predictor, Corrector)
    state = predictor.init_at("here", 3, 8)
    assert not predictor.is_ready(state)
    with pytest.raises(TypeError, match="use update_seeing"):
        predictor.update(state, [y], 0.0)
    with pytest.raises(TypeError, match="use predict_seeing"):
        predictor.predict(state, 1.0)
    for step in range(3):
        predictor.update_seeing(state, [y, y + 1], [x, x], float(step))
    assert predictor.is_ready(state)
    held = [tensor.clone() for tensor in state.tensors()]
    first, second = (predictor.predict_seeing(state, [x, x], 6.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "predict is pure"
    assert all(torch.equal(a, b) for a, b in zip(held, state.tensors(), strict=True)), "predict writes nothing"
    assert [leaf.shape for leaf in first] == [y.shape, y.shape]
    kept = {tensor.untyped_storage().data_ptr() for tensor in [*state.tensors(), x]}
    assert kept.isdisjoint(leaf.untyped_storage().data_ptr() for leaf in first), "what is handed out is new"
    some = predictor.predict_seeing(state, [x[1:2], x[1:2]], 6.0, rows=[1])
    assert all(torch.equal(a, b[1:2]) for a, b in zip(some, first, strict=True)), "a row is its own"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_features_accumulate_in_float32_and_are_rounded_once(dtype):
    snapshots = [torch.randn(4, 64).to(dtype) for _ in range(3)]
    weights = [1.875, -1.25, 0.375]
    exact = sum(s.double() * w for s, w in zip(snapshots, weights, strict=True))
    reached = weighted_sum(snapshots, weights)
    assert reached.dtype == dtype
    assert torch.equal(reached, exact.float().to(dtype)) or (reached.double() - exact).abs().max() <= (
        exact.abs().max() * torch.finfo(dtype).eps / 2
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_shape_are_kept(dtype):
    reached = predict(Taylor(2), lambda i: torch.full((2, 3), float(i), dtype=dtype), [0, 1, 2], 4)
    assert reached.dtype == dtype
    assert reached.tolist() == [[4.0] * 3] * 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Taylor(order=-1), "order must be 0"),
        (lambda: Newton(order=-2), "order must be 0"),
        (lambda: Taylor(first_difference_step=-1), "step index"),
    ],
)
def test_bad_orders_are_refused(make, words):
    with pytest.raises(SettingError, match=words):
        make()


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predictor", [Reuse(), Taylor(2), Newton(1)])
def test_snapshots_never_alias_the_hosts_tensor(predictor):
    state, y = predictor.init(None), torch.ones(2, 3)
    predictor.update(state, [y], 0.0)
    y.mul_(100)  # the host writes in place later
    assert torch.equal(predictor.predict(state, 1.0)[0], torch.ones(2, 3))


@pytest.mark.parametrize("predictor", [Reuse(), Taylor(2), Newton(3)])
def test_nothing_is_allocated_once_the_ring_exists(predictor):
    state = predictor.init(None)
    predictor.update(state, [torch.zeros(2, 3)], 0.0)
    address, size = state.buffers[0].data_ptr(), state.buffers[0].untyped_storage().nbytes()
    for step in range(1, 9):
        predictor.update(state, [torch.full((2, 3), float(step))], float(step))
    assert state.buffers[0].data_ptr() == address
    assert size == predictor.capacity * 2 * 3 * 4, "as the docstring says: order + 1 copies"


@given(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=10))
def test_the_ring_holds_the_newest_full_steps_in_order(capacity, gaps):
    history, time, written = History(capacity), 0, []
    for gap in gaps:
        time += gap
        history.write([torch.tensor([float(time)])], float(time))
        written.insert(0, float(time))
    track = history.shared
    assert track is not None
    assert track.times == written[:capacity]
    assert [history.buffers[0][slot].item() for slot in track.slots] == written[:capacity]


def test_an_equal_time_overwrites_the_newest_snapshot():
    history = History(3)
    for time, value in [(0.0, 1.0), (1.0, 2.0), (1.0, 3.0)]:
        history.write([torch.tensor([value])], time)
    assert history.shared is not None
    assert history.shared.times == [1.0, 0.0]
    assert [history.buffers[0][slot].item() for slot in history.shared.slots] == [3.0, 1.0]


def test_another_shape_or_number_of_leaves_starts_anew():
    state = Taylor(1).init(None)
    Taylor(1).update(state, [torch.ones(2, 3)], 0.0)
    Taylor(1).update(state, [torch.full((2, 4), 5.0)], 1.0)
    assert torch.equal(Taylor(1).predict(state, 2.0)[0], torch.full((2, 4), 5.0)), "nothing older is mixed in"
    Taylor(1).update(state, [torch.ones(2, 4), torch.ones(1)], 2.0)
    assert len(Taylor(1).predict(state, 3.0)) == 2


def test_clear_forgets_the_snapshots():
    state = Reuse().init(None)
    Reuse().update(state, [torch.ones(1)], 0.0)
    state.clear()
    assert not Reuse().is_ready(state)


# -- rows ------------------------------------------------------------------------------------------------------------

masks = st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=8)


@settings(deadline=None)
@given(st.sampled_from([Reuse(), Taylor(2, 2), Newton(2)]), masks)
def test_every_row_predicts_as_if_it_were_alone(predictor, masks):
    together, alone = predictor.init(3), [predictor.init(1) for _ in range(3)]

    def feature(step, row):
        return torch.sin(torch.arange(4.0) + step * (row + 1)).view(1, 4)

    for step, mask in enumerate([[True] * 3, *masks]):
        rows = [row for row in range(3) if mask[row]]
        if rows:
            leaf = torch.cat([feature(step, row) for row in rows])
            predictor.update(together, [leaf], float(step), None if len(rows) == 3 and step == 0 else rows)
        for row in rows:
            predictor.update(alone[row], [feature(step, row)], float(step))
        whole = predictor.predict(together, step + 2.0)[0]
        for row in range(3):
            torch.testing.assert_close(whole[row : row + 1], predictor.predict(alone[row], step + 2.0)[0])
    some = predictor.predict(together, step + 2.0, [2, 0])[0]
    torch.testing.assert_close(some, predictor.predict(together, step + 2.0)[0][[2, 0]])


def test_rows_that_come_together_share_one_list_again():
    state = Taylor(1).init(2)
    Taylor(1).update(state, [torch.zeros(2, 1)], 0.0)
    Taylor(1).update(state, [torch.ones(1, 1)], 1.0, [1])
    assert state.shared is None
    Taylor(1).update(state, [torch.ones(1, 1)], 1.0, [0])
    assert state.shared is not None, "both rows hold the same full steps: weights are host floats again"


def test_a_history_is_not_ready_before_every_row_was_written():
    state = Reuse().init(3)
    Reuse().update(state, [torch.ones(2, 4)], 0.0, [0, 2])
    assert not Reuse().is_ready(state)
    Reuse().update(state, [torch.ones(1, 4)], 1.0, [1])
    assert Reuse().is_ready(state)


def test_rows_of_an_undeclared_batch_are_refused_in_words():
    with pytest.raises(ValueError, match="rows"):
        History(1).write([torch.ones(1, 4)], 0.0, [2])
