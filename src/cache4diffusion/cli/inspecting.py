"""The command that looks at denoisers: ``inspect``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from cache4diffusion.cli.common import ArgOption, JsonOption, print_json, status, values_of
from cache4diffusion.errors import SettingError


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(help="A reference model (scenes-flux), a pipeline's folder, or a denoiser class of diffusers."),
    ] = None,
    all_diffusers: Annotated[
        bool, typer.Option("--all-diffusers", help="Every denoiser class that the installed diffusers has, tiny.")
    ] = False,
    arguments: ArgOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how a denoiser is built, what of that was observed or assumed, and which methods can serve it.

    Example: c4d inspect FluxTransformer2DModel --json
    """
    if (model is None) != all_diffusers:
        raise SettingError("Give a model, or --all-diffusers.")
    call = values_of(arguments, "--arg")
    with status("looking" if model is None else f"looking at {model}"):
        rows = list(_every_class() if model is None else _of_model(model, call))
    if as_json:
        print_json([_facts(name, found) for name, found in rows])
    else:
        typer.echo("\n\n".join(_text(name, found) for name, found in rows))


def _facts(name: str, found: Any) -> dict[str, Any]:
    if isinstance(found, str):
        return {"class": name, "stacks": [], "streams": [], "parts": [], "methods": {}, "hints": [], "unknown": found}
    return found.facts() | {"name": name}


def _text(name: str, found: Any) -> str:
    return f"{name}: {found}" if isinstance(found, str) else f"{name}\n{found}"


def _every_class() -> Iterator[tuple[str, Any]]:
    from cache4diffusion.zoo import TINY, denoiser_classes

    for name in denoiser_classes():
        yield name, _of_class(name) if name in TINY else "no configuration is known of this class yet"


def _of_class(name: str) -> Any:
    from cache4diffusion.inspection import inspect_denoiser
    from cache4diffusion.zoo import tiny

    return inspect_denoiser(*tiny(name).make())


def _of_model(name: str, call: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    from cache4diffusion.accelerate import denoisers_of
    from cache4diffusion.inspection import inspect_denoiser
    from cache4diffusion.memory import calls_of
    from cache4diffusion.zoo import TINY

    if name in TINY:
        if call:
            raise SettingError(f"--arg is for pipelines; {name} is called with arguments of its own.")
        yield name, _of_class(name)
        return
    from cache4diffusion.calls import examples, subject
    from cache4diffusion.cli.models import load_model

    loaded = load_model(name, call)
    found = denoisers_of(loaded.pipe)
    one = {subject(loaded.pipe): examples(loaded.pipe)[:1]}
    calls, _ = calls_of(loaded.pipe, found, call={**one, **loaded.call}, steps=loaded.steps)
    for key, module in found.items():
        yield key, inspect_denoiser(module, *calls[key][0]) if calls[key] else "a run does not call it"
