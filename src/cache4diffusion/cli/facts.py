"""Commands that say what is known about methods: ``methods``, ``show``, ``cite``."""

from __future__ import annotations

from typing import Annotated

import typer

from cache4diffusion.cli.common import (
    ArgOption,
    JsonOption,
    SetOption,
    assignments,
    method_with,
    plain,
    print_json,
    source_line,
    status,
    terminal,
    text_of,
    values_of,
)
from cache4diffusion.errors import SettingError


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
        print_json(rows)
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
    terminal().print(table)


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

    name, given = method_with(method, settings)
    assert name is not None
    chosen = make(name, **given)
    call = values_of(arguments, "--arg")
    counted = None
    if model is not None:
        with status(f"counting on {model}"):
            counted = count_cache(chosen, model, resolution, steps, call)
    elif resolution or steps or call:
        raise SettingError("--resolution, --steps and --arg say how --model is to be called: add --model.")
    info, text = chosen.info, inspect.getdoc(type(chosen)) or ""
    strip = strip_of(chosen, 20)
    published = published_of(info)
    if as_json:
        entries = [{**entry, "default": plain(entry["default"])} for entry in chosen.describe()]
        facts = {"doc": text, "settings": entries, "published": published, "calibration": None, "cache": counted}
        if chosen.calibrator is not None:
            measured = [{**entry, "default": plain(entry["default"])} for entry in chosen.calibrator.describe()]
            facts["calibration"] = {"command": calibrate_command(info.name), "options": measured}
        print_json({**chosen.row(), **facts, "strip": strip, "citation": info.citation})
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
        out += [f"  {row['name']:<{width}}  {assignments(row['settings'])}" for row in rows]
    if not info.remeasured and quotes_published(chosen.describe()):
        out += ["", f"Values behind 'Code:' and 'Paper:' are published ones, {NOT_REMEASURED}."]
    if chosen.calibrator is not None:
        need = "Needs a calibration" if info.needs_calibration else "Can be calibrated"
        measured = chosen.calibrator.describe()
        width = max((len(entry["name"]) for entry in measured), default=0)
        out += ["", f"{need} on your denoiser: {calibrate_command(info.name)}"]
        out += [f"{' ' * 2}--set {entry['name']:<{width}}  {entry['default']!r}  {entry['doc']}" for entry in measured]
    if counted is not None:
        out += ["", f"Cache      {size(counted['bytes'])} with {text_of(name, given)}: {counted['conditions']}"]
    off = assignments(info.off)
    when = "in the calibration" if info.needs_calibration else "while sampling"
    out += ["", f"20 steps   {strip or f'decided {when}, by {info.gate}'}", f"Off        {off}"]
    out += [f"Fidelity   {info.fidelity}", f"Source     {source_line(info)}"]
    typer.echo("\n".join(out))


def cite(method: Annotated[str, typer.Argument(help="A method's name.")], as_json: JsonOption = False) -> None:
    """Print what to cite for a method.

    Example: c4d cite taylorseer
    """
    from cache4diffusion.method import method as make

    info = make(method).info
    if as_json:
        url = f"https://arxiv.org/abs/{info.arxiv}" if info.arxiv else None
        print_json({"name": info.name, "citation": info.citation, "arxiv": info.arxiv, "url": url})
        return
    typer.echo(source_line(info))
