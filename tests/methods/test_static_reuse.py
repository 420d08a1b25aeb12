"""FRDiff and Skip-DiT: what is mixed, held and reused, against slow references written from their cards."""

import math
from itertools import chain

import pytest
import torch
from slow_references import DiTBlocks, FluxBlocks, SlowCache

import cache4diffusion as c4d
from cache4diffusion.cost import summarise
from cache4diffusion.gates import Step
from cache4diffusion.sites import MixedScore
from small_denoisers import Alike, SlowFlux, accelerated, differences, dit, dit_inputs, flux_inputs, sample

STEPS = 12


class Keeping(Alike):
    """Every part's output is kept on full steps and handed out again on others."""

    def __init__(self):
        self.is_full, self.kept = True, {}

    def give(self, name, kind, entering, compute):
        if self.is_full:
            self.kept[name] = compute()
        return self.kept[name]


class SlowFRDiff:
    """The card: ``e = lam * e_reuse + (1 - lam) * e_jump``."""

    def __init__(self, model, interval, bias, steps):
        self.parts = Keeping()
        self.net, self.step, self.weights = SlowFlux(model, self.parts), -1, []
        self.interval, self.bias, self.steps = interval, bias, steps

    def __call__(self, **kwargs):
        self.step += 1
        if self.step % self.interval == 0:
            self.parts.is_full = True
            (self.jump,) = self.net(**kwargs)
            return (self.jump,)
        lam = min(max((30 * (self.step / self.steps - self.bias) + 2) / 4, 0), 1)
        self.weights.append(lam)
        if lam < 1e-10:
            return (self.jump,)
        self.parts.is_full = False
        (reused,) = self.net(**kwargs)
        return (lam * reused + (1 - lam) * self.jump,)


@pytest.mark.parametrize("interval", [2, 3])
def test_frdiff_is_the_slow_reference(model, interval):
    """40 steps, so that the ramp has cached steps on it."""
    reference = SlowFRDiff(model, interval, 0.5, 40)
    expected = sample(reference, flux_inputs(2), 40)
    reached, trace, stats = accelerated(model, flux_inputs(2), 40, "frdiff", interval=interval)
    assert trace.strip() == ("F" + "c" * (interval - 1)) * (40 // interval) + "F" * (40 % interval > 0)
    assert {0, 1} < set(reference.weights), "held, mixed and reused"
    assert max(differences(reached, expected)) <= 1e-5
    assert stats["syncs"] == 0


def test_frdiffs_ramp():
    site = MixedScore()
    assert site.weight(0.5) == 0.5
    assert site.weight(0.5 - 1 / 15) == pytest.approx(0)
    assert site.weight(0.5 + 1 / 15) == pytest.approx(1)
    assert (site.weight(0.0), site.weight(1.0), site.weight(1.4)) == (0, 1, 1)


def test_frdiff_with_the_ramp_behind_the_run_holds_the_output_and_runs_nothing(model):
    inputs, held = flux_inputs(1), {}

    def hold(**kwargs):
        held["step"] = held.get("step", -1) + 1
        if held["step"] % 2 == 0:
            held["out"] = model(**kwargs)
        return held["out"]

    expected = sample(hold, inputs, STEPS)
    with c4d.accelerate(model, "frdiff", bias=1.5) as handle:
        with handle.run(num_steps=STEPS):
            reached = sample(model, inputs, STEPS)
        assert handle.trace.strip() == "Fc" * (STEPS // 2)
        assert summarise(handle).cached_flops == 0
    assert differences(reached, expected) == [0.0] * STEPS


def test_frdiff_with_the_ramp_before_the_run_is_fora(model):
    inputs = flux_inputs(2)
    expected, parent, _ = accelerated(model, inputs, STEPS, "fora", interval=3)
    reached, trace, _ = accelerated(model, inputs, STEPS, "frdiff", interval=3, bias=-0.5)
    assert trace.strip() == parent.strip()
    assert differences(reached, expected) == [0.0] * STEPS


@pytest.mark.parametrize(("steps", "interval"), [(50, 2), (50, 3), (51, 2), (7, 7), (6, 1)])
def test_frdiff_has_a_full_step_for_every_interval_begun(steps, interval):
    gate = c4d.method("frdiff", interval=interval).compose().gate
    full = [i for i in range(steps) if not gate.propose(None, Step(i, steps), None)]
    assert full == list(range(0, steps, interval))
    assert len(full) == math.ceil(steps / interval)


def test_frdiff_may_cache_attention_alone():
    denoiser, ran = dit(), []
    for name, module in denoiser.named_modules():
        if name.endswith((".attn1", ".ff")):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with c4d.accelerate(denoiser, "frdiff", parts="attn", bias=-0.5) as handle, handle.run(num_steps=4):
        sample(denoiser, dit_inputs(1), 4)
        rested = [path for path, _ in handle.trace.of()[1].rested or ()]
    assert sorted(path for path in rested if path.endswith("attn1")) == [
        f"transformer_blocks.{i}.attn1" for i in range(3)
    ]
    assert not any(path.endswith(".ff") for path in rested)


# -- Skip-DiT --------------------------------------------------------------------------------------------------------


class SlowSkip(SlowCache):
    """The first blocks run, what they give is replaced by the middle's last output, the last blocks run."""

    def __init__(self, net, interval, keep, start, stop, steps):
        super().__init__(net)
        self.interval, self.keep, self.start, self.stop, self.steps = interval, keep, start, stop, steps
        self.feature = None

    def through(self, streams, context, lists, glue):
        blocks = list(chain(*lists))
        middle = range(self.keep, len(blocks) - self.keep)
        is_allowed = int(self.start * self.steps) < self.step < self.stop * self.steps
        is_full = self.step % self.interval == 0 or not is_allowed or self.feature is None
        self.strip += "F" if is_full else "c"
        for k, block in enumerate(blocks):
            if is_full or k not in middle:
                streams = block(streams)
            if k == middle[-1]:
                self.feature = streams if is_full else self.feature
                streams = self.feature
        return streams


@pytest.mark.parametrize("case", ["flux", "dit"])
@pytest.mark.parametrize(("interval", "start", "stop"), [(2, 0.3, 0.95), (3, 0.0, 1.0)])
def test_skip_dit_is_the_slow_reference(model, case, interval, start, stop):
    denoiser, inputs = (model, flux_inputs(2)) if case == "flux" else (dit(), dit_inputs(2))
    net = FluxBlocks(denoiser) if case == "flux" else DiTBlocks(denoiser)
    reference = SlowSkip(net, interval, 1, start, stop, STEPS)
    expected = sample(reference, inputs, STEPS)
    settings = {"interval": interval, "start": start, "stop": stop}
    reached, trace, _ = accelerated(denoiser, inputs, STEPS, "skip-dit", **settings)
    assert trace.strip() == reference.strip
    assert set(trace.strip()) == {"F", "c"}
    assert max(differences(reached, expected)) <= 1e-5


def test_skip_dit_lets_nothing_of_the_current_latent_through_the_middle(model):
    """Without skip connections all that the last block sees of the step is the timestep."""
    inputs, found = flux_inputs(1), []
    handle = c4d.accelerate(model, "skip-dit", keep=1, start=0.0, stop=1.0)
    for seed in (1, 2):
        other = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(seed))
        with handle.run(num_steps=2), torch.no_grad():
            model(**inputs, timestep=torch.tensor([1.0]))
            found.append(model(**{**inputs, "hidden_states": other}, timestep=torch.tensor([0.5]))[0])
    handle.remove()
    assert torch.equal(*found)


@pytest.mark.parametrize(("case", "keep"), [("flux", 1), ("flux", 2), ("dit", 1)])
def test_on_a_cached_step_skip_dit_runs_the_first_and_the_last_blocks(model, case, keep):
    denoiser, inputs = (model, flux_inputs(1)) if case == "flux" else (dit(), dit_inputs(1))
    blocks, ran = [*denoiser.transformer_blocks, *getattr(denoiser, "single_transformer_blocks", ())], []
    parts = [block.attn if hasattr(block, "attn") else block.attn1 for block in blocks]
    hooks = [part.register_forward_hook(lambda *_, k=k: ran.append(k)) for k, part in enumerate(parts)]
    settings = {"keep": keep, "start": 0.0, "stop": 1.0}
    with c4d.accelerate(denoiser, "skip-dit", **settings) as handle, handle.run(num_steps=4):
        sample(denoiser, inputs, 4, before=lambda i: ran.append("step"))
    for hook in hooks:
        hook.remove()
    every = list(range(len(blocks)))
    kept = every[:keep] + every[-keep:]
    assert ran == ["step", *every, "step", *kept, "step", *every, "step", *kept]


def test_skip_dit_that_keeps_every_block_is_exact(model):
    inputs = flux_inputs(1)
    with pytest.warns(UserWarning, match="0 of 6 steps"):
        reached, trace, _ = accelerated(model, inputs, 6, "skip-dit", keep=3, start=0.0, stop=1.0)
    assert trace.strip() == "FFFFFF"
    assert differences(reached, sample(model, inputs, 6)) == [0.0] * 6


@pytest.mark.parametrize("settings", [{"start": 1.0, "stop": 1.0}, {"interval": 1}])
def test_skip_dit_with_an_empty_window_is_exact(model, settings):
    inputs = flux_inputs(1)
    if "start" in settings:
        with pytest.warns(UserWarning, match="0 of 6 steps"):
            reached, trace, _ = accelerated(model, inputs, 6, "skip-dit", **settings)
    else:
        reached, trace, _ = accelerated(model, inputs, 6, "skip-dit", **settings)
    assert trace.strip() == "FFFFFF"
    assert differences(reached, sample(model, inputs, 6)) == [0.0] * 6
