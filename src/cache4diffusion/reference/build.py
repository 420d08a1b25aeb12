"""Build the folder of a reference model from training checkpoints, with a model card made of what was recorded.

    python -m cache4diffusion.reference.build --vae runs/vae --flow runs/flow --out scenes-flux --captions 480
    python -m cache4diffusion.reference.build --model scenes-dit --denoiser runs/scenes-dit

Without ``--out`` it replaces the weights inside the package. ``--captions 0`` skips the measurement. The way back, from
a built folder to training folders, is `cache4diffusion.reference.training.restore`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cache4diffusion.errors import Cache4DiffusionError
from cache4diffusion.reference.evaluate import accuracy, checker_rates
from cache4diffusion.reference.folder import WEIGHTS, load, save_folder
from cache4diffusion.reference.models import MODELS, ReferenceModel, model_named
from cache4diffusion.reference.scenes import HELD_OUT_SEED, held_out_combinations
from cache4diffusion.reference.training.denoiser import load_parts, vae_of


def build(
    vae_folder: Path | None,
    denoiser_folder: Path,
    out: Path,
    captions: int = 480,
    checker_scenes: int = 2000,
    batch: int = 16,
    progress: bool = False,
    model: ReferenceModel | None = None,
) -> dict[str, Any]:
    """Write a pipeline folder with ``README.md`` and ``facts.json``; return the facts.

    Args:
        vae_folder: training folder of the autoencoder; None for a model that takes that of ``scenes-flux``.
        denoiser_folder: training folder of the denoiser and the text encoders that learn along.
        out: folder to write; appears only when everything in it is complete.
        captions: held-out prompts to measure the accuracy on; 0 skips this.
        checker_scenes: examples per family to measure checker and autoencoder on; 0 skips this.
        batch: prompts per call of the pipeline.
        progress: show progress bars on stderr.
        model: what is built; None: ``scenes-flux``.

    Raises:
        FileNotFoundError: a training folder has no checkpoint.
    """
    model = model or MODELS["scenes-flux"]
    facts: dict[str, Any] = {
        "model": model.name,
        "held_out_seed": HELD_OUT_SEED,
        "held_out": len(held_out_combinations()),
    }
    folders = {model.record: denoiser_folder}
    if model.has_own_vae:
        folders = {"vae": vae_folder or Path("none"), **folders}
    for name, folder in folders.items():
        if not (folder / "ema.safetensors").exists() or not (folder / "history.json").exists():
            raise FileNotFoundError(
                f"{folder} holds no checkpoint (ema.safetensors, history.json); train {name} first."
            )
        facts[name] = json.loads((folder / "history.json").read_text())
        facts[name]["curve"] = _thin(facts[name]["curve"])
    vae, parts = vae_of(model, vae_folder), load_parts(model, denoiser_folder)
    facts["parameters"] = {"vae": _count(vae)} | {name: _count(module) for name, module in parts.named_children()}
    facts["latents"] = {key: vae.config[key] for key in ("shift_factor", "scaling_factor")}

    out = Path(out)
    partial = out.with_name(f".{out.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_folder(partial, vae, parts, model=model)
        pipe = load(partial)  # what is measured is what ships, rounded to bfloat16
        facts["accuracy"] = accuracy(pipe, captions, batch=batch, progress=progress) if captions else None
        facts["checker"] = (
            checker_rates(pipe.vae, checker_scenes, progress=progress, task=model.task) if checker_scenes else None
        )
        (partial / "README.md").write_text(model_card(facts, model), encoding="utf-8")
        (partial / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return facts


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _thin(curve: list[dict[str, float]], points: int = 60) -> list[dict[str, float]]:
    """At most ``points`` entries of a loss curve, the last one among them."""
    stride = -(-len(curve) // points) or 1
    return curve[::-1][::stride][::-1]


def model_card(facts: dict[str, Any], model: ReferenceModel | None = None) -> str:
    """The text of the folder's ``README.md``, from the facts that `build` recorded."""
    model = model or model_named(facts.get("model", "scenes-flux"))
    task, record, counts = model.task, facts[model.record], facts["parameters"]
    settings = ", ".join(f"`{key}={value!r}`" for key, value in model.sampling.items())
    call = "".join(f", {key}={value!r}" for key, value in model.sampling.items())
    shift = facts["latents"]["shift_factor"]
    shape = "8 x 16 x 16" if task.frames is None else f"8 x {task.frames} x {task.side // 8} x {task.side // 8}"
    kind = "text-to-video" if task.frames else "text-to-image" if task.prompts == "captions" else "image-generation"
    subject = "prompt" if task.prompts == "captions" else "class_labels"
    example = task.prompt(task.held_out(1)[0])
    origin = "beside parts of `scenes-flux`" if model.borrowed else "from scratch"
    result = "frames" if task.frames else "images"
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: diffusers",
        f"pipeline_tag: {kind}",
        "---",
        "",
        f"# {model.name}",
        "",
        *textwrap.wrap(
            f"A stock diffusers `{model.pipeline}` in miniature, trained {origin} on procedural scenes: shaded "
            f"shapes on plain backgrounds, {model.about} It exists so that sampling methods can be tested and measured "
            "offline, on a CPU, against an exact checker. It draws nothing else.",
            width=120,
        ),
        "",
        "```python",
        f"from diffusers import {model.pipeline}",
        "",
        f'pipe = {model.pipeline}.from_pretrained("path/to/{model.name}")',
        *textwrap.wrap(
            f"image = pipe({subject}=[{example!r}]{call}).{result}[0]",
            width=120,
            subsequent_indent="             ",
            break_long_words=False,
        ),
        "```",
        "",
        f"Settings it was made for: {settings}.",
        "",
        "This file is generated by `python -m cache4diffusion.reference.build` from `facts.json`.",
        "",
        "## Licence",
        "",
        "Weights: Apache-2.0. Scenes and captions: CC0.",
        "",
        "## Networks",
        "",
        "| part | parameters |",
        "|---|---|",
        *[f"| {part} | {count:,} |" for part, count in counts.items()],
        "",
        f"Latents {shape}, normalised with "
        + (f"shift {shift} and " if shift is not None else "")
        + f"scale {facts['latents']['scaling_factor']}; {model.tokens}.",
        "",
        *([f"Taken over from `scenes-flux`: {model.borrowed}.", ""] if model.borrowed else []),
        f"Noise: {model.noise.words}.",
        "",
        "## Training",
        "",
        *_training_table(
            {"autoencoder": facts["vae"], "denoiser and text encoders": record}
            if "vae" in facts
            else {"denoiser": record}
        ),
        "",
        *_last_stretch(record["facts"]),
        "Scenes are drawn afresh all the time; weights are averages over the last updates (EMA).",
        *filter(None, [task.describe_held_out()]),
        "",
        *[line for note in record["facts"].get("notes", []) for line in (note, "")],
        "Loss (mean squared error of what the denoiser predicts):",
        "",
        "| update | minutes | loss | at noise > 0.5 | at noise <= 0.5 |",
        "|---|---|---|---|---|",
        *[
            f"| {e['update']} | {e['minutes']:.0f} | {e['loss']:.4f} | {e['high']:.4f} | {e['low']:.4f} |"
            for e in _thin(record["curve"], 20)
        ],
        "",
    ]
    if facts["accuracy"]:
        result = facts["accuracy"]
        conditions = ", ".join(f"{key} {value!r}" for key, value in result["conditions"].items())
        lines += [
            f"## Accuracy on held-out {task.prompts}" if task.describe_held_out() else "## Accuracy",
            "",
            f"| family | {task.prompts} | met | 95 % interval |",
            "|---|---|---|---|",
        ]
        rows = [*result["families"].items(), ("all", result | {"captions": result["conditions"]["captions"]})]
        for family, row in rows:
            low, high = row["interval"]
            share = f"{100 * row['accuracy']:.1f} %"
            lines.append(f"| {family} | {row['captions']} | {share} | {100 * low:.1f} .. {100 * high:.1f} % |")
        lines += ["", f"Conditions: {conditions}.", ""]
    if facts["checker"]:
        lines += [
            "## Checker and autoencoder",
            "",
            "Share of ground-truth renders that the checker accepts: with what they were drawn for, with one demand of",
            "it changed, and after the autoencoder's round trip.",
            "",
            "| family | true | changed | after round trip | PSNR of round trip |",
            "|---|---|---|---|---|",
        ]
        for family, row in facts["checker"].items():
            shares = " | ".join(f"{100 * row[key]:.2f} %" for key in ("true", "changed", "round_trip"))
            lines.append(f"| {family} | {shares} | {row['psnr']} dB |")
        lines.append("")
    return "\n".join(lines)


def _training_table(histories: dict[str, dict[str, Any]]) -> list[str]:
    """Facts of each training, side by side."""
    rows: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("updates", lambda history: f"{history['updates']:,}"),
        ("examples per update", lambda history: history["facts"].get("batch")),
        ("wall-clock hours", lambda history: f"{history['seconds'] / 3600:.2f}"),
        ("device", lambda history: history["facts"].get("device", "cpu")),
        ("processes, one thread each", lambda history: history["facts"].get("workers")),
        ("seed of data and noise", lambda history: history["facts"].get("seed")),
        ("learning rate of the last stretch", lambda history: history["facts"].get("lr")),
    ]
    lines = [" | ".join(["|", *histories, "|"]).replace("|  |", "| |"), "|---" * (len(histories) + 1) + "|"]
    return lines + [f"| {name} | {' | '.join(str(of(h)) for h in histories.values())} |" for name, of in rows]


def _last_stretch(facts: dict[str, Any]) -> list[str]:
    """Which scenes and noise levels the denoiser was trained on last, where that was recorded."""
    if "mix" not in facts:
        return []
    shares = ", ".join(f"{family} {share:g}" for family, share in facts["mix"].items())
    noise = f", and noise levels whose logit has the mean {facts['sigma_mean']:g}" if "sigma_mean" in facts else ""
    return [f"The last stretch drew families with the weights {shares}{noise}.", ""]


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="scenes-flux")
    parser.add_argument("--vae", type=Path, help="training folder of the autoencoder, where the model has its own")
    parser.add_argument("--denoiser", "--flow", type=Path, required=True, help="training folder of the denoiser")
    parser.add_argument("--out", type=Path, help="folder to write; by default the package's own")
    parser.add_argument("--captions", type=int, default=480, metavar="N", help="held-out prompts; 0 skips")
    parser.add_argument("--checker", type=int, default=2000, metavar="N", help="scenes per family; 0 skips")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args(argv)
    model = MODELS[args.model]
    out = args.out or WEIGHTS / model.name
    sizes = args.captions, args.checker, args.batch
    try:
        facts = build(args.vae, args.denoiser, out, *sizes, progress=sys.stderr.isatty(), model=model)
    except (Cache4DiffusionError, OSError) as error:
        parser.exit(2, f"build: {error}\n")
    measured = f", accuracy {facts['accuracy']['accuracy']:.3f}" if facts["accuracy"] else ""
    print(f"{out}: {facts[model.record]['updates']} updates{measured}")


if __name__ == "__main__":
    main()
