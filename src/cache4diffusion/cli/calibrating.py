"""The command that measures what methods must know before sampling: ``calibrate``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from cache4diffusion.cli.common import (
    ArgOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    print_json,
    values_of,
)
from cache4diffusion.errors import SettingError


def calibrate(
    model: Annotated[
        list[str], typer.Argument(help="A reference model or a pipeline's folder; with --merge, the shards.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The calibration to write.")],
    method: Annotated[
        str | None, typer.Option("--method", help="A method, such as teacache or 'teacache(threshold=0.1)'.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="A file with one prompt per line; reference models: captions of training."),
    ] = None,
    captions: Annotated[int | None, typer.Option("--captions", "-n", help="How many; all of the file, or 16.")] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=2, help="Sampling steps; the model's own by default.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the first prompt; the others follow.")] = 0,
    trial: Annotated[
        int, typer.Option("--trial", min=0, help="Sample so many prompts with it, beside what needs no calibration.")
    ] = 4,
    merge: Annotated[bool, typer.Option("--merge", help="Join calibrations made with different prompts.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="What is measured, name=value, as c4d show lists it.")
    ] = None,
    arguments: ArgOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure on your pipeline what a method must know before sampling, and say whether it will work there.

    Example: c4d calibrate scenes-flux --method teacache --captions 16 --out teacache.safetensors
    """
    import cache4diffusion as c4d
    from cache4diffusion.calibration import load_calibration, merge_calibrations
    from cache4diffusion.calibration.run import calibrate as run
    from cache4diffusion.calibration.store import statistic_of
    from cache4diffusion.cli.models import load_model, prompts_to_calibrate, read_prompts
    from cache4diffusion.compare import parse_method
    from cache4diffusion.files import check_writable, write_whole

    check_writable(out)
    if merge:
        if method is not None or prompts is not None:
            raise SettingError("--merge joins files: write c4d calibrate --merge SHARD SHARD --out FILE.")
        made = merge_calibrations([load_calibration(shard) for shard in model])
    else:
        if method is None:
            raise SettingError("--method is missing: write for example --method teacache.")
        if len(model) != 1:
            raise SettingError(f"{' '.join(model)}: give one model, or join calibrations with --merge.")
        options = values_of(settings, "--set")
        name, values = parse_method(method)
        statistic_of(name, options)  # what can be wrong is found before the model is loaded
        given = c4d.method(name, **values)
        if prompts is not None:
            read_prompts(prompts)
        loaded = load_model(model[0], values_of(arguments, "--arg"), device, dtype)
        asked = prompts_to_calibrate(loaded, captions, prompts, seed)
        steps = steps or loaded.steps
        common = {"steps": steps, "call": loaded.call, "trial": trial, "progress": True}
        made = run(loaded.pipe, given, asked, seeds=seed, out=out, **common, **options)
    made.save(out)
    plots = {name: out.with_name(f"{out.stem}.{name}.svg") for name in made.plots()}
    for name, text in made.plots().items():
        write_whole(plots[name], text)
    if as_json:
        quality = {name: dataclasses.asdict(entry.quality) for name, entry in made.entries.items()}
        tried = dataclasses.asdict(made.trial) if made.trial is not None else None
        facts = {"method": made.method, "options": made.options, "quality": quality, "trial": tried}
        facts |= {"verdict": made.verdict(), "is_sound": made.is_sound}
        provenance = dataclasses.asdict(made.provenance)
        print_json({"path": str(out), "plots": [str(p) for p in plots.values()], **facts, "provenance": provenance})
        return
    typer.echo("\n".join([made.verdict(), str(out), *map(str, plots.values())]))
