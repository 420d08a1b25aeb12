"""The same input at every step, caching forced: what is predicted equals what was computed, and nothing bypassed runs.

This catches a swapped stream, the wrong side of a gate, residuals of the host counted twice, a cache that never caches.
"""

import pytest
import torch

import cache4diffusion as c4d
import toys
from cache4diffusion.calibration import Calibration

# L2C's table of pairs is for as many steps as the runs here have; stretched to them, it would hardly cache.
PAIRS = Calibration.by_hand("l2c", 7, dict.fromkeys(toys.PARTS, torch.tensor([1.0, 0.01] * 3 + [1.0])))

# Settings that cache on every step they can, and how exactly a cached step must equal the full one.
GRAM = c4d.Calibration.by_hand("l2p", 12, {"gram": torch.ones(12, 12)})  # of runs that stand still
FORCED = {
    "l2p": ({"calibration": GRAM, "resample": True, "ridge": 1e-9}, 1e-5),
    "ab-cache": ({"interval": 4, "warmup": 2}, 1e-5),
    "goc": ({"start_full": 1}, 1e-5),
    "spectrum": ({"degree": 1, "ridge": 1e-9, "warmup": 2, "window": 4.0}, 1e-5),  # the ridge shrinks constants
    "dbcache": ({"threshold": 9.0, "front": 1, "back": 1, "warmup": 1}, 1e-5),
    "dbcache-official": ({"threshold": 9.0, "front": 1, "warmup": 1, "variant": "official"}, 1e-5),
    "fbcache": ({"threshold": 9.0}, 1e-5),
    "fora": ({"interval": 4}, 0),
    "icc": (toys.ACTIVE["icc"], 0),  # an increment of 0
    "l2c": ({"calibration": PAIRS}, 0),
    "quantcache": ({"threshold": 2.0, "bits": 16.0, "prune": 0.0}, 1e-5),  # what is left out makes mixed steps
    "quantcache-mixed": ({"threshold": 2.0, "prune": 0.0}, 0.02),  # half of the channels are rounded
    "speca": ({"threshold": 9.0, "decay": 1.0}, 1e-5),
    "taylorseer": ({"interval": 4, "order": 2}, 1e-5),
    "taylorseer-order-0": ({"interval": 4, "order": 0}, 0),
    "taylorseer-lite": ({"interval": 4, "order": 0}, 0),
    "taylorseer-lite-order-2": ({"interval": 4, "order": 2}, 1e-5),
    "teacache": ({"threshold": 9.0, "cooldown": 0}, 1e-5),
    "toca": ({"interval": 4, "recompute_ratio": 0.3, "schedule": "constant"}, 1e-5),
    "toca-none": ({"interval": 4, "recompute_ratio": 0.0}, 0),
    "toca-all": ({"interval": 4, "recompute_ratio": 1.0, "schedule": "constant"}, 1e-5),
}


def method_of(case):
    return max((name for name in c4d.METHODS if case.startswith(name)), key=len)


# Methods without a case of their own, at their active settings: nothing changes, so nothing keeps a gate from caching.
FORCED |= {
    name: (toys.ACTIVE[name], 1e-5)
    for name in toys.TRANSFORMER_METHODS
    # FasterCache has a test of its own; what FastCache's map makes of an input is not what the block made of it.
    if name not in ("fastercache", "fastcache") and name not in {method_of(case) for case in FORCED}
}
forced = pytest.mark.parametrize("case", FORCED)


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


def assert_equal(found, plain, tolerance):
    if tolerance == 0:
        assert torch.equal(found, plain)
    else:
        assert relative(found, plain) <= tolerance


FLUX = {"controlnet-repeat": 4, "plain": 1, "controlnet": 1, "ip-adapter": 2, "text-7": 4}


def flux_case(variant):
    batch = FLUX[variant]
    denoiser = toys.flux(ip_adapter=variant == "ip-adapter")
    inputs = toys.flux_inputs(batch, text=7 if variant == "text-7" else 5)
    if variant.startswith("controlnet"):
        inputs |= toys.controlnet_inputs(batch, single=variant == "controlnet")
        inputs["controlnet_blocks_repeat"] = variant == "controlnet-repeat"
    if variant == "ip-adapter":
        inputs |= toys.ip_adapter_inputs(batch)
    return denoiser, inputs


@toys.with_cases("variant", FLUX, "case", FORCED, method_of)
def test_cached_steps_of_flux_equal_the_full_one(case, variant):
    settings, tolerance = FORCED[case]
    denoiser, inputs = flux_case(variant)
    plain = toys.flux_loop(denoiser, inputs, 1, frozen=True)[0]
    with toys.accelerated(denoiser, method_of(case), settings, num_steps=7) as handle:
        found = toys.flux_loop(denoiser, inputs, 7, frozen=True)
        strip = handle.stats["strip"]
    assert sum(symbol in "cp" for symbol in strip) >= 3, strip
    for symbol, output in zip(strip, found, strict=True):
        assert_equal(output, plain, tolerance if symbol in "cp" else 0)


@forced
def test_cached_steps_of_batched_guidance_on_dit_equal_the_full_one(case):
    settings, tolerance = FORCED[case]
    denoiser = toys.dit()
    plain = toys.dit_loop(denoiser, 2, 1, frozen=True)[0]
    with toys.accelerated(denoiser, method_of(case), settings, num_steps=7) as handle:
        found = toys.dit_loop(denoiser, 2, 7, frozen=True)
        strip = handle.stats["strip"]
    assert sum(symbol in "cp" for symbol in strip) >= 3, strip
    for symbol, output in zip(strip, found, strict=True):
        assert_equal(output, plain, tolerance if symbol in "cp" else 0)


@pytest.mark.parametrize("batch", [1, 3])
def test_fastercache_without_gain_equals_the_full_step(batch):
    denoiser = toys.dit()
    plain = toys.dit_loop(denoiser, batch, 1, frozen=True)[0]
    settings = {**toys.ACTIVE["fastercache"], "low_gain": 1.0, "high_gain": 1.0}
    with toys.accelerated(denoiser, "fastercache", settings, num_steps=8) as handle:
        found = toys.dit_loop(denoiser, batch, 8, frozen=True)
        assert handle.stats["strip"] == "FFFhhFhh"
    assert all(relative(output, plain) <= 1e-5 for output in found)


def test_fastercache_of_sequential_branches_equals_the_full_step_and_skips_the_second_call():
    denoiser, branches = toys.flux(), [toys.flux_inputs(seed=0), toys.flux_inputs(seed=1)]
    branches[1]["hidden_states"] = branches[0]["hidden_states"]
    counter = toys.Counter(denoiser)

    @torch.no_grad()
    def call(inputs):
        return denoiser(**inputs, timestep=torch.tensor([0.5])).sample

    plain = [call(inputs) for inputs in branches]
    settings = {**toys.ACTIVE["fastercache"], "low_gain": 1.0, "high_gain": 1.0}
    with toys.accelerated(denoiser, "fastercache", settings, num_steps=6):
        for step in range(6):
            for which, inputs in enumerate(branches):
                ran, output = counter.during(lambda inputs=inputs: call(inputs))
                assert bool(ran) == (which == 0 or step in (0, 1, 2, 5))
                assert relative(output, plain[which]) <= 1e-5


# What must not run on a cached step of FLUX (2 double- and 3 single-stream blocks), and what must.
DOUBLE = [f"transformer_blocks.{i}" for i in range(2)]
SINGLE = [f"single_transformer_blocks.{i}" for i in range(3)]
PARTS = [f"{b}.{part}" for b in DOUBLE for part in ("attn", "ff", "ff_context", "norm2", "norm2_context")] + [
    f"{b}.{part}" for b in SINGLE for part in ("attn", "proj_mlp", "act_mlp", "proj_out")
]
MODULATION = [f"{b}.norm1.linear" for b in DOUBLE] + [f"{b}.norm.linear" for b in SINGLE] + ["time_text_embed"]
NEVER = {
    "dbcache": DOUBLE[1:] + SINGLE[:-1],
    "clusca": [f"{b}.attn" for b in DOUBLE + SINGLE] + [part for part in PARTS if part.startswith("single")],
    "duca": [f"{b}.attn" for b in DOUBLE + SINGLE],
    "dbcache-official": DOUBLE[1:] + SINGLE[1:],
    "fbcache": DOUBLE[1:] + SINGLE,
    "block-caching": DOUBLE + SINGLE,
    "fora": PARTS,
    "harmonica": PARTS,
    "l2c": PARTS,
    "lazydit": [part for part in PARTS if "norm" not in part],  # which the decisions read
    "md-dit": [f"{b}.attn" for b in DOUBLE + SINGLE],
    "speca": PARTS,
    "taylorseer": PARTS,
    "taylorseer-order-0": PARTS,
    "taylorseer-lite": [""],
    "taylorseer-lite-order-2": [""],
    "teacache": DOUBLE + SINGLE + [f"{b}.attn" for b in DOUBLE],
    "toca": [f"{b}.attn" for b in DOUBLE + SINGLE],
    "tokencache": [f"{b}.attn" for b in DOUBLE + SINGLE],
    "toca-none": PARTS,
    "toca-all": [f"{b}.attn" for b in DOUBLE + SINGLE],
}
ALWAYS = {
    "block-caching": ["x_embedder", "norm_out", "proj_out"],
    "dbcache": [DOUBLE[0], SINGLE[-1], "x_embedder"],
    "duca": ["x_embedder", "norm_out", "proj_out"],
    "dbcache-official": [DOUBLE[0], SINGLE[0], "x_embedder"],
    "fbcache": [DOUBLE[0], "x_embedder"],
    "taylorseer-lite": [],
    "taylorseer-lite-order-2": [],
    "teacache": ["x_embedder", "norm_out", "proj_out"],
}


@forced
@pytest.mark.parametrize("variant", ["plain", "controlnet"])
def test_bypassed_modules_run_0_times(case, variant):
    denoiser, inputs = flux_case(variant)
    counter = toys.Counter(denoiser)
    time = torch.full((1,), 0.5)
    # SpeCa verifies from its second cached step on; the first is the plain one.
    with torch.no_grad(), toys.accelerated(denoiser, method_of(case), FORCED[case][0], num_steps=7) as handle:
        cached = 0
        for _ in range(7):
            ran, _ = counter.during(lambda: denoiser(**inputs, timestep=time))
            if handle.trace.records[-1].symbol not in "cp" or (case == "speca" and cached):
                continue
            cached += 1
            never = NEVER.get(case, handle._engines[0].attachment.bypassed)
            forbidden = {n for n in ran for p in never if n == p or p == "" or n.startswith(p + ".")}
            if case in ("teacache", "seacache"):  # whose signal is the first block's modulated input: its norms run
                forbidden = {n for n in forbidden if not n.startswith("transformer_blocks.0.norm1")} - {DOUBLE[0]}
            assert not forbidden, f"ran on a cached step: {sorted(forbidden)}"
            assert ran >= set(ALWAYS.get(case, MODULATION if case in NEVER else ()))
        assert cached


def test_a_failed_check_costs_one_block_and_the_next_step_is_full():
    denoiser, inputs = flux_case("plain")
    counter = toys.Counter(denoiser)
    settings = {"threshold": 1e-9, "floor": 0.0, "decay": 1.0, "order": 1, "warmup": 0, "metric": "l1"}
    with torch.no_grad(), toys.accelerated(denoiser, "speca", settings, num_steps=12) as handle:
        x = inputs["hidden_states"]
        for i in range(12):
            now = {**inputs, "hidden_states": x * (1 + 0.3 * i**2)}
            ran, _ = counter.during(lambda now=now, i=i: denoiser(**now, timestep=torch.full((1,), 1 - i / 12)))
            blocks_with_attention = [b for b in DOUBLE + SINGLE if f"{b}.attn" in ran]
            record = handle.trace.records[-1]
            if record.symbol == "c":
                assert blocks_with_attention in ([], SINGLE[-1:])
        assert handle.stats["strip"] == "FcccFcccFccc"


@pytest.mark.parametrize("guard", ["now", "next"])
@pytest.mark.parametrize("name", ["fora", "toca"])
def test_a_placeholder_that_leaks_is_never_returned(name, guard):
    """Resting norms hand out NaN: were one read, the guard would see it. Here none is."""
    denoiser, inputs = flux_case("plain")
    with toys.accelerated(denoiser, name, num_steps=9, nan_guard=guard) as handle:
        found = toys.flux_loop(denoiser, inputs, 9)
        assert not handle.stats["notes"]
    assert all(output.isfinite().all() for output in found)
