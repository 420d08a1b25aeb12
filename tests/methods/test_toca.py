"""ToCa: the token rule, and partial steps against a slow reference written from the card."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slow_tokens import Maps, ToCaParts

import cache4diffusion as c4d
from cache4diffusion.engine.attention import AttentionCapture
from cache4diffusion.engine.tokens import put, take
from cache4diffusion.errors import SettingError
from cache4diffusion.gates import FixedInterval, Step
from cache4diffusion.predictors import Reuse, Taylor
from cache4diffusion.sites import Parts
from cache4diffusion.tokens import TOKEN_RULES, Segment, TokenPlace, TokenRule, TopScore
from cache4diffusion.tokens.topk import _FACTORS
from small_denoisers import (
    IMAGE,
    TEXT,
    SlowFlux,
    accelerated,
    differences,
    dit,
    dit_inputs,
    flux_inputs,
    sample,
)

STEPS = 12
GATE = FixedInterval(4, anchor="warmup", warmup=3)


IMAGE_ONLY = (Segment("image", 0, 20),)


def place(segments=IMAGE_ONLY, layer=0, kind="ffn", step=4, num_steps=50, batch=2, part="a.ff"):
    return TokenPlace(part, kind, layer, 28, Step(step, num_steps), tuple(segments), batch)


# -- the rule --------------------------------------------------------------------------------------------------------


def test_the_score_is_normalised_influence_plus_age():
    rule, where = TopScore(0.25, age_weight=0.25, interval=4), place(batch=1)
    state = rule.init()
    influence = torch.rand(1, 20)
    rule.observe(state, where, {"attention": influence})
    chosen = rule.select(state, where, torch.device("cpu"))
    expected = influence.topk(5).indices.sort().values
    assert torch.equal(chosen, expected), "all are fresh: influence alone decides"
    again = rule.select(state, where, torch.device("cpu"))
    age = torch.ones(1, 20).scatter_(1, chosen, 0.0)
    score = influence / influence.norm() + 0.25 * age / 4
    assert torch.equal(again, score.topk(5).indices.sort().values)


def test_ages_of_the_selected_are_0_and_of_the_others_one_more():
    rule, where = TopScore(0.3), place()
    state = rule.init()
    rule.observe(state, where, {"attention": torch.rand(2, 20)})
    expected = torch.zeros(2, 20)
    for _ in range(5):
        chosen = rule.select(state, where, torch.device("cpu"))
        expected += 1
        expected.scatter_(1, chosen, 0.0)
        assert torch.equal(state.age, expected)
    rule.observe(state, where, {"attention": torch.rand(2, 20)})
    rule.select(state, where, torch.device("cpu"))
    assert state.age.max() == 1, "a full step makes every token fresh"


def test_text_and_image_tokens_never_compete():
    segments = (Segment("text", 0, 8), Segment("image", 8, 28))
    rule = TopScore(0.25)
    state = rule.init()
    influence = torch.rand(2, 28)
    influence[:, 8:] += 100  # the image is looked at far more
    rule.observe(state, place(segments), {"attention": influence})
    chosen = rule.select(state, place(segments), torch.device("cpu"))
    assert ((chosen < 8).sum(1) == 2).all()
    assert ((chosen >= 8).sum(1) == 5).all()


@given(st.permutations(range(12)))
def test_permuting_tokens_permutes_the_selection(order):
    order = torch.tensor(order)
    rule, where = TopScore(0.25), place((Segment("image", 0, 12),), batch=1)
    influence = torch.linspace(0.1, 1.3, 12).view(1, 12)
    plain, permuted = rule.init(), rule.init()
    rule.observe(plain, where, {"attention": influence})
    rule.observe(permuted, where, {"attention": influence[:, order]})
    for _ in range(3):
        one = rule.select(plain, where, torch.device("cpu"))
        two = rule.select(permuted, where, torch.device("cpu"))
        assert torch.equal(order[two].sort().values, one)


@given(st.floats(0, 1), st.integers(0, 27), st.integers(3, 49), st.sampled_from(list(_FACTORS)))
def test_the_number_of_tokens_depends_on_step_layer_and_part_only(ratio, layer, step, schedule):
    rule = TopScore(ratio, schedule=schedule)
    shapes = set()
    for seed in range(2):
        where = place(layer=layer, step=step)
        state = rule.init()
        rule.observe(state, where, {"attention": torch.rand(2, 20, generator=torch.Generator().manual_seed(seed))})
        chosen = rule.select(state, where, torch.device("cpu"))
        assert all(len(set(row)) == len(row) for row in chosen.tolist()), "unique"
        assert all(row == sorted(row) for row in chosen.tolist())
        shapes.add(chosen.shape)
    assert shapes == {(2, rule.count(where.segments[0], where))}


def test_ratio_1_selects_every_token_and_ratio_0_none():
    for ratio, count in [(1.0, 20), (0.0, 0)]:
        rule = TopScore(ratio)
        chosen = rule.select(rule.init(), place(), torch.device("cpu"))
        assert chosen.tolist() == [list(range(count))] * 2


@pytest.mark.parametrize(
    ("schedule", "kind", "layer", "step", "factor"),
    [
        ("constant", "ffn", 9, 30, 1.0),
        ("flux", "ffn", 0, 30, 1.5 * 0.4),
        ("flux", "ffn", 18, 30, (1.5 - 18 / 27) * 0.4),
        ("flux", "fused", 0, 30, 1.5 * 1.6),
        ("flux", "fused", 37, 30, (1.5 - 37 / 27) * 1.6),
        # DiT counts steps down: step 30 of 50 is s = 19
        ("dit", "ffn", 0, 30, 2.5 * (3 - 4 * 19 / 50) * 0.8),
        ("dit", "ffn", 27, 30, 2.5 * (3 - 4 * 19 / 50) * 1.2),
        ("dit", "ffn", 5, 2, 0.0),  # negative early: clamped
    ],
)
def test_the_ratio_schedules_are_the_released_ones(schedule, kind, layer, step, factor):
    rule = TopScore(0.1, schedule=schedule)
    where = dataclasses.replace(place(layer=layer, kind=kind, step=step), num_layers=57)
    assert rule.ratio(where) == pytest.approx(0.1 * factor)


def test_a_random_score_draws_the_same_for_every_row_and_anew_at_every_step_and_part():
    rule = TopScore(0.25, score="random", seed=3, age_weight=0.0)
    first = rule.select(rule.init(), place(), torch.device("cpu"))
    assert torch.equal(first, rule.select(rule.init(), place(), torch.device("cpu"))), "same seed, same plan"
    assert torch.equal(first[0], first[1]), "one draw for both halves of guidance"
    others = [place(step=5), place(part="b.ff"), place((Segment("image", 8, 28),))]
    others = [rule.select(rule.init(), other, torch.device("cpu")) for other in others]
    others.append(TopScore(0.25, score="random", seed=4).select(rule.init(), place(), torch.device("cpu")))
    assert not any(torch.equal(first, other) for other in others)
    assert rule.observes == frozenset(), "no attention map is needed"


@pytest.mark.parametrize("name", [name for name, rule in TOKEN_RULES.items() if isinstance(rule(), TokenRule)])
def test_every_token_rule_of_the_table_keeps_the_contract(name):
    rule = TOKEN_RULES[name]()
    state = rule.init()
    assert isinstance(rule, TokenRule)
    seen = {what: torch.rand(2, 20) for what in rule.observes}
    rule.observe(state, place(), seen)
    chosen = rule.select(state, place(), torch.device("cpu"))
    assert chosen.dtype == torch.int64
    assert chosen.shape[0] == 2
    assert all(isinstance(tensor, torch.Tensor) for tensor in rule.tensors(state))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"recompute_ratio": 1.5}, "fraction, 0 to 1"),
        ({"age_weight": -1.0}, "age_weight must be 0"),
        ({"interval": 0}, "interval 1 or more"),
        ({"schedule": "sdxl"}, "'constant', 'flux', 'dit'"),
        ({"score": "norm"}, "'attention', 'value_norm', 'random'"),
        ({"cross_weight": 1.5}, "cross_weight must be 0 to 1"),
        ({"bonus": -0.1}, "bonus 0 or more"),
        ({"window": 0}, "window 1 token or more"),
    ],
)
def test_bad_settings_are_refused_in_words(settings, words):
    with pytest.raises(SettingError, match=words):
        TopScore(**settings)


# -- take and put ----------------------------------------------------------------------------------------------------


def test_take_then_put_returns_x_on_the_index_and_the_cache_elsewhere():
    x, kept = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    index = torch.tensor([[0, 3, 8], [1, 2, 7]])
    written = put(kept.clone(), index, take(x, index))
    for row in range(2):
        for token in range(9):
            source = x if token in index[row].tolist() else kept
            assert torch.equal(written[row, token], source[row, token])


def test_gather_compute_scatter_of_an_mlp_is_the_mlp_at_those_tokens(model):
    mlp, x = model.transformer_blocks[0].ff, torch.randn(2, 9, 32)
    index = torch.tensor([[0, 3, 8], [1, 2, 7]])
    torch.testing.assert_close(mlp(take(x, index)), take(mlp(x), index))


def test_captured_attention_is_the_column_mean_of_the_softmax():
    query, key, value = (torch.randn(2, 3, 7, 5) for _ in range(3))
    mask = torch.rand(2, 1, 7, 7) > 0.3
    mask[..., 0] = True
    for attn_mask in (None, mask, torch.randn(2, 1, 7, 7)):
        with AttentionCapture("attention", chunk=3) as capture:
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)
        logits = query @ key.transpose(-1, -2) / 5**0.5
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
        torch.testing.assert_close(capture.seen["attention"], logits.softmax(-1).mean((1, 2)))
        torch.testing.assert_close(out, logits.softmax(-1) @ value)


# -- partial steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["flux", "constant"])
def test_partial_steps_are_the_slow_references(model, schedule):
    inputs, reference = flux_inputs(2), ToCaParts(model, 4, 0.3, schedule)
    expected = sample(SlowFlux(model, reference), inputs, STEPS)
    reached, trace, _ = accelerated(model, inputs, STEPS, "toca", interval=4, recompute_ratio=0.3, schedule=schedule)
    assert trace.strip() == "FFFpppFpppFp"
    assert max(differences(reached, expected)) <= 1e-5


def test_ratio_0_is_fora_on_the_same_schedule_bit_for_bit(model):
    inputs = flux_inputs(2)
    reached, _, _ = accelerated(model, inputs, STEPS, "toca", recompute_ratio=0.0)
    expected, _, _ = accelerated(model, inputs, STEPS, c4d.Composition(Parts(), GATE, Reuse()))
    assert differences(reached, expected) == [0.0] * STEPS


@pytest.mark.parametrize("case", ["flux", "dit"])
@pytest.mark.parametrize("score", ["attention", "random"])
def test_ratio_1_without_attention_reuse_is_full_compute(model, case, score):
    denoiser, inputs = (model, flux_inputs(2)) if case == "flux" else (dit(), dit_inputs(2))
    rule = TopScore(1.0, score=score)
    composition = c4d.Composition(Parts(kinds=("ffn",)), GATE, Reuse(), tokens=rule)
    reached, trace, _ = accelerated(denoiser, inputs, STEPS, composition)
    assert "p" in trace.strip()
    assert max(differences(reached, sample(denoiser, inputs, STEPS))) <= 1e-6


def test_scores_are_seen_also_where_attention_itself_is_not_cached(model):
    """``Parts(kinds=("ffn",))`` leaves attention alone, but the ranking still needs its map."""
    inputs = flux_inputs(2)
    runs = []
    for kinds in [("ffn",), ("ffn", "attn")]:
        composition = c4d.Composition(
            Parts(kinds=kinds), FixedInterval(4), Reuse(), tokens=TopScore(0.4, age_weight=0.0)
        )
        with c4d.accelerate(model, composition) as handle, handle.run(num_steps=2):
            sample(model, inputs, 1)
            states = next(iter(handle._engines[0]._states.values())).tokens
            runs.append({name: state.influence for name, state in states.items()})
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_interval_1_is_bit_equal_to_no_cache(model):
    inputs = flux_inputs(2)
    reached, trace, _ = accelerated(model, inputs, 5, "toca", interval=1)
    assert trace.strip() == "FFFFF"
    assert differences(reached, sample(model, inputs, 5)) == [0.0] * 5


def test_exactly_k_tokens_per_row_change_on_a_partial_step(model):
    inputs, rule = flux_inputs(2), TopScore(0.3, schedule="constant")
    composition = c4d.Composition(Parts(), GATE, Reuse(), tokens=rule)
    snapshots = []
    with c4d.accelerate(model, composition) as handle, handle.run(num_steps=5):
        engine = handle._engines[0]

        def keep(step):
            states = engine._states
            if states:
                sites = next(iter(states.values())).sites
                snapshots.append({name: site.buffers[0][0].clone() for name, site in sites.items()})

        sample(model, inputs, 5, before=keep)
        keep(5)
        tokens = next(iter(engine._states.values())).tokens
    before, after = snapshots[-2], snapshots[-1]
    for name, kept in before.items():
        changed = (kept != after[name]).any(-1).sum(1).tolist()
        length = kept.shape[1]
        expected = {IMAGE: 3, TEXT: 1, IMAGE + TEXT: 4}[length] if name in tokens else 0
        assert changed == [expected] * 2, name


def test_attention_is_never_partial(model):
    with c4d.accelerate(model, "toca", recompute_ratio=0.5, schedule="constant") as handle:
        with handle.run(num_steps=6):
            sample(model, flux_inputs(1), 1)  # observed once, not counted
        with handle.run(num_steps=6), Maps() as maps:
            counts = []
            sample(model, flux_inputs(1), 6, before=lambda i: counts.append(len(maps.seen)))
    blocks = len(model.transformer_blocks) + len(model.single_transformer_blocks)
    assert counts == [0, blocks, 2 * blocks, 3 * blocks, 3 * blocks, 3 * blocks]


def test_shapes_are_the_same_for_other_data(model):
    def shapes(seed):
        seen = []
        hooks = [
            block.ff.net[0].register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
            for block in model.transformer_blocks
        ]
        accelerated(model, flux_inputs(2, seed=seed), 8, "toca", recompute_ratio=0.4)
        for hook in hooks:
            hook.remove()
        return seen

    accelerated(model, flux_inputs(2), 1, "toca")  # observed once, not counted
    assert shapes(1) == shapes(2)


def test_a_token_rule_on_top_of_taylor_replaces_the_prediction_of_this_step_only(model):
    """Fresh values must not become the anchor of a forecast: the snapshots stay those of full steps."""
    inputs = flux_inputs(1)
    composition = c4d.Composition(Parts(), GATE, Taylor(1, 2), tokens=TopScore(0.5, score="random"))
    with c4d.accelerate(model, composition) as handle, handle.run(num_steps=6):
        kept = []

        def keep(step):
            if step in (3, 5):
                sites = next(iter(handle._engines[0]._states.values())).sites
                kept.append({name: site.buffers[0].clone() for name, site in sites.items()})

        sample(model, inputs, 6, before=keep)
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_dit_partial_steps_compute_the_chosen_tokens_of_the_mlp():
    """By hand on DiT: MLP of all tokens from the present input, taken at the chosen ones."""
    denoiser, inputs = dit(1), dit_inputs(2)
    composition = c4d.Composition(Parts(), GATE, Reuse(), tokens=TopScore(0.25, score="random"))
    seen = []
    ff = denoiser.transformer_blocks[0].ff
    with c4d.accelerate(denoiser, composition) as handle, handle.run(num_steps=5):
        hook = denoiser.transformer_blocks[0].norm3.register_forward_hook(lambda _, a, out: seen.append(out))
        sample(denoiser, inputs, 4)
        hook.remove()
        state = next(iter(handle._engines[0]._states.values()))
        name = next(name for name in state.tokens)
        age, kept = state.tokens[name].age, state.sites[name].buffers[0][0].clone()
    assert handle.trace.strip() == "FFFp"
    assert ((age == 0).sum(1) == 4).all()
    assert kept.shape == (2, 16, 32)
    assert ff is denoiser.transformer_blocks[0].ff
    assert seen
