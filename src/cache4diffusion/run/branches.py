"""Which CFG branch a call belongs to: by its name, its conditioning, or its place within the step."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

How = Literal["name", "identity", "values", "ordinal", "new"]


class Branch:
    """One branch of one denoiser, and how to recognise it."""

    def __init__(self, name: str, host_name: str | None) -> None:
        self.name, self.host_name = name, host_name
        self.objects: list[weakref.ref[Tensor]] = []
        self.values: tuple[Any, ...] = ()

    def remember(self, conditioning: Sequence[Tensor], values: tuple[Any, ...]) -> None:
        """Recognise the branch by this conditioning from now on."""
        # Weak references are sound (a dead one is no tensor; recycled addresses do not matter) and cost no memory
        # where the loop builds fresh conditioning at every step.
        self.objects = [weakref.ref(tensor) for tensor in conditioning]
        self.values = values

    def is_same_objects(self, conditioning: Sequence[Tensor]) -> bool:
        """Whether the branch was last called with these very tensors."""
        pairs = zip(self.objects, conditioning, strict=False)
        return len(self.objects) == len(conditioning) and all(known() is tensor for known, tensor in pairs)

    def is_same_shapes(self, values: tuple[Any, ...]) -> bool:
        """Whether the tensors sampled as ``values`` have the shapes of this branch's conditioning."""
        return [shape for shape, *_ in self.values] == [shape for shape, *_ in values]


@dataclass
class Evidence:
    """What one call shows about its branch: the known branches it may belong to, and why these."""

    how: How
    candidates: list[Branch]
    name: str | None
    conditioning: Sequence[Tensor]
    values: tuple[Any, ...] = ()


class Branches:
    """The branches of one denoiser in one run, named ``branch-0``, ``branch-1``, ... unless the host names them."""

    def __init__(self) -> None:
        self.all: list[Branch] = []
        self.step = -1
        self.called: list[Branch] = []  # in this step, in order
        self.previous: list[Branch] = []  # in the last step with calls
        self.shape: torch.Size | None = None  # of the latent
        self.latent_values: tuple[Any, ...] = ()  # of the step's first call, until the scheduler has fired

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
        values = tuple(sample(tensor) for tensor in conditioning)
        return Evidence("values", [b for b in unnamed if b.values == values], None, conditioning, values)

    def is_repeat(self, evidence: Evidence) -> bool:
        """Whether every branch the call may belong to was called in this step already."""
        return bool(evidence.candidates) and all(branch in self.called for branch in evidence.candidates)

    def take(self, evidence: Evidence) -> tuple[Branch, How]:
        """Choose the branch of a call, and mark it as called in this step."""
        how = evidence.how
        branch = next((branch for branch in evidence.candidates if branch not in self.called), None)
        if branch is None and how == "values" and not evidence.candidates:
            branch, how = self._at_ordinal(evidence), "ordinal"
        if branch is None:
            branch, how = self._new(evidence), "new"
        if how in ("values", "ordinal"):
            branch.remember(evidence.conditioning, evidence.values)
        self.called.append(branch)
        return branch, how

    def _at_ordinal(self, evidence: Evidence) -> Branch | None:
        """Return the branch called at this place of the previous step: its conditioning was edited."""
        if len(self.called) >= len(self.previous):
            return None
        branch = self.previous[len(self.called)]
        is_free = branch.host_name is None and branch not in self.called
        return branch if is_free and branch.is_same_shapes(evidence.values) else None

    def _new(self, evidence: Evidence) -> Branch:
        name, count = evidence.name, sum(branch.host_name == evidence.name for branch in self.all)
        if name is not None:
            branch = Branch(name if count == 0 else f"{name}#{count + 1}", name)
        else:
            branch = Branch(f"branch-{count}", None)
            values = evidence.values or tuple(sample(tensor) for tensor in evidence.conditioning)
            branch.remember(evidence.conditioning, values)
        self.all.append(branch)
        return branch


def sample(tensor: Tensor) -> tuple[Any, ...]:
    """Return the shape and 32 values: 16 spread evenly, 16 in ever more distant rows.

    The latter because prompts are padded: most evenly spread samples of a short prompt would hit equal padding.
    """
    count = tensor.numel()
    if count == 0:
        return (tensor.shape,)
    row = tensor.shape[-1] if tensor.dim() else 1
    even = [(count - 1) * k // 15 for k in range(16)]
    near = [min(int(1.6**k) * row + k, count - 1) for k in range(16)]
    index = torch.tensor(even + near, device=tensor.device)
    return (tensor.shape, *tensor.detach().reshape(-1)[index].tolist())
