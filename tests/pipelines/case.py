"""One row of the table of cases: a pipeline, what it is asked for, and what that exercises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils import BaseOutput

ALL = ("whole", "span", "part")
UNET = ("whole", "level", "part")


@dataclass(frozen=True)
class Case:
    """A pipeline, and one way to sample from it.

    Args:
        name: of the case.
        make: builds the pipeline, with the same random weights each time.
        call: arguments of a run, made afresh for each, without generator, steps and type of output.
        task: what the pipeline is for.
        guidance: how its guidance calls the denoiser.
        steps: asked for; None where ``call`` says it in another way.
        sites: kinds of sites that are tried.
        without: kinds of sites that cannot be had, with words of the reason that is given.
        output: type of output that costs least.
        exercises: what is special.
        core: the kind of site that is among the quick checks, if one is.
    """

    name: str
    make: Callable[[], Any]
    call: Callable[[], dict[str, Any]]
    task: str = "text-to-image"
    guidance: str = "none"
    steps: int | None = 6
    sites: tuple[str, ...] = ALL
    without: Mapping[str, str] = field(default_factory=dict)
    output: str = "latent"
    exercises: str = ""
    core: str | None = None

    def pipe(self) -> Any:
        """The pipeline, silent."""
        found = self.make()
        found.set_progress_bar_config(disable=True)
        return found

    @torch.no_grad()
    def sample(self, pipe: Any, seed: int = 0, **changes: Any) -> torch.Tensor:
        """One run; the same seed gives the same."""
        arguments = {"output_type": self.output, "return_dict": False, **self.call(), **changes}
        if self.steps is not None:
            arguments.setdefault("num_inference_steps", self.steps)
        if "output_type" in arguments and arguments["output_type"] is None:
            del arguments["output_type"]
        torch.manual_seed(seed)  # some draw noise without being given a generator
        found = pipe(generator=torch.Generator().manual_seed(seed), **arguments)
        while isinstance(found, (tuple, list, BaseOutput)):
            found = found[0]
        return torch.as_tensor(found)


def denoisers(pipe: Any) -> dict[str, torch.nn.Module]:
    """What the library finds in it."""
    from cache4diffusion.accelerate import denoisers_of

    return denoisers_of(pipe)
