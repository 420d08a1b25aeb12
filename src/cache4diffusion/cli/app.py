"""The commands of ``c4d``."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cache4diffusion.errors import Cache4DiffusionError, RunError

app = typer.Typer(
    name="c4d",
    help="Feature caching for diffusion models: run methods, compare them honestly, and check that they do no harm.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")]
ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="A reference model (scenes-flux) or a pipeline's folder.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of the method, name=value; may be repeated.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", help="cpu, cuda:0, mps ...; your own folders: the accelerator by default, if there is one."
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="Of the weights: float32 (default on the CPU), bfloat16 (on an accelerator), float16."
    ),
]
ArgOption = Annotated[
    list[str] | None,
    typer.Option("--arg", help="An argument of the pipeline's call, name=value, such as height=512; may be repeated."),
]


def command(function: Callable[..., None]) -> Any:
    """Register a command whose errors of ours end in one line on stderr and exit code 2."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except Cache4DiffusionError as error:
            typer.echo(f"c4d: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None

    return app.command(name=function.__name__)(guarded)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from cache4diffusion import __version__

        typer.echo(f"cache4diffusion {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


# --- facts about methods ----------------------------------------------------------------------------------------------


@command
def methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the README.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the methods.

    Example: c4d methods --json
    """
    from cache4diffusion.cli.show import methods_table, source_of
    from cache4diffusion.method import METHODS

    rows = [{**METHODS[name].row(), "citation": METHODS[name].info.citation} for name in sorted(METHODS)]
    if as_json:
        _print_json(rows)
        return
    if markdown:
        typer.echo(methods_table(rows))
        return
    from rich.table import Table

    table = Table(header_style="bold", caption="fidelity: code (from released code), paper, reconstructed, ours")
    for column in ("name", "cached", "when", "predicted by", "fidelity", "source"):
        table.add_column(column, overflow="fold")
    for row in rows:
        predictor = row["predictor"] + (f", tokens: {row['tokens']}" if row["tokens"] else "")
        table.add_row(row["name"], row["site"], row["gate"], predictor, row["fidelity"], source_of(row))
    _console().print(table)


@command
def show(
    method: Annotated[str, typer.Argument(help="A method's name, or name(setting=value).")],
    settings: SetOption = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Also count its cache on this: flux.1-dev ..., scenes-flux, or a folder."),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option("--resolution", min=1, help="Side of the image in pixels; the model's own by default.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=2, help="Of the run that is counted.")] = None,
    arguments: ArgOption = None,
    as_json: JsonOption = False,
) -> None:
    """Explain a method: formula, settings with published values, cost, and its strip over 20 steps.

    Example: c4d show taylorseer --set order=1 --model flux.1-dev --resolution 1024
    """
    import inspect

    from cache4diffusion.calibration.store import command as calibrate_command
    from cache4diffusion.cli.show import NOT_REMEASURED, count_cache, published_of, quotes_published, strip_of
    from cache4diffusion.measure.table import size
    from cache4diffusion.method import method as make

    name, given = _method_with(method, settings)
    assert name is not None
    chosen = make(name, **given)
    call = _values(arguments, "--arg")
    counted = None
    if model is not None:
        with _status(f"counting on {model}"):
            counted = count_cache(chosen, model, resolution, steps, call)
    elif resolution or steps or call:
        from cache4diffusion.errors import SettingError

        raise SettingError("--resolution, --steps and --arg say how --model is to be called: add --model.")
    info, text = chosen.info, inspect.getdoc(type(chosen)) or ""
    strip = strip_of(chosen, 20)
    published = published_of(info)
    if as_json:
        entries = [{**entry, "default": _plain(entry["default"])} for entry in chosen.describe()]
        facts = {"doc": text, "settings": entries, "published": published, "calibration": None, "cache": counted}
        if chosen.calibrator is not None:
            measured = [{**entry, "default": _plain(entry["default"])} for entry in chosen.calibrator.describe()]
            facts["calibration"] = {"command": calibrate_command(info.name), "options": measured}
        _print_json({**chosen.row(), **facts, "strip": strip, "citation": info.citation})
        return
    out = [f"{info.title}  ({info.name})", "", info.use, "", text, "", "Settings"]
    width = max(len(entry["name"]) for entry in chosen.describe())
    out += [
        f"  {entry['name']:<{width}}  {entry['default']!r}  [{entry['accepts']}]  {entry['doc']}"
        for entry in chosen.describe()
    ]
    for is_remeasured, words in ((True, "re-measured here"), (False, NOT_REMEASURED)):
        rows = [row for row in published if row["remeasured"] is is_remeasured]
        width = max((len(row["name"]) for row in rows), default=0)
        out += ["", f"Published settings, {words}"] if rows else []
        out += [f"  {row['name']:<{width}}  {_assignments(row['settings'])}" for row in rows]
    if not info.remeasured and quotes_published(chosen.describe()):
        out += ["", f"Values behind 'Code:' and 'Paper:' are published ones, {NOT_REMEASURED}."]
    if chosen.calibrator is not None:
        need = "Needs a calibration" if info.needs_calibration else "Can be calibrated"
        measured = chosen.calibrator.describe()
        width = max((len(entry["name"]) for entry in measured), default=0)
        out += ["", f"{need} on your denoiser: {calibrate_command(info.name)}"]
        out += [f"{' ' * 2}--set {entry['name']:<{width}}  {entry['default']!r}  {entry['doc']}" for entry in measured]
    if counted is not None:
        out += ["", f"Cache      {size(counted['bytes'])} with {_text(name, given)}: {counted['conditions']}"]
    off = _assignments(info.off)
    when = "in the calibration" if info.needs_calibration else "while sampling"
    out += ["", f"20 steps   {strip or f'decided {when}, by {info.gate}'}", f"Off        {off}"]
    out += [f"Fidelity   {info.fidelity}", f"Source     {_source(info)}"]
    typer.echo("\n".join(out))


@command
def cite(method: Annotated[str, typer.Argument(help="A method's name.")], as_json: JsonOption = False) -> None:
    """Print what to cite for a method.

    Example: c4d cite taylorseer
    """
    from cache4diffusion.method import method as make

    info = make(method).info
    if as_json:
        url = f"https://arxiv.org/abs/{info.arxiv}" if info.arxiv else None
        _print_json({"name": info.name, "citation": info.citation, "arxiv": info.arxiv, "url": url})
        return
    typer.echo(_source(info))


# --- sampling ---------------------------------------------------------------------------------------------------------


@command
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
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG to write.")] = Path("image.png"),
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
    from cache4diffusion.compare import check_methods, variants_of
    from cache4diffusion.files import check_writable

    name, given = _method_with(method, settings)
    check_methods([_text(name, given)] if name is not None else [])  # fails before the model is loaded
    check_writable(out)
    loaded = load_model(model, _values(arguments, "--arg"), device, dtype)
    asked = loaded.prompt(prompt)
    steps = steps or loaded.steps or default_steps(loaded.pipe)
    facts: dict[str, Any] = {"model": model, "prompt": prompt, "steps": steps, "seed": seed, "arguments": loaded.call}
    sample = sampler(loaded.pipe, loaded.call)
    if name is not None:
        variant = variants_of(loaded.pipe, [_text(name, given)])[0]
        facts |= {"method": name, "settings": variant.settings}
    with accelerate(loaded.pipe, name, **given) if name is not None else nullcontext() as handle:
        with quiet(loaded.pipe), _status(f"{steps} steps"), torch.inference_mode():
            try:
                image = sample([asked], [seed], steps)[0]
            except Cache4DiffusionError:
                raise
            except Exception as error:  # the host's own code may raise anything
                raise RunError(f"{type(loaded.pipe).__name__} failed: {type(error).__name__}: {error}") from error
        report = handle.report() if handle is not None else None
        strip = handle.stats["strip"] if handle is not None else None
    facts |= {"strip": strip, "cache4diffusion": __version__}
    path = save_image(image, out, facts)
    if as_json:
        _print_json({"path": str(path), **facts, "report": report.splitlines() if report else None})
        return
    if report:
        typer.echo(report)
    typer.echo(str(path))


@command
def bench(
    methods: Annotated[str, typer.Option("--methods", help="Comma-separated names, each maybe with (settings).")],
    model: ModelOption = "scenes-flux",
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
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for report.html and results.json.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure methods against the uncached pipeline and against fewer steps of equal cost.

    Example: c4d bench --model scenes-flux --methods "taylorseer(interval=5,order=1),dbcache" --captions 16 --json
    """
    from cache4diffusion.compare import split_methods

    entries = split_methods(methods)
    if settings:
        if len(entries) != 1:
            from cache4diffusion.errors import SettingError

            raise SettingError("--set needs exactly one method; with several write settings as 'name(setting=value)'.")
        entries = [_text(*_method_with(entries[0], settings))]
    wanted = (model, _values(arguments, "--arg"), device, dtype)
    measured = _measure(wanted, entries, captions, prompts, steps, batch, seed, out)
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


@command
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


@command
def calibrate(
    model: Annotated[
        list[str], typer.Argument(help="A reference model or a pipeline's folder; with --merge, the shards.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The calibration to write.")],
    method: Annotated[str | None, typer.Option("--method", help="A method's name.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="A file with one prompt per line; reference models: captions of training."),
    ] = None,
    captions: Annotated[int | None, typer.Option("--captions", "-n", help="How many; all of the file, or 16.")] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=2, help="Sampling steps; the model's own by default.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the first prompt; the others follow.")] = 0,
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
    from cache4diffusion.calibration import load_calibration, merge_calibrations
    from cache4diffusion.calibration.run import calibrate as run
    from cache4diffusion.calibration.store import statistic_of
    from cache4diffusion.cli.models import load_model, prompts_to_calibrate, read_prompts
    from cache4diffusion.errors import SettingError
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
        options = _values(settings, "--set")
        statistic_of(method, options)  # what can be wrong is found before the model is loaded
        if prompts is not None:
            read_prompts(prompts)
        loaded = load_model(model[0], _values(arguments, "--arg"), device, dtype)
        asked = prompts_to_calibrate(loaded, captions, prompts, seed)
        steps = steps or loaded.steps
        made = run(loaded.pipe, method, asked, seeds=seed, steps=steps, call=loaded.call, progress=True, **options)
    made.save(out)
    plots = {name: out.with_name(f"{out.stem}.{name}.svg") for name in made.plots()}
    for name, text in made.plots().items():
        write_whole(plots[name], text)
    if as_json:
        quality = {name: dataclasses.asdict(entry.quality) for name, entry in made.entries.items()}
        facts = {"method": made.method, "options": made.options, "quality": quality}
        provenance = dataclasses.asdict(made.provenance)
        _print_json({"path": str(out), "plots": [str(p) for p in plots.values()], **facts, "provenance": provenance})
        return
    typer.echo("\n".join([made.verdict(), str(out), *map(str, plots.values())]))


@command
def selfcheck(
    model: ModelOption = "scenes-flux",
    methods: Annotated[str | None, typer.Option("--methods", help="Comma-separated; all that fit by default.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=4, help="Of each short run.")] = 8,
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
    loaded = load_model(model, _values(arguments, "--arg"), device, dtype)
    found = check(loaded.pipe, entries, call=loaded.call, steps=steps, progress=True)
    if as_json:
        _print_json({"model": model, **found.to_dict()})
    else:
        typer.echo(str(found))
    if not found.ok:
        raise typer.Exit(1)


@command
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
        _print_json({"report": str(path), "rows": [row.name for row in results.rows], "images": bool(images)})
    else:
        typer.echo(str(path))


# --- shared -----------------------------------------------------------------------------------------------------------


def _measure(
    wanted: tuple[str, dict[str, Any], str | None, str | None],
    entries: list[str],
    count: int | None,
    prompts: Path | None,
    steps: int | None,
    batch: int,
    seed: int,
    out: Path | None,
) -> Any:
    from cache4diffusion.cli.image import save_images
    from cache4diffusion.cli.models import captions_for, load_model, read_prompts
    from cache4diffusion.compare import check_methods, compare
    from cache4diffusion.errors import SettingError
    from cache4diffusion.files import check_writable

    # What can be wrong is found before the model is loaded.
    if not entries:
        raise SettingError("--methods names none: write for example --methods taylorseer,dbcache.")
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

    console = _console()
    console.print(console_table(measured.results, width=console.width))
    if out is not None:
        typer.echo(f"{out / 'report.html'}\n{out / 'results.json'}")


def _method_with(method: str | None, settings: list[str] | None) -> tuple[str | None, dict[str, Any]]:
    from cache4diffusion.compare import parse_method
    from cache4diffusion.errors import SettingError

    if method is None:
        if settings:
            raise SettingError("--set needs a method: add --method NAME.")
        return None, {}
    name, given = parse_method(method)
    return name, {**given, **_values(settings, "--set")}


def _text(name: str | None, settings: dict[str, Any]) -> str:
    return f"{name}({_assignments(settings)})"


def _assignments(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in settings.items())


def _values(pairs: list[str] | None, option: str) -> dict[str, Any]:
    """``["interval=5", "mode=fast"]`` as a dict; what is no Python literal is a text."""
    import ast

    from cache4diffusion.errors import SettingError

    found: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise SettingError(f"{option} {pair!r}: write it like name=value.")
        try:
            found[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            found[name] = value
    return found


def _source(info: Any) -> str:
    return info.citation + (f". https://arxiv.org/abs/{info.arxiv}" if info.arxiv else ".")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _print_json(facts: Any) -> None:
    typer.echo(json.dumps(facts, indent=1, ensure_ascii=False))


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


def _status(text: str) -> Any:
    from rich.console import Console

    return Console(stderr=True).status(text)
