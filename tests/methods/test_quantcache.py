"""QuantCache: a ladder by divergence, channels in mixed precision, blocks that turn nothing left out.

Each by itself, and together on small denoisers.
"""

import dataclasses

import pytest
import torch

import cache4diffusion as c4d
import toys
from cache4diffusion.engine.decide import turned
from cache4diffusion.errors import SettingError
from cache4diffusion.gates import LadderedEntrance, Step
from cache4diffusion.predictors import Graded, Reuse
from cache4diffusion.storage import Storage, Store
from copying import Pretended

STEPS = 12


# -- the ladder --------------------------------------------------------------------------------------------------------


def strip(gate, divergence, steps=9, angle=None):
    """What a block does that diverges by ``divergence(step)`` per step since its last run."""
    state, last, letters = gate.begin(None), None, ""
    for index in range(steps):
        score = None if last is None else divergence(index) * (index - last)
        if gate.prune and score is not None:
            score = (score, angle)
        step = Step(index, None)
        cached = gate.propose(state, step, score)
        gate.commit(state, step, cached, score)
        last, letters = (last, letters + "c") if cached else (index, letters + "F")
    return letters


@pytest.mark.parametrize(
    ("divergence", "letters"),
    [(0.05, "FFcccccFc"), (0.15, "FFccccFcc"), (0.25, "FFcccFccc"), (0.35, "FFccFccFc"), (0.45, "FFcFcFcFc"),
     (0.5, "F" * 9)],
)  # fmt: skip
def test_the_larger_the_divergence_the_shorter_the_interval(divergence, letters):
    assert strip(LadderedEntrance(0.5), lambda step: divergence) == letters
    if divergence == 0.35:
        assert all(f"``{letters}``" in (cls.__doc__ or "") for cls in (LadderedEntrance, c4d.methods.QuantCache))


def test_the_interval_follows_the_divergence_as_it_changes():
    assert strip(LadderedEntrance(0.5), lambda step: 0.05 if step > 4 else 1.0, 14) == "FFFFFFcccccFcc"


def test_a_threshold_of_0_never_reuses_whatever_is_pruned():
    assert strip(LadderedEntrance(0.0, prune=1.0), lambda step: 0.0, angle=0.0) == "F" * 9


def test_a_block_that_turns_nothing_is_left_out_once_and_then_measured():
    gate = LadderedEntrance(0.5, prune=0.01)
    assert strip(gate, lambda step: 1.0, angle=0.005) == "FcFcFcFcF"
    assert strip(gate, lambda step: 1.0, angle=0.02) == strip(gate, lambda step: 1.0, angle=None) == "F" * 9
    assert strip(gate, lambda step: 0.35, 12, angle=0.005) == "FcFcccccFccc", "an interval of 3 becomes 6"


def test_wrong_settings_are_refused():
    with pytest.raises(SettingError, match="prune 0"):
        LadderedEntrance(prune=2.0)
    with pytest.raises(SettingError, match="bits must be 8"):
        Graded(bits=4)
    with pytest.raises(SettingError, match="bits"):
        c4d.method("quantcache", bits=17.0)


# -- precision ---------------------------------------------------------------------------------------------------------


def kept(bits, leaves, store=None, rows=None):
    predictor = Graded(bits)
    state = predictor.init(rows, STEPS, store or Store())
    for time, leaf in enumerate(leaves):
        predictor.update(state, [leaf], float(time))
    return state, predictor.predict(state, float(len(leaves)))[0]


SHAPES = [(2, 7, 16), (2, 16, 3, 3), (3, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_channels_that_diverged_most_are_kept_as_they_are_and_the_others_within_half_a_scale(shape):
    g = torch.Generator().manual_seed(0)
    first, axis = torch.randn(shape, generator=g), 1 if len(shape) != 3 else 2
    sizes = [1] * len(shape)
    sizes[axis] = 16
    moved = torch.randperm(16, generator=g)  # how far each channel goes
    second = first * (1 + 0.1 * moved.reshape(sizes))
    _, back = kept(12.0, [first, second])
    exact = (back == second).movedim(axis, -1).reshape(-1, 16).all(0)
    assert torch.equal(exact.nonzero().flatten(), (moved >= 8).nonzero().flatten())
    dims = tuple(d for d in range(1, len(shape)) if d != axis) if len(shape) > 2 else (1,)
    coarse = second.movedim(axis, -1)[..., ~exact] if len(shape) == 2 else second
    largest = coarse.abs().amax(dims, keepdim=True)
    assert ((back - second).abs() <= largest / 254 * (1 + 1e-5)).all()


def test_at_the_first_full_step_the_largest_channels_are_kept_as_they_are():
    leaf = torch.randn(1, 6, 8) * torch.tensor([1.0, 50, 2, 60, 3, 70, 4, 80])
    _, back = kept(12.0, [leaf])
    assert (back == leaf)[0].all(0).nonzero().flatten().tolist() == [1, 3, 5, 7]


def test_16_bits_are_reuse_and_8_are_reuse_kept_in_int8():
    leaves = [torch.randn(2, 5, 6) for _ in range(3)]
    _, whole = kept(16.0, leaves)
    assert torch.equal(whole, leaves[-1])
    predictor = Reuse()
    state = predictor.init(None, STEPS, Store(Storage.of("int8")))
    predictor.update(state, [leaves[-1]], 0.0)
    assert torch.equal(kept(8.0, leaves)[1], predictor.predict(state, 1.0)[0])


@pytest.mark.parametrize("bits", [8.0, 10.0, 12.0, 16.0])
def test_what_is_held_is_the_budget_and_does_not_depend_on_what_is_sampled(bits):
    held = set()
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        state, _ = kept(bits, [torch.randn(2, 32, 16, generator=g).bfloat16() * seed for _ in range(3)])
        held.add(sum(tensor.nbytes for tensor in state.tensors()))
    full = round((bits - 8) / 8 * 16)
    numbers = 2 * 32 * (2 * full + (16 - full))
    assert held == {numbers + 4 * 2 * (16 - full) + (2 * 2 * 16 if 0 < full < 16 else 0)}


def test_rows_are_kept_as_if_they_were_alone_and_elsewhere_as_here():
    leaves = [torch.randn(2, 5, 8) * torch.tensor([1.0, 300.0])[:, None, None] for _ in range(4)]
    predictor = Graded(11.0)
    together, alone = predictor.init(2, STEPS), predictor.init(1, STEPS)
    away = predictor.init(2, STEPS, Pretended())
    for time, leaf in enumerate(leaves):
        predictor.update(alone, [leaf[:1]], float(time))
        predictor.update(away, [leaf.clone()], float(time))
        for rows in ([0], [1]) if time != 2 else ([0],):
            predictor.update(together, [leaf[rows]], float(time), rows)
    (whole,), (single,) = predictor.predict(together, 9.0), predictor.predict(alone, 9.0)
    assert torch.equal(whole[:1], single)
    predictor.prefetch(away, 9.0)
    assert torch.equal(predictor.predict(away, 9.0)[0], kept(11.0, leaves)[1])
    assert torch.equal(away.newest()[0], predictor.predict(away, 9.0)[0])


def test_a_feature_of_another_shape_begins_anew():
    predictor = Graded(12.0)
    state = predictor.init(None, STEPS)
    for leaf in (torch.randn(1, 4, 8), torch.randn(1, 6, 8)):
        predictor.update(state, [leaf], 0.0)
        assert predictor.predict(state, 1.0)[0].shape == leaf.shape


# -- together ----------------------------------------------------------------------------------------------------------


def sampled(denoiser, method, **settings):
    with c4d.accelerate(denoiser, method, **settings) as handle, handle.run(num_steps=STEPS):
        return toys.flux_loop(denoiser, toys.flux_inputs(2), STEPS), handle.trace.strip()


def test_16_bits_and_no_pruning_are_the_cache_alone():
    made = c4d.method("quantcache", threshold=2.0, bits=16.0, prune=0.0).compose()
    plain = dataclasses.replace(made, predictor=Reuse())
    (ours, letters), (theirs, others) = (sampled(toys.flux(), method) for method in (made, plain))
    assert letters == others and "c" in letters
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_threshold_of_0_is_bit_equal_also_with_everything_to_prune():
    outputs, letters = sampled(toys.flux(), "quantcache", threshold=0.0, prune=1.0)
    plain = toys.flux_loop(toys.flux(), toys.flux_inputs(2), STEPS)
    assert letters == "F" * STEPS
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain, strict=True))


def test_the_ledger_holds_what_was_predicted():
    call = {**toys.flux_inputs(2), "timestep": torch.full((2,), 0.5)}
    predicted = c4d.cache_bytes(toys.flux(), "quantcache", inputs=call, steps=STEPS, threshold=2.0)
    denoiser = toys.flux()
    with c4d.accelerate(denoiser, "quantcache", threshold=2.0) as handle, handle.run(num_steps=STEPS):
        toys.flux_loop(denoiser, toys.flux_inputs(2), STEPS)
        assert predicted == handle.memory["peak"] == sum(handle.memory_by_place.values())


@torch.no_grad()
def test_only_the_block_that_turns_nothing_is_left_out():
    torch.manual_seed(0)
    denoiser = toys.Blocks(dim=8)
    for parameter in denoiser.blocks[1].ff[2].parameters():
        parameter.mul_(1e-4)
    counter, ran = toys.Counter(denoiser), []
    g = torch.Generator().manual_seed(1)
    context = torch.randn(1, 5, 8, generator=g)
    settings = {"threshold": 1e-6, "prune": 1e-6, "bits": 16.0}
    with c4d.accelerate(denoiser, "quantcache", **settings) as handle, handle.run(num_steps=8):
        for step in range(8):
            x = torch.randn(1, 5, 4, generator=g)
            modules, _ = counter.during(lambda x=x, s=step: denoiser(x, torch.tensor([1 - s / 8]), context))
            ran.append([f"blocks.{i}.ff" in modules for i in range(3)])
    first, second, third = (list(column) for column in zip(*ran, strict=True))
    assert all(first) and all(third)
    assert second[1:] == [False, True] * 3 + [False]


@pytest.mark.parametrize("per_row", [True, False])
def test_how_far_a_block_turns_its_input_is_1_minus_the_cosine(per_row):
    x, y = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    rows = [(x[i].flatten(), y[i].flatten()) for i in range(3)] if per_row else [(x.flatten(), y.flatten())]
    expected = torch.stack([1 - torch.cosine_similarity(a, b, dim=0) for a, b in rows])
    torch.testing.assert_close(turned(x, y, per_row), expected)
    assert turned(x, 3 * x, per_row).abs().max() < 1e-6
    assert turned(x, 0 * x, per_row).isnan().all()
