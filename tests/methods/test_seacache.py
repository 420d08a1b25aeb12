"""SeaCache against its released filter, written as plain sums, and what its filter promises."""

import cmath
import math

import pytest
import torch
from slow_references import FluxBlocks, SlowTeaCache

import cache4diffusion as c4d
from cache4diffusion.engine.observers.spectral import grid_of, wiener
from cache4diffusion.engine.state import BranchState, Context
from cache4diffusion.gates import Step
from small_denoisers import accelerated, differences, flux_inputs, rows_of, sample

STEPS = 12


def filtered(x, a, b, power):
    """The filter by the definition of the discrete Fourier transform, ``x`` of shape [B, H, W, D]."""
    gains = []
    for size in x.shape[1:3]:
        found = []
        for k in range(size):
            frequency = min(k, size - k) / size
            spectrum = 1 / (frequency**power + 1e-16)
            found.append(a * spectrum / (a * a * spectrum + b * b + 1e-16))
        gains.append(found)
    mean = math.fsum(g * h for g in gains[0] for h in gains[1]) / (len(gains[0]) * len(gains[1]))

    def dft(size, sign):
        rows = [[cmath.exp(sign * 2j * math.pi * j * k / size) for k in range(size)] for j in range(size)]
        return torch.tensor(rows, dtype=torch.complex128)

    spectrum = torch.einsum("jh,kw,bhwd->bjkd", dft(x.shape[1], -1), dft(x.shape[2], -1), x.to(torch.complex128))
    weights = torch.tensor([[g * h / mean for h in gains[1]] for g in gains[0]], dtype=torch.float64)
    back = torch.einsum(
        "hj,wk,bjkd->bhwd", dft(x.shape[1], 1), dft(x.shape[2], 1), spectrum * weights[None, :, :, None]
    )
    return (back.real / (x.shape[1] * x.shape[2])).to(x.dtype)


class Filtered(FluxBlocks):
    """FLUX whose watched signal is filtered at the noise level of the step: 3 rows of 4 tokens."""

    def signal(self, streams, temb):
        plain = super().signal(streams, temb)
        self.asked = getattr(self, "asked", -1) + 1
        sigma = min(max(1 - self.asked / STEPS, 1e-6), 1 - 1e-6)
        return filtered(plain.reshape(len(plain), 3, 4, -1), 1 - sigma, sigma, 2.0).reshape(plain.shape)


def test_decisions_and_outputs_are_the_slow_references(model):
    reference = SlowTeaCache(Filtered(model), 0.3, STEPS, (1.0, 0.0))
    expected = sample(reference, flux_inputs(2), STEPS)
    reached, trace, stats = accelerated(model, flux_inputs(2), STEPS, "seacache", threshold=0.3)
    assert trace.strip() == reference.strip
    assert set(trace.strip()[1:-1]) == {"F", "c"}
    scores = [record.scores[0] for record in trace.of() if record.scores[0] is not None]
    assert scores == pytest.approx(reference.scores, rel=1e-3)
    assert max(differences(reached, expected)) <= 1e-5
    assert stats["syncs"] == STEPS - 2


def test_the_filter_keeps_the_mean_gain_and_passes_all_where_there_is_no_noise():
    x = torch.randn(2, 6, 8, 3)
    assert torch.allclose(wiener(x, 1 - 1e-9, 1e-9, 2.0), x, atol=1e-4), "without noise nothing is held back"
    noisy = wiener(x, 0.05, 0.95, 2.0)
    gains = noisy.mean((1, 2)) / x.mean((1, 2))
    assert torch.allclose(gains, gains.mean().expand_as(gains), rtol=1e-3), "the mean of the grid has one gain"
    rest = [y.sub(y.mean((1, 2), keepdim=True)).norm() / y.mean((1, 2)).norm() for y in (noisy, x)]
    assert rest[0] < 0.5 * rest[1], "in noise the rest is held back against it"


@pytest.mark.parametrize(
    ("shape", "tokens", "expected"),
    [
        ((2, 4, 8, 12), 24, (4, 6)),
        ((2, 4, 8, 12), 96, (8, 12)),
        ((1, 16, 5, 8, 8), 80, (5, 4, 4)),
        ((1, 16, 4, 8, 8), 32, (2, 4, 4)),
        ((2, 12, 8), 12, (3, 4)),
        ((2, 13, 8), 13, ()),
    ],
)
def test_the_grid_is_read_off_the_latent_or_the_position_ids(shape, tokens, expected):
    ids = {"img_ids": flux_inputs(1)["img_ids"], "txt_ids": torch.zeros(5, 3)}
    context = Context(None, Step(0, 4), BranchState(None), shape[0], kwargs=ids, latent=torch.zeros(shape))
    assert grid_of(context, tokens) == expected


def test_a_grid_that_cannot_be_told_is_asked_for(model):
    with pytest.raises(c4d.Cache4DiffusionError, match=r"say so by grid=\(rows, columns\)"):
        accelerated(model, flux_inputs(1), 4, "seacache", grid=(5, 5))
    assert set(accelerated(model, flux_inputs(1), 6, "seacache", grid=(3, 4), threshold=9.0)[1].strip()) == {"F", "c"}


def test_rows_decide_as_if_alone(model):
    inputs, settings = flux_inputs(3), {"threshold": 0.3, "decide": "row"}
    whole, trace, _ = accelerated(model, inputs, STEPS, "seacache", **settings)
    for row in range(3):
        alone, own, _ = accelerated(model, rows_of(inputs, row), STEPS, "seacache", **settings)
        assert [record.rows[row] for record in trace.of()] == [record.symbol == "c" for record in own.of()]
        assert max(differences([out[row : row + 1] for out in whole], alone)) <= 1e-5
