"""`observe`: the anatomy of a denoiser from one forward."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from torch import nn

from cache4diffusion.anatomy.arguments import Arguments
from cache4diffusion.anatomy.batch import batch_axes
from cache4diffusion.anatomy.blocks import BlockView
from cache4diffusion.anatomy.facts import Anatomy, Signal, Stack
from cache4diffusion.anatomy.flow import ancestors
from cache4diffusion.anatomy.invariant import invariant_modules
from cache4diffusion.anatomy.observing import Stage
from cache4diffusion.anatomy.parts import BlockReader
from cache4diffusion.anatomy.reach import with_reach
from cache4diffusion.anatomy.rehearse import rehearse
from cache4diffusion.anatomy.stacks import StackFinder, StackView, not_so, parameter_of
from cache4diffusion.anatomy.tape import Recording
from cache4diffusion.anatomy.undisturbed import unwrapped
from cache4diffusion.anatomy.unet import UNetFinder
from cache4diffusion.anatomy.units import UnitFinder
from cache4diffusion.errors import UnobservedError


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
        UnobservedError: nothing could be observed. What could not be established otherwise is in ``notes``.
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
    if unet is not None:
        unet = dataclasses.replace(unet, units=UnitFinder(recording).find(unet))
    sides = None if unet is None else {level.path.rpartition(".")[0] for level in (*unet.down, *unet.up)}
    _check_claims(denoiser, recording, roles, views)
    main = finder.turns(finder.main([view for view in views if sides is None or view.path in sides]))
    finder.note_readers(main)
    seams = tuple(finder.is_kept(a, b) for a, b in itertools.pairwise(main))
    rehearsed, failures = rehearse(stage, recording, [finder.fact(view) for view in views])
    notes += failures
    if roles.latent is not None:
        rehearsed, failures = with_reach(stage, recording, roles.latent, rehearsed)
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
        invariant=invariant_modules(recording, conditioning),
        notes=tuple(dict.fromkeys([*notes, *roles.notes, *finder.notes, *levels.notes])),
    )


def _check_claims(denoiser: nn.Module, recording: Recording, roles: Arguments, views: list[StackView]) -> None:
    """Hold what was declared against what was seen. (What was declared of blocks, the finder holds against it.)

    Raises:
        AnatomyError: something does not hold.
    """
    hint, reaching = roles.hint, ancestors(recording, recording.root.outputs.values())
    blocks = [block for view in views for block in view.blocks]
    prompts = [("conditioning", name) for name in hint.conditioning or ()]
    for role, name in (("latent", hint.latent), ("timestep", hint.timestep), *prompts):
        given = [serial for path, serial in recording.root.arguments.items() if roles.name(path[:1]) == name]
        if name is None or (role != "latent" and not given):  # a clock may be a plain number, a prompt may be left out
            continue
        if not given:
            raise not_so(denoiser, f"{role}={name!r}: no tensor was given as that argument")
        if reaching.isdisjoint(given):
            raise not_so(denoiser, f"{role}={name!r}: the denoiser's output does not depend on that argument")
        if role == "timestep" and not _may_be_clock(recording.shape(given[0]), recording, roles, blocks):
            raise not_so(
                denoiser, f"{role}={name!r}: {recording.shape(given[0])} are not one number, nor one per row or token"
            )
    if roles.likelier is not None:
        fact = f"nothing that the denoiser returns is like it, but like {roles.likelier!r}"
        raise not_so(denoiser, f"latent={hint.latent!r}: {fact}")
    if hint.image is not None and not any(
        thread.kind == "image" and parameter_of(denoiser, block.call.path, thread.argument) == hint.image
        for block in blocks
        for thread in block.threads
    ):
        raise not_so(
            denoiser, f"image={hint.image!r}: through no block runs a stream of that name that the latent is in"
        )
    found = [part.path for view in views for parts in view.parts for part in parts]
    for path in hint.parts:
        if not any(part.endswith(f".{path}") for part in found):
            raise not_so(
                denoiser,
                f"parts={{{path!r}: ...}}: in none of {', '.join(block.call.path for block in blocks) or 'the blocks'} "
                "is there a module of that path whose output, scaled, is added to a stream",
            )


def _may_be_clock(shape: tuple[int, ...], recording: Recording, roles: Arguments, blocks: list[BlockView]) -> bool:
    """Whether an argument of this shape may hold one number, or one per row, or one per token."""
    lengths = {recording.shape(thread.enters)[-2] for block in blocks for thread in block.threads}
    if roles.latent is not None:
        lengths.update(recording.shape(recording.root.arguments[roles.latent]))
    return all(length == 1 or length in lengths for length in shape[1:])


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
    raise UnobservedError(
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
