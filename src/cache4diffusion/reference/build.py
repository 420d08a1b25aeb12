"""Build the folder of ``scenes-flux`` from training checkpoints, with a model card made of what was recorded.

    python -m cache4diffusion.reference.build --vae runs/vae --flow runs/flow --out scenes-flux --captions 480

Without ``--out`` it replaces the weights inside the package. ``--captions 0`` skips the measurement. The way back, from
a built folder to training folders, is `cache4diffusion.reference.training.restore`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from cache4diffusion.errors import Cache4DiffusionError
from cache4diffusion.reference.evaluate import accuracy, checker_rates
from cache4diffusion.reference.folder import SAMPLING, WEIGHTS, load, save_folder
from cache4diffusion.reference.scenes import HELD_OUT_SEED, held_out_combinations
from cache4diffusion.reference.training.flow import load_model, load_vae


def build(
    vae_folder: Path,
    flow_folder: Path,
    out: Path,
    captions: int = 480,
    checker_scenes: int = 2000,
    batch: int = 16,
    progress: bool = False,
) -> dict[str, Any]:
    """Write a pipeline folder with ``README.md`` and ``facts.json``; return the facts.

    Args:
        vae_folder: training folder of the autoencoder.
        flow_folder: training folder of the denoiser and the text encoders.
        out: folder to write; appears only when everything in it is complete.
        captions: held-out captions to measure the accuracy on; 0 skips this.
        checker_scenes: scenes per family to measure checker and autoencoder on; 0 skips this.
        batch: captions per call of the pipeline.
        progress: show progress bars on stderr.

    Raises:
        FileNotFoundError: a training folder has no checkpoint.
    """
    facts: dict[str, Any] = {"held_out_seed": HELD_OUT_SEED, "held_out": len(held_out_combinations())}
    for name, folder in (("vae", vae_folder), ("flow", flow_folder)):
        if not (folder / "ema.safetensors").exists() or not (folder / "history.json").exists():
            raise FileNotFoundError(
                f"{folder} holds no checkpoint (ema.safetensors, history.json); train {name} first."
            )
        facts[name] = json.loads((folder / "history.json").read_text())
        facts[name]["curve"] = _thin(facts[name]["curve"])
    vae, model = load_vae(vae_folder), load_model(flow_folder)
    facts["parameters"] = {
        "vae": _count(vae),
        "transformer": _count(model.transformer),
        "text_encoder": _count(model.text_encoder),
        "text_encoder_2": _count(model.text_encoder_2),
    }
    facts["latents"] = {key: vae.config[key] for key in ("shift_factor", "scaling_factor")}

    out = Path(out)
    partial = out.with_name(f".{out.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_folder(partial, vae, model)
        pipe = load(partial)  # what is measured is what ships, rounded to bfloat16
        facts["accuracy"] = accuracy(pipe, captions, batch=batch, progress=progress) if captions else None
        facts["checker"] = checker_rates(pipe.vae, checker_scenes, progress=progress) if checker_scenes else None
        (partial / "README.md").write_text(model_card(facts), encoding="utf-8")
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


def model_card(facts: dict[str, Any]) -> str:
    """The text of the folder's ``README.md``, from the facts that `build` recorded."""
    vae, flow, counts = facts["vae"], facts["flow"], facts["parameters"]
    settings = ", ".join(f"`{key}={value!r}`" for key, value in SAMPLING.items())
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "---",
        "",
        "# scenes-flux",
        "",
        "A stock diffusers `FluxPipeline` in miniature, trained from scratch on procedural scenes: shaded shapes on",
        "plain backgrounds, described by captions of the six GenEval task families. It exists so that sampling methods",
        "can be tested and measured offline, on a CPU, against an exact checker. It draws nothing else.",
        "",
        "```python",
        "from diffusers import FluxPipeline",
        "",
        'pipe = FluxPipeline.from_pretrained("path/to/scenes-flux")',
        'image = pipe("a red circle left of a blue star on a gray background", height=128, width=128,',
        f"             max_sequence_length={SAMPLING['max_sequence_length']}, num_inference_steps=50,",
        f'             negative_prompt="", true_cfg_scale={SAMPLING["true_cfg_scale"]}).images[0]',
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
        f"Latents 8 x 16 x 16, normalised with shift {facts['latents']['shift_factor']} and scale "
        f"{facts['latents']['scaling_factor']}; packed to 64 image tokens, beside 16 text tokens.",
        "",
        "## Training",
        "",
        "| | autoencoder | denoiser and text encoders |",
        "|---|---|---|",
        f"| updates | {vae['updates']:,} | {flow['updates']:,} |",
        f"| images per update | {vae['facts'].get('batch')} | {flow['facts'].get('batch')} |",
        f"| wall-clock hours | {vae['seconds'] / 3600:.2f} | {flow['seconds'] / 3600:.2f} |",
        f"| processes, one thread each | {vae['facts'].get('workers')} | {flow['facts'].get('workers')} |",
        f"| seed of data and noise | {vae['facts'].get('seed')} | {flow['facts'].get('seed')} |",
        f"| learning rate of the last stretch | {vae['facts'].get('lr')} | {flow['facts'].get('lr')} |",
        "",
        *_last_stretch(flow["facts"]),
        "Scenes are drawn afresh all the time; weights are averages over the last updates (EMA).",
        f"{facts['held_out']} combinations of words are never drawn in training; they follow from the seed "
        f"{facts['held_out_seed']} (`cache4diffusion.reference.scenes.held_out_combinations`).",
        "",
        *[line for note in flow["facts"].get("notes", []) for line in (note, "")],
        "Loss (mean squared error of the velocity):",
        "",
        "| update | minutes | loss | at noise > 0.5 | at noise <= 0.5 |",
        "|---|---|---|---|---|",
        *[
            f"| {e['update']} | {e['minutes']:.0f} | {e['loss']:.4f} | {e['high']:.4f} | {e['low']:.4f} |"
            for e in _thin(flow["curve"], 20)
        ],
        "",
    ]
    if facts["accuracy"]:
        result = facts["accuracy"]
        conditions = ", ".join(f"{key} {value!r}" for key, value in result["conditions"].items())
        lines += [
            "## Accuracy on held-out captions",
            "",
            "| family | captions | met | 95 % interval |",
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
            "Share of ground-truth renders that the checker accepts: with their caption, with one demand of it",
            "changed, and after the autoencoder's round trip.",
            "",
            "| family | true | changed | after round trip | PSNR of round trip |",
            "|---|---|---|---|---|",
        ]
        for family, row in facts["checker"].items():
            shares = " | ".join(f"{100 * row[key]:.2f} %" for key in ("true", "changed", "round_trip"))
            lines.append(f"| {family} | {shares} | {row['psnr']} dB |")
        lines.append("")
    return "\n".join(lines)


def _last_stretch(facts: dict[str, Any]) -> list[str]:
    """Which scenes and noise levels the denoiser was trained on last, where that was recorded."""
    if "mix" not in facts:
        return []
    shares = ", ".join(f"{family} {share:g}" for family, share in facts["mix"].items())
    return [
        f"The last stretch drew families with the weights {shares}, and noise levels whose logit has the mean "
        f"{facts['sigma_mean']:g}.",
        "",
    ]


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="training folder of the autoencoder")
    parser.add_argument("--flow", type=Path, required=True, help="training folder of the denoiser")
    parser.add_argument("--out", type=Path, default=WEIGHTS / "scenes-flux")
    parser.add_argument("--captions", type=int, default=480)
    parser.add_argument("--checker", type=int, default=2000, metavar="N", help="scenes per family; 0 skips")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args(argv)
    try:
        facts = build(args.vae, args.flow, args.out, args.captions, args.checker, args.batch, sys.stderr.isatty())
    except (Cache4DiffusionError, OSError) as error:
        parser.exit(2, f"build: {error}\n")
    measured = f", accuracy {facts['accuracy']['accuracy']:.3f}" if facts["accuracy"] else ""
    print(f"{args.out}: {facts['flow']['updates']} updates{measured}")


if __name__ == "__main__":
    main()
