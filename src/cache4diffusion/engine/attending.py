"""Attention over time to frames that the denoiser does not run on: their keys and values are held."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cache4diffusion.anatomy.facts import call_name
from cache4diffusion.errors import AnatomyError

KeysAndValues = tuple[Tensor, Tensor]
OTHERS = "Others may work: 'pab', 'fora', 'text-kv-cache'."


@dataclass
class Pass:
    """One run of the denoiser on some frames.

    Args:
        frames: how many run.
        keeps: of the first so many, keys and values are kept.
        past: keys and values of held frames, by attention.
        found: those that are to be kept.
    """

    frames: int
    keeps: int
    past: dict[str, KeysAndValues] = field(default_factory=dict)
    found: dict[str, KeysAndValues] = field(default_factory=dict)
    turns: Counter[str] = field(default_factory=Counter)


class Attending(TorchFunctionMode):
    """Within one attention over time: queries of this pass also meet the keys of frames that are held."""

    def __init__(self, running: Pass, path: str) -> None:
        super().__init__()
        self.running, self.path = running, path

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        query, key = given["query"], given["key"]
        if query.shape[-2] != key.shape[-2]:  # not of the frames to themselves: an adapter's
            return func(**given)
        running, name = self.running, call_name(self.path, self.running.turns[self.path])
        running.turns[self.path] += 1
        rows, odd = divmod(key.shape[-2], running.frames)
        if odd:
            raise AnatomyError(
                f"{name} attends over {key.shape[-2]} tokens, of which {running.frames} frames have no equal shares, "
                f"so keys of earlier frames cannot be told from the others. {OTHERS}"
            )
        if running.keeps:
            kept = running.keeps * rows
            running.found[name] = (given["key"][..., :kept, :].clone(), given["value"][..., :kept, :].clone())
        past = running.past.get(name)
        return func(**(given if past is None else _behind(past, given)))


def _behind(past: KeysAndValues, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an attention with held keys in front, all of which are seen; among themselves, tokens see what
    they saw."""
    query, key = given["query"], given["key"]
    earlier, mask = past[0].shape[-2], given.get("attn_mask")
    if given.get("is_causal"):
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], key.shape[-2])
        mask = nn.functional.pad(mask, (earlier, 0), value=True if mask.dtype == torch.bool else 0.0)
    return {
        **given,
        "key": torch.cat([past[0], key], dim=-2),
        "value": torch.cat([past[1], given["value"]], dim=-2),
        "attn_mask": mask,
        "is_causal": False,
    }
