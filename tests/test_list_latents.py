"""Denoisers whose latent is a list with an entry for each row of the batch, as Z-Image's is."""

import pytest
import torch
from torch import nn

import cache4diffusion as c4d
import toys
from cache4diffusion.engine.inputs import inputs_of
from cache4diffusion.errors import AnatomyError
from cache4diffusion.gates import FixedInterval
from cache4diffusion.predictors import Reuse
from cache4diffusion.sites import Denoiser, Span

STEPS = 8


class Listed(toys.Blocks):
    """Takes and returns a list of ``[tokens, 4]``; rows may differ in length."""

    def forward(self, x, timestep, context):
        lengths = [len(row) for row in x]
        rows = nn.utils.rnn.pad_sequence(list(x), batch_first=True)
        hidden, gate = self.embed(rows) + context, torch.cos(timestep)[:, None, None]
        for block in self.blocks:
            hidden = block(hidden, gate)
        return [row[:length] for row, length in zip(self.out(hidden), lengths, strict=True)]


@pytest.fixture
def denoiser():
    return toys.randomise(toys.seeded(Listed)())


def latents(*lengths):
    return [torch.randn(length, 4, generator=toys.generator(i)) for i, length in enumerate(lengths)]


@torch.no_grad()
def loop(denoiser, x, frozen=False):
    found, context = [], torch.randn(len(x), 1, 8, generator=toys.generator(9))
    for i in range(STEPS):
        time = torch.full((len(x),), 0.5 if frozen else 1 - i / STEPS)
        found.append(torch.cat(denoiser(x, time, context)))
        if not frozen:
            x = [row - 0.1 * change for row, change in zip(x, denoiser_rows(found[-1], x), strict=True)]
    return found


def denoiser_rows(flat, like):
    return flat.split([len(row) for row in like])


COMPOSITIONS = {
    "whole": c4d.methods.TaylorSeerLite(interval=3),
    "residual": c4d.Composition(Denoiser(form="residual"), FixedInterval(3), Reuse()),
    "span": c4d.Composition(Span(), FixedInterval(3), Reuse()),
    "watched": c4d.methods.FBCache(threshold=1e9),
    "parts": c4d.methods.Fora(interval=3),
}


@pytest.mark.parametrize("lengths", [(5,), (5, 5), (5, 3)], ids=str)
@pytest.mark.parametrize("kind", COMPOSITIONS)
def test_a_cached_step_on_the_same_input_equals_the_full_one(kind, lengths, denoiser):
    x = latents(*lengths)
    plain = loop(denoiser, x, frozen=True)
    if kind == "residual" and lengths == (5, 3):
        pytest.skip("rows of different lengths have no output minus input")
    with c4d.accelerate(denoiser, COMPOSITIONS[kind]) as handle, handle.run(num_steps=STEPS):
        found = loop(denoiser, x, frozen=True)
        assert "c" in handle.stats["strip"]
        again = loop(denoiser, x)
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert all(step.isfinite().all() for step in again)


def test_rows_are_stacked_and_put_back_as_a_list(denoiser):
    roles = inputs_of(denoiser)
    x, time, context = latents(5, 5), torch.ones(2), torch.zeros(2, 1, 8)
    _, latent, _ = roles.split((x, time, context), {})
    assert torch.equal(latent, torch.stack(x))
    (rows, moved, _), _ = roles.at((x, time, context), {}, 2 * time, 3 * latent)
    assert isinstance(rows, list) and torch.equal(torch.stack(rows), 3 * latent)
    assert torch.equal(moved, 2 * time)
    _, latent, _ = roles.split((latents(5, 3), time, context), {})
    assert latent.shape == (2, 20)
    (whole, _, _), _ = roles.at((torch.stack(x), time, context), {}, time, latent)
    assert whole is latent


@pytest.mark.parametrize("value", [None, [], [[]], "x", [None]])
def test_what_is_no_latent_is_refused_in_words(value, denoiser):
    with pytest.raises(AnatomyError, match="or a list with one for each row"):
        inputs_of(denoiser).split((value, torch.ones(1), None), {})
