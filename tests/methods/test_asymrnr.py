"""AsymRnR: matching by distance, attention on fewer queries and keys, in any architecture, and its calibration."""

import dataclasses

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, MochiTransformer3DModel
from diffusers.models.attention_processor import AttnProcessor
from reduction_cases import case, place, rng, twins_of
from torch.nn.functional import scaled_dot_product_attention as attend

import cache4diffusion as c4d
import toys
from cache4diffusion.calibration import Calibration
from cache4diffusion.calibration.observer import Observer
from cache4diffusion.calibration.redundancies import Redundancies
from cache4diffusion.cost import step_cost
from cache4diffusion.engine.reducing_attention import AttentionReducer, attended
from cache4diffusion.errors import CalibrationError, CompositionError, SettingError
from cache4diffusion.gates import Step, Throughout
from cache4diffusion.measure.cost import count_flops
from cache4diffusion.methods.asymrnr import tiered
from cache4diffusion.sites import ReducedAttention
from cache4diffusion.tokens import AsymmetricTokens, MergeTokens, Plan, RankedTokens
from cache4diffusion.tokens.asymmetric import nearest, others, redundancy
from cache4diffusion.tokens.merging import destinations
from small_denoisers import accelerated, differences, flux, flux_inputs, sample

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype")  # Mochi's own


# -- plans -----------------------------------------------------------------------------------------------------------


def video(frames=3, height=4, width=4, rows=6, dim=5, seed=0):
    return torch.randn(rows, frames * height * width, dim, generator=rng(seed))


def at(frames=3, height=4, width=4, step=0, rows=6, kind="query", twins=None, num_steps=50):
    return dataclasses.replace(
        place(height, width, step, rows, twins, frames=frames), kind=kind, step=Step(step, num_steps)
    )


def slow_plan(x, dst, ratio):
    """The released rule for one row ``[N, D]``: what is left, and behind what every token stands."""
    count = len(x)
    src = [i for i in range(count) if i not in dst]
    apart = {i: min((float((x[i] - x[j]).square().sum()), j) for j in dst) for i in src}
    unreduced = max(0, int(count * (1 - ratio)) - len(dst))
    left = sorted(src, key=lambda i: -apart[i][0])[:unreduced]
    return sorted([*left, *dst]), [i if i in left or i in dst else apart[i][1] for i in range(count)]


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8, 1.0])
def test_the_farthest_are_left_and_the_nearest_stand_behind_a_destination(ratio):
    x, rule = video(), AsymmetricTokens(ratio, window=(3, 2, 2))
    state = rule.init()
    plan = rule.plan(state, at(), x)
    assert len(state.dst) == 4
    for row in range(6):
        left, behind = slow_plan(x[row], state.dst.tolist(), ratio)
        kept = plan.kept[row].tolist()
        assert sorted(kept) == left
        assert [kept[slot] for slot in plan.owner[row].tolist()] == behind


def test_what_is_left_is_capped_by_the_windows_and_goes_on_bit_for_bit():
    x = video()
    plan = AsymmetricTokens(1.0, window=(3, 2, 2)).plan(AsymmetricTokens().init(), at(), x)
    assert plan.length == 4
    back = plan.give(plan.take(x))
    index = plan.kept[..., None].expand(-1, -1, 5)
    assert torch.equal(back.gather(1, index), x.gather(1, index))
    assert AsymmetricTokens(0.0).plan(AsymmetricTokens().init(), at(), x) is None


def test_a_window_has_frames_and_one_destination():
    dst = destinations((4, 4, 6), (2, 2, 3), rng()).tolist()
    cells = {(i // 24 // 2, i % 24 // 6 // 2, i % 6 // 3) for i in dst}
    assert len(dst) == len(cells) == 8
    assert torch.equal(destinations((1, 5, 7), (1, 2, 2), rng()), destinations((1, 5, 7), 2, rng()))


def test_distances_are_those_of_cdist_in_chunks_and_of_twins_their_mean(monkeypatch):
    x = video(rows=4)
    dst = torch.tensor([0, 7, 20])
    src = others(dst, 48)
    assert src.tolist() == [i for i in range(48) if i not in (0, 7, 20)]
    apart = torch.cdist(x[:, src], x[:, dst]).square()
    monkeypatch.setattr("cache4diffusion.tokens.asymmetric.CHUNK", 7)
    distance, target = nearest(x, dst, src)
    torch.testing.assert_close(distance, apart.amin(-1), atol=1e-4, rtol=1e-4)
    assert torch.equal(target, apart.argmin(-1))
    distance, target = nearest(x, dst, src, torch.tensor([True, False, True, False]))
    mean = (apart[0] + apart[2]) / 2
    for row in (0, 2):
        torch.testing.assert_close(distance[row], mean.amin(-1), atol=1e-4, rtol=1e-4)
    assert torch.equal(target[1], apart[1].argmin(-1))


def test_a_matching_serves_its_steps_whatever_the_ratio():
    path = "query a"
    rule = AsymmetricTokens(ratios={path: (0.5, 0.25, 0.5, 0.5)}, window=(3, 2, 2), renew=3)
    state = rule.init()
    plans = [rule.plan(state, at(step=step, num_steps=4), video(seed=step)) for step in range(4)]
    assert [plan.length for plan in plans] == [24, 36, 24, 24]
    assert torch.equal(plans[0].kept, plans[2].kept) and not torch.equal(plans[0].kept, plans[3].kept)
    assert set(plans[0].kept[0].tolist()) <= set(plans[1].kept[0].tolist())
    assert [plan.flops > 0 for plan in plans] == [True, False, False, True]
    assert rule.plan(rule.init(), at(kind="value", num_steps=4), video()) is None
    with pytest.raises(CalibrationError, match="calibrated for 4 steps, and the run has 8"):
        rule.plan(rule.init(), at(num_steps=8), video())
    wide = dataclasses.replace(rule, resample=True)
    assert wide.plan(wide.init(), at(step=2, num_steps=8), video()).length == 36


def test_a_matching_of_one_step_is_none_that_is_kept():
    rule = AsymmetricTokens(0.5, window=(3, 2, 2))
    state = rule.init()
    for step in range(3):
        kept = rule.plan(state, at(step=step), video(seed=step))
        fresh = rule.plan(rule.init(), at(step=step), video(seed=step))
        assert torch.equal(kept.kept, fresh.kept) and torch.equal(kept.owner, fresh.owner)


def test_redundancy_is_1_where_all_are_alike_and_0_where_none_are():
    same = torch.randn(2, 1, 8, generator=rng()).expand(2, 48, 8)
    assert redundancy(same, (3, 4, 4), (3, 2, 2)) == 1
    noise = torch.randn(2, 4096, 64, generator=rng())
    assert abs(float(redundancy(noise, (1, 64, 64), (1, 64, 64)))) < 0.15, "the one destination is any token"
    smooth = noise[:, :256].repeat_interleave(16, 1)
    assert redundancy(smooth, (16, 16, 16), (1, 1, 16)) == pytest.approx(1, abs=1e-4)
    assert redundancy(noise, (1, 64, 64), (1, 2, 2)) == pytest.approx(
        float(redundancy(3 * noise, (1, 64, 64), (1, 2, 2))), abs=1e-4
    )


# -- attention -------------------------------------------------------------------------------------------------------


def test_equal_keys_that_are_left_out_weigh_less():
    """m equal keys need a bias of log m to count m times; without it, as in the code, the others gain."""
    query, key, value = (torch.randn(1, 1, n, 4, generator=rng(n)) for n in (5, 6, 6))
    key[:, :, 1:4], value[:, :, 1:4] = key[:, :, :1], value[:, :, :1]  # four alike
    left = [0, 4, 5]
    bias = torch.tensor([4.0, 1.0, 1.0]).log()
    exact, short = attend(query, key, value), (query, key[:, :, left], value[:, :, left])
    torch.testing.assert_close(attend(*short, attn_mask=bias.expand(5, 3)), exact)
    assert (attend(*short) - exact).abs().max() > 1e-2


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("mask", [None, "bool", "float", "keys"])
@pytest.mark.parametrize("is_image_last", [False, True])
def test_an_attention_is_the_one_on_what_is_left_whatever_is_beside_it(heads, mask, is_image_last):
    """Of keys and values there may be fewer heads; 3 tokens of text beside 12 of the image."""
    g = rng(1)
    query = torch.randn(2, 2 * heads, 15, 4, generator=g)
    key, value = torch.randn(2, heads, 15, 4, generator=g), torch.randn(2, heads, 15, 6, generator=g)
    given = {"query": query, "key": key, "value": value, "enable_gqa": True}
    if mask == "bool":
        given["attn_mask"] = torch.rand(2, 1, 15, 15, generator=g) > 0.2
        given["attn_mask"] |= torch.eye(15, dtype=torch.bool)
    elif mask == "float":
        given["attn_mask"] = torch.randn(15, 15, generator=g)
    elif mask == "keys":
        given["attn_mask"] = torch.arange(15).lt(14).expand(2, 1, 1, 15)
    start = 3 if is_image_last else 0
    rule = AsymmetricTokens(0.5, window=(1, 2, 2))
    plans = {
        kind: rule.plan(rule.init(), at(1, 3, 4, kind=kind), x[:, :, start : start + 12].flatten(0, 1))
        for kind, x in (("query", query), ("value", value))
    }
    results = []
    counted = count_flops(lambda: results.append(attended(given, plans["query"], plans["value"], start, 12)))
    output, saved = results[0]
    if mask is None and heads == 1:  # the counter takes every head's keys for its own
        assert counted + saved == count_flops(lambda: attend(**given))
    for b in range(2):
        for h in range(2 * heads):
            asked = plans["query"].kept[b * 2 * heads + h].tolist()
            seen = plans["value"].kept[b * heads + h // 2].tolist()
            text = [i for i in range(15) if not start <= i < start + 12]
            keys = [i for i in range(15) if i in text or i - start in seen]
            order = sorted(keys)
            bias = given.get("attn_mask")
            bias = None if bias is None else bias.expand(2, 2 * heads, 15, 15)[b, h]
            for i in range(15):
                token = i
                if i not in text:
                    slot = int(plans["query"].owner[b * 2 * heads + h, i - start])
                    token = asked[slot] + start
                row = None if bias is None else bias[token, order][None, None, None]
                expected = attend(
                    query[b : b + 1, h : h + 1, token : token + 1],
                    key[b : b + 1, h // 2 : h // 2 + 1, order],
                    value[b : b + 1, h // 2 : h // 2 + 1, order],
                    row,
                )
                torch.testing.assert_close(output[b, h, i], expected[0, 0, 0], atol=1e-5, rtol=1e-4)


def test_attention_is_met_however_its_arguments_are_given():
    met = []
    x = torch.randn(1, 1, 3, 2)
    with AttentionReducer(lambda given: met.append(sorted(given)) or given["value"]):
        first, second = attend(x, x, x), attend(x, x, value=x, scale=1.0)
        assert torch.equal(x @ x.mT, torch.matmul(x, x.mT)), "others are as they were"
    assert met == [["key", "query", "value"], ["key", "query", "scale", "value"]]
    assert first is x and second is x


# -- whole runs ------------------------------------------------------------------------------------------------------


def cogvideox():
    torch.manual_seed(0)
    denoiser = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=12,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=5, patch_size=2, max_text_seq_length=3,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    rope = torch.randn(2, 32, 8, generator=rng(5)).cos().unbind(0)
    return denoiser, {
        "hidden_states": torch.randn(2, 2, 4, 8, 8, generator=rng()),
        "encoder_hidden_states": torch.randn(2, 3, 12, generator=rng(1)),
        "image_rotary_emb": rope,
        "return_dict": False,
    }


def hunyuan_video():
    torch.manual_seed(0)
    denoiser = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=False, text_embed_dim=12,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    return denoiser, {
        "hidden_states": torch.randn(2, 4, 2, 8, 8, generator=rng()),
        "encoder_hidden_states": torch.randn(2, 3, 12, generator=rng(1)),
        "encoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "pooled_projections": torch.randn(2, 8, generator=rng(2)),
        "return_dict": False,
    }


def mochi():
    torch.manual_seed(0)
    denoiser = MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=8,
    )  # fmt: skip
    return denoiser, {
        "hidden_states": torch.randn(2, 4, 2, 8, 8, generator=rng()),
        "encoder_hidden_states": torch.randn(2, 3, 16, generator=rng(1)),
        "encoder_attention_mask": torch.ones(2, 3, dtype=torch.bool),
        "return_dict": False,
    }


def joint():
    return flux(1, 2), flux_inputs(2)


ARCHITECTURES = {
    "cogvideox": (cogvideox, 2, 32),
    "hunyuan_video": (hunyuan_video, 2, 32),
    "mochi": (mochi, 4, 32),  # row by row
    "flux": (joint, 3, 12),
    "dit": (lambda: case("dit"), 3, 16),
    "unet": (lambda: case("unet"), 3, 64),
}


def noted(monkeypatch):
    """Every attention that runs on fewer tokens: queries, keys, and what it made."""
    calls = []

    def seen(given, asked, seen_plan, start, count):
        result = attended(given, asked, seen_plan, start, count)
        calls.append((given, asked, seen_plan, start, count, result[0]))
        return result

    monkeypatch.setattr("cache4diffusion.engine.reducing_attention.attended", seen)
    return calls


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_met_where_its_image_is(name, monkeypatch):
    """Tokens of the text are those that do not change where the latent does."""
    make, count, length = ARCHITECTURES[name]
    denoiser, inputs = make()
    calls = noted(monkeypatch)
    _, trace, stats = accelerated(toys.randomise(denoiser), inputs, 2, "asymrnr", window=(2, 2, 2))
    assert trace.strip() == "rr"
    assert not [note for note in stats["notes"] if "observed in a real forward" not in note]
    assert len(calls) == 2 * count
    for given, asked, seen, _, tokens_of_image, output in calls:
        assert tokens_of_image == length
        assert (asked.length, seen.length) == (int(0.6 * length), int(0.7 * length + 1e-9))
        assert output.shape[:3] == given["query"].shape[:3]
    first = [given["value"] for given, *_ in calls[:count]]
    calls.clear()
    latent = next(key for key in ("sample", "hidden_states") if key in inputs)
    accelerated(denoiser, {**inputs, latent: inputs[latent] + 1}, 1, "asymrnr", window=(2, 2, 2))
    before, (after, _, _, start, tokens_of_image, _) = first[0], calls[0]
    changed = (before != after["value"]).any(-1).all(1).all(0)
    assert changed[start : start + tokens_of_image].all()
    assert not changed[:start].any() and not changed[start + tokens_of_image :].any()


@pytest.mark.parametrize("name", ["cogvideox", "hunyuan_video", "mochi", "flux", "unet"])
def test_runs_are_a_forward_with_every_attention_replaced(name, monkeypatch):
    """Plans of all tokens are the plain denoiser; the others are what their attention makes of what is left."""
    make, _, _ = ARCHITECTURES[name]
    denoiser, inputs = make()
    toys.randomise(denoiser)
    plain = sample(denoiser, inputs, 2)
    every = []

    def whole(self, state, where, entering):
        index = torch.arange(entering.shape[1]).expand(len(entering), -1)
        every.append(where.kind)
        return Plan(index, index)

    with monkeypatch.context() as patch:
        patch.setattr(AsymmetricTokens, "plan", whole)
        reached, _, _ = accelerated(denoiser, inputs, 2, "asymrnr")
    assert {*every} == {"query", "value"}
    assert max(differences(reached, plain)) <= 1e-6
    reduced, _, _ = accelerated(denoiser, inputs, 2, "asymrnr", window=(2, 2, 2))
    assert 1e-5 < max(differences(reduced, plain)) < 1


def test_queries_alone_and_values_alone():
    denoiser, inputs = joint()
    plain = sample(denoiser, inputs, 1)
    none = {"query_ratios": (), "query_tiers": (), "value_ratios": (), "value_tiers": ()}
    found = []
    for part in ("query", "value"):
        settings = {**none, f"{part}_ratios": (0.5,), f"{part}_tiers": (0,)}
        out, trace, _ = accelerated(denoiser, inputs, 1, "asymrnr", window=(1, 2, 2), **settings)
        assert trace.of()[0].reduced.saved > 0
        found.append(out)
    assert differences(*found)[0] > 1e-4
    assert all(differences(out, plain)[0] > 1e-5 for out in found)


def test_both_halves_of_guidance_follow_one_plan_head_by_head(monkeypatch):
    denoiser, inputs = twins_of("dit")
    calls = noted(monkeypatch)
    accelerated(denoiser, inputs, 1, "asymrnr", window=(1, 2, 2))
    assert calls
    for _, asked, seen, *_ in calls:
        for plan in (asked, seen):
            kept, owner = (index.unflatten(0, (2, -1)) for index in (plan.kept, plan.owner))
            assert torch.equal(kept[0], kept[1]) and torch.equal(owner[0], owner[1])
            assert not torch.equal(kept[0, 0], kept[0, 1]), "heads have plans of their own"


def test_halves_of_guidance_in_several_calls_follow_the_first_ones_plan(monkeypatch):
    """Mochi attends to one row after the other; rows that are no halves have plans of their own."""
    denoiser, inputs = mochi()
    calls = noted(monkeypatch)
    for is_twin in (True, False):
        latent = inputs["hidden_states"][:1].repeat(2, 1, 1, 1, 1) if is_twin else inputs["hidden_states"]
        calls.clear()
        accelerated(denoiser, {**inputs, "hidden_states": latent}, 1, "asymrnr", window=(2, 2, 2))
        for one, other in zip(calls[::2], calls[1::2], strict=True):
            for first, second in zip(one[1:3], other[1:3], strict=True):
                assert torch.equal(first.kept, second.kept) == is_twin
                assert torch.equal(first.owner, second.owner) == is_twin


def test_flops_are_those_that_are_counted_in_joint_attention():
    denoiser, inputs = joint()
    call = {**inputs, "timestep": torch.tensor([0.5, 0.5])}
    with c4d.accelerate(denoiser, "asymrnr", window=(1, 2, 2)) as handle, torch.no_grad():
        with handle.run(num_steps=1):
            denoiser(**call)
        with handle.run(num_steps=2):
            counted = [count_flops(lambda: denoiser(**call)) for _ in range(2)]
            expected = [step_cost(handle._engines[0]).of(record) for record in handle.trace.of()]
    assert expected == counted
    assert counted[1] < count_flops(lambda: denoiser(**call))


def test_attention_that_is_no_fused_call_is_noted_and_left_whole():
    denoiser, inputs = case("dit")
    for block in denoiser.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    plain = sample(denoiser, inputs, 1)
    reached, _, stats = accelerated(denoiser, inputs, 1, "asymrnr")
    assert differences(reached, plain) == [0.0]
    assert any("was met in transformer_blocks.0.attn1" in note for note in stats["notes"])


def test_compiled_blocks_are_refused():
    denoiser, _ = joint()
    for block in denoiser.transformer_blocks:
        block.compile(backend="eager")
    with pytest.raises(CompositionError, match="blocks must not be compiled"):
        accelerated(denoiser, flux_inputs(2), 1, "asymrnr")


# -- its calibration -------------------------------------------------------------------------------------------------


def test_tiers_are_equal_parts_from_the_least_to_the_most():
    assert tiered({"a": [0.0, 0.05, 0.1], "b": [0.55, 1.0]}) == {"a": [0, 0, 1], "b": [5, 9]}
    assert tiered({"a": [0.3, 0.3]}) == {"a": [0, 0]}


def test_ratios_follow_tiers_and_the_largest_wins():
    tables = {"query a": [0.0, 0.65, 0.75, 1.0], "value a": [1.0, 0.0, 0.5, 0.85]}
    made = Calibration.by_hand("asymrnr", 4, {name: torch.tensor(values) for name, values in tables.items()})
    rule = c4d.method("asymrnr", calibration=made, query_ratios=(0.8, 0.4), query_tiers=(7, 6)).compose().tokens
    assert rule.ratios == {"query a": (0.0, 0.4, 0.8, 0.8), "value a": (0.3, 0.0, 0.0, 0.3)}
    assert rule.needs_num_steps


def test_what_is_measured_is_the_redundancy_of_queries_and_values_as_they_meet(monkeypatch):
    denoiser, inputs = joint()
    met = []
    found = torch.nn.functional.scaled_dot_product_attention
    statistic = Redundancies(window=(1, 2, 2))
    with Observer(denoiser, statistic) as observer, observer.run(num_steps=2):
        outputs = sample(denoiser, inputs, 2)
    assert differences(outputs, sample(denoiser, inputs, 2)) == [0.0, 0.0]
    (entry,) = observer.entries().values()
    assert entry.fit.keys() == {
        f"{kind} {path}"
        for kind in ("query", "value")
        for path in ("transformer_blocks.0.attn", *(f"single_transformer_blocks.{i}.attn" for i in range(2)))
    }

    def noting(given):
        met.append(given)
        return found(**given)

    attn = denoiser.transformer_blocks[0].attn
    run = attn.forward

    def forward(*args, **kwargs):
        with AttentionReducer(noting):
            return run(*args, **kwargs)

    monkeypatch.setattr(attn, "forward", forward)
    sample(denoiser, inputs, 2)
    for kind, name in (("query", "query"), ("value", "value")):
        images = [given[name][:, :, -12:].flatten(0, 1) for given in met]
        expected = torch.stack([redundancy(image, (1, 3, 4), (1, 2, 2)) for image in images])
        torch.testing.assert_close(entry.fit[f"{kind} transformer_blocks.0.attn"].float(), expected)


def test_a_calibrated_run_leaves_out_where_and_when_its_tiers_say(monkeypatch):
    denoiser, inputs = joint()
    paths = ["transformer_blocks.0.attn", *(f"single_transformer_blocks.{i}.attn" for i in range(2))]
    tables = {f"query {path}": torch.tensor([float(i), 0.0, 2.0]) for i, path in enumerate(paths)}
    made = Calibration.by_hand("asymrnr", 3, tables | {f"value {path}": torch.zeros(3) for path in paths})
    calls = noted(monkeypatch)
    settings = {"query_ratios": (0.5,), "query_tiers": (4,), "window": (1, 2, 2)}
    _, trace, _ = accelerated(denoiser, inputs, 3, "asymrnr", calibration=made, **settings)
    assert [asked is not None for _, asked, *_ in calls] == [False, True, True, False, False, False, True, True, True]
    assert all(seen is None for _, _, seen, *_ in calls)
    assert trace.strip() == "rrr"


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (AsymmetricTokens, {"ratio": 1.5}),
        (AsymmetricTokens, {"value_ratio": -0.5}),
        (AsymmetricTokens, {"window": (2, 2)}),
        (AsymmetricTokens, {"renew": 0}),
        (ReducedAttention, {"kinds": ("ffn",)}),
        (lambda **settings: c4d.method("asymrnr", **settings), {"query_tiers": (6,)}),
        (lambda **settings: c4d.method("asymrnr", **settings), {"query_tiers": (6, 10)}),
        (lambda **settings: c4d.method("asymrnr", **settings), {"value_ratios": (0.3, 1.5), "value_tiers": (7, 8)}),
    ],
)
def test_bad_settings_are_refused(make, settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        make(**settings)


def test_rules_of_other_methods_may_reduce_within_attention_but_those_that_rank():
    denoiser, inputs = joint()
    composition = c4d.Composition(ReducedAttention(), Throughout(), tokens=MergeTokens(form="pick"))
    _, trace, _ = accelerated(denoiser, inputs, 1, composition)
    assert trace.of()[0].reduced.saved > 0
    with pytest.raises(CompositionError, match="ranks the tokens of a block"):
        c4d.Composition(ReducedAttention(), Throughout(), tokens=RankedTokens())
