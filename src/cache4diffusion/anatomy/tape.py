"""A tape of one forward: every tensor operation and every module call, without keeping a tensor alive.

Tensors are told apart by serial numbers in a weak dictionary: ``id()`` is reused as soon as a tensor dies. An operation
that writes in place gives its tensor the next serial number, so the record reads as if nothing were ever overwritten.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from cache4diffusion.anatomy.tree import LeafPath, argument_leaves, leaves, map_leaves
from cache4diffusion.anatomy.vocabulary import VIEWS, detail_of, is_in_place, name_of


class Op(NamedTuple):
    """One tensor operation: serial numbers of what it read (in the order of its arguments) and of what it made."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    detail: Any
    is_in_place: bool


class TensorFact(NamedTuple):
    """What is remembered of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_parameter: bool


@dataclass
class Call:
    """One module call. Its operations are ``ops[first:last]`` of the recording, those of its children included."""

    path: str
    index: int
    parent: int  # index of the calling module's call, -1 for the denoiser
    first: int
    last: int = -1
    arguments: dict[LeafPath, int] = field(default_factory=dict)
    outputs: dict[LeafPath, int] = field(default_factory=dict)
    template: Any = None  # the output, with the serial number in place of each tensor
    turn: int = 0  # how many calls of the same module came before
    constants: dict[LeafPath, Any] = field(default_factory=dict)  # arguments that are no tensors
    puts: tuple[LeafPath, ...] = ()  # where it put another tensor into a container that it was given
    end: int = -1  # index of the first call after this one that is not inside it


@dataclass
class Recording:
    """What the tape holds after a forward."""

    ops: list[Op] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    facts: list[TensorFact] = field(default_factory=list)
    producer: list[int] = field(default_factory=list)  # by serial: index of the op that made it, -1 if none
    times: dict[str, int] = field(default_factory=dict)  # by module path: how often it was called

    @property
    def root(self) -> Call:
        """The denoiser's own call."""
        return self.calls[0]

    def shape(self, serial: int) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.facts[serial].shape

    def by_path(self) -> Mapping[str, list[Call]]:
        """Calls of each module, in order."""
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            found.setdefault(call.path, []).append(call)
        return found

    def inside(self, call: Call) -> list[Call]:
        """Every call strictly inside, in the order in which they began."""
        return self.calls[call.index + 1 : call.end]

    def children(self, call: Call) -> list[Call]:
        """The calls made directly by ``call``."""
        return [inner for inner in self.inside(call) if inner.parent == call.index]


class Tape(TorchFunctionMode):
    """Records operations while active, and module calls through `enter` and `leave`."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = Recording()
        self._serials: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._bases: WeakIdKeyDictionary = WeakIdKeyDictionary()  # view -> weak reference to what it looks at
        self._open: list[int] = []

    def serial(self, tensor: Tensor) -> int:
        """Serial number of the tensor as it is now; a tensor never seen before is a source."""
        known = self._serials.get(tensor)
        return self._number(tensor, -1) if known is None else known

    def _number(self, tensor: Tensor, producer: int) -> int:
        recording = self.recording
        serial = len(recording.facts)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        recording.facts.append(TensorFact(tuple(tensor.shape), tensor.dtype, tensor.device, is_parameter))
        recording.producer.append(producer)
        self._serials[tensor] = serial
        return serial

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = name_of(func)
        if isinstance(result, Tensor) or name == "__setitem__":
            made = [result] if isinstance(result, Tensor) else [args[0]]
        elif isinstance(result, (tuple, list)):
            made = [item for _, item in leaves(result) if isinstance(item, Tensor)]
            if not made:
                return result
        else:
            return result
        read = [leaf for _, leaf in argument_leaves(args, kwargs) if isinstance(leaf, Tensor)]
        self._record(name, args, kwargs, read, made)
        return result

    def _record(self, name: str, args: Any, kwargs: Any, read: list[Tensor], made: list[Tensor]) -> None:
        in_place = is_in_place(name, kwargs)
        fresh = [tensor for tensor in made if in_place or self._serials.get(tensor) is None]
        if not fresh:
            return  # a cast or a dropout that had nothing to do returned its input
        inputs = tuple(self.serial(tensor) for tensor in read)
        if in_place and kwargs.get("out") is not None:
            fresh = [leaf for _, leaf in leaves(kwargs["out"])]
        index = len(self.recording.ops)
        plain = name.removesuffix("_") if in_place and not name.endswith("__") else name
        outputs = tuple(self._number(tensor, index) for tensor in fresh)
        shapes = [tuple(tensor.shape) for tensor in made]
        self.recording.ops.append(
            Op(plain, inputs, outputs, detail_of(plain, args, kwargs, shapes, self.serial), in_place)
        )
        if in_place:
            for tensor in fresh:
                self._write_through(tensor)
        elif plain in VIEWS and read:
            for tensor in fresh:
                self._bases[tensor] = weakref.ref(read[0])

    def _write_through(self, view: Tensor) -> None:
        """Writing into a view also changes what it looks at."""
        base = self._bases.get(view)
        base = base() if base is not None else None
        while base is not None:
            index = len(self.recording.ops)
            inputs = (self.serial(base), self.serial(view))
            self.recording.ops.append(Op("write_through", inputs, (self._number(base, index),), None, True))
            view, base = base, self._bases.get(base)
            base = base() if base is not None else None

    def enter(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Note that a module is called."""
        calls = self.recording.calls
        call = Call(path, len(calls), self._open[-1] if self._open else -1, len(self.recording.ops))
        call.turn = self.recording.times.get(path, 0)
        self.recording.times[path] = call.turn + 1
        given = dict(argument_leaves(args, kwargs))
        call.arguments = {path: self.serial(leaf) for path, leaf in given.items() if isinstance(leaf, Tensor)}
        call.constants = {path: leaf for path, leaf in given.items() if path not in call.arguments}
        calls.append(call)
        self._open.append(call.index)
        return call

    def leave(self, call: Call, result: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
        """Note what the module returned, and what it put into the containers that it was given."""
        recording = self.recording
        unseen = [leaf for _, leaf in leaves(result) if isinstance(leaf, Tensor) and self._serials.get(leaf) is None]
        if unseen:  # made by something that no function mode sees: all it can have read are the arguments
            index = len(recording.ops)
            outputs = tuple(self._number(tensor, index) for tensor in unseen)
            recording.ops.append(Op("opaque", tuple(call.arguments.values()), outputs, None, False))
        call.last, call.end = len(recording.ops), len(recording.calls)
        call.outputs = {path: self.serial(leaf) for path, leaf in leaves(result) if isinstance(leaf, Tensor)}
        call.template = map_leaves(lambda _, leaf: self._serial_or_same(leaf), result)
        call.puts = tuple(
            path
            for path, leaf in argument_leaves(args, kwargs or {})
            if len(path) > 1 and isinstance(leaf, Tensor) and not self._is_same(call, path, leaf)
        )
        self._open.pop()

    def _is_same(self, call: Call, path: LeafPath, leaf: Tensor) -> bool:
        """Whether what sits at an argument is the tensor that was there before, written into or not."""
        serial, before = self.serial(leaf), call.arguments.get(path)
        while serial != before:
            producer = self.recording.producer[serial]
            op = self.recording.ops[producer] if producer >= call.first else None
            if op is None or not op.is_in_place or not op.inputs:
                return False
            serial = op.inputs[0]
        return True

    def _serial_or_same(self, leaf: Any) -> Any:
        return TensorSerial(self.serial(leaf)) if isinstance(leaf, Tensor) else leaf


class TensorSerial(int):
    """Stands for a tensor in an output template."""
