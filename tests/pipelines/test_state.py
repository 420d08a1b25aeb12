"""No run of a stock pipeline sees another: after aborts, warm-up calls, other lengths and sizes, offload and adapters.

`tests/invariants/test_state.py` has the same for every method, on FLUX.
"""

import copy
import inspect

import accelerate
import diffusers
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.pipelines.deprecated import StableDiffusionDiffEditPipeline

import cache4diffusion as c4d
from cache4diffusion.trace import CACHED
from pipelines.case import denoisers
from pipelines.cases import CASES
from pipelines.conformance import METHODS, keys_of, strips_of
from pipelines.parts import picture
from pipelines.unets import sd_like
from toys import Dicts, generator


def accelerated(pipe, site):
    tried = METHODS[site]
    return c4d.accelerate(pipe, tried.method, **tried.settings)


def fresh(case, site, **changes):
    """What a run gives in a process of its own."""
    pipe = case.pipe()
    with accelerated(pipe, site) as handle:
        found = case.sample(pipe, **changes)
        assert CACHED in {record.symbol for record in handle.trace.records}
    return found


def stop_at(pipe, step):
    """The argument of a call that ends it behind a step; older pipelines have another callback."""

    def stop(index):
        if index == step:
            raise KeyboardInterrupt

    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        return {"callback_on_step_end": lambda pipe, index, timestep, kwargs: stop(index) or kwargs}
    return {"callback": lambda index, timestep, latents: stop(index)}


SIZES = {  # another resolution, where the case has one
    "wan2.2": {"height": 32},
    "framepack": {"height": 64},
    "lumina2": {"height": 128},
    "sd-pag": {"height": 24},
    "z-image": {"height": 24},
    "sd3-skip-layer": {"height": 24},
    "pixart, heun": {"height": 24},
}
KINDS = [
    ("wan2.2", "span"),  # two experts
    ("lumina2", "whole"),  # guidance that stops midway
    ("framepack", "part"),  # a run per chunk
    ("sd-pag", "level"),  # three branches in a batch
    ("z-image", "whole"),  # lists
    ("sd3-skip-layer", "span"),  # three branches in two calls
    ("pixart, heun", "part"),  # two calls per step
]


@pytest.mark.parametrize(
    ("name", "site"), [pytest.param(*kind, marks=pytest.mark.slow if i > 1 else ()) for i, kind in enumerate(KINDS)]
)
def test_runs_in_a_row_of_other_lengths_and_sizes_with_aborts_between(name, site):
    case = CASES[name]
    runs = [{"seed": 0}, {"num_inference_steps": case.steps + 5}, SIZES[name], {"num_inference_steps": 4}, {"seed": 1}]
    truth = [fresh(case, site, **run) for run in runs]
    pipe = case.pipe()
    with accelerated(pipe, site) as handle:
        for step, run, expected in zip((0, 1, 2, 3, 1), runs, truth, strict=True):
            assert torch.equal(case.sample(pipe, **run), expected), run
            assert handle.memory["held"] == 0
            with pytest.raises(KeyboardInterrupt):
                case.sample(pipe, **stop_at(pipe, step))
            assert handle.memory["held"] == 0
        assert torch.equal(case.sample(pipe, **runs[0]), truth[0])


@pytest.mark.parametrize("site", ["whole", "span", "part"])
def test_a_warm_up_pass_of_the_denoiser_before_the_loop_is_no_step_of_it(site):
    """As before a compiled run: the same call the loop will begin with, once or several times."""
    case = CASES["flux-true-cfg"]
    truth, pipe = fresh(case, site), case.pipe()
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    plain = case.sample(pipe)
    hook.remove()
    with accelerated(pipe, site) as handle, torch.no_grad():
        for (args, kwargs), times in ((calls[0], 1), (calls[0], 3), (calls[-1], 2)):
            first = pipe.transformer(*args, **kwargs)[0]
            for _ in range(times - 1):
                pipe.transformer(*args, **kwargs)
            assert torch.equal(case.sample(pipe), truth)
            assert first.isfinite().all()
        case.sample(pipe, num_inference_steps=1)
        assert torch.equal(case.sample(pipe), truth)
        assert handle.memory["held"] == 0
    assert torch.equal(case.sample(pipe), plain)


def test_two_pipelines_of_one_class_with_two_methods_take_turns():
    case = CASES["wan2.2"]
    pipes = [case.pipe(), case.pipe()]
    plain = case.sample(pipes[0])
    truth = [fresh(case, site) for site in ("whole", "part")]
    handles = [accelerated(pipe, site) for pipe, site in zip(pipes, ("whole", "part"), strict=True)]
    for _ in range(2):
        for pipe, expected in zip(pipes, truth, strict=True):
            assert torch.equal(case.sample(pipe), expected)
    handles[0].remove()
    assert torch.equal(case.sample(pipes[0]), plain)
    assert torch.equal(case.sample(pipes[1]), truth[1])
    handles[1].remove()


# ---------------------------------------------------------------------- offload and adapters


def model_offload(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe):
    """What `enable_sequential_cpu_offload` does to each component, with the CPU in the accelerator's place."""
    for module in denoisers(pipe).values():
        accelerate.cpu_offload(module, torch.device("cpu"))


def group_offload(pipe, kind="block_level", count=1):
    for module in denoisers(pipe).values():
        apply_group_offloading(
            module, torch.device("cpu"), torch.device("cpu"), offload_type=kind, num_blocks_per_group=count
        )


def leaf_offload(pipe):
    group_offload(pipe, "leaf_level", None)


OFFLOADS = {"model": model_offload, "sequential": sequential_offload, "group": group_offload, "leaves": leaf_offload}


QUICK = [("model", "whole"), ("sequential", "part"), ("group", "whole"), ("leaves", "part")]


@pytest.mark.parametrize(
    ("offload", "site"),
    [
        pytest.param(offload, site, marks=() if (offload, site) in QUICK else pytest.mark.slow)
        for offload in OFFLOADS
        for site in ("whole", "span", "part")
    ],
)
def test_offload_enabled_before_or_after_changes_nothing(offload, site):
    case = CASES["wan"]
    truth = fresh(case, site)
    plain = case.sample(case.pipe())
    before, after = case.pipe(), case.pipe()
    OFFLOADS[offload](before)
    with accelerated(before, site) as handle:
        assert torch.equal(case.sample(before), truth)
        strips = strips_of(handle.trace.records)
    assert torch.equal(case.sample(before), plain)
    with accelerated(after, site) as handle:
        assert torch.equal(case.sample(after), truth)
        OFFLOADS[offload](after)
        start = len(handle.trace.records)
        for _ in range(2):
            assert torch.equal(case.sample(after), truth)
        assert strips_of(handle.trace.records[start:][: len(handle.trace.records[start:]) // 2]) == strips
    assert torch.equal(case.sample(after), plain)


@pytest.mark.parametrize("site", [pytest.param("whole", marks=pytest.mark.slow), "span", "part"])
def test_lora_weights_loaded_and_unloaded_while_attached(site):
    peft = pytest.importorskip("peft")
    case, pipe = CASES["flux"], CASES["flux"].pipe()
    twin = copy.deepcopy(pipe.transformer)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "proj_mlp", "to_out.0"], init_lora_weights=False)
    torch.manual_seed(0)
    twin.add_adapter(config)
    layers = peft.get_peft_model_state_dict(twin)
    weights = {f"transformer.{name}": value for name, value in layers.items()}
    with_lora = case.pipe()
    with_lora.load_lora_weights(weights)
    alone = fresh(case, site)
    with accelerated(with_lora, site):
        adapted = case.sample(with_lora)
    assert not torch.equal(adapted, alone)
    with accelerated(pipe, site):
        assert torch.equal(case.sample(pipe), alone)
        pipe.load_lora_weights(weights)
        assert torch.equal(case.sample(pipe), adapted)
        pipe.unload_lora_weights()
        assert torch.equal(case.sample(pipe), alone)


# ---------------------------------------------------------------------- inversion


@pytest.mark.parametrize("site", ["whole", "level"])
def test_inversion_with_rising_timesteps_is_a_run_like_any_other(site):
    """DiffEdit's own loop, under a scheduler whose timesteps rise; then its other runs, under one whose fall."""

    def make():
        parts = sd_like().components
        names = inspect.signature(StableDiffusionDiffEditPipeline).parameters
        found = StableDiffusionDiffEditPipeline(
            **{name: part for name, part in parts.items() if name in names},
            inverse_scheduler=diffusers.DDIMInverseScheduler(),
            requires_safety_checker=False,
        )
        found.set_progress_bar_config(disable=True)
        return found

    def runs(pipe):
        common = {"prompt": "a red circle", "return_dict": False}
        latents = pipe.invert(
            **common, image=picture(), num_inference_steps=8, inpaint_strength=0.75, generator=generator(0)
        )[0]
        mask = torch.ones(1, 8, 8)
        image = pipe(
            **common, mask_image=mask, image_latents=latents, num_inference_steps=8, inpaint_strength=0.75,
            generator=generator(0), output_type="latent",
        )[0]  # fmt: skip
        return latents, image

    pipe = make()
    plain, modules, keys = runs(pipe), Dicts(pipe.unet), keys_of(pipe)
    with accelerated(pipe, site) as handle:
        first = runs(pipe)
        assert [*strips_of(handle.trace.records).values()] == ["FccFcc"] * 2
        assert not any(torch.equal(a, b) for a, b in zip(first, plain, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(runs(pipe), first, strict=True))
    assert not modules.changed() and keys_of(pipe) == keys
    assert all(torch.equal(a, b) for a, b in zip(runs(pipe), plain, strict=True))
