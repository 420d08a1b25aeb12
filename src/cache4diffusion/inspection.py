"""A denoiser looked at from all sides: how it is built, how that is known, and which methods can serve it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from cache4diffusion.accelerate import attach
from cache4diffusion.anatomy import Anatomy, Block, LeafPath, observe, summary
from cache4diffusion.anatomy.hints import Hint, hint_of
from cache4diffusion.anatomy.undisturbed import unwrapped
from cache4diffusion.composition import Composition
from cache4diffusion.engine.inputs import inputs_of
from cache4diffusion.engine.maps import image_grid
from cache4diffusion.errors import AnatomyError, Cache4DiffusionError
from cache4diffusion.gates import FixedInterval
from cache4diffusion.method import METHODS, Method
from cache4diffusion.sites import Denoiser, Parts, Span, UNetLevel

Verdicts = dict[str, str | None]
"""By name: why not, or None for yes."""

SITES = {"whole": Denoiser(), "span": Span(), "parts": Parts(), "levels": UNetLevel()}


@dataclass(frozen=True)
class Inspection:
    """What is known of one denoiser.

    Args:
        anatomy: how it is built.
        hint: what was declared of its class.
        grid: frames, rows and columns of its image tokens; None if nothing tells them.
        sites: where it can be cached.
        methods: which of the registry can serve it.
    """

    anatomy: Anatomy
    hint: Hint
    grid: tuple[int, int, int] | None
    sites: Verdicts
    methods: Verdicts

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        anatomy = self.anatomy
        axes = anatomy.batch_axes[""].arguments if "" in anatomy.batch_axes else {}
        levels = anatomy.unet and {
            "skips": anatomy.unet.skips,
            "head": anatomy.unet.head,
            "down": [level.path for level in anatomy.unet.down],
            "mid": anatomy.unet.mid,
            "up": [level.path for level in anatomy.unet.up],
        }
        return {
            "class": anatomy.denoiser,
            "timestep": _word(anatomy.timestep),
            "latent": _word(anatomy.latent),
            "others": [_word(path) for path in anatomy.others],
            "conditioning": [_word(path) for path in anatomy.conditioning],
            "stacks": [
                {"path": s.path, "blocks": len(s.blocks), "main": s.is_main, "breaks": list(s.breaks)}
                for s in anatomy.stacks
            ],
            "streams": list(_distinct(_streams(anatomy))),
            "parts": list(_distinct(_parts(anatomy))),
            "levels": levels,
            "batch_axes": {_word(path): axis for path, axis in axes.items()},
            "token_grid": None if self.grid is None else list(self.grid),
            "sites": {name: True if why is None else why for name, why in self.sites.items()},
            "methods": {name: True if why is None else why for name, why in self.methods.items()},
            "hints": [self.hint.why] if self.hint.why else [],
            "declared": self.hint.facts,
            "notes": list(anatomy.notes),
        }

    def __str__(self) -> str:
        lines = [summary(self.anatomy)]
        if self.grid is not None:
            lines.append(f"  image tokens: {' x '.join(map(str, self.grid))} (frames, rows, columns)")
        if self.hint.facts:
            lines.append(f"  declared: {self.hint}" + (f" ({self.hint.why})" if self.hint.why else ""))
        able = sorted(name for name, why in self.methods.items() if why is None)
        lines += ["", f"{len(able)} of {len(self.methods)} methods can serve it: {', '.join(able)}"]
        reasons: dict[str, list[str]] = {}
        for name, why in self.methods.items():
            if why is not None:
                reasons.setdefault(why, []).append(name)
        lines += [f"not {', '.join(sorted(names))}: {why}" for why, names in reasons.items()]
        return "\n".join(lines)


def inspect_denoiser(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inspection:
    """Look at a denoiser by the arguments of one call.

    Methods are judged by attaching each with its default settings; nothing is sampled, and nothing is left attached.
    What needs a calibration is judged by where it would measure; what needs guidance or a solver, as if there were one.

    Raises:
        AnatomyError: it could not be observed.
    """
    anatomy = observe(denoiser, args, kwargs)
    given = (denoiser, args, kwargs, anatomy)
    return Inspection(
        anatomy=anatomy,
        hint=hint_of(denoiser),
        grid=_grid(*given),
        sites={name: why_not(Composition(site, FixedInterval(2)), *given) for name, site in SITES.items()},
        methods={name: _why_not_method(name, *given) for name in sorted(METHODS)},
    )


def why_not(
    composition: Composition, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], anatomy: Anatomy
) -> str | None:
    """Why a composition cannot serve a denoiser; None if it can.

    Args:
        composition: what would run.
        denoiser: the network.
        args, kwargs: of a call.
        anatomy: of the denoiser.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a run would say
        try:
            handle = attach(denoiser, {"denoiser": denoiser}, {"denoiser": composition}, nan_guard="off")
        except Cache4DiffusionError as error:
            return str(error)
        with handle:
            try:
                handle._engines[0].prepare(args, kwargs, anatomy=anatomy)
            except Cache4DiffusionError as error:
                return str(error)
    return None


def _why_not_method(name: str, *given: Any) -> str | None:
    try:
        composition = _composition(METHODS[name](), given[-1])
    except Cache4DiffusionError as error:
        return str(error)
    return why_not(composition, *given)


def _composition(chosen: Method, anatomy: Anatomy) -> Composition:
    """What a method runs: at the site of its calibration, where it needs one; in front of fewer blocks, where its
    default keeps more of them than there are."""
    if chosen.info.needs_calibration and chosen.calibrator is not None:
        return Composition(chosen.calibrator().site, FixedInterval(2))
    blocks = sum(len(stack.blocks) for stack in anatomy.main)
    kept = {name: value for name, value in chosen.settings.items() if name in ("front", "back")}
    if blocks and sum(kept.values()) >= blocks:
        chosen = dataclasses.replace(chosen, **{name: min(value, 1 - (name == "back")) for name, value in kept.items()})
    return chosen.compose()


def _grid(
    denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], anatomy: Anatomy
) -> tuple[int, int, int] | None:
    if anatomy.tokens is None:
        return None
    try:
        return image_grid(inputs_of(unwrapped(denoiser)), args, kwargs, anatomy.tokens, "it is not told")
    except AnatomyError:
        return None


def _streams(anatomy: Anatomy) -> Iterator[dict[str, Any]]:
    for stack, block in _blocks(anatomy):
        for stream in block.streams:
            yield {
                "stack": stack,
                "kind": stream.kind,
                "argument": _word(stream.argument),
                "output": None if stream.output is None else _word(stream.output),
            }


def _parts(anatomy: Anatomy) -> Iterator[dict[str, Any]]:
    for stack, block in _blocks(anatomy):
        for part in block.parts:
            yield {
                "stack": stack,
                "name": part.path.removeprefix(f"{block.path}."),
                "kind": part.kind,
                "streams": [kind for _, kind in part.outputs],
                "rests": [inner.path.removeprefix(f"{block.path}.") for inner in part.inner],
            }


def _blocks(anatomy: Anatomy) -> Iterator[tuple[str, Block]]:
    for stack in anatomy.stacks:
        for block in stack.blocks:
            yield stack.path, block


def _distinct(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each row once: blocks of one list are mostly alike."""
    seen: list[dict[str, Any]] = []
    for row in rows:
        if row not in seen:
            seen.append(row)
            yield row


def _word(path: LeafPath | None) -> str | None:
    """``("joint_kwargs", 0)`` as ``joint_kwargs[0]``; ``()``, the whole, as ``""``."""
    if path is None:
        return None
    return "".join(str(key) if number == 0 and isinstance(key, str) else f"[{key}]" for number, key in enumerate(path))
