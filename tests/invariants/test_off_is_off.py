"""At its ``off`` settings a method stays attached, is asked and records on every step, and changes not one bit."""

import pytest
import torch

import cache4diffusion as c4d
import toys
from cache4diffusion.gates import Step
from cache4diffusion.predictors import Corrector

methods = toys.methods

FLUX = {
    "ip-adapter-controlnet-4": {"ip_adapter": True, "controlnet": True, "batch": 4},
    "plain": {},
    "batch-4": {"batch": 4},
    "bf16-tuple": {"dtype": torch.bfloat16, "return_dict": False},
    "bf16-controlnet-4": {"dtype": torch.bfloat16, "batch": 4, "controlnet": True},
    "controlnet-tuple": {"controlnet": True, "return_dict": False},
    "controlnet-repeat": {"controlnet": "repeat", "batch": 4},
    "ip-adapter": {"ip_adapter": True},
    "guidance": {"guidance": True},
}


def flux_case(batch=1, dtype=torch.float32, controlnet=False, ip_adapter=False, guidance=False, return_dict=True):
    denoiser = toys.flux(guidance=guidance, ip_adapter=ip_adapter).to(dtype)
    inputs = toys.flux_inputs(batch, dtype=dtype)
    if controlnet:
        inputs |= toys.controlnet_inputs(batch, single=controlnet != "repeat", dtype=dtype)
        inputs["controlnet_blocks_repeat"] = controlnet == "repeat"
    if ip_adapter:
        inputs |= toys.ip_adapter_inputs(batch)
    if guidance:
        inputs["guidance"] = torch.full((batch,), 3.5)
    return denoiser, inputs, {"return_dict": return_dict}


class Asked:
    """Counts what an engine asks of its gate (or branch rule) and what its predictor takes in."""

    def __init__(self, engine, monkeypatch):
        self.proposals = self.updates = 0
        for owner, ask in ((engine.gate, "propose"), (engine.composition.cfg, "is_cached")):
            self._count(monkeypatch, owner, ask, "proposals")
        update = "update_seeing" if isinstance(engine.predictor, Corrector) else "update"
        self._count(monkeypatch, engine.composition.cfg or engine.predictor, update, "updates")

    def _count(self, monkeypatch, owner, method, counter):
        if owner is None:
            return
        found = getattr(type(owner), method)

        def counted(*args, **kwargs):
            setattr(self, counter, getattr(self, counter) + 1)
            return found(*args, **kwargs)

        monkeypatch.setattr(type(owner), method, counted)


def assert_consulted(name, handle, asked, num_steps):
    engine = handle._engines[0]
    guards = engine.composition.guards
    forced = sum(any(g.overrule(g.begin(), Step(i, num_steps)) is False for g in guards) for i in range(num_steps))
    assert asked.proposals >= num_steps - forced, "the gate was not asked on every step that no guard decides"
    assert asked.updates >= num_steps, "the predictor did not take in every step"
    assert set(handle.stats["strip"]) == {"F"}


@toys.with_cases("case", FLUX)
def test_flux_is_bit_equal(name, case):
    denoiser, inputs, options = flux_case(**FLUX[case])
    plain = toys.flux_loop(denoiser, inputs, 5, **options)
    with toys.accelerated(denoiser, name, toys.off(name), num_steps=5) as handle:
        found = toys.flux_loop(denoiser, inputs, 5, **options)
        assert set(handle.stats["strip"]) == {"F"} and handle.stats["total_steps"] == 5
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert all(a.dtype == b.dtype for a, b in zip(plain, found, strict=True))


@methods
def test_gate_is_asked_and_predictor_updated_on_every_step(name, monkeypatch):
    denoiser, branches = toys.flux(), [toys.flux_inputs(seed=s) for s in (0, 1)]
    with toys.accelerated(denoiser, name, toys.off(name), num_steps=6) as handle:
        asked = Asked(handle._engines[0], monkeypatch)
        toys.branch_loop(denoiser, branches, 6)
        assert_consulted(name, handle, asked, 6)


@toys.with_cases("count", (3, 2))
def test_sequential_branches_are_bit_equal(name, count):
    denoiser, branches = toys.flux(), [toys.flux_inputs(seed=s) for s in range(count)]
    plain = toys.branch_loop(denoiser, branches, 6)
    with toys.accelerated(denoiser, name, toys.off(name), num_steps=6) as handle:
        found = toys.branch_loop(denoiser, branches, 6)
        assert len(handle.stats["strips"]) == count
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


@toys.with_cases("batch", (4, 1))
def test_batched_guidance_on_dit_is_bit_equal(name, batch):
    denoiser = toys.dit()
    plain = toys.dit_loop(denoiser, batch, 6)
    with toys.accelerated(denoiser, name, toys.off(name), num_steps=6) as handle:
        found = toys.dit_loop(denoiser, batch, 6)
        assert handle.stats["strip"] == "FFFFFF"
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


@toys.with_cases("negative", (2, None))
def test_pipeline_is_bit_equal(name, negative):
    pipe, prompt = toys.flux_pipeline(), toys.prompt(1, negative=negative)
    plain = toys.generate(pipe, 6, **prompt)
    with c4d.accelerate(pipe, name, **toys.off(name)) as handle:
        found = toys.generate(pipe, 6, **prompt)
        assert len(handle.stats["strips"]) == (1 if negative is None else 2)
        assert handle.stats["strip"] == "FFFFFF"
    assert torch.equal(plain, found)


@pytest.mark.parametrize("name", [name for name in toys.CALIBRATED if "resample" in toys.CALIBRATED[name]])
def test_what_was_calibrated_for_fewer_steps_is_bit_equal(name):
    plain = toys.flux_loop(toys.flux(), toys.flux_inputs(), 17)
    denoiser = toys.flux()
    with toys.accelerated(denoiser, name, toys.off(name), num_steps=17):
        found = toys.flux_loop(denoiser, toys.flux_inputs(), 17)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@methods
def test_every_method_caches_at_its_active_settings(name):
    denoiser, branches = toys.flux(), [toys.flux_inputs(seed=s) for s in (0, 1)]
    with toys.accelerated(denoiser, name, num_steps=12) as handle:
        toys.branch_loop(denoiser, branches, 12)
        strips = handle.stats["strips"]
    assert set("".join(strips.values())) & set("cpm"), (
        f"{name} caches nothing in 12 steps of a small denoiser ({strips}): add settings at which it does to ACTIVE in "
        "tests/toys.py"
    )
