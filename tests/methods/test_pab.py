"""PAB: which attention is computed when, against the card's counters, and which kind an attention is."""

from collections import Counter

import pytest
import torch
from slow_modules import SlowModules, accelerated, made, sample, timesteps_of

import cache4diffusion as c4d
from cache4diffusion.anatomy import observe
from cache4diffusion.errors import AnatomyError, SettingError
from cache4diffusion.gates import Broadcast, Place, Step

STEPS = 14
ENDS = ("attn1", "attn2")


def kind_of(path):
    return "cross" if path.endswith("attn2") else "temporal" if path.startswith("temporal") else "spatial"


class SlowPAB:
    """The card, module by module: ``reuse = n % range != 0 and lo < int(timestep) < hi``."""

    def __init__(self, ranges, window, steps):
        self.ranges, self.window, self.total = ranges, window, steps
        self.counts, self.last, self.computed, self.timestep = Counter(), {}, Counter(), 0.0

    def __call__(self, path, compute, args, kwargs):
        every, (low, high) = self.ranges[kind_of(path)], self.window
        reuse = self.counts[path] % every != 0 and low < int(self.timestep) < high
        self.counts[path] = (self.counts[path] + 1) % self.total
        if not reuse:
            self.computed[path] += 1
            self.last[path] = compute()
        return self.last[path]

    def at(self, step):
        self.timestep = timesteps_of(self.total)[step]


@pytest.mark.parametrize(
    ("ranges", "window"), [((2, 4, 6), (100.0, 850.0)), ((2, 3, 6), (0.0, 1000.0)), ((5, 1, 2), (0.0, 700.0))]
)
def test_latte_is_the_slow_reference(ranges, window):
    denoiser, inputs = made("LatteTransformer3DModel")
    slow = SlowPAB(dict(zip(("spatial", "temporal", "cross"), ranges, strict=True)), window, STEPS)
    reference = SlowModules(denoiser, slow, ENDS)
    expected = sample(reference, inputs, STEPS, first=slow.at)
    again = sample(reference, inputs, STEPS, first=slow.at)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True)), "the counters reset themselves"
    spatial, temporal, cross = ranges
    settings = {"spatial": spatial, "temporal": temporal, "cross": cross, "window": window}
    for _ in range(2):
        reached, handle = accelerated(denoiser, inputs, STEPS, "pab", **settings)
        assert all(torch.equal(a, b) for a, b in zip(reached, expected, strict=True))
    rested = Counter(path for record in handle.trace.records for path, _ in record.rested or () if path in slow.last)
    assert {path: STEPS - rested[path] for path in slow.last} == {p: n // 2 for p, n in slow.computed.items()}


def test_joint_attention_over_all_tokens_is_spatial():
    denoiser, inputs = made("CogVideoXTransformer3DModel")
    slow = SlowPAB({"spatial": 2}, (100.0, 850.0), STEPS)
    expected = sample(SlowModules(denoiser, slow, ("attn1",)), inputs, STEPS, first=slow.at)
    reached, _ = accelerated(denoiser, inputs, STEPS, "pab", spatial=2, temporal=1, cross=1)
    assert all(torch.equal(a, b) for a, b in zip(reached, expected, strict=True))


def test_an_mlp_is_reused_for_a_few_steps_from_a_timestep_on():
    denoiser, inputs = made("LatteTransformer3DModel")
    kept, computed = {}, Counter()

    def rule(path, compute, args, kwargs):
        """Steps 3 and 8 are at 786 and 429 of 1000; the second block's MLPs are not listed."""
        if path.endswith("0.ff") and now[0] in (4, 5, 9, 10):
            return kept[path]
        computed[path] += 1
        kept[path] = compute()
        return kept[path]

    now = [0]
    expected = sample(SlowModules(denoiser, rule, ("ff",)), inputs, STEPS, first=lambda step: now.__setitem__(0, step))
    reached, handle = accelerated(
        denoiser,
        inputs,
        STEPS,
        "pab",
        spatial=1,
        temporal=1,
        cross=1,
        mlp_timesteps=(790.0, 430.0),
        mlp_blocks=(0,),
    )
    assert all(torch.equal(a, b) for a, b in zip(reached, expected, strict=True))
    assert set(computed.values()) == {STEPS, STEPS - 4}
    assert {path for record in handle.trace.records for path, _ in record.rested or ()} >= {
        "transformer_blocks.0.ff",
        "temporal_transformer_blocks.0.ff",
    }


@pytest.mark.parametrize("settings", [{"spatial": 1, "temporal": 1, "cross": 1}, {"window": (500.0, 500.0)}])
def test_range_1_and_an_empty_window_change_nothing(settings):
    denoiser, inputs = made("LatteTransformer3DModel")
    reached, handle = accelerated(denoiser, inputs, 6, "pab", **settings)
    assert all(torch.equal(a, b) for a, b in zip(reached, sample(denoiser, inputs, 6), strict=True))
    assert handle.stats["strip"] == "FFFFFF"


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_timesteps_from_1_to_0_are_on_the_same_scale(scale):
    gate, levels = Broadcast(spatial=2, window=(100, 800)), tuple(scale * (1 - i / 10) for i in range(10))
    state = gate.begin_at(Place(10, levels, decision="spatial"))
    assert "".join("c" if gate.propose(state, Step(i, 10), None) else "F" for i in range(10)) == "FFFcFcFcFF"
    assert gate.begin_at(Place(10, None, decision="spatial")) == state


def test_a_timestep_is_compared_as_a_whole_number():
    """The code's ``lo < int(timestep) < hi``: 100.5 is not above 100."""
    levels = (900.0, 849.5, 500.5, 101.5, 100.5, 50.0)
    assert Broadcast(spatial=9, window=(100, 850)).begin_at(Place(6, levels, decision="spatial")) == {1, 2, 3}


def test_a_clock_that_is_a_logarithm_is_not_compared_with_the_window():
    """Trap: Stable Video Diffusion's ``0.25 ln sigma`` falls from 1.6 to -1.6 and never meets it."""
    gate, levels = Broadcast(spatial=2, window=(100, 800)), tuple(1.6 - 0.35 * i for i in range(10))
    state = gate.begin_at(Place(10, levels, decision="spatial"))
    assert state == gate.begin_at(Place(10, None, decision="spatial")) == {3, 5, 7}


@torch.no_grad()
def test_mlps_of_blocks_that_are_not_there_are_refused():
    denoiser, inputs = made("LatteTransformer3DModel")
    with (
        c4d.accelerate(denoiser, "pab", mlp_timesteps=(500.0,), mlp_blocks=(70,)) as handle,
        pytest.raises(AnatomyError, match=r"mlp_blocks=\(70,\).* use numbers up to \d\."),
        handle.run(timesteps=timesteps_of(STEPS)),
    ):
        denoiser(**inputs)


def test_settings_out_of_range_are_refused():
    for settings, words in (({"window": (800, 100)}, "low one first"), ({"mlp_timesteps": (-1,)}, "0 or more")):
        with pytest.raises(SettingError, match=words):
            Broadcast(**settings)


# What attention reaches --------------------------------------------------------------------------------------------


def attentions(name, **changes):
    denoiser, inputs = made(name)
    anatomy = observe(denoiser, (), inputs | changes)
    return {p.path: p.over for s in anatomy.stacks for b in s.blocks for p in b.parts if p.kind == "attn"}, anatomy


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("LatteTransformer3DModel", "temporal"),
        ("UNetSpatioTemporalConditionModel", "temporal"),
        ("UNet3DConditionModel", "temp_attentions transformer_in"),
    ],
)
def test_attention_over_frames_is_told_by_what_it_attends_over(name, word):
    found, anatomy = attentions(name)
    assert {path for path, over in found.items() if over == "time"} == {
        path for path in found if any(each in path for each in word.split())
    }
    assert set(found.values()) == {"space", "time"}
    assert not any("attends" in note for note in anatomy.notes)


def test_as_many_frames_as_tokens_of_a_frame_are_told_apart():
    """4 frames of 2 x 2 tokens: shapes alone do not tell."""
    denoiser, inputs = made("LatteTransformer3DModel")
    rng = torch.Generator().manual_seed(0)
    inputs["hidden_states"] = torch.randn(2, 4, 3, 8, 8, generator=rng)[:, :, :, :2, :6]
    anatomy = observe(denoiser, (), inputs)
    parts = [p for s in anatomy.stacks for b in s.blocks for p in b.parts if p.kind == "attn"]
    assert {p.over for p in parts if p.path.startswith("temporal")} == {"time"}
    assert {p.over for p in parts if p.path.startswith("transformer_blocks")} == {"space"}


def test_attention_over_all_tokens_reaches_all():
    assert set(attentions("WanTransformer3DModel")[0].values()) == {"all"}
    assert set(attentions("PixArtTransformer2DModel")[0].values()) == {"all"}


def test_the_context_of_a_cross_attention_is_counted():
    for name, count in (("UNetSpatioTemporalConditionModel", 1), ("PixArtTransformer2DModel", 5)):
        _, anatomy = attentions(name)
        parts = [p for s in anatomy.stacks for b in s.blocks for p in b.parts]
        assert {p.context for p in parts if p.kind == "cross_attn"} == {count}
        assert {p.context for p in parts if p.kind != "cross_attn"} == {0}


def test_a_video_method_names_what_it_does_in_the_report():
    denoiser, inputs = made("LatteTransformer3DModel")
    _, handle = accelerated(denoiser, inputs, STEPS, c4d.methods.PAB())
    assert "m" in handle.stats["strip"]
