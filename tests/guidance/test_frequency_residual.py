"""The rule alone: what it predicts, which steps it skips, how the gains go."""

import pytest
import torch

from cache4diffusion.engine.maps import Grid, grid_of
from cache4diffusion.errors import AnatomyError, SettingError
from cache4diffusion.gates import Step
from cache4diffusion.guidance import FrequencyResidual
from cache4diffusion.guidance.frequency import low_pass
from cache4diffusion.methods import FasterCache


def run(rule, pairs):
    """Predictions of the second of each pair, None where both run."""
    state, out = rule.init(), []
    for i, (c, u) in enumerate(pairs):
        step = Step(i, len(pairs))
        if rule.is_cached(state, step):
            rule.commit(state, step)
            out.append(rule.predict(state, step, [c])[0])
        else:
            rule.update(state, step, [c], [u])
            out.append(None)
    return out


def slow(pairs, interval, warmup, low, low_until, high, high_from):
    """The released code: complex spectra, shifted, multiplied in place until the next full step."""
    d_lo = d_hi = None
    out = []
    for n, (c, u) in enumerate(pairs, 1):
        h, w = c.shape[-2:]
        if d_lo is None or n <= warmup or n % interval == 0:
            spectrum = torch.fft.fftshift(torch.fft.fft2((u - c).float()), dim=(-2, -1))
            y, x = torch.meshgrid(torch.arange(h) - h // 2, torch.arange(w) - w // 2, indexing="ij")
            disc = (x**2 + y**2 <= (min(h, w) // 5) ** 2).float()
            d_lo, d_hi = spectrum * disc, spectrum * (1 - disc)
            out.append(None)
            continue
        if n <= low_until:
            d_lo = d_lo * low
        if n >= high_from:
            d_hi = d_hi * high
        out.append(c + torch.fft.ifft2(torch.fft.ifftshift(d_lo + d_hi, dim=(-2, -1))).real)
    return out


def pairs(count, shape=(2, 3, 10, 12)):
    rng = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(shape, generator=rng) for _ in range(2)) for _ in range(count)]


@pytest.mark.parametrize("shape", [(1, 4, 10, 10), (2, 3, 11, 13), (1, 2, 3, 9, 8)])
def test_real_maps_equal_the_complex_spectra_of_the_released_code(shape):
    given = pairs(20, shape)
    rule = FrequencyResidual(interval=5, warmup=3, low_gain=1.15, high_gain=1.2, low_until=0.6, high_from=0.35)
    for ours, theirs in zip(run(rule, given), slow(given, 5, 3, 1.15, 12, 1.2, 7), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_with_gains_of_one_the_last_difference_is_added():
    given = pairs(8)
    out = run(FrequencyResidual(interval=4, warmup=0, low_gain=1, high_gain=1), given)
    assert [o is None for o in out] == [True, False, False, True, False, False, False, True]
    c0, u0 = given[3]
    for i in (4, 5, 6):
        torch.testing.assert_close(out[i], given[i][0] + (u0 - c0), rtol=1e-6, atol=1e-6)


def test_a_constant_difference_is_exact():
    difference = torch.randn(2, 3, 10, 12)
    given = [(c, c + difference) for c, _ in pairs(8)]
    for (_, u), predicted in zip(given, run(FrequencyResidual(4, 0, 1.0, 1.0), given), strict=True):
        if predicted is not None:
            torch.testing.assert_close(predicted, u, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (9, 16), (5, 5), (4, 4), (1, 7)])
def test_low_pass_keeps_a_constant_and_splits_without_loss(size):
    constant = torch.full((1, 2, *size), 3.0)
    torch.testing.assert_close(low_pass(constant), constant)
    maps = torch.randn(1, 2, *size)
    low = low_pass(maps)
    torch.testing.assert_close(low_pass(low), low, rtol=1e-5, atol=1e-5)
    assert low.dtype == torch.float32


def test_equal_branches_predict_the_source_itself():
    given = [(c, c) for c, _ in pairs(4)]
    for (c, _), predicted in zip(given, run(FrequencyResidual(9, 0), given), strict=True):
        assert predicted is None or torch.equal(predicted, c)


def test_predicting_twice_changes_nothing():
    rule, (c, u) = FrequencyResidual(interval=9, warmup=0), pairs(1)[0]
    state = rule.init()
    rule.update(state, Step(0, 9), [c], [u])
    rule.commit(state, Step(1, 9))
    assert torch.equal(rule.predict(state, Step(1, 9), [c])[0], rule.predict(state, Step(1, 9), [c])[0])


def test_the_skipped_steps_are_those_of_cogvideox():
    rule, state = FrequencyResidual(), None
    state = rule.init()
    skipped = []
    for i in range(50):
        if rule.is_cached(state, Step(i, 50)):
            skipped.append(i + 1)
        else:
            rule.update(state, Step(i, 50), [torch.zeros(1, 1, 4, 4)], [torch.zeros(1, 1, 4, 4)])
    assert skipped == [n for n in range(18, 51) if n % 5]


SCRIPTS = {  # steps; interval, warm-up; low gain and its last call, high gain and its first call, counted from 1
    "CogVideoX, 50 steps": (50, 5, 17, 1.1, 40, 1.1, 30),
    "Latte, 50 steps": (50, 5, 17, 1.1, 44, 1.1, 45),
    "Open-Sora 1.2, 30 steps": (30, 5, 11, 1.15, 25, 1.15, 20),
    "Open-Sora-Plan, 150 steps": (150, 6, 39, 1.1, 130, 1.2, 131),
    "Vchitect-2.0, 100 steps": (100, 5, 30, 1.05, 79, 1.1, 61),
}


def test_published_windows_and_gains_are_the_scripts():
    assert SCRIPTS.keys() == FasterCache.info.published.keys()
    for name, (steps, *script) in SCRIPTS.items():
        rule, given = FasterCache(**FasterCache.info.published[name]).compose().cfg, pairs(steps, (1, 1, 6, 6))
        for ours, theirs in zip(run(rule, given), slow(given, *script), strict=True):
            assert (ours is None) == (theirs is None), name
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_old_difference_is_not_used():
    rule = FrequencyResidual(interval=5, warmup=0)
    state = rule.init()
    rule.update(state, Step(4, 50), [torch.zeros(1, 1, 4, 4)], [torch.zeros(1, 1, 4, 4)])
    assert rule.is_cached(state, Step(5, 50))
    assert not rule.is_cached(state, Step(11, 50))  # guidance paused in between


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"interval": 0}, "interval must be 1"),
        ({"warmup": -1}, "warmup 0 or more"),
        ({"low_gain": 0.0}, "gains must be above 0"),
        ({"high_from": 1.5}, "fractions of the steps"),
        ({"layout": "both"}, "'batched' or 'sequential'"),
        ({"batch_order": "u-c"}, "'uncond-cond' or 'cond-uncond'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(SettingError, match=words):
        FrequencyResidual(**settings)


# Tokens as maps ------------------------------------------------------------------------------------------------------


def test_packed_tokens_are_unpacked_as_flux_does():
    from diffusers import FluxPipeline

    maps = torch.randn(2, 4, 6, 10)
    tokens = FluxPipeline._pack_latents(maps, 2, 4, 6, 10)
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32)
    grid = grid_of("FluxTransformer2DModel", tokens, ids)
    assert grid == Grid(3, 5, 2)
    assert torch.equal(grid.to_maps(tokens), maps)
    assert torch.equal(grid.to_maps(tokens), FluxPipeline._unpack_latents(tokens, 48, 80, 8))
    assert torch.equal(grid.to_tokens(grid.to_maps(tokens)), tokens)


def test_tokens_of_a_video_lie_frame_by_frame():
    """Trap: 2 frames of 2 x 4 tokens are as many as a square of 4 x 4."""
    maps = torch.randn(1, 2, 6, 2, 4)
    tokens = maps.permute(0, 1, 3, 4, 2).reshape(1, 16, 6)
    grid = grid_of("LTXVideoTransformer3DModel", tokens, sizes=(2, 2, 4))
    assert grid == Grid(2, 4, 1, frames=2)
    assert torch.equal(grid.to_maps(tokens), maps.flatten(1, 2))
    assert torch.equal(grid.to_tokens(grid.to_maps(tokens)), tokens)


def test_grids_that_are_not_told_are_refused():
    tokens = torch.randn(1, 16, 8)
    assert grid_of("Anything", tokens) == Grid(4, 4, 1)
    assert grid_of("QwenImageTransformer2DModel", torch.randn(1, 15, 8), None, [[(1, 3, 5)]]) == Grid(3, 5, 2)
    for ids in (torch.zeros(16, 3), torch.rand(16, 3), torch.stack([torch.arange(16.0)] * 3, 1)):
        with pytest.raises(AnatomyError, match="how they lie in the image is not known"):
            grid_of("FluxTransformer2DModel", tokens, ids)
    with pytest.raises(AnatomyError, match="15 image tokens"):
        grid_of("Anything", tokens[:, :15])
