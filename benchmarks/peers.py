"""What others package, beside the same methods here: on a reference model, measured alike.

    python benchmarks/peers.py                          # scenes-flux: diffusers' FirstBlockCache and TaylorSeerCache
    python benchmarks/peers.py --model scenes-sd        # the packages DeepCache and tomesd
    python benchmarks/peers.py --model scenes-video     # diffusers' PyramidAttentionBroadcast and FasterCache
    python benchmarks/peers.py --write docs/benchmarks/peers-scenes-flux

Peers run under the bench like any method, and are watched from outside: a step is full (F) if as many layers with
weights ran as at most steps, on as many rows; fewer layers are c, fewer rows h. What they hold are the tensors found in
their states behind each call. Packages that are not installed are left out, and named.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor, nn

from cache4diffusion.cli.models import load_model
from cache4diffusion.files import check_writable
from cache4diffusion.measure import Results, markdown_table
from side_by_side import side_by_side


def tensors_in(state: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors that diffusers' hooks hold: in containers, and in what of theirs is an object."""
    seen = set() if seen is None else seen
    if id(state) in seen or isinstance(state, nn.Module):
        return
    seen.add(id(state))
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors_in(value, seen)
    elif isinstance(state, list | tuple | set):
        for value in state:
            yield from tensors_in(value, seen)
    elif type(state).__module__.startswith("diffusers.hooks"):
        yield from tensors_in(vars(state), seen)


def hook_tensors(denoiser: nn.Module) -> Iterator[Tensor]:
    """Likewise, of all hooks in a denoiser."""
    seen: set[int] = set()
    for module in denoiser.modules():
        yield from tensors_in(getattr(module, "_diffusers_hook", None), seen)


@dataclass
class Watched:
    """What was seen of the last run, under the names that the bench reads."""

    layers: list[int] = field(default_factory=list)  # that ran, in each call of the denoiser
    rows: list[int] = field(default_factory=list)
    cache_bytes: int = 0
    whole: str = "F"  # the letter of a call in which all layers ran

    @property
    def strip(self) -> str:
        """One letter per call."""
        most, all_rows = max(self.layers), max(self.rows)
        letters = zip(self.layers, self.rows, strict=True)
        return "".join("h" if n < all_rows else self.whole if layers == most else "c" for layers, n in letters)

    @property
    def total_steps(self) -> int:
        """Calls."""
        return len(self.layers)

    @property
    def full_steps(self) -> float:
        """Calls in which all ran; half of the rows is half a call."""
        return self.strip.count(self.whole) + 0.5 * self.strip.count("h")


@contextlib.contextmanager
def watching(denoiser: nn.Module, held: Callable[[], Iterator[Tensor]]) -> Iterator[Watched]:
    """Count the layers with weights that run in each call, and what is held behind it."""
    found, count, rows = Watched(), 0, 0

    def note_layer(layer: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal count, rows
        count, rows = count + 1, max(rows, args[0].shape[0] if args and isinstance(args[0], Tensor) else 0)

    def note_call(*_: Any) -> None:
        nonlocal count, rows
        found.layers.append(count)
        found.rows.append(rows)
        found.cache_bytes = max(found.cache_bytes, sum(tensor.nbytes for tensor in held()))
        count = rows = 0

    layers = [m for m in denoiser.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_pre_hook(note_layer) for layer in layers]
    hooks.append(denoiser.register_forward_hook(note_call))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Peer:
    """A variant of the bench: another library's implementation.

    Args:
        name: in tables.
        library: that it is from, with its version.
        pipe: what it works on.
        settings: what it is called with.
        put_on: puts it on the pipeline; returns what takes it off, and what lists the tensors it holds.
        is_reduced: whether what runs in full runs on fewer tokens (r).
    """

    name: str
    library: str
    pipe: Any
    settings: dict[str, Any]
    put_on: Callable[[Any, dict[str, Any]], tuple[Callable[[], Any], Callable[[], Iterator[Tensor]]]]
    is_reduced: bool = False
    fidelity: str = "peer"

    @contextlib.contextmanager
    def attach(self) -> Iterator[Any]:
        """For one run."""
        off, held = self.put_on(self.pipe, self.settings)
        try:
            with watching(denoiser_of(self.pipe), held) as found:
                found.whole = "r" if self.is_reduced else "F"
                yield found
        finally:
            off()


def denoiser_of(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


# --- what there is ----------------------------------------------------------------------------------------------------


def deepcache(pipe: Any, settings: dict[str, Any]) -> Any:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe)
    helper.set_params(**settings)
    helper.enable()

    def held() -> Iterator[Tensor]:
        for output in helper.cached_output.values():
            for tensor in output if isinstance(output, tuple) else (output,):
                yield from tensors_in(tensor)

    return helper.disable, held


def tomesd(pipe: Any, settings: dict[str, Any]) -> Any:
    import tomesd as package

    package.apply_patch(pipe, **settings)
    return (lambda: package.remove_patch(pipe)), lambda: iter(())


def hooked(config: Callable[..., Any]) -> Any:
    """One of diffusers' own caches."""

    def put_on(pipe: Any, settings: dict[str, Any]) -> Any:
        denoiser = denoiser_of(pipe)
        timed = {"current_timestep_callback": lambda: pipe.current_timestep}
        asks = "current_timestep_callback" in config.__dataclass_fields__  # type: ignore[attr-defined]
        denoiser.enable_cache(config(**settings, **(timed if asks else {})))
        return denoiser.disable_cache, lambda: hook_tensors(denoiser)

    return put_on


PAB = [
    {
        "spatial_attention_block_skip_range": spatial,
        "temporal_attention_block_skip_range": temporal,
        "cross_attention_block_skip_range": cross,
        "spatial_attention_timestep_skip_range": (100, 850),
        "temporal_attention_timestep_skip_range": (100, 850),
        "cross_attention_timestep_skip_range": (100, 850),
    }
    for spatial, temporal, cross in ((2, 3, 6), (2, 4, 6), (3, 6, 9))
]
OWN_PAB = [
    f"pab(spatial={s}, temporal={t}, cross={c}, window=(100, 850))" for s, t, c in ((2, 3, 6), (2, 4, 6), (3, 6, 9))
]


def rows_for(pipe: Any) -> tuple[list[Any], dict[str, str]]:
    """Peers that serve this pipeline, each behind our method at the same settings; and what is not installed.

    Raises:
        SystemExit: none does.
    """
    library, denoiser = f"diffusers {diffusers.__version__}", denoiser_of(pipe)
    rows: list[Any] = []
    missing: dict[str, str] = {}

    def packaged(package: str, name: str, put_on: Any, ours: str, settings: dict[str, Any], **more: Any) -> None:
        try:
            rows.extend((ours, Peer(name, f"{package} {version(package)}", pipe, settings, put_on, **more)))
        except PackageNotFoundError:
            missing[name] = f"the package {package} is not installed"

    if isinstance(denoiser, diffusers.UNet2DConditionModel):
        for interval in (2, 3, 5):
            settings = {"cache_interval": interval, "cache_branch_id": 0}
            packaged("DeepCache", "DeepCache package", deepcache, f"deepcache(interval={interval})", settings)
        for ratio in (0.3, 0.5, 0.75):
            packaged("tomesd", "tomesd package", tomesd, f"tome(ratio={ratio})", {"ratio": ratio}, is_reduced=True)
    elif isinstance(denoiser, diffusers.LatteTransformer3DModel):
        config: Any = diffusers.PyramidAttentionBroadcastConfig
        for ours, settings in zip(OWN_PAB, PAB, strict=True):
            rows.extend((ours, Peer("diffusers PyramidAttentionBroadcast", library, pipe, settings, hooked(config))))
        config = diffusers.FasterCacheConfig
        rows.extend(("fastercache", Peer("diffusers FasterCache", library, pipe, {}, hooked(config))))
    elif isinstance(denoiser, diffusers.FluxTransformer2DModel):
        config = diffusers.FirstBlockCacheConfig
        for threshold in (0.05, 0.1, 0.2):
            peer = Peer("diffusers FirstBlockCache", library, pipe, {"threshold": threshold}, hooked(config))
            rows.extend((f"fbcache(threshold={threshold})", peer))
        config = diffusers.TaylorSeerCacheConfig
        for interval in (3, 5):
            settings = {"cache_interval": interval, "max_order": 1, "disable_cache_before_step": 3}
            peer = Peer("diffusers TaylorSeerCache", library, pipe, settings, hooked(config))
            rows.extend((f"taylorseer(interval={interval}, order=1, warmup=3)", peer))
    if not rows and not missing:
        raise SystemExit(f"No peer serves {type(denoiser).__name__}.")
    return rows, missing


def page(results: Results, libraries: list[str]) -> str:
    """A table, with what it holds for."""
    lines = [
        f"# Peers on {results.conditions.denoiser}",
        "",
        "The same methods here and in what others package, on the same images, under one bench; peers are watched from "
        "outside. Written by `benchmarks/peers.py`.",
        "",
        f"Peers: {', '.join(libraries) or 'none is installed'}.",
        "",
        markdown_table(results),
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-flux", help="a reference model")
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--write", metavar="STEM", help="STEM.json and STEM.md; docs/benchmarks/peers-MODEL")
    options = parser.parse_args(arguments)
    stem = options.write or f"docs/benchmarks/peers-{options.model}"
    check_writable(Path(f"{stem}.json"))
    model = load_model(options.model)
    rows, missing = rows_for(model.pipe)
    results = side_by_side(
        model, rows, options.captions, results=f"{stem}.json", keep_going=True, conditions={"left_out": missing}
    )
    libraries = sorted({row.library for row in rows if isinstance(row, Peer)})
    Path(f"{stem}.md").write_text(page(results, libraries), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
