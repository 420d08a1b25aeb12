"""Methods that act on the trajectory, in stock pipelines: what all methods promise, where there is a scheduler."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

import cache4diffusion as c4d
import toys
from cache4diffusion.errors import CompositionError, RunError

STEPS = 12
NAMES = sorted(set(c4d.METHODS) - set(toys.TRANSFORMER_METHODS) - toys.ELSEWHERE)
ACTIVE = {name: {} for name in NAMES} | {"z-cache": {"interval": 2, "ahead": 2, "warmup": 1}}
trajectory = pytest.mark.parametrize("name", NAMES)
GUIDED = toys.prompt(1, negative=2)


@trajectory
@pytest.mark.parametrize("negative", [None, 2], ids=["unguided", "true-cfg"])
def test_off_is_off(name, negative):
    pipe, prompt = toys.flux_pipeline(), toys.prompt(1, negative=negative)
    plain = toys.generate(pipe, 6, **prompt)
    with c4d.accelerate(pipe, name, **c4d.METHODS[name].info.off) as handle:
        assert torch.equal(toys.generate(pipe, 6, **prompt), plain)
        assert set(handle.stats["strip"]) == {"F"}


@trajectory
def test_it_caches_and_a_cached_step_runs_nothing_in_any_branch(name):
    pipe = toys.flux_pipeline()
    plain = toys.generate(pipe, STEPS, **GUIDED)
    counter = toys.Counter(pipe.transformer)
    with c4d.accelerate(pipe, name, **ACTIVE[name]) as handle:
        _, found = counter.during(lambda: toys.generate(pipe, STEPS, **GUIDED))
        strips = list(handle.stats["strips"].values())
        assert len(strips) == 2 and strips[0] == strips[1] and "c" in strips[0]
        assert counter.counts["proj_out"] == 2 * strips[0].count("F")
    assert found.isfinite().all() and found.shape == plain.shape and found.dtype == plain.dtype
    assert 0 < float((found - plain).norm() / plain.norm()) < 1.0
    assert torch.equal(toys.generate(pipe, STEPS, **GUIDED), plain), "removed without a trace"


@trajectory
def test_runs_are_independent_and_the_ledger_tells_what_is_held(name):
    pipe, held = toys.flux_pipeline(), []

    def look(pipe, step, timestep, kept):
        engine = handle._engines[0]
        tensors = [t for state in engine._states.values() for t in state.tensors()]
        held.append((handle.memory["held"], sum({t.data_ptr(): t.nbytes for t in tensors}.values())))
        return kept

    with c4d.accelerate(pipe, name, **ACTIVE[name]) as handle:
        first = toys.generate(pipe, STEPS, **GUIDED, callback_on_step_end=look)
        second = toys.generate(pipe, STEPS, **GUIDED)
        assert torch.equal(first, second)
        assert handle.memory["held"] == 0, "nothing outlives a run"
    assert max(size for size, _ in held) > 0
    assert all(told == real for told, real in held)


@trajectory
def test_a_prediction_that_is_not_finite_is_computed_in_every_branch(name):
    pipe, plan = toys.flux_pipeline(), {}

    def poison(pipe, step, timestep, kept):
        if step == plan.get("at"):
            for state in handle._engines[0]._states.values():
                for history in state.sites.values():
                    for buffer in history.buffers:
                        buffer.fill_(float("nan"))
        return kept

    with c4d.accelerate(pipe, name, **ACTIVE[name]) as handle:
        toys.generate(pipe, STEPS, **GUIDED)
        before = handle.stats["strip"]
        cached = before.index("c", 4)
        plan["at"] = cached - 1
        found = toys.generate(pipe, STEPS, **GUIDED, callback_on_step_end=poison)
        assert [strip[cached] for strip in handle.stats["strips"].values()] == ["F", "F"]
        assert any("not finite" in note for note in handle.stats["notes"])
    assert found.isfinite().all()


@trajectory
@pytest.mark.parametrize("edited", [0, 1])
def test_a_prompt_replaced_midway_leaves_nothing_of_the_old_one(name, edited):
    """Of whichever branch, for the history is of both. Of one called later only after this step: the first is gone."""
    denoiser, scheduler = toys.flux(), FlowMatchEulerDiscreteScheduler()
    prompts = [toys.flux_inputs(seed=seed) for seed in range(4)]

    @torch.no_grad()
    def sample(before, after, at, fresh=STEPS):
        with toys.accelerated(denoiser, name, ACTIVE[name]) as handle:
            handle.watch_scheduler(scheduler)
            scheduler.set_timesteps(STEPS)
            x, found = prompts[0]["hidden_states"], []
            for i, t in enumerate(scheduler.timesteps):
                x = prompts[1]["hidden_states"] if i == fresh else x  # the same in all runs from here on
                branches, outputs = list(prompts[:2]), []
                branches[edited] = before if i < at else after
                for branch, inputs in zip(("cond", "uncond"), branches, strict=True):
                    with denoiser.cache_context(branch):
                        call = {**inputs, "hidden_states": x, "timestep": t.expand(1) / 1000}
                        outputs.append(denoiser(**call).sample)
                cond, uncond = outputs
                x = scheduler.step(uncond + 2 * (cond - uncond), t, x).prev_sample
                found.append(x)
            return found, handle.trace.strip(branch="cond")

    at = sample(prompts[2], prompts[2], STEPS)[1].index("c", 4)
    clean = at + edited
    found, strip = sample(prompts[2], prompts[3], at, clean)
    assert strip[clean] == "F" and "c" in strip[clean:], strip
    again, _ = sample(prompts[0], prompts[3], at, clean)
    assert all(torch.equal(a, b) for a, b in zip(found[clean:], again[clean:], strict=True))


@trajectory
def test_other_solvers_are_refused_by_name_at_once(name):
    pipe = toys.flux_pipeline()
    pipe.scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(CompositionError, match=r"DPMSolverMultistepScheduler cannot be steered.*FlowMatchEuler"):
        c4d.accelerate(pipe, name)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(CompositionError, match="adds noise in every step"):
        c4d.accelerate(pipe, name)


def test_a_loop_without_a_scheduler_is_told_what_to_do():
    denoiser = toys.flux()
    with toys.accelerated(denoiser, "taocache", {}, num_steps=6), pytest.raises(RunError, match="watch_scheduler"):
        toys.flux_loop(denoiser, toys.flux_inputs(), 6)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"decide": "row"}, "branches='tied'"),
        ({"branches": "independent"}, "branches='tied'"),
        ({"gate": "probe"}, "none to watch"),
        ({"cfg": "fastercache"}, "predict another one from"),
        ({"predictor": "mean-velocity"}, "feature='all'"),
        ({"predictor": "two-sided"}, "one needs the other"),
        ({"gate": "look-ahead"}, "one needs the other"),
    ],
)
def test_what_cannot_go_with_it_is_refused(axes, words):
    with pytest.raises(CompositionError, match=words):
        c4d.accelerate(toys.flux(), "taocache", **axes)
