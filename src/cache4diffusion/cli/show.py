"""What is known of methods before any sampling: the list by family, published settings, strips, bytes."""

from __future__ import annotations

from typing import Any

from cache4diffusion.accelerate import Choice
from cache4diffusion.info import FAMILIES, MethodInfo
from cache4diffusion.method import Method
from cache4diffusion.options import Options
from cache4diffusion.storage import Storage
from cache4diffusion.strip import planned_strip

NOT_REMEASURED = "not re-measured on real weights"


def published_of(info: MethodInfo) -> list[dict[str, Any]]:
    """The published settings of a method, and whether their effect was measured again."""
    return [
        {"name": name, "settings": dict(settings), "remeasured": name in info.remeasured}
        for name, settings in info.published.items()
    ]


def source_of(row: dict[str, Any]) -> str:
    """Where a method of the registry is from, in a word: its paper's number, or what there is instead."""
    if row["arxiv"]:
        return f"arXiv:{row['arxiv']}"
    return str({"code": "released code", "ours": "ours"}.get(row["fidelity"], row["citation"]))


def by_family(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the registry under the family they belong to; families without methods are left out."""
    groups = {family: [row for row in rows if row["family"] == family] for family in FAMILIES}
    return {family: found for family, found in groups.items() if found}


def methods_table(rows: list[dict[str, Any]]) -> str:
    """The registry as a markdown table, as it stands in the README."""
    lines = [
        "| family | name | use it when | site x gate x predictor | fidelity | source |",
        "|---|---|---|---|---|---|",
    ]
    for row in (row for group in by_family(rows).values() for row in group):
        axes = [row[axis] for axis in ("site", "gate", "predictor", "tokens") if row[axis]]
        source = source_of(row)
        if row["arxiv"]:
            source = f"[{row['arxiv']}](https://arxiv.org/abs/{row['arxiv']})"
        cells = (row["family"], f"`{row['name']}`", row["when"], " x ".join(axes), row["fidelity"], source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def quotes_published(settings: list[dict[str, Any]]) -> bool:
    """Whether the line of a setting quotes a paper or its code."""
    return any(source in entry["doc"] for entry in settings for source in ("Code:", "Paper:"))


def strip_of(method: Method, steps: int) -> str | None:
    """One letter per step of a run without surprises; None where it depends on what is sampled or was calibrated."""
    if method.info.needs_calibration and method.loaded is None:
        return None
    return planned_strip(method.compose(), steps)


def count_cache(
    chosen: Method,
    storage: Storage,
    model: str,
    resolution: int | None,
    steps: int | None,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """Bytes of a method's cache on a model, in all and by device and dtype, and what of the call they depend on.

    Args:
        chosen: the method.
        storage: how snapshots are kept.
        model: one of `SHAPES`, which needs no weights, or what `load_model` takes.
        resolution: side of the image in pixels; None: the model's own.
        steps: of the run; None: the model's own.
        arguments: of the pipeline's call.

    Raises:
        SettingError: the resolution or an argument is not accepted.
    """
    from cache4diffusion.errors import SettingError
    from cache4diffusion.memory import footprint
    from cache4diffusion.shapes import SHAPES

    choice = Choice(chosen, {}, Options(storage))
    if model in SHAPES:
        if arguments:
            raise SettingError(f"--arg is for pipelines; {model} is known by its shapes alone.")
        known, steps = SHAPES[model], steps or 50
        side = resolution or known.resolution
        # Without weights it is nowhere; where it runs, the host's memory is another device.
        found = footprint(known.denoiser(), choice, inputs=known.calls(height=side), steps=steps, pretends=True)
        frames = f", {known.frames} frames" if known.frames > 1 else ""
        branches = f", {known.branches} CFG branches" if known.branches > 1 else ""
        conditions = f"{model}, {side} x {side} pixels{frames}{branches}, {steps} steps, bfloat16"
        return _counted(found, conditions)
    from cache4diffusion.calls import default_steps, examples, subject
    from cache4diffusion.cli.models import load_model

    loaded = load_model(model, arguments)
    call = {**loaded.call, **({} if resolution is None else {"height": resolution, "width": resolution})}
    steps = steps or loaded.steps or default_steps(loaded.pipe)
    one = {subject(loaded.pipe): examples(loaded.pipe)[:1]}
    found = footprint(loaded.pipe, choice, call={**one, **call}, steps=steps)
    words = [f"{name}={value!r}" for name, value in call.items()]
    return _counted(found, ", ".join([loaded.name, "one image", f"{steps} steps", *words]))


def _counted(found: Any, conditions: str) -> dict[str, Any]:
    places = {" ".join(place): count for place, count in found.places.items()}
    return {"bytes": found.total, "places": places, "conditions": conditions}
