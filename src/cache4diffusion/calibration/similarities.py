"""What BAC measures: how alike each part's outputs are at every two steps. Source: arXiv:2506.13456."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cache4diffusion.calibration.calibrator import Fit, Shape, Sums
from cache4diffusion.calibration.figure import Figure
from cache4diffusion.calibration.statistic import Seen, StepMeans
from cache4diffusion.sites import PART_KINDS, Parts


@dataclass(frozen=True)
class Similarities(StepMeans):
    """``S[i, j] = cos(o_i, o_j)`` of a part's outputs at steps i < j, a table ``[K, K]`` per part.

    In float32, over tokens, channels and the whole batch together; a mean over prompts and branches. Two outputs that
    are 0 are alike (1). Where ``j <= i`` the table is 0.

    A table's name is the part's kind and path: ``ffn transformer_blocks.0.ff``. Tables come in the order in which the
    parts ran, and a file keeps it.

    Memory: one copy of every part's output per step. That suits action sequences; for large images calibrate with
    fewer steps, or at a small size.
    """

    effect: ClassVar[str] = "how features differ between steps"
    nothing: ClassVar[float] = 1.0

    @property
    def site(self) -> Parts:
        """Every part; their kinds are the names of the decisions."""
        return Parts(decisions="kind")

    def measure(self, memory: dict[str, Any], seen: Seen) -> Mapping[str, tuple[int, Tensor]]:
        """How alike the outputs of earlier steps are to those of this one."""
        past: dict[str, dict[int, list[Tensor]]] = memory.setdefault("past", {})
        found = {}
        for path, leaves in seen.features.items():
            now = [leaf.detach().clone() for leaf in leaves]
            then = past.setdefault(path, {})
            row = torch.full((seen.num_steps,), torch.nan, dtype=torch.float64)
            if then:
                row[list(then)] = torch.stack([cosine(before, now) for before in then.values()]).to("cpu", row.dtype)
            found[f"{seen.decisions[path]} {path}"] = (seen.step, row)
            then[seen.step] = now
        return found

    def fit(self, sums: Sums) -> Fit:
        """Means, by the earlier step and then the later one."""
        later = super().fit(sums)
        return Fit({name: mean.T.contiguous() for name, mean in later.tensors.items()}, later.quality)

    def figure(self, sums: Sums, fit: Fit) -> Figure:
        """How alike neighbouring steps are, a mean over the parts of a kind."""
        lines = {}
        for kind in PART_KINDS:
            tables = [table for name, table in fit.tensors.items() if name.split(" ", 1)[0] == kind]
            if tables:
                neighbours = torch.stack([table.diagonal(1) for table in tables]).mean(0).tolist()
                lines[kind] = [(float(i + 1), value) for i, value in enumerate(neighbours)]
        return Figure("step", "cosine similarity to the step before", lines=lines)

    def shapes(self, num_steps: int) -> Mapping[str, Shape]:
        """A table per part."""
        return {f"{kind} *": (num_steps, num_steps) for kind in PART_KINDS}


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Cosine of the angle between two outputs, of several tensors each; of two zeros 1, of one and another 0."""
    pairs = [(x.float(), y.float()) for x, y in zip(a, b, strict=True)]
    dot = sum(((x * y).sum() for x, y in pairs[1:]), (pairs[0][0] * pairs[0][1]).sum())
    size = [torch.linalg.vector_norm(torch.stack([pair[i].norm() for pair in pairs])) for i in (0, 1)]
    length = size[0] * size[1]
    return torch.where(length > 0, dot / length, (size[0] == size[1]).float())
