"""Modules whose output is a function of the prompt alone: the same at every step of a run."""

from __future__ import annotations

from collections.abc import Iterable

from cache4diffusion.anatomy.blocks import written
from cache4diffusion.anatomy.facts import Invariant
from cache4diffusion.anatomy.flow import dependents
from cache4diffusion.anatomy.tape import Recording
from cache4diffusion.anatomy.vocabulary import HEAVY


def invariant_modules(recording: Recording, conditioning: Iterable[int]) -> tuple[Invariant, ...]:
    """The outermost modules that work on conditioning, and on nothing else that the denoiser is given.

    Args:
        recording: the tape.
        conditioning: the arguments that vary with the prompt. What else is given (the clock, latents, masks, places)
            may vary from step to step.
    """
    prompts, count = set(conditioning), len(recording.ops)
    varying = dependents(recording, set(recording.root.arguments.values()) - prompts, 0, count)
    told = dependents(recording, prompts, 0, count)
    found: list[Invariant] = []
    skip_until = recording.root.index + 1
    for call in recording.calls:
        outputs = set(call.outputs.values())
        if call.index < skip_until or not outputs or recording.times[call.path] != 1:
            continue
        works = any(op.name in HEAVY for op in recording.ops[call.first : call.last])
        if works and outputs <= told and outputs.isdisjoint(varying):
            found.append(Invariant(call.path, written(recording, outputs, call.last, count)))
            skip_until = call.end
    return tuple(found)
