"""Nothing of one run is seen by another: each equals what a fresh process gives."""

import contextlib
import copy
import itertools
import threading

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

import cache4diffusion as c4d
import toys
from cache4diffusion.engine.state import BranchState

methods = toys.distinct_methods
STEPS = 9  # of runs in bare loops
GUIDED = toys.prompt(1, negative=2)
OTHER = toys.prompt(3, negative=4)


def pipe_alone(pipe, name, *runs):
    """What each run gives on its own: a fresh handle on a fresh copy."""
    found = []
    for arguments in runs:
        alone = copy.deepcopy(pipe)
        with c4d.accelerate(alone, name, **toys.ACTIVE[name]) as handle:
            found.append(toys.generate(alone, **arguments))
            strip = handle.stats["strip"] + "".join(handle.stats["strips"].values())
            assert set(strip) & set("cphm"), f"nothing is cached in this test: {strip}"
    return found


def assert_same(found, truth):
    for a, b in zip(found, truth, strict=True):
        assert torch.equal(a, b)


def alone(denoiser, name, loop, num_steps=STEPS, **settings):
    return toys.on_a_fresh_copy(denoiser, name, loop, num_steps, **settings)


# ---------------------------------------------------------------------- pipelines

RUNS = {
    "guided": GUIDED,
    "other prompt": OTHER,
    "more steps": {**GUIDED, "num_steps": 14},
    "fewer steps": {**GUIDED, "num_steps": 7},
    "other resolution": {**GUIDED, "side": 32},
    "other batch": toys.prompt(1, batch=2, negative=2) | {"batch": 2},
    "without guidance": toys.prompt(1),
}


@methods
def test_runs_in_a_row(name):
    """Every run comes after one of another kind, and again after a guided one."""
    runs = dict(RUNS)
    if name == "fastercache":  # without guidance it caches nothing, and says so: see test_bad_input
        del runs["without guidance"]
    pipe = toys.flux_pipeline()
    truth = dict(zip(runs, pipe_alone(pipe, name, *runs.values()), strict=True))
    with c4d.accelerate(pipe, name, **toys.ACTIVE[name]) as handle:
        for key in [*runs, "guided", "fewer steps", "more steps"]:
            assert torch.equal(toys.generate(pipe, **runs[key]), truth[key]), key
            assert handle.memory["held"] == 0


@methods
@pytest.mark.parametrize(("error", "where"), [(RuntimeError, "denoiser"), (KeyboardInterrupt, "callback")])
def test_a_run_aborted_at_step_7(name, error, where):
    pipe = toys.flux_pipeline()
    (truth,) = pipe_alone(pipe, name, GUIDED)

    class Failing(torch.nn.Identity):
        calls = 0

        def forward(self, x):
            Failing.calls += 1
            if where == "denoiser" and Failing.calls == 7:
                raise error("stopped")
            return x

    def stop(pipe, step, timestep, kwargs):
        if where == "callback" and step == 6:
            raise error("stopped")
        return kwargs

    pipe.transformer.x_embedder = torch.nn.Sequential(pipe.transformer.x_embedder, Failing())
    with c4d.accelerate(pipe, name, **toys.ACTIVE[name]) as handle:
        with pytest.raises(error):
            toys.generate(pipe, 30, callback_on_step_end=stop, **GUIDED)
        assert handle.memory["held"] == 0
        Failing.calls = 100
        assert torch.equal(toys.generate(pipe, **GUIDED), truth)


@pytest.mark.parametrize("name", ["taylorseer", "dbcache"])
def test_20_then_50_steps_then_an_abort_at_step_7_then_another_resolution(name):
    """Under FLUX.1-dev's own schedule of noise, which depends on the resolution; one static and one adaptive method."""
    pipe = toys.flux_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(**toys.FLUX_SCHEDULE))
    runs = [{"num_steps": 20}, {"num_steps": 50}, {"side": 32}]
    truth = pipe_alone(pipe, name, *runs)

    def stop(pipe, step, timestep, kwargs):
        return toys.fail(KeyboardInterrupt) if step == 7 else kwargs

    with c4d.accelerate(pipe, name, **toys.ACTIVE[name]) as handle:
        assert_same([toys.generate(pipe, **run) for run in runs[:2]], truth[:2])
        with pytest.raises(KeyboardInterrupt):
            toys.generate(pipe, 20, callback_on_step_end=stop)
        assert handle.memory["held"] == 0
        assert_same([toys.generate(pipe, **run) for run in (runs[2], *runs)], (truth[2], *truth))


@methods
def test_two_pipelines_of_one_class_enable_both_remove_one(name):
    one, other = toys.flux_pipeline(toys.flux(seed=1)), toys.flux_pipeline(toys.flux(seed=2))
    plain = toys.generate(one, **GUIDED)
    (truth,) = pipe_alone(other, name, GUIDED)
    first, second = (c4d.accelerate(pipe, name, **toys.ACTIVE[name]) for pipe in (one, other))
    toys.generate(one, **GUIDED)
    assert torch.equal(toys.generate(other, **GUIDED), truth)
    first.remove()
    assert torch.equal(toys.generate(one, **GUIDED), plain)
    assert torch.equal(toys.generate(other, **GUIDED), truth)
    second.remove()


@methods
def test_a_second_pipeline_on_the_accelerated_denoiser(name):
    pipe = toys.flux_pipeline()
    truth = pipe_alone(pipe, name, GUIDED, OTHER)
    with c4d.accelerate(pipe, name, **toys.ACTIVE[name]) as handle:
        second = FluxPipeline.from_pipe(pipe)
        second.set_progress_bar_config(disable=True)
        assert second.transformer is pipe.transformer
        for _ in range(2):
            assert_same([toys.generate(pipe, **GUIDED), toys.generate(second, **OTHER)], truth)
        with pytest.raises(c4d.Cache4DiffusionError, match=f"already accelerated by {name}"):
            c4d.accelerate(second, name)
        assert handle.stats["total_steps"] == 8


@methods
def test_two_threads_with_two_pipelines(name):
    pipes = [toys.flux_pipeline(toys.flux(seed=seed)) for seed in (1, 2)]
    truth = [pipe_alone(pipe, name, GUIDED)[0] for pipe in pipes]
    handles = [c4d.accelerate(pipe, name, **toys.ACTIVE[name]) for pipe in pipes]
    assert_same(in_threads([lambda pipe=pipe: toys.generate(pipe, **GUIDED) for pipe in pipes]), truth)
    for handle in handles:
        handle.remove()


def in_threads(calls):
    found, barrier = [None] * len(calls), threading.Barrier(len(calls))

    def work(index):
        barrier.wait()
        try:
            found[index] = calls[index]()
        except BaseException as error:  # shown by the caller
            found[index] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


@methods
def test_two_threads_on_one_denoiser(name):
    denoiser = toys.flux()
    prompts = [[toys.flux_inputs(seed=s), toys.flux_inputs(seed=s + 5)] for s in (0, 1)]
    truth = [alone(denoiser, name, lambda d, b=b: toys.branch_loop(d, b, STEPS)) for b in prompts]
    with c4d.accelerate(denoiser, name, **toys.ACTIVE[name]) as handle:

        def sample(branches):
            with handle.run(num_steps=STEPS):
                return toys.branch_loop(denoiser, branches, STEPS)

        for found, right in zip(in_threads([lambda b=b: sample(b) for b in prompts]), truth, strict=True):
            assert_same(found, right)


def test_a_run_that_ends_does_not_disturb_the_run_of_another_thread(monkeypatch):
    """At its end a run looks at all that is held, and meanwhile another may begin."""
    denoiser, prompts = toys.flux(), [toys.flux_inputs(seed=s) for s in (0, 1)]
    truth = alone(denoiser, "fora", lambda d: toys.flux_loop(d, prompts[1], STEPS))
    with c4d.accelerate(denoiser, "fora", interval=3) as handle:
        tensors, found = BranchState.tensors, []

        def other():
            with handle.run(num_steps=STEPS):
                found.append(toys.flux_loop(denoiser, prompts[1], STEPS))

        threads = [threading.Thread(target=other)]

        def look(state):
            if threads and threading.current_thread() is threading.main_thread():
                thread = threads.pop()
                thread.start()
                thread.join()
            return tensors(state)

        with handle.run(num_steps=STEPS), torch.no_grad():
            call = {**prompts[0], "timestep": torch.tensor([1.0])}
            denoiser(**call)
            with denoiser.cache_context("second"):
                denoiser(**call)
            monkeypatch.setattr(BranchState, "tensors", look)
            handle._engines[0].account()
        assert not threads
        assert_same(found[0], truth)


@methods
def test_guidance_switched_off_midway(name):
    """Until then both branches are as in a guided run; afterwards the first goes on as if nothing had happened."""
    denoiser, branches = toys.flux(), [toys.flux_inputs(seed=0), toys.flux_inputs(seed=1)]
    whole = alone(denoiser, name, lambda d: toys.branch_loop(d, branches, STEPS))
    with toys.accelerated(denoiser, name, num_steps=STEPS) as handle:
        found = toys.branch_loop(denoiser, branches, STEPS, until=5)
        lengths = sorted(map(len, handle.stats["strips"].values()))
    assert lengths == [5, STEPS]
    assert_same(found[:5], whole[:5])
    # The first branch alone, fed the same latents, gives the same from step 5 on.
    latents = [branches[0]["hidden_states"]]
    for output in found:
        latents.append(latents[-1] - output / STEPS)

    @torch.no_grad()
    def replay(d):
        calls = zip(latents, toys.timesteps(STEPS), strict=False)
        return [d(**{**branches[0], "hidden_states": x, "timestep": torch.tensor([t])}).sample for x, t in calls]

    if name != "fastercache":
        assert_same(found[5:], alone(denoiser, name, replay)[5:])


@methods
def test_batched_guidance_switched_off_midway(name):
    denoiser = toys.dit()
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def loop(d):
        found, latent = [], x
        for i in range(STEPS):
            both = i < 5
            labels = torch.tensor([3, 10] if both else [3])
            rows = torch.cat([latent, latent]) if both else latent
            output = d(rows, timestep=torch.full((len(rows),), 999 - 90 * i), class_labels=labels).sample
            found.append(output)
            latent = latent - 0.1 * output[:1]
        return found

    plain = loop(denoiser)
    with toys.accelerated(denoiser, name, num_steps=STEPS) as handle:
        found = loop(denoiser)
        strip = "".join(handle.stats["strips"].values())
    assert_same(found[:1], plain[:1])
    assert torch.equal(found[5], alone(denoiser, name, loop)[5])
    assert len(strip) == STEPS
    assert torch.allclose(torch.cat([o[:1] for o in found]), torch.cat([o[:1] for o in plain]), atol=1.0)
    assert found[5].shape[0] == 1


@methods
def test_each_of_three_branches_is_as_in_its_own_run(name):
    denoiser, branches = toys.flux(), [toys.flux_inputs(seed=s) for s in range(3)]
    for inputs in branches:
        inputs["hidden_states"] = branches[0]["hidden_states"]
    x = [branches[0]["hidden_states"] * (1 + 0.02 * i) for i in range(STEPS)]

    @torch.no_grad()
    def loop(d, chosen):
        found = [[] for _ in chosen]
        for i, t in enumerate(toys.timesteps(STEPS)):
            for outputs, inputs in zip(found, chosen, strict=True):
                outputs.append(d(**{**inputs, "hidden_states": x[i], "timestep": torch.tensor([t])}).sample)
        return found

    together = alone(denoiser, name, lambda d: loop(d, branches))
    for index, inputs in enumerate(branches):
        if name == "fastercache":  # predicts the second branch from the first
            if index == 1:
                continue
            single = [loop(denoiser, [inputs])[0]]
        else:
            single = alone(denoiser, name, lambda d, inputs=inputs: loop(d, [inputs]))
        assert_same(together[index], single[0])


@methods
def test_branches_of_different_prompt_lengths(name):
    denoiser, branches = toys.flux(), [toys.flux_inputs(seed=0, text=7), toys.flux_inputs(seed=1, text=4)]
    branches[1]["hidden_states"] = branches[0]["hidden_states"]
    x = [branches[0]["hidden_states"] * (1 + 0.02 * i) for i in range(STEPS)]

    @torch.no_grad()
    def loop(d, chosen):
        found = [[] for _ in chosen]
        for i, t in enumerate(toys.timesteps(STEPS)):
            for outputs, inputs in zip(found, chosen, strict=True):
                outputs.append(d(**{**inputs, "hidden_states": x[i], "timestep": torch.tensor([t])}).sample)
        return found

    together = alone(denoiser, name, lambda d: loop(d, branches))
    if name == "fastercache":
        return
    for index, inputs in enumerate(branches):
        assert_same(together[index], alone(denoiser, name, lambda d, inputs=inputs: loop(d, [inputs]))[0])


@methods
def test_branches_of_which_one_has_an_ip_adapter_and_a_controlnet(name):
    """What the parts return and which arguments there are differs from call to call of one run."""
    denoiser = toys.flux(ip_adapter=True)
    plain, adapted = toys.flux_inputs(2), {**toys.flux_inputs(2, seed=1), **toys.ip_adapter_inputs(2)}
    adapted |= toys.controlnet_inputs(2)
    adapted["hidden_states"] = plain["hidden_states"]
    plain["joint_attention_kwargs"] = {"ip_hidden_states": []}

    def loop(d, chosen):
        found = [[] for _ in chosen]
        for i, t in enumerate(toys.timesteps(STEPS)):
            for outputs, inputs in zip(found, chosen, strict=True):
                now = {**inputs, "hidden_states": inputs["hidden_states"] * (1 + 0.02 * i)}
                with torch.no_grad():
                    outputs.append(d(**toys.fresh(now), timestep=torch.full((2,), t)).sample)
        return found

    for branches in ([plain, adapted], [adapted, plain]):
        together = alone(denoiser, name, lambda d, branches=branches: loop(d, branches))
        if name != "fastercache":
            for index, inputs in enumerate(branches):
                single = alone(denoiser, name, lambda d, inputs=inputs: loop(d, [inputs]))
                assert_same(together[index], single[0])


@methods
def test_timesteps_that_round_to_equal_neighbours(name):
    """bf16 of a long schedule: neighbours are equal, steps are told by the latent."""
    denoiser, inputs = toys.flux().bfloat16(), toys.flux_inputs(dtype=torch.bfloat16)
    times = torch.linspace(1.0, 0.975, 12)
    assert times.bfloat16().unique().numel() < 12

    @torch.no_grad()
    def loop(d, dtype):
        x, found = inputs["hidden_states"], []
        for t in times:
            found.append(d(**{**inputs, "hidden_states": x, "timestep": t.to(dtype).expand(1)}).sample)
            x = x - found[-1] / 12
        return found

    if name == "fastercache":
        return
    with toys.accelerated(denoiser, name) as handle, handle.run(timesteps=times):
        told = loop(denoiser, torch.bfloat16)
        strip = handle.stats["strip"]
    assert len(strip) == 12
    if not c4d.METHODS[name](**toys.ACTIVE[name]).compose().needs_num_steps:
        with toys.accelerated(denoiser, name) as handle:
            inferred = loop(denoiser, torch.bfloat16)
            assert handle.stats["strip"] == strip
        assert_same(inferred, told)


@pytest.mark.parametrize("name", ["taylorseer", "dbcache"])
def test_timesteps_in_bf16_of_flux_at_2048_by_2048(name):
    """Of 50 steps 16 begin at the timestep of the one before. The loop is told by its latents, listing or scheduler."""
    denoiser, inputs = toys.flux().bfloat16(), toys.flux_inputs(dtype=torch.bfloat16)
    scheduler = FlowMatchEulerDiscreteScheduler(**toys.FLUX_SCHEDULE)
    mu = calculate_shift((2048 // 16) ** 2)
    scheduler.set_timesteps(sigmas=[1 - i / 50 for i in range(50)], mu=mu)
    listed = scheduler.timesteps
    passed = [t.expand(1).to(torch.bfloat16) / 1000 for t in listed]  # as the pipeline does
    assert sum(bool(a == b) for a, b in itertools.pairwise(passed)) == 16

    @torch.no_grad()
    def loop(scheduler):
        scheduler.set_timesteps(sigmas=[1 - i / 50 for i in range(50)], mu=mu)
        x, found = inputs["hidden_states"], []
        for t, time in zip(scheduler.timesteps, passed, strict=True):
            found.append(denoiser(**{**inputs, "hidden_states": x}, timestep=time).sample)
            x = scheduler.step(found[-1], t, x).prev_sample
        return found

    def sample(accelerated, scheduler, **told):
        with (
            c4d.accelerate(accelerated, name, **toys.ACTIVE[name]) as handle,
            handle.run(**told) if told else contextlib.nullcontext(),
        ):
            return loop(scheduler), handle.stats["strip"]

    pipe = toys.flux_pipeline(denoiser, scheduler)
    found = [
        sample(denoiser, copy.deepcopy(scheduler)),
        sample(denoiser, copy.deepcopy(scheduler), timesteps=listed),
        sample(pipe, scheduler),
    ]
    outputs, strip = found[0]
    assert len(strip) == 50 and set(strip) == {"F", "c"}
    for others, its in found[1:]:
        assert its == strip
        assert_same(others, outputs)


@methods
def test_one_timestep_per_token(name):
    """Their maximum is the clock."""

    class PerToken(toys.Blocks):
        def forward(self, x, timestep, context):
            hidden = self.embed(x) + context + timestep[..., None]
            for block in self.blocks:
                hidden = block(hidden, 0.7)
            return self.out(hidden)

    denoiser = toys.seeded(PerToken)(dim=toys.WIDTH)
    x, context = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0)), torch.ones(1, 1, toys.WIDTH)

    @torch.no_grad()
    def loop(d, per_token):
        found, latent = [], x
        for t in toys.timesteps(STEPS):
            time = torch.full((1, 6), t)
            if per_token:
                time[:, :2] = 0.0  # clean tokens of a first frame
            found.append(d(latent, time, context))
            latent = latent - found[-1] / STEPS
        return found

    if name in toys.FOR_ATTENTION:
        return  # these blocks have none
    settings = toys.ACTIVE[name] | ({"grid": (2, 3)} if name == "seacache" else {})  # nothing here tells how tokens lie
    with toys.accelerated(denoiser, name, settings, num_steps=STEPS) as handle:
        found = loop(denoiser, per_token=True)
        strip = handle.stats["strip"]
    assert len(strip) == STEPS
    assert_same(found[:1], loop(denoiser, per_token=True)[:1])
    assert set(strip) & set("cp")


@methods
def test_two_experts_of_one_pipeline_share_a_handle(name):
    """High-noise steps go to one denoiser, low-noise steps to the other; each caches its own features."""

    class Experts:
        def __init__(self):
            self.transformer, self.transformer_2 = toys.flux(seed=1), toys.flux(seed=2)

    @torch.no_grad()
    def loop(first, second, inputs, num_steps=14):
        x, found = inputs["hidden_states"], []
        for i, t in enumerate(toys.timesteps(num_steps)):
            expert = first if i < num_steps // 2 else second
            found.append(expert(**{**inputs, "hidden_states": x, "timestep": torch.tensor([t])}).sample)
            x = x - found[-1] / num_steps
        return found

    if name == "fastercache":
        return
    pipe = Experts()
    runs = [toys.flux_inputs(seed=0), toys.flux_inputs(seed=1)]
    with c4d.accelerate(pipe, name, **toys.ACTIVE[name]) as handle:
        found = []
        for inputs in runs:
            with handle.run(num_steps=14):
                found.append(loop(pipe.transformer, pipe.transformer_2, inputs))
                strips = handle.stats["strips"]
        assert {key.split("/")[0]: len(strip) for key, strip in strips.items()} == {
            "transformer": 7,
            "transformer_2": 7,
        }
        assert all(set(strip) & set("cp") for strip in strips.values()), strips
        assert all(strip[0] == "F" for strip in strips.values())
    for inputs, outputs in zip(runs, found, strict=True):
        other = Experts()
        with c4d.accelerate(other, name, **toys.ACTIVE[name]) as handle, handle.run(num_steps=14):
            assert_same(outputs, loop(other.transformer, other.transformer_2, inputs))


# ---------------------------------------------------------------------- bare loops


@methods
def test_bare_runs_in_a_row_without_any_announcement(name):
    if c4d.METHODS[name](**toys.ACTIVE[name]).compose().needs_num_steps or name == "fastercache":
        return
    denoiser, runs = toys.flux(), [toys.flux_inputs(seed=0), toys.flux_inputs(seed=1), toys.flux_inputs(side=6)]
    truth = [alone(denoiser, name, lambda d, i=i: toys.flux_loop(d, i, STEPS)) for i in runs]
    with c4d.accelerate(denoiser, name, **toys.ACTIVE[name]):
        for inputs, right in zip(runs, truth, strict=True):
            assert_same(toys.flux_loop(denoiser, inputs, STEPS), right)
            with pytest.raises(KeyboardInterrupt):
                toys.flux_loop(denoiser, inputs, STEPS, fail_at=7, error=KeyboardInterrupt)


EDITS = {"named": (("cond", "uncond"), 0), "named, second": (("cond", "uncond"), 1), "unnamed": (None, 0)}


@methods
@pytest.mark.parametrize("how", EDITS)
def test_a_prompt_replaced_midway_leaves_nothing_of_the_old_one(name, how):
    """At equal length. From there on all is as it would be had the old prompt been any other."""
    names, edited = EDITS[how]
    denoiser = toys.flux()
    first, second, *others = (toys.flux_inputs(seed=s) for s in range(4))
    x = [first["hidden_states"] * (1 + 0.02 * i) for i in range(14)]

    @torch.no_grad()
    def loop(d, before, after, at):
        found = [[], []]
        for i, t in enumerate(toys.timesteps(14)):
            branches = [first, second]
            branches[edited] = before if i < at else after
            for b, inputs in enumerate(branches):
                with d.cache_context(names[b]) if names else contextlib.nullcontext():
                    call = {**inputs, "hidden_states": x[i], "timestep": torch.tensor([t])}
                    found[b].append(d(**call).sample)
        return found

    def sample(before, after, at=0):
        with toys.accelerated(denoiser, name, num_steps=14) as handle:
            return loop(denoiser, before, after, at), [*handle.stats["strips"].values()]

    unedited, strips = sample(*others)
    concerned = 1 if name == "fastercache" else edited  # it predicts the second branch, from the first
    at = next(i for i, symbol in enumerate(strips[concerned]) if i > 3 and symbol != "F")
    plain = loop(denoiser, *others, at)
    found, strips = sample(*others, at)
    assert strips[concerned][at] == "F"
    assert set(strips[concerned][at:]) & set("cp")
    assert torch.equal(found[edited][at], plain[edited][at])
    again, _ = sample((first, second)[edited], others[1], at)
    assert_same(found[edited][at:], again[edited][at:])
    leads = edited == 0 and c4d.METHODS[name](**toys.ACTIVE[name]).compose().branches == "tied"
    if name != "fastercache" and not leads:  # what the first branch decides, tied ones do as well
        assert_same(found[1 - edited], unedited[1 - edited])


def test_a_callback_replaces_the_prompt_of_a_pipeline():
    pipe = toys.flux_pipeline()

    def swap(pipe, step, timestep, kwargs):
        return {**kwargs, "prompt_embeds": OTHER["prompt_embeds"]} if step == 3 else kwargs

    call = {**GUIDED, "callback_on_step_end": swap, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with c4d.accelerate(pipe, "taylorseer", interval=4) as handle:
        toys.generate(pipe, 9, **call)
        assert [handle.trace.strip(branch=name) for name in ("cond", "uncond")] == ["FFFcFcFcc", "FFFcccFcc"]
        assert any("conditioning" in note for note in handle.trace.notes)
        toys.generate(pipe, 9, **GUIDED)
        assert handle.trace.strip(branch="cond") == "FFFcccFcc"


@methods
def test_prompt_of_another_length_midway(name):
    """Callbacks may replace the prompt: what was cached for another length is of no use."""
    denoiser = toys.flux()

    @torch.no_grad()
    def loop(d, context):
        found = []
        for i, t in enumerate(toys.timesteps(STEPS)):
            inputs = toys.flux_inputs(seed=0, text=5 if i < 5 else 8)
            inputs["hidden_states"] = inputs["hidden_states"] * t
            with context("cond"):
                found.append(d(**inputs, timestep=torch.tensor([t])).sample)
        return found

    if name == "fastercache":
        return
    plain = loop(denoiser, denoiser.cache_context)
    with toys.accelerated(denoiser, name, num_steps=STEPS) as handle:
        found = loop(denoiser, denoiser.cache_context)
        assert handle.stats["strip"][5] == "F"
    assert torch.equal(found[5], plain[5])
