"""Modules of a block that need not run while its parts are bypassed, and what may stand for their outputs."""

from __future__ import annotations

from cache4diffusion.anatomy.facts import Inner, Part
from cache4diffusion.anatomy.flow import ancestors, value_inputs
from cache4diffusion.anatomy.parts import BlockReader
from cache4diffusion.anatomy.tape import Call
from cache4diffusion.anatomy.vocabulary import JOINS, PASSES, UNARY, is_normalising


def inner_modules(reader: BlockReader, parts: list[Part]) -> list[Inner]:
    """Find the outermost modules, outside the parts, all of whose outputs only parts read.

    Walk back from the block's outputs and stop at what parts return: whatever is not visited is dead while the parts
    are bypassed.
    """
    recording = reader.recording
    turns = {(part.path, part.turn) for part in parts}
    part_calls = [call for call in reader.inner_calls if (call.path, call.turn) in turns]
    returned = {serial for call in part_calls for serial in call.outputs.values()}
    alive = ancestors(recording, reader.call.outputs.values(), stop=returned, first=reader.call.first)
    dead = _outermost_dead(reader, part_calls, alive)
    placed: dict[str, Inner] = {}
    for call in reversed(dead):  # the last first: what a module feeds is then already known
        others = [other for other in dead if other.path == call.path]
        if others[-1] is not call:
            continue
        found = [_place(reader, one, part_calls, dead, placed) for one in others]
        if all(item is not None and item.role == found[0].role for item in found if found[0] is not None) and found[0]:
            feeds = tuple(dict.fromkeys(path for item in found if item is not None for path in item.feeds))
            placed[call.path] = Inner(call.path, found[0].role, found[0].kind, feeds)
    order = {call.path: call.index for call in reversed(dead)}
    return sorted(placed.values(), key=lambda item: order[item.path])


def _outermost_dead(reader: BlockReader, part_calls: list[Call], alive: set[int]) -> list[Call]:
    """Calls whose outputs are tokens that depend on the streams and that nothing alive reads."""
    found: list[Call] = []
    skip_until = -1
    part_indices = {call.index for call in part_calls}
    for call in reader.inner_calls:
        if call.index < skip_until:
            continue
        if call.index in part_indices:
            skip_until = call.end
            continue
        outputs = list(call.outputs.values())
        axes = {len(reader.recording.shape(serial)) for serial in outputs}
        is_split = axes == {4} and reader.is_working(call)  # tokens in heads: no norm is worth a placeholder there
        tokens = (axes == {3} or is_split) and reader.depends.issuperset(outputs)
        if any(call.index < index < call.end for index in part_indices):
            continue  # holds a part
        made_here = all(reader.recording.producer[s] >= call.first for s in outputs)
        if tokens and made_here and alive.isdisjoint(outputs):
            found.append(call)
            skip_until = call.end
    return found


def _place(
    reader: BlockReader, call: Call, part_calls: list[Call], dead: list[Call], placed: dict[str, Inner]
) -> Inner | None:
    """What a dead module feeds, and which placeholder survives the way there; None if neither does."""
    recording = reader.recording
    is_working = reader.is_working(call)
    ends = [other for other in [*part_calls, *dead] if other.index >= call.end]
    inside = [(other.first, other.last, other) for other in ends]
    flowing, feeds, fed_roles = set(call.outputs.values()), [], set()
    is_joined, meets_others = False, False
    for number in range(call.last, reader.call.last):
        op = recording.ops[number]
        host = next((other for first, last, other in inside if first <= number < last), None)
        if host is not None or flowing.isdisjoint(value_inputs(op)):
            continue
        flowing.update(op.outputs)
        if op.name in JOINS:
            width = len(recording.shape(op.outputs[0])) - 1
            is_joined = is_joined or op.detail == width
        elif op.name not in PASSES and op.name not in UNARY:
            meets_others = True
    for other in ends:
        if flowing.isdisjoint(other.arguments.values()):
            continue
        if other.path in placed:
            feeds += placed[other.path].feeds
            fed_roles.add(placed[other.path].role)
        elif other in part_calls:
            feeds.append(other.path)
        else:
            return None  # feeds a dead module that has to run after all
    if not feeds:
        return None
    kind = (
        "attn" if is_working and reader.kind(call) in ("attn", "cross_attn") else "tokenwise" if is_working else "norm"
    )
    vanishes = is_joined or "zero_width" in fed_roles
    if is_working and vanishes and meets_others:
        return None  # would need a placeholder of full size
    if not is_working and vanishes and not meets_others and not _is_norm(reader, call):
        return Inner(call.path, "zero_width", "tokenwise", tuple(dict.fromkeys(feeds)))
    role = "nan_token" if not is_working else "zero_width" if vanishes else "one_token"
    return Inner(call.path, role, kind, tuple(dict.fromkeys(feeds)))


def _is_norm(reader: BlockReader, call: Call) -> bool:
    """Whether the module normalises (an activation does not)."""
    return is_normalising(op.name for op in reader.recording.ops[call.first : call.last])
