"""CacheQuant: its schedule against brute force, its scale and shift against least squares, its steps against a slow
reference; on U-Net levels and on the residual of a transformer."""

import itertools

import pytest
import torch
from test_deepcache import slow_deepcache
from unet_zoo import call, inputs, sd_like

import cache4diffusion as c4d
import small_denoisers
from cache4diffusion.calibration import Calibration
from cache4diffusion.calibration.affine import AffineFits
from cache4diffusion.calibration.observer import Observer
from cache4diffusion.errors import AnatomyError, CalibrationError, SettingError
from cache4diffusion.methods.cachequant import grouped, tables
from cache4diffusion.storage import Storage, Store

STEPS, DEEP = 6, "up_blocks.2.resnets.1"  # whose output enters the outermost level


# -- the schedule ------------------------------------------------------------------------------------------------------


def brute_force(errors, interval):
    """Every way to cut the run, as the card has it."""
    steps, count = len(errors), -(-len(errors) // interval)
    shortest, longest = -(-interval // 2), 2 * interval
    found = []
    for lengths in itertools.product(range(shortest, longest + 1), repeat=count):
        if sum(lengths) == steps:
            starts = [sum(lengths[:k]) for k in range(count)]
            cost = sum(errors[i][i - j - 1] for j, n in zip(starts, lengths, strict=True) for i in range(j + 1, j + n))
            found.append((cost, tuple(starts)))
    return min(found)


@pytest.mark.parametrize("steps", range(2, 11))
def test_the_schedule_is_the_best_of_all(steps):
    for interval in range(1, 6):
        if -(-interval // 2) > steps:
            continue
        for seed in range(4):
            errors = torch.rand(steps, 9, generator=torch.Generator().manual_seed(seed)).tolist()
            best, starts = brute_force(errors, interval)
            assert grouped(errors, interval) == starts, (interval, best)


@pytest.mark.parametrize(("steps", "interval"), [(9, 3), (50, 5), (28, 4), (12, 12), (10, 1), (50, 7), (7, 2)])
def test_an_even_drift_gives_even_groups(steps, interval):
    starts = grouped([[float(r) for r in range(1, 2 * interval)]] * steps, interval)
    ends = (*starts[1:], steps)
    lengths = {end - start for start, end in zip(starts, ends, strict=True)}
    assert starts[0] == 0
    assert len(starts) == -(-steps // interval)
    assert max(lengths) - min(lengths) <= 1
    if (steps, interval) == (9, 3):
        assert starts == (0, 3, 6)
        assert "``FccFccFcc``" in (c4d.methods.CacheQuant.__doc__ or "")


def test_full_steps_gather_where_features_drift_and_groups_keep_their_bounds():
    drift = [[r * (10.0 if i < 10 else 0.1) for r in range(1, 10)] for i in range(30)]
    starts = grouped(drift, 5)
    lengths = [b - a for a, b in itertools.pairwise((*starts, 30))]
    assert min(lengths) == 3 and max(lengths) <= 10
    assert sum(start < 10 for start in starts) == 4, "a fixed interval has 2"


def test_impossible_intervals_are_refused_with_what_is_accepted():
    with pytest.raises(SettingError, match=r"groups of 7 to 26 steps\. Use an interval of 1 to 12"):
        grouped([[1.0] * 9] * 6, 13)
    with pytest.raises(SettingError, match=r"measured over 9\. Use an interval up to 5, or calibrate with reach=15"):
        grouped([[1.0] * 9] * 40, 8)
    made = Calibration.by_hand("cachequant", 6, {"errors": torch.ones(6, 9)})
    with pytest.raises(SettingError, match="Use an interval of 1 to 12"):
        c4d.method("cachequant", interval=13, calibration=made, correction=False)


# -- what is measured --------------------------------------------------------------------------------------------------


def observed(unet, runs=2, **options):
    """The fit over loops of other values, whose deep features are kept beside it: [run][step]."""
    seen = []
    hook = unet.get_submodule(DEEP).register_forward_hook(lambda m, args, out: seen.append(out.clone()))
    with Observer(unet, AffineFits(**options)) as observer:
        for run in range(runs):
            with observer.run(num_steps=STEPS):
                for step in range(STEPS):
                    call(unet, inputs(step=step + 50 * run))
    hook.remove()
    return observer.entries()["denoiser"], [seen[-STEPS * (runs - r) :][:STEPS] for r in range(runs)]


@pytest.mark.parametrize("dtype", ["own", "int8"])
def test_scale_and_shift_are_least_squares_per_channel_over_batch_places_and_prompts(dtype):
    entry, seen = observed(sd_like(), reach=3, cache_dtype=dtype)
    store = Store(Storage.of(None if dtype == "own" else dtype))
    scale, shift = entry.fit[f"scale {DEEP} 0 2"], entry.fit[f"shift {DEEP} 0 2"]
    assert scale.shape == shift.shape == (STEPS, 3, 8)
    left = moved = 0.0
    for step, lag in itertools.product(range(STEPS), range(1, 4)):
        if lag > step:
            assert torch.equal(scale[step, lag - 1], torch.ones(8)) and not shift[step, lag - 1].any()
            continue
        x = torch.cat([store.keep(run[step - lag]).read() for run in seen]).double()
        y = torch.cat([run[step] for run in seen]).double()
        error = (y - x).abs().mean()
        assert float(entry.fit["errors"][step, lag - 1]) == pytest.approx(float(error), rel=1e-6)
        for channel in range(8):
            column = x[:, channel].reshape(-1, 1)
            wanted = y[:, channel].reshape(-1, 1)
            a, b = torch.linalg.lstsq(torch.cat([column, torch.ones_like(column)], 1), wanted).solution.flatten()
            assert float(scale[step, lag - 1, channel]) == pytest.approx(float(a), rel=1e-4, abs=1e-5)
            assert float(shift[step, lag - 1, channel]) == pytest.approx(float(b), rel=1e-4, abs=1e-5)
            left += float((a * column + b - wanted).square().sum())
            moved += float((column - wanted).square().sum())
    assert entry.quality.r2 == pytest.approx(1 - left / moved, rel=1e-6)
    assert "of the squared error of reuse" in entry.quality.verdict


def test_a_channel_that_does_not_vary_is_shifted_only():
    unet = sd_like()
    values, step = torch.randn(STEPS, 8), [0]
    hook = unet.get_submodule(DEEP).register_forward_hook(
        lambda m, args, out: values[step[0] % STEPS].reshape(1, 8, 1, 1).expand_as(out).clone()
    )
    with Observer(unet, AffineFits(reach=2)) as observer, observer.run(num_steps=STEPS):
        for step[0] in range(STEPS):
            call(unet, inputs(step=step[0]))
    hook.remove()
    fit = observer.entries()["denoiser"].fit
    assert torch.equal(fit[f"scale {DEEP} 0 2"], torch.ones(STEPS, 2, 8))
    torch.testing.assert_close(fit[f"shift {DEEP} 0 2"][3, 1], values[3] - values[1])


# -- sampling ----------------------------------------------------------------------------------------------------------


def run(unet, name, **settings):
    with c4d.accelerate(unet, name, **settings) as handle:
        with handle.run(num_steps=STEPS):
            outputs = [call(unet, inputs(step=i)) for i in range(STEPS)]
        return outputs, handle.trace.strip(), handle.memory["peak"]


def even(**options):
    """Distances that grow evenly, and random scales and shifts."""
    g = torch.Generator().manual_seed(5)
    return Calibration.by_hand(
        "cachequant",
        STEPS,
        {
            "errors": torch.ones(STEPS, 9).cumsum(1),
            f"scale {DEEP} 0 2": 1 + 0.3 * torch.randn(STEPS, 9, 8, generator=g),
            f"shift {DEEP} 0 2": 0.3 * torch.randn(STEPS, 9, 8, generator=g),
        },
        **options,
    )


def test_off_is_off():
    plain = [call(sd_like(), inputs(step=i)) for i in range(STEPS)]
    outputs, strip, _ = run(sd_like(), "cachequant", interval=1, calibration=even())
    assert strip == "F" * STEPS
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain, strict=True))


def test_scales_of_1_and_shifts_of_0_are_deepcache_bit_for_bit():
    fit = even().entry.fit
    neutral = {name: torch.full_like(value, float(name.startswith("scale"))) for name, value in fit.items()}
    made = Calibration.by_hand("cachequant", STEPS, neutral | {"errors": fit["errors"]})
    theirs, strip, _ = run(sd_like(), "deepcache", interval=3)
    for settings in ({"calibration": made}, {"calibration": even(), "correction": False}):
        ours, letters, _ = run(sd_like(), "cachequant", interval=3, **settings)
        assert letters == strip == "FccFcc"
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def test_cached_steps_are_a_slow_reference_s_always_from_the_feature_as_it_was_computed():
    unet, made = sd_like(), even()
    ours, strip, _ = run(unet, "cachequant", interval=3, calibration=made)
    assert strip == "FccFcc"
    scale, shift = (made.entry.fit[f"{word} {DEEP} 0 2"] for word in ("scale", "shift"))
    feature = None
    for step in range(STEPS):
        last = step - step % 3
        if step == last:
            expected, feature = slow_deepcache(unet, inputs(step=step), None, 0, 0)
        else:
            a, b = (row[step, step - last - 1].float().reshape(1, 8, 1, 1) for row in (scale, shift))
            expected, _ = slow_deepcache(unet, inputs(step=step), a * feature + b, 0, 0)
        torch.testing.assert_close(ours[step], expected, rtol=1e-5, atol=1e-5)


def test_where_guidance_ends_within_a_group_features_are_reused_as_they_are_until_the_next():
    """The call of half the rows has nothing cached, so it is full; scale and shift are for the group's first step."""
    found = []
    for correction in (True, False):
        unet, made, outputs = sd_like(), even(), []
        with c4d.accelerate(unet, "cachequant", interval=3, calibration=made, correction=correction) as handle:
            with handle.run(num_steps=STEPS):
                for i in range(STEPS):
                    given = inputs(step=i)
                    half = {name: value[:1] if value.ndim else value for name, value in given.items()}
                    outputs.append(call(unet, half if i else given))
            assert "".join(record.symbol for record in handle.trace.of()) == "FFcFcc"
        found.append(outputs)
    are_alike = [torch.equal(a, b) for a, b in zip(*found, strict=True)]
    assert are_alike == [True, True, True, True, False, False]


def test_every_table_begins_a_group_with_1_and_0_and_counts_from_there():
    fit = {"scale s 0 2": torch.arange(12.0).reshape(6, 2, 1), "shift s 0 2": -torch.arange(12.0).reshape(6, 2, 1)}
    ((scale, shift),) = tables(fit, (0, 3))["s"]
    assert scale.shape == (6, 1, 1, 1)
    assert scale.flatten().tolist() == [1.0, 2.0, 5.0, 1.0, 8.0, 11.0]
    assert shift.flatten().tolist() == [0.0, -2.0, -5.0, 0.0, -8.0, -11.0]


@pytest.mark.parametrize("batches", [1, 2])
def test_is_exact_where_a_feature_is_affine_per_channel_in_that_of_the_full_step(batches):
    """Also with one scale and shift for both branches, called one by one."""
    unet, step = sd_like(), [0]
    g = torch.Generator().manual_seed(0)
    a, b = 1 + 0.5 * torch.randn(2, STEPS, 1, 8, 1, 1, generator=g)
    base = torch.randn(batches, 2, 8, 8, 8, generator=g)
    branch = [0]

    def affine(module, args, output):
        return a[step[0]] * base[branch[0]] + b[step[0]]

    unet.get_submodule(DEEP).register_forward_hook(affine)

    def loop():
        outputs = []
        for step[0] in range(STEPS):
            for branch[0] in range(batches):
                given = inputs(step=step[0])
                given["encoder_hidden_states"] = given["encoder_hidden_states"] + branch[0]
                outputs.append(call(unet, given))
        return outputs

    plain = loop()
    with Observer(unet, AffineFits(reach=5)) as observer, observer.run(num_steps=STEPS):
        loop()
    entry = observer.entries()["denoiser"]
    assert entry.quality.r2 == pytest.approx(1.0)
    made = Calibration.by_hand("cachequant", STEPS, entry.fit, reach=5)
    for interval, count in ((2, 3), (3, 2), (6, 1)):
        with c4d.accelerate(unet, "cachequant", interval=interval, calibration=made) as handle:
            with handle.run(num_steps=STEPS):
                outputs = loop()
            assert handle.trace.strip().count("F") == count
        for ours, theirs in zip(outputs, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_memory_is_a_feature_map_and_two_numbers_per_channel_and_step(dtype):
    _, _, peak = run(sd_like(), "cachequant", interval=3, calibration=even(), cache_dtype=dtype)
    count, channels = 2 * 8 * 8 * 8, 8
    assert peak == (4 * count if dtype is None else count + 4 * 2 * channels) + 4 * 2 * STEPS * channels
    given = {"cache_dtype": dtype} if dtype else {}
    settings = {"interval": 3, "calibration": even(), **given}
    assert peak == c4d.cache_bytes(sd_like(), "cachequant", inputs=inputs(), steps=STEPS, **settings)


def test_settings_that_contradict_each_other_or_the_run_are_refused():
    with pytest.raises(SettingError, match="or give correction=False"):
        c4d.method("cachequant", interval=3, calibration=even(), resample=True)
    unet = sd_like()
    handle = c4d.accelerate(unet, "cachequant", interval=3, calibration=even())
    with handle, pytest.raises(CalibrationError, match="for 6 steps, and the run has 9"), handle.run(num_steps=9):
        call(unet, inputs())
    flux = small_denoisers.flux()
    handle = c4d.accelerate(flux, "cachequant", interval=3, calibration=even())
    with pytest.raises(AnatomyError, match="levels"), handle.run(num_steps=STEPS):
        small_denoisers.sample(flux, small_denoisers.flux_inputs(), STEPS)


# -- transformers ------------------------------------------------------------------------------------------------------


def test_of_a_transformer_the_residual_of_all_blocks_is_scaled_and_shifted():
    flux, given = small_denoisers.flux(), small_denoisers.flux_inputs(2)
    entered, left = [], []
    hooks = [
        flux.x_embedder.register_forward_hook(lambda m, args, out: entered.append(out.clone())),
        flux.norm_out.register_forward_pre_hook(lambda m, args: left.append(args[0].clone())),
    ]
    with Observer(flux, AffineFits(unit="span", reach=3)) as observer, observer.run(num_steps=STEPS):
        small_denoisers.sample(flux, given, STEPS)
    fit = observer.entries()["denoiser"].fit
    (name,) = [key for key in fit if key.startswith("scale ")]
    made = Calibration.by_hand("cachequant", STEPS, fit, unit="span", reach=3)
    del entered[:], left[:]
    with c4d.accelerate(flux, "cachequant", interval=2, calibration=made) as handle:
        with handle.run(num_steps=STEPS):
            small_denoisers.sample(flux, given, STEPS)
        strip = handle.trace.strip()
    for hook in hooks:
        hook.remove()
    entered, left = entered[-STEPS:], left[-STEPS:]  # before them, the denoiser was looked at
    assert strip.count("F") == 3
    residual, last = None, 0
    for step, letter in enumerate(strip):
        if letter == "F":
            residual, last = left[step] - entered[step], step
            continue
        a, b = (fit[key][step, step - last - 1] for key in (name, f"shift{name.removeprefix('scale')}"))
        torch.testing.assert_close(left[step], entered[step] + a * residual + b, rtol=1e-4, atol=1e-4)
