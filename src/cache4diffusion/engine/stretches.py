"""Stretches: the main blocks cut into those that are bypassed together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from cache4diffusion.anatomy import Anatomy, Block, LeafPath
from cache4diffusion.sites import Span


@dataclass(frozen=True)
class Stretch:
    """Consecutive blocks ``first .. last`` (positions among all main blocks) whose residual is one feature."""

    name: str
    key: int  # which decision it follows
    first: int
    last: int


def why_not_bypassed(block: Block) -> str | None:
    """Why a block must always run, in a sentence; None if it need not."""
    if block.puts:
        where = _words(block.puts)
        fact = f"puts what it makes into a container that it is given ({where}; it should return a new one)"
    elif block.strangers or any(stream.output is None and stream.feeds_output for stream in block.streams):
        where = f" (at {_words(block.strangers)})" if block.strangers else ""
        fact = f"returns more than its streams and what it was given{where}"
    else:
        return None
    return (
        f"{block.path} {fact}, so it cannot be bypassed. Methods for its parts ('fora', 'taylorseer') or for the whole "
        "denoiser ('taylorseer-lite') need not do that."
    )


def _words(paths: Iterable[LeafPath]) -> str:
    return ", ".join("".join(f"[{key!r}]" for key in path) or "its whole output" for path in paths)


def stretches(site: Span, lengths: list[int], seams: tuple[bool, ...]) -> list[Stretch]:
    """Cut the main block lists into stretches.

    One over all lists that go on with what the one before left; else one per list, all under one decision; with
    ``per_list`` one per list, each under its own.

    Args:
        site: counts of blocks at the front and the back that always run.
        lengths: number of blocks of each list.
        seams: whether list i and list i + 1 can be spanned together.
    """
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    if site.per_list:
        return [
            Stretch(f"span.{i}", i, starts[i] + site.front, starts[i + 1] - site.back - 1)
            for i in range(len(lengths))
            if site.front + site.back < lengths[i]
        ]
    groups: list[list[int]] = [[0]]
    for i, is_open in enumerate(seams):
        if is_open:
            groups[-1].append(i + 1)
        else:
            groups.append([i + 1])
    lowest, highest = site.front, starts[-1] - site.back - 1
    found = []
    for number, group in enumerate(groups):
        first, last = max(starts[group[0]], lowest), min(starts[group[-1] + 1] - 1, highest)
        if first <= last:
            found.append(Stretch(f"span.{number}", 0, first, last))
    return found


def broken(stretch: Stretch, starts: Sequence[int]) -> list[Stretch]:
    """A stretch in pieces that begin where the denoiser makes something else of the streams, under its one decision."""
    cuts = [stretch.first, *(start for start in starts if stretch.first < start <= stretch.last), stretch.last + 1]
    if len(cuts) == 2:
        return [stretch]
    return [
        replace(stretch, name=f"{stretch.name}.{number}", first=first, last=end - 1)
        for number, (first, end) in enumerate(pairwise(cuts))
    ]


def breaks_of(anatomy: Anatomy) -> list[int]:
    """Positions of the main blocks that do not go on with what the one before left in their list."""
    starts = accumulate((len(stack.blocks) for stack in anatomy.main), initial=0)
    return [start + number for start, stack in zip(starts, anatomy.main, strict=False) for number in stack.breaks]
