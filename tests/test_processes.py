"""Samples that several processes share, and processes that share nothing."""

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from ranks import Spy, on_ranks
from toys import flux, flux_inputs, flux_loop

import cache4diffusion as c4d

STEPS = 10


def parallel_flux():
    """Split over the processes of this group by Ulysses, on devices that are all the CPU."""
    denoiser = flux()
    torch.accelerator.device_count = lambda: 1  # by which diffusers divides
    denoiser.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))
    return denoiser


def inputs(batch=1):
    return flux_inputs(batch, text=6, return_dict=False)


def sampled(denoiser, method=None, settings=None, batch=1, **options):
    """Outputs of all steps, the strip and the scores."""
    if method is None:
        return flux_loop(denoiser, inputs(batch), STEPS), "", []
    with c4d.accelerate(denoiser, method, **(settings or {}), **options) as handle:
        with handle.run(num_steps=STEPS):
            outputs = flux_loop(denoiser, inputs(batch), STEPS)
        records = list(handle.trace.records)
        return outputs, "".join(r.symbol for r in records), [r.scores for r in records]


def job_ulysses(method, settings, batch):
    denoiser = parallel_flux()
    with Spy() as spy:
        found = sampled(denoiser, method, settings, batch)
    return (*found, spy.calls)


CASES = {
    "fora": {"interval": 3},
    "taylorseer": {"interval": 4},
    "taylorseer-lite": {"interval": 4},
    "fbcache": {"threshold": 0.5},
    "teacache": {"threshold": 0.3},
    "speca": {"threshold": 0.5},
    "easycache": {"threshold": 0.5, "warmup": 1},
    "bwcache": {"threshold": 9.0, "tail": 0.0},
    "dbprune": {"threshold": 0.5, "front": 1, "warmup": 2},
}


@pytest.mark.parametrize("method", CASES)
def test_ulysses_gives_what_a_single_process_gives(method, tmp_path):
    outputs, strip, scores = sampled(flux(), method, CASES[method])
    assert len(set(strip)) > 1
    for found, found_strip, found_scores, _ in on_ranks(job_ulysses, method, CASES[method], 1, tmp_path=tmp_path):
        assert found_strip == strip
        for a, b in zip(found, outputs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
