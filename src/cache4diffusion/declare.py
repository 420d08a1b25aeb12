"""`declare`: what observation cannot know of a denoiser, said by who wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from torch import nn

from cache4diffusion.anatomy.arguments import parameter_names
from cache4diffusion.anatomy.facts import PartKind
from cache4diffusion.anatomy.hints import Hint, matching, said_of, say
from cache4diffusion.anatomy.undisturbed import unwrapped
from cache4diffusion.errors import AlreadyAcceleratedError, SettingError, closest
from cache4diffusion.wrap import owner_of


class Declaration:
    """What was declared, until `remove`; a context manager, which removes it at the end."""

    def __init__(self, target: Any, hint: Hint) -> None:
        self.hint = hint
        self._target: Any = target
        say(target, hint)

    def remove(self) -> None:
        """It is not said any more. What is accelerated already goes on as it is."""
        if self._target is not None and said_of(self._target) is self.hint:
            say(self._target, None)
        self._target = None

    def __enter__(self) -> Declaration:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Declaration({self.hint})"


def declare(
    denoiser: nn.Module | type[nn.Module],
    *,
    latent: str | None = None,
    timestep: str | None = None,
    has_clock: bool = True,
    conditioning: Iterable[str] | None = None,
    blocks: str | Iterable[str] = (),
    image: str | None = None,
    parts: Mapping[str, PartKind] | None = None,
    frames: Mapping[str, int] | None = None,
    first_frame: str | None = None,
    why: str = "",
) -> Declaration:
    """Say what cannot be seen of a denoiser (or of all of a class), before `accelerate`. What is left out is observed.

    Nothing is believed: what is declared is held against a forward like everything else, and a declaration that does
    not hold is an error at the first call, with nothing left attached.

    Example::

        c4d.declare(
            denoiser,
            timestep="noise",
            blocks=["first", "layers", "last"],
            parts={"mix": "attn", "map": "ffn"},
        )

    Args:
        denoiser: the network, or its class. Copies of a network are not meant; a class stands for its subclasses, too.
        latent: name of the argument that is denoised.
        timestep: name of the argument that is the clock.
        has_clock: False if no argument tells the noise level: steps are then told by the scheduler alone.
        conditioning: names of the arguments that differ between CFG branches; none: ``()``.
        blocks: paths of the lists of blocks, or of single blocks, with ``*`` and ``?`` as in file names.
        image: name of the blocks' argument that is the image, where several streams run through them.
        parts: kind (``attn``, ``cross_attn``, ``ffn``, ``fused`` or ``other``) of every residual sub-layer that may be
            cached, by its path in a block.
        frames: of a denoiser that makes videos chunk by chunk: axis of the frames, by the name of each argument that
            has one, the latent and the timestep among them. Outputs have the latent's.
        first_frame: name of the argument that says which place in the video the first frame of a call has; frames of
            another place are other frames.
        why: a reason, which `c4d inspect` shows.

    Returns:
        A handle: ``remove()``, or a ``with`` block, takes it back.

    Raises:
        SettingError: a name is not there, nothing is declared, or this target was declared before.
        AlreadyAcceleratedError: the denoiser is accelerated, and was looked at already.
    """
    target = unwrapped(denoiser) if isinstance(denoiser, nn.Module) else denoiser
    if not isinstance(target, nn.Module) and not (isinstance(target, type) and issubclass(target, nn.Module)):
        raise SettingError(f"declare({denoiser!r}): give the denoiser, an nn.Module, or its class.")
    hint = Hint(
        why=why,
        latent=latent,
        timestep=timestep,
        has_clock=has_clock,
        conditioning=None if conditioning is None else _names("conditioning", conditioning),
        blocks=_names("blocks", blocks),
        image=image,
        parts=dict(parts or {}),
        frames=dict(frames or {}),
        first_frame=first_frame,
    )
    _check(target, hint)
    if isinstance(denoiser, nn.Module) and isinstance(target, nn.Module):
        owner = owner_of(denoiser) or owner_of(target)
        if owner is not None:
            raise AlreadyAcceleratedError(
                f"{_name(target)} is already accelerated by {owner.label}, and was looked at without this declaration. "
                "Call remove() on that handle first."
            )
    before = said_of(target)
    if before is not None:
        raise SettingError(
            f"{_name(target)} is declared already ({before}): say everything in one declaration, or remove() that one."
        )
    return Declaration(target, hint)


def _check(target: Any, hint: Hint) -> None:
    """What can be told without a forward."""
    name = _name(target)
    if not hint.facts:
        raise SettingError(f"declare({name}): nothing is declared. Give latent, timestep, conditioning, blocks, ...")
    if hint.timestep is not None and not hint.has_clock:
        raise SettingError(f"declare({name}): timestep={hint.timestep!r} contradicts has_clock=False.")
    names = parameter_names(target)
    arguments = [("latent", hint.latent), ("timestep", hint.timestep)]
    arguments += [("conditioning", given) for given in hint.conditioning or ()]
    arguments += [("first_frame", hint.first_frame), *(("frames", given) for given in hint.frames)]
    for role, argument in arguments:
        if argument is not None and argument not in names:
            raise SettingError(
                f"{role}={argument!r}: {name}.forward({', '.join(names)}) has no such argument"
                f"{closest(argument, names) or '.'}"
            )
    roles = [role for role in (hint.latent, hint.timestep, *(hint.conditioning or ())) if role is not None]
    twice = next((role for role in roles if roles.count(role) > 1), None)
    if twice is not None:
        raise SettingError(f"declare({name}): argument {twice!r} has two roles.")
    for argument, axis in hint.frames.items():
        if not isinstance(axis, int) or axis < 0:
            raise SettingError(f"frames={{{argument!r}: {axis!r}}}: give the axis of the frames, counted from 0.")
    for part, kind in hint.parts.items():
        if kind not in get_args(PartKind):
            raise SettingError(f"parts={{{part!r}: {kind!r}}}: use {', '.join(map(repr, get_args(PartKind)))}.")
    if isinstance(target, nn.Module):
        paths = [path for path, _ in target.named_modules() if path]
        for pattern in hint.blocks:
            if not matching(paths, pattern):
                raise SettingError(f"blocks={pattern!r}: {name} has no such module{closest(pattern, paths) or '.'}")


def _names(role: str, given: str | Iterable[str]) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(name, str) and name for name in names):
        raise SettingError(f"{role}={given!r}: give names.")
    return names


def _name(target: Any) -> str:
    return target.__name__ if isinstance(target, type) else type(target).__name__
