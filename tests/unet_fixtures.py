import pytest
import torch

from cache4diffusion.engine import host

SEEN = {}


def _shapes(value):
    if isinstance(value, (list, tuple)):
        return tuple(_shapes(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _shapes(item)) for key, item in value.items())
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


@pytest.fixture(autouse=True)
def seen_once(monkeypatch):
    """Equal denoisers are observed once per kind of call, not at every `accelerate`: observing has its own tests."""
    observe = host.observe

    def memoised(denoiser, args, kwargs):
        has_freeu = hasattr(getattr(denoiser, "up_blocks", [None])[0], "s1")
        key = (str(denoiser), has_freeu, _shapes(args), _shapes(kwargs))
        if key not in SEEN:
            SEEN[key] = observe(denoiser, args, kwargs)
        return SEEN[key]

    monkeypatch.setattr(host, "observe", memoised)
