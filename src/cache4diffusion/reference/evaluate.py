"""Measure what a reference pipeline can do: the share of held-out prompts whose picture the checker accepts.

Which checker, and what is asked for, is the model's: captions of scenes, classes, or captions of motion.

python -m cache4diffusion.reference.evaluate scenes-flux --captions 480 --json accuracy.json
python -m cache4diffusion.reference.evaluate scenes-flux --checker 2000
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.console import Console
from rich.progress import track

from cache4diffusion.calls import sampler
from cache4diffusion.errors import Cache4DiffusionError, SettingError
from cache4diffusion.measure import wilson_interval
from cache4diffusion.reference.folder import load
from cache4diffusion.reference.models import model_of
from cache4diffusion.reference.tasks import Scenes, Task


def generate(
    pipe: Any,
    prompts: Sequence[Any],
    seed: int = 0,
    batch: int = 16,
    progress: bool = False,
    **sampling: Any,
) -> Iterable[np.ndarray]:
    """Yield one picture per prompt, uint8: ``[128, 128, 3]``, or ``[8, 96, 96, 3]`` of a model that draws clips.

    The noise of prompt ``i`` depends on ``seed + i`` alone, not on the batch it falls into; `bench` draws the same.

    Args:
        pipe: a reference pipeline.
        prompts: captions, or class labels; any number.
        seed: of the first one's noise.
        batch: prompts per call of the pipeline.
        progress: show a progress bar on stderr.
        sampling: replaces entries of the model's ``sampling``.
    """
    call = {**model_of(pipe).sampling, **sampling}
    steps = call.pop("num_inference_steps")
    sample = sampler(pipe, call)
    starts: Iterable[int] = range(0, len(prompts), batch)
    if progress:
        starts = track(starts, "sampling", console=Console(stderr=True))
    for start in starts:
        part = prompts[start : start + batch]
        with torch.inference_mode():
            images = sample(part, range(seed + start, seed + start + len(part)), steps)
        yield from np.rint(255 * np.asarray(images)).astype(np.uint8)


def accuracy(
    pipe: Any, n: int = 480, seed: int = 0, batch: int = 16, progress: bool = False, **sampling: Any
) -> dict[str, Any]:
    """Share of held-out prompts met, over all and per family, with 95 % intervals and the demands missed.

    Args:
        pipe: a reference pipeline.
        n: number of prompts; a multiple of the number of families gives every family the same number.
        seed: of the prompts and of the noise.
        batch: prompts per call of the pipeline.
        progress: show a progress bar on stderr.
        sampling: replaces entries of the model's ``sampling``.

    Returns:
        JSON-ready facts: ``conditions``, ``accuracy``, ``interval``, ``families`` (each with ``accuracy``,
        ``interval`` (Wilson), ``captions`` and ``missed``, a count per demand) and ``failures``.

    Raises:
        SettingError: ``n`` is less than 1.
    """
    if n < 1:
        raise SettingError(f"accuracy(n={n}): use 1 caption or more.")
    model = model_of(pipe)
    task, denoiser = model.task, getattr(pipe, model.denoiser)
    wanted = task.held_out(n, seed)
    prompts = [task.prompt(each) for each in wanted]
    start = time.monotonic()
    pictures = generate(pipe, prompts, 100_000 * seed, batch, progress, **sampling)
    verdicts = [task.check(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
    seconds = time.monotonic() - start
    families = {}
    for family in task.families:
        own = [verdict for verdict, each in zip(verdicts, wanted, strict=True) if each.family == family]
        if not own:
            continue
        met = sum(verdict.ok for verdict in own)
        missed: dict[str, int] = {}
        for verdict in own:
            for demand, is_met in verdict.met.items():
                missed[demand] = missed.get(demand, 0) + (not is_met)
        families[family] = {
            "accuracy": met / len(own),
            "interval": wilson_interval(met, len(own)),
            "captions": len(own),
            "missed": missed,
        }
    met = sum(verdict.ok for verdict in verdicts)
    return {
        "conditions": {
            "captions": n,
            "seed": seed,
            "batch": batch,
            **model.sampling,
            **sampling,
            "dtype": str(denoiser.dtype).removeprefix("torch."),
            "device": str(denoiser.device),
            "torch": torch.__version__,
        },
        "accuracy": met / n,
        "interval": wilson_interval(met, n),
        "seconds": round(seconds, 1),
        "families": families,
        "failures": [prompt for prompt, verdict in zip(prompts, verdicts, strict=True) if not verdict.ok],
    }


def round_trip(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Encode and decode uint8 images ``[B, H, W, 3]``; the latent is the posterior's mean."""
    with torch.inference_mode():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1
        decode: Any = vae.decode  # typed for FloatTensor, which no tensor is
        decoded = decode(vae.encode(pixels, return_dict=False)[0].mean, return_dict=False)[0].clamp(-1, 1)
    return ((decoded.float() + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def checker_rates(
    vae: AutoencoderKL, n: int = 2000, seed: int = 0, progress: bool = False, task: Task | None = None
) -> dict[str, Any]:
    """How far the checker and the autoencoder can be trusted, per family, on ``n`` examples each.

    Args:
        vae: the autoencoder.
        n: examples per family.
        seed: of the examples.
        progress: show progress bars on stderr.
        task: whose checker; None: that of `Scenes`.

    Returns:
        per family: ``true`` (renders accepted), ``changed`` (renders accepted for a prompt with one demand changed),
        ``round_trip`` (accepted after the autoencoder) and ``psnr`` of the round trip in dB.
    """
    task, rates = task or Scenes(), {}
    for family in task.families:
        counts: dict[str, float] = {"true": 0, "changed": 0, "round_trip": 0}
        error = 0.0
        starts: Iterable[int] = range(0, n, 16)
        if progress:
            starts = track(starts, family, console=Console(stderr=True))
        for start in starts:
            rngs = [random.Random(f"{family} {seed} {i}") for i in range(start, min(start + 16, n))]
            drawn = [task.draw(rng, family, held_out=rng.random() < 0.5) for rng in rngs]
            images = np.stack([task.render(each) for each in drawn])
            frames = images.reshape(-1, *images.shape[-3:])
            decoded = round_trip(vae, frames).reshape(images.shape)
            error += float(((decoded.astype(np.float32) - images) ** 2).mean()) * len(drawn)
            for rng, each, image, copy in zip(rngs, drawn, images, decoded, strict=True):
                prompt = task.prompt(each)
                counts["true"] += task.check(image, prompt).ok
                counts["changed"] += task.check(image, task.contradict(prompt, rng)).ok
                counts["round_trip"] += task.check(copy, prompt).ok
        psnr = 10 * math.log10(255**2 / max(error / n, 1e-9))
        rates[family] = {key: value / n for key, value in counts.items()} | {"psnr": round(psnr, 2)}
    return rates


def format_table(result: dict[str, Any]) -> str:
    """The result of `accuracy` as text, a line per family."""
    lines = [f"{'family':<14} {'captions':>8} {'accuracy':>8}   95 % interval    missed"]
    rows = [*result["families"].items(), ("all", result | {"captions": result["conditions"]["captions"], "missed": {}})]
    for family, row in rows:
        low, high = row["interval"]
        missed = ", ".join(f"{demand} {n}" for demand, n in row["missed"].items() if n)
        share, span = f"{100 * row['accuracy']:>7.1f}%", f"{100 * low:5.1f} .. {100 * high:5.1f}"
        lines.append(f"{family:<14} {row['captions']:>8} {share}   {span}    {missed}")
    return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="scenes-flux", help="name of a reference model, or a folder")
    parser.add_argument("--captions", type=int, default=480)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, help="sampling steps; the model's own if not given")
    parser.add_argument("--guidance", type=float, help="guidance scale; the model's own if not given")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--checker", type=int, metavar="N", help="instead: rates of checker and autoencoder, N per family"
    )
    parser.add_argument("--json", type=Path, help="write the facts here, too")
    args = parser.parse_args(argv)
    show = sys.stderr.isatty()
    try:
        pipe = load(args.model, getattr(torch, args.dtype)).to(args.device)
        model = model_of(pipe)
        asked = {"num_inference_steps": args.steps, model.guidance: args.guidance}
        sampling = {name: value for name, value in asked.items() if value is not None}
        if args.checker:
            result = checker_rates(pipe.vae, args.checker, args.seed, progress=show, task=model.task)
        else:
            result = accuracy(pipe, args.captions, args.seed, args.batch, progress=show, **sampling)
        print(json.dumps(result, indent=2) if args.checker else format_table(result))
        if args.json:
            args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except (Cache4DiffusionError, OSError) as error:
        parser.exit(2, f"evaluate: {error}\n")


if __name__ == "__main__":
    main()
