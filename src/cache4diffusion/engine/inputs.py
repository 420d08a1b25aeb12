"""Which argument of a denoiser is the latent, which the timestep, which the conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cache4diffusion.engine.leaves import get_argument, parameter_names, take_apart
from cache4diffusion.errors import AnatomyError

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "time_step", "sigma", "sigmas", "noise_labels", "timestep_r")
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
)
_NEVER_CONDITIONING = ("control", "residual", "sample", "ids", "guidance", "mask", "rotary")


@dataclass(frozen=True)
class Inputs:
    """Roles of a denoiser's arguments.

    Args:
        module: the denoiser (or what ``torch.compile`` made of it).
        latent: name of the argument that is denoised.
        timestep: name of the clock.
        conditioning: names of the arguments that differ between CFG branches.
    """

    module: nn.Module
    latent: str
    timestep: str
    conditioning: tuple[str, ...]

    def split(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Tensor, list[Tensor]]:
        """Timestep, latent and conditioning tensors of one call.

        Raises:
            AnatomyError: the latent is no tensor.
        """
        latent = get_argument(self.module, args, kwargs, (self.latent,))
        if not isinstance(latent, Tensor):
            raise AnatomyError(f"{type(self.module).__name__}: argument {self.latent!r} should be the latent tensor.")
        tensors: list[Tensor] = []
        for name in self.conditioning:
            value = get_argument(self.module, args, kwargs, (name,))
            if value is not None:
                tensors += take_apart(value)[0]
        return get_argument(self.module, args, kwargs, (self.timestep,)), latent, tensors


def inputs_of(denoiser: nn.Module) -> Inputs:
    """Tell the roles by the names in ``forward``'s signature.

    Raises:
        AnatomyError: no argument has the name of a clock.
    """
    plain = getattr(denoiser, "_orig_mod", denoiser)
    names = parameter_names(type(plain))
    timestep = next((name for name in TIMESTEP_NAMES if name in names), None)
    if timestep is None or len(names) < 2:
        raise AnatomyError(
            f"{type(plain).__name__}.forward({', '.join(names)}) has no argument that is called like a timestep "
            f"({', '.join(TIMESTEP_NAMES)}), so runs and steps cannot be told apart."
        )
    others = [name for name in names if name != timestep]
    latent, rest = others[0], others[1:]
    allowed = [name for name in rest if not any(word in name for word in _NEVER_CONDITIONING)]
    named = [name for name in allowed if any(word in name for word in _CONDITIONING_WORDS) or name == "y"]
    return Inputs(plain, latent, timestep, tuple(named or allowed))
