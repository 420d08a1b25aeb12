"""Which axis of which tensor carries the batch: seen by running once more with one row more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from cache4diffusion.anatomy.facts import Axes
from cache4diffusion.anatomy.observing import Stage
from cache4diffusion.anatomy.tape import Call, Recording
from cache4diffusion.anatomy.tree import LeafPath


def batch_axes(
    stage: Stage,
    recording: Recording,
    latent: LeafPath,
    likely: Iterable[LeafPath],
    wanted: Iterable[str],
) -> tuple[Mapping[str, Axes], list[str]]:
    """Return ``{module path: axes}`` for the denoiser (``""``) and for ``wanted``, and notes.

    Args:
        stage: where to run.
        recording: what one forward with the given batch showed.
        latent: the argument whose first axis is the batch.
        likely: arguments that carry the batch if their first axis has its length; the others are tried, too, and then
            those that have another axis of that length.
        wanted: module paths.
    """
    if len(latent) > 1:
        return {}, ["batch axes were not established (the latent is not one tensor)"]
    root = recording.root
    batch = recording.shape(root.arguments[latent])[0]
    shapes = {path: recording.shape(serial) for path, serial in root.arguments.items()}
    first_axis = tuple(path for path, shape in shapes.items() if shape[:1] == (batch,))
    sure = tuple(path for path in first_axis if path in {latent, *likely})
    # Whole numbers in a row of this length may be anything: frames, places, a number per sample.
    numbers = {path for path in first_axis if _is_row_of_numbers(recording, root.arguments[path])}
    plain = tuple(path for path in first_axis if path in sure or path not in numbers)
    values = tuple(path for path in plain if path not in numbers)
    inner_axis = tuple(path for path, shape in shapes.items() if shape[:1] != (batch,) and shape.count(batch) == 1)
    attempts: list[dict[LeafPath, int]] = [
        dict.fromkeys(paths, 0) for paths in (first_axis, sure, plain, values, (latent,))
    ]
    attempts.insert(2, dict.fromkeys(first_axis, 0) | {path: shapes[path].index(batch) for path in inner_axis})
    reason = ""
    for number, grown in enumerate(attempts):
        if grown in attempts[:number]:
            continue
        try:
            other = stage.record(
                lambda path, tensor, grown=grown: _one_more(tensor, grown[path]) if path in grown else tensor,
                calls_only=True,
            )
        except Exception as error:  # any host code may refuse any shape
            reason = reason or f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        if [call.path for call in other.calls] != [call.path for call in recording.calls]:
            reason = reason or "another number of rows takes another way through the denoiser"
            continue
        return _compare(recording, other, batch, {"", *wanted}), []
    return {}, [f"batch axes were not established ({reason})"]


def _one_more(tensor: Tensor, axis: int) -> Tensor:
    return torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)


def _is_row_of_numbers(recording: Recording, serial: int) -> bool:
    return len(recording.shape(serial)) == 1 and not recording.facts[serial].dtype.is_floating_point


def _compare(one: Recording, other: Recording, batch: int, wanted: set[str]) -> dict[str, Axes]:
    found: dict[str, Axes] = {}
    for a, b in zip(one.calls, other.calls, strict=True):
        if a.path in wanted and a.path not in found:
            sides = (_axes(one, other, get(a), get(b), batch) for get in (_arguments, _outputs))
            found[a.path] = Axes(*sides)
    return found


def _arguments(call: Call) -> dict[LeafPath, int]:
    return call.arguments


def _outputs(call: Call) -> dict[LeafPath, int]:
    return call.outputs


def _axes(
    one: Recording, other: Recording, a: dict[LeafPath, int], b: dict[LeafPath, int], batch: int
) -> dict[LeafPath, int | None]:
    axes: dict[LeafPath, int | None] = {}
    for path, serial in a.items():
        if path not in b:
            continue
        before, after = one.shape(serial), other.shape(b[path])
        if len(before) != len(after):
            continue
        changed = [axis for axis in range(len(before)) if before[axis] != after[axis]]
        if not changed:
            axes[path] = None
        elif len(changed) == 1 and (before[changed[0]], after[changed[0]]) == (batch, batch + 1):
            axes[path] = changed[0]
    return axes
