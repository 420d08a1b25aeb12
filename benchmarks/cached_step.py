"""What a cached step costs, ours beside the peers', on a random FLUX where compute dominates.

    python benchmarks/cached_step.py                       # a few minutes
    python benchmarks/cached_step.py --quick --json -      # a minute, JSON on stdout
    python benchmarks/cached_step.py --write docs/benchmarks/cached_step

All variants are run in turn within every repeat, on the same weights, so that other work on the machine meets all of
them; figures are means of the fastest third. Whether a step was full or cached is told by counting attention calls,
not by asking the library. cache-dit is measured where it is installed.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel, TaylorSeerCacheConfig
from torch import nn

import cache4diffusion as c4d
from cache4diffusion.measure.bench import versions

DOUBLE, SINGLE, SIDE, TEXT = 4, 8, 16, 32
ALWAYS = 1e9  # a threshold under which every step is cached


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    denoiser = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=64,
        num_attention_heads=6,
        joint_attention_dim=256,
        pooled_projection_dim=256,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )
    for parameter in denoiser.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)  # gates that are zero at birth would hide the blocks
    return denoiser.eval().requires_grad_(False)


def same_weights(denoiser: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters."""
    return copy.deepcopy(denoiser, {id(p): p for p in denoiser.parameters()})


@dataclass
class Variant:
    """One thing to measure.

    ``prepare(denoiser)`` returns what resets it at the start of a run (or None).
    """

    name: str
    family: str
    library: str
    call: str
    prepare: Callable[[Any], Callable[[], Any] | None]
    steps: int = 9
    needs_context: bool = False
    denoiser: Any = None
    reset: Callable[[], Any] | None = None
    full: list[float] = field(default_factory=list)
    cached: list[float] = field(default_factory=list)


def ours(name: str, family: str, **settings: Any) -> Variant:
    words = ", ".join([f"{name!r}"] + [f"{key}={value!r}" for key, value in settings.items()])
    handles = []

    def prepare(denoiser: Any) -> None:
        handles.append(c4d.accelerate(denoiser, name, **settings))

    variant = Variant(name, family, f"cache4diffusion {c4d.__version__}", f"accelerate(denoiser, {words})", prepare)
    variant.handles = handles  # type: ignore[attr-defined]
    return variant


def hooked(label: str, family: str, config: Any, words: str) -> Variant:
    def prepare(denoiser: Any) -> Callable[[], Any]:
        denoiser.enable_cache(config)
        return denoiser._reset_stateful_cache

    return Variant(
        label,
        family,
        f"diffusers {diffusers.__version__}",
        f"denoiser.enable_cache({words})",
        prepare,
        needs_context=True,
    )


def dit(blocks: int, steps: int, family: str) -> Variant:
    import cache_dit

    def prepare(denoiser: Any) -> None:
        cache_dit.enable_cache(
            denoiser,
            cache_config=cache_dit.DBCacheConfig(
                Fn_compute_blocks=blocks,
                Bn_compute_blocks=0,
                residual_diff_threshold=ALWAYS,
                max_warmup_steps=1,
                num_inference_steps=steps,
            ),
        )

    words = (
        f"enable_cache(denoiser, cache_config=DBCacheConfig(Fn_compute_blocks={blocks}, Bn_compute_blocks=0, "
        f"residual_diff_threshold={ALWAYS}, max_warmup_steps=1, num_inference_steps={steps}))"
    )
    return Variant(f"DBCache F{blocks}B0", family, f"cache-dit {cache_dit.__version__}", words, prepare, steps)


def stored_parts(denoiser: Any) -> None:
    """The floor for part sites: parts return stored tensors, what feeds only them returns ready placeholders."""
    with c4d.accelerate(denoiser, "fora", interval=2) as handle:
        seen: dict[str, Any] = {}
        with handle.run(num_steps=3):
            call(denoiser, 0)
            driver = handle._engines[0].driver
            modules = [site.module for site in driver.sites] + [rest.wrapper.module for rest in driver.resting]
            hooks = [m.register_forward_hook(lambda m, a, out: seen.__setitem__(id(m), out)) for m in modules]
            call(denoiser, 1)
        for hook in hooks:
            hook.remove()
    for module in modules:
        stored = seen[id(module)]
        module.forward = lambda *args, _stored=stored, **kwargs: _stored


def variants() -> list[Variant]:
    taylor = {"cache_interval": 5, "disable_cache_before_step": 3, "max_order": 1}
    words = "TaylorSeerCacheConfig(cache_interval=5, disable_cache_before_step=3, max_order=1, "
    dtype = {"taylor_factors_dtype": torch.float32}
    lite, attention = (
        TaylorSeerCacheConfig(**taylor, use_lite_mode=True, **dtype),
        TaylorSeerCacheConfig(**taylor, **dtype),
    )
    family = ["whole denoiser", "parts", "one probed block", "two probed blocks", "signal"]
    found = [
        Variant("uncached", "baseline", f"diffusers {diffusers.__version__}", "denoiser(...)", lambda denoiser: None),
        ours("taylorseer-lite", family[0], interval=5, order=1),
        hooked("TaylorSeer lite", family[0], lite, words + "use_lite_mode=True, taylor_factors_dtype=torch.float32)"),
        ours("taylorseer", family[1], interval=5, order=1),
        ours("fora", family[1], interval=5),
        Variant("stored tensors", family[1], "a floor, not a method", "part.forward = lambda: stored", stored_parts, 6),
        hooked("TaylorSeer (attention only)", family[1], attention, words + "taylor_factors_dtype=torch.float32)"),
        ours("fbcache", family[2], threshold=ALWAYS, warmup=1),
        hooked("First Block Cache", family[2], FirstBlockCacheConfig(ALWAYS), f"FirstBlockCacheConfig({ALWAYS})"),
        ours("dbcache", family[3], threshold=ALWAYS, front=2, warmup=1),
        ours("teacache", family[4], threshold=ALWAYS, cooldown=0),
    ]
    try:
        logging.disable(logging.INFO)
        found += [dit(1, 9, family[2]), dit(2, 9, family[3])]
    except ImportError:
        print("cache-dit is not installed: its rows are left out", file=sys.stderr)
    return found


_INPUTS: dict[str, torch.Tensor] = {}


def call(denoiser: Any, step: int, needs_context: bool = False) -> None:
    if not _INPUTS:
        places = torch.arange(SIDE * SIDE)
        _INPUTS.update(
            hidden_states=torch.randn(1, SIDE * SIDE, 64),
            encoder_hidden_states=torch.randn(1, TEXT, 256),
            pooled_projections=torch.randn(1, 256),
            img_ids=torch.stack([places * 0, places // SIDE, places % SIDE], 1).float(),
            txt_ids=torch.zeros(TEXT, 3),
        )
    timestep = torch.full((1,), 1 - step / 100)
    if needs_context:
        with denoiser.cache_context("cond"):
            denoiser(timestep=timestep, return_dict=False, **_INPUTS)
    else:
        denoiser(timestep=timestep, return_dict=False, **_INPUTS)


class Attention:
    """Counts attention calls, which tell full steps from cached ones whatever the library."""

    def __init__(self) -> None:
        self.count, self.plain = 0, nn.functional.scaled_dot_product_attention
        nn.functional.scaled_dot_product_attention = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One attention."""
        self.count += 1
        return self.plain(*args, **kwargs)


def run_once(variant: Variant, attention: Attention) -> None:
    if variant.reset is not None:
        variant.reset()
    handles = getattr(variant, "handles", [])
    context = handles[0].run(num_steps=variant.steps) if handles else None
    if context is not None:
        context.__enter__()
    for step in range(variant.steps):
        before, start = attention.count, time.perf_counter()
        call(variant.denoiser, step, variant.needs_context)
        wall = 1e3 * (time.perf_counter() - start)
        (variant.full if attention.count - before == DOUBLE + SINGLE else variant.cached).append(wall)
    if context is not None:
        context.__exit__(None, None, None)


def fastest_third(values: list[float]) -> float | None:
    return statistics.mean(sorted(values)[: max(1, len(values) // 3)]) if values else None


class BlockTimes:
    """Share of the first blocks in the uncached step, measured in the same repeats."""

    def __init__(self, denoiser: Any) -> None:
        self.times: list[list[float]] = [[], []]
        for index, times in enumerate(self.times):
            block = denoiser.transformer_blocks[index]
            block.register_forward_pre_hook(lambda *_: setattr(self, "start", time.perf_counter()))
            block.register_forward_hook(
                lambda *_, times=times: times.append(1e3 * (time.perf_counter() - self.start)),
            )


def measure(repeats: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    base, attention = flux(), Attention()
    chosen = variants()
    for variant in chosen:
        variant.denoiser = same_weights(base)
        variant.reset = variant.prepare(variant.denoiser)
        run_once(variant, attention)  # the first run learns how the denoiser is built
        variant.full.clear()
        variant.cached.clear()
    blocks = BlockTimes(chosen[0].denoiser)
    for repeat in range(repeats):
        for variant in chosen:
            run_once(variant, attention)
        print(f"repeat {repeat + 1} of {repeats}", file=sys.stderr)
    full = fastest_third(chosen[0].full)
    assert full is not None
    shares = [100 * (fastest_third(times) or 0.0) / full for times in blocks.times]
    rows = []
    for variant in chosen:
        cached, own_full = fastest_third(variant.cached), fastest_third(variant.full)
        row: dict[str, Any] = {
            "family": variant.family,
            "variant": variant.name,
            "library": variant.library,
            "call": variant.call,
            "full_ms": own_full,
            "cached_ms": cached,
            "cached_percent": 100 * cached / full if cached is not None else None,
            "cached_steps_timed": len(variant.cached),
        }
        if variant.family == "whole denoiser" and cached is not None and own_full is not None:
            row["achieved_over_ideal"] = full / (own_full + 4 * cached)  # interval 5: ideal is 5 times faster
        if variant.family.endswith("probed block"):
            row["probed_percent"] = shares[0]
        if variant.family.endswith("probed blocks"):
            row["probed_percent"] = sum(shares)
        rows.append(row)
    conditions = {
        "denoiser": f"random FLUX, width 384, {DOUBLE} + {SINGLE} blocks, {SIDE**2} image + {TEXT} text tokens",
        "dtype": "float32",
        "device": f"CPU, {torch.get_num_threads()} thread ({platform.machine()}), shared with other work",
        "statistic": f"mean of the fastest third, {repeats} repeats, variants in turn within each",
        "versions": versions(),
        "probed_blocks_percent": {"first": shares[0], "first two": sum(shares)},
    }
    return {"conditions": conditions, "rows": rows}


def table(result: dict[str, Any]) -> str:
    conditions = result["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    lines = [
        "# What a cached step costs",
        "",
        "; ".join(conditions[name] for name in ("denoiser", "dtype", "device", "statistic")) + f". {versions}.",
        "Percentages are of the uncached step in the same run. Written by `benchmarks/cached_step.py`.",
        "",
        "| kind | variant | library | full step | cached step | of a full step | remark |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        remark = ""
        if "achieved_over_ideal" in row:
            remark = f"{row['achieved_over_ideal']:.3f} of the ideal speed-up at interval 5"
        if "probed_percent" in row:
            remark = f"the probed blocks alone: {row['probed_percent']:.1f} %"
        full = f"{row['full_ms']:.1f} ms" if row["full_ms"] is not None else "-"
        cached = f"{row['cached_ms']:.2f} ms" if row["cached_ms"] is not None else "-"
        percent = f"{row['cached_percent']:.2f} %" if row["cached_percent"] is not None else "-"
        lines.append(
            f"| {row['family']} | {row['variant']} | {row['library']} | {full} | {cached} | {percent} | {remark} |"
        )
    lines += ["", "Calls:", ""]
    lines += [f"- {row['library']}, {row['variant']}: `{row['call']}`" for row in result["rows"][1:]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 repeats instead of 16")
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--json", metavar="FILE", help="write JSON here (- is stdout)")
    parser.add_argument("--write", metavar="STEM", help="write STEM.md and STEM.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    with torch.no_grad():
        result = measure(options.repeats or (2 if options.quick else 16))
    text = json.dumps(result, indent=2) + "\n"
    if options.json == "-":
        print(text, end="")
    else:
        print(table(result))
        if options.json:
            Path(options.json).write_text(text)
    if options.write:
        Path(options.write).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{options.write}.json").write_text(text)
        Path(f"{options.write}.md").write_text(table(result))


if __name__ == "__main__":
    main()
