"""Commands that sample, and say what caching did: ``generate``, ``bench``, ``demo``, ``selfcheck``, ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cache4diffusion.cli.common import (
    ArgOption,
    BudgetOption,
    CacheDeviceOption,
    CacheDtypeOption,
    DeviceOption,
    DowngradeOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    SetOption,
    cache_options,
    method_with,
    print_json,
    status,
    terminal,
    text_of,
    values_of,
)
from cache4diffusion.errors import Cache4DiffusionError, RunError, SettingError


def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to draw.")],
    model: ModelOption = "scenes-flux",
    method: Annotated[
        str | None, typer.Option("--method", help="A method, or name(setting=value); none: uncached.")
    ] = None,
    settings: SetOption = None,
    arguments: ArgOption = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Sampling steps; the model's own by default.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the noise.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    cache_dtype: CacheDtypeOption = None,
    cache_device: CacheDeviceOption = None,
    memory_budget: BudgetOption = None,
    allow_downgrade: DowngradeOption = False,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The PNG to write; for a video also .webp or .gif."),
    ] = Path("image.png"),
    as_json: JsonOption = False,
) -> None:
    """Draw one image, with the settings in the PNG's metadata.

    Example: c4d generate --prompt "a red circle on a gray background" --method "taylorseer(interval=5)"
    """
    from contextlib import nullcontext

    import torch

    from cache4diffusion import __version__, accelerate
    from cache4diffusion.calls import default_steps, quiet, sampler
    from cache4diffusion.cli.image import save_image
    from cache4diffusion.cli.models import load_model
    from cache4diffusion.compare import check_methods
    from cache4diffusion.files import check_writable
    from cache4diffusion.settings import plain

    options = cache_options(cache_dtype, cache_device, memory_budget, allow_downgrade)
    name, given = method_with(method, settings, options)
    check_methods([text_of(name, given)] if name is not None else [])  # fails before the model is loaded
    check_writable(out)
    loaded = load_model(model, values_of(arguments, "--arg"), device, dtype)
    asked = loaded.prompt(prompt)
    steps = steps or loaded.steps or default_steps(loaded.pipe)
    facts: dict[str, Any] = {"model": model, "prompt": prompt, "steps": steps, "seed": seed, "arguments": loaded.call}
    sample = sampler(loaded.pipe, loaded.call)
    with accelerate(loaded.pipe, name, **given) if name is not None else nullcontext() as handle:
        with quiet(loaded.pipe), status(f"{steps} steps"), torch.inference_mode():
            try:
                image = sample([asked], [seed], steps)[0]
            except Cache4DiffusionError:
                raise
            except Exception as error:  # the host's own code may raise anything
                raise RunError(f"{type(loaded.pipe).__name__} failed: {type(error).__name__}: {error}") from error
        report = handle.report() if handle is not None else None
        strip = handle.stats["strip"] if handle is not None else None
        if handle is not None and handle.choice is not None:
            facts |= {"method": handle.choice.name, "settings": plain(handle.choice.settings)}
    facts |= {"strip": strip, "cache4diffusion": __version__}
    path = save_image(image, out, facts)
    if as_json:
        print_json({"path": str(path), **facts, "report": report.splitlines() if report else None})
        return
    if report:
        typer.echo(report)
    typer.echo(str(path))


def bench(
    methods: Annotated[
        str, typer.Option("--methods", help="Comma-separated names, each maybe with (settings); or all.")
    ],
    model: ModelOption = "scenes-flux",
    calibrations: Annotated[
        Path | None,
        typer.Option("--calibrations", help="With all: a folder with METHOD.safetensors; reference models have own."),
    ] = None,
    captions: Annotated[int | None, typer.Option("--captions", "-n", help="How many; 16 by default.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A file with one prompt per line.")] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Sampling steps; the model's own by default.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Captions per call of the pipeline.")] = 16,
    seed: Annotated[int, typer.Option("--seed", help="Of the first caption; the others follow.")] = 0,
    settings: SetOption = None,
    arguments: ArgOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    cache_dtype: CacheDtypeOption = None,
    cache_device: CacheDeviceOption = None,
    memory_budget: BudgetOption = None,
    allow_downgrade: DowngradeOption = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for report.html and results.json.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure methods against the uncached pipeline and against fewer steps of equal cost.

    Example: c4d bench --model scenes-flux --methods "taylorseer(interval=5,order=1),dbcache" --captions 16 --json
    """
    from cache4diffusion.compare import parse_method, split_methods

    entries: list[str] | Literal["all"] = "all" if methods == "all" else split_methods(methods)
    if methods == "all" and (settings or cache_options(cache_dtype, cache_device, memory_budget, allow_downgrade)):
        raise SettingError("--methods all runs every method with settings of its own: leave out --set and --cache-....")
    if calibrations is not None and methods != "all":
        raise SettingError("--calibrations is for --methods all; name one method's as 'name(calibration=FILE)'.")
    if settings:
        if len(entries) != 1:
            raise SettingError("--set needs exactly one method; with several write settings as 'name(setting=value)'.")
        entries = [text_of(*method_with(entries[0], settings))]
    options = cache_options(cache_dtype, cache_device, memory_budget, allow_downgrade)
    if options:  # of all methods; what a method says of itself goes first
        entries = [text_of(name, {**options, **own}) for name, own in map(parse_method, entries)]
    wanted = (model, values_of(arguments, "--arg"), device, dtype)
    measured = _measure(wanted, entries, captions, prompts, steps, batch, seed, out, calibrations)
    _print_results(measured, out, as_json)


# What the demo compares: one method of each kind of site and gate. A guided run settles its layout in the first fifth,
# where no forecast is good, so the warm-ups are longer than published ones for larger models. Then changes slow down
# step by step: intervals that widen need as many full steps as equal ones, and leave far smaller errors.
DEMO_METHODS: tuple[str, ...] = (
    "taylorseer-lite(warmup=10, gate='widening(warmup=10, window=3, growth=1)')",
    "taylorseer-lite(interval=6, warmup=10)",
    "speca(warmup=10)",
    "taylorseer(interval=6, warmup=10)",
    "dbcache(threshold=0.12, front=1, warmup=8)",
    "teacache(threshold=0.1)",
)


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for report.html and results.json.")] = Path("out"),
    captions: Annotated[int, typer.Option("--captions", "-n", help="More captions, narrower intervals.")] = 32,
    methods: Annotated[str | None, typer.Option("--methods", help="Other methods, comma-separated.")] = None,
    model: ModelOption = "scenes-flux",
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Sampling steps; the model's own by default.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Captions per call of the pipeline.")] = 16,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a trained FLUX pipeline several times faster and prove it: report.html and results.json, offline.

    Example: c4d demo --out out
    """
    from cache4diffusion.compare import split_methods

    entries = split_methods(methods) if methods else list(DEMO_METHODS)
    measured = _measure((model, {}, device, dtype), entries, captions, None, steps, batch, 0, out)
    _print_results(measured, out, as_json)


def selfcheck(
    model: ModelOption = "scenes-flux",
    methods: Annotated[str | None, typer.Option("--methods", help="Comma-separated; all that fit by default.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=4, help="Of each short run.")] = 6,
    arguments: ArgOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prove on this pipeline that caching does no harm: every invariant, method by method. Exit code 1 if one fails.

    Example: c4d selfcheck --model scenes-flux --methods taylorseer,fbcache --json
    """
    from cache4diffusion.cli.models import load_model
    from cache4diffusion.compare import check_methods, split_methods
    from cache4diffusion.selfcheck import selfcheck as check

    entries = split_methods(methods) if methods else None
    check_methods(entries or [])
    loaded = load_model(model, values_of(arguments, "--arg"), device, dtype)
    found = check(loaded.pipe, entries, call=loaded.call, steps=steps, progress=True)
    if as_json:
        print_json({"model": model, **found.to_dict()})
    else:
        typer.echo(str(found))
    if not found.ok:
        raise typer.Exit(1)


def report(
    file: Annotated[Path, typer.Argument(help="A results.json of bench, demo or compare().")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The HTML file; beside FILE by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the HTML report of results again, with the images if they lie beside them.

    Example: c4d report out/results.json
    """
    from cache4diffusion.cli.image import load_images
    from cache4diffusion.measure import Results, write_report

    results = Results.load(file)
    images, captions = load_images(file.parent / "images", results)
    path = write_report(results, images, captions, out or file.with_name("report.html"))
    if as_json:
        print_json({"report": str(path), "rows": [row.name for row in results.rows], "images": bool(images)})
    else:
        typer.echo(str(path))


def _measure(
    wanted: tuple[str, dict[str, Any], str | None, str | None],
    entries: list[str] | Literal["all"],
    count: int | None,
    prompts: Path | None,
    steps: int | None,
    batch: int,
    seed: int,
    out: Path | None,
    calibrations: Path | None = None,
) -> Any:
    from cache4diffusion.cli.image import save_images
    from cache4diffusion.cli.models import captions_for, load_model, read_prompts
    from cache4diffusion.compare import check_methods, compare
    from cache4diffusion.data import calibrated_models
    from cache4diffusion.files import check_writable
    from cache4diffusion.ladder import ladder

    # What can be wrong is found before the model is loaded.
    if not entries:
        raise SettingError("--methods names none: write for example --methods taylorseer,dbcache.")
    if entries == "all":
        ladder(calibrations)
    else:
        check_methods(entries)
    if prompts is not None:
        read_prompts(prompts)
    if out is not None:
        check_writable(out / "report.html")
    loaded = load_model(*wanted)
    captions, loaded = captions_for(loaded, count, prompts, seed)
    measured = compare(
        loaded.pipe,
        captions,
        entries,
        calibrations=calibrations or (loaded.name if entries == "all" and loaded.name in calibrated_models() else None),
        seeds=seed,
        steps=steps or loaded.steps,
        batch=batch,
        judge=loaded.judge,
        family=loaded.family,
        name=loaded.name,
        call=loaded.call,
        report=out / "report.html" if out else None,
        results=out / "results.json" if out else None,
        flops_captions=2,
    )
    if out is not None:
        save_images(out / "images", measured)
    return measured


def _print_results(measured: Any, out: Path | None, as_json: bool) -> None:
    if as_json:
        typer.echo(measured.results.to_json(), nl=False)
        return
    from cache4diffusion.measure import console_table
    from cache4diffusion.measure.table import left_out

    console = terminal()
    console.print(console_table(measured.results, width=console.width))
    for line in left_out(measured.results):
        typer.echo(line)
    if out is not None:
        typer.echo(f"{out / 'report.html'}\n{out / 'results.json'}")
