"""FasterCache: its two parts together, against the card's pseudo-code."""

from itertools import pairwise

import pytest
import torch
from guided_loops import Prompted, assert_near
from slow_modules import SlowModules, made, timesteps_of

import cache4diffusion as c4d
from cache4diffusion.gates import FixedInterval, Step
from cache4diffusion.predictors import Reuse, WeightedChange
from cache4diffusion.sites import Parts

STEPS = 16
PARTS = {
    "attention_warmup": 3,
    "attention_interval": 2,
    "attention_weight": 0.5,
    "attention_offset": 0,
    "interval": 4,
    "warmup": 5,
}


@pytest.fixture(scope="module")
def latte():
    return Prompted(made("LatteTransformer3DModel")[0], "hidden_states", (4, 3, 8, 8))


class SlowFasterCache:
    """Attention of every row by itself, its last two computed outputs; U = C + D on steps that skip a branch."""

    def __init__(
        self, prompted, attention_warmup, attention_interval, attention_weight, attention_offset, interval, warmup
    ):
        self.p, self.weight, self.offset = prompted, attention_weight, attention_offset
        self.first, self.every, self.cfg_every, self.cfg_first = attention_warmup, attention_interval, interval, warmup
        self.cache, self.missed, self.rows, self.attention = {}, set(), (), []
        self.model = SlowModules(prompted.denoiser, self.rule, ("attn1",))

    def is_scheduled(self):
        """Calls c from 1: computed while ``c <= first``, then where c is odd (interval 2)."""
        return self.c <= self.first or (self.c - 1) % self.every == self.offset

    def rule(self, path, compute, args, kwargs):
        if self.computes:
            out = compute()
            pieces = out.chunk(len(self.rows))
            for row, piece in zip(self.rows, pieces, strict=True):
                self.cache.setdefault((path, row), []).append(piece)
            return out
        made = []
        for row in self.rows:
            before, last = self.cache[path, row][-2:]
            made.append(last + (last - before) * self.weight)
        return torch.cat(made)

    @torch.no_grad()
    def sample(self, steps):
        p, x, outputs = self.p, self.p.start, []
        both, n = tuple(range(2 * p.batch)), p.batch
        for self.c, time in zip(range(1, steps + 1), timesteps_of(steps), strict=True):
            skips = self.c > self.cfg_first and self.c % self.cfg_every != 0
            self.rows = both[n:] if skips else both
            self.computes = self.is_scheduled() or any(row in self.missed for row in self.rows)
            self.attention.append(self.computes)
            if self.is_scheduled() and skips:
                self.missed |= set(both[:n])
            elif self.computes:
                self.missed -= set(self.rows)
            if skips:
                cond = p.call(self.model, x, time, p.cond)
                uncond = cond + self.difference
            else:
                uncond, cond = p.call(self.model, torch.cat([x, x]), time, torch.cat([p.uncond, p.cond])).chunk(2)
                self.difference = uncond - cond
            outputs.append(uncond + 3.0 * (cond - uncond))
            x = p.step(x, outputs[-1], steps)
        return outputs


def run(prompted, loop="batched", **settings):
    with (
        c4d.accelerate(prompted.denoiser, "fastercache", low_gain=1.0, high_gain=1.0, **settings) as handle,
        handle.run(timesteps=timesteps_of(STEPS)),
    ):
        return getattr(prompted, loop)(STEPS), handle


@pytest.mark.parametrize(
    "settings",
    [PARTS, PARTS | {"attention_interval": 3, "attention_offset": 2, "attention_weight": 0.3, "interval": 5}],
)
def test_both_parts_are_the_slow_references(latte, settings):
    slow = SlowFasterCache(latte, **settings)
    expected = slow.sample(STEPS)
    for _ in range(2):
        reached, handle = run(latte, **settings)
        assert_near(reached, expected)
    strip = handle.stats["strip"]
    assert [letter in "Fh" for letter in strip] == slow.attention
    assert {"F", "h", "c"} == set(strip)
    assert handle.memory["held"] == 0


def test_every_row_goes_on_with_its_own_features(latte):
    """Trap: a call with both branches after calls with one finds only one branch's features, or old ones."""
    _, handle = run(latte, **PARTS)
    records = handle.trace.records
    both_after_half = [b for a, b in pairwise(records) if "one branch" in a.reason and "one" not in b.reason]
    assert both_after_half
    assert {record.symbol for record in both_after_half} == {"F"}
    assert any("missed" in record.reason for record in both_after_half)


def test_weight_0_is_reuse(latte):
    ours, _ = run(latte, **PARTS | {"attention_weight": 0.0, "interval": 1})
    theirs = c4d.Composition(Parts(("attn",)), FixedInterval(2, warmup=3), Reuse())
    with c4d.accelerate(latte.denoiser, theirs) as handle, handle.run(timesteps=timesteps_of(STEPS)):
        assert all(torch.equal(a, b) for a, b in zip(ours, latte.batched(STEPS), strict=True))


def test_sequential_branches_keep_their_own_attention(latte):
    _, handle = run(latte, "sequential", **PARTS)
    strips = handle.stats["strips"]
    cond, uncond = strips.values()
    assert cond == "".join("F" if i < 3 or i % 2 == 0 else "c" for i in range(STEPS))
    skipped = {i for i, r in enumerate(r for r in handle.trace.records if r.branch == "branch-1") if "from" in r.reason}
    assert skipped == {i for i in range(STEPS) if i + 1 > 5 and (i + 1) % 4}
    assert set(uncond) == {"F", "c"}


@pytest.mark.parametrize("weight", [0.5])
def test_lines_are_exact_where_every_second_step_is_full(weight):
    y, rule = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), WeightedChange(weight)
    state = rule.init(None)
    for step in (0, 2, 4):
        rule.update(state, [2 * y + y * step], float(step))
    torch.testing.assert_close(rule.predict(state, 5.0)[0], 7 * y)


def test_the_weight_may_grow():
    rule = WeightedChange(0.045, 0.045, since=7)
    for c in (8, 10, 20, 28):
        w = 0.9 * (c - 7) / 20
        assert rule.weights([c - 2.0, c - 4.0], c - 1.0) == pytest.approx([1 + w, -w])


@pytest.mark.parametrize(
    ("what", "skips"),
    [
        ("Open-Sora 1.2, 30 steps", lambda c: c > 7 and c % 2 == 0),
        ("Latte, 50 steps", lambda c: c >= 16 and c % 2 == 0),
        ("CogVideoX, 50 steps", lambda c: c >= 18 and c % 3 != 0),
        ("Open-Sora-Plan, 150 steps", lambda c: c >= 45 and c % 3 != 0),
        ("Vchitect-2.0, 100 steps", lambda c: c > 30 and c % 2 == 0),
    ],
)
def test_attention_is_skipped_as_in_the_scripts(what, skips):
    gate = c4d.method("fastercache", **c4d.METHODS["fastercache"].info.published[what]).compose().gate
    steps = int(what.split()[-2])
    assert [gate.propose(None, Step(c - 1, steps), None) for c in range(1, steps + 1)] == [
        bool(skips(c)) for c in range(1, steps + 1)
    ]


def test_a_run_too_short_for_one_of_its_two_rules_goes_on_with_the_other(latte):
    settings = PARTS | {"warmup": 17, "attention_warmup": 3}  # `warmup` is that of the branches
    with c4d.accelerate(latte.denoiser, "fastercache", **settings) as handle, handle.run(timesteps=timesteps_of(8)):
        latte.batched(8)
    assert handle.stats["strip"] == "FFFcFcFc"
