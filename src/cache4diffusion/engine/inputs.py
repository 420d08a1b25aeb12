"""Which argument of a denoiser is the latent, which the timestep, which the conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cache4diffusion.anatomy.arguments import TIMESTEP_NAMES, is_clock, is_no_prompt, timestep_name
from cache4diffusion.anatomy.hints import hint_of
from cache4diffusion.engine.leaves import get_argument, parameter_names, take_apart
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

        A latent that is handed over as a list, a tensor per sample, is stacked, or laid end to end in one row if its
        tensors differ in shape.

        Raises:
            AnatomyError: the latent is no tensor.
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
        found = get_argument(self.module, args, kwargs, (self.latent,))
        if isinstance(found, Tensor):
            return found
        items = take_apart(found)[0] if isinstance(found, (list, tuple)) else []
        if not items:
            raise AnatomyError(f"{type(self.module).__name__}: argument {self.latent!r} should be the latent tensor.")
        if len({item.shape for item in items}) == 1:
            return torch.stack(list(items))
        return torch.cat([item.reshape(1, -1) for item in items], dim=1)


def inputs_of(denoiser: nn.Module) -> Inputs:
    """Tell the roles by the names in ``forward``'s signature, and by what is declared of the class.

    Raises:
        AnatomyError: no argument has the name of a clock.
    """
    plain, hint = getattr(denoiser, "_orig_mod", denoiser), hint_of(denoiser)
    names = parameter_names(type(plain))
    timestep = timestep_name(names) if hint.has_clock else None
    if (timestep is None and hint.has_clock) or len(names) < 2:
        raise AnatomyError(
            f"{type(plain).__name__}.forward({', '.join(names)}) has no argument that is called like a timestep "
            f"({', '.join(TIMESTEP_NAMES)}), so runs and steps cannot be told apart."
        )
    others = [name for name in names if name != timestep]
    latent = hint.latent or others[0]
    rest = [name for name in others if name != latent]
    apart = [name for name in rest if not is_no_prompt(name) and not is_clock(name)]
    allowed = [name for name in apart if not any(word in name for word in _NEVER_COMPARED)]
    named = [name for name in allowed if any(word in name for word in _CONDITIONING_WORDS) or name == "y"]
    return Inputs(plain, latent, timestep, tuple(named or allowed))
