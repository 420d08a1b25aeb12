"""`quantised`: linear layers in few bits until `remove`, and what a calibration makes of them."""

import sys

import pytest
import torch
from torch import nn

import cache4diffusion as c4d
import toys
from cache4diffusion import quantising
from cache4diffusion.errors import AlreadyAcceleratedError, SettingError
from toys import Dicts, flux, flux_inputs, flux_loop

STEPS = 6


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao.quantization", reason="torchao is not installed")


def test_without_torchao_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(SettingError, match="pip install torchao"):
        c4d.quantised(flux())


@pytest.mark.parametrize("bits", ["int8", "int8-dynamic", "fp8"])
def test_outputs_are_near_and_everything_is_put_back(torchao, bits):
    denoiser = flux()
    before, plain = Dicts(denoiser), flux_loop(denoiser, flux_inputs(), 2)
    weights = {name: id(parameter) for name, parameter in denoiser.named_parameters()}
    with c4d.quantised(denoiser, bits) as made:
        outputs = flux_loop(denoiser, flux_inputs(), 2)
        assert len(made) > 10
        inside = [
            type(m.weight.data) for p, m in denoiser.named_modules() if isinstance(m, nn.Linear) and "blocks" in p
        ]
        assert torch.Tensor not in inside
        assert type(denoiser.proj_out.weight.data) is torch.Tensor
        error = (outputs[-1] - plain[-1]).norm() / plain[-1].norm()
        assert 0 < error < 0.1
    assert len(made) == 0 and not before.changed()
    assert {name: id(parameter) for name, parameter in denoiser.named_parameters()} == weights
    assert all(torch.equal(a, b) for a, b in zip(flux_loop(denoiser, flux_inputs(), 2), plain, strict=True))
    made.remove()


def test_a_configuration_of_torchaos_own_will_do(torchao):
    denoiser = flux()
    with c4d.quantised(denoiser, torchao.Int8WeightOnlyConfig()) as made:
        assert repr(made).endswith("linear layers in Int8WeightOnlyConfig>")


def test_what_cannot_be_is_refused(torchao):
    denoiser = flux()
    with pytest.raises(SettingError, match="did you mean 'int8'"):
        c4d.quantised(denoiser, "int9")
    with c4d.accelerate(denoiser, "fora"), pytest.raises(AlreadyAcceleratedError, match="Quantise first"):
        c4d.quantised(denoiser)
    with c4d.quantised(denoiser), pytest.raises(SettingError, match="cannot be quantised again"):
        c4d.quantised(denoiser)
    with pytest.raises(SettingError, match="no linear layer"):
        c4d.quantised(toys.MLP())


def test_weights_are_put_back_to_where_the_layer_is_now():
    """A pipeline may be moved while it is quantised."""
    layers = nn.Sequential(nn.Linear(2, 3))
    linear = layers[0]
    weight, elsewhere = linear.weight, torch.device("meta")  # where it was when it was quantised
    kept = quantising._Layer(layers, "0", linear, weight, elsewhere, dict(linear.__dict__))
    linear.weight = nn.Parameter(torch.zeros(3, 2))
    kept.put_back()
    assert linear.weight is weight
    assert weight.device.type == "cpu"


def measured(pipe, **options):
    call = {"height": 16, "width": 16, "guidance_scale": 1.0, "output_type": "latent"}
    prompts = [toys.prompt(seed) for seed in (1, 2)]
    options = {"trial": 0, "unit": "span", "reach": 5, **options}
    return c4d.calibrate(pipe, "cachequant", prompts, steps=STEPS, call=call, **options)


def test_a_calibration_is_that_of_the_quantised_network(torchao):
    pipe = toys.flux_pipeline()
    plain = measured(pipe)
    with c4d.quantised(pipe, "int8"):
        made = measured(pipe, cache_dtype="int8", trial=1)
        settings = {"interval": 3, "calibration": made, "cache_dtype": "int8"}
        with c4d.accelerate(pipe, "cachequant", **settings) as handle:
            latent = toys.generate(pipe, STEPS)
            assert handle.stats["strip"].count("F") == 2
    assert latent.isfinite().all()
    name = next(key for key in made.entry.fit if key.startswith("scale"))
    assert not torch.equal(made.entry.fit[name], plain.entry.fit[name])
    assert made.options["cache_dtype"] == "int8"
    known, other = (entry.fingerprint.weights for entry in (made.entry, plain.entry))
    assert None not in (known, other) and known != other, "weights that were quantised are other weights"
