"""Nothing goes by a device's name."""

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

import cache4diffusion as c4d
from cache4diffusion import copies, devices
from cache4diffusion.trace import Timer
from ranks import on_ranks
from simulated import can_register, register
from toys import ACTIVE, flux, flux_inputs

SOURCE = Path(c4d.__file__).parent
METHODS = ["fora", "taylorseer", "fbcache", "speca", "dmd"]
STEPS = 12


@torch.no_grad()
def sampled(name, device):
    denoiser = flux().to(device)
    given = {key: value.to(device) for key, value in flux_inputs().items()}
    with c4d.accelerate(denoiser, name, **ACTIVE[name]) as handle, handle.run(num_steps=STEPS):
        x, outputs = given["hidden_states"], []
        for i in range(STEPS):
            time = torch.full((1,), 1 - i / STEPS, device=device)
            outputs.append(denoiser(**given | {"hidden_states": x, "timestep": time}, return_dict=False)[0])
            x = x - outputs[-1] / STEPS
        assert all(output.device.type == torch.device(device).type for output in outputs)
    assert handle.report()
    return [output.cpu() for output in outputs], handle.trace.strip()


@pytest.mark.parametrize("name", METHODS)
def test_methods_run_without_a_call_of_torch_cuda(name, monkeypatch):
    """Whatever way it is come by: torch itself may ask, this library may not."""

    def refusing(called, found):
        def call(*args, **kwargs):
            assert not sys._getframe(1).f_globals["__name__"].startswith("cache4diffusion"), called
            return found(*args, **kwargs)

        return call

    for called, found in list(vars(torch.cuda).items()):
        if inspect.isfunction(found) and not called.startswith("_"):
            monkeypatch.setattr(torch.cuda, called, refusing(called, found))
    _, strip = sampled(name, "cpu")
    assert set(strip) - {"F"}


def job_simulated(names):
    device = register()
    assert not devices.has_clock(device)
    assert type(copies.copy_engine(device)) is copies.CopyEngine
    assert Timer().events(device) is None
    with pytest.raises(RuntimeError, match="on the same device"):
        torch.ones(2, device=device) + torch.ones(2)
    return [sampled(name, device) for name in names]


@pytest.mark.skipif(not can_register(), reason="this PyTorch takes no devices from Python")
@pytest.mark.parametrize("names", [METHODS[:3], pytest.param(METHODS[3:], marks=pytest.mark.slow)])
def test_methods_run_on_a_device_that_nobody_has_heard_of(names, tmp_path):
    (found,) = on_ranks(job_simulated, names, tmp_path=tmp_path, count=1)
    for name, (outputs, strip) in zip(names, found, strict=True):
        wanted, wanted_strip = sampled(name, "cpu")
        assert strip == wanted_strip, name
        assert set(strip) - {"F"}, name
        for a, b in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def cuda_only(source: str) -> list[int]:
    """Lines that go by CUDA's name: ``torch.cuda``, ``x.cuda()``, ``"cuda"`` or ``"cuda:0"``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        is_attribute = isinstance(node, ast.Attribute) and node.attr in ("cuda", "is_cuda")
        is_name = (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch("cuda(:.*)?", node.value)
        )
        is_import = isinstance(node, (ast.Import, ast.ImportFrom)) and "cuda" in ast.unparse(node)
        if is_attribute or is_name or is_import:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    "line",
    [
        "torch.cuda.synchronize()",
        "x.cuda()",
        "x.is_cuda",
        "x.to('cuda')",
        "d.type == 'cuda:1'",
        "from torch import cuda",
    ],
)
def test_what_goes_by_the_name_of_cuda_is_seen(line):
    assert cuda_only(line) == [1]


def test_no_line_of_the_source_goes_by_the_name_of_cuda():
    found = [
        f"{path.relative_to(SOURCE)}:{line}"
        for path in sorted(SOURCE.rglob("*.py"))
        for line in cuda_only(path.read_text())
    ]
    assert found == []


class Streams:
    """What a module of torch such as ``torch.xpu`` has."""

    def __init__(self, *names):
        vars(self).update(dict.fromkeys(names, lambda *args, **kwargs: None))


def test_copies_beside_the_computation_are_made_where_a_device_has_streams(monkeypatch):
    modules = {"xpu": Streams("Stream", "Event", "stream", "current_stream"), "mps": Streams("Event")}
    monkeypatch.setattr(torch, "get_device_module", lambda device: modules[device.type])
    assert type(copies.copy_engine(torch.device("xpu:0"))) is copies.StreamCopyEngine
    assert type(copies.copy_engine(torch.device("mps"))) is copies.CopyEngine
    assert type(copies.copy_engine(torch.device("cpu"))) is copies.CopyEngine


def test_what_needs_float64_is_brought_to_the_host_where_a_device_has_none(monkeypatch):
    x = torch.randn(3)
    monkeypatch.setattr(devices, "has_double", lambda device: False)
    assert devices.in_double(x).dtype == torch.float64
    assert torch.equal(devices.in_double(x), x.double())
