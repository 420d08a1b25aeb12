"""Methods that compute fewer tokens within a part: plans, and runs against slow references written from the cards."""

import dataclasses
import itertools
import weakref

import diffusers
import pytest
import torch
from reduction_cases import Waits, case, place, rng, tokens, twins_of, unet_of_two_levels, with_streams
from slow_reductions import SlowMerging, cosine, important, matched, merged_attention

import cache4diffusion as c4d
import toys
from cache4diffusion.cost import step_cost
from cache4diffusion.engine.reducing import ReductionDriver
from cache4diffusion.errors import AnatomyError, CompositionError, SettingError
from cache4diffusion.gates import FixedInterval, Throughout
from cache4diffusion.measure.cost import count_flops
from cache4diffusion.predictors import Taylor
from cache4diffusion.sites import Parts, Reduced
from cache4diffusion.tokens import (
    TOKEN_RULES,
    KeyStride,
    MergeTokens,
    Plan,
    Ranking,
    Reduction,
    TopScore,
)
from cache4diffusion.tokens.merging import destinations, match, merge_plan
from cache4diffusion.zoo import TINY
from ranks import on_ranks
from simulated import can_register, register
from small_denoisers import (
    accelerated,
    differences,
    dit,
    flux,
    flux_inputs,
    sample,
    unet_inputs,
)

STEPS = 4
RULES = [name for name, rule in TOKEN_RULES.items() if isinstance(rule(), Reduction)]
methods = pytest.mark.parametrize("name", toys.REDUCTIONS)
kinds = pytest.mark.parametrize("kind", ["unet", "dit", pytest.param("pixart", marks=pytest.mark.slow)])


# -- plans -----------------------------------------------------------------------------------------------------------


def test_matching_is_the_slow_one():
    x, where = tokens(5, 7), place(5, 7)
    dst, rows = matched(x, 5, 7, 2, "0/0/a")
    plan = MergeTokens(0.4).plan(MergeTokens().init(), where, x)
    r = int(0.4 * 35)
    assert plan.length == 35 - r
    for row, pairs in enumerate(rows):
        gone = {source: target for _, source, target in pairs[:r]}
        kept = plan.kept[row].tolist()
        assert sorted(kept) == [i for i in range(35) if i not in gone]
        assert set(dst) <= set(kept)
        assert [kept[j] for j in plan.owner[row].tolist()] == [gone.get(i, i) for i in range(35)]


@pytest.mark.parametrize("form", ["pick", "mean", "mlerp"])
def test_reducing_and_restoring_is_the_slow_one(form):
    x = tokens()
    _, rows = matched(x, 4, 6, 2, "0/0/a")
    plan = MergeTokens(0.5, form=form).plan(MergeTokens().init(), place(), x)
    out = plan.give(plan.take(x) ** 2)
    for row in range(2):
        slow = merged_attention(lambda short: short**2, x[row], rows[row], 12, form)
        torch.testing.assert_close(out[row], slow)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75, 1.0])
def test_the_length_is_exactly_n_minus_r(ratio):
    plan = MergeTokens(ratio).plan(MergeTokens().init(), place(), tokens())
    length = 24 if plan is None else plan.length
    assert length == 24 - min(int(ratio * 24), 18)


@pytest.mark.parametrize("form", ["pick", "mean", "mlerp"])
def test_equal_tokens_survive_a_round_trip(form):
    """unmerge(merge(x)) = x where all merged tokens equal their destination; so for MLERP."""
    x = torch.randn(2, 1, 5, generator=rng()).expand(2, 24, 5)
    plan = MergeTokens(0.75, form=form).plan(MergeTokens().init(), place(), x)
    torch.testing.assert_close(plan.give(plan.take(x)), x)


def test_merging_keeps_sums_and_pruning_keeps_destinations_bit_for_bit():
    x = tokens()
    plan = MergeTokens(0.6).plan(MergeTokens().init(), place(), x)
    sizes = torch.zeros(2, plan.length).scatter_add(1, plan.owner, torch.ones(2, 24))
    torch.testing.assert_close((plan.take(x) * sizes[..., None]).sum(1), x.sum(1))
    pruned = MergeTokens(0.6, form="pick").plan(MergeTokens().init(), place(), x)
    assert torch.equal(pruned.take(x), x.gather(1, pruned.kept[..., None].expand(-1, -1, 5)))


def test_the_norm_of_mlerp_is_the_largest_of_its_tokens():
    x = tokens()
    plan = MergeTokens(0.7, form="mlerp").plan(MergeTokens().init(), place(), x)
    norms = plan.take(x).norm(dim=-1)
    for row in range(2):
        for slot in range(plan.length):
            members = x[row, plan.owner[row] == slot]
            torch.testing.assert_close(norms[row, slot], members.norm(dim=-1).max())


def test_a_plan_of_all_tokens_changes_nothing():
    x, every = tokens(), torch.arange(24).expand(2, -1)
    for form in ("pick", "mean", "mlerp"):
        plan = Plan(every, every, form)
        torch.testing.assert_close(plan.give(plan.take(x)), x)


def ranked(rule, where, x):
    """A state in which the rule has seen what it goes by, if it goes by the attention of a full step."""
    state = rule.init()
    if isinstance(rule, Ranking):
        rule.rank(state, where, x, (x @ x.mT).softmax(-1))
    return state


@pytest.mark.parametrize("name", RULES)
def test_rules_keep_the_contract(name):
    rule, x = TOKEN_RULES[name](), tokens()
    before, state = x.clone(), ranked(rule, place(), x)
    plan = rule.plan(state, place(), x)
    assert isinstance(plan, Plan)
    assert torch.equal(x, before), "nothing is written to"
    assert plan.take(x).shape == (2, plan.length, 5)
    assert plan.length < 24
    again = rule.plan(ranked(rule, place(), x), place(), x)
    assert torch.equal(plan.kept, again.kept), "same seed, same plan"
    assert all(isinstance(tensor, torch.Tensor) for tensor in rule.tensors(state))
    if plan.owner is not None:
        slots = torch.arange(plan.length).expand(2, -1)
        assert torch.equal(plan.owner.gather(1, plan.kept), slots), "a kept token owns its slot"


@pytest.mark.parametrize("name", RULES)
def test_shapes_are_the_same_for_other_data_and_twins_have_one_plan(name):
    rule, shapes = TOKEN_RULES[name](), set()
    for seed in range(3):
        twins = torch.ones(2, dtype=torch.bool)
        where, x = place(twins=twins), tokens(seed=seed)
        plan = rule.plan(ranked(rule, where, x), where, x)
        shapes.add(plan.length)
        assert torch.equal(plan.kept[0], plan.kept[1])
        assert plan.owner is None or torch.equal(plan.owner[0], plan.owner[1])
    assert len(shapes) == 1


def test_permuting_what_enters_within_windows_permutes_the_plan():
    """The matching sees tokens by their place in the grid only to choose destinations."""
    x, dst = tokens(), destinations((1, 4, 6), 2, None).expand(2, -1)
    src = torch.tensor([i for i in range(24) if i not in dst[0].tolist()]).expand(2, -1)
    order = src[:, torch.randperm(18, generator=rng(3))]
    plain, shuffled = match(x, dst, src, None), match(x, dst, order, None)
    where = [src[0].tolist().index(i) for i in order[0].tolist()]
    assert torch.equal(shuffled[1], plain[1][:, where])
    plan = merge_plan(dst, src, plain[1], torch.zeros(2, 0, dtype=torch.long), "mean")
    assert plan.length == 24


@pytest.mark.parametrize(("grid", "window", "count"), [((1, 4, 6), 2, 6), ((1, 5, 7), 2, 6), ((3, 4, 4), 4, 3)])
def test_each_window_has_one_destination(grid, window, count):
    _, height, width = grid
    for generator in (None, rng()):
        dst = destinations(grid, window, generator).tolist()
        assert len(dst) == count
        assert dst == sorted(set(dst))
        cells = {(i // (height * width), i // width % height // window, i % width // window) for i in dst}
        assert len(cells) == count


def job_plans(names):
    device, found = register(), []
    for name in names:
        rule, x = TOKEN_RULES[name](), tokens(8, 8).to(device)
        plan = rule.plan(ranked(rule, place(8, 8), x), place(8, 8), x)
        assert all(tensor.device.type == device.type for tensor in plan.tensors())
        found.append([plan.kept.cpu(), plan.give(plan.take(x)).cpu()])
    return found


@pytest.mark.slow
@pytest.mark.skipif(not can_register(), reason="this PyTorch takes no devices from Python")
def test_plans_are_the_same_on_a_device_that_nobody_has_heard_of(tmp_path):
    """Same seed, same plan: what is drawn is drawn on the host."""
    (found,) = on_ranks(job_plans, RULES, tmp_path=tmp_path, count=1)
    for name, (kept, restored) in zip(RULES, found, strict=True):
        rule, x = TOKEN_RULES[name](), tokens(8, 8)
        plan = rule.plan(ranked(rule, place(8, 8), x), place(8, 8), x)
        assert torch.equal(kept, plan.kept), name
        torch.testing.assert_close(restored, plan.give(plan.take(x)))


# -- plans that are kept ---------------------------------------------------------------------------------------------


def test_a_kept_plan_serves_until_it_is_renewed():
    rule, state = MergeTokens(0.5, renew=3), MergeTokens().init()
    plans = [rule.plan(state, place(step=step), tokens(seed=step)) for step in range(7)]
    assert [plans[i] is plans[i - 1] for i in range(1, 7)] == [True, True, False, True, True, False]
    listed = MergeTokens(0.5, renew_at=(0, 2))
    state = listed.init()
    made = [listed.plan(state, place(step=step), tokens(seed=step)) for step in range(4)]
    assert [made[i] is made[i - 1] for i in range(1, 4)] == [True, False, True]


@pytest.mark.parametrize(("threshold", "merged"), [(1.0, None), (-1.0, 18), (0.9999, 0)])
def test_thresholds_at_their_ends(threshold, merged):
    plan = MergeTokens(threshold=threshold).plan(MergeTokens().init(), place(), tokens())
    assert (None if plan is None else 24 - plan.length) == merged


def test_of_a_batch_nothing_below_the_threshold_is_merged_but_in_the_released_code():
    x = torch.cat([tokens(batch=1), torch.randn(1, 1, 5, generator=rng(1)).expand(1, 24, 5)])  # all alike
    ours, theirs = (
        MergeTokens(threshold=0.8, variant=variant).plan(MergeTokens().init(), place(), x)
        for variant in ("ours", "official")
    )
    assert theirs.length == 6
    reaching = [sum(value >= 0.8 for value, _, _ in row) for row in matched(x, 4, 6, 2, "0/0/a")[1]]
    assert reaching[1] == 18 > reaching[0]
    assert 24 - ours.length == reaching[0]


def test_a_bucket_rounds_down():
    whole = MergeTokens(threshold=0.3).plan(MergeTokens().init(), place(), tokens())
    rounded = MergeTokens(threshold=0.3, bucket=4).plan(MergeTokens().init(), place(), tokens())
    assert 24 - rounded.length == (24 - whole.length) // 4 * 4


# -- important tokens ------------------------------------------------------------------------------------------------


def of_signal(signal, x=None, step=0, **settings):
    rule, x = MergeTokens(**{"ratio": 0.5, "pool": 1.4, **settings}), tokens() if x is None else x
    return rule.plan(rule.init(), dataclasses.replace(place(step=step, batch=len(x)), signal=signal), x)


def went_on_as(plan, row):
    """As which token every token goes on."""
    kept = plan.kept[row].tolist()
    return [kept[slot] for slot in plan.owner[row].tolist()]


@pytest.mark.parametrize("pool", [0.2, 1.0, 1.4, 9.0])
@pytest.mark.parametrize("levels", [24, 3, 1])
def test_what_is_important_is_merged_as_in_the_released_code(pool, levels):
    """Also where few levels of importance differ, or none."""
    signal = (torch.rand(2, 24, generator=rng(9)) * levels).floor()
    x = tokens()
    plan = of_signal(signal, x, pool=pool)
    assert plan.length == 24 - 12
    for row in range(2):
        dst, behind = important(x[row], signal[row], 12, pool, "0/0/a/pool", 6)
        assert sorted(plan.kept[row, -6:].tolist()) == dst
        assert went_on_as(plan, row) == behind


def test_important_tokens_are_merged_last_and_hold_the_destinations():
    """Of 24 tokens 12 are left; 16 are important, and all 8 others merged. With a pool of 1, none of these 12 is."""
    signal = torch.rand(2, 24, generator=rng(9))
    plan, strict = of_signal(signal), of_signal(signal, pool=1.0)
    for row in range(2):
        order = signal[row].sort(descending=True).indices.tolist()
        kept = plan.kept[row].tolist()
        assert set(kept) <= set(order[:16])
        assert {target for i, target in enumerate(went_on_as(plan, row)) if target != i} <= set(order[:16])
        assert set(strict.kept[row].tolist()) == set(order[:12])


def test_with_as_many_important_tokens_as_destinations_they_are_these():
    signal = torch.rand(2, 24, generator=rng(9))
    plan = of_signal(signal, pool=0.5)
    for row in range(2):
        assert set(plan.kept[row, -6:].tolist()) == set(signal[row].topk(6).indices.tolist())


def test_where_all_tokens_matter_as_much_it_is_tome_with_destinations_from_anywhere():
    """Nothing about the order of tokens decides: over some steps, all are destinations."""
    x, found = tokens(), set()
    for step in range(40):
        plan = of_signal(torch.zeros(2, 24), x, step)
        for row in range(2):
            dst = plan.kept[row, -6:].tolist()
            found |= {*dst}
            nearest = {i: max((cosine(x[row, i], x[row, j]), j) for j in dst) for i in range(24) if i not in dst}
            merged = sorted(nearest, key=lambda i: -nearest[i][0])[:12]
            assert went_on_as(plan, row) == [nearest[i][1] if i in merged else i for i in range(24)]
    assert found == {*range(24)}


def test_without_a_signal_it_is_tome():
    plain, pooled = (MergeTokens(0.5, pool=pool).plan(MergeTokens().init(), place(), tokens()) for pool in (0.0, 1.4))
    assert torch.equal(plain.kept, pooled.kept)
    assert torch.equal(plain.owner, pooled.owner)


def test_rows_that_are_no_halves_know_nothing_of_importance():
    x, signal = tokens(batch=4), torch.rand(4, 24, generator=rng(9))
    twins = torch.tensor([True, False, True, False])
    where = dataclasses.replace(place(batch=4, twins=twins), signal=signal)
    rule = MergeTokens(0.5, pool=1.4)
    plan, plain = rule.plan(rule.init(), where, x), MergeTokens(0.5).plan(MergeTokens().init(), place(batch=4), x)
    for row in (1, 3):
        assert torch.equal(plan.kept[row], plain.kept[row])
        assert torch.equal(plan.owner[row], plain.owner[row])
    assert not torch.equal(plan.kept[0], plain.kept[0])


def test_importance_is_the_magnitude_of_guidance_at_the_step_before(monkeypatch):
    denoiser, inputs = twins_of("unet")
    inputs = {**inputs, "timestep": torch.tensor([500, 500])}
    signals, plan = [], MergeTokens.plan

    def noted(rule, state, where, entering):
        signals.append(where.signal)
        return plan(rule, state, where, entering)

    monkeypatch.setattr(MergeTokens, "plan", noted)
    with c4d.accelerate(denoiser, "importance-merging") as handle, handle.run(num_steps=2), torch.no_grad():
        (out,) = denoiser(**inputs)
        blocks = len(signals)
        denoiser(**inputs)
        assert not handle.stats["notes"]
    assert all(signal is None for signal in signals[:blocks]), "nothing is known at the first step"
    expected = (out[1] - out[0]).abs().mean(0).flatten()
    for signal in signals[blocks:]:
        torch.testing.assert_close(signal, expected.expand(2, -1))


def test_a_learned_variance_is_not_important(monkeypatch):
    """Channels beyond the latent's are not what guidance subtracts."""
    denoiser, inputs = twins_of("dit")
    denoiser = toys.randomise(diffusers.DiTTransformer2DModel.from_config(denoiser.config, out_channels=8).eval())
    inputs, signals, plan = {**inputs, "timestep": torch.tensor([500, 500])}, [], MergeTokens.plan

    def noted(rule, state, where, entering):
        signals.append(where.signal)
        return plan(rule, state, where, entering)

    monkeypatch.setattr(MergeTokens, "plan", noted)
    with c4d.accelerate(denoiser, "importance-merging") as handle, handle.run(num_steps=2), torch.no_grad():
        (out,) = denoiser(**inputs)
        denoiser(**inputs)
    assert out.shape[1] == 8
    apart = (out[1] - out[0])[:4].abs().mean(0)
    assert apart.max() > 1e-3
    torch.testing.assert_close(signals[-1][0], torch.nn.functional.avg_pool2d(apart[None], 2).flatten())


def video_unet():
    """Blocks see frames as rows."""
    torch.manual_seed(1)
    return diffusers.UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


@pytest.mark.parametrize("name", ["tome", "toma", "importance-merging"])
def test_both_halves_of_a_video_follow_one_plan_frame_by_frame(name, monkeypatch):
    plans, made = [], ReductionDriver._made
    monkeypatch.setattr(ReductionDriver, "_made", lambda *args: plans.append(made(*args)) or plans[-1])
    video = torch.randn(1, 4, 3, 8, 8, generator=rng())
    text, denoiser = torch.randn(2, 5, 12, generator=rng(1)), video_unet()
    with c4d.accelerate(denoiser, name) as handle, handle.run(num_steps=2), torch.no_grad():
        for time in (900, 500):
            denoiser(video.repeat(2, 1, 1, 1, 1), torch.tensor([time, time]), text)
        notes = handle.stats["notes"]
    plans = [plan for plan in plans if plan is not None]
    assert plans
    for plan in plans:
        assert plan.kept.shape[0] == 6
        for tensor in plan.tensors():
            one, other = tensor.unflatten(0, (2, 3))
            assert torch.equal(one, other)
        assert not torch.equal(plan.kept[0], plan.kept[1]), "frames have plans of their own"
    is_video = any("the output is no image" in note for note in notes)
    assert is_video == (name == "importance-merging")


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("is_known", [False, True])
def test_making_a_plan_waits_for_nothing(name, is_known, monkeypatch):
    """Tensors without values give none to the host; and what was made there is not waited for, where that is safe."""
    with_streams(monkeypatch)
    rule, x = TOKEN_RULES[name](), tokens().to("meta")
    rule = dataclasses.replace(rule, pool=1.4) if name == "merge" else rule
    where = place(twins=torch.ones(2, dtype=torch.bool, device="meta"))
    where = dataclasses.replace(where, signal=torch.empty(2, 24, device="meta") if is_known else None)
    with Waits() as waits:
        plan = rule.plan(ranked(rule, where, x), where, x)
    assert plan.take(x).device.type == "meta"
    assert waits.copies or isinstance(rule, Ranking)
    assert not waits.seen


# -- whole runs ------------------------------------------------------------------------------------------------------

SLOW = {
    "tome": ({"ratio": 0.5}, lambda rows: 8, ["mean"] * 3, lambda step: True),
    "tofu": ({"ratio": 0.4}, lambda rows: 6, ["pick", "pick", "mlerp"], lambda step: True),
    "ca-tome": (
        {"threshold": 0.3, "renew": 3},
        lambda rows: min(sum(value >= 0.3 for value, _, _ in row) for row in rows),
        ["mean"] * 3,
        lambda step: step % 3 == 0,
    ),
}


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("are_twins", [False, True])
def test_runs_are_the_slow_references(name, are_twins):
    settings, count, forms, renewed = SLOW[name]
    denoiser, inputs = twins_of("dit") if are_twins else case("dit")
    slow = SlowMerging(denoiser, (4, 4), count, forms, renewed, are_twins)
    latent = inputs["hidden_states"]

    def run(call):
        outputs, x = [], latent
        with torch.no_grad():
            for i in range(5):
                (out,) = call(**{**inputs, "hidden_states": x, "timestep": torch.full((2,), 900 - 100 * i)})
                outputs.append(out.clone())
                x = x - (out.mean(0, keepdim=True) if are_twins else out) / 5
        return outputs

    expected = run(slow)
    with c4d.accelerate(denoiser, name, **settings) as handle, handle.run(num_steps=5):
        reached = run(denoiser)
    assert handle.trace.strip() == "rrrrr"
    assert max(differences(reached, expected)) <= 1e-5


def test_todo_is_attention_to_strided_keys():
    """All queries; keys at ``floor(i * h / (h // f))`` per axis."""
    denoiser, inputs = case("dit")
    attn = denoiser.transformer_blocks[0].attn1
    x = torch.randn(2, 16, 32, generator=rng())
    plan = KeyStride(3).plan(KeyStride().init(), place(7, 8), torch.zeros(2, 56, 1))
    assert plan.kept[0].tolist() == [8 * i + j for i in (0, 3) for j in (0, 4)]
    seen = []
    with c4d.accelerate(denoiser, "todo") as handle, handle.run(num_steps=1), torch.no_grad():
        hook = denoiser.transformer_blocks[0].attn1.to_k.register_forward_hook(lambda m, a, o: seen.append(a[0]))
        whole = denoiser.transformer_blocks[0].attn1.to_q.register_forward_hook(lambda m, a, o: seen.append(a[0]))
        denoiser(**{**inputs, "timestep": torch.tensor([5, 5])})
    hook.remove()
    whole.remove()
    queries, keys = sorted(seen, key=lambda t: -t.shape[1])
    assert torch.equal(keys, queries[:, [0, 2, 8, 10]])
    assert attn(x).shape == x.shape


def test_todo_is_exact_on_an_image_that_is_constant_over_cells():
    attn = dit().transformer_blocks[0].attn1
    cells = torch.randn(2, 2, 2, 32, generator=rng())
    x = cells.repeat_interleave(2, 1).repeat_interleave(2, 2).reshape(2, 16, 32)
    plan = KeyStride(2).plan(KeyStride().init(), place(4, 4), x)
    torch.testing.assert_close(attn(x, encoder_hidden_states=plan.take(x)), attn(x))


@pytest.fixture(autouse=True)
def _few_steps(recwarn):
    """Reductions gain as much in few steps: nobody is warned of them."""
    yield
    assert not [str(warning.message) for warning in recwarn if "little to cache" in str(warning.message)]


@methods
@kinds
def test_off_is_off_bit_for_bit(name, kind):
    denoiser, inputs = case(kind)
    settings = c4d.METHODS[name].info.off
    reached, trace, _ = accelerated(denoiser, inputs, STEPS, name, **settings)
    assert trace.strip() == "FFFF"
    assert differences(reached, sample(denoiser, inputs, STEPS)) == [0.0] * STEPS
    assert c4d.method(name, **settings).is_off()


@methods
@kinds
def test_runs_are_reduced_repeatable_and_leave_nothing(name, kind):
    denoiser, inputs = case(kind)
    plain = sample(denoiser, inputs, STEPS)
    before = {path: set(vars(module)) for path, module in denoiser.named_modules()}
    handle = c4d.accelerate(denoiser, name)
    runs = []
    for _ in range(2):
        with handle.run(num_steps=STEPS):
            runs.append(sample(denoiser, inputs, STEPS))
        assert handle.memory["held"] == 0
    assert handle.stats["strip"] == ("Frrr" if name == "at-edm" else "rrrr")
    assert differences(*runs) == [0.0] * STEPS
    assert 0 < max(differences(runs[0], plain)) < 1
    assert [(out.shape, out.dtype) for out in runs[0]] == [(out.shape, out.dtype) for out in plain]
    handle.remove()
    assert {path: set(vars(module)) for path, module in denoiser.named_modules()} == before
    assert differences(sample(denoiser, inputs, STEPS), plain) == [0.0] * STEPS


@methods
@pytest.mark.parametrize("is_off", [False, True])
def test_what_enters_a_block_is_let_go_of_as_the_host_does(name, is_off):
    """Held to the end of a call, the streams of all blocks would take the memory of a cache."""
    denoiser, inputs = case("dit")
    entered, alive = [], []

    def entering(module, args):
        alive.append(sum(stream() is not None for stream in entered))
        entered.append(weakref.ref(args[0]))

    hooks = [block.register_forward_pre_hook(entering) for block in denoiser.transformer_blocks[:2]]
    accelerated(denoiser, inputs, 2, name, **(c4d.METHODS[name].info.off if is_off else {}))
    for hook in hooks:
        hook.remove()
    assert len(alive) >= 4
    assert set(alive) == {0}


@methods
def test_half_precision_keeps_its_dtype(name):
    denoiser, inputs = case("dit")
    inputs = {**inputs, "hidden_states": inputs["hidden_states"].bfloat16()}
    reached, _, _ = accelerated(denoiser.bfloat16(), inputs, 2, name)
    assert all(out.dtype == torch.bfloat16 and out.isfinite().all() for out in reached)


@pytest.mark.parametrize("name", sorted({*toys.REDUCTIONS} - {"asymrnr"}))  # of which there are several per block
def test_both_halves_of_guidance_follow_one_plan(name, monkeypatch):
    plans, made = [], ReductionDriver._made
    monkeypatch.setattr(ReductionDriver, "_made", lambda *args: plans.append(made(*args)) or plans[-1])
    accelerated(*twins_of("unet"), 2, name, speed=0.0)
    assert any(plan is not None for plan in plans)
    for plan in plans:
        if plan is not None:
            assert all(torch.equal(tensor[0], tensor[1]) for tensor in plan.tensors())


@methods
def test_rows_that_are_no_halves_do_not_meet(name):
    settings = {"threshold": -1.0} if name == "ca-tome" else {}  # whose number of tokens is the batch's
    denoiser, inputs = case("dit")
    together, _, _ = accelerated(denoiser, inputs, 2, name, **settings)
    for row in range(2):
        one = {key: value[row : row + 1] if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        alone, _, _ = accelerated(denoiser, one, 2, name, **settings)
        assert max(differences([out[row : row + 1] for out in together], alone)) <= 1e-5


@methods
def test_text_is_never_touched(name):
    """What enters cross-attention as keys is what the host gave."""
    denoiser, inputs = case("unet")
    seen = []
    modules = [module for path, module in denoiser.named_modules() if path.endswith("attn2.to_k")]
    hooks = [module.register_forward_hook(lambda m, args, out: seen.append(args[0])) for module in modules]
    _, trace, _ = accelerated(denoiser, inputs, 2, name)
    for hook in hooks:
        hook.remove()
    assert trace.strip().endswith("r")
    assert len(seen) >= 2 * len(modules)
    assert all(torch.equal(text, inputs["encoder_hidden_states"]) for text in seen[-len(modules) :])


@methods
def test_flops_are_those_that_are_counted_while_it_runs(name):
    denoiser, inputs = case("unet")
    call = {**inputs, "timestep": torch.tensor([500, 500])}
    with c4d.accelerate(denoiser, name) as handle, torch.no_grad():
        with handle.run(num_steps=1):
            denoiser(**call)  # which looks at the denoiser as well
        with handle.run(num_steps=3):
            counted = [count_flops(lambda: denoiser(**call)) for _ in range(2)]
            expected = [step_cost(handle._engines[0]).of(record) for record in handle.trace.of()]
            assert expected == counted
            reduced = handle.trace.of()[1].reduced
    full = count_flops(lambda: denoiser(**call))
    assert counted[1] - reduced.planning < full


def test_flops_are_those_of_the_newest_runs_batch():
    denoiser, inputs = case("unet", 4)
    with c4d.accelerate(denoiser, "tome", merge_cross_attn=True) as handle, torch.no_grad():
        for rows in (2, 4):
            call = {name: value[:rows] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
            with handle.run(num_steps=1):
                counted = count_flops(lambda call=call: denoiser(**call, timestep=torch.tensor(500)))
    assert step_cost(handle._engines[0]).of(handle.trace.of()[0]) == counted


@pytest.mark.slow
def test_no_two_methods_are_the_same_by_accident():
    """At the last of three steps: importance is not known at the first."""
    denoiser, inputs = twins_of("unet")
    more = {"at-edm": {"early": 0.0}, "ca-tome": {"threshold": 0.3}}
    reached = {
        name: accelerated(denoiser, inputs, 3, name, speed=0.0, **more.get(name, {}))[0] for name in toys.REDUCTIONS
    }
    apart = {
        (one, other): differences(reached[one], reached[other])[-1]
        for one, other in itertools.combinations(toys.REDUCTIONS, 2)
    }
    assert not {pair: value for pair, value in apart.items() if not value > 1e-4}


def test_coarser_levels_are_left_alone():
    """tomesd's max_downsample, beside the finest level with attention."""
    given, made = [], ReductionDriver._made

    def noted(self, context, block, entering):
        plan = made(self, context, block, entering)
        given.append((entering.shape[1], plan is not None))
        return plan

    denoiser = unet_of_two_levels()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReductionDriver, "_made", noted)
        for down in (1.0, 2.0):
            given.clear()
            accelerated(denoiser, unet_inputs(2), 1, "tome", max_downsample=down)
            assert {count for count, _ in given} == {64, 16}
            assert all(is_reduced == (count == 64 or down == 2) for count, is_reduced in given)


def test_parts_of_a_block_follow_its_plan():
    denoiser, inputs = case("dit")
    _, trace, _ = accelerated(denoiser, inputs, 1, "tome", merge_ffn=True)
    parts = [path for path, short, count in trace.of()[0].reduced.parts if (short, count) == (8, 16)]
    assert parts == [f"transformer_blocks.{i}.{part}" for i in range(3) for part in ("attn1", "ff")]


def test_a_part_that_is_given_other_tokens_is_computed_whole():
    """As by a host that calls it once more, for something else."""
    denoiser, inputs = case("dit")
    block, seen = denoiser.transformer_blocks[0], []
    block.attn1.register_forward_hook(lambda module, args, out: seen.append(block.ff(out[:, :5]).shape[1]))
    _, trace, stats = accelerated(denoiser, inputs, 1, "tome", merge_ffn=True)
    assert set(seen) == {5}
    assert any("transformer_blocks.0.ff is given other rows than the tokens of its block" in n for n in stats["notes"])
    assert [path for path, short, _ in trace.of()[0].reduced.parts if short == 8].count("transformer_blocks.0.ff") == 1


def test_a_gate_may_leave_steps_whole():
    composition = c4d.Composition(Reduced(), Throughout(start=2), tokens=MergeTokens())
    denoiser, inputs = case("dit")
    reached, trace, _ = accelerated(denoiser, inputs, 5, composition)
    assert trace.strip() == "FFrrr"
    assert differences(reached, sample(denoiser, inputs, 5))[:2] == [0.0, 0.0]


# -- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*toys.REDUCTIONS} - {"asymrnr"}))  # which works within it
def test_joint_attention_is_refused_and_nothing_is_left(name):
    denoiser = flux(1, 1)
    before = {path: set(vars(module)) for path, module in denoiser.named_modules()}
    with pytest.raises(AnatomyError, match=r"one stream of tokens.*may work"):
        accelerated(denoiser, flux_inputs(1), 2, name)
    assert {path: set(vars(module)) for path, module in denoiser.named_modules()} == before


@pytest.mark.parametrize("name", ["tome", "todo"])
def test_attention_that_is_given_positions_is_refused(name):
    """On whatever axis they have one per token; Wan's are ``[1, N, 1, D]``."""
    denoiser, _, inputs = TINY["WanTransformer3DModel"].make()
    refused = pytest.raises(AnatomyError, match=r"something for each of its \d+ tokens besides these \(positions")
    with c4d.accelerate(denoiser, name) as handle, handle.run(num_steps=1), torch.no_grad(), refused:
        denoiser(**inputs)


def test_mlps_alone_are_not_what_was_asked_for():
    """Where attention is asked for and cannot be served, methods that also serve MLPs are refused like the others."""
    with pytest.raises(AnatomyError, match="one stream of tokens"):
        accelerated(flux(1, 1), flux_inputs(1), 2, "tome", merge_ffn=True)


def test_the_mlps_of_the_text_stream_are_left_alone():
    denoiser, inputs = flux(1, 1), flux_inputs(1)
    composition = c4d.Composition(Reduced(("ffn",)), Throughout(), tokens=MergeTokens(is_random=False))
    _, trace, _ = accelerated(denoiser, inputs, 1, composition)
    assert [path for path, _, _ in trace.of()[0].reduced.parts] == ["transformer_blocks.0.ff"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"site": Parts()}, "needs site='reduced'"),
        ({"tokens": TopScore()}, "needs site='reduced'"),
        ({"tokens": None}, "needs site='reduced'"),
        ({"predictor": Taylor(1)}, "nothing is predicted"),
        ({"decide": "row"}, "the step alone"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(changes, words):
    with pytest.raises(CompositionError, match=words):
        c4d.Composition(**{"site": Reduced(), "gate": FixedInterval(2), "tokens": MergeTokens(), **changes})


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (MergeTokens, {"ratio": 1.5}),
        (MergeTokens, {"window": 0}),
        (MergeTokens, {"form": "sum"}),
        (MergeTokens, {"pool": -1.0}),
        (MergeTokens, {"pool": 1.0, "threshold": 0.5}),
        (MergeTokens, {"renew_at": (0, -1)}),
        (KeyStride, {"factor": 0}),
        (Reduced, {"kinds": ("fused",)}),
        (Reduced, {"max_downsample": 0.5}),
        (Throughout, {"start": -1}),
    ],
)
def test_bad_settings_are_refused(make, settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        make(**settings)
