"""A cached step, rehearsed: parts return tensors of the right shape, inner modules rest, and every block must still
return what it returned. An inner module whose placeholder breaks its block is taken off the list."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cache4diffusion.anatomy.facts import Block, Inner, Stack
from cache4diffusion.anatomy.observing import Stage
from cache4diffusion.anatomy.tape import Call, Recording, TensorSerial
from cache4diffusion.anatomy.tree import leaves, map_leaves
from cache4diffusion.anatomy.vocabulary import name_of

_ATTEMPTS: tuple[frozenset[str], ...] = (
    frozenset({"nan_token", "zero_width", "one_token"}),
    frozenset({"nan_token", "zero_width"}),
    frozenset({"zero_width"}),
    frozenset({"nan_token"}),
)


def rehearse(stage: Stage, recording: Recording, stacks: list[Stack]) -> tuple[list[Stack], list[str]]:
    """Return the stacks with only those inner modules that may really rest, and notes on the others.

    One block of each build is run; the others return what they returned.
    """
    alike: dict[object, list[Block]] = {}
    for stack in stacks:
        for block in stack.blocks:
            alike.setdefault(_build(stage, recording, block), []).append(block)
    todo: dict[str, list[Block]] = {}
    for blocks in alike.values():
        if any(part.inner for part in blocks[0].parts):
            todo.setdefault(blocks[0].path, []).extend(blocks)
    roles: dict[str, frozenset[str]] = {}
    notes = []
    for attempt in _ATTEMPTS:
        if not todo:
            break
        try:
            failed = _Rehearsal(stage, recording, stacks, set(todo), attempt).run()
        except Exception as error:  # the host's own code may raise anything
            notes.append(f"placeholders were not rehearsed and are not used ({type(error).__name__}: {error})")
            break
        for path, blocks in todo.items():
            if path not in failed:
                roles.update((block.path, attempt) for block in blocks)
        todo = {path: todo[path] for path in failed}
        notes += [
            f"{path} and blocks built like it: {' and '.join(sorted(attempt))} placeholders fail ({reason})"
            for path, reason in failed.items()
        ]
    return [
        dataclasses.replace(stack, blocks=tuple(_keep(block, roles.get(block.path)) for block in stack.blocks))
        for stack in stacks
    ], notes


def _build(stage: Stage, recording: Recording, block: Block) -> object:
    """What two blocks have in common if one rehearsal stands for both."""
    call = next(call for call in recording.calls if (call.path, call.turn) == (block.path, block.turn))
    shapes = tuple((path, recording.shape(serial)) for path, serial in call.arguments.items())
    parts = tuple(
        (part.path.removeprefix(block.path), part.outputs, part.is_mutated, len(part.inner)) for part in block.parts
    )
    inside = tuple(inner.path.removeprefix(block.path) for inner in recording.inside(call))
    return type(stage.denoiser.get_submodule(block.path)), shapes, parts, inside


def _keep(block: Block, roles: frozenset[str] | None) -> Block:
    parts = tuple(
        dataclasses.replace(part, inner=tuple(inner for inner in part.inner if inner.role in (roles or ())))
        for part in block.parts
    )
    return dataclasses.replace(block, parts=parts)


class _NoPicking(TorchFunctionMode):
    """Refuses to pick entries by number along an axis that has only one, as a placeholder of one token has.

    Token merging does that. Fake tensors do not look at the numbers: they would hand out what real ones refuse.
    """

    _PICKING = ("gather", "index_select", "take_along_dim", "scatter_reduce", "scatter_add", "scatter")

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(function).rstrip("_")
        if name in self._PICKING:
            source = args[0] if args else kwargs["input"]
            axis = args[1] if len(args) > 1 else kwargs.get("dim")
            index = args[2] if len(args) > 2 else kwargs.get("index", kwargs.get("indices"))
            if isinstance(axis, int) and isinstance(source, Tensor) and isinstance(index, Tensor) and index.ndim:
                along = index.shape[axis] if index.ndim == source.ndim else index.shape[0]
                if source.shape[axis] == 1 and along > 1:
                    raise IndexError(f"{name} picks {along} entries of 1")
        return function(*args, **kwargs)


class _Rehearsal:
    def __init__(
        self, stage: Stage, recording: Recording, stacks: list[Stack], rehearsed: set[str], roles: frozenset[str]
    ) -> None:
        self.stage, self.recording = stage, recording
        self.calls = recording.by_path()
        every = [block for stack in stacks for block in stack.blocks]
        blocks = [block for block in every if block.path in rehearsed]
        self.blocks = rehearsed
        self.others = {block.path for block in every} - rehearsed
        self.parts = {(part.path, part.turn) for block in blocks for part in block.parts}
        self.part_paths = {path for path, _ in self.parts}
        self.inner: dict[str, Inner] = {
            inner.path: inner for b in blocks for p in b.parts for inner in p.inner if inner.role in roles
        }
        self.seen: dict[str, int] = {}
        self.failed: dict[str, str] = {}

    def run(self) -> dict[str, str]:
        with self.stage.active(self._observer), _NoPicking():
            args, kwargs = self.stage.arguments()
            self.stage.denoiser(*args, **kwargs)
        return self.failed

    def _observer(self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not any(path in paths for paths in (self.part_paths, self.inner, self.blocks, self.others)):
            return forward(*args, **kwargs)
        number = self.seen.get(path, 0)
        self.seen[path] = number + 1
        call = self.calls[path][number]
        if (path, number) in self.parts or path in self.others:
            return self._like(call, lambda shape: shape)
        if path in self.inner:
            if self.inner[path].role == "zero_width":
                return self._like(call, lambda shape: (*shape[:-1], 0))
            return self._like(call, lambda shape: (shape[0], 1, *shape[2:]), fill=float("nan"))
        if path not in self.blocks:
            return forward(*args, **kwargs)  # another call of a part's module
        try:
            result = forward(*args, **kwargs)
            self._compare(call, result)
        except Exception as error:  # the host's own code may raise anything
            self.failed[path] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            inside = {other.path for other in self.recording.inside(call)}
            for other in inside & self.seen.keys():  # keep count as if the block had run to its end
                self.seen[other] = sum(c.path == other for c in self.recording.calls[: call.end])
            return self._like(call, lambda shape: shape)
        return result

    def _like(self, call: Call, change: Callable[[tuple[int, ...]], tuple[int, ...]], fill: float = 0.0) -> Any:
        def make(_: Any, leaf: Any) -> Any:
            if not isinstance(leaf, TensorSerial):
                return leaf
            fact = self.recording.facts[leaf]
            return torch.full(change(fact.shape), fill, dtype=fact.dtype, device=fact.device)

        return map_leaves(make, call.template)

    def _compare(self, call: Call, result: Any) -> None:
        tensors = {path: leaf for path, leaf in leaves(result) if isinstance(leaf, torch.Tensor)}
        for path, serial in call.outputs.items():
            shape = tuple(tensors[path].shape) if path in tensors else None
            if shape != self.recording.shape(serial):
                raise ValueError(f"output {path} is {shape} instead of {self.recording.shape(serial)}")
            if self.stage.mode == "real" and not bool(tensors[path].isfinite().all()):
                raise ValueError(f"a placeholder reaches output {path}")
