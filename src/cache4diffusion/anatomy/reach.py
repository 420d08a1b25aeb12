"""What self-attention reaches in a video: the tokens of a frame, or those at one place in all frames.

Frames are folded into the rows for the one, places for the other. Which of the two it is shows in a second forward with
frames twice as high: what attends over space has more tokens then, what attends over time has more rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from cache4diffusion.anatomy.facts import Over, Part, Stack
from cache4diffusion.anatomy.observing import Stage
from cache4diffusion.anatomy.tape import Call, Recording
from cache4diffusion.anatomy.tree import LeafPath

_VIDEO = 5  # axes of a latent with frames


def with_reach(
    stage: Stage, recording: Recording, latent: LeafPath, stacks: Iterable[Stack]
) -> tuple[list[Stack], list[str]]:
    """Return the stacks, of each self-attention what it reaches, and notes.

    Args:
        stage: where to run.
        recording: what one forward showed.
        latent: the argument that is denoised.
        stacks: of blocks.
    """
    stacks = list(stacks)
    calls = {(call.path, call.turn): call for call in recording.calls}
    shape = recording.shape(recording.root.arguments[latent])
    attentions = [part for stack in stacks for block in stack.blocks for part in block.parts if part.kind == "attn"]
    folded = {
        (part.path, part.turn): sizes
        for part in attentions
        if len(sizes := _sizes(recording, calls[part.path, part.turn], part)) == 3 and sizes[0] != shape[0]
    }
    if not folded:
        return stacks, []
    other = _higher(stage, recording, latent) if len(shape) == _VIDEO else None
    higher = {} if other is None else {(call.path, call.turn): call for call in other.calls}
    found: dict[tuple[str, int], Over] = {}
    for part in attentions:
        key = part.path, part.turn
        if key not in folded:
            continue
        after = _sizes(other, higher[key], part) if other is not None and key in higher else ()
        over = _seen(folded[key], after) or _counted(folded[key], shape)
        if over is not None:
            found[key] = over
    notes = [f"what {path} attends over was not established" for path, turn in folded if (path, turn) not in found]
    return [
        dataclasses.replace(
            stack,
            blocks=tuple(
                dataclasses.replace(
                    block,
                    parts=tuple(
                        dataclasses.replace(part, over=found.get((part.path, part.turn), "all")) for part in block.parts
                    ),
                )
                for block in stack.blocks
            ),
        )
        for stack in stacks
    ], notes


def _sizes(recording: Recording, call: Call, part: Part) -> tuple[int, ...]:
    """Rows, tokens and width of what enters a part."""
    return recording.shape(call.arguments[part.inputs[0]]) if part.inputs else ()


def _higher(stage: Stage, recording: Recording, latent: LeafPath) -> Recording | None:
    """A forward with frames twice as high; None if the denoiser refuses it."""
    root = recording.root
    size = recording.shape(root.arguments[latent])[-2:]
    grown = {
        path
        for path, serial in root.arguments.items()
        if len(recording.shape(serial)) == _VIDEO and recording.shape(serial)[-2:] == size
    }

    def twice(path: LeafPath, tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor], dim=-2) if path in grown else tensor

    try:
        return stage.record(twice, calls_only=True)
    except Exception:  # any host code may refuse any shape
        return None


def _seen(before: tuple[int, ...], after: tuple[int, ...]) -> Over | None:
    if len(after) != len(before):
        return None
    if after[1] != before[1]:
        return "space"
    return "time" if after[0] != before[0] else None


def _counted(sizes: tuple[int, ...], latent: tuple[int, ...]) -> Over | None:
    """By the number of frames, where frames and tokens of a frame are not equally many."""
    if len(latent) != _VIDEO or sizes[0] % latent[0]:
        return None
    folds, tokens = sizes[0] // latent[0], sizes[1]
    frames = set(latent[1:3])
    if (folds in frames) == (tokens in frames):
        return None
    return "space" if folds in frames else "time"
