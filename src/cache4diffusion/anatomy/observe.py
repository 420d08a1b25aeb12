"""`observe`: the anatomy of a denoiser from one forward."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from torch import nn

from cache4diffusion.anatomy.arguments import Arguments
from cache4diffusion.anatomy.batch import batch_axes
from cache4diffusion.anatomy.facts import Anatomy, Signal, Stack
from cache4diffusion.anatomy.flow import ancestors
from cache4diffusion.anatomy.hints import Hint
from cache4diffusion.anatomy.observing import Stage
from cache4diffusion.anatomy.parts import BlockReader
from cache4diffusion.anatomy.rehearse import rehearse
from cache4diffusion.anatomy.stacks import StackFinder, StackView, not_so, parameter_of
from cache4diffusion.anatomy.tape import Recording
from cache4diffusion.anatomy.undisturbed import unwrapped
from cache4diffusion.anatomy.unet import UNetFinder
from cache4diffusion.errors import AnatomyError


def observe(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, may_compute: bool = True) -> Anatomy:
    """Find out how ``denoiser`` is built by watching it process the arguments of a real call.

    The forward runs under fake tensors: nothing is computed, no memory is taken, and no hook, wrapper, compiled region,
    buffer or random state is touched. Classes that read their data (`item()`, `if mask.any()`) cannot run so; they
    are watched in a real forward instead.

    Args:
        denoiser: the network; also what ``torch.compile(denoiser)`` returns.
        args, kwargs: as in a real call. They are not changed.
        may_compute: whether a real forward may be run where fake tensors are refused.
    Raises:
        AnatomyError: nothing could be observed. What could not be established otherwise is in ``notes``.
    """
    denoiser = unwrapped(denoiser)
    stage, recording, notes = _record(denoiser, args, kwargs, may_compute)
    roles = Arguments(denoiser, recording)
    conditioning = frozenset(recording.root.arguments[path] for path in roles.conditioning)
    others = frozenset(recording.root.arguments[path] for path in roles.others)
    finder = StackFinder(denoiser, recording, roles.latents, conditioning, others)
    views = finder.find()
    levels = UNetFinder(denoiser, recording)
    unet = levels.find()
    sides = None if unet is None else {level.path.rpartition(".")[0] for level in (*unet.down, *unet.up)}
    _check_claims(denoiser, recording, roles, views)
    main = finder.turns(finder.main([view for view in views if sides is None or view.path in sides]))
    finder.note_readers(main)
    seams = tuple(finder.is_kept(a, b) for a, b in itertools.pairwise(main))
    rehearsed, failures = rehearse(stage, recording, [finder.fact(view) for view in views])
    notes += failures
    stacks = {stack.path: stack for stack in rehearsed}
    axes: Any = {}
    if roles.latent is not None:
        wanted = [path for s in stacks.values() for b in s.blocks for path in (b.path, *(p.path for p in b.parts))]
        if unet is not None:
            wanted += [level.path for level in (*unet.down, *unet.up)] + [p for p in (unet.head, unet.mid) if p]
        axes, more = batch_axes(
            stage, recording, roles.latent, [*roles.conditioning, *roles.others, *_some(roles.timestep)], wanted
        )
        notes += more
    return Anatomy(
        denoiser=type(denoiser).__name__,
        stacks=tuple(stacks.values()),
        main=tuple(_turn(stacks[view.path], view) for view in main),
        seams=seams,
        unet=unet,
        timestep=roles.timestep,
        latent=roles.latent,
        others=roles.others,
        conditioning=roles.conditioning,
        outputs=tuple(recording.root.outputs),
        batch_axes=axes,
        signal=_signal(main, recording),
        tokens=_tokens(main, recording),
        notes=tuple(dict.fromkeys([*notes, *roles.notes, *finder.notes, *levels.notes])),
    )


def _check_claims(denoiser: nn.Module, recording: Recording, roles: Arguments, views: list[StackView]) -> None:
    """Hold what was declared against what was seen; what was declared of blocks, the finder has held against it.

    Raises:
        AnatomyError: it does not hold.
    """
    hint, reaching = roles.hint, ancestors(recording, recording.root.outputs.values())
    given = {name: [p for p in recording.root.arguments if roles.name(p[:1]) == name] for name in _arguments(hint)}
    for role, name in (("latent", hint.latent), ("timestep", hint.timestep)):
        paths = given.get(name, []) if name is not None else []
        if paths and not any(recording.root.arguments[path] in reaching for path in paths):
            raise not_so(denoiser, f"{role}={name!r}: the denoiser's output does not depend on that argument")
        if role == "latent" and name is not None and not paths:
            raise not_so(denoiser, f"{role}={name!r}: no tensor was given as that argument")
    likelier = roles.likelier
    if likelier is not None:
        raise not_so(
            denoiser, f"latent={hint.latent!r}: nothing that the denoiser returns is like it, but like {likelier!r}"
        )
    if hint.image is not None and not any(
        thread.kind == "image" and parameter_of(denoiser, block.call.path, thread.argument) == hint.image
        for view in views
        for block in view.blocks
        for thread in block.threads
    ):
        raise not_so(
            denoiser, f"image={hint.image!r}: through no block runs a stream of that name that the latent is in"
        )
    for path in hint.parts:
        found = [part.path for view in views for parts in view.parts for part in parts]
        if not any(part.endswith(f".{path}") for part in found):
            known = [block.call.path for view in views for block in view.blocks]
            raise not_so(
                denoiser,
                f"parts={{{path!r}: ...}}: in none of {', '.join(known) or 'the blocks'} is there a module of that "
                "path whose output, scaled, is added to a stream",
            )


def _arguments(hint: Hint) -> set[str]:
    return {name for name in (hint.latent, hint.timestep) if name is not None}


def _turn(stack: Stack, view: StackView) -> Stack:
    """The blocks of a stack that run in one turn."""
    if len(view.blocks) == len(stack.blocks):
        return stack
    numbers = {block.name: number for number, block in enumerate(view.blocks)}
    blocks = tuple(block for block in stack.blocks if block.name in numbers)
    breaks = tuple(numbers[stack.blocks[i].name] for i in stack.breaks if stack.blocks[i].name in numbers)
    return dataclasses.replace(stack, blocks=blocks, breaks=tuple(number for number in breaks if number))


def _some(path: Any) -> list[Any]:
    return [] if path is None else [path]


def _record(
    denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], may_compute: bool
) -> tuple[Stage, Recording, list[str]]:
    reasons = []
    for mode in ("fake", "fake_state", *(["real"] if may_compute else [])):
        stage = Stage(denoiser, tuple(args), dict(kwargs), mode)
        try:
            recording = stage.record()
        except Exception as error:  # the host's own code may raise anything
            reasons.append(f"{mode}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        notes = [f"observed in a real forward, fake tensors were refused ({reasons[0]})"] if mode == "real" else []
        return stage, recording, notes
    raise AnatomyError(
        f"{type(denoiser).__name__} could not be observed: {'; '.join(reasons)}. "
        "Check that the arguments are those of a call that works."
    )


def _signal(main: list[StackView], recording: Recording) -> Signal | None:
    """The first module of the first main block that works on the stream, in the order in which they run."""
    if not main:
        return None
    reader = BlockReader(recording, main[0].blocks[0])
    parts = {part.path for part in main[0].parts[0]}
    for call in reader.inner_calls:
        holds_part = any(other.path in parts for other in recording.inside(call))
        inputs = reader.input_leaves(call)
        if inputs and reader.is_working(call) and not holds_part:
            return Signal(call.path, inputs[0])
    return None


def _tokens(main: list[StackView], recording: Recording) -> int | None:
    """Length of the image stream, where it is one by itself."""
    threads = [thread for thread in main[0].blocks[0].threads if thread.kind == "image"] if main else []
    return recording.shape(threads[0].enters)[-2] if len(threads) == 1 else None
