"""What a pipeline returned, as numbers that can be compared: latents, images or sound, of whatever kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cache4diffusion.errors import CalibrationError


def numbers_of(output: Any) -> Tensor:
    """All numbers of an output, one behind the other, in float64 on the CPU.

    Args:
        output: tensors, arrays or images, and lists, tuples and dictionaries of them.

    Raises:
        CalibrationError: it has none.
    """
    leaves = [_of_leaf(leaf) for leaf in pytree.tree_leaves(output)]
    if not leaves:
        raise CalibrationError(f"The pipeline returned {type(output).__name__}: there are no numbers to compare.")
    return torch.cat(leaves)


def _of_leaf(leaf: Any) -> Tensor:
    values = leaf if isinstance(leaf, Tensor) else torch.from_numpy(np.asarray(leaf, dtype=np.float64))
    return values.detach().to("cpu", torch.float64).flatten()
