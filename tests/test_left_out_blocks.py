"""Blocks that the host leaves out in one of its branches (skip-layer guidance), and not in the others."""

import pytest
import torch

import cache4diffusion as c4d
import toys
from cache4diffusion.gates import FixedInterval
from cache4diffusion.predictors import Reuse
from cache4diffusion.sites import Blocks, Span
from unet_fixtures import seen_once

__all__ = ["seen_once"]
STEPS = 8


class Skipping(toys.Blocks):
    """Leaves out the blocks it is told to, as SD3's transformer does."""

    def __init__(self):
        super().__init__(count=4)

    def forward(self, x, timestep, context, skip=()):
        hidden, gate = self.embed(x) + context, torch.cos(timestep)[:, None, None]
        for position, block in enumerate(self.blocks):
            if position not in skip:
                hidden = block(hidden, gate)
        return self.out(hidden)


@pytest.fixture
def denoiser():
    return toys.randomise(toys.seeded(Skipping)())


def inputs(batch=2):
    return torch.randn(batch, 5, 4, generator=toys.generator(0)), torch.randn(batch, 5, 8, generator=toys.generator(1))


@torch.no_grad()
def loop(denoiser, skips, frozen=False):
    """Two branches per step, the second without some blocks: ``skips(step)`` tells which."""
    x, context = inputs()
    found = []
    for i in range(STEPS):
        time = torch.full((2,), 0.5 if frozen else 1 - i / STEPS)
        found.append([denoiser(x, time, context), denoiser(x, time, context + 1, skip=skips(i))])
        if not frozen:
            x = x - 0.1 * found[-1][0]
    return found


SITES = {
    "span": c4d.Composition(Span(), FixedInterval(4), Reuse()),
    "span by row": c4d.Composition(Span(front=1), c4d.methods.FBCache(threshold=1e9).compose().gate, decide="row"),
    "span with a watch": c4d.methods.DBCache(front=1, warmup=1, threshold=1e9),
    "output": c4d.Composition(Span(form="output"), FixedInterval(4), Reuse()),
    "blocks": c4d.Composition(Blocks(), FixedInterval(4), Reuse()),
    "switching": c4d.methods.DeltaDiT(interval=4),
    "parts": c4d.methods.Fora(interval=4),
}
SKIPS = {"first": (0,), "second": (1,), "middle": (1, 2), "last": (3,), "ends": (0, 3)}


@pytest.mark.parametrize("left_out", SKIPS)
@pytest.mark.parametrize("site", SITES)
def test_a_cached_step_on_the_same_input_equals_the_full_one(site, left_out, denoiser):
    plain = loop(denoiser, lambda i: SKIPS[left_out], frozen=True)
    with c4d.accelerate(denoiser, SITES[site]) as handle, handle.run(num_steps=STEPS):
        found = loop(denoiser, lambda i: SKIPS[left_out], frozen=True)
        strips = handle.stats["strips"]
    for ours, theirs in zip(found, plain, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    first, second = strips.values()
    assert "c" in first
    watched = site in ("span by row", "span with a watch") and 0 in SKIPS[left_out]
    assert bool(set(second) & set("cm")) != watched, strips  # m: a block that is left out has nothing to be cached


@pytest.mark.parametrize("site", [name for name in SITES if name not in ("parts", "blocks")])
@pytest.mark.parametrize("change", [((), (2,)), ((2,), ()), ((1,), (3,)), ((3,), (2, 3)), ((0, 3), (1, 3))])
def test_what_was_recorded_of_other_blocks_is_not_added(site, change, denoiser):
    """One branch that changes the blocks it leaves out: the step where that shows is computed."""
    before, after = change

    def skips(step):
        return before if step < 2 else after

    plain = loop(denoiser, skips, frozen=True)
    with c4d.accelerate(denoiser, SITES[site]) as handle, handle.run(num_steps=STEPS):
        found = loop(denoiser, skips, frozen=True)
        first, second = handle.stats["strips"].values()
        noted = any("other blocks than the host called" in note for note in handle.stats["notes"])
    for ours, theirs in zip(found, plain, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert "c" in first
    assert noted == (second[1:3] == "cF"), (first, second)


def test_a_watch_that_the_host_leaves_out_is_told(denoiser):
    with c4d.accelerate(denoiser, SITES["span with a watch"]) as handle, handle.run(num_steps=STEPS):
        loop(denoiser, lambda i: (0,))
        assert list(handle.stats["strips"].values()) == ["Fccccccc", "F" * STEPS]
        assert any("left out blocks that" in note for note in handle.stats["notes"])


@pytest.mark.parametrize("site", ["span", "parts"])
def test_teacaches_signal_is_not_there_without_the_first_block(site, denoiser):
    method = {"site": "parts"} if site == "parts" else {}
    with c4d.accelerate(denoiser, "teacache", threshold=1e9, **method) as handle, handle.run(num_steps=STEPS):
        found = loop(denoiser, lambda i: (0,))
        first, second = handle.stats["strips"].values()
    plain = loop(denoiser, lambda i: (0,))
    assert "c" in first and second == "F" * STEPS
    assert torch.equal(found[0][1], plain[0][1])
