"""The contract of token rules, for every method that has one: no shape follows from data, nothing from the device."""

import dataclasses

import pytest
import torch
from reduction_cases import Waits, case, place, tokens, with_streams
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cache4diffusion as c4d
import toys
from cache4diffusion.devices import sent
from cache4diffusion.gates.base import PartInput
from cache4diffusion.tokens import ClusterTokens, RoutedTokens, TopScore, WeightedTokens
from ranks import on_ranks
from simulated import can_register, register
from small_denoisers import accelerated

STEPS = 6
RULED = sorted(name for name in c4d.METHODS if c4d.METHODS[name](**toys.ACTIVE[name]).compose().tokens is not None)
# The only one whose number of tokens follows from what it sees: the batch merges as many as its threshold lets it, in
# steps of a bucket. Without the threshold it is its ratio's.
OF_DATA = {"ca-tome": {"threshold": -1.0}}


class Shapes(TorchDispatchMode):
    """A guard: every operation of a run, and the shapes of what it makes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen.append(
            (str(func), [tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)])
        )
        return out


def runs_on(name):
    """A small denoiser for the method, and what it is called with."""
    if name in {*toys.REDUCTIONS, "dato"} - {"asymrnr"}:
        return case("unet")
    return toys.flux(), {**toys.flux_inputs(), "return_dict": False}


def other_data(inputs):
    """The same shapes, and all of the latent's values others."""
    rng = torch.Generator().manual_seed(9)
    latent = "sample" if "sample" in inputs else "hidden_states"
    return {**inputs, latent: 3 * torch.randn(inputs[latent].shape, generator=rng)}


@pytest.mark.parametrize("name", RULED)
def test_a_shape_guard_sees_the_same_run_for_other_data(name):
    """Operations and shapes depend on steps and layers alone, so that graphs may be captured."""
    denoiser, inputs = runs_on(name)
    settings = toys.ACTIVE[name] | OF_DATA.get(name, {})
    accelerated(denoiser, inputs, STEPS, name, **settings)  # looked at once, not counted
    seen = []
    for given in (inputs, other_data(inputs)):
        with Shapes() as guard:
            _, trace, _ = accelerated(denoiser, given, STEPS, name, **settings)
        assert set(trace.strip()) - {"F"}
        seen.append(guard.seen)
    assert len(seen[0]) > 100
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    "rule",
    [
        TopScore(0.5, score="random"),
        ClusterTokens(4),
        RoutedTokens(0.5, PartInput({"a": torch.zeros(50, 5)})),
        WeightedTokens(weights=PartInput({"block.0": torch.rand(50, 24)})),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_choosing_tokens_waits_for_nothing(rule, monkeypatch):
    """What is made on the host is not waited for; `test_making_a_plan_waits_for_nothing` has the other rules."""
    with_streams(monkeypatch)
    x, state = tokens().to("meta"), rule.init()
    where = dataclasses.replace(place(step=1), entering=x, num_blocks=1)
    with Waits() as waits:
        if isinstance(rule, ClusterTokens):
            rule.survey(state, {"image": x}, None)
            where = dataclasses.replace(where, survey=state)
        index = rule.select(state, where, x.device)
    assert index.device.type == "meta"
    assert waits.copies
    assert not waits.seen


def test_devices_without_streams_are_waited_for():
    """As Apple's: they may read ordinary memory later, and what is drawn is gone by then."""
    with Waits() as waits:
        sent(torch.zeros(3), torch.device("meta"))
    assert waits.copies == len(waits.seen) == 1


def test_what_is_sent_beside_the_computation_lies_in_page_locked_memory(monkeypatch):
    """Else the device may read it when it is gone."""
    with_streams(monkeypatch)
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda made: pinned.append(made) or made.clone())
    x = torch.zeros(3)
    with Waits() as waits:
        sent(x, torch.device("meta"))
    assert pinned == [x]
    assert not waits.seen


@torch.no_grad()
def looped(name, device):
    """Outputs of a run on a device, brought to the host, and the strip."""
    denoiser, inputs = runs_on(name)
    given = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    latent = "sample" if "sample" in given else "hidden_states"
    x, outputs = given[latent], []
    with c4d.accelerate(denoiser.to(device), name, **toys.ACTIVE[name]) as handle, handle.run(num_steps=STEPS):
        for i in range(STEPS):
            time = torch.full((x.shape[0],), 1 - i / STEPS, device=device) * (999 if latent == "sample" else 1)
            outputs.append(denoiser(**{**given, latent: x, "timestep": time})[0])
            x = x - outputs[-1] / STEPS
        return [out.cpu() for out in outputs], handle.trace.strip()


def job_outputs(names):
    device = register()
    return [looped(name, device) for name in names]


@pytest.mark.slow
@pytest.mark.skipif(not can_register(), reason="this PyTorch takes no devices from Python")
def test_the_same_tokens_are_chosen_on_a_device_that_nobody_has_heard_of(tmp_path):
    """What is drawn is drawn on the host: other tokens would make other outputs."""
    (found,) = on_ranks(job_outputs, RULED, tmp_path=tmp_path, count=1)
    for name, (outputs, strip) in zip(RULED, found, strict=True):
        expected, expected_strip = looped(name, "cpu")
        assert strip == expected_strip, name
        for mine, theirs in zip(outputs, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
