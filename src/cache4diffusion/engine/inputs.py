"""Which argument of a denoiser is the latent, which the timestep, which the conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cache4diffusion.anatomy.arguments import TIMESTEP_NAMES, is_clock, is_no_prompt, timestep_name
from cache4diffusion.anatomy.hints import hint_of
from cache4diffusion.anatomy.undisturbed import unwrapped
from cache4diffusion.engine.leaves import get_argument, parameter_names, take_apart, with_arguments
from cache4diffusion.errors import AnatomyError

_CONDITIONING_WORDS = (
    "encoder_hidden",
    "pooled",
    "class_label",
    "embeds",
    "context",
    "cond",
    "prompt",
    "caption",
    "text",
    "input_ids",
)
_NEVER_COMPARED = ("sample", "mask")  # other latents, and what is as long as the prompt but not its words


@dataclass(frozen=True)
class Inputs:
    """Roles of a denoiser's arguments.

    Args:
        module: the denoiser (or what ``torch.compile`` made of it).
        latent: name of the argument that is denoised.
        timestep: name of the clock; None where there is none, and steps are told by the scheduler alone.
        conditioning: names of the arguments that differ between CFG branches.
    """

    module: nn.Module
    latent: str
    timestep: str | None
    conditioning: tuple[str, ...]

    def split(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Tensor, list[Tensor]]:
        """Timestep, latent and conditioning tensors of one call.

        A latent that comes as a list with an entry per row (Z-Image) is stacked: its first axis is the batch.

        Raises:
            AnatomyError: the latent is neither a tensor nor such a list.
        """
        latent = self._latent(args, kwargs)
        tensors: list[Tensor] = []
        for name in self.conditioning:
            value = get_argument(self.module, args, kwargs, (name,))
            if value is not None:
                tensors += take_apart(value)[0]
        if self.timestep is None:
            return 0.0, latent, tensors
        return get_argument(self.module, args, kwargs, (self.timestep,)), latent, tensors

    def _latent(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        latent = _stacked(get_argument(self.module, args, kwargs, (self.latent,)))
        if latent is None:
            raise AnatomyError(
                f"{type(self.module).__name__}: argument {self.latent!r} should be the latent: a tensor, or a list "
                "with one for each row of the batch. If it is another argument, say so: "
                "c4d.declare(denoiser, latent='x')."
            )
        return latent

    def at(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], timestep: Any, latent: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with another timestep and latent; as a list of rows, if that is how it came."""
        is_list = not isinstance(get_argument(self.module, args, kwargs, (self.latent,)), Tensor)
        changed: dict[tuple[str, ...], Any] = {(self.latent,): list(latent.unbind()) if is_list else latent}
        if self.timestep is not None:
            changed[(self.timestep,)] = timestep
        return with_arguments(self.module, args, kwargs, changed)


def _stacked(latent: Any) -> Tensor | None:
    """One tensor of a latent, or None if it is none; rows of different shapes are laid flat and filled up with 0."""
    if isinstance(latent, Tensor):
        return latent
    rows = [take_apart(row)[0] for row in latent] if isinstance(latent, (list, tuple)) else []
    if not rows or not all(rows):
        return None
    if all(len(row) == 1 and row[0].shape == rows[0][0].shape for row in rows):
        return torch.stack([row[0] for row in rows])
    return pad_sequence([torch.cat([leaf.flatten() for leaf in row]) for row in rows], batch_first=True)


def inputs_of(denoiser: nn.Module) -> Inputs:
    """Tell the roles by the names in ``forward``'s signature, and by what is declared of the class.

    Raises:
        AnatomyError: no argument has the name of a clock.
    """
    plain, hint = unwrapped(denoiser), hint_of(denoiser)
    names = parameter_names(type(plain))
    timestep = (hint.timestep or timestep_name(names)) if hint.has_clock else None
    if (timestep is None and hint.has_clock) or len(names) < 2:
        raise AnatomyError(
            f"{type(plain).__name__}.forward({', '.join(names)}) has no argument that is called like a timestep "
            f"({', '.join(TIMESTEP_NAMES)}), so runs and steps cannot be told apart. If it has another name, say so: "
            "c4d.declare(denoiser, timestep='noise')."
        )
    others = [name for name in names if name != timestep]
    latent = hint.latent or others[0]
    rest = [name for name in others if name != latent]
    apart = [name for name in rest if not is_no_prompt(name) and not is_clock(name)]
    allowed = [name for name in apart if not any(word in name for word in _NEVER_COMPARED)]
    if hint.conditioning is not None:
        return Inputs(plain, latent, timestep, hint.conditioning)
    named = [name for name in allowed if any(word in name for word in _CONDITIONING_WORDS) or name == "y"]
    return Inputs(plain, latent, timestep, tuple(named or allowed))
