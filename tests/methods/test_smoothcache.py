"""SmoothCache: the card's schedule, one per kind of part, against a slow reference; its errors against plain hooks."""

import pytest
import torch

import cache4diffusion as c4d
from cache4diffusion.calibration import Calibration
from cache4diffusion.calibration.errors_at_lags import LagErrors
from cache4diffusion.calibration.observer import Observer
from cache4diffusion.cost import summarise
from cache4diffusion.errors import CalibrationError
from cache4diffusion.methods.smoothcache import smooth_schedule
from small_denoisers import Alike, SlowFlux, accelerated, differences, flux, flux_inputs, sample

STEPS = 12


def listing(errors, alpha, num_steps, lookahead):
    """The released code's walk, transcribed: one flag per step, 1 for compute."""
    schedule, i = [None] * num_steps, 0
    while i < num_steps:
        for r in range(lookahead, 0, -1):
            if i < num_steps - r and errors[r - 1][i] <= alpha:
                schedule[i] = 1
                for j in range(i + 1, i + r + 1):
                    schedule[j] = 0
                i += r + 1
                break
        else:
            schedule[i] = 1
            i += 1
    schedule[0] = schedule[-1] = 1
    return tuple(i for i, flag in enumerate(schedule) if flag or flag is None)


@pytest.mark.parametrize("seed", range(20))
def test_the_schedule_is_the_released_walk(seed):
    g = torch.Generator().manual_seed(seed)
    lookahead, num_steps = 1 + seed % 4, 8 + seed
    errors = torch.rand(lookahead, num_steps, generator=g).tolist()
    for alpha in (0.1, 0.4, 0.9, 2.0):
        assert smooth_schedule(errors, alpha) == listing(errors, alpha, num_steps, lookahead)


def test_a_feature_that_never_changes_gives_the_cards_schedule():
    assert smooth_schedule([[0.0] * 50] * 3, 0.08) == (*range(0, 49, 4), 49)


def test_an_endless_threshold_computes_one_of_lookahead_plus_one():
    assert smooth_schedule([[1.0] * 9] * 3, 1e9) == (0, 4, 8)
    assert smooth_schedule([[1.0] * 8], 1e9) == (0, 2, 4, 6, 7), "lookahead 1 is FORA's interval 2"


def test_a_threshold_of_0_computes_everything():
    assert smooth_schedule([[0.0] * 6] * 3, 0.0) == tuple(range(6))


def by_hand(**errors):
    """Tables of a constant error per kind (of lags 1, 2, 3)."""
    fit = {kind: torch.tensor(lags)[:, None].expand(3, STEPS) for kind, lags in errors.items()}
    return Calibration.by_hand("smoothcache", STEPS, fit)


DIFFERING = {"attn": (0.1, 0.2, 0.3), "ffn": (0.1, 0.9, 0.9), "fused": (0.9, 0.9, 0.9)}


class PerKind(Alike):
    """Every kind has its full steps; on others its outputs are those of the last full one."""

    def __init__(self, full):
        self.full, self.kept, self.step, self.computed = full, {}, -1, []

    def begin(self, step):
        self.step = step

    def give(self, name, kind, entering, compute):
        if self.step in self.full[kind]:
            self.kept[name] = compute()
            self.computed.append((self.step, name))
        return self.kept[name]


@pytest.mark.parametrize(
    ("threshold", "full"),
    [
        (0.35, {"attn": (0, 4, 8, 11), "ffn": (0, 2, 4, 6, 8, 10, 11), "fused": range(STEPS)}),
        (0.95, dict.fromkeys(DIFFERING, (0, 4, 8, 11))),
    ],
)
def test_every_kind_follows_its_own_schedule(model, threshold, full):
    parts = PerKind(full)
    expected = sample(SlowFlux(model, parts), flux_inputs(2), STEPS)
    reached, trace, stats = accelerated(
        model, flux_inputs(2), STEPS, "smoothcache", threshold=threshold, calibration=by_hand(**DIFFERING)
    )
    assert max(differences(reached, expected)) <= 1e-5
    letters = "".join(
        "F" if len(kinds) == 3 else "m" if kinds else "c"
        for kinds in ({k for k in full if step in full[k]} for step in range(STEPS))
    )
    assert trace.strip() == letters
    assert stats["syncs"] == 0


def test_parts_that_are_cached_do_not_run_and_others_do(model):
    runs = {"attn": [], "ff": [], "single": []}
    step = [-1]
    watched = {
        "attn": model.transformer_blocks[0].attn.norm_q,
        "ff": model.transformer_blocks[1].ff.net[2],
        "single": model.single_transformer_blocks[0].attn.norm_q,
    }
    hooks = [m.register_forward_hook(lambda *_, n=n: runs[n].append(step[0])) for n, m in watched.items()]
    hooks.append(model.x_embedder.register_forward_hook(lambda *_: step.__setitem__(0, step[0] + 1)))
    with c4d.accelerate(model, "smoothcache", threshold=0.35, calibration=by_hand(**DIFFERING)) as handle:
        with handle.run(num_steps=STEPS):
            sample(model, flux_inputs(1), STEPS)
        found = summarise(handle)
    for hook in hooks:
        hook.remove()
    first = step[0] - STEPS + 1  # whatever ran before, to look at the denoiser
    ran = {name: [s - first for s in steps if s >= first] for name, steps in runs.items()}
    assert ran["attn"] == [0, 4, 8, 11]
    assert ran["ff"] == [0, 2, 4, 6, 8, 10, 11]
    assert ran["single"] == list(range(STEPS)), "what feeds a part that is computed runs"
    saved = 1 - found.run_flops / (STEPS * found.full_flops)
    assert 0.1 < saved < 0.6, "FLOPs are those of what ran"


def test_kinds_without_a_table_are_always_full(model):
    calibration = by_hand(attn=(0.0, 0.0, 0.0))
    reached, trace, _ = accelerated(
        model, flux_inputs(1), STEPS, "smoothcache", threshold=0.35, calibration=calibration
    )
    assert trace.strip() == "FmmmFmmmFmmF"
    everywhere = range(STEPS)
    parts = PerKind({"attn": (0, 4, 8, 11), "ffn": everywhere, "fused": everywhere})
    assert max(differences(reached, sample(SlowFlux(model, parts), flux_inputs(1), STEPS))) <= 1e-5


def test_compiled_blocks_follow_their_schedules(model):
    calibration = by_hand(**DIFFERING)
    eager = accelerated(model, flux_inputs(1), STEPS, "smoothcache", threshold=0.35, calibration=calibration)[0]
    compiled = flux()
    compiled.transformer_blocks[0].compile(backend="eager")
    reached, trace, _ = accelerated(
        compiled, flux_inputs(1), STEPS, "smoothcache", threshold=0.35, calibration=calibration
    )
    assert set(trace.strip()) == {"F", "m"}
    assert max(differences(reached, eager)) <= 1e-5


# -- what is measured --------------------------------------------------------------------------------------------------


def test_errors_are_the_cards_by_plain_hooks(model):
    kinds = {"attn": ["attn"], "ffn": ["ff", "ff_context"]}
    outputs = {}

    def keep(name):
        def hook(module, args, output):
            leaves = output if isinstance(output, tuple) else (output,)
            outputs.setdefault(name, []).append([leaf.clone() for leaf in leaves])

        return hook

    hooks = [
        getattr(block, part).register_forward_hook(keep((kind, i, part)))
        for i, block in enumerate(model.transformer_blocks)
        for kind, parts in kinds.items()
        for part in parts
    ]
    sample(model, flux_inputs(1), 7)
    for hook in hooks:
        hook.remove()
    with Observer(model, LagErrors(lookahead=3)) as observer, observer.run(num_steps=7):
        sample(model, flux_inputs(1), 7)
    fit = observer.entries()["denoiser"].fit
    for kind in kinds:
        mine = [steps for (k, _, _), steps in outputs.items() if k == kind]
        for lag in (1, 2, 3):
            for i in range(7 - lag):
                errors = []
                for steps in mine:
                    pairs = list(zip(steps[i], steps[i + lag], strict=True))
                    change = sum((a - b).abs().sum() for a, b in pairs)
                    errors.append(float(change / sum(b.abs().sum() for _, b in pairs)))
                assert float(fit[kind][lag - 1, i]) == pytest.approx(sum(errors) / len(errors), rel=1e-5)
            assert fit[kind][lag - 1, 7 - lag :].tolist() == [0.0] * lag


def test_a_schedule_for_prompts_that_agree_is_praised_and_for_others_not(model):
    def verdict(spread):
        sums = {}
        statistic = LagErrors(lookahead=1)
        g = torch.Generator().manual_seed(0)
        for _ in range(50):
            memory = {}
            value = 1.0
            for step in range(6):
                value += float(torch.randn(1, generator=g).abs()) if spread else 1.0
                seen = type(
                    "Seen", (), {"features": {"p": [torch.tensor([value])]}, "decisions": {"p": "ffn"}, "step": step}
                )
                seen.num_steps = 6
                statistic.observe(sums, memory, seen)
        return statistic.fit(sums).quality

    assert verdict(False).r2 == pytest.approx(1)
    assert "a sound basis" in verdict(False).verdict
    assert verdict(True).r2 < 0.9
    assert "a sound basis" not in verdict(True).verdict


# -- other runs --------------------------------------------------------------------------------------------------------


def made_for(levels):
    fit = {kind: torch.zeros(3, len(levels)) for kind in DIFFERING}
    return Calibration.by_hand("smoothcache", len(levels), fit, levels)


def run(model, num_steps, timesteps=None, **settings):
    with c4d.accelerate(model, "smoothcache", **settings) as handle:
        with handle.run(timesteps, None if timesteps else num_steps):
            sample(model, flux_inputs(1), num_steps)
        return handle.trace.strip()


def test_another_number_of_steps_is_refused_unless_resampling_is_asked_for(model):
    calibration = by_hand(**dict.fromkeys(DIFFERING, (0.0, 0.0, 0.0)))
    with pytest.raises(CalibrationError, match=r"calibrated for 12 steps, and the run has 6 steps\. .*resample=True"):
        run(model, 6, calibration=calibration)
    assert run(model, 12, calibration=calibration) == "FcccFcccFccF"
    assert run(model, 6, calibration=calibration, resample=True) == "FcFcFF"
    assert run(model, 23, calibration=calibration, resample=True) == "F" + "cccccccF" * 2 + "cccccF"


def test_resampling_goes_by_the_noise_level(model):
    levels = [1000.0, 990.0, 980.0, 970.0, 900.0, 600.0, 300.0, 100.0, 50.0]
    calibration = made_for(levels)  # full at 1000, 900 and 50
    assert run(model, 9, levels, calibration=calibration) == "FcccFcccF"
    even = [1000.0, 900.0, 800.0, 600.0, 400.0, 200.0, 50.0]
    with pytest.raises(CalibrationError, match="at noise levels 1000 to 50, and the run has 7 steps at noise levels"):
        run(model, 7, even, calibration=calibration)
    assert run(model, 7, even, calibration=calibration, resample=True) == "FFccccF"


def test_as_many_steps_at_other_noise_levels_are_another_run(model):
    calibration = made_for([1000.0, 800.0, 600.0, 400.0, 200.0])
    with pytest.raises(CalibrationError, match="the run has 5 steps at noise levels 900 to 100"):
        run(model, 5, [900.0, 800.0, 600.0, 400.0, 100.0], calibration=calibration)
