"""DaTo: which tokens it prunes, how deep it computes, and the search for both."""

import dataclasses
import functools
import math

import pytest
import torch
from diffusers import DDIMScheduler
from reduction_cases import case, place, rng, tokens, twins_of
from slow_reductions import cosine, drawn
from slow_reductions import windows_of as windows_slowly

import cache4diffusion as c4d
from cache4diffusion.calibration import Calibration, load_calibration, merge_calibrations
from cache4diffusion.calibration.outputs import numbers_of
from cache4diffusion.calibration.search import Found, distances, evolve, front_of, fronts, ranked
from cache4diffusion.calibration.strategies import Strategies, full_counts
from cache4diffusion.calibration.trying import Bench
from cache4diffusion.cost import step_cost
from cache4diffusion.engine.reducing import ReductionDriver
from cache4diffusion.errors import AnatomyError, CalibrationError, SettingError
from cache4diffusion.gates import DepthTable, FixedInterval, Place, Step, Throughout
from cache4diffusion.measure.cost import count_flops
from cache4diffusion.methods.dato import spread
from cache4diffusion.sites import Reduced, ReducedLevel, UNetLevel
from cache4diffusion.strip import planned_strip
from cache4diffusion.tokens import DynamicTokens
from cache4diffusion.tokens.dynamic import windows_of
from small_denoisers import accelerated, differences, dit, dit_inputs, sample, unet, unet_inputs

pytestmark = pytest.mark.filterwarnings("ignore::cache4diffusion.few_steps.FewStepsWarning")
MIXED = (2, 1, 0, 2, 1, 0)


def planned(x, signal=None, twins=None, height=4, width=6, step=0, **settings):
    rule = DynamicTokens(**settings)
    where = dataclasses.replace(place(height, width, step=step, batch=len(x), twins=twins), signal=signal)
    return rule.plan(rule.init(), where, x)


# -- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "side"), [(4, 6, 2), (5, 7, 2), (3, 3, 3), (1, 4, 2)])
def test_windows_are_the_slow_ones(height, width, side):
    assert windows_of((1, height, width), side).tolist() == list(windows_slowly(height, width, side))


def slowly(x, signal, height, width, ratio, weight, noise):
    """The card's rule for one row: kept tokens, and from which one each token gets its output."""
    score = noise if signal is None else weight * signal + 0.1 * noise
    base = [max(window, key=lambda i: float(score[i])) for window in windows_slowly(height, width, 2)]
    rest = [i for i in range(height * width) if i not in base]
    rest.sort(key=lambda i: -max(cosine(x[i], x[j]) for j in base))
    gone = rest[: int(ratio * height * width)]
    kept = [i for i in range(height * width) if i not in gone]
    return kept, [max(kept, key=lambda j: cosine(x[i], x[j])) if i in gone else i for i in range(height * width)]


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("variant", ["ours", "official"])
@pytest.mark.parametrize("step", range(3))
def test_the_plan_is_the_released_rule_slowly(is_known, variant, step):
    x, signal = tokens(5, 7), 9 * torch.rand(2, 35, generator=rng(4)) if is_known else None
    plan = planned(x, signal, height=5, width=7, step=step, variant=variant)
    noise = torch.randn(1, 35, generator=drawn(f"0/{step}/a/noise"))[0]
    is_flipped = variant == "official" and float(torch.rand((), generator=drawn(f"0/{step}/a/sign"))) < 0.5
    for row in range(2):
        wanted = slowly(x[row], None if signal is None else signal[row], 5, 7, 0.4, -0.1 if is_flipped else 0.1, noise)
        kept = plan.kept[row].tolist()
        assert (sorted(kept), [kept[slot] for slot in plan.owner[row].tolist()]) == wanted


def test_the_released_sign_is_drawn_and_the_same_again():
    signal = torch.rand(2, 24, generator=rng(4))
    top, low = (
        {max(window, key=lambda i, s=sign: s * float(signal[0, i])) for window in windows_slowly(4, 6, 2)}
        for sign in (1, -1)
    )
    seen = []
    for step in range(12):
        plans = [planned(tokens(), signal, step=step, noise=0.0, ratios=(1.0,), variant="official") for _ in range(2)]
        assert torch.equal(plans[0].kept, plans[1].kept)
        seen.append(set(plans[0].kept[0].tolist()))
        ours = planned(tokens(), signal, step=step, noise=0.0, ratios=(1.0,))
        assert set(ours.kept[0].tolist()) == top, "those that move, always"
    assert {frozenset(kept) for kept in seen} == {frozenset(top), frozenset(low)}


@pytest.mark.parametrize(("ratio", "left"), [(0.0, 24), (0.01, 24), (0.5, 12), (0.75, 6), (1.0, 6)])
def test_no_token_pruned_is_no_plan_and_base_tokens_always_stay(ratio, left):
    plan = planned(tokens(), ratios=(ratio,))
    assert (24 if plan is None else plan.length) == left
    assert (plan is None) == (left == 24)


def test_a_grid_without_a_whole_window_is_left_whole():
    assert planned(tokens(1, 6), height=1, width=6, ratios=(0.5,)) is None


def test_recovering_leaves_kept_tokens_bit_for_bit_and_every_other_is_one_of_them():
    x = tokens()
    plan = planned(x, ratios=(0.6,))
    back = plan.give(plan.take(x))
    for row in range(2):
        kept = plan.kept[row].tolist()
        assert len(kept) == 24 - int(0.6 * 24)
        for i in range(24):
            if i in kept:
                assert torch.equal(back[row, i], x[row, i])
            else:
                assert any(torch.equal(back[row, i], x[row, j]) for j in kept)


def test_twins_go_by_the_mean_of_their_dynamics_and_have_one_plan():
    x, signal = tokens(), torch.rand(2, 24, generator=rng(4))
    plan = planned(x, signal, twins=torch.ones(2, dtype=torch.bool), noise=0.0, ratios=(1.0,))
    base = {max(window, key=lambda i: float(signal[:, i].mean())) for window in windows_slowly(4, 6, 2)}
    assert set(plan.kept[0].tolist()) == base
    assert all(torch.equal(tensor[0], tensor[1]) for tensor in plan.tensors())


def test_a_seed_is_a_plan_and_another_seed_another():
    one, same, other = (planned(tokens(), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.kept, same.kept)
    assert not torch.equal(one.kept, other.kept)


def test_ratios_are_those_of_their_steps():
    rule = DynamicTokens((0.0, 0.3, 0.5))
    assert [rule.ratio_at(Step(i, 6)) for i in range(6)] == [0.0, 0.0, 0.3, 0.3, 0.5, 0.5]
    assert rule.needs_num_steps and not DynamicTokens((0.5,)).needs_num_steps


# -- depths ----------------------------------------------------------------------------------------------------------


def test_the_strips_of_the_docstring():
    gate = DepthTable(MIXED)
    assert planned_strip(c4d.Composition(UNetLevel(), gate), 6) == "FccFcc"
    pruning = DepthTable(MIXED, (True, False))
    site, rule = ReducedLevel(), DynamicTokens()
    assert planned_strip(c4d.Composition(site, gate, tokens=rule), 6) == "FpcFpc"
    assert planned_strip(c4d.Composition(site, pruning, tokens=rule), 6) == "rpcFpc"
    assert planned_strip(c4d.Composition(site, FixedInterval(2), tokens=rule), 4) == "FcFc"
    assert planned_strip(c4d.Composition(site, Throughout(), tokens=rule), 3) == "rcc"


def test_each_decision_has_its_depths_and_the_first_step_is_whole():
    gate = DepthTable((0, 0, 1, 2), (False, True))
    found = {
        name: [gate.propose(gate.begin_at(Place(8, decision=name)), Step(i, 8), None) for i in range(8)]
        for name in ("output", "level", "tokens")
    }
    assert found["output"] == [False] + [True] * 3 + [False] * 4
    assert found["level"] == [False] + [True] * 5 + [False] * 2
    assert found["tokens"] == [False] * 4 + [True] * 4


def test_without_a_strategy_as_many_steps_are_full_as_the_search_allows():
    depths = spread()
    assert len(depths) == 50
    assert [sum(d == 2 for d in depths[a:b]) for a, b in ((0, 15), (15, 35), (35, 50))] == [5, 3, 5]
    assert depths[0] == 2
    assert set(depths) == {1, 2}


# -- whole runs ------------------------------------------------------------------------------------------------------


def run(steps=6, batch=2, method="dato", **settings):
    return accelerated(unet(), unet_inputs(batch), steps, method, **settings)


@pytest.fixture(scope="module")
def plain():
    return sample(unet(), unet_inputs(2), 6)


def test_everything_computed_and_nothing_pruned_is_the_plain_denoiser(plain):
    off = c4d.METHODS["dato"].info.off
    for settings in (off, {"strategy": (2, 12, 3), "ratios": (0.0, 0.0)}):
        outputs, trace, _ = run(**settings)
        assert trace.strip() == "FFFFFF"
        assert differences(outputs, plain) == [0.0] * 6
    assert c4d.method("dato", **off).is_off()
    outputs, trace, _ = run(strategy=(2,), ratios=(0.001,))  # no whole token
    assert trace.strip() == "rrrrrr"
    assert differences(outputs, plain) == [0.0] * 6


def test_without_pruning_it_is_deepcache_at_the_same_steps():
    outputs, trace, _ = run(strategy=(2, 1, 1, 2, 1, 2), ratios=(0.0,))
    level = c4d.Composition(UNetLevel(), DepthTable((2, 1, 1, 2, 1, 2)))
    expected, other, _ = run(method=level)
    assert (trace.strip(), other.strip()) == ("FppFpF", "FccFcF")
    assert differences(outputs, expected) == [0.0] * 6


def test_without_caching_it_is_its_token_rule_alone():
    outputs, trace, _ = run(strategy=(2,), ratios=(0.5,))
    expected, other, _ = run(method=c4d.Composition(Reduced(), Throughout(), tokens=DynamicTokens((0.5,))))
    assert trace.strip() == other.strip() == "rrrrrr"
    assert differences(outputs, expected) == [0.0] * 6


def test_depth_0_reuses_the_output_and_runs_nothing_and_depth_1_the_outermost_level_alone():
    denoiser, ran = unet(), []
    hooks = [
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
        for path, module in denoiser.named_modules()
        if path in ("conv_in", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1.resnets.1", "conv_out")
    ]
    seen, call = [], {**unet_inputs(2), "timestep": torch.tensor([500, 500])}
    with c4d.accelerate(denoiser, "dato", strategy=MIXED) as handle, torch.no_grad():
        with handle.run(num_steps=1):
            denoiser(**call)  # which looks at the denoiser as well
        with handle.run(num_steps=6):
            for i in range(6):
                ran.clear()
                out = denoiser(**{**call, "sample": call["sample"] * (1 + i)})[0]
                seen.append((set(ran), out.clone()))
    for hook in hooks:
        hook.remove()
    assert handle.trace.strip() == "rpcrpc"
    outermost = {"conv_in", "up_blocks.1.resnets.1", "conv_out"}
    assert [names for names, _ in seen[1:3]] == [outermost, set()]
    assert len(seen[0][0]) == 6
    assert torch.equal(seen[2][1], seen[1][1])
    assert torch.equal(seen[5][1], seen[4][1])
    assert not torch.equal(seen[4][1], seen[3][1])


def test_dynamics_are_those_of_the_last_two_outputs_that_were_computed(monkeypatch):
    signals, plan = [], DynamicTokens.plan

    def noted(rule, state, where, entering):
        signals.append((where.step.index, where.signal))
        return plan(rule, state, where, entering)

    monkeypatch.setattr(DynamicTokens, "plan", noted)
    outputs, trace, _ = run(strategy=(2, 1, 0, 1, 2, 2))
    assert trace.strip() == "rpcprr"
    moved = {3: (1, 0), 4: (3, 1), 5: (4, 3)}  # the step between reused an output
    assert {step for step, _ in signals} == {0, 1, 3, 4, 5}
    for step, signal in signals:
        if step in moved:
            now, then = (outputs[i] for i in moved[step])
            torch.testing.assert_close(signal, (now - then).abs().mean(1).flatten(1))
        else:
            assert signal is None


def test_runs_are_repeatable_keep_what_is_counted_and_leave_nothing(plain):
    denoiser, inputs = unet(), unet_inputs(2)
    before = {path: set(vars(module)) for path, module in denoiser.named_modules()}
    call = {**inputs, "timestep": torch.tensor([500, 500])}
    counted = c4d.cache_bytes(denoiser, "dato", inputs=call, steps=6)
    handle, runs = c4d.accelerate(denoiser, "dato"), []
    for _ in range(2):
        with handle.run(num_steps=6):
            runs.append(sample(denoiser, inputs, 6))
        assert handle.memory == {"held": 0, "peak": counted}
    assert differences(*runs) == [0.0] * 6
    assert 0 < max(differences(runs[0], plain)) < 1
    assert planned_strip(handle.method.compose(), 6) == handle.trace.strip()
    handle.remove()
    assert {path: set(vars(module)) for path, module in denoiser.named_modules()} == before
    assert differences(sample(denoiser, inputs, 6), plain) == [0.0] * 6


def test_half_precision_keeps_its_dtype():
    inputs = {name: v.bfloat16() if isinstance(v, torch.Tensor) else v for name, v in unet_inputs(2).items()}
    outputs, _, _ = accelerated(unet().bfloat16(), inputs, 6, "dato", strategy=MIXED)
    assert all(out.dtype == torch.bfloat16 and out.isfinite().all() for out in outputs)


def test_both_halves_of_guidance_follow_one_plan(monkeypatch):
    plans, made = [], ReductionDriver._made
    monkeypatch.setattr(ReductionDriver, "_made", lambda *args: plans.append(made(*args)) or plans[-1])
    accelerated(*twins_of("unet"), 6, "dato", speed=0.0, strategy=MIXED)
    plans = [plan for plan in plans if plan is not None]  # of the middle there is none
    assert len(plans) >= 4
    for plan in plans:
        assert all(torch.equal(tensor[0], tensor[1]) for tensor in plan.tensors())


def test_shapes_are_the_same_for_other_data():
    found = []
    for factor in (1.0, -3.0):
        inputs = unet_inputs(2)
        _, trace, _ = accelerated(unet(), {**inputs, "sample": factor * inputs["sample"]}, 6, "dato", strategy=MIXED)
        found.append([record.reduced and record.reduced.parts for record in trace.of()])
    assert found[0] == found[1]


def test_rows_that_are_no_halves_do_not_meet():
    inputs = unet_inputs(2)
    together, _, _ = run(strategy=MIXED)
    for row in range(2):
        one = {name: v[row : row + 1] if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
        alone, _, _ = accelerated(unet(), one, 6, "dato", strategy=MIXED)
        assert max(differences([out[row : row + 1] for out in together], alone)) <= 1e-5


def test_flops_are_those_that_are_counted_while_it_runs():
    denoiser, inputs = case("unet")
    call = {**inputs, "timestep": torch.tensor([500, 500])}
    with c4d.accelerate(denoiser, "dato", strategy=MIXED, ratios=(0.5, 0.3, 0.0, 0.0, 0.4, 0.4)) as handle:
        with torch.no_grad(), handle.run(num_steps=1):
            denoiser(**call)  # which looks at the denoiser as well
        with torch.no_grad(), handle.run(num_steps=6):
            counted = [count_flops(lambda: denoiser(**call)) for _ in range(6)]
        assert handle.trace.strip() == "rpcFpc"
        assert [step_cost(handle._engines[0]).of(record) for record in handle.trace.of()] == counted
    assert counted[2] == counted[5] == 0 < counted[1] < counted[0]


def test_transformers_are_refused_in_words():
    with pytest.raises(AnatomyError, match="no U-Net levels"):
        accelerated(dit(), dit_inputs(1), 2, "dato")


# -- calibrations ----------------------------------------------------------------------------------------------------


def by_hand():
    fit = {
        "strategy": [[2, 0, 0, 0], [2, 1, 1, 0], [2, 1, 2, 1]],
        "ratios": [[0.7] * 4, [0.3, 0.4, 0.5, 0.6], [0.3] * 4],
        "cost": [0.2, 0.4, 0.6],
        "error": [0.5, 0.3, 0.1],
    }
    return Calibration.by_hand("dato", 4, {name: torch.tensor(v, dtype=torch.float64) for name, v in fit.items()})


def test_of_what_was_found_the_closest_within_the_budget_is_taken():
    made = by_hand()
    strips = {
        budget: planned_strip(c4d.method("dato", calibration=made, budget=budget).compose(), 4)
        for budget in (0.2, 0.5, 0.9)
    }
    assert strips == {0.2: "rccc", 0.5: "rppc", 0.9: "rprp"}
    rule = c4d.method("dato", calibration=made).compose().tokens
    assert [round(ratio, 6) for ratio in rule.ratios] == [0.3, 0.4, 0.5, 0.6]
    with pytest.raises(SettingError, match=r"takes 0\.200 of the FLOPs"):
        c4d.method("dato", calibration=made, budget=0.1)


def test_what_is_given_goes_before_what_was_found():
    chosen = c4d.method("dato", calibration=by_hand(), ratios=(0.5,)).compose()
    assert chosen.tokens.ratios == (0.5,)
    assert planned_strip(chosen, 4) == "rppc"
    official = c4d.method("dato", calibration=by_hand(), variant="official").compose()
    assert official.tokens.ratios == (0.4,)
    assert c4d.method("dato", variant="official", ratios=(0.0,)).compose().tokens.ratios == (0.0,)


def test_runs_of_other_lengths_are_refused_unless_resampled():
    with pytest.raises(CalibrationError, match=r"calibrated for 4 steps.*the run has 6"):
        run(calibration=by_hand())
    _, trace, _ = run(calibration=by_hand(), resample=True)
    assert trace.strip() == "rrpppc"


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (DynamicTokens, {"ratios": ()}),
        (DynamicTokens, {"ratios": (0.5, 1.5)}),
        (DynamicTokens, {"window": 0}),
        (DynamicTokens, {"weight": -0.1}),
        (DynamicTokens, {"variant": "other"}),
        (DepthTable, {"depths": (2, -1)}),
        (DepthTable, {"prunes": ()}),
        (ReducedLevel, {"kinds": ("fused",)}),
        (ReducedLevel, {"block": -1}),
        (Strategies, {"population": 3}),
        (functools.partial(c4d.method, "dato"), {"ratios": (1.5,)}),
        (functools.partial(c4d.method, "dato"), {"budget": 0.0}),
    ],
)
def test_bad_settings_are_refused(make, settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        make(**settings)


# -- the search ------------------------------------------------------------------------------------------------------


def found(*objectives):
    return [Found((i,), cost, error) for i, (cost, error) in enumerate(objectives)]


def test_fronts_are_those_that_nobody_beats_then_those_of_the_rest():
    tried = found((1, 4), (2, 2), (4, 1), (2, 3), (3, 3), (4, 4))
    assert [[one.genome[0] for one in front] for front in fronts(tried)] == [[0, 1, 2], [3], [4], [5]]
    assert [one.genome[0] for one in front_of([*tried[::-1], *found((2, 2))])] == [0, 1, 2]


def test_within_a_front_the_loneliest_comes_first_and_its_ends_before_all():
    front = found((0, 10), (1, 6), (2, 5), (10, 0))
    assert distances(front) == [math.inf, pytest.approx(2 / 10 + 5 / 10), pytest.approx(9 / 10 + 6 / 10), math.inf]
    assert [one.genome[0] for one in ranked(front)] == [0, 3, 2, 1]


@pytest.mark.parametrize("steps", [2, 4, 10, 50])
def test_every_genome_is_valid_and_a_valid_one_stays_as_it_is(steps):
    search, generator = Strategies(), rng()
    counts = full_counts(steps)
    assert sum(length for length, _ in counts) == steps
    for _ in range(20):
        genome = search.drawn(steps, generator)
        depths = genome[:steps]
        assert depths[0] == 2
        assert all(gene < count for gene, count in zip(genome, search.choices(steps), strict=True))
        start = 0
        for length, most in counts:
            full = sum(depth == 2 for depth in depths[start : start + length])
            assert full <= max(most, start == 0)
            start += length
        assert search.repaired(genome, generator) == genome
        c4d.method("dato", **search.settings(genome))
    assert full_counts(50) == [(15, 5), (20, 3), (15, 5)]


def made_up(steps):
    """Objectives with a known best: early depth and late pruning are worth most."""

    def evaluate(genome):
        depths, ratios = genome[:steps], genome[steps:]
        early = [1 / (1 + i) for i in range(steps)]
        error = sum((2 - d) * e + r * e / 4 for d, r, e in zip(depths, ratios, early, strict=True))
        return Found(genome, sum(depths) - sum(ratios) / 8, error)

    return evaluate


def test_the_search_beats_random_strategies_of_equal_cost_and_is_the_same_again():
    search, steps = Strategies(population=12, generations=12), 10
    tried = evolve(search, steps, made_up(steps))
    front, began = front_of(tried), tried[:12]
    assert len(tried) <= 12 * 13
    assert len({one.genome for one in tried}) == len(tried), "nothing is tried twice"
    generator = rng(99)
    others = [made_up(steps)(search.drawn(steps, generator)) for _ in range(60)]
    wins = [min((f.error for f in front if f.cost <= one.cost), default=math.inf) < one.error for one in others]
    assert sum(wins) >= 0.9 * len(wins)
    quality = search.judge(tried, front)
    assert quality.r2 > 0.1
    assert quality.count == len(tried)
    assert all(any(f.cost <= one.cost and f.error <= one.error for f in front) for one in began)
    assert evolve(search, steps, made_up(steps)) == tried


class Pipeline:
    """A U-Net, a scheduler, and prompts that are seeds of a text."""

    def __init__(self):
        self.unet, self.scheduler = unet(), DDIMScheduler(clip_sample=False)

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=4, generator=None, output_type="np", return_dict=True):
        self.scheduler.set_timesteps(num_inference_steps)
        text = torch.stack([torch.randn(5, 12, generator=rng(seed)) for seed in prompt])
        x = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generator])
        for t in self.scheduler.timesteps:
            out = self.unet(x, t.expand(len(x)), encoder_hidden_states=text, return_dict=False)[0]
            x = self.scheduler.step(out, t, x, return_dict=False)[0]
        return (x.numpy(),)


BRIEF = {"population": 4, "generations": 2}


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    path, pipe = tmp_path_factory.mktemp("dato") / "made.safetensors", Pipeline()
    return pipe, c4d.calibrate(pipe, "dato", [1], steps=6, trial=0, out=path, **BRIEF), path


def test_what_is_found_is_valid_survives_a_file_and_runs(searched):
    pipe, made, path = searched
    entry = made.entry
    assert entry.fit["cost"].tolist() == sorted(entry.fit["cost"].tolist())
    assert entry.fit["error"].tolist() == sorted(entry.fit["error"].tolist(), reverse=True)
    assert len(entry.levels) == 6
    assert made.plots()["unet"].rstrip().endswith("</svg>")
    assert "strategies are left" in made.verdict()
    images, dearest = [], entry.fit["cost"].max().item()
    for calibration in (made, load_calibration(path), str(path)):
        with c4d.accelerate(pipe, "dato", calibration=calibration, budget=min(dearest + 1e-9, 1)) as handle:
            images.append(pipe([1], 6, [rng(3)])[0])
        assert set(handle.trace.strip()) <= set("rpc")
        assert handle.trace.strip()[0] == "r"
    assert all((image == images[0]).all() for image in images)


@pytest.mark.slow
def test_what_is_found_beats_random_strategies_of_equal_flops():
    pipe = Pipeline()
    made = c4d.calibrate(pipe, "dato", [1, 2], steps=6, trial=0, population=8, generations=6)
    runs = [functools.partial(pipe, [seed], 6, [rng(i)]) for i, seed in enumerate([1, 2])]
    bench, search, generator = Bench(pipe, 6, runs, [numbers_of(run()) for run in runs]), Strategies(), rng(7)
    cost, error = made.entry.fit["cost"], made.entry.fit["error"]
    shares = []
    for _ in range(8):
        speedup, errors = bench.measure(c4d.method("dato", **search.settings(search.drawn(6, generator))))
        within = error[cost <= 1 / speedup + 1e-9]
        if len(within):
            shares.append(float(within.min()) / (sum(errors) / len(errors)))
    assert len(shares) >= 4
    assert sum(shares) / len(shares) < 0.9


def test_searches_are_not_merged_and_the_reason_is_said(searched):
    _, made, _ = searched
    with pytest.raises(CalibrationError, match=r"was searched for, .*Search once, .*: c4d calibrate.*dato"):
        merge_calibrations([made])


def test_a_transformer_is_not_searched():
    class Other(Pipeline):
        def __init__(self):
            self.transformer, self.scheduler = dit(), DDIMScheduler()

        def __call__(self, prompt, num_inference_steps=4, generator=None, output_type="np", return_dict=True):
            return (self.transformer(**dit_inputs(1), timestep=torch.tensor([5]))[0].numpy(),)

    with torch.no_grad(), pytest.raises(AnatomyError, match="no U-Net levels"):
        c4d.calibrate(Other(), "dato", [1], steps=4, trial=0, **BRIEF)
