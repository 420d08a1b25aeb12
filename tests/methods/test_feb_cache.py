"""FEB-Cache: the released table, code by code, against a slow reference; the scale of the output."""

import pytest
import torch

import cache4diffusion as c4d
from cache4diffusion.engine.denoiser import scaled
from cache4diffusion.errors import SettingError
from cache4diffusion.gates import CodeTable, Place, Step
from cache4diffusion.methods.feb_cache import DIT_50
from cache4diffusion.sites import ScaledParts
from small_denoisers import Alike, SlowFlux, accelerated, differences, dit, dit_inputs, flux_inputs, sample
from weights import ready

TABLE = (0, 2, 1, 0, 1, 2, 2, 0, 0)  # the last step's code first: executed F F c c m F m c F
STEPS = len(TABLE)


def codes_of(kind, steps, codes):
    """Which steps of a run are full for a kind of part."""
    gate = CodeTable(codes)
    state = gate.begin_at(Place(steps, decision=kind))
    return [i for i in range(steps) if not gate.propose(state, Step(i, steps), None)]


def test_the_table_is_the_released_one():
    cached = {i for i, code in enumerate(DIT_50) if code}
    assert len(DIT_50) == 50
    assert set(DIT_50) == {0, 2}
    assert cached == {1, 2, 4, 5, 7, 8, 9, *range(11, 28, 2)}


@pytest.mark.parametrize("kind", ["attn", "cross_attn", "ffn", "fused", "other", ""])
def test_over_50_steps_the_last_step_has_the_first_code(kind):
    full = codes_of(kind, 50, DIT_50)
    assert full == [i for i in range(50) if DIT_50[49 - i] == 0]
    assert full[:22] == list(range(22))
    assert full[-1] == 49
    assert len(full) == 50 - 16


def test_the_docstrings_strip(model):
    _, trace, _ = accelerated(model, flux_inputs(1), 50, "feb-cache")
    assert trace.strip() == "F" * 22 + "cFcFcFcFcFcFcFcFcFcccFccFccF"


def test_code_1_reuses_attention_alone():
    assert codes_of("attn", STEPS, TABLE) == codes_of("cross_attn", STEPS, TABLE) == [0, 1, 5, 8]
    for kind in ("ffn", "fused", "other", ""):
        assert codes_of(kind, STEPS, TABLE) == [0, 1, 4, 5, 6, 8]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 25, 50, 100, 101])
def test_a_table_is_stretched_by_the_share_of_steps_that_remain_and_step_0_is_full(steps):
    full = codes_of("ffn", steps, DIT_50)
    assert full == [i for i in range(steps) if i == 0 or DIT_50[(steps - 1 - i) * 50 // steps] == 0]


def test_a_branch_called_beyond_the_promised_steps_has_the_last_steps_code():
    gate = CodeTable((0, 2))
    assert not gate.propose(2, Step(9, 4), None)
    assert CodeTable((2, 0)).propose(2, Step(9, 4), None)


@pytest.mark.parametrize("codes", [(), (0, 3), (-1,)])
def test_other_codes_are_refused(codes):
    with pytest.raises(SettingError, match="use one or more of 0, 1 and 2"):
        CodeTable(codes)


class ByTable(Alike):
    """Each step by its code, as in the released block: attention, then the MLP on what the stream has become."""

    def __init__(self, table):
        self.table, self.kept, self.code = table, {}, None

    def begin(self, step):
        self.code = self.table[len(self.table) - 1 - step]

    def give(self, name, kind, entering, compute):
        is_reused = self.code > 0 if kind == "attn" else self.code == 2
        if not is_reused:
            self.kept[name] = compute()
        return self.kept[name]


@pytest.mark.parametrize("delta", [1.0, 0.965])
def test_every_step_is_the_slow_references_and_divided_by_delta(model, delta):
    slow = SlowFlux(model, ByTable(TABLE))
    expected = sample(lambda **kwargs: (slow(**kwargs)[0] / delta,), flux_inputs(2), STEPS)
    reached, trace, stats = accelerated(model, flux_inputs(2), STEPS, "feb-cache", table=TABLE, delta=delta)
    assert trace.strip() == "FFccmFmcF"
    assert max(differences(reached, expected)) <= 1e-5
    assert stats["syncs"] == 0


def test_a_table_of_zeros_and_delta_1_is_the_plain_denoiser(model):
    plain = sample(model, flux_inputs(2), 6)
    reached, trace, _ = accelerated(model, flux_inputs(2), 6, "feb-cache", table=(0,) * 6, delta=1.0)
    assert trace.strip() == "FFFFFF"
    assert all(torch.equal(a, b) for a, b in zip(reached, plain, strict=True))


def test_a_learned_variance_is_not_divided():
    small = dit()
    denoiser = ready(type(small).from_config({**small.config, "out_channels": 8}))
    plain = sample(denoiser, dit_inputs(2), 1)[0]
    found = accelerated(denoiser, dit_inputs(2), 1, "feb-cache", table=(0,), delta=0.5)[0][0]
    assert plain.shape[1] == 8
    torch.testing.assert_close(found[:, :4], plain[:, :4] * 2)
    assert torch.equal(found[:, 4:], plain[:, 4:])


def test_dividing_each_branch_is_dividing_what_guidance_makes_of_them():
    """The code divides behind guidance; the first steps of both ways are the same, and so all that follow."""
    cond, uncond = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    behind = scaled(uncond + 3 * (cond - uncond), cond, 1 / 0.965)
    before = scaled(uncond, cond, 1 / 0.965) + 3 * (scaled(cond, cond, 1 / 0.965) - scaled(uncond, cond, 1 / 0.965))
    torch.testing.assert_close(before, behind)


def test_what_is_divided_is_not_the_hosts_own_output():
    output = torch.ones(1, 8, 2, 2)
    found = scaled(output, torch.ones(1, 4, 2, 2), 0.5)
    assert output.eq(1).all()
    assert found[:, :4].eq(0.5).all()
    assert found[:, 4:].eq(1).all()


def test_dits_parts_are_reused_before_their_gate():
    """With an input that stays, a cached step is the full one, whatever its code."""
    denoiser = dit()
    inputs = dit_inputs(2) | {"timestep": torch.full((2,), 500)}
    with torch.no_grad(), c4d.accelerate(denoiser, "feb-cache", table=TABLE) as handle, handle.run(num_steps=STEPS):
        outputs = [denoiser(**inputs)[0].clone() for _ in range(STEPS)]
        assert handle.trace.strip() == "FFccmFmcF"
    assert all((output - outputs[0]).abs().max() <= 1e-5 for output in outputs)


@pytest.mark.parametrize("decide", ["batch", "row"])
def test_full_and_cached_steps_are_divided_whoever_decides(decide):
    denoiser = dit()
    inputs = dit_inputs(2) | {"timestep": torch.full((2,), 500)}
    site = ScaledParts(divisor=2.0)
    with torch.no_grad():
        (plain,) = denoiser(**inputs)
        with c4d.accelerate(denoiser, "fora", interval=2, site=site, decide=decide) as handle:
            with handle.run(num_steps=4):
                outputs = [denoiser(**inputs)[0].clone() for _ in range(4)]
            assert handle.trace.strip() == "FcFc"
    for output in outputs:
        torch.testing.assert_close(output, plain / 2)


def test_a_divisor_of_nothing_is_refused():
    with pytest.raises(SettingError, match="delta"):
        c4d.method("feb-cache", delta=0.0)
    with pytest.raises(SettingError, match="divisor must be above 0"):
        ScaledParts(divisor=0.0)
