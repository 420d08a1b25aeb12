"""Commands that say what is known about methods: ``methods``, ``show``, ``cite``."""

from __future__ import annotations

from typing import Annotated

import typer

from cache4diffusion.cli.common import (
    ArgOption,
    CacheDeviceOption,
    CacheDtypeOption,
    JsonOption,
    SetOption,
    cache_options,
    method_with,
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
    """List the methods by family, and when to use each.

    Example: c4d methods --json
    """
    from cache4diffusion.beside import BESIDE
    from cache4diffusion.cli.show import by_family, methods_table
    from cache4diffusion.method import METHODS

    rows = [METHODS[name].row() if name in METHODS else BESIDE[name].row() for name in sorted({*METHODS, *BESIDE})]
    if as_json:
        print_json(rows)
        return
    if markdown:
        typer.echo(methods_table(rows))
        return
    from rich.table import Table

    table = Table(
        box=None,
        pad_edge=False,
        header_style="bold",
        caption="fidelity: code (from released code), paper, reconstructed, ours. c4d show NAME explains a method.",
        caption_justify="left",
    )
    for column in ("name", "use it when", "fidelity"):
        table.add_column(column, overflow="fold")
    for family, members in by_family(rows).items():
        table.add_row(f"\n{family}", style="bold")
        for row in members:
            table.add_row(f"  {row['name']}", row["when"], row["fidelity"])
            for need in row["needs"]:
                table.add_row("", f"  needs {need}", "")
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
    cache_dtype: CacheDtypeOption = None,
    cache_device: CacheDeviceOption = None,
    arguments: ArgOption = None,
    as_json: JsonOption = False,
) -> None:
    """Explain a method: formula, settings with published values, cost, what it needs, and its strip over 20 steps.

    Example: c4d show taylorseer --set order=1 --model flux.1-dev --cache-dtype fp8
    """
    from cache4diffusion.beside import BESIDE
    from cache4diffusion.cli.card import card_beside, card_of, facts_of
    from cache4diffusion.cli.show import count_cache
    from cache4diffusion.method import method as make
    from cache4diffusion.options import Options, take_options

    name, given = method_with(method, settings, cache_options(cache_dtype, cache_device))
    assert name is not None
    if name in BESIDE and not (given or model):
        if as_json:
            print_json(BESIDE[name].row())
        else:
            typer.echo(card_beside(BESIDE[name]))
        return
    words = text_of(name, given)
    storage = Options.of(take_options(given)).storage
    chosen = make(name, **given)
    call = values_of(arguments, "--arg")
    counted = None
    if model is not None:
        with status(f"counting on {model}"):
            counted = count_cache(chosen, storage, model, resolution, steps, call)
    elif resolution or steps or call or not storage.is_plain:
        raise SettingError(
            "--resolution, --steps, --arg, --cache-dtype and --cache-device are for counting a cache: add --model."
        )
    if as_json:
        print_json(facts_of(chosen) | {"cache": counted})
    else:
        typer.echo(card_of(chosen, words, counted))


def cite(method: Annotated[str, typer.Argument(help="A method's name.")], as_json: JsonOption = False) -> None:
    """Print what to cite for a method.

    Example: c4d cite taylorseer
    """
    from cache4diffusion.beside import BESIDE
    from cache4diffusion.method import method as make

    info = BESIDE.get(method) or make(method).info
    if as_json:
        url = f"https://arxiv.org/abs/{info.arxiv}" if info.arxiv else None
        print_json({"name": info.name, "citation": info.citation, "arxiv": info.arxiv, "url": url})
        return
    typer.echo(source_line(info))
