"""FastCache: against a plain loop over blocks, its maps on blocks that are linear, and when it never caches."""

import dataclasses
import math

import pytest
import torch
from slow_references import DiTBlocks, FluxBlocks, SlowCache
from torch import nn

import cache4diffusion as c4d
import toys
from cache4diffusion.calibration import Calibration, Seen
from cache4diffusion.calibration.maps import BlockMaps, ridge_map
from cache4diffusion.calibration.observer import Observer
from cache4diffusion.errors import CalibrationError, SettingError
from cache4diffusion.gates import Place, Significance, Step
from small_denoisers import accelerated, differences, dit, dit_inputs, flux, flux_inputs, rows_of, sample

STEPS = 10


class SlowFastCache(SlowCache):
    """The card's pseudo-code, block by block; the map gives what the block adds to each stream."""

    def __init__(self, net, fit, threshold, num_steps):
        super().__init__(net)
        self.fit, self.threshold, self.num_steps, self.before, self.hits = fit, threshold, num_steps, {}, []

    def is_hit(self, h, k):
        if k not in self.before:
            return False
        delta = float((h - self.before[k]).norm() / self.before[k].norm())
        n = h.numel() // h.shape[0]
        stat = math.sqrt((n + 1.96 * math.sqrt(2 * n)) / n)
        u = 1 - self.step / self.num_steps
        adapt = 0.01 + 0.5 * delta - 0.002 * u + 0.00005 * u**2
        return delta <= max(self.threshold, min(stat, adapt))

    def through(self, streams, context, lists, glue):
        hits = []
        for k, block in enumerate([block for blocks in lists for block in blocks]):
            if self.is_hit(streams[0], k):
                hits.append(k)
                w = [self.fit[f"block.{k}/{i}/weight"].float() for i in range(len(streams))]
                b = [self.fit[f"block.{k}/{i}/bias"].float() for i in range(len(streams))]
                streams = [h + h @ w[i].T + b[i] for i, h in enumerate(streams)]
            else:
                self.before[k] = streams[0]
                streams = block(streams)
        self.hits.append(hits)
        return streams


def random_maps(blocks, streams):
    g, fit = torch.Generator().manual_seed(0), {}
    for k in range(blocks):
        for i in range(streams):
            fit[f"block.{k}/{i}/weight"] = 0.05 * torch.randn(32, 32, generator=g)
            fit[f"block.{k}/{i}/bias"] = 0.05 * torch.randn(32, generator=g)
    return fit


CASES = {
    "flux": (flux, flux_inputs, FluxBlocks, 2, 0.16),
    "dit": (dit, dit_inputs, DiTBlocks, 1, 0.12),
}


@pytest.mark.parametrize("kind", CASES)
def test_every_step_equals_the_cards_pseudo_code(kind):
    make, inputs, net, streams, threshold = CASES[kind]
    model = make()
    fit = random_maps(5, streams)
    reference = SlowFastCache(net(model), fit, threshold, STEPS)
    expected = sample(reference, inputs(2), STEPS)
    made = Calibration.by_hand("fastcache", STEPS, fit)
    found, trace, stats = accelerated(model, inputs(2), STEPS, "fastcache", threshold=threshold, calibration=made)
    assert differences(found, expected) == pytest.approx([0.0] * STEPS, abs=1e-5)
    numbers = [len(hits) for hits in reference.hits]
    blocks = len([1 for stack in net(model).enter({**inputs(1), "timestep": torch.ones(1).long()})[2] for _ in stack])
    assert [round(record.cached * blocks) for record in trace.of()] == numbers
    assert 0 < sum(numbers) < blocks * STEPS and len(set(numbers)) > 2, "blocks decide for themselves"
    assert stats["syncs"] > 0


def test_the_bound_is_the_cards():
    gate = Significance(0.0, is_off_at_zero=False)
    for change, size, u in [(0.005, 64, 1.0), (0.019, 4096, 0.3), (0.5, 12, 0.0), (9.0, 2, 0.7)]:
        stat = math.sqrt((size + 1.96 * math.sqrt(2 * size)) / size)
        wanted = min(stat, 0.01 + 0.5 * change - 0.002 * u + 0.00005 * u**2)
        assert gate.bound(change, size, u) == pytest.approx(wanted, rel=1e-4)
    assert Significance(0.3).bound(0.1, 64, 0.5) == 0.3, "the threshold is the floor"


def test_the_bound_follows_the_schedulers_timestep():
    gate = Significance(0.0, is_off_at_zero=False, adaptive=(0.0, 0.0, 0.1, 0.0))
    state = gate.begin_at(Place(3, levels=(1000.0, 500.0, 100.0)))
    assert [gate.propose(state, Step(i, 3), (0.03, 9)) for i in range(3)] == [True, True, False]
    by_progress = gate.begin(10)
    assert [gate.propose(by_progress, Step(i, 10), (0.03, 9)) for i in (6, 7, 8)] == [True, True, False]


@pytest.mark.parametrize("variant", ["default", "official"])
def test_at_a_threshold_of_0_only_the_published_rule_caches_what_hardly_changes(variant):
    gate = c4d.method("fastcache", threshold=0.0, variant=variant, **toys.CALIBRATED["fastcache"]).compose().gate
    state = gate.begin(10)
    assert [gate.propose(state, Step(5, 10), (change, 64)) for change in (0.0, 0.015, 0.03)] == (
        [False] * 3 if variant == "default" else [True, True, False]
    )


def test_an_identical_input_always_hits_and_the_block_does_not_run():
    """Of the blocks behind it what enters changes: its map is not the block."""
    model = toys.flux()
    counter = toys.Counter(model)
    settings = {**toys.CALIBRATED["fastcache"], "threshold": 1e-6, "adaptive": (0.0, 0.0, 0.0, 0.0)}
    with toys.accelerated(model, "fastcache", settings, num_steps=5) as handle:
        toys.flux_loop(model, toys.flux_inputs(), 5, frozen=True)
        rested = [dict(record.rested or ()) for record in handle.trace.of()]
    assert [record.get("transformer_blocks.0") for record in rested] == [None, 1.0, 1.0, 1.0, 1.0]
    assert counter.counts["transformer_blocks.0.attn"] == 1


class Line(nn.Module):
    """A denoiser whose blocks are affine; the timestep only scales what enters."""

    class Block(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.mix, self.ff = nn.Linear(dim, dim), nn.Sequential(nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim))

        def forward(self, x):
            x = x + self.mix(x)
            return x + 0.5 * self.ff(x)

    def __init__(self, dim=8):
        super().__init__()
        self.blocks = nn.ModuleList(self.Block(dim) for _ in range(3))

    def forward(self, x, timestep):
        x = x * (1 + timestep.square())[:, None, None]
        for block in self.blocks:
            x = block(x)
        return x


@torch.no_grad()
def line_loop(model, steps, seed=0):
    x = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(seed))
    outputs = []
    for i in range(steps):
        outputs.append(model(x, torch.full((2,), 1 - i / steps)))
        x = x - 0.1 * outputs[-1]
    return outputs


def test_maps_fitted_to_blocks_that_are_affine_are_exact():
    torch.manual_seed(0)
    model = Line().eval()
    with Observer(model, BlockMaps(ridge=0.0)) as observer, observer.run(num_steps=6):
        line_loop(model, 6)
    entry = observer.entries()["denoiser"]
    assert entry.quality.r2 == pytest.approx(1)
    assert entry.quality.verdict.endswith("explains 100% of what the block adds: a sound basis for this method.")
    made = dataclasses.replace(toys.CALIBRATED["fastcache"]["calibration"], entries={"denoiser": entry})
    plain = line_loop(model, 6, seed=1)
    with c4d.accelerate(model, "fastcache", threshold=99.0, calibration=made) as handle, handle.run(num_steps=6):
        found = line_loop(model, 6, seed=1)
        assert handle.stats["strip"] == "Fccccc"
    assert max(differences(found, plain)) < 1e-4, "another latent, and every block but those of the first step mapped"


def test_the_map_is_ridge_regression():
    g = torch.Generator().manual_seed(0)
    x, f = torch.randn(50, 4, generator=g).double(), torch.randn(50, 3, generator=g).double()
    sums, statistic = {}, BlockMaps(ridge=0.2)
    for step in range(5):
        part = slice(10 * step, 10 * step + 10)
        added, entered = ({"block.0": [values[None, part].float()]} for values in (f, x))
        seen = Seen(step, 5, "", None, added, {}, entered=entered)
        statistic.observe(sums, {}, seen)
    fit = statistic.fit(sums)
    ones = torch.cat([x, torch.ones(50, 1)], 1)
    pull = 0.2 * (ones.T @ ones).diagonal()[:4].mean() * torch.diag(torch.tensor([1.0, 1, 1, 1, 0]))
    both = torch.linalg.solve(ones.T @ ones + pull, ones.T @ f)
    torch.testing.assert_close(fit.tensors["block.0/0/weight"].double(), both[:4].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fit.tensors["block.0/0/bias"].double(), both[4], rtol=1e-4, atol=1e-5)
    left = (f - ones @ both).square().sum() / f.square().sum()
    assert fit.quality.r2 == pytest.approx(float(1 - left), abs=1e-4)
    weight, bias = ridge_map(sums["block.0/0/gram"], sums["block.0/0/cross"], 1e9)
    assert weight.abs().max() < 1e-6 and bias.abs().max() < 1, "a large ridge skips the block"


def test_without_maps_a_cached_block_is_skipped():
    model, inputs = flux(), flux_inputs(1)
    found, trace, _ = accelerated(model, inputs, 4, "dbprune", threshold=9.0, front=0, warmup=1, predictor="linear-map")
    assert "c" in trace.strip()

    class Skipping(SlowCache):
        def through(self, streams, context, lists, glue):
            if self.step:
                return streams
            return self.run([b for blocks in lists for b in blocks], [0.0] * 5, streams)[0]

    assert max(differences(found, sample(Skipping(FluxBlocks(model)), inputs, 4))) < 1e-6


def test_rows_that_decide_for_themselves_are_their_own_runs():
    model, inputs = flux(), flux_inputs(3)
    made = Calibration.by_hand("fastcache", STEPS, random_maps(5, 2))
    settings = {"threshold": 0.16, "calibration": made, "decide": "row"}
    together, _, _ = accelerated(model, inputs, STEPS, "fastcache", **settings)
    for row in range(3):
        alone, trace, _ = accelerated(model, rows_of(inputs, row), STEPS, "fastcache", **settings)
        assert max(differences([out[row : row + 1] for out in together], alone)) < 1e-5
        assert any(0 < record.cached < 1 for record in trace.of())


def test_branches_share_the_maps_and_nothing_else_is_kept():
    model = toys.flux()
    with toys.accelerated(model, "fastcache", num_steps=6) as handle:
        toys.branch_loop(model, [toys.flux_inputs(seed=0), toys.flux_inputs(seed=1)], 6)
        engine = handle._engines[0]
        states = list(engine._states.values())
        maps = {t.data_ptr() for state in states for kept in state.sites.values() for t in kept.tensors()}
        entered = sum(t.numel() for state in states for t in state.references.values())
        served = sum(len(kept.maps) for kept in states[0].sites.values())
        assert len(maps) == 2 * served
        assert handle.memory["held"] == 4 * (served * (32 * 32 + 32) + entered)
    del states
    assert engine.predictor.weights.placed == [], "gone with the run"


def test_without_a_calibration_the_command_is_named():
    with pytest.raises(CalibrationError, match="c4d calibrate MODEL --method fastcache"):
        c4d.accelerate(flux(1, 1), "fastcache")


@pytest.mark.parametrize("bad", [{"threshold": -1.0}, {"significance": 0.0}, {"adaptive": (0.1, 0.2)}])
def test_wrong_settings_are_refused(bad):
    with pytest.raises(SettingError, match=next(iter(bad))):
        Significance(**bad)


def test_a_text_that_enters_with_one_row_for_all_leaves_with_one_each():
    """As the negative prompt of a batch does: the block would have broadcast it, so its map must."""
    model, many = flux(), flux_inputs(3)
    many["encoder_hidden_states"] = many["encoder_hidden_states"][:1].expand(3, -1, -1).contiguous()
    one = {**many, "encoder_hidden_states": many["encoder_hidden_states"][:1]}
    settings = {"calibration": Calibration.by_hand("fastcache", STEPS, random_maps(5, 2)), "threshold": 0.16}
    expected, _, stats = accelerated(model, many, STEPS, "fastcache", **settings)
    found, _, again = accelerated(model, one, STEPS, "fastcache", **settings)
    assert differences(found, expected) == pytest.approx([0.0] * STEPS, abs=1e-6)
    assert stats["strip"] == again["strip"] and set(stats["strip"]) > {"F"}
    hard = {**settings, "threshold": 9.0}
    found, _, stats = accelerated(model, one, STEPS, "fastcache", **hard)
    assert stats["strip"] == "F" + "c" * (STEPS - 1), "all blocks of the first list are mapped"
    expected, _, _ = accelerated(model, many, STEPS, "fastcache", **hard)
    assert differences(found, expected) == pytest.approx([0.0] * STEPS, abs=1e-6)
