"""Train and build the reference models that are missing, one after the other; stopped, the same command goes on.

    python -m cache4diffusion.reference.make                                          # all that are not there
    python -m cache4diffusion.reference.make scenes-dit --runs runs --workers 1
    python -m cache4diffusion.reference.make scenes-dit --again --updates 12000       # 12,000 in all

A model's training folder is ``RUNS/NAME``, its autoencoder's, where it has its own, ``RUNS/NAME-vae``; there lie
checkpoints and the loss curve. On an accelerator, if there is one, else in processes of one thread each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cache4diffusion.errors import Cache4DiffusionError
from cache4diffusion.reference import build
from cache4diffusion.reference.folder import WEIGHTS
from cache4diffusion.reference.models import MODELS, ReferenceModel, model_named
from cache4diffusion.reference.training import denoiser, vae

VAE_UPDATES = 2_600

CHECKED = 200
"""Examples per family that the checker is measured on: of clips, minutes."""


def updates_of(folder: Path) -> int:
    """How many updates the training in a folder has had: 0 if there is none."""
    history = folder / "history.json"
    return json.loads(history.read_text(encoding="utf-8"))["updates"] if history.exists() else 0


def train_to(folder: Path, updates: int, train: Callable[[list[str]], None], options: Sequence[str] = ()) -> bool:
    """Train until a folder has had ``updates`` in all; returns whether it has, or was stopped before.

    Args:
        folder: of the training.
        updates: in all.
        train: takes the options of a training's command line.
        options: beside ``--folder``, ``--updates`` and ``--minutes``.
    """
    rest = updates - updates_of(folder)
    if rest > 0:
        train(["--folder", str(folder), "--updates", str(rest), "--minutes", "inf", *options])
    return updates_of(folder) >= updates


def make(
    model: ReferenceModel,
    runs: Path,
    out: Path,
    updates: int | None = None,
    options: Sequence[str] = (),
    compiled: bool = False,
) -> bool:
    """Train what ``model`` needs and build its folder; returns False if a training was stopped.

    Args:
        model: what is made.
        runs: training folders lie in it.
        out: folder to write.
        updates: of the denoiser's training in all; None: as many as the model's description says.
        options: of the command lines of training, such as ``["--workers", "1"]``.
        compiled: whether the denoiser's blocks are compiled.
    """
    folder, vae_folder = runs / model.name, runs / f"{model.name}-vae"
    vae_option = ["--vae", str(vae_folder)] if model.has_own_vae else []
    if model.has_own_vae and not train_to(vae_folder, VAE_UPDATES, vae.main, options):
        return False
    total = model.training.updates if updates is None else updates
    options = [*vae_option, *options, *(["--compile"] if compiled else [])]
    if not train_to(folder, total, lambda words: denoiser.main([model.name, *words]), options):
        return False
    checked = ["--checker", str(CHECKED)]
    build.main(["--model", model.name, "--denoiser", str(folder), "--out", str(out), *checked, *vae_option])
    return True


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all if none is named")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="training folders lie in it")
    parser.add_argument(
        "--updates", type=int, help="of the denoiser in all; as the model's description says by default"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, on a CPU")
    parser.add_argument(
        "--compile", action="store_true", help="compile the denoiser's blocks: a minute's wait, then a quarter faster"
    )
    parser.add_argument("--again", action="store_true", help="train on and build also what is there")
    args = parser.parse_args(argv)
    try:
        for model in [model_named(name) for name in args.models or MODELS]:
            out = WEIGHTS / model.name
            if out.exists() and not args.again:
                print(f"{model.name} is there: {out}")
            elif not make(model, args.runs, out, args.updates, ["--workers", str(args.workers)], args.compile):
                parser.exit(1, f"make: {model.name} was stopped; the same command goes on from its last checkpoint.\n")
            sys.stdout.flush()
    except (Cache4DiffusionError, OSError) as error:
        parser.exit(2, f"make: {error}\n")


if __name__ == "__main__":
    main()
