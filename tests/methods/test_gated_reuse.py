"""EasyCache, Delta-DiT, DBPrune, AdaCache, DiCache and BWCache against slow references written from their cards."""

import copy

import pytest
import torch
from slow_gates import SlowAdaCache, SlowBWCache, SlowDBPrune, SlowDeltaDiT, SlowDiCache, SlowEasyCache
from slow_references import DiTBlocks, FluxBlocks

import cache4diffusion as c4d
from cache4diffusion.cost import summarise
from cache4diffusion.engine.decide import relative_change
from cache4diffusion.gates import (
    AccumulatedChange,
    AdaptiveInterval,
    EntranceThreshold,
    Step,
    TriggeredInterval,
    Window,
)
from cache4diffusion.predictors import ProbeAligned
from cache4diffusion.sites import Blocks, Denoiser, MixedScore, Span, SwitchingSpan
from small_denoisers import accelerated, differences, dit_inputs, flux_inputs, rows_of, sample
from weights import ready

STEPS = 14


def compare(denoiser, inputs, reference, name, steps=STEPS, **settings):
    """Run both; returns the trace and the figures once decisions and outputs were found to be equal."""
    expected = sample(reference, inputs, steps)
    reached, trace, stats = accelerated(denoiser, inputs, steps, name, **settings)
    if reference.strip:
        assert trace.strip() == reference.strip
        assert set(reference.strip) == {"F", "c"}
    assert max(differences(reached, expected)) <= 1e-5
    return trace, stats


def cached_cost(denoiser, inputs, steps, name, **settings):
    """FLOPs of a cached call and of a full one, after a run."""
    with c4d.accelerate(denoiser, name, **settings) as handle:
        with handle.run(num_steps=steps):
            sample(denoiser, inputs, steps)
        found = summarise(handle)
    return found.cached_flops, found.full_flops


def replay(gate, num_steps, scores=lambda i: None):
    """The strip of a gate alone; ``scores(i)`` is its score at step i."""
    state, shown = gate.begin(num_steps), ""
    for i in range(num_steps):
        step, score = Step(i, num_steps), scores(i)
        cached = i > 0 and gate.propose(state, step, score)
        gate.commit(state, step, cached, score)
        shown += "c" if cached else "F"
    return shown


def as_if_alone(model, name, **settings):
    """A batch of four decides like four runs of one, and gives the same."""
    inputs = flux_inputs(4)
    whole, trace, _ = accelerated(model, inputs, STEPS, name, decide="row", **settings)
    decided = [record.rows for record in trace.of()]
    for row in range(4):
        alone, own, _ = accelerated(model, rows_of(inputs, row), STEPS, name, decide="row", **settings)
        assert [rows[row] for rows in decided] == [record.symbol == "c" for record in own.of()]
        assert max(differences([out[row : row + 1] for out in whole], alone)) <= 1e-5
    return decided


# -- EasyCache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.15, 0.4])
def test_easycache_is_the_released_rule(model, threshold):
    reference = SlowEasyCache(model, threshold, 3, STEPS)
    _, stats = compare(model, flux_inputs(2), reference, "easycache", threshold=threshold, warmup=3)
    assert stats["syncs"] == STEPS - 4, "one per step that is not forced"


def test_easycache_learns_from_one_full_step_to_the_next_whatever_lies_between(model):
    """The first step that may be cached is full as long as nothing was learnt."""
    _, trace, _ = accelerated(model, flux_inputs(1), 6, "easycache", threshold=9.0, warmup=1)
    assert trace.strip() == "FFcccF"


def test_easycache_runs_nothing_on_a_cached_step_and_works_with_a_learned_variance(class_model):
    """DiT's output may have twice the latent's channels; the latent is added to the first ones."""
    inputs = dit_inputs(2)
    plain = sample(class_model, inputs, 6)
    settings = {"threshold": 9.0, "warmup": 2}
    reached, trace, _ = accelerated(class_model, inputs, 6, "easycache", **settings)
    assert trace.strip() == "FFcccF"
    assert cached_cost(class_model, inputs, 6, "easycache", **settings)[0] == 0
    assert max(differences(reached, plain)) < 0.5


def test_a_wider_output_is_shifted_on_its_first_channels():
    from cache4diffusion.engine.denoiser import shifted

    out, latent = torch.randn(2, 8, 3, 3), torch.randn(2, 4, 3, 3)
    found = shifted(out, latent, -1)
    assert torch.equal(found[:, :4], out[:, :4] - latent)
    assert torch.equal(found[:, 4:], out[:, 4:])
    with pytest.raises(c4d.Cache4DiffusionError, match="has no residual"):
        shifted(torch.randn(2, 5), latent, -1)


def test_easycache_rows_decide_as_if_alone(model):
    assert any(0 < sum(rows) < 4 for rows in as_if_alone(model, "easycache", threshold=0.2, warmup=2))


# -- Delta-DiT -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "interval"), [(0.6, 2), (0.4, 3), (1.0, 2)])
def test_delta_dit_is_the_slow_reference(model, share, interval):
    """5 blocks; the switch at step 7 of 14 is full although the interval does not ask for it."""
    reference = SlowDeltaDiT(FluxBlocks(model), interval, round(share * 5), 7)
    settings = {"share": share, "interval": interval, "switch": 0.5}
    trace, _ = compare(model, flux_inputs(2), reference, "delta-dit", **settings)
    assert trace.strip()[7] == "F"


def test_delta_dit_runs_the_front_early_and_the_rear_late(model):
    ran = []
    hooks = [
        module.ff.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in (("first", model.transformer_blocks[0]),)
    ]
    hooks.append(model.single_transformer_blocks[2].attn.register_forward_hook(lambda *_: ran.append("last")))
    with c4d.accelerate(model, "delta-dit", share=0.6, switch=0.5) as handle, handle.run(num_steps=8):
        sample(model, flux_inputs(1), 8, before=lambda i: ran.append(i))
        records = handle.trace.of()
    for hook in hooks:
        hook.remove()
    seen = {i: ran[ran.index(i) + 1 : ran.index(i + 1) if i < 7 else None] for i in range(8)}
    assert seen[1] == ["first"]
    assert seen[5] == ["last"]
    assert seen[0] == seen[4] == ["first", "last"]
    assert len(records[1].rested or ()) == len(records[5].rested or ()) == 3
    assert records[1].rested != records[5].rested


def test_delta_dit_that_caches_no_block_is_exact_and_says_so(model):
    inputs = flux_inputs(1)
    with pytest.warns(UserWarning, match="0 of 6 steps"):
        reached, trace, _ = accelerated(model, inputs, 6, "delta-dit", share=0.0)
    assert trace.strip() == "FFFFFF"
    assert differences(reached, sample(model, inputs, 6)) == [0.0] * 6


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("delta-dit", {"share": 0.6, "interval": 3}),
        ("magcache", {"ratios": (1.0, 0.9), "threshold": 9.0}),
        ("adacache", {"rates": (3,)}),
        ("dbprune", {"threshold": 9.0, "front": 1, "warmup": 2}),
        ("dicache", {"threshold": 9.0}),
        ("scm", {"mask": "11001001"}),
    ],
)
def test_residuals_that_do_not_depend_on_the_latent_are_exact(model, name, settings):
    """What is cached is what blocks add: the current latent comes through them."""
    denoiser = copy.deepcopy(model)
    for path, module in denoiser.named_modules():
        if path.endswith(("to_out.0", "to_add_out", "net.2", "proj_out")) and "blocks" in path:
            module.weight.data.zero_()
    inputs, latents = flux_inputs(2), [flux_inputs(2)["hidden_states"] * 0.8**i for i in range(8)]

    @torch.no_grad()
    def run():
        half = torch.full((2,), 0.5)
        return [denoiser(**{**inputs, "hidden_states": x}, timestep=half)[0] for x in latents]

    plain = run()
    with c4d.accelerate(denoiser, name, **settings) as handle, handle.run(num_steps=8):
        found = run()
        assert handle.trace.strip().count("c") >= 3
    assert max(differences(found, plain)) <= 1e-5
    assert min(differences(plain[1:], plain[:-1])) > 1e-2, "the latent matters"


# -- DBPrune ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", ["flux", "dit"])
def test_dbprune_is_the_slow_reference(model, class_model, case, dynamic):
    denoiser, inputs = (model, flux_inputs(2)) if case == "flux" else (class_model, dit_inputs(2))
    net = FluxBlocks(model) if case == "flux" else DiTBlocks(class_model)
    reference = SlowDBPrune(net, 0.12, 1, 0, 2, dynamic)
    expected = sample(reference, inputs, STEPS)
    settings = {"threshold": 0.12, "front": 1, "warmup": 2, "dynamic": dynamic}
    reached, trace, _ = accelerated(denoiser, inputs, STEPS, "dbprune", **settings)
    paths = [f"transformer_blocks.{i}" for i in range(len(denoiser.transformer_blocks))]
    paths += [f"single_transformer_blocks.{i}" for i in range(len(getattr(denoiser, "single_transformer_blocks", ())))]
    found = [[paths.index(path) for path, _ in record.rested or ()] for record in trace.of()]
    assert found == reference.pruned
    assert any(found)
    assert max(differences(reached, expected)) <= 1e-5


def test_dbprunes_dynamic_threshold_never_exceeds_its_cap():
    gate = EntranceThreshold(0.1, dynamic=True, cap=0.15)
    assert [gate.effective(leading) for leading in (0.01, 0.08, 0.1, 0.5)] == pytest.approx([0.1, 0.1, 0.125, 0.1])
    assert gate.effective(None) == 0.1, "the first block of a step has nothing to go by"


def test_dbprune_protects_blocks_and_counts_their_cost(model):
    settings = {"threshold": 9.0, "front": 1, "back": 1, "keep": (2,), "warmup": 1}
    _, trace, _ = accelerated(model, flux_inputs(1), 6, "dbprune", **settings)
    assert trace.strip() == "Fccccc"
    rested = [path for path, _ in trace.of()[1].rested or ()]
    assert rested == ["transformer_blocks.1", "single_transformer_blocks.1"]
    cached, full = cached_cost(model, flux_inputs(1), 6, "dbprune", **settings)
    assert 0 < cached < full


def test_dbprune_with_every_block_protected_is_exact(model):
    inputs, settings = flux_inputs(1), {"threshold": 9.0, "front": 2, "back": 2, "keep": (2,), "warmup": 1}
    with pytest.warns(UserWarning, match="0 of 6 steps"):
        reached, trace, _ = accelerated(model, inputs, 6, "dbprune", **settings)
    assert trace.strip() == "FFFFFF"
    assert differences(reached, sample(model, inputs, 6)) == [0.0] * 6


def test_on_the_same_input_dbprune_prunes_every_free_block_and_returns_the_same(model):
    inputs = flux_inputs(1)
    settings = {"threshold": 1e-4, "front": 1, "back": 1, "warmup": 1}
    with c4d.accelerate(model, "dbprune", **settings) as handle, handle.run(num_steps=4), torch.no_grad():
        out = [model(**inputs, timestep=torch.tensor([0.5]))[0] for _ in range(4)]
        assert handle.trace.strip() == "Fccc"
        assert [len(record.rested or ()) for record in handle.trace.of()] == [0, 3, 3, 3]
        assert all(score == 0 or score < 1e-6 for record in handle.trace.of()[1:] for score in record.scores)
    assert max(differences(out, [out[0]] * 4)) <= 1e-6


def test_dbprune_prunes_on_as_before_after_a_recomputed_step(model):
    """What entered the blocks was forgotten with the rest, and is known again from the step that was recomputed."""
    inputs, settings = flux_inputs(1), {"threshold": 9.0, "front": 1, "warmup": 1, "dynamic": True}
    with c4d.accelerate(model, "dbprune", **settings) as handle, handle.run(num_steps=5), torch.no_grad():
        for i in range(5):
            if i == 2:
                (state,) = handle._engines[0]._states.values()
                for buffer in [buffer for history in state.sites.values() for buffer in history.buffers]:
                    buffer.fill_(float("nan"))
            assert model(**inputs, timestep=torch.tensor([1 - i / 5]))[0].isfinite().all()
        assert handle.trace.strip() == "FcFcc"


def test_dbprune_rows_decide_as_if_alone(model):
    """Every block splits the batch by itself."""
    inputs, settings = flux_inputs(4), {"threshold": 0.14, "front": 1, "warmup": 2, "decide": "row"}
    whole, _, _ = accelerated(model, inputs, STEPS, "dbprune", **settings)
    for row in range(4):
        alone, _, _ = accelerated(model, rows_of(inputs, row), STEPS, "dbprune", **settings)
        assert max(differences([out[row : row + 1] for out in whole], alone)) <= 1e-5


# -- AdaCache --------------------------------------------------------------------------------------------------------

BOOK = ((0.1, 0.2, 0.3), (4, 3, 2, 1))


@pytest.mark.parametrize("case", ["flux", "dit"])
def test_adacache_keeps_one_residual_for_what_the_code_keeps_in_every_block(model, class_model, case):
    denoiser, inputs = (model, flux_inputs(2)) if case == "flux" else (class_model, dit_inputs(2))
    net = FluxBlocks(model) if case == "flux" else DiTBlocks(class_model)
    measured = 2 if case == "flux" else 1
    reference = SlowAdaCache(net, *BOOK, measured, STEPS)
    compare(denoiser, inputs, reference, "adacache", thresholds=BOOK[0], rates=BOOK[1])


def test_adacache_strips():
    assert replay(AdaptiveInterval((), (3,)), 12, lambda i: 0.0) == "FFccFccFccFc"
    assert "``FFccFccFccFc``" in (AdaptiveInterval.__doc__ or "")
    assert replay(AdaptiveInterval((), (1,)), 8, lambda i: 0.0) == "F" * 8
    assert replay(AdaptiveInterval(*BOOK), 12, lambda i: 0.0) == "FFcccFcccFcc", "nothing changes: the largest rate"


def test_adacache_begins_anew_where_a_full_step_had_nothing_to_compare_with():
    """An interval that was measured before is not gone on with: it says nothing of another conditioning."""
    gate = AdaptiveInterval((), (4,))
    assert replay(gate, 12, lambda i: None if i == 6 else 0.0) == "FFcccFFcccFc"


def test_adacache_codebook_of_3_over_20_steps_is_the_cards(model):
    _, trace, _ = accelerated(model, flux_inputs(1), 20, "adacache", rates=(3,))
    assert [i + 1 for i, symbol in enumerate(trace.strip()) if symbol == "F"] == [1, 2, 5, 8, 11, 14, 17, 19, 20]


@pytest.mark.parametrize("quick", [1.0, 1.2])
def test_adacaches_motion_shortens_intervals(quick):
    """The rule of the card on given scores: (change, motion), with the motion's weight and its gradient."""
    gate = AdaptiveInterval((0.1, 0.2, 0.4, 1.0), (6, 4, 3, 2, 1), motion=True, window=(0.0, 1.0))
    state = gate.begin(40)
    for i in (0, 1):
        gate.commit(state, Step(i, 40), False, None)
    motion = 0.385 * quick
    weight = quick**8
    d = 0.05 * (weight + abs(10 * (weight - 1)))
    expected = next((rate for limit, rate in zip(gate.thresholds, gate.rates, strict=False) if d < limit), 1)
    shown = "".join("c" if gate.propose(state, Step(i, 40), (0.05, motion)) else "F" for i in range(2, 9))
    assert shown.index("F") == expected - 1


def test_adacaches_motion_of_1_is_no_motion():
    """Where nothing moves more than before and neighbours differ as the scale says, the factor is 1."""
    moving = AdaptiveInterval(*BOOK, motion=True, window=(0.0, 1.0))
    still = AdaptiveInterval(*BOOK)
    for change in (0.05, 0.15, 0.25, 0.5):
        assert replay(moving, 20, lambda i, c=change: (c, moving.scale)) == replay(still, 20, lambda i, c=change: c)


def test_adacaches_change_does_not_depend_on_the_scale_of_features():
    now, then = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for scale in (2.0**-20, 2.0, 2.0**20):
        assert torch.equal(relative_change(scale * now, scale * then, True), relative_change(now, then, True))


class Video(torch.nn.Module):
    """A small video denoiser: tokens frame by frame, blocks of one residual part."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(8)
            self.ff = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))

        def forward(self, x, gate):
            return x + gate * self.ff(self.norm(x))

    def __init__(self):
        super().__init__()
        self.embed, self.out = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)
        self.blocks = torch.nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, hidden_states, timestep, return_dict=True):
        (x,), gate, _ = self.enter({"hidden_states": hidden_states, "timestep": timestep})
        for block in self.blocks:
            x = block(x, gate)
        return self.leave([x], gate, hidden_states.shape)

    def enter(self, kwargs):
        self.shape, gate = kwargs["hidden_states"].shape, 0.5 + kwargs["timestep"][:, None, None]
        blocks = [lambda streams, b=b: [b(streams[0], gate)] for b in self.blocks]
        return [self.embed(kwargs["hidden_states"].flatten(2).mT)], gate, [blocks]

    def glue(self, kwargs):
        return [[0.0] * 3]

    def leave(self, streams, gate, shape=None):
        return (self.out(streams[0]).mT.reshape(shape or self.shape),)


@pytest.mark.parametrize("scale", [0.2, 0.385, 0.6])
def test_adacaches_motion_is_the_released_rule_on_a_video(scale):
    torch.manual_seed(0)
    denoiser, inputs = ready(Video()), {"hidden_states": torch.randn(2, 4, 3, 2, 2), "return_dict": False}
    gate = AdaptiveInterval(*BOOK, motion=True, scale=scale)
    reference = SlowAdaCache(copy.deepcopy(denoiser), *BOOK, 1, 30, motion=(3, 4, 26, scale, 8, 10))
    expected = sample(reference, inputs, 30)
    reached, trace, _ = accelerated(denoiser, inputs, 30, "adacache", gate=gate)
    assert trace.strip() == reference.strip
    assert set(reference.strip) == {"F", "c"}
    assert max(differences(reached, expected)) <= 1e-5


def test_adacaches_motion_needs_frames(model):
    with pytest.raises(c4d.Cache4DiffusionError, match="Switch the motion off"):
        accelerated(model, flux_inputs(1), 6, "adacache", motion=True)


def test_adacache_rows_decide_as_if_alone(model):
    as_if_alone(model, "adacache", thresholds=(0.2, 0.25, 0.3), rates=(4, 3, 2, 1))


# -- DiCache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ["change", "excess"])
@pytest.mark.parametrize("case", ["flux", "dit"])
def test_dicache_is_the_released_rule(model, class_model, case, error):
    denoiser, inputs = (model, flux_inputs(2)) if case == "flux" else (class_model, dit_inputs(2))
    net = FluxBlocks(model) if case == "flux" else DiTBlocks(class_model)
    threshold = 0.2 if error == "change" else 0.04
    reference = SlowDiCache(net, threshold, 1, 0.2, 1.5, STEPS, error == "excess")
    trace, _ = compare(denoiser, inputs, reference, "dicache", threshold=threshold, error=error)
    scores = [record.scores[0] for record in trace.of() if record.scores[0] is not None]
    assert scores == pytest.approx(reference.scores, rel=1e-3, abs=1e-6)
    assert reference.gammas


def test_dicache_with_a_limit_of_1_reuses_the_last_stack_residual(model):
    """And is exact where R and Q move along lines at one speed."""
    straight, front = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for limit, reach in ((1.0, 1.0), (1.5, 1.25), (1.1, 1.1)):
        rule = ProbeAligned(limit)
        state = rule.init(None)
        for time in (0.0, 4.0):
            rule.update_seeing(state, [time * straight - time * front], [time * front], time)
        (predicted,) = rule.predict_seeing(state, [5.0 * front], 5.0)
        assert torch.allclose(predicted, 4.0 * reach * straight - 5.0 * front, atol=1e-5)


def test_dicache_rows_decide_and_extrapolate_as_if_alone(model):
    assert any(0 < sum(rows) < 4 for rows in as_if_alone(model, "dicache", threshold=0.2, retention=0.1))


# -- BWCache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["flux", "dit"])
def test_bwcache_is_the_slow_reference(model, class_model, case):
    denoiser, inputs = (model, flux_inputs(2)) if case == "flux" else (class_model, dit_inputs(2))
    net = FluxBlocks(model) if case == "flux" else DiTBlocks(class_model)
    reference = SlowBWCache(net, 0.5, 0.15, STEPS)
    compare(denoiser, inputs, reference, "bwcache", threshold=0.5, reuse=0.15)


def test_bwcache_keeps_nothing_to_compare_once_reuse_has_begun(model):
    inputs = flux_inputs(1)
    with c4d.accelerate(model, "bwcache", threshold=9.0) as handle, handle.run(num_steps=10), torch.no_grad():
        kept = []
        for i in range(10):
            x = inputs["hidden_states"] * 0.9**i
            model(**{**inputs, "hidden_states": x}, timestep=torch.tensor([1 - i / 10]))
            (state,) = handle._engines[0]._states.values()
            kept.append(len(state.references))
        assert handle.trace.strip() == "FFcFcFFFFF"
        assert kept == [5, 5, 5, 0, 0, 0, 0, 0, 0, 0], "one tensor per block up to the next full step"
        assert handle.stats["syncs"] == 1


def test_bwcache_strip_is_the_docstrings():
    shown = replay(TriggeredInterval(0.15, 0.1), 20, lambda i: 0.1 if i == 4 else 0.3)
    assert f"``{shown}``" in (TriggeredInterval.__doc__ or "")
    assert replay(TriggeredInterval(0.0), 20, lambda i: 0.0) == "F" * 20
    assert replay(TriggeredInterval(0.15), 20, lambda i: 0.15) == "F" * 20, "strictly below"


# -- windows ---------------------------------------------------------------------------------------------------------


def test_a_window_leaves_both_ends_full():
    guard = Window(0.3, 0.8, is_start_full=True)
    free = [i for i in range(10) if guard.overrule(None, Step(i, 10)) is None]
    assert free == [4, 5, 6, 7]
    assert Window(0.3, 0.8).overrule(None, Step(3, 10)) is None
    assert all(Window().overrule(None, Step(i, None)) is None for i in range(3))


@pytest.mark.parametrize("name", ["easycache", "dbprune", "dicache", "bwcache"])
def test_more_is_cached_as_the_threshold_grows(model, name):
    fitting = {"easycache": {"warmup": 2}, "dbprune": {"front": 1, "warmup": 2}}.get(name, {})
    shares = []
    for threshold in (0.0, 0.1, 0.9):
        _, trace, _ = accelerated(model, flux_inputs(1), STEPS, name, threshold=threshold, **fitting)
        shares.append(sum(record.cached or 0 for record in trace.of()))
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] > 0


@pytest.mark.parametrize("name", ["dbprune", "dicache"])
def test_a_host_that_writes_into_its_streams_does_not_change_what_is_compared(model, name):
    """Adding a constant in place behind the first block is the same to a gate as adding it to a new tensor."""
    settings = {"dbprune": {"threshold": 0.12, "front": 1, "warmup": 2}, "dicache": {"threshold": 0.2}}[name]
    scores = []
    for add in (torch.Tensor.add, torch.Tensor.add_):

        def forward(*args, found=model.transformer_blocks[1].forward, add=add, **kwargs):
            kwargs["hidden_states"] = add(kwargs["hidden_states"], 0.3)
            return found(*args, **kwargs)

        model.transformer_blocks[1].forward = forward
        try:
            _, trace, _ = accelerated(model, flux_inputs(1), 8, name, **settings)
        finally:
            del model.transformer_blocks[1].forward
        scores.append(next(record.scores[0] for record in trace.of() if record.scores[0] is not None))
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdaptiveInterval((0.1,), (1,)), "one rate more"),
        (lambda: AdaptiveInterval((0.2, 0.1), (3, 2, 1)), "must rise"),
        (lambda: AdaptiveInterval((), (0,)), "each 1 or more"),
        (lambda: AdaptiveInterval(block=1.5), "block must be 0 to 1"),
        (lambda: AdaptiveInterval(window=(0.5, 0.1)), "two fractions"),
        (lambda: TriggeredInterval(-1), r"0 \(off\) or more"),
        (lambda: TriggeredInterval(tail=2), "reuse and tail 0 to 1"),
        (lambda: EntranceThreshold(-0.1), r"0 \(off\) or more"),
        (lambda: EntranceThreshold(relax=0), "relax above 0"),
        (lambda: AccumulatedChange(of="residual"), "use one of signal, spectral, front, drift"),
        (lambda: Window(-0.1), "0 <= start <= stop <= 1"),
        (lambda: ProbeAligned(0.5), "limit must be 1"),
        (lambda: SwitchingSpan(share=1.5), "both must be 0 to 1"),
        (lambda: Blocks(front=-1), "must be 0 or more"),
        (lambda: Blocks(keep=(-1,)), "must be 0 or more"),
        (lambda: MixedScore(slope=0), "slope must be above 0"),
        (lambda: Denoiser(form="input"), "'output' or 'residual'"),
        (lambda: Span(form="input"), "'residual' or 'output'"),
        (lambda: c4d.method("adacache", codebook="fats"), "did you mean 'fast'"),
    ],
)
def test_bad_settings_are_refused_in_words(make, words):
    with pytest.raises(c4d.Cache4DiffusionError, match=words):
        make()


def test_a_probe_aligned_predictor_needs_a_probe(model):
    with pytest.raises(c4d.Cache4DiffusionError, match="Use site='span' with a gate that watches them"):
        c4d.accelerate(model, "fora", predictor="aligned")
