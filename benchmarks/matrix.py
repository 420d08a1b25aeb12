"""Every invariant for every method on tiny stock pipelines: denoiser x dtype x batch x guidance.

    python benchmarks/matrix.py                                        # all: docs/benchmarks/matrix.json and .md
    python benchmarks/matrix.py --denoisers pixart --methods fora,toca --write out/matrix
    python benchmarks/matrix.py --resume                               # goes on with a file, cell by cell

Each cell is one `cache4diffusion.selfcheck` of a FLUX, a DiT, a PixArt or a Stable Diffusion U-Net with random weights,
by its own pipeline: whole runs, and each call repeated unchanged. Methods that need a calibration are given one made on
the pipeline itself. The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import cache4diffusion as c4d
from cache4diffusion.compare import check_methods, parse_method, split_methods
from cache4diffusion.files import check_writable, write_whole
from cache4diffusion.measure.bench import versions
from cache4diffusion.method import Method
from cache4diffusion.selfcheck import INVARIANTS
from resume import kept

SCHEMA = 1
STEPS = 8
LETTERS = {"passed": "p", "failed": "x", "not applicable": "-"}
DTYPES = ("float32", "bfloat16", "float16")
BATCHES = (1, 3)
# Where the defaults are for denoisers with more blocks than these have.
SETTINGS: dict[str, dict[str, Any]] = {"dbcache": {"front": 1}, "dbprune": {"front": 1}}

# Trainings are as short as can be: what is learned does not matter here. Random blocks change much.
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"runs": 1} for name in ("harmonica", "l2c", "lazydit", "md-dit", "tokencache")},
    "block-caching": {"runs": 1, "threshold": 0.8},
    "cachequant": {"unit": "span"},
}


# --- tiny pipelines ---------------------------------------------------------------------------------------------------


def ready(module: nn.Module) -> nn.Module:
    """Biases, gates and norms that start at 0 or 1 are made visible: fresh blocks would add nothing."""
    for parameter in module.parameters():
        if parameter.ndim == 1 or not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return module.eval().requires_grad_(False)


def vae(channels: int, blocks: int = 1) -> nn.Module:
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "block_out_channels": (4,) * blocks,
    }
    return ready(diffusers.AutoencoderKL(latent_channels=channels, norm_num_groups=2, sample_size=8, **kinds))


def flux() -> Any:
    denoiser = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
    )
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxPipeline(transformer=ready(denoiser), vae=vae(2, 2), scheduler=scheduler, **absent)


def dit() -> Any:
    denoiser = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return diffusers.DiTPipeline(transformer=ready(denoiser), vae=vae(4), scheduler=diffusers.DDIMScheduler())


def pixart() -> Any:
    denoiser = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=16,
        caption_channels=12,
        use_additional_conditions=False,
    )
    scheduler, absent = diffusers.DDIMScheduler(), dict.fromkeys(("text_encoder", "tokenizer"))
    return diffusers.PixArtAlphaPipeline(transformer=ready(denoiser), vae=vae(4), scheduler=scheduler, **absent)


def unet() -> Any:
    denoiser = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
    )
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return diffusers.StableDiffusionPipeline(
        unet=ready(denoiser), vae=vae(4), scheduler=diffusers.DDIMScheduler(), requires_safety_checker=False, **absent
    )


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flux_call(batch: int, is_guided: bool) -> tuple[Any, dict[str, Any]]:
    prompt = {"prompt_embeds": noise(1, batch, 5, 24), "pooled_prompt_embeds": noise(2, batch, 20)}
    if is_guided:
        prompt |= {"negative_prompt_embeds": noise(3, batch, 5, 24), "true_cfg_scale": 3.0}
        prompt["negative_pooled_prompt_embeds"] = noise(4, batch, 20)
    return prompt, {"height": 16, "width": 16, "guidance_scale": 1.0}


def dit_call(batch: int, is_guided: bool) -> tuple[Any, dict[str, Any]]:
    return {"class_labels": list(range(batch))}, {"guidance_scale": 3.0 if is_guided else 1.0}


def pixart_call(batch: int, is_guided: bool) -> tuple[Any, dict[str, Any]]:
    mask = torch.ones(batch, 5)
    prompt: dict[str, Any] = {"prompt_embeds": noise(1, batch, 5, 12), "prompt_attention_mask": mask}
    prompt |= {"negative_prompt": None}
    if is_guided:
        prompt |= {"negative_prompt_embeds": noise(2, batch, 5, 12), "negative_prompt_attention_mask": mask.clone()}
    scale = 3.0 if is_guided else 1.0
    return prompt, {"height": 8, "width": 8, "use_resolution_binning": False, "guidance_scale": scale}


def unet_call(batch: int, is_guided: bool) -> tuple[Any, dict[str, Any]]:
    prompt = {"prompt_embeds": noise(1, batch, 5, 12)}
    if is_guided:
        prompt["negative_prompt_embeds"] = noise(2, batch, 5, 12)
    return prompt, {"height": 8, "width": 8, "guidance_scale": 3.0 if is_guided else 1.0}


@dataclass(frozen=True)
class Subject:
    """A pipeline, and what it is asked for: arguments that hold the prompts, and the others."""

    make: Callable[[], Any]
    call: Callable[[int, bool], tuple[dict[str, Any], dict[str, Any]]]
    guidance: str  # how its guided calls are made


SUBJECTS = {
    "flux": Subject(flux, flux_call, "two calls"),
    "dit": Subject(dit, dit_call, "one batched call"),
    "pixart": Subject(pixart, pixart_call, "one batched call"),
    "unet": Subject(unet, unet_call, "one batched call"),
}


# --- cells ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """Where all methods are checked."""

    denoiser: str
    dtype: str
    batch: int
    is_guided: bool

    def __str__(self) -> str:
        return f"{self.denoiser}, {self.dtype}, batch {self.batch}, {'guided' if self.is_guided else 'unguided'}"


@dataclass
class Row:
    """What was found for one method in one cell; ``found`` has a letter for each of `INVARIANTS`."""

    denoiser: str
    dtype: str
    batch: int
    is_guided: bool
    method: str
    settings: dict[str, Any]
    found: str
    details: dict[str, str] = field(default_factory=dict)  # of what did not pass


def cells_of(denoisers: list[str], dtypes: list[str], batches: list[int]) -> list[Cell]:
    """Guided in every dtype and batch; unguided in the first dtype and the largest batch."""
    return [
        cell
        for name in denoisers
        for cell in (
            *(Cell(name, dtype, batch, True) for dtype, batch in itertools.product(dtypes, batches)),
            Cell(name, dtypes[0], max(batches), False),
        )
    ]


def prepared(cell: Cell) -> tuple[Any, dict[str, Any], list[Any], dict[str, Any]]:
    """The pipeline, the call of a whole batch, and prompts and call for a calibration."""
    subject, dtype = SUBJECTS[cell.denoiser], getattr(torch, cell.dtype)
    torch.manual_seed(0)
    pipe = subject.make().to(dtype)
    pipe.set_progress_bar_config(disable=True)

    def cast(values: dict[str, Any]) -> dict[str, Any]:
        return {name: v.to(dtype) if isinstance(v, Tensor) else v for name, v in values.items()}

    prompts, rest = subject.call(cell.batch, cell.is_guided)
    one, _ = subject.call(1, cell.is_guided)
    asked = one["class_labels"] if "class_labels" in one else [cast(one)]
    return pipe, {**cast(prompts), **rest}, asked, rest


def method_for(pipe: Any, text: str, prompts: list[Any], call: dict[str, Any]) -> Method:
    """The method, with a calibration made on the pipeline itself if it needs one."""
    name, given = parse_method(text)
    settings = {**SETTINGS.get(name, {}), **given}
    if c4d.METHODS[name].info.needs_calibration and "calibration" not in settings:
        settings["calibration"] = c4d.calibrate(
            pipe, name, prompts, steps=STEPS, call=call, trial=0, **OPTIONS.get(name, {})
        )
    return c4d.method(name, **settings)


def rows_of(cell: Cell, methods: list[str]) -> list[Row]:
    pipe, call, prompts, rest = prepared(cell)
    rows = []
    for text in methods:
        name, given = parse_method(text)
        row = Row(**asdict(cell), method=name, settings={**SETTINGS.get(name, {}), **given}, found="")
        rows.append(row)
        try:
            chosen = method_for(pipe, text, prompts, rest)
            findings = c4d.selfcheck(pipe, chosen, call=call, steps=STEPS).findings
        except c4d.Cache4DiffusionError as error:  # it cannot even be calibrated here
            row.found = LETTERS["not applicable"] * len(INVARIANTS)
            row.details = dict.fromkeys(INVARIANTS, " ".join(str(error).split()))
            continue
        row.found = "".join(LETTERS[finding.status] for finding in findings)
        row.details = {f.invariant: f.detail for f in findings if f.status != "passed"}
    return rows


# --- the file ---------------------------------------------------------------------------------------------------------


def conditions() -> dict[str, Any]:
    return {
        "steps": STEPS,
        "device": f"cpu, {torch.get_num_threads()} thread(s), {platform.machine()}",
        "weights": "random",
        "versions": versions(),
    }


def page(result: dict[str, Any]) -> str:
    """The result as markdown."""
    rows, told = result["rows"], result["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    cells = list(dict.fromkeys(str(_cell(row)) for row in rows))
    denoisers = list(dict.fromkeys(row["denoiser"] for row in rows))
    letters = Counter("".join(row["found"] for row in rows))
    lines = [
        "# Every invariant for every method",
        "",
        f"{len({row['method'] for row in rows})} methods in {len(cells)} cells of tiny stock pipelines with "
        f"random weights, {told['steps']} steps, {told['device']}: **{letters['p']} checks passed, {letters['x']} "
        f"failed**, {letters['-']} say nothing there. {versions}. Written by `benchmarks/matrix.py` (`make matrix`).",
        "",
        "The invariants, in the order of the letters (`p` passed, `x` failed, `-` not applicable):",
        "",
        *(f"{number}. `{name}`: {words}" for number, (name, words) in enumerate(result["invariants"].items(), 1)),
        "",
        "Features affine in the step need parts that are affine: `tests/invariants/test_linear_feature.py`.",
        "",
        f"| method | {' | '.join(denoisers)} |",
        "|---|" + "---|" * len(denoisers),
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        found = []
        for denoiser in denoisers:
            mine = Counter(r["found"] for r in rows if (r["method"], r["denoiser"]) == (method, denoiser))
            found.append("<br>".join(f"`{letters}` x {count}" for letters, count in mine.most_common()))
        lines.append(f"| `{method}` | {' | '.join(found)} |")
    lines += ["", "Cells: " + "; ".join(cells) + ".", "", "## What failed", ""]
    failed = [row for row in rows if LETTERS["failed"] in row["found"]]
    lines += [
        f"- `{row['method']}` on {_cell(row)}: {name}: {row['details'][name]}"
        for row in failed
        for name, letter in zip(result["invariants"], row["found"], strict=True)
        if letter == LETTERS["failed"]
    ] or ["Nothing."]
    lines += ["", "## What says nothing, and why", ""]
    reasons: dict[str, Counter[str]] = {}
    for row in rows:
        for name, letter in zip(result["invariants"], row["found"], strict=True):
            if letter == LETTERS["not applicable"]:
                reasons.setdefault(row["details"][name], Counter())[row["method"]] += 1
    lines += [
        f"- {reason} ({', '.join(f'`{method}`' for method in sorted(methods))}; {sum(methods.values())} checks)"
        for reason, methods in sorted(reasons.items(), key=lambda item: -sum(item[1].values()))
    ]
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> Cell:
    return Cell(row["denoiser"], row["dtype"], row["batch"], row["is_guided"])


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoisers", default=",".join(SUBJECTS), help="comma-separated")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="comma-separated")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="comma-separated")
    parser.add_argument("--methods", help="comma-separated, each maybe with (settings); all by default")
    parser.add_argument("--resume", action="store_true", help="keep the cells that are there, check the rest")
    parser.add_argument("--write", metavar="STEM", default="docs/benchmarks/matrix", help="STEM.json and STEM.md")
    options = parser.parse_args(arguments)
    options.denoisers, options.dtypes = options.denoisers.split(","), options.dtypes.split(",")
    options.batches = [int(number) for number in options.batches.split(",")]
    options.methods = split_methods(options.methods) if options.methods else sorted(c4d.METHODS)
    for name, given, known in (
        ("denoisers", options.denoisers, SUBJECTS),
        ("dtypes", options.dtypes, DTYPES),
    ):
        if not set(given) <= set(known):
            parser.error(f"--{name} {','.join(given)}: use some of {', '.join(known)}")
    if min(options.batches) < 1:
        parser.error("--batches must be 1 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    check_methods([text for text in options.methods if not c4d.METHODS[parse_method(text)[0]].info.needs_calibration])
    check_writable(f"{options.write}.json")
    diffusers.utils.logging.set_verbosity_error()  # changing the dtype is what is asked for
    warnings.filterwarnings("ignore")
    told = conditions()
    rows = kept(options.write, SCHEMA, told) if options.resume else []
    known = {_cell(row) for row in rows}
    result = {"schema": SCHEMA, "conditions": told, "invariants": INVARIANTS, "rows": rows}
    for cell in cells_of(options.denoisers, options.dtypes, options.batches):
        if cell in known:
            continue
        found = rows_of(cell, options.methods)
        rows += [asdict(row) for row in found]
        failed = sum(row.found.count(LETTERS["failed"]) for row in found)
        print(f"{cell}: {len(found)} methods, {failed} checks failed", file=sys.stderr)
        write_whole(f"{options.write}.json", json.dumps(result, indent=1) + "\n")
        write_whole(f"{options.write}.md", page(result))
    failed = sum(row["found"].count(LETTERS["failed"]) for row in rows)
    print(f"{sum(len(row['found']) for row in rows)} checks, {failed} failed: {options.write}.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
