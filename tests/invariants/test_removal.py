"""`remove` leaves no trace; copies of an accelerated pipeline are plain; nothing keeps cached tensors alive."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from diffusers import FluxPipeline
from torch import nn

import cache4diffusion as c4d
import toys
from cache4diffusion.anatomy.undisturbed import plain_forward
from cache4diffusion.engine.compiling import is_compiled
from cache4diffusion.engine.core import Engine
from cache4diffusion.errors import AlreadyAcceleratedError, RunError
from cache4diffusion.wrap import CallWrapper, ForwardWrapper, owner_of

methods = toys.distinct_methods
GUIDED = toys.prompt(1, negative=2)


def snapshot(pipe):
    return toys.Dicts(pipe, pipe.scheduler, *pipe.components["transformer"].modules(), pipe.vae)


@methods
def test_remove_restores_what_was_found(name):
    pipe = toys.flux_pipeline()
    plain = toys.generate(pipe, **GUIDED)  # also lets the scheduler fill in what it only has after a run
    before = snapshot(pipe)
    handle = c4d.accelerate(pipe, name, **toys.ACTIVE[name])
    toys.generate(pipe, **GUIDED)
    assert before.changed()
    handle.remove()
    assert not [key for key in before.changed() if not is_of_the_run(key)]
    assert torch.equal(toys.generate(pipe, **GUIDED), plain)
    handle.remove()  # harmless when repeated


@methods
def test_paused_it_is_as_if_it_had_been_removed_and_then_it_goes_on(name):
    pipe = toys.flux_pipeline()
    plain = toys.generate(pipe, **GUIDED)
    with c4d.accelerate(pipe, name, **toys.ACTIVE[name]) as handle:
        cached = toys.generate(pipe, **GUIDED)
        strip = handle.stats["strip"]
        with handle.paused():
            assert owner_of(pipe.transformer) is None
            assert handle.memory["held"] == 0
            assert torch.equal(toys.generate(pipe, **GUIDED), plain)
            with c4d.accelerate(pipe, "fora", interval=2):
                toys.generate(pipe, **GUIDED)
        assert owner_of(pipe.transformer) is handle
        assert len(handle.trace.runs()) == 1
        assert torch.equal(toys.generate(pipe, **GUIDED), cached)
        assert handle.stats["strip"] == strip
    assert torch.equal(toys.generate(pipe, **GUIDED), plain)


def test_a_pause_does_not_end_over_another_handle_and_not_after_removal():
    pipe = toys.flux_pipeline()
    plain = toys.generate(pipe)
    handle = c4d.accelerate(pipe, "taylorseer")
    with pytest.raises(AlreadyAcceleratedError, match="was paused and cannot go on: transformer"), handle.paused():
        other = c4d.accelerate(pipe, "fora", interval=2)
    assert owner_of(pipe.transformer) is other
    other.remove()
    handle = c4d.accelerate(pipe, "taylorseer")
    with handle.paused():
        handle.remove()
    assert owner_of(pipe.transformer) is None
    assert torch.equal(toys.generate(pipe), plain)
    with pytest.raises(RunError, match="nothing to pause"), handle.paused():
        pass


def is_of_the_run(key):
    """What a pipeline and its scheduler keep of a run, accelerated or not."""
    scheduler = ("timesteps", "sigmas", "_step_index", "_begin_index", "num_inference_steps")
    pipeline = ("_guidance_scale", "_joint_attention_kwargs", "_interrupt", "_num_timesteps", "_current_timestep")
    return key.split(".")[1] in scheduler + pipeline


@methods
def test_what_the_host_had_on_instances_comes_back(name):
    denoiser = toys.flux()

    def forward(*args, **kwargs):
        return type(block.ff).forward(block.ff, *args, **kwargs)

    def compile_(*args, **kwargs):
        raise AssertionError

    block = denoiser.transformer_blocks[1]
    block.ff.forward, block.compile, denoiser.compile = forward, compile_, compile_
    denoiser._compiled_call_impl = None
    before = toys.Dicts(denoiser)
    with toys.accelerated(denoiser, name, num_steps=6):
        toys.branch_loop(denoiser, [toys.flux_inputs(seed=s) for s in (0, 1)], 6)
    assert not before.changed()
    assert block.ff.forward is forward and block.compile is compile_ and denoiser.compile is compile_


@methods
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_context_manager_removes_after_an_error(name, error):
    denoiser = toys.flux()
    before = toys.Dicts(denoiser)
    inputs = [toys.flux_inputs(seed=s) for s in (0, 1)]
    with pytest.raises(error), c4d.accelerate(denoiser, name, **toys.ACTIVE[name]) as handle, handle.run(num_steps=10):
        toys.branch_loop(denoiser, inputs, 5)
        toys.fail(error)
    assert not before.changed()
    assert handle.memory["held"] == 0


def wrapped(module):
    return [m for m in module.modules() if {"_compiled_call_impl", "forward", "compile", "__getstate__"} & set(vars(m))]


def save_and_load(pipe, path):
    pipe.save_pretrained(path)
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return FluxPipeline.from_pretrained(path, **absent)


COPIES = {
    "deepcopy": lambda pipe, path: copy.deepcopy(pipe),
    "pickle": lambda pipe, path: pickle.loads(pickle.dumps(pipe)),
    "save_pretrained": save_and_load,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", ["taylorseer", "fbcache", "taylorseer-lite", "toca", "fastercache"])
def test_copies_of_an_accelerated_pipeline_are_plain(name, way, tmp_path):
    pipe = toys.flux_pipeline()
    plain = toys.generate(pipe, 6, **GUIDED)
    with c4d.accelerate(pipe, name, **toys.ACTIVE[name]) as handle:
        accelerated = toys.generate(pipe, 6, **GUIDED)
        assert wrapped(pipe.transformer)
        twin = COPIES[way](pipe, tmp_path)
        twin.set_progress_bar_config(disable=True)
        runs = handle.stats["runs"]
        assert not wrapped(twin.transformer)
        assert not {"progress_bar", "__getstate__"} & set(vars(twin))
        assert not {"step", "set_timesteps", "__getstate__"} & set(vars(twin.scheduler))
        # Weights from a file lie elsewhere in memory, and products then differ in the last bit.
        torch.testing.assert_close(
            toys.generate(twin, 6, **GUIDED), plain, rtol=0, atol=1e-5 * (way == "save_pretrained")
        )
        assert handle.stats["runs"] == runs, "the copy still reports to the original's handle"
        assert torch.equal(toys.generate(pipe, 6, **GUIDED), accelerated)


def test_a_copy_in_the_middle_of_a_run_is_plain():
    pipe, twins = toys.flux_pipeline(), []
    plain = toys.generate(pipe, 6, **GUIDED)

    def look(pipe, step, timestep, kwargs):
        if step == 4:
            twins.append(copy.deepcopy(pipe.transformer))
        return kwargs

    with c4d.accelerate(pipe, "taylorseer", interval=3):
        toys.generate(pipe, 6, callback_on_step_end=look, **GUIDED)
    assert not wrapped(twins[0])
    assert torch.equal(toys.generate(toys.flux_pipeline(twins[0]), 6, **GUIDED), plain)


class Remembered:
    """Weak references to every tensor a predictor, gate or rule ever held, collected at the end of every step."""

    def __init__(self, monkeypatch):
        self.references = []
        account = Engine.account

        def look(engine):
            account(engine)
            held = [t for state in engine._states.values() for t in engine.tensors_of(state)]
            held += list(engine.branches.tensors()) if engine.branches is not None else []
            self.references += [weakref.ref(tensor) for tensor in held]

        monkeypatch.setattr(Engine, "account", look)

    def alive(self):
        gc.collect()
        return [reference() for reference in self.references if reference() is not None]


@methods
def test_nothing_keeps_cached_tensors_alive_after_a_run(name, monkeypatch):
    pipe, remembered = toys.flux_pipeline(), Remembered(monkeypatch)
    with c4d.accelerate(pipe, name, **toys.ACTIVE[name]) as handle:
        images = toys.generate(pipe, 6, **GUIDED)
        assert len(remembered.references) > 5
        assert not remembered.alive()
        assert handle.memory["held"] == 0 < handle.memory["peak"]
    assert images is not None


@methods
def test_nothing_keeps_cached_tensors_alive_after_an_error(name, monkeypatch):
    pipe, remembered = toys.flux_pipeline(), Remembered(monkeypatch)

    def stop(pipe, step, timestep, kwargs):
        if step == 4:
            raise KeyboardInterrupt
        return kwargs

    with c4d.accelerate(pipe, name, **toys.ACTIVE[name]):
        with pytest.raises(KeyboardInterrupt):
            toys.generate(pipe, 8, callback_on_step_end=stop, **GUIDED)
        assert remembered.references
        assert not remembered.alive()


@methods
def test_nothing_keeps_cached_tensors_alive_after_remove(name, monkeypatch):
    """A bare loop's run has no end that could be seen."""
    denoiser, remembered = toys.flux(), Remembered(monkeypatch)
    settings = {**toys.ACTIVE[name], **{"speca": {"decay": 1.0}, "teacache": {"cooldown": 0}}.get(name, {})}
    settings |= {"low_gain": 1.0, "high_gain": 1.0} if name == "fastercache" else {}
    if c4d.method(name, **settings).compose().needs_num_steps:
        return
    handle = c4d.accelerate(denoiser, name, **settings)
    outputs = toys.branch_loop(denoiser, [toys.flux_inputs(seed=s) for s in (0, 1)], 6)
    assert handle.memory["held"] > 0
    handle.remove()
    assert handle.memory["held"] == 0
    assert not remembered.alive()
    assert outputs[0].isfinite().all()


def test_a_forgotten_handle_does_not_keep_the_pipeline_alive():
    pipe = toys.flux_pipeline()
    c4d.accelerate(pipe, "fora")
    toys.generate(pipe, 6)
    seen = [weakref.ref(pipe), weakref.ref(pipe.transformer), weakref.ref(pipe.scheduler)]
    del pipe
    gc.collect()
    assert [reference() for reference in seen] == [None] * 3


def test_install_is_transactional(monkeypatch):
    """An error in the middle of attaching leaves nothing attached."""
    denoiser = toys.flux()
    before, made = toys.Dicts(denoiser), []
    make = ForwardWrapper.__init__

    def fails_late(self, *args):
        if len(made) == 7:
            raise MemoryError("no memory")
        made.append(self)
        make(self, *args)

    monkeypatch.setattr(ForwardWrapper, "__init__", fails_late)
    handle = c4d.accelerate(denoiser, "fora")
    with pytest.raises(MemoryError), handle.run(num_steps=4):
        toys.flux_loop(denoiser, toys.flux_inputs(), 4)
    left = wrapped(denoiser)
    assert left == [denoiser]  # the call, to try again
    monkeypatch.undo()
    with handle.run(num_steps=4):
        toys.flux_loop(denoiser, toys.flux_inputs(), 4)
        assert handle.stats["strip"] == "FccF"
    handle.remove()
    assert not before.changed()


@pytest.mark.parametrize("name", ["taylorseer", "fbcache", "toca", "teacache"])
def test_adapters_may_come_and_go(name):
    """Modules that an adapter exchanged are found again at the next run; removal in any order leaves it plain."""
    peft = pytest.importorskip("peft")
    denoiser, inputs = toys.flux(), toys.flux_inputs()
    plain = toys.flux_loop(denoiser, inputs, 7)
    targets = ["to_q", "proj_out", "proj_mlp", "ff.net.2", "to_out.0", "norm.linear"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    truth = copy.deepcopy(denoiser)
    torch.manual_seed(0)
    truth.add_adapter(copy.deepcopy(config))
    with_adapter = toys.flux_loop(truth, inputs, 7)
    right = toys.on_a_fresh_copy(truth, name, lambda d: toys.flux_loop(d, inputs, 7), 7)
    alone = toys.on_a_fresh_copy(denoiser, name, lambda d: toys.flux_loop(d, inputs, 7), 7)

    def run(handle):
        with handle.run(num_steps=7):
            return toys.flux_loop(denoiser, inputs, 7)

    def same(found, expected):
        return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    handle = c4d.accelerate(denoiser, name, **toys.ACTIVE[name])
    assert same(run(handle), alone)
    torch.manual_seed(0)
    denoiser.add_adapter(config)
    assert same(run(handle), right)
    denoiser.delete_adapters("default")
    peft_free = [m for m in denoiser.modules() if "lora" in type(m).__module__]
    if peft_free:  # a recent diffusers keeps the layers
        denoiser.unload_lora()
    assert same(run(handle), alone)
    torch.manual_seed(0)
    denoiser.add_adapter(config)
    handle.remove()
    assert same(toys.flux_loop(denoiser, inputs, 7), with_adapter)
    denoiser.unload_lora()
    assert same(toys.flux_loop(denoiser, inputs, 7), plain)
    assert not wrapped(denoiser)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("first_out", [0, 1])
def test_two_wrappers_on_one_module_leave_in_any_order(first_out, compiled):
    """Denoisers may share a block. One that is compiled between is compiled inside of both, and stays so."""
    module, x, seen = nn.Linear(3, 3), torch.ones(1, 3), []
    expected = module(x)

    def handler(name):
        def handle(inner, args, kwargs):
            seen.append(name)
            return inner(*args, **kwargs)

        return handle

    def forward_of(found):
        return lambda *args: found(*args)

    calls = [CallWrapper(module, handler(i)) for i in range(2)]
    forwards = [ForwardWrapper(module, forward_of) for _ in range(2)]
    assert not is_compiled(module)
    assert plain_forward(module).__func__ is nn.Linear.forward
    assert copy.copy(module).__dict__.keys() == nn.Linear(3, 3).__dict__.keys()
    if compiled:
        module.compile(backend="eager")
        assert is_compiled(module)
    assert torch.equal(module(x), expected)
    assert seen == [1, 0]
    for i in (first_out, 1 - first_out):
        calls[i].remove()
        forwards[i].remove()
        seen.clear()
        assert torch.equal(module(x), expected)
        assert seen == ([1 - first_out] if i == first_out else [])
    assert is_compiled(module) == compiled
    assert set(vars(module)) - {"_compiled_call_impl"} == set(vars(nn.Linear(3, 3)))
