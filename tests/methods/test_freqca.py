"""FreqCa: its split, against a slow transcription of the released code; its site; what it reproduces."""

import math

import pytest
import torch
from forecasts import Hidden, assert_same, slow_hicache, walk, wavy

from cache4diffusion.errors import SettingError
from cache4diffusion.predictors import Bands, Hermite, Reuse
from cache4diffusion.predictors.bands import low_band
from small_denoisers import accelerated, differences, flux, flux_inputs, sample

STRIP = "FFFcccFcccFcc"


def slow_dct(x, cutoff):
    """Of ``[B, H*W, D]``: the cosine transform of every channel's square as a double sum, masked, and back."""
    side = math.isqrt(x.shape[1])

    def basis(u, n):
        scale = math.sqrt((1 if u == 0 else 2) / side)
        return scale * math.cos(math.pi * u * (2 * n + 1) / (2 * side))

    highest = math.sqrt(2) * (side - 1)
    low = torch.zeros_like(x)
    for u in range(side):
        for v in range(side):
            if math.sqrt(u * u + v * v) > cutoff * highest:
                continue
            wave = torch.tensor([basis(u, h) * basis(v, w) for h in range(side) for w in range(side)]).to(x)
            low += wave[None, :, None] * (wave[None, :, None] * x).sum(1, keepdim=True)
    return low


def slow_fft(x, cutoff):
    """The released code's lines."""
    freqs = torch.fft.fftfreq(x.shape[1], d=1.0)
    mask = freqs.abs() <= cutoff * freqs.abs().max()
    return torch.fft.ifft(torch.fft.fft(x, dim=1) * mask[None, :, None], dim=1).real


def tokens(i, count=16):
    x = torch.arange(count * 3, dtype=torch.float32).view(1, count, 3)
    return torch.sin(0.3 * i + x * (1 + 0.05 * i)) + 0.1 * i


@pytest.mark.parametrize("cutoff", [0.0, 0.1, 0.4, 0.75, 1.0])
def test_the_low_band_is_the_released_codes(cutoff):
    x = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(low_band(x, cutoff, "dct"), slow_dct(x, cutoff), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(low_band(x, cutoff, "fft"), slow_fft(x, cutoff), rtol=1e-4, atol=1e-5)
    assert torch.equal(low_band(x, cutoff), low_band(x, cutoff, "dct"))
    row = torch.randn(2, 13, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(low_band(row, cutoff), low_band(row, cutoff, "fft"))


def test_the_two_bands_are_the_feature_and_do_not_overlap():
    x = torch.randn(1, 25, 2, generator=torch.Generator().manual_seed(0))
    for transform in ("dct", "fft"):
        low = low_band(x, 0.3, transform)
        torch.testing.assert_close(low_band(low, 0.3, transform), low, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(low_band(x - low, 0.3, transform), torch.zeros_like(x), rtol=0, atol=1e-5)


def test_maps_are_transformed_over_their_plane():
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    rows = low_band(x.flatten(2).transpose(1, 2), 0.3, "dct")
    torch.testing.assert_close(low_band(x, 0.3, "dct"), rows.transpose(1, 2).reshape(x.shape))


def test_a_row_of_tokens_that_is_no_square_is_refused_by_the_cosine_transform():
    with pytest.raises(SettingError, match=r"12\. Use transform='fft'"):
        low_band(torch.zeros(1, 12, 2), 0.1, "dct")


def test_every_step_is_the_low_band_reused_and_the_high_one_forecast():
    found = walk(Bands(2, cutoff=0.4, first_difference_step=2), tokens, STRIP)
    low = slow_hicache(lambda i: slow_dct(tokens(i), 0.4), STRIP, 0, 0.71, first_enhance=3)
    high = slow_hicache(lambda i: tokens(i) - slow_dct(tokens(i), 0.4), STRIP, 2, 0.71, first_enhance=3)
    assert_same(found, [a + b for a, b in zip(low, high, strict=True)], 1e-4)


def test_everything_low_is_reuse_and_nothing_low_is_pure_hermite():
    assert_same(walk(Bands(2, cutoff=1.0), tokens, STRIP), walk(Reuse(), tokens, STRIP), 1e-5)
    assert_same(walk(Bands(2, cutoff=-1.0), tokens, STRIP), walk(Hermite(2, 0.71), tokens, STRIP), 1e-5)


def test_equal_orders_need_no_split():
    assert_same(walk(Bands(2, low_order=2), tokens, STRIP), walk(Hermite(2, 0.71), tokens, STRIP), 1e-4)


def test_rows_predict_as_if_alone():
    predictor = Bands(1)
    both, one = predictor.init(2), predictor.init(1)
    for i in (0, 1, 4):
        x = torch.cat([tokens(i), tokens(i + 7)])
        predictor.update(both, [x], float(i), [0, 1])
        predictor.update(one, [x[1:]], float(i))
    assert torch.equal(predictor.predict(both, 6.0, [1])[0], predictor.predict(one, 6.0)[0])


def test_the_method_replaces_what_enters_the_final_norm():
    model, inputs = flux(1, 2), flux_inputs(2)
    found, trace, _ = accelerated(model, inputs, 9, "freqca", interval=4, cutoff=1.0)
    assert trace.strip() == "FFFcccFcc"
    slow = Hidden(model, "FFFcccFcc", lambda seen, step: seen[max(seen)])
    assert max(differences(found, sample(slow, inputs, 9))) <= 1e-5


def test_the_defaults_differ_from_pure_hermite_and_off_is_off():
    model, inputs = flux(1, 1), flux_inputs(1)
    found, _, _ = accelerated(model, inputs, 9, "freqca", interval=4)
    pure, _, _ = accelerated(model, inputs, 9, "freqca", interval=4, cutoff=-1.0)
    assert differences(found, pure)[-1] > 1e-4
    assert differences(accelerated(model, inputs, 4, "freqca", interval=1)[0], sample(model, inputs, 4)) == [0.0] * 4


def test_wavy_features_without_tokens_are_low_as_a_whole():
    assert_same(walk(Bands(), wavy, STRIP), walk(Reuse(), wavy, STRIP), 1e-6)
