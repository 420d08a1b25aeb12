"""ToMA: facility location, dense maps to the destinations and back, and runs beside a slow reference."""

import copy
import itertools

import pytest
import torch
from reduction_cases import case, place, rng, tokens, twins_of
from slow_reductions import SlowToMA, coverage, located, tiles_slowly

import cache4diffusion as c4d
from cache4diffusion.errors import SettingError
from cache4diffusion.measure.cost import count_flops
from cache4diffusion.tokens import FacilityTokens, LinearPlan
from cache4diffusion.tokens.facility import locate, tiles_of
from small_denoisers import differences


def made(x, height=4, width=6, twins=None, step=0, state=None, **settings):
    rule = FacilityTokens(**{"tile": 3, "temperature": 0.1, **settings})
    return rule.plan(state or rule.init(), place(height, width, step, len(x), twins), x)


def cosines_of(x):
    unit = torch.nn.functional.normalize(x, dim=-1)
    return unit @ unit.mT


@pytest.mark.parametrize(("grid", "side"), [((1, 4, 6), 3), ((1, 5, 7), 3), ((2, 8, 8), 4), ((1, 3, 3), 8)])
def test_tiles_hold_every_token_once(grid, side):
    index, is_real, places = tiles_of(grid, side)
    frames, height, width = grid
    slow = [[f * height * width + i for i in tile] for f in range(frames) for tile in tiles_slowly(height, width, side)]
    assert [row[real].tolist() for row, real in zip(index, is_real, strict=True)] == slow
    assert torch.equal(index.flatten()[places], torch.arange(frames * height * width))


def test_greedy_choices_are_those_of_the_plain_objective():
    x = tokens(3, 4)
    for row in range(2):
        found = locate(cosines_of(x[row]), torch.ones(12, dtype=torch.bool), 7)
        assert found.tolist() == located(x[row], range(12), 7)


def test_the_objective_grows_with_every_destination_by_less_and_less():
    x = tokens(4, 4, batch=1)[0]
    chosen = locate(cosines_of(x), torch.ones(16, dtype=torch.bool), 16).tolist()
    assert sorted(chosen) == list(range(16))
    values = [coverage(x, range(16), chosen[:count]) for count in range(17)]
    gains = [b - a for a, b in itertools.pairwise(values)]
    assert all(gain >= -1e-6 for gain in gains)
    assert all(later <= earlier + 1e-3 for earlier, later in itertools.pairwise(gains))
    assert gains[0] > gains[-1]


def test_tokens_that_are_none_change_nothing():
    x, padded = tokens(3, 4, batch=1)[0], torch.randn(4, 5, generator=rng(5))
    is_real = torch.arange(16) < 12
    whole = locate(cosines_of(torch.cat([x, padded])), is_real, 6)
    assert torch.equal(whole, locate(cosines_of(x), torch.ones(12, dtype=torch.bool), 6))


def test_of_choices_that_add_as_much_the_first_is_taken():
    """Two tokens that are each other's nearest add the same, whatever rounding says."""
    x = tokens(3, 4, batch=1, dim=64)[0]
    for seed in range(3):
        noisy = cosines_of(x) + 1e-7 * torch.randn(12, 12, generator=rng(seed))
        assert locate(noisy, torch.ones(12, dtype=torch.bool), 6).tolist() == located(x, range(12), 6)


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 7)])
def test_reducing_and_restoring_is_the_slow_one(height, width):
    x, other = tokens(height, width), tokens(height, width, seed=8)
    plan = made(x, height, width)
    out = plan.give(plan.take(other) ** 2)
    for row in range(2):
        slow = SlowToMA(x[row], height, width, 0.5, 3, 0.1)
        torch.testing.assert_close(out[row], slow(lambda short: short**2, other[row]))
        flat = [j for chosen in slow.chosen for j in chosen]
        assert plan.kept[row].tolist() == flat


def test_rows_of_a_and_columns_of_w_add_up_to_one_and_a_constant_stays_one():
    plan = made(tokens(5, 7), 5, 7)
    assert isinstance(plan, LinearPlan)
    every = torch.ones(2, 35, 3)
    torch.testing.assert_close(plan.take(every), torch.ones(2, plan.length, 3))
    torch.testing.assert_close(plan.give(torch.ones(2, plan.length, 3)), every)
    torch.testing.assert_close(plan.weights.sum(2).flatten(1).gather(1, plan.places), torch.ones(2, 35))


def test_without_temperature_all_tokens_as_destinations_are_the_identity():
    """A is a permutation: a ratio so small that one token of a large tile would go, none of a small one."""
    x = tokens(3, 3)
    state = FacilityTokens(tile=3).init()
    state.chosen = torch.stack([torch.randperm(9, generator=rng(row)) for row in range(2)])[:, None]
    state.plan = made(x, 3, 3)
    plan = made(x, 3, 3, state=state, ratio=1 / 9, temperature=1e-3, step=5)
    torch.testing.assert_close(plan.give(plan.take(x)), x)
    assert plan.length == 9
    assert torch.equal(plan.take(x), x.gather(1, plan.kept[..., None].expand(-1, -1, 5)))


def test_without_temperature_every_token_gets_the_output_of_its_nearest_destination():
    x = tokens()
    plan = made(x, temperature=1e-4)
    out, close = plan.give(torch.arange(float(plan.length))[None, :, None].expand(2, -1, 1)), cosines_of(x)
    for row in range(2):
        for tile in tiles_slowly(4, 6, 3):
            slots = [slot for slot, token in enumerate(plan.kept[row].tolist()) if token in tile]
            for i in tile:
                nearest = max(slots, key=lambda slot: close[row, i, plan.kept[row, slot]])
                assert out[row, i, 0] == pytest.approx(nearest, abs=0.05)


@pytest.mark.parametrize(("ratio", "left"), [(0.0, 24), (0.08, 24), (0.1, 22), (0.5, 12), (1.0, 2)])
def test_every_tile_keeps_what_the_ratio_leaves_and_at_least_one(ratio, left):
    plan = made(tokens(), ratio=ratio)
    assert (24 if plan is None else plan.length) == left


def test_the_released_temperature_leaves_a_token_to_its_nearest_destination():
    """``softmax(1000 cos)``, normalised over tokens on the way in and not on the way back."""
    x = tokens(8, 8, batch=1, dim=16)
    assert c4d.method("toma").compose().tokens.temperature == 1 / 1000
    plan = FacilityTokens(tile=4).plan(FacilityTokens().init(), place(8, 8, batch=1), x)
    close = cosines_of(x)[0]
    for tile, weights, kept in zip(
        tiles_slowly(8, 8, 4), plan.weights[0], plan.kept[0].view(4, 8).tolist(), strict=True
    ):
        expected = (1000 * close[kept][:, tile]).softmax(0)
        torch.testing.assert_close(weights, expected, atol=1e-3, rtol=0)
        merged = (expected / expected.sum(1, keepdim=True)) @ x[0, tile]
        torch.testing.assert_close(
            plan.take(x)[0].view(4, 8, 16)[tiles_slowly(8, 8, 4).index(tile)], merged, atol=1e-2, rtol=0
        )


def test_destinations_serve_longer_than_weights():
    rule = FacilityTokens(tile=3, temperature=0.1, renew=4, reweigh=2)
    state = rule.init()
    plans = [rule.plan(state, place(step=step), tokens(seed=step)) for step in range(9)]
    assert [plans[i] is plans[i - 1] for i in range(1, 9)] == [True, False, True, False, True, False, True, False]
    assert [torch.equal(plans[i].kept, plans[i - 2].kept) for i in (2, 4, 6, 8)] == [True, False, True, False]
    fresh = SlowToMA(tokens(seed=0)[0], 4, 6, 0.5, 3, 0.1)
    later = tokens(seed=2)[0]
    for members, chosen, weights in zip(fresh.tiles, fresh.chosen, plans[2].weights[0], strict=True):
        unit = torch.nn.functional.normalize(later, dim=-1)
        torch.testing.assert_close(weights, (unit[chosen] @ unit[members].mT / 0.1).softmax(0))
    assert sum(tensor.numel() for tensor in rule.tensors(state)) == 2 * (12 + 12 + 2 * 6 * 12 + 24 + 24)


def test_twins_go_by_the_mean_of_their_cosines():
    x = tokens()
    plan = made(x, twins=torch.ones(2, dtype=torch.bool))
    assert all(torch.equal(tensor[0], tensor[1]) for tensor in plan.tensors())
    close = cosines_of(x).mean(0)
    for tile, kept in zip(tiles_slowly(4, 6, 3), plan.kept[0].unflatten(0, (2, 6)).tolist(), strict=True):
        found = locate(close[tile][:, tile], torch.ones(12, dtype=torch.bool), 6)
        assert kept == [tile[i] for i in found.tolist()]


def test_making_and_following_a_plan_is_counted():
    x, rule = tokens(8, 8, dim=16), FacilityTokens(tile=4, renew=2, reweigh=1)
    state, plans = rule.init(), []
    for step in range(2):
        counted = count_flops(lambda step=step: plans.append(rule.plan(state, place(8, 8, step), x)))
        assert counted == plans[-1].flops > 0
    assert count_flops(lambda: plans[0].give(plans[0].take(x))) == plans[0].applying(16) > 0


def test_plans_of_half_precision_serve_it():
    x = tokens().bfloat16()
    plan = made(x)
    out = plan.give(plan.take(x))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(plan.take(torch.ones_like(x)).float(), torch.ones(2, 12, 5), atol=2e-2, rtol=0)


class Slowly:
    """DiT with ToMA in its self-attention and MLPs, for one block at a time."""

    def __init__(self, denoiser, settings, renewed, reweighed):
        self.denoiser, self.step, self.slow = copy.deepcopy(denoiser), -1, {}
        for layer, block in enumerate(self.denoiser.transformer_blocks):
            self.change(layer, block, settings, renewed, reweighed)

    def change(self, layer, block, settings, renewed, reweighed):
        run = block.forward

        def forward(hidden_states, *args, **kwargs):
            if renewed(self.step):
                self.slow[layer] = [SlowToMA(row, 4, 4, *settings) for row in hidden_states]
            elif reweighed(self.step):
                for slow, row in zip(self.slow[layer], hidden_states, strict=True):
                    self.reweigh(slow, row, settings[-1])
            return run(hidden_states, *args, **kwargs)

        block.forward = forward
        for part in (block.attn1, block.ff):
            part.forward = self.reduced(layer, part.forward)

    @staticmethod
    def reweigh(slow, row, temperature):
        unit = torch.nn.functional.normalize(row, dim=-1)
        slow.weights = [
            (unit[chosen] @ unit[members].mT / temperature).softmax(0)
            for members, chosen in zip(slow.tiles, slow.chosen, strict=True)
        ]

    def reduced(self, layer, found):
        def forward(x, *args, **kwargs):
            rows = zip(self.slow[layer], x, strict=True)
            return torch.stack([slow(lambda short: found(short, *args, **kwargs), row) for slow, row in rows])

        return forward

    def __call__(self, **kwargs):
        self.step += 1
        return self.denoiser(**kwargs)


def test_runs_are_the_slow_reference():
    denoiser, inputs = case("dit")
    slow = Slowly(denoiser, (0.5, 2, 0.1), lambda step: step % 4 == 0, lambda step: step % 2 == 0)

    def run(call):
        outputs, x = [], inputs["hidden_states"]
        with torch.no_grad():
            for i in range(6):
                (out,) = call(**{**inputs, "hidden_states": x, "timestep": torch.full((2,), 900 - 100 * i)})
                outputs.append(out.clone())
                x = x - out / 5
        return outputs

    expected = run(slow)
    with (
        c4d.accelerate(denoiser, "toma", tile=2, temperature=0.1, renew=4, reweigh=2) as handle,
        handle.run(num_steps=6),
    ):
        reached = run(denoiser)
    assert handle.trace.strip() == "rrrrrr"
    assert max(differences(reached, expected)) <= 1e-5


def test_cross_attention_and_mlps_follow_where_asked():
    denoiser, inputs = twins_of("unet")
    inputs = {**inputs, "timestep": torch.tensor([500, 500])}
    for settings, kinds in (
        ({}, {"attn1", "attn2", "ff"}),
        ({"merge_ffn": False, "merge_cross_attn": False}, {"attn1"}),
    ):
        with c4d.accelerate(denoiser, "toma", **settings) as handle, handle.run(num_steps=1), torch.no_grad():
            denoiser(**inputs)
        assert {path.split(".")[-1] for path, _, _ in handle.trace.of()[0].reduced.parts} == kinds


@pytest.mark.parametrize("settings", [{"ratio": 1.5}, {"temperature": 0.0}, {"tile": 0}, {"renew": 0}, {"reweigh": 0}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        FacilityTokens(**settings)
