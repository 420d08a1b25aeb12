"""Which run, step and branch a call belongs to: every situation a host can be in, told from what the host shows."""

import contextlib
import copy
import gc
import inspect
import pickle
import threading
import weakref
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from diffusers.models.cache_utils import CacheMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

from cache4diffusion.errors import RunError, SettingError
from cache4diffusion.run import Run, RunTracker
from cache4diffusion.run.branches import Sample


class Log:
    """A tracker, and everything it said."""

    def __init__(self):
        self.begun, self.ended, self.calls, self.at_begin = [], [], [], []
        self.tracker = RunTracker(self.begin, lambda run, aborted: self.ended.append((run.id, aborted)))

    def begin(self, run: Run):
        self.begun.append(run)
        self.at_begin.append((run.num_steps, run.source))

    def call(self, t, cond=(), latent=None, key="denoiser"):
        latent = torch.zeros(1, 4, 2) if latent is None else latent
        cond = [cond] if isinstance(cond, torch.Tensor) else cond
        call = self.tracker.enter(key, timestep=t, conditioning=cond, latent=latent)
        self.calls.append(call)
        return call

    @property
    def trace(self):
        """(run, step, branch) of every call; runs numbered in the order they began."""
        return [(self.begun.index(c.run), c.step, c.branch) for c in self.calls]

    def steps(self, run=0, branch="branch-0"):
        return [c.step for c in self.calls if c.run is self.begun[run] and c.branch == branch]


@pytest.fixture
def log():
    return Log()


class Denoiser(torch.nn.Module, CacheMixin):
    pass


class Pipeline:
    """The loop of every diffusers pipeline: retrieve_timesteps, progress_bar, cache_context, scheduler.step."""

    def __init__(self, scheduler, log: Log, denoiser=None):
        self.scheduler, self.log, self.denoiser = scheduler, log, denoiser or Denoiser()

    def progress_bar(self, iterable=None, total=None):
        from tqdm.auto import tqdm

        return tqdm(iterable, disable=True) if iterable is not None else tqdm(total=total, disable=True)

    def __call__(
        self,
        num_steps,
        strength=1.0,
        names=("cond", "uncond"),
        shape=(1, 4, 2),
        raise_at=None,
        off_after=None,
        end=None,
    ):
        torch.manual_seed(0)
        latents = torch.randn(shape)
        prompts = {name: torch.randn(1, 3, 8) for name in names}
        timesteps, num_steps = retrieve_timesteps(self.scheduler, num_steps)
        if strength < 1:
            start = num_steps - int(num_steps * strength)
            timesteps = timesteps[start * self.scheduler.order :]
            if hasattr(self.scheduler, "set_begin_index"):
                self.scheduler.set_begin_index(start * self.scheduler.order)
            num_steps -= start
        if end is not None:  # denoising_end: a base model before a refiner
            timesteps, num_steps = timesteps[:end], end
        with self.progress_bar(total=num_steps) as bar:
            for i, t in enumerate(timesteps):
                if i == raise_at:
                    raise KeyboardInterrupt
                for name in names if off_after is None or i < off_after else names[:1]:
                    with self.denoiser.cache_context(name):
                        self.log.call(t.expand(shape[0]) / 1000, prompts[name], latents)
                latents = self.scheduler.step(torch.ones_like(latents), t, latents, return_dict=False)[0]
                bar.update()
        return latents


def watched(scheduler, log):
    pipe = Pipeline(scheduler, log)
    log.tracker.watch_pipeline(pipe)
    log.tracker.watch_denoiser(pipe.denoiser)
    return pipe


def flow():
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


SCHEDULERS = {
    "flow": flow,
    "ddim": DDIMScheduler,
    "heun": HeunDiscreteScheduler,
    "pndm": lambda: PNDMScheduler(skip_prk_steps=True),
    "pndm-prk": PNDMScheduler,
    "dpm": DPMSolverMultistepScheduler,
}
schedulers = pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)


# ---------------------------------------------------------------------- runs and steps of pipelines


@schedulers
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_number_timesteps_and_index_of_steps_are_those_of_scheduler_step(make, strength, log):
    if strength < 1 and make is PNDMScheduler:
        return  # hosts offer no image-to-image with a Runge-Kutta warm-up
    pipe = watched(make(), log)
    stepped, step = [], pipe.scheduler.step
    pipe.scheduler.step = lambda out, t, x, **kwargs: (stepped.append(float(t)), step(out, t, x, **kwargs))[1]
    pipe(10, strength)
    (run,) = log.begun
    assert (run.source, log.ended) == ("pipeline", [(run.id, False)])
    assert run.num_steps == len(stepped)
    assert log.at_begin == [(len(stepped), "pipeline")]
    assert run.timesteps == tuple(stepped)
    assert log.trace == [(0, i, name) for i in range(len(stepped)) for name in ("cond", "uncond")]
    assert log.tracker.current is None


@schedulers
def test_a_loop_that_ends_early_uses_the_first_timesteps(make, log):
    pipe = watched(make(), log)
    if pipe.scheduler.order > 1:
        return  # hosts count these in their own way
    pipe(10, end=4)
    run = log.begun[0]
    if len(pipe.scheduler.timesteps) == 10:  # PNDM's extra step is promised, too
        assert run.num_steps == 4
        assert run.timesteps == tuple(pipe.scheduler.timesteps[:4].tolist())
    assert log.steps(branch="cond") == [0, 1, 2, 3]


@schedulers
def test_20_then_50_steps_are_two_runs(make, log):
    pipe = watched(make(), log)
    pipe(20)
    pipe(50)
    assert [run.num_steps for run in log.begun] == [len(set(log.steps(0, "cond"))), len(set(log.steps(1, "cond")))]
    assert log.begun[0].id < log.begun[1].id
    assert log.steps(1, "uncond")[0] == 0
    assert log.ended == [(log.begun[0].id, False), (log.begun[1].id, False)]


def test_a_run_aborted_at_step_7_leaves_nothing_to_the_next(log):
    pipe = watched(flow(), log)
    with pytest.raises(KeyboardInterrupt):
        pipe(20, raise_at=7)
    assert log.ended == [(0, True)]
    assert log.tracker.current is None
    pipe(20, strength=0.5)  # from a lower timestep, which a bare loop could not tell
    assert log.steps(1, "cond") == list(range(10))
    assert log.begun[1].num_steps == 10


def test_an_exception_across_the_denoiser_ends_the_run_once(log):
    pipe = watched(flow(), log)
    cross = log.call

    def failing(*args):
        call = cross(*args)
        if call.step == 3:
            log.tracker.fail()
            raise MemoryError
        return call

    log.call = failing
    with pytest.raises(MemoryError):
        pipe(10)
    assert log.ended == [(0, True)]
    assert log.tracker.current is None


def test_a_scheduler_that_raises_ends_the_run(log):
    scheduler = DDIMScheduler()
    log.tracker.watch_scheduler(scheduler)
    scheduler.set_timesteps(4)
    log.call(scheduler.timesteps[0])
    with pytest.raises(TypeError):
        scheduler.step(None, 1, None)
    assert log.ended == [(0, True)]
    log.call(scheduler.timesteps[1])
    assert log.trace[-1] == (1, 0, "branch-0")


def test_announcements_of_an_unused_run_are_one_run_and_unused_runs_are_silent(log):
    pipe = watched(flow(), log)
    pipe.scheduler.set_timesteps(30)
    assert (log.tracker.current.source, log.tracker.current.step) == ("scheduler", -1)
    with pipe.progress_bar(total=30):
        assert log.tracker.current.source == "pipeline"
    assert log.tracker.current is None
    pipe(3)
    assert log.at_begin == [(3, "pipeline")]
    assert len(log.ended) == 1


def test_iterating_a_progress_bar_begins_and_ends_a_run(log):
    pipe = watched(DDIMScheduler(), log)
    pipe.scheduler.set_timesteps(4)
    for i, t in enumerate(pipe.progress_bar(pipe.scheduler.timesteps[1:])):
        assert log.call(t).step == i
        pipe.scheduler.step(torch.zeros(1, 4, 2), t, torch.zeros(1, 4, 2))
    assert log.ended == [(0, False)]
    assert log.begun[0].timesteps == tuple(pipe.scheduler.timesteps[1:].tolist())
    with pytest.raises(ZeroDivisionError):
        for t in pipe.progress_bar(pipe.scheduler.timesteps):
            log.call(t)
            1 / 0  # noqa: B018
    assert log.ended[1:] == [(1, True)]
    assert len(pipe.progress_bar([1, 2])) == 2
    assert pipe.progress_bar(total=3).total == 3


def test_nested_progress_bars_and_chunks(log):
    pipe = watched(DDIMScheduler(), log)
    for _ in pipe.progress_bar(range(2)):  # batches, as Marigold does
        pipe.scheduler.set_timesteps(3)
        for t in pipe.progress_bar(pipe.scheduler.timesteps):
            log.call(t)
            pipe.scheduler.step(torch.zeros(1, 4, 2), t, torch.zeros(1, 4, 2))
    assert log.trace == [(r, i, "branch-0") for r in range(2) for i in range(3)]
    with pipe.progress_bar(total=6):  # chunks of a video under one bar
        for _ in range(2):
            pipe.scheduler.set_timesteps(3)
            for t in pipe.scheduler.timesteps:
                log.call(t)
                pipe.scheduler.step(torch.zeros(1, 4, 2), t, torch.zeros(1, 4, 2))
    assert log.trace[6:] == [(r, i, "branch-0") for r in (2, 3) for i in range(3)]
    assert [run.num_steps for run in log.begun] == [3] * 4
    assert [aborted for _, aborted in log.ended] == [False] * 4


def test_two_pipelines_share_scheduler_and_denoiser_and_only_one_is_watched(log):
    first = watched(flow(), log)
    second = Pipeline(first.scheduler, log, first.denoiser)  # what from_pipe makes
    first(4)
    second(6)
    with pytest.raises(KeyboardInterrupt):
        second(6, raise_at=3)
    second(6, strength=0.5)
    first(4)
    assert [run.source for run in log.begun] == ["pipeline", "scheduler", "scheduler", "scheduler", "pipeline"]
    assert [run.num_steps for run in log.begun] == [4, 6, 6, 3, 4]
    assert log.begun[3].timesteps is not None
    assert [log.steps(i, "cond")[-1] for i in range(5)] == [3, 5, 2, 2, 3]
    assert [run for run, _ in log.ended] == [run.id for run in log.begun]


def test_a_replaced_scheduler_is_watched_from_the_next_run_on(log):
    pipe = watched(flow(), log)
    pipe(4)
    pipe.scheduler = HeunDiscreteScheduler()
    pipe(4)
    pipe(5)
    assert [run.num_steps for run in log.begun] == [4, 7, 9]
    assert len(log.begun[1].timesteps) == 7
    assert log.steps(1, "cond") == list(range(7))
    assert log.steps(2, "cond") == list(range(9))


def test_a_scheduler_that_steps_out_of_sight_still_has_steps(log):
    pipe = watched(flow(), log)
    pipe.scheduler.set_timesteps(4)
    hidden = copy.deepcopy(pipe.scheduler)
    x = torch.zeros(1, 4, 2)
    with pipe.progress_bar(total=4):
        for t in hidden.timesteps:
            log.call(t / 1000, torch.ones(1, 2), x)
            log.call(t / 1000, torch.zeros(1, 2), x)
            x = hidden.step(torch.ones_like(x), t, x, return_dict=False)[0]
    assert log.trace == [(0, i, f"branch-{b}") for i in range(4) for b in range(2)]


def test_two_scheduler_steps_without_a_call_between_end_one_step(log):
    scheduler = DDIMScheduler()
    log.tracker.watch_scheduler(scheduler)
    scheduler.set_timesteps(3)
    x = torch.zeros(1, 4, 2)
    scheduler.step(x, 1, x)  # before any call: not ours
    for t in scheduler.timesteps:
        log.call(t)
        scheduler.step(x, t, x)
        scheduler.step(x, t, x)
    assert log.steps() == [0, 1, 2]


class Unreadable(torch.Tensor):
    """A timestep whose value must not be read: on an accelerator that would wait for it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"read by {func}")


def test_the_timestep_is_never_read_once_the_scheduler_has_fired(log):
    pipe = watched(flow(), log)
    pipe.scheduler.set_timesteps(5)
    x = torch.zeros(1, 4, 2)
    prompt = torch.ones(1, 3, 8)
    with pipe.progress_bar(total=5):
        for i, t in enumerate(pipe.scheduler.timesteps):
            log.call(t if i == 0 else torch.ones(1).as_subclass(Unreadable), prompt, x)
            pipe.scheduler.step(x, t, x)
    assert log.steps() == [0, 1, 2, 3, 4]


def test_a_loop_run_again_without_set_timesteps_is_another_run(log):
    scheduler = DDIMScheduler()
    log.tracker.watch_scheduler(scheduler)
    scheduler.set_timesteps(4)
    x = torch.zeros(1, 4, 2)
    for _ in range(3):
        for t in scheduler.timesteps:
            log.call(t)
            scheduler.step(x, t, x)
    assert log.trace == [(r, i, "branch-0") for r in range(3) for i in range(4)]


def test_time_travel_under_a_progress_bar_is_one_run(log):
    pipe = watched(DDIMScheduler(), log)
    with pipe.progress_bar(total=5):
        for i, t in enumerate((900, 800, 900, 800, 700)):
            log.call(t, latent=torch.full((1, 4, 2), float(i)))
    assert log.steps() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("scale", [1, 1000])
def test_an_own_loop_over_the_last_timesteps_has_as_many_steps(scale, log):
    scheduler = DDIMScheduler()
    log.tracker.watch_scheduler(scheduler)
    scheduler.set_timesteps(10)
    log.call(scheduler.timesteps[4])
    assert log.at_begin == [(6, "scheduler")]
    assert log.begun[0].timesteps == tuple(scheduler.timesteps[4:].tolist())
    scheduler.set_timesteps(10)
    log.call(scheduler.timesteps[0] / scale)
    assert log.at_begin[1:] == [(10, "scheduler")]


def test_steps_of_a_scheduler_before_the_first_call_are_not_ours(log):
    pipe = watched(DDIMScheduler(), log)  # as in a cascade, where another denoiser is called before
    x = torch.zeros(1, 4, 2)
    pipe.scheduler.set_timesteps(3)
    with pipe.progress_bar(total=3):
        pipe.scheduler.step(x, 1, x)
        for t in (9, 8, 7):
            log.call(t)
    assert log.steps() == [0, 1, 2]


def test_a_promised_count_never_ends_a_run(log):
    pipe = watched(DDIMScheduler(), log)
    x = torch.zeros(1, 4, 2)
    pipe.scheduler.set_timesteps(2)
    with pipe.progress_bar(total=2):
        for t in (9, 7, 5, 3):
            log.call(t)
            pipe.scheduler.step(x, 1, x)
    assert log.trace == [(0, i, "branch-0") for i in range(4)]


# ---------------------------------------------------------------------- real pipelines


def hooked(module, log, names):
    """Let the tracker see the module's calls, as the engine would."""

    def enter(module, args, kwargs):
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        conditioning = [values["class_labels"]] if values.get("class_labels") is not None else []
        log.call(values["timestep"], conditioning, values[names[0]])

    module.register_forward_pre_hook(enter, with_kwargs=True)
    log.tracker.watch_denoiser(module)


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=4
    )
    vae = AutoencoderKL(
        block_out_channels=(4,),
        norm_num_groups=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )
    return transformer, vae


@pytest.mark.parametrize("make", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_dit_pipeline(make, dit, log):
    transformer, vae = copy.deepcopy(dit)
    pipe = DiTPipeline(transformer=transformer, vae=vae, scheduler=make())
    pipe.set_progress_bar_config(disable=True)
    hooked(transformer, log, ["hidden_states"])
    log.tracker.watch_pipeline(pipe)
    pipe(class_labels=[1], num_inference_steps=3, output_type="np")
    pipe(class_labels=[2], num_inference_steps=5, output_type="np", guidance_scale=1.0)
    assert [(run.num_steps, run.source) for run in log.begun] == [(3, "pipeline"), (5, "pipeline")]
    assert log.trace == [(0, i, "branch-0") for i in range(3)] + [(1, i, "branch-0") for i in range(5)]
    assert log.begun[1].timesteps == tuple(pipe.scheduler.timesteps.tolist())
    assert log.ended == [(0, False), (1, False)]
    log.tracker.unwatch()
    assert "progress_bar" not in vars(pipe)
    assert not {"step", "set_timesteps"} & set(vars(pipe.scheduler))


@pytest.mark.parametrize(("kind", "make"), [(DDIMPipeline, DDIMScheduler), (DDPMPipeline, DDPMScheduler)])
def test_unconditional_unet_pipelines(kind, make, log, tmp_path):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    pipe = kind(unet=unet, scheduler=make())
    pipe.set_progress_bar_config(disable=True)
    hooked(unet, log, ["sample", "timestep"])
    log.tracker.watch_pipeline(pipe)
    for _ in range(2):
        pipe(num_inference_steps=4, output_type="np")
    assert log.trace == [(r, i, "branch-0") for r in range(2) for i in range(4)]
    assert [run.num_steps for run in log.begun] == [4, 4]

    pipe.save_pretrained(tmp_path)
    plain = kind.from_pretrained(tmp_path)
    copied = copy.deepcopy(pipe)
    for other in (plain, copied):
        assert "progress_bar" not in vars(other)
        assert not {"step", "set_timesteps", "__getstate__"} & set(vars(other.scheduler))
    assert pipe.components.keys() == plain.components.keys()
    second = kind.from_pipe(pipe)
    second.set_progress_bar_config(disable=True)
    second(num_inference_steps=2, output_type="np")
    is_shared = second.scheduler is pipe.scheduler  # DDIMPipeline makes its own
    assert (log.begun[-1].source, log.begun[-1].num_steps) == (("scheduler", 2) if is_shared else ("timesteps", None))
    assert log.trace[8:] == [(2, i, "branch-0") for i in range(2)]


# ---------------------------------------------------------------------- bare loops


def two_branches(log, times, cond, uncond, latents=None, **kwargs):
    for i, t in enumerate(times):
        latent = torch.full((1, 4, 2), float(i)) if latents is None else latents
        log.call(t, cond, latent, **kwargs)
        log.call(t, uncond, latent, **kwargs)


def prompts():
    torch.manual_seed(1)
    return torch.randn(1, 3, 8), torch.randn(1, 3, 8)


@pytest.mark.parametrize(
    "times", [[999, 666, 333], [0.0, 0.25, 0.5, 1.0], torch.linspace(1, 0.1, 5)], ids=["ints", "ascending", "tensors"]
)
def test_a_bare_loop_run_after_run(times, log):
    for _ in range(3):
        two_branches(log, times, *prompts())
    expected = [(r, i, f"branch-{b}") for r in range(3) for i in range(len(times)) for b in range(2)]
    assert log.trace == expected
    assert [(run.source, run.num_steps) for run in log.begun] == [("timesteps", None)] * 3
    assert log.ended == [(0, False), (1, False)]


@pytest.mark.parametrize("is_fresh", [False, True], ids=["same-tensors", "fresh-cat"])
@pytest.mark.parametrize("is_watched", [False, True], ids=["bare", "scheduler-copied"])
def test_bf16_timesteps_that_round_to_equal_neighbours_are_steps(is_fresh, is_watched, log):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    if is_watched:
        log.tracker.watch_scheduler(scheduler)
    mu = 0.5 + (1.15 - 0.5) * (16384 - 256) / (4096 - 256)  # FLUX at 2048 by 2048
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 50, 50).tolist(), mu=mu)
    times = (scheduler.timesteps.to(torch.bfloat16) / 1000).to(torch.bfloat16)
    assert sum(a == b for a, b in pairwise(times)) == 16
    cond, uncond = prompts()
    for i, t in enumerate(times):
        latent = torch.full((1, 4, 2), float(i))
        for prompt in (cond, uncond):
            log.call(t.expand(1), torch.cat([prompt]) if is_fresh else prompt, latent)
    assert log.trace == [(0, i, f"branch-{b}") for i in range(50) for b in range(2)]


def test_the_very_same_input_again_is_the_next_step_of_a_bare_loop(log):
    prompt, latent = torch.ones(1, 2), torch.zeros(1, 4, 2)
    for _ in range(4):
        log.call(500, prompt, latent)
    assert log.steps() == [0, 1, 2, 3]


def test_per_token_timesteps_count_by_their_maximum(log):
    cond, uncond = prompts()
    for i in range(4):
        t = torch.zeros(1, 6)
        t[:, 2:] = 1000 - 100 * i  # the first frames are given, without noise
        for prompt in (cond, uncond):
            log.call(t.clone(), prompt, torch.full((1, 6, 2), float(i)))
    assert log.trace == [(0, i, f"branch-{b}") for i in range(4) for b in range(2)]


def test_another_latent_shape_begins_another_bare_run_but_guidance_off_does_not(log):
    prompt = torch.ones(1, 2)
    for i, t in enumerate((9, 8, 7)):
        log.call(t, prompt, torch.zeros(2 if i < 2 else 1, 4, 2))
    log.call(6, prompt, torch.zeros(1, 16, 2))
    log.call(5, prompt, torch.zeros(1, 16, 2))
    assert [(r, s) for r, s, _ in log.trace] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_a_bare_loop_after_fail_begins_at_zero(log):
    log.call(9, torch.ones(1))
    log.call(8, torch.ones(1))
    log.tracker.fail()
    assert log.tracker.current is None
    log.call(5, torch.ones(1))
    assert log.trace[-1][:2] == (1, 0)
    assert log.ended == [(0, True)]


# ---------------------------------------------------------------------- explicit runs


def test_explicit_timesteps_are_matched_by_order_through_time_travel(log):
    times = [900, 800, 900, 800, 800, 700, 800]
    with log.tracker.run(timesteps=times):
        two_branches(log, [t / 1000 for t in times], *prompts())
    assert log.trace == [(0, i, f"branch-{b}") for i in range(7) for b in range(2)]
    run = log.begun[0]
    assert (run.num_steps, run.timesteps, run.source) == (7, tuple(map(float, times)), "explicit")
    assert log.ended == [(0, False)]


def test_explicit_run_with_equal_neighbours_and_equal_prompts(log):
    with log.tracker.run(timesteps=[3, 3, 3, 1]):
        for i, t in enumerate([3, 3, 3, 1]):
            for _ in range(2):
                log.call(t, torch.ones(1, 2), torch.full((1, 4, 2), float(i)))
    assert log.trace == [(0, i, f"branch-{b}") for i in range(4) for b in range(2)]


def test_inversion_then_sampling(log):
    scheduler = DDIMScheduler()
    log.tracker.watch_scheduler(scheduler)
    prompt, x = torch.ones(1, 2), torch.zeros(1, 4, 2)
    scheduler.set_timesteps(4)
    up, down = scheduler.timesteps.flip(0), scheduler.timesteps
    with log.tracker.run(timesteps=up):
        for t in up:
            log.call(t, prompt, x + t)
    with log.tracker.run(timesteps=down):
        for t in down:
            log.call(t, prompt, x)
            scheduler.step(x, t, x)
    assert [(r, s) for r, s, _ in log.trace] == [(r, s) for r in range(2) for s in range(4)]
    assert log.begun[0].timesteps == tuple(up.tolist())


def test_other_announcements_inside_an_explicit_run_only_fill_what_is_unknown(log):
    pipe = watched(flow(), log)
    with log.tracker.run():
        pipe(4)
        assert log.tracker.current is log.begun[0]
        assert log.ended == []
    assert (log.begun[0].source, log.begun[0].num_steps) == ("explicit", 4)
    assert log.begun[0].timesteps == tuple(pipe.scheduler.timesteps.tolist())
    with log.tracker.run(num_steps=8):
        pipe(4)
        pipe(4)
    assert log.steps(1, "cond") == list(range(8))
    assert log.begun[1].num_steps == 8


def test_an_explicit_run_that_fails_and_goes_on_begins_anew(log):
    with log.tracker.run(timesteps=[3, 2]):
        log.call(3)
        log.tracker.fail()
        log.call(3)
        log.call(2)
    assert [(r, s) for r, s, _ in log.trace] == [(0, 0), (1, 0), (1, 1)]
    assert [run.source for run in log.begun] == ["explicit", "explicit"]
    assert log.ended == [(0, True), (1, False)]
    with pytest.raises(ZeroDivisionError), log.tracker.run(num_steps=2):
        log.call(3)
        1 / 0  # noqa: B018
    assert log.ended[-1] == (2, True)


def test_a_call_beyond_the_listed_timesteps_is_an_error(log):
    with log.tracker.run(timesteps=[2, 1]):
        log.call(2)
        log.call(1)
        with pytest.raises(RunError, match="lists 2 steps"):
            log.call(0)
    assert log.ended == [(0, True)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timesteps": []}, "at least one timestep"),
        ({"timesteps": 5}, "at least one timestep"),
        ({"timesteps": [[1, 2]]}, "at least one timestep"),
        ({"timesteps": [3, 2], "num_steps": 3}, "contradicts its 2"),
        ({"num_steps": 0}, "1 step or more"),
    ],
)
def test_bad_settings_of_an_explicit_run_are_errors_and_change_nothing(settings, message, log):
    log.call(3)
    with pytest.raises(SettingError, match=message), log.tracker.run(**settings):
        pass
    assert log.call(2).step == 1


def test_explicit_runs_do_not_nest(log):
    with log.tracker.run(num_steps=2):
        with pytest.raises(RunError, match="inside"), log.tracker.run():
            pass
        assert log.call(1).run.source == "explicit"


# ---------------------------------------------------------------------- branches


def test_context_names_win_and_the_original_context_is_entered(log):
    entered = []

    class Named:
        @contextmanager
        def cache_context(self, name, **kwargs):
            entered.append((name, kwargs))
            yield "host"

    denoiser, same = Named(), torch.ones(1, 2)
    log.tracker.watch_denoiser(denoiser, "denoiser")
    for t in (9, 8):
        for name in ("cond", "uncond", "uncond_stg"):
            with denoiser.cache_context(name, sigma=1.0) as context:
                assert context == "host"
                log.call(t, same)
                assert log.call(t, same, key="other").branch == "branch-0"
    assert entered[0] == ("cond", {"sigma": 1.0})
    assert [c.branch for c in log.calls[::2]] == ["cond", "uncond", "uncond_stg"] * 2
    with denoiser.cache_context("outer"):
        with denoiser.cache_context("inner"):
            assert log.call(7).branch == "inner"
        assert log.call(7).branch == "outer"
    assert log.call(7).branch == "branch-0"
    with pytest.raises(ZeroDivisionError), denoiser.cache_context("cond"):
        1 / 0  # noqa: B018
    log.tracker.unwatch()
    assert vars(denoiser) == {}


def test_a_name_used_twice_within_a_step_is_two_branches(log):
    scheduler = DDIMScheduler()
    log.tracker.watch_scheduler(scheduler)
    scheduler.set_timesteps(3)
    x = torch.zeros(1, 4, 2)
    for t in scheduler.timesteps:
        for _ in range(2):
            with log.tracker.branch("cond"):
                log.call(t, torch.ones(1, 2), x)
        scheduler.step(x, t, x)
    assert log.trace == [(0, i, name) for i in range(3) for name in ("cond", "cond#2")]


@pytest.mark.parametrize("is_fresh", [False, True], ids=["same-tensors", "fresh-cat"])
@pytest.mark.parametrize("fires", [False, True], ids=["bare", "scheduler"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_branches_are_stable_in_any_number_and_swapped(is_fresh, fires, count, log):
    scheduler = DDIMScheduler()
    if fires:
        log.tracker.watch_scheduler(scheduler)
    scheduler.set_timesteps(4)
    torch.manual_seed(0)
    bank = [torch.randn(1, 3, 8) for _ in range(count)]
    for i, t in enumerate(scheduler.timesteps):
        x = torch.full((1, 4, 2), float(i))
        order = range(count) if i % 2 == 0 else reversed(range(count))
        for b in order:
            call = log.call(t, torch.cat([bank[b]]) if is_fresh else bank[b], x)
            assert (call.step, call.branch) == (i, f"branch-{b}")
            assert call.is_first_of_step == (call.ordinal == 0)
        scheduler.step(x, t, x)


@pytest.mark.parametrize("is_fresh", [False, True], ids=["two-tensors", "fresh-cat"])
@pytest.mark.parametrize("fires", [False, True], ids=["bare", "scheduler"])
def test_equal_prompts_are_two_branches(is_fresh, fires, log):
    scheduler = DDIMScheduler()
    if fires:
        log.tracker.watch_scheduler(scheduler)
    scheduler.set_timesteps(4)
    bank = [torch.ones(1, 3), torch.ones(1, 3)]
    for i, t in enumerate(scheduler.timesteps):
        x = torch.full((1, 4, 2), float(i))
        for prompt in bank:
            log.call(t, torch.cat([prompt]) if is_fresh else prompt, x)
        scheduler.step(x, t, x)
    assert log.trace == [(0, i, f"branch-{b}") for i in range(4) for b in range(2)]


@pytest.mark.parametrize("is_fresh", [False, True], ids=["same-tensors", "fresh-cat"])
def test_the_same_conditioning_called_twice_per_step_of_a_scheduler_is_two_branches(is_fresh, log):
    """Skip-layer and perturbed-attention guidance call the denoiser again with the same input."""
    scheduler = DDIMScheduler()
    log.tracker.watch_scheduler(scheduler)
    scheduler.set_timesteps(3)
    cond, uncond = prompts()
    for i, t in enumerate(scheduler.timesteps):
        x = torch.full((1, 4, 2), float(i))
        for prompt in (uncond, cond, cond):
            log.call(t, torch.cat([prompt]) if is_fresh else prompt, x)
        scheduler.step(x, t, x)
    assert log.trace == [(0, i, f"branch-{b}") for i in range(3) for b in range(3)]


@pytest.mark.parametrize("is_fresh", [False, True], ids=["same-tensors", "fresh-cat"])
@pytest.mark.parametrize("kept", [0, 1])
def test_guidance_may_stop_and_come_back(is_fresh, kept, log):
    bank = prompts()
    for i, t in enumerate(range(9, 3, -1)):
        for b in range(2):
            if b == kept or i not in (2, 3):
                prompt = torch.cat([bank[b]]) if is_fresh else bank[b]
                call = log.call(t, prompt, torch.full((1, 4, 2), float(i)))
                assert (call.step, call.branch) == (i, f"branch-{b}")


def test_conditioning_edited_in_mid_run_keeps_its_branch(log):
    cond, uncond = prompts()
    for i, t in enumerate((9, 8, 7, 6)):
        if i == 2:
            cond, uncond = cond + 1, uncond + 1
        for prompt in (cond, uncond):
            log.call(t, prompt, torch.full((1, 4, 2), float(i)))
    assert log.trace == [(0, i, f"branch-{b}") for i in range(4) for b in range(2)]
    assert [c.how for c in log.calls] == ["new"] * 2 + ["identity"] * 2 + ["ordinal"] * 2 + ["identity"] * 2
    assert [c.is_edited for c in log.calls] == [False] * 4 + [True] * 2 + [False] * 2


def guided(log, steps, names=("cond", "uncond")):
    """One list of prompts per step, one named call for each."""
    for i, bank in enumerate(steps):
        for name, prompt in zip(names, bank, strict=True):
            with log.tracker.branch(name):
                log.call(9 - i, prompt, torch.full((1, 4, 2), float(i)))


def edits(log):
    """For every step, one letter per call: ``e`` edited, ``.`` not."""
    steps = {}
    for call in log.calls:
        steps[call.step] = steps.get(call.step, "") + ("e" if call.is_edited else ".")
    return " ".join(steps.values())


@pytest.mark.parametrize("is_fresh", [False, True], ids=["same-tensors", "fresh-cat"])
def test_conditioning_edited_within_a_named_branch_is_noticed_at_once(is_fresh, log):
    cond, uncond = prompts()
    steps = [(cond, uncond)] * 2 + [(cond + 1, uncond)] * 2 + [(cond + 1, uncond - 1), (cond, uncond - 1)]
    if is_fresh:
        steps = [tuple(torch.cat([prompt]) for prompt in bank) for bank in steps]
    guided(log, steps)
    assert edits(log) == ".. .. e. .. .e e."
    assert log.trace == [(0, i, name) for i in range(6) for name in ("cond", "uncond")]
    assert {c.how for c in log.calls} == {"new", "name"}


def test_equal_prompts_under_two_names_are_never_edits(log):
    same = torch.ones(1, 3)
    guided(log, [(same, same), (same.clone(), same), (same, same.clone()), (same.clone(), same.clone())])
    assert edits(log) == ".. .. .. .."


def test_a_name_used_twice_in_a_step_goes_by_the_conditioning(log):
    scheduler = DDIMScheduler()
    log.tracker.watch_scheduler(scheduler)
    scheduler.set_timesteps(4)
    one, two = prompts()
    x = torch.zeros(1, 4, 2)
    for t, bank in zip(scheduler.timesteps, [(one, two), (two, one), (two.clone(), one), (one, two + 1)], strict=True):
        for prompt in bank:
            with log.tracker.branch("cond"):
                log.call(t, prompt, x)
        scheduler.step(x, t, x)
    assert [c.branch for c in log.calls] == ["cond", "cond#2", "cond#2", "cond", "cond#2", "cond", "cond", "cond#2"]
    assert edits(log) == ".. .. .. .e"


@pytest.mark.parametrize("names", [("cond", "uncond"), (None, None)], ids=["named", "unnamed"])
def test_conditioning_written_into_is_noticed(names, log):
    cond, uncond = prompts()
    for i in range(5):
        if i == 3:
            cond[:, 1:] = 7.0
        for name, prompt in zip(names, (cond, uncond), strict=True):
            log.call(9 - i, prompt, key="x") if name is None else guided_call(log, name, 9 - i, prompt)
    assert edits(log) == ".. .. .. e. .."


def guided_call(log, name, t, prompt):
    with log.tracker.branch(name):
        log.call(t, prompt)


def test_two_branches_that_share_one_buffer_are_told_apart(log):
    """Static inputs, as for CUDA graphs: the host copies each branch's prompt into the same tensor."""
    buffer, bank = torch.empty(1, 3, 8), prompts()
    for i in range(3):
        for prompt in bank:
            buffer.copy_(prompt)
            log.call(9 - i, buffer, torch.full((1, 4, 2), float(i)))
    assert log.trace == [(0, i, f"branch-{b}") for i in range(3) for b in range(2)]
    assert edits(log) == ".. .. .."


@pytest.mark.parametrize("is_named", [True, False])
def test_values_of_conditioning_are_read_only_where_the_tensors_are_others(is_named, log, monkeypatch):
    """On an accelerator every read waits. The same tensors, or the same slices of them, need none."""
    reads = []
    monkeypatch.setattr(Sample, "is_same", lambda self, other: reads.append(self) or self.values == other.values)
    scheduler = DDIMScheduler()
    log.tracker.watch_scheduler(scheduler)
    scheduler.set_timesteps(6)
    both, x = torch.cat(prompts()), torch.zeros(1, 4, 2)
    counts = []
    for i, t in enumerate(scheduler.timesteps):
        for name, prompt in zip(("cond", "uncond"), both.chunk(2), strict=True):
            prompt = prompt.clone() if i == 4 else prompt
            with log.tracker.branch(name) if is_named else contextlib.nullcontext():
                log.call(t, [prompt, both], x)
        counts.append(len(reads))
        scheduler.step(x, t, x)
    assert edits(log) == " ".join([".."] * 6)
    at_first = 0 if is_named else 1  # the second branch without a name is compared with the first
    assert counts[:4] == [at_first] * 4
    assert counts[4] > at_first


def test_an_edit_to_another_length_is_a_new_branch(log):
    log.call(9, torch.ones(1, 3, 8))
    assert log.call(8, torch.ones(1, 5, 8)).branch == "branch-1"


def test_short_prompts_in_long_padding_are_told_apart(log):
    cond, uncond = torch.zeros(1, 512, 64), torch.zeros(1, 512, 64)
    torch.manual_seed(0)
    cond[:, 1:6], uncond[:, 1:4] = torch.randn(5, 64), torch.randn(3, 64)
    for i, t in enumerate((9, 8, 7)):
        for prompt in (cond, uncond) if i != 1 else (uncond, cond):
            log.call(t, prompt.clone())
    assert [c.branch[-1] for c in log.calls] == list("011001")


def test_two_experts_share_steps_and_have_their_own_branches(log):
    pipe = watched(flow(), log)
    prompt, other = prompts()
    pipe.scheduler.set_timesteps(4)
    x = torch.zeros(1, 4, 2)
    with pipe.progress_bar(total=4):
        for i, t in enumerate(pipe.scheduler.timesteps):
            key = "high" if i < 2 else "low"
            calls = [log.call(t, p, x, key=key) for p in ((prompt, other) if i < 2 else (other, prompt))]
            assert [(c.step, c.branch, c.ordinal) for c in calls] == [(i, "branch-0", 0), (i, "branch-1", 1)]
            pipe.scheduler.step(x, t, x)
    assert len(log.begun) == 1


@pytest.mark.parametrize("fires", [False, True], ids=["bare", "scheduler"])
def test_two_denoisers_in_every_step(fires, log):
    scheduler = DDIMScheduler()
    if fires:
        log.tracker.watch_scheduler(scheduler)
    scheduler.set_timesteps(3)
    prompt = torch.ones(1, 2)
    for i, t in enumerate(scheduler.timesteps):
        x = torch.full((1, 4, 2), float(i))
        first, second = log.call(t, prompt, x, key="a"), log.call(t, prompt, x, key="b")
        assert (first.step, second.step) == (i, i)
        assert (first.is_first_of_step, second.is_first_of_step) == (True, False)
        assert (first.ordinal, second.ordinal) == (0, 0)
        scheduler.step(x, t, x)


def test_conditioning_is_not_kept_alive(log):
    prompt = torch.ones(1, 2)
    alive = weakref.ref(prompt)
    log.call(9, prompt)
    del prompt
    gc.collect()
    assert alive() is None
    assert log.call(8, torch.ones(1, 2)).branch == "branch-0"


# ---------------------------------------------------------------------- threads


def run_in_thread(function):
    failures = []

    def guarded():
        try:
            function()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    return thread, failures


def test_one_tracker_keeps_the_runs_of_two_threads_apart(log):
    barrier, results = threading.Barrier(2, timeout=20), {}

    def loop(name):
        pipe, prompt, x = watched(DDIMScheduler(), log), torch.ones(1, 2), torch.zeros(1, 4, 2)
        pipe.scheduler.set_timesteps(6)
        calls = results[name] = []
        with pipe.progress_bar(total=6):
            for t in pipe.scheduler.timesteps:
                barrier.wait()  # in lockstep
                calls.append(log.tracker.enter("denoiser", timestep=t, conditioning=[prompt], latent=x))
                pipe.scheduler.step(x, t, x)

    threads = [run_in_thread(lambda name=name: loop(name)) for name in "ab"]
    for thread, failures in threads:
        thread.join()
        assert failures == []
    for calls in results.values():
        assert [(c.step, c.branch) for c in calls] == [(i, "branch-0") for i in range(6)]
        assert len({c.run for c in calls}) == 1
    assert results["a"][0].run is not results["b"][0].run
    assert sorted(log.ended) == sorted((run.id, False) for run in log.begun)


def test_two_trackers_of_two_pipelines_never_interact():
    first, second = Log(), Log()
    one, two = watched(flow(), first), watched(flow(), second)
    one(3)
    first.tracker.unwatch()
    two(4)
    one(3)
    assert [len(log.begun) for log in (first, second)] == [2, 1]
    assert first.begun[1].source == "timesteps"


def test_the_run_of_a_dead_thread_ends_at_the_next_begin(log):
    thread, failures = run_in_thread(lambda: log.call(9, torch.ones(1)))
    thread.join()
    assert (failures, log.ended) == ([], [])
    log.call(8, torch.ones(1))
    assert log.ended == [(0, True)]
    assert log.trace[-1][:2] == (1, 0)


def test_threads_one_after_the_other_share_nothing(log):
    for _ in range(4):  # their idents are recycled
        thread, failures = run_in_thread(lambda: log.call(9, torch.ones(1)))
        thread.join()
        assert failures == []
    assert [(r, s) for r, s, _ in log.trace] == [(r, 0) for r in range(4)]
    assert log.ended == [(r, True) for r in range(3)]


# ---------------------------------------------------------------------- shadows


@schedulers
def test_shadows_keep_signatures(make, log):
    scheduler = make()
    signatures = [inspect.signature(getattr(scheduler, name)) for name in ("set_timesteps", "step")]
    log.tracker.watch_scheduler(scheduler)
    assert [inspect.signature(getattr(scheduler, name)) for name in ("set_timesteps", "step")] == signatures
    plain = make()
    if "timesteps" in signatures[0].parameters:
        custom = [900, 600, 300]
        assert torch.equal(
            retrieve_timesteps(scheduler, timesteps=custom)[0], retrieve_timesteps(plain, timesteps=custom)[0]
        )
    else:
        with pytest.raises(ValueError, match="does not support custom"):
            retrieve_timesteps(scheduler, timesteps=[900, 600, 300])


@schedulers
def test_copies_and_pickles_are_plain_and_work(make, log):
    pipe = watched(make(), log)
    pipe(4)
    for other in (copy.deepcopy(pipe.scheduler), copy.copy(pipe.scheduler), pickle.loads(pickle.dumps(pipe.scheduler))):
        assert not {"step", "set_timesteps", "__getstate__"} & set(vars(other))
        other.set_timesteps(5)
    assert log.tracker.current is None
    assert "cache_context" not in vars(copy.deepcopy(pipe.denoiser))


def test_unwatch_restores_everything_and_ends_runs(log):
    pipe = watched(flow(), log)
    pipe.scheduler.set_timesteps(3)
    log.call(9)
    log.tracker.unwatch()
    assert set(vars(pipe)) == {"scheduler", "log", "denoiser"}
    assert not {"step", "set_timesteps", "__getstate__"} & set(vars(pipe.scheduler))
    assert not {"cache_context", "__getstate__"} & set(vars(pipe.denoiser))
    assert log.ended == [(0, False)]
    log.tracker.unwatch()


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_trackers_on_one_scheduler_leave_in_any_order(first_out):
    logs, scheduler = [Log(), Log()], DDIMScheduler()
    for log in logs:
        log.tracker.watch_scheduler(scheduler)
        log.tracker.watch_scheduler(scheduler)
    assert not {"step", "set_timesteps"} & set(vars(copy.deepcopy(scheduler)))
    scheduler.set_timesteps(2)
    assert [log.tracker.current.num_steps for log in logs] == [2, 2]
    logs[first_out].tracker.unwatch()
    scheduler.set_timesteps(3)
    assert logs[1 - first_out].tracker.current.num_steps == 3
    assert logs[first_out].tracker.current is None
    logs[1 - first_out].tracker.unwatch()
    assert not {"step", "set_timesteps", "__getstate__"} & set(vars(scheduler))


def test_what_someone_put_in_front_stays(log):
    pipe = watched(flow(), log)
    ours = pipe.progress_bar
    pipe.progress_bar = lambda *args, **kwargs: ours(*args, **kwargs)
    pipe(3)
    assert log.begun[0].source == "pipeline"
    log.tracker.unwatch()
    pipe(3)
    assert log.begun[1].source == "timesteps"


def test_neither_side_keeps_the_other_alive(log):
    pipe = watched(flow(), log)
    pipe(2)
    alive = [weakref.ref(pipe), weakref.ref(pipe.scheduler), weakref.ref(pipe.denoiser)]
    del pipe
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3
    pipe, tracker = watched(flow(), log), weakref.ref(log.tracker)
    log.tracker = None
    gc.collect()
    assert tracker() is None
    pipe.scheduler.set_timesteps(3)  # nobody listens
    with pipe.progress_bar(total=3), pipe.denoiser.cache_context("cond"):
        pass


def test_on_begin_that_raises_ends_the_run():
    ended = []

    def refuse(run):
        raise RunError("needs num_steps")

    tracker = RunTracker(refuse, lambda run, aborted: ended.append((run.id, aborted)))
    for i in range(2):
        with pytest.raises(RunError, match="needs num_steps"):
            tracker.enter("denoiser", timestep=9, conditioning=[], latent=torch.zeros(1, 2))
        assert ended[-1] == (i, True)
        assert tracker.current is None
