"""Which CFG branch a call belongs to: by its name, its conditioning, or its place within the step."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

How = Literal["name", "identity", "values", "ordinal", "new"]


class Sample:
    """Shapes and 32 values of every tensor of a call's conditioning.

    On accelerators they stay where the tensors are until they are compared: reading them is a host sync.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.shapes = [tensor.shape for tensor in tensors]
        picked = [pick(tensor) for tensor in tensors]
        self._picked = [values.tolist() if values.device.type == "cpu" else values for values in picked]

    @cached_property
    def values(self) -> list[list[Any]]:
        """The values, on the host."""
        return [values.tolist() if isinstance(values, Tensor) else values for values in self._picked]

    def is_same(self, other: Sample) -> bool:
        """Whether the other has the same shapes and values."""
        return self.shapes == other.shapes and self.values == other.values


class Branch:
    """One branch of one denoiser, and how to recognise it."""

    def __init__(self, name: str, host_name: str | None, conditioning: Sequence[Tensor], sample: Sample) -> None:
        self.name, self.host_name = name, host_name
        self.remember(conditioning, sample)

    def remember(self, conditioning: Sequence[Tensor], sample: Sample) -> None:
        """Recognise the branch by this conditioning from now on."""
        # Weak references are sound (a dead one is no tensor; recycled addresses do not matter) and cost no memory
        # where the loop builds fresh conditioning at every step.
        self.objects = [(weakref.ref(_owner(tensor)), _look(tensor)) for tensor in conditioning]
        self.sample = sample

    def is_same_objects(self, conditioning: Sequence[Tensor]) -> bool:
        """Whether the branch was last called with these very tensors (or these very views), unchanged since."""
        if len(self.objects) != len(conditioning):
            return False
        pairs = zip(self.objects, conditioning, strict=True)
        return all(known() is _owner(tensor) and look == _look(tensor) for (known, look), tensor in pairs)


def _owner(tensor: Tensor) -> Tensor:
    """The tensor itself, or the one that it is a view of: loops slice and chunk their conditioning anew each step."""
    return tensor if tensor._base is None else tensor._base


def _look(tensor: Tensor) -> tuple[Any, ...]:
    """What part of its owner a tensor shows, and how often that was written into (inference mode does not count)."""
    version = None if tensor.is_inference() else tensor._version
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, version


@dataclass
class Evidence:
    """What one call shows about its branch: the known branches it may belong to, and why these."""

    how: How
    candidates: list[Branch]
    name: str | None
    conditioning: Sequence[Tensor]

    @cached_property
    def sample(self) -> Sample:
        """Values of the conditioning."""
        return Sample(self.conditioning)


class Branches:
    """The branches of one denoiser in one run, named ``branch-0``, ``branch-1``, ... unless the host names them."""

    def __init__(self) -> None:
        self.all: list[Branch] = []
        self.step = -1
        self.called: list[Branch] = []  # in this step, in order
        self.previous: list[Branch] = []  # in the last step with calls
        self.shape: torch.Size | None = None  # of the latent
        self.latent: Sample | None = None  # of the step's first call, until the scheduler has fired

    def open(self, step: int) -> None:
        """Begin a step."""
        if self.called:
            self.previous = self.called
        self.step, self.called = step, []

    def is_other_shape(self, shape: torch.Size) -> bool:
        """Whether such a latent cannot be of this run. A batch that doubles or halves is guidance going on or off."""
        if self.shape is None or self.shape == shape:
            return False
        if self.shape[1:] != shape[1:] or not self.shape:
            return True
        few, many = sorted((self.shape[0], shape[0]))
        return few == 0 or many % few != 0

    def inspect(self, name: str | None, conditioning: Sequence[Tensor]) -> Evidence:
        """Find the branches a call may belong to: by name, else by identity, else by sampled values."""
        if name is not None:
            return Evidence("name", [b for b in self.all if b.host_name == name], name, conditioning)
        unnamed = [branch for branch in self.all if branch.host_name is None]
        same = [branch for branch in unnamed if branch.is_same_objects(conditioning)]
        if same:
            return Evidence("identity", same, None, conditioning)
        evidence = Evidence("values", [], None, conditioning)
        evidence.candidates = [branch for branch in unnamed if branch.sample.is_same(evidence.sample)]
        return evidence

    def is_repeat(self, evidence: Evidence) -> bool:
        """Whether every branch the call may belong to was called in this step already."""
        return bool(evidence.candidates) and all(branch in self.called for branch in evidence.candidates)

    def take(self, evidence: Evidence) -> tuple[Branch, How, bool]:
        """Choose the branch of a call, and mark it as called in this step.

        Returns:
            The branch, how it was told, and whether its conditioning is another than at its last call.
        """
        how, is_edited = evidence.how, False
        free = [branch for branch in evidence.candidates if branch not in self.called]
        branch = free[0] if free else None
        if branch is not None and how == "name":
            branch, is_edited = self._by_conditioning(free, evidence)
        elif branch is None and how == "values" and not evidence.candidates:
            branch, how, is_edited = self._at_ordinal(evidence), "ordinal", True
        if branch is None:
            branch, how, is_edited = self._new(evidence), "new", False
        elif how in ("values", "ordinal"):
            branch.remember(evidence.conditioning, evidence.sample)
        self.called.append(branch)
        return branch, how, is_edited

    def _by_conditioning(self, named: list[Branch], evidence: Evidence) -> tuple[Branch, bool]:
        """Choose among the branches of one name (a host may use it twice in a step), and tell whether it was edited."""
        same = next((branch for branch in named if branch.is_same_objects(evidence.conditioning)), None)
        if same is not None:
            return same, False
        equal = next((branch for branch in named if branch.sample.is_same(evidence.sample)), None)
        branch = named[0] if equal is None else equal
        branch.remember(evidence.conditioning, evidence.sample)
        return branch, equal is None

    def _at_ordinal(self, evidence: Evidence) -> Branch | None:
        """Return the branch called at this place of the previous step: its conditioning was edited."""
        if len(self.called) >= len(self.previous):
            return None
        branch = self.previous[len(self.called)]
        is_free = branch.host_name is None and branch not in self.called
        return branch if is_free and branch.sample.shapes == evidence.sample.shapes else None

    def _new(self, evidence: Evidence) -> Branch:
        host_name, count = evidence.name, sum(branch.host_name == evidence.name for branch in self.all)
        if host_name is None:
            name = f"branch-{count}"
        else:
            name = host_name if count == 0 else f"{host_name}#{count + 1}"
        branch = Branch(name, host_name, evidence.conditioning, evidence.sample)
        self.all.append(branch)
        return branch


def pick(tensor: Tensor) -> Tensor:
    """Return 32 values, on the tensor's device: 16 spread evenly, 16 in ever more distant rows.

    The latter because prompts are padded: most evenly spread samples of a short prompt would hit equal padding.
    """
    index = torch.tensor(_places(tensor.numel(), tensor.shape[-1] if tensor.dim() else 1), dtype=torch.long)
    return tensor.detach().reshape(-1)[index.to(tensor.device, non_blocking=True)]


@functools.lru_cache(maxsize=64)
def _places(count: int, row: int) -> list[int]:
    even = [(count - 1) * k // 15 for k in range(16)]
    near = [min(int(1.6**k) * row + k, count - 1) for k in range(16)]
    return even + near if count else []
