"""The command-line options that every training has."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from cache4diffusion.reference.training.parallel import TrainSettings


def training_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser of the options that make `TrainSettings`, and of ``--batch``.

    Args:
        description: what is trained, and how.
        **defaults: of the options that have none in common: ``minutes``, ``cooldown``, ``batch`` and ``seed``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints, log and loss curve go here")
    parser.add_argument("--minutes", type=float, help="wall-clock budget of this call")
    parser.add_argument("--updates", type=int, default=-1, help="budget of this call; below 0: none")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--cooldown", type=float)
    parser.add_argument("--batch", type=int, help="scenes per microbatch")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--save-minutes", type=float, default=5.0)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    parser.add_argument("--device", default="cpu" if found is None else str(found))
    parser.add_argument("--resume", choices=("auto", "ema"), default="auto")
    parser.set_defaults(**defaults)
    return parser


def settings_of(args: argparse.Namespace) -> TrainSettings:
    """The settings that were given."""
    names = [entry.name for entry in dataclasses.fields(TrainSettings) if hasattr(args, entry.name)]
    return TrainSettings(**{name: getattr(args, name) for name in names})


def facts_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the history of a training says of them."""
    workers = args.workers if args.device == "cpu" else 1
    return {
        "batch": args.batch * args.microbatches,
        "seed": args.seed,
        "lr": args.lr,
        "workers": workers,
        "device": args.device,
    }
