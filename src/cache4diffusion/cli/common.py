"""What commands share: options, settings written as text, and ways to print."""

from __future__ import annotations

import ast
import json
import sys
from typing import Annotated, Any

import typer

from cache4diffusion.errors import SettingError

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
CacheDtypeOption = Annotated[
    str | None,
    typer.Option("--cache-dtype", help="What the cache is kept in: bf16, fp16, fp32, fp8, int8; else as it is."),
]
CacheDeviceOption = Annotated[
    str | None, typer.Option("--cache-device", help="Where the cache lies: cpu, or a device; else beside the features.")
]
BudgetOption = Annotated[
    str | None, typer.Option("--memory-budget", help="Refuse a cache that takes more on the device, such as 2GiB.")
]
DowngradeOption = Annotated[
    bool, typer.Option("--allow-downgrade", help="Take what fits the budget instead: see docs/memory.md.")
]
ArgOption = Annotated[
    list[str] | None,
    typer.Option("--arg", help="An argument of the pipeline's call, name=value, such as height=512; may be repeated."),
]


def cache_options(
    cache_dtype: str | None,
    cache_device: str | None,
    memory_budget: str | None = None,
    allow_downgrade: bool = False,
) -> dict[str, Any]:
    """The options of a cache that were given."""
    found = {"cache_dtype": cache_dtype, "cache_device": cache_device, "memory_budget": memory_budget}
    given = {name: value for name, value in found.items() if value is not None}
    return given | ({"allow_downgrade": True} if allow_downgrade else {})


def method_with(
    method: str | None, settings: list[str] | None, options: dict[str, Any] | None = None
) -> tuple[str | None, dict[str, Any]]:
    """A method's name and its settings, those in its brackets and those of ``--set``, and options of its cache.

    Raises:
        SettingError: there are settings and no method, or they cannot be read.
    """
    from cache4diffusion.compare import parse_method

    if method is None:
        if settings or options:
            words = "--set" if settings else f"--{next(iter(options or {})).replace('_', '-')}"
            raise SettingError(f"{words} needs a method: add --method NAME.")
        return None, {}
    name, given = parse_method(method)
    return name, {**given, **values_of(settings, "--set"), **(options or {})}


def text_of(name: str | None, settings: dict[str, Any]) -> str:
    """``name(setting=value)``."""
    return f"{name}({assignments(settings)})"


def assignments(settings: dict[str, Any]) -> str:
    """``setting=value, ...``."""
    return ", ".join(f"{key}={value!r}" for key, value in settings.items())


def values_of(pairs: list[str] | None, option: str) -> dict[str, Any]:
    """``["interval=5", "mode=fast"]`` as a dict; what is no Python literal is a text.

    Raises:
        SettingError: one of them is no ``name=value``.
    """
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


def source_line(info: Any) -> str:
    """What to cite, and where it is."""
    return info.citation + (f". https://arxiv.org/abs/{info.arxiv}" if info.arxiv else ".")


def plain(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def print_json(facts: Any) -> None:
    """Facts for machines."""
    typer.echo(json.dumps(facts, indent=1, ensure_ascii=False))


def terminal() -> Any:
    """Where tables are printed: as wide as the terminal, or wide enough in a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


def status(text: str) -> Any:
    """A line on stderr while something takes its time."""
    from rich.console import Console

    return Console(stderr=True).status(text)
