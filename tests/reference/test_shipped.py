"""Calibrations that ship belong to the weights that ship."""

import warnings

import pytest

import cache4diffusion as c4d
from cache4diffusion import reference
from cache4diffusion.calibration.store import opened
from cache4diffusion.data import shipped_calibrations

SHIPPED = [(name, model) for name in sorted(c4d.METHODS) for model in shipped_calibrations(name)]


@pytest.fixture(scope="module")
def denoisers():
    models = {model for _, model in SHIPPED}
    return {model: getattr(reference.load(model), reference.model_named(model).denoiser) for model in models}


def test_there_are_some_and_they_are_small():
    assert {"smoothcache", "teacache", "magcache", "l2c", "lazydit"} <= {name for name, _ in SHIPPED}
    assert sum(shipped_calibrations(name)[model].stat().st_size for name, model in SHIPPED) <= 2_000_000


@pytest.mark.parametrize(("name", "model"), SHIPPED)
def test_it_was_made_with_these_weights(denoisers, name, model):
    made = opened(model, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # other weights are only warned of
        made.check(denoisers[model], "transformer", strict=True)
    assert made.provenance.steps == reference.model_named(model).sampling["num_inference_steps"]
    c4d.method(name, calibration=model).compose()
