"""Runs in which caching has little to gain: few steps, and models distilled to take few.

What is recognised as distilled, and by what: `FEW_STEP_SCHEDULERS`, by the class of the pipeline's scheduler;
`FEW_STEP_WORDS`, by a word of the name that the pipeline or a denoiser was loaded from; and FLUX.1-schnell, by its
configuration alone: FLUX.1's 19 + 38 blocks without embedded guidance, and a scheduler that shifts nothing.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from cache4diffusion.anatomy.undisturbed import unwrapped
from cache4diffusion.composition import Composition
from cache4diffusion.errors import Cache4DiffusionError, CompositionError
from cache4diffusion.run.taps import schedulers_of
from cache4diffusion.strip import best_strip
from cache4diffusion.trace import FULL, HALF, REDUCED

FEW = 9
"""Runs of fewer steps are warned of."""

FEW_STEP_SCHEDULERS = (
    "LCMScheduler",
    "FlowMatchLCMScheduler",
    "TCDScheduler",
    "SCMScheduler",
    "CMStochasticIterativeScheduler",
    "HeliosDMDScheduler",
)

FEW_STEP_WORDS = ("schnell", "turbo", "lightning", "lcm", "sprint", "hyper", "tcd", "dmd", "dmd2")


class FewStepsWarning(UserWarning):
    """Caching has little to gain in a run."""


@contextmanager
def unconcerned() -> Iterator[None]:
    """Without the warnings that few steps, or none that were cached, raise: for runs whose figures say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewStepsWarning)
        warnings.filterwarnings("ignore", message=r"0 of \d+ steps were cached")
        yield


def gain_at_most(composition: Composition, steps: int) -> tuple[str, float]:
    """The strip with the fewest full steps that a run can have, and its speed-up in FLOPs if a cached step cost none.

    Args:
        composition: what runs.
        steps: of the run.
    """
    try:
        composition.check_run(steps)
        strip = best_strip(copy.deepcopy(composition), steps)  # a gate may write down what it is asked
    except Cache4DiffusionError:  # nothing would be cached, or it is made for other runs
        return FULL * steps, 1.0
    computed = strip.count(FULL) + strip.count(REDUCED) + 0.5 * strip.count(HALF)
    return strip, steps / max(computed, 1.0)


def few_steps_text(label: str, composition: Composition, steps: int) -> str:
    """What is to be said of a run of few steps."""
    strip, gain = gain_at_most(composition, steps)
    return (
        f"{steps} steps leave {label} little to cache: at most {gain:.2f}x fewer FLOPs in the denoiser ({strip}), if a "
        "cached step cost nothing."
    )


def distilled_by(target: Any, found: Mapping[str, nn.Module]) -> str | None:
    """What a pipeline or denoiser is recognised by as distilled to few steps; None if by nothing.

    Args:
        target: the pipeline or denoiser.
        found: its denoisers by name.
    """
    schedulers = [] if isinstance(target, nn.Module) else schedulers_of(target)
    for scheduler in schedulers:
        if type(scheduler).__name__ in FEW_STEP_SCHEDULERS:
            return f"its scheduler is {type(scheduler).__name__}"
    for owner in (target, *found.values()):
        config = getattr(unwrapped(owner) if isinstance(owner, nn.Module) else owner, "config", None)
        name = str(_entry(config, "_name_or_path") or "")
        word = next((w for w in re.split(r"[^a-z0-9]+", name.lower()) if w in FEW_STEP_WORDS), None)
        if word is not None:
            return f"{word!r} is in its name, {name}"
    is_unshifted = [not _entry(s.config, "use_dynamic_shifting") and _entry(s.config, "shift") == 1 for s in schedulers]
    if any(is_unshifted) and any(_is_schnell(denoiser) for denoiser in found.values()):
        return "it is a FLUX.1 without embedded guidance and without a shift, as FLUX.1-schnell is"
    return None


def _is_schnell(denoiser: nn.Module) -> bool:
    plain = unwrapped(denoiser)
    sizes = ("num_layers", "num_single_layers", "guidance_embeds")
    config = getattr(plain, "config", None)
    return type(plain).__name__ == "FluxTransformer2DModel" and [_entry(config, s) for s in sizes] == [19, 38, False]


def _entry(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def check_distilled(
    target: Any, found: Mapping[str, nn.Module], composition: Composition, *, strict: bool = False
) -> None:
    """Warn of a model that is distilled to few steps, or refuse it.

    Args:
        target: the pipeline or denoiser.
        found: its denoisers by name.
        composition: what is to run.
        strict: refuse.

    Raises:
        CompositionError: ``strict``, and the model is distilled.
    """
    concerns = composition.lives_on_other_steps and not composition.is_off
    reason = distilled_by(target, found) if concerns else None
    if reason is None:
        return
    bounds = [f"{gain_at_most(composition, steps)[1]:.2f}x in {steps} steps" for steps in (4, 8)]
    name = type(target).__name__
    text = (
        f"{name} is distilled to few steps ({reason}), so caching has little to gain: at most {' and '.join(bounds)}, "
        "in the denoiser's FLOPs."
    )
    if strict:
        raise CompositionError(f"{text} strict=True refuses that.")
    warnings.warn(text, FewStepsWarning, stacklevel=3)
