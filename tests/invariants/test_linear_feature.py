"""Parts that are affine in the step are predicted exactly by order 1, and by any order that fits them."""

import math

import pytest
import torch
from torch import nn

import cache4diffusion as c4d
import toys
from cache4diffusion.gates import FixedInterval
from cache4diffusion.predictors import Newton, Reuse, Taylor
from cache4diffusion.sites import Denoiser, Parts, Span


class Affine(nn.Module):
    """A denoiser whose parts are linear maps of an input that is affine in the step; the gate is not."""

    class Block(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.mix, self.ff = nn.Linear(dim, dim), nn.Sequential(nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim))

        def forward(self, x, gate):
            x = x + self.mix(x)
            return x + gate * self.ff(x)

    def __init__(self, count=3, dim=8, is_gated=False):
        super().__init__()
        self.is_gated = is_gated
        self.blocks = nn.ModuleList(self.Block(dim) for _ in range(count))

    def forward(self, x, timestep):
        gate = torch.cos(5 * timestep)[:, None, None] if self.is_gated else 0.5
        for block in self.blocks:
            x = block(x, gate)
        return x


@toys.seeded
def affine(**settings):
    return Affine(**settings).double().eval()


@torch.no_grad()
def loop(denoiser, num_steps=16):
    g = torch.Generator().manual_seed(0)
    start, slope = torch.randn(2, 5, 8, generator=g).double(), torch.randn(2, 5, 8, generator=g).double()
    return [denoiser(start + i * slope, torch.full((2,), 1 - i / num_steps)) for i in range(num_steps)]


def worst(found, plain):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, plain, strict=True))


METHODS = {
    "taylorseer": {"interval": 5, "order": 1},
    "taylorseer-2": {"interval": 5, "order": 2},
    "taylorseer-lite": {"interval": 4, "order": 1},
    "taylorseer-lite-2": {"interval": 4, "order": 2},
    "speca": {"order": 1, "warmup": 3, "decay": 1.0, "threshold": 1.0},
    "speca-2": {"order": 2, "warmup": 3, "decay": 1.0, "threshold": 1.0},
    "newton": {"interval": 5, "order": 1},
    "newton-2": {"interval": 5, "order": 2},
    "hicache": {"interval": 5, "order": 1, "sigma": math.sqrt(0.5)},
    "foca": {"interval": 5},
    "femo": {"interval": 5, "order": 2},
    "ab-cache": {"interval": 5, "warmup": 3},
    "freqca": {"interval": 5, "cutoff": -1.0, "order": 1, "sigma": math.sqrt(0.5)},
    "spectrum": {"degree": 1, "ridge": 1e-9, "warmup": 3},
}


@pytest.mark.parametrize("case", METHODS)
def test_forecasting_methods_equal_the_uncached_run(case):
    denoiser, name = affine(), case.removesuffix("-2")
    plain = loop(denoiser)
    with toys.accelerated(denoiser, name, METHODS[case], num_steps=16) as handle:
        found = loop(denoiser)
        strip = handle.stats["strip"]
    known = [i for i, symbol in enumerate(strip) if symbol == "F"][1]  # from the second full step on there is a slope
    assert strip[known:].count("c") >= 7
    assert worst(found[known:], plain[known:]) <= 1e-5


@pytest.mark.parametrize("site", [Parts(), Span(), Denoiser()], ids=["parts", "span", "denoiser"])
@pytest.mark.parametrize("predictor", [Taylor(1), Newton(1), Newton(3), Reuse()], ids=str)
def test_site_and_predictor_combine(site, predictor):
    denoiser = affine()
    plain = loop(denoiser)
    composition = c4d.Composition(site, FixedInterval(4, anchor="warmup", warmup=3), predictor)
    with c4d.accelerate(denoiser, composition) as handle, handle.run(num_steps=16):
        found = loop(denoiser)
        assert handle.stats["strip"] == "FFFcccFcccFcccFc"
    error = worst(found, plain)
    assert error > 1e-3 if isinstance(predictor, Reuse) else error <= 1e-5


def test_gates_of_the_current_step_apply_to_predicted_parts():
    denoiser = affine(is_gated=True, count=1)  # in deeper blocks the gate would bend what enters
    plain = loop(denoiser)
    with toys.accelerated(denoiser, "taylorseer", {"interval": 4, "order": 1}, num_steps=16):
        found = loop(denoiser)
    assert worst(found, plain) <= 1e-5
    with toys.accelerated(denoiser, "taylorseer-lite", {"interval": 4, "order": 1}, num_steps=16):
        found = loop(denoiser)
    assert worst(found, plain) > 1e-2
