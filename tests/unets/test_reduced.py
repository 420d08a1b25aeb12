"""Parts on fewer tokens, beside what else a U-Net is given."""

import pytest
import torch
from unet_zoo import inputs, ip_adapter_like

import cache4diffusion as c4d


def masked(size):
    """An IP-adapter for the upper half of the image."""
    mask = torch.zeros(1, 1, size, size)
    mask[..., : size // 2, :] = 1
    return {**inputs("ip-adapter"), "cross_attention_kwargs": {"ip_adapter_masks": [mask]}}


def run(denoiser, given, name, **settings):
    with c4d.accelerate(denoiser, name, **settings) as handle, handle.run(num_steps=2), torch.no_grad():
        outputs = [denoiser(**given).sample for _ in range(2)]
        return outputs, handle.trace, handle.stats["notes"]


@pytest.mark.parametrize("name", ["tome", "toma"])
def test_cross_attention_with_maps_of_the_image_is_computed_whole(name):
    """The host scales a map to a grid of as many tokens as ask: of those that are left there is none."""
    denoiser, given = ip_adapter_like(), masked(8)
    found, trace, notes = run(denoiser, given, name, merge_cross_attn=True)
    expected, _, _ = run(denoiser, given, name, merge_cross_attn=False)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert any("attn2 is given a map of the image" in note for note in notes)
    assert {path.rsplit(".", 1)[1] for path, _, _ in trace.of()[1].reduced.parts} <= {"attn1", "ff"}


def test_maps_with_as_many_rows_as_there_are_tokens_are_no_positions():
    """Attention on 4 x 4 tokens, and maps of 16 x 16."""
    found, _, _ = run(ip_adapter_like(), masked(16), "tome")
    plain, _, _ = run(ip_adapter_like(), masked(16), "tome", ratio=0.0)
    assert not torch.equal(found[1], plain[1])
