"""T-GATE: what is frozen, what is averaged and where guidance ends, against the card's pseudo-code."""

from collections import Counter

import pytest
import torch
from guided_loops import Prompted, assert_near
from slow_modules import SlowModules, made, timesteps_of

import cache4diffusion as c4d
from cache4diffusion.errors import AnatomyError, CompositionError, SettingError
from cache4diffusion.gates import FrozenCross, Place, Step
from cache4diffusion.guidance import DropBranch
from small_denoisers import unet

STEPS = 12


@pytest.fixture(scope="module")
def sd():
    return Prompted(unet(), "sample", (4, 8, 8))


@pytest.fixture(scope="module")
def latte():
    return Prompted(made("LatteTransformer3DModel")[0], "hidden_states", (4, 3, 8, 8))


class SlowTGate:
    """The card, i counted from 0; version 1 is P = Q = 1."""

    def __init__(self, prompted, m, W=2, P=1, Q=1):
        self.prompted, self.m, self.W, self.P, self.Q = prompted, m, W, P, Q
        self.i, self.cache, self.rows, self.computed = 0, {}, [], Counter()
        self.model = SlowModules(prompted.denoiser, self.rule, ("attn1", "attn2"))

    def rule(self, path, compute, args, kwargs):
        i, m = self.i, self.m
        if path.endswith("attn2"):
            is_reused = i >= m
        elif i < m - 1:
            is_reused = i > self.W and i % self.P != 0
        elif i == m - 1:
            is_reused = False
        else:
            is_reused = i % self.Q != 0
        if is_reused:
            return self.cache[path]
        self.computed[path] += 1
        out = compute()
        self.cache[path] = sum(out.chunk(2)) / 2 if i == m - 1 else out
        return out

    @torch.no_grad()
    def sample(self, steps):
        p, outputs = self.prompted, []
        x = p.start
        for self.i, time in enumerate(timesteps_of(steps)):
            if self.i < self.m:
                both = p.call(self.model, torch.cat([x, x]), time, torch.cat([p.uncond, p.cond]))
                uncond, cond = both.chunk(2)
                outputs.append(uncond + 3.0 * (cond - uncond))
            else:
                outputs.append(p.call(self.model, x, time, p.uncond))
            x = p.step(x, outputs[-1], steps)
        return outputs


def run(prompted, name, loop="batched", **settings):
    """Outputs, rows of every call that ran, and the handle."""
    seen = []
    hook = prompted.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs[prompted.name].shape[0]), with_kwargs=True
    )
    try:
        with c4d.accelerate(prompted.denoiser, name, **settings) as handle, handle.run(timesteps=timesteps_of(STEPS)):
            return getattr(prompted, loop)(STEPS), seen, handle
    finally:
        hook.remove()


@pytest.mark.parametrize("kind", ["sd", "latte"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("t-gate-v1", {"gate_step": 5}),
        ("t-gate-v2", {"gate_step": 7, "interval": 3, "warmup": 1}),
        ("t-gate-v2", {"gate_step": 6, "interval": 2, "warmup": 0, "late_interval": 3}),
    ],
)
def test_outputs_are_the_slow_references(kind, name, settings, request):
    prompted = request.getfixturevalue(kind)
    letters = {"warmup": "W", "interval": "P", "late_interval": "Q", "gate_step": "m"}
    slow = SlowTGate(prompted, **{letters[key]: value for key, value in settings.items()})
    expected = slow.sample(STEPS)
    for _ in range(2):
        reached, seen, handle = run(prompted, name, **settings)
        assert_near(reached, expected)
    batch, m = prompted.batch, settings["gate_step"]
    assert seen == [2 * batch] * m + [batch] * (STEPS - m)
    rested = Counter(path for record in handle.trace.records for path, _ in record.rested or ())
    if name == "t-gate-v2":
        ours = {path: 2 * STEPS - rested[path] for path in slow.computed}
        assert ours == {path: count + STEPS for path, count in slow.computed.items()}
    assert handle.memory["held"] == 0


def test_cross_attention_runs_once_per_step_before_the_gate(sd):
    ran = Counter()
    for path, module in sd.denoiser.named_modules():
        if path.endswith("attn2.to_q"):
            module.register_forward_hook(lambda *_, path=path: ran.update([path]))
    _, _, handle = run(sd, "t-gate-v1", gate_step=5)
    observed = set(ran.values())
    assert len(observed) == 1 and observed <= {5, 6}, "6: the anatomy is seen in a call of its own"
    assert handle.stats["strip"] == "F" * 5 + "c" * (STEPS - 5)


def test_an_interval_of_1_is_version_1(sd):
    one, _, _ = run(sd, "t-gate-v1", gate_step=5)
    two, _, _ = run(sd, "t-gate-v2", gate_step=5, interval=1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("t-gate-v1", {"gate_step": 0}),
        ("t-gate-v1", {"gate_step": STEPS}),
        ("t-gate-v2", {"gate_step": 0, "interval": 1}),
    ],
)
@pytest.mark.filterwarnings("ignore:0 of")
def test_a_gate_behind_the_last_step_changes_nothing(sd, name, settings):
    reached, seen, handle = run(sd, name, **settings)
    assert all(torch.equal(a, b) for a, b in zip(reached, sd.batched(STEPS), strict=True))
    assert set(seen) == {2 * sd.batch}
    assert not any("no guidance was seen" in note for note in handle.trace.notes)


def test_the_schedule_is_the_cards():
    gate = FrozenCross(10, interval=5, warmup=2)
    state = gate.begin_at(Place(25, decision="attn"))
    assert [i for i in range(25) if not gate.propose(state, Step(i, 25), None)] == [0, 1, 2, 5, 9, *range(10, 25)]
    state = gate.begin_at(Place(25, decision="cross_attn"))
    assert [i for i in range(25) if not gate.propose(state, Step(i, 25), None)] == list(range(10))


def test_equal_prompts_keep_each_branchs_own(sd):
    """Guidance 1 and equal prompts: the mean of the halves is either half, so only guidance's end could be seen."""
    same = Prompted(sd.denoiser, "sample", (4, 8, 8))
    same.cond = same.uncond
    frozen, _, _ = run(same, "t-gate-v1", gate_step=5)
    kept = {}

    def rule(path, compute, args, kwargs):
        if now[0] < 5:
            kept[path] = compute()
        return kept[path]

    now = [0]
    slow = SlowModules(sd.denoiser, rule, ("attn2",))
    assert_near(frozen, same.batched(STEPS, slow, first=lambda i: now.__setitem__(0, i)))


@pytest.mark.parametrize("name", ["t-gate-v1", "t-gate-v2"])
def test_calls_of_one_branch_each(sd, name):
    """The first call of a step is left, with the mean over both; it answers the second."""
    m, frozen, last = 5, {}, {}

    def rule(path, compute, args, kwargs):
        if now[0] >= m:
            return frozen[path]
        out = compute()
        if path in last and now[0] == m - 1:
            frozen[path] = (last[path] + out) / 2
        last[path] = out
        return out

    now, slow = [0], None
    slow = SlowModules(sd.denoiser, rule, ("attn2",))
    expected = []
    x = sd.start
    with torch.no_grad():
        for now[0], time in enumerate(timesteps_of(STEPS)):
            cond = sd.call(slow, x, time, sd.cond)
            if now[0] < m:
                uncond = sd.call(slow, x, time, sd.uncond)
                expected.append(uncond + 3.0 * (cond - uncond))
            else:
                expected.append(cond)
            x = sd.step(x, expected[-1], STEPS)
    settings = {} if name == "t-gate-v1" else {"interval": 1}
    reached, seen, _ = run(sd, name, "sequential", gate_step=m, **settings)
    assert_near(reached, expected)
    assert len(seen) == 2 * m + (STEPS - m)


@torch.no_grad()
def test_guidance_that_begins_behind_the_gate_runs_both_branches_once(sd):
    """Trap: the branch that is left would never hear of the prompt."""
    outputs = []
    for cond in (sd.cond, sd.cond + 1):
        seen = []
        hook = sd.denoiser.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["sample"].shape[0]), with_kwargs=True
        )
        with c4d.accelerate(sd.denoiser, "t-gate-v1", gate_step=2) as handle, handle.run(timesteps=timesteps_of(7)):
            for i, time in enumerate(timesteps_of(7)):
                x = sd.start * (1 - i / 8)
                if i < 4:
                    sd.call(sd.denoiser, x, time, sd.uncond)
                else:
                    both = sd.call(sd.denoiser, torch.cat([x, x]), time, torch.cat([sd.uncond, cond]))
        hook.remove()
        assert seen == [2, 2, 2, 2, 4, 2, 2]
        assert torch.equal(*both.chunk(2))
        outputs.append(both)
    assert not torch.equal(*outputs)


@torch.no_grad()
def test_a_prompt_that_is_replaced_behind_the_gate_is_heard_of(sd):
    outputs = []
    for later in (sd.cond + 1, sd.cond + 2):
        seen = []
        hook = sd.denoiser.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["sample"].shape[0]), with_kwargs=True
        )
        with c4d.accelerate(sd.denoiser, "t-gate-v1", gate_step=2) as handle, handle.run(timesteps=timesteps_of(7)):
            for i, time in enumerate(timesteps_of(7)):
                x = sd.start * (1 - i / 8)
                text = torch.cat([sd.uncond, sd.cond if i < 4 else later])
                both = sd.call(sd.denoiser, torch.cat([x, x]), time, text)
        hook.remove()
        assert seen == [4, 4, 2, 2, 4, 2, 2]
        outputs.append(both)
    assert not torch.equal(*outputs)


def test_memory_is_known_before(sd):
    both = {"sample": torch.zeros(4, 4, 8, 8), "encoder_hidden_states": torch.cat([sd.uncond, sd.cond])}
    for name in ("t-gate-v1", "t-gate-v2"):
        _, _, handle = run(sd, name, gate_step=5)
        given = {**both, "timestep": torch.full((4,), 500.0)}
        assert c4d.cache_bytes(sd.denoiser, name, inputs=given, steps=STEPS, gate_step=5) == handle.memory["peak"]


def test_joint_attention_is_refused():
    denoiser, inputs = made("FluxTransformer2DModel")
    for name in ("t-gate-v1", "t-gate-v2"):
        with c4d.accelerate(denoiser, name), torch.no_grad(), pytest.raises(AnatomyError, match="cross_attn"):
            denoiser(**inputs)


def test_settings_out_of_range_are_refused():
    with pytest.raises(SettingError, match="use shares_history=True"):
        DropBranch(merges=True)
    with pytest.raises(SettingError, match="steps must be 0 or more"):
        FrozenCross(-1)
    with pytest.raises(CompositionError, match="go on with the parts"):
        c4d.accelerate(made("PixArtTransformer2DModel")[0], "t-gate-v1", site="denoiser")
