"""The command line as a whole: every command, in the order of ``c4d --help``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

from cache4diffusion.cli.calibrating import calibrate
from cache4diffusion.cli.facts import cite, methods, show
from cache4diffusion.cli.inspecting import inspect
from cache4diffusion.cli.measuring import bench, demo, generate, report, selfcheck
from cache4diffusion.errors import Cache4DiffusionError

app = typer.Typer(
    name="c4d",
    help="Feature caching for diffusion models: run methods, compare them honestly, and check that they do no harm.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)


def _guarded(function: Callable[..., None]) -> Any:
    """The same command: errors of ours end in one line on stderr and exit code 2, an interruption in 130."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except Cache4DiffusionError as error:
            typer.echo(f"c4d: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("\nc4d: interrupted; results are written when a command ends, so there are none.", err=True)
            raise typer.Exit(130) from None

    return guarded


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


for _command in (methods, show, cite, inspect, generate, bench, demo, calibrate, selfcheck, report):
    app.command(name=_command.__name__)(_guarded(_command))
