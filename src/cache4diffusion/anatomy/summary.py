"""The anatomy as text, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from cache4diffusion.anatomy.facts import Anatomy, Block, Layer, Level, Stack, UNet
from cache4diffusion.anatomy.tree import LeafPath


def summary(anatomy: Anatomy) -> str:
    """Return a few lines that say what was found, blocks of one build together."""
    return "\n".join(_lines(anatomy))


def _lines(anatomy: Anatomy) -> Iterator[str]:
    yield anatomy.denoiser
    also = f" and {', '.join(map(_at, anatomy.others))}" if anatomy.others else ""
    yield f"  timestep {_at(anatomy.timestep)}, latent {_at(anatomy.latent)}{also}, " + (
        f"conditioning {', '.join(map(_at, anatomy.conditioning)) or 'none'}"
    )
    if anatomy.main:
        yield f"  main: {_road(anatomy)}"
    if anatomy.signal:
        yield f"  signal: {_at(anatomy.signal.argument)} of {anatomy.signal.path}"
    alike: dict[tuple[str, ...], list[Stack]] = {}
    for stack in anatomy.stacks:
        alike.setdefault(tuple(_blocks(stack)), []).append(stack)
    for text, stacks in alike.items():
        for stack in stacks:
            anew = f", new streams at {', '.join(map(str, stack.breaks))}" if stack.breaks else ""
            count = len({block.path for block in stack.blocks})
            calls = f", {len(stack.blocks)} calls" if len(stack.blocks) > count else ""
            yield f"  {stack.path}: {count} blocks{calls}{'' if stack.is_main else ', not main'}{anew}"
        yield from text
    if anatomy.unet:
        yield from _levels(anatomy.unet)
    batched = [path for path, axis in _root_axes(anatomy) if axis is not None]
    yield f"  batch axis: {', '.join(map(_at, batched)) or 'not established'}"
    for note in anatomy.notes:
        yield f"  note: {note}"


def _road(anatomy: Anatomy) -> str:
    paths = [stack.path for stack in anatomy.main]
    if len(set(paths)) < len(paths):
        return f"{' and '.join(dict.fromkeys(paths))}, by turns"
    kept = ["kept" if is_kept else "changed" for is_kept in anatomy.seams]
    return " > ".join(paths) + (f" (shape {', '.join(kept)} between)" if kept else "")


def _root_axes(anatomy: Anatomy) -> Iterable[tuple[LeafPath, int | None]]:
    return anatomy.batch_axes[""].arguments.items() if "" in anatomy.batch_axes else ()


def _blocks(stack: Stack) -> Iterator[str]:
    groups: list[tuple[list[str], list[str]]] = []  # names of consecutive blocks, and what they have in common
    for block in stack.blocks:
        name, text = block.name.rpartition(".")[2], list(_block(block))
        if groups and groups[-1][1] == text:
            groups[-1][0].append(name)
        else:
            groups.append(([name], text))
    for names, text in groups:
        yield f"    {names[0]}" + (f" to {names[-1]}" if len(names) > 1 else "")
        yield from (f"      {line}" for line in text)


def _block(block: Block) -> Iterator[str]:
    for stream in block.streams:
        way = f"{_at(stream.argument)} -> {'ends here' if stream.output is None else _at(stream.output, 'output')}"
        yield f"{stream.kind}: {way}{'' if stream.feeds_output else ', unused afterwards'}"
    for part in block.parts:
        name = part.path.removeprefix(f"{block.path}.")
        rests = [f"{inner.path.removeprefix(f'{block.path}.')} ({inner.role})" for inner in part.inner]
        outputs = ", ".join(f"{_at(leaf, 'output')} {kind}" for leaf, kind in part.outputs)
        yield f"part {name}: {part.kind}, {outputs}" + (f"; may rest: {', '.join(rests)}" if rests else "")


def _levels(unet: UNet) -> Iterator[str]:
    head = f"{unet.head} makes 0" if unet.head else "no head"
    yield f"  U-Net of {unet.skips} skips; {head}; mid {unet.mid or 'none'}"
    for level in unet.down:
        yield f"    {level.path}: {'; '.join(_layer(level, layer, 'makes') for layer in level.layers)}" + _tail(level)
    for level in unet.up:
        yield f"    {level.path}: {'; '.join(_layer(level, layer, 'uses') for layer in level.layers)}" + _tail(level)
    units = Counter(unit.kind for unit in unet.units)
    if units:
        yield f"    on maps: {', '.join(f'{count} of kind {kind}' for kind, count in units.items())}"


def _layer(level: Level, layer: Layer, verb: str) -> str:
    return f"{', '.join(_short(level, layer.modules))} {verb} {layer.skip}"


def _tail(level: Level) -> str:
    if not level.tail:
        return ""
    made = "" if level.tail_skip is None else f" makes {level.tail_skip}"
    return f"; then {', '.join(_short(level, level.tail))}{made}"


def _short(level: Level, modules: tuple[str, ...]) -> list[str]:
    return [path.removeprefix(f"{level.path}.") for path in modules]


def _at(path: LeafPath | None, whole: str = "?") -> str:
    """``(0,)`` as ``[0]``, ``("joint_kwargs", "ip", 0)`` as ``joint_kwargs[ip][0]``."""
    if not path:
        return "not established" if path is None else whole
    first, *rest = path
    return (f"[{first}]" if isinstance(first, int) else str(first)) + "".join(f"[{key}]" for key in rest)
